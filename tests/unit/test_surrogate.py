"""What searchers that model the score rest on: blocks of genes, the process, and what a candidate is worth."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from nascompile import pareto, plugins
from nascompile.errors import RecipeError
from nascompile.records import FLOAT32, INT8, Gene, SearchSpace
from nascompile.searchers import Price, Problem
from nascompile.searchers.blocks import Blocks
from nascompile.searchers.ehvi import EhviRun, _edge, _Model
from nascompile.searchers.encoding import Encoding
from nascompile.searchers.gaussian import Features, Process


def make_space(layers: int = 4) -> SearchSpace:
    """Half of the layers can be dropped; a width and a precision each."""
    genes, precisions = [Gene(name="depth", kind="architecture", choices=tuple(range(layers // 2, layers + 1)))], []
    for layer in range(layers):
        needs = (("depth", layer + 1),) if layer >= layers // 2 else ()
        genes.append(Gene(name=f"layers.{layer}.width", kind="architecture", choices=(8, 16, 32), requires=needs))
        precisions.append(Gene(name=f"layers.{layer}.precision", kind="precision", choices=("fp32", "int8"), requires=needs))
    return SearchSpace(
        family="f", model_digest="m", genes=(*genes, *precisions), precisions=(FLOAT32, INT8), targets=("cpu",),
        layer_order=tuple(range(layers)),
    )  # fmt: skip


def milliseconds(point, crossed=0.0):
    """A width costs less in INT8; `crossed`: what two neighbours of the same precision cost more."""
    values, precisions = dict(point.architecture), dict(point.precision[0][1])
    names = [precisions[f"layers.{layer}.precision"] for layer in range(values["depth"])]
    widths = [values[f"layers.{layer}.width"] for layer in range(values["depth"])]
    same = sum(a == b for a, b in itertools.pairwise(names))
    return 0.5 + sum(w * (0.03 if n == "int8" else 0.1) for w, n in zip(widths, names, strict=True)) + crossed * same


def damage(rows, encoding):
    """A formula of a genome (n,): layers differ, the first two do harm together."""
    active = encoding.active(rows)
    widths = np.where(active[:, 1:5], (2 - rows[:, 1:5]) / 2, 0.0)
    rounded = np.where(active[:, 5:9], rows[:, 5:9], 0)
    return 5 + widths @ [4.0, 1.0, 0.5, 2.0] + rounded @ [0.3, 0.1, 0.0, 0.2] + 2 * widths[:, 0] * widths[:, 1] + 3 * (2 - rows[:, 0])


def problem(crossed=0.0, space=None):
    return Problem(space or make_space(), 2, lambda point: Price((None, milliseconds(point, crossed))))


# ---------------------------------------------------------------------------------------------- blocks


@pytest.mark.parametrize("crossed", [0.0, 0.01])
def test_genes_whose_costs_do_not_add_up_are_of_one_block(crossed):
    encoding = Encoding(make_space())
    blocks = Blocks(problem(crossed), encoding)
    names = [tuple(encoding.slots[slot] for slot in block.slots) for block in blocks.blocks]
    assert sorted(names) == [(f"layers.{n}.width", f"layers.{n}.precision") for n in range(4)]
    assert [len(block.options) for block in blocks.blocks] == [6] * 4
    assert [encoding.decode(row).value("depth") for row in blocks.crowns()] == [4, 3, 2]


@pytest.mark.parametrize(("crossed", "additive"), [(0.0, True), (0.001, True), (0.2, False)])
def test_sums_over_blocks_are_taken_only_where_they_are_the_prices(crossed, additive):
    encoding = Encoding(make_space())
    blocks = Blocks(problem(crossed), encoding)
    rows = encoding.everything()
    assert len(rows) == 6**2 + 6**3 + 6**4
    assert blocks.additive == additive
    assert blocks.prices(rows)[:, 0] == pytest.approx([milliseconds(encoding.decode(row), crossed) for row in rows], rel=0.01)


# ---------------------------------------------------------------------------------------------- the process


def test_the_process_knows_what_it_saw_and_ranks_what_it_did_not():
    encoding, rng = Encoding(make_space()), np.random.default_rng(0)
    rows = np.unique(encoding.sample(rng, 60), axis=0)
    others = encoding.everything()
    process = Process(Features(encoding), rows, damage(rows, encoding))
    mean, deviation = process.predict(rows)
    assert np.abs(mean - damage(rows, encoding)).mean() < 0.3  # of a range of 20; what just two genes do together is noise to it
    unseen, doubt = process.predict(others)
    truth = damage(others, encoding)
    assert np.corrcoef(unseen, truth)[0, 1] > 0.98
    assert deviation.mean() < doubt.mean()
    assert np.mean(np.abs(unseen - truth) < 3 * np.hypot(doubt, 0.1)) > 0.9


def test_a_part_that_counts_nothing_is_left_out(monkeypatch):
    from nascompile.searchers import gaussian

    encoding, rng = Encoding(make_space()), np.random.default_rng(0)
    rows = encoding.sample(rng, 40)
    monkeypatch.setattr(gaussian, "PARTS", np.array([1.0, 0.0, 0.0]))
    process = Process(Features(encoding), rows, damage(rows, encoding))
    wide, thin = encoding.canonical(np.array([[2, 2, 2, 2, 2, 0, 0, 0, 0], [2, 0, 0, 2, 2, 0, 0, 0, 0]]))
    one, other = encoding.canonical(np.array([[2, 0, 2, 2, 2, 0, 0, 0, 0], [2, 2, 0, 2, 2, 0, 0, 0, 0]]))
    both = process.predict(np.array([wide, thin, one, other]))[0]
    assert both[0] + both[1] == pytest.approx(both[2] + both[3])  # effects add up exactly


# ---------------------------------------------------------------------------------------------- worth


def told(count=12, seed=0, crossed=0.0):
    """A run that was told a formula's values of random candidates."""
    run = EhviRun(problem(crossed), 50, (), seed)
    rows = np.unique(run.encoding.sample(np.random.default_rng(seed), count), axis=0)
    points = tuple(run.encoding.decode(row) for row in rows)
    values = np.column_stack([damage(rows, run.encoding), [milliseconds(p, crossed) for p in points]])
    run.tell(points, values, np.zeros(len(rows)))
    return run


def test_worth_is_the_hypervolume_that_random_outcomes_add():
    model, rng = _Model(told()), np.random.default_rng(1)
    corner = (np.exp(model.worst), float(model.corner[0]))
    points = np.column_stack([np.exp(model.targets), model.known])
    before = pareto.hypervolume(points, corner)
    mean, deviation = np.array([model.targets.min() - 0.2, np.median(model.targets), model.worst + 2.0]), np.array([0.3, 0.5, 0.2])
    known = np.quantile(model.known, [0.2, 0.5, 0.9])[:, None]
    worth = model.worth(mean, deviation, known)
    for number in range(3):
        drawn = rng.normal(mean[number], np.hypot(deviation[number], model.noise), 4000)
        gains = [pareto.hypervolume(np.vstack([points, [np.exp(x), known[number, 0]]]), corner) - before for x in drawn]
        error = np.std(gains) / np.sqrt(len(gains))
        assert abs(worth[number] - np.mean(gains)) < 4 * error + 1e-6
    assert worth[0] > worth[1] > worth[2]


def test_what_is_believed_is_worth_little_again():
    model = _Model(told())
    mean, deviation, known = np.array([model.targets.min() - 0.1]), np.array([0.01]), np.array([[np.median(model.known)]])
    before = model.worth(mean, deviation, known)[0]
    model.believe(float(mean[0]), known[0])
    assert model.worth(mean, deviation, known)[0] < 0.2 * before


def test_an_edge_is_the_front_without_equal_points():
    points = np.array([[3.0, 1.0], [2.0, 2.0], [2.0, 2.0], [2.5, 2.0], [1.0, 5.0], [1.0, 6.0]])
    assert sorted(map(tuple, points[_edge(points)])) == sorted({tuple(points[i]) for i in pareto.front(points)})
    assert len(_edge(points)) == 3


def test_without_the_error_there_is_nothing_to_model():
    both = Problem(make_space(), 2, lambda point: Price((milliseconds(point), 1.0)))
    with pytest.raises(RecipeError, match="0 of 2") as caught:
        plugins.get("searchers", "ehvi").start(both, 8, (), 0)
    assert "error" in caught.value.hint


def test_where_nothing_asked_for_is_affordable_prices_alone_lead_to_what_is():
    """A budget that one in a hundred million keeps, nowhere near the extremes: chance would not come upon it."""
    space = make_space(layers=12)
    encoding, rng = Encoding(space), np.random.default_rng(3)
    hidden = encoding.sample(rng, 1)[0]

    def over(point):
        return max(0.0, float((encoding.encode([point])[0] != hidden).sum()) - 2)

    run = EhviRun(Problem(space, 2, lambda p: Price((None, milliseconds(p)), over(p)), True), 8, (), 0)
    assert min(over(encoding.decode(row)) for row in encoding.sample(rng, 2000)) > 0
    asked = []
    for _ in range(5):
        points = run.ask()
        excess = np.array([over(p) for p in points])
        run.tell(points, np.column_stack([np.where(excess > 0, 1e6, 5.0), [milliseconds(p) for p in points]]), excess)
        asked += points
    assert len(set(asked)) == len(asked)
    assert sum(over(p) == 0 for p in asked) >= 8
