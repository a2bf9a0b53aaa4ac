"""What every searcher promises: new candidates of the space, the same for the same seed, none that its budgets rule out, and an end."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from nascompile import pareto, plugins, space as spaces
from nascompile.records import FLOAT32, INT8, Gene, SearchSpace
from nascompile.searchers import Price, Problem
from nascompile.searchers.encoding import Encoding

SEARCHERS = plugins.names("searchers")
KNOWING = tuple(name for name in SEARCHERS if name not in ("linas", "nsga2", "nsga3", "random"))
"""Searchers that use what is known of a candidate without scoring it."""


def make_space() -> SearchSpace:
    """84 candidates; most genomes of little depth mean the same network."""
    genes = [Gene(name="depth", kind="architecture", choices=(1, 2, 3))]
    for layer, requires in ((1, ()), (2, (("depth", 2),)), (0, (("depth", 3),))):
        genes.append(Gene(name=f"layers.{layer}.width", kind="architecture", choices=(8, 16), requires=requires))
        genes.append(Gene(name=f"layers.{layer}.precision", kind="precision", choices=("fp32", "int8"), requires=requires))
    return SearchSpace(
        family="f", model_digest="m", genes=tuple(genes), precisions=(FLOAT32, INT8), targets=("cpu",), layer_order=(1, 2, 0)
    )


def objectives(points, count=2):
    """Deterministic, conflicting, with ties: width wins error and costs time; the first is what only a score tells."""
    rows = []
    for p in points:
        widths = sum(v for n, v in p.architecture if n != "depth")
        saved = sum(v == "int8" for _, v in p.precision[0][1])
        rows.append([100 - widths + saved, widths - 3 * saved, float(len(p.architecture)), 50.0 - widths][:count])
    return np.array(rows, dtype=float)


def problem(space, count=2, over=None):
    """Prices of a space; `over`: candidate ▸ excess over the budgets of costs."""

    def price(point):
        return Price((None, *objectives([point], count)[0][1:].tolist()), over(point) if over else 0.0)

    return Problem(space, count, price, over is not None)


def drive(name, space, seed=0, population=12, first=(), rounds=40, over=None, count=2, lost=lambda point: 0.0):
    """Everything a searcher asks for, round by round; what is over budget is not scored, as in the search stage."""
    run = plugins.get("searchers", name).start(problem(space, count, over), population, tuple(first), seed)
    asked = []
    for _ in range(rounds):
        points = run.ask()
        if not points:
            break
        asked.append(points)
        values, excess = objectives(points, count), np.array([over(p) if over else 0.0 for p in points])
        values[excess > 0, 0] = 1e6
        run.tell(points, values, np.where(excess > 0, excess, [lost(p) for p in points]))
    return asked


@pytest.mark.parametrize("name", SEARCHERS)
def test_candidates_are_legal_and_never_repeated(name):
    space = make_space()
    asked = drive(name, space)
    flat = [p for points in asked for p in points]
    for point in flat:
        spaces.check(space, point)
    assert len(flat) == len(set(flat))
    assert all(len(points) <= 12 for points in asked)


@pytest.mark.parametrize("name", SEARCHERS)
def test_a_small_space_is_seen_whole_and_then_it_ends(name):
    space = make_space()
    assert spaces.size(space) == 84
    asked = drive(name, space, rounds=200)
    assert {p for points in asked for p in points} == set(spaces.enumerate_all(space))
    assert len(asked) < 200


@pytest.mark.parametrize("name", SEARCHERS)
def test_it_ends_even_where_nothing_is_affordable(name):
    asked = drive(name, make_space(), rounds=200, over=lambda point: 1.0)
    assert 1 <= sum(map(len, asked)) <= 84
    assert len(asked) < 200


@pytest.mark.parametrize("name", SEARCHERS)
def test_it_ends_even_where_every_candidate_loses_too_much(name):
    asked = drive(name, make_space(), rounds=200, lost=lambda point: 1.0)
    assert len({p for points in asked for p in points}) == 84
    assert len(asked) < 200


@pytest.mark.parametrize("name", KNOWING)
def test_what_is_known_to_be_over_budget_comes_last(name):
    """A third of the candidates is affordable: once one of them is scored, the others are not asked for before those are."""
    space = make_space()
    every = list(spaces.enumerate_all(space))
    bound = sorted(objectives(every)[:, 1])[len(every) // 3]

    def over(point):
        return max(0.0, (objectives([point])[0, 1] - bound) / 10)

    fine = {p for p in every if over(p) == 0}
    first = tuple(sorted(fine, key=str)[:3])
    asked = [p for points in drive(name, space, first=first, over=over, rounds=200) for p in points]
    begin, model = asked[:16], asked[16 : len(fine)]
    assert 20 <= len(fine) <= 40
    assert sum(p in fine for p in begin) >= 3
    if name != "mip":  # whose ablations are of the whole network, affordable or not
        assert all(p in fine for p in model[: len(fine) - sum(p in fine for p in begin) - 1])


@pytest.mark.parametrize("name", SEARCHERS)
def test_the_same_seed_asks_for_the_same_candidates_and_another_for_others(name):
    space, rounds = make_space(), 200 if name == "mip" else 4  # chance has a part in its end only
    a, b, c = (drive(name, space, seed=seed, rounds=rounds, population=16) for seed in (1, 1, 2))
    assert a == b
    assert a != c


@pytest.mark.parametrize("name", SEARCHERS)
def test_the_same_seed_asks_for_the_same_where_budgets_are_missed_alike(name):
    space = make_space()
    runs = [drive(name, space, seed=3, rounds=6, over=lambda p: 0.5 * (p.value("depth") > 1), lost=lambda p: 1.0) for _ in range(3)]
    assert runs[0] == runs[1] == runs[2]


@pytest.mark.parametrize("name", SEARCHERS)
def test_it_begins_with_some_of_what_it_was_given(name):
    space = make_space()
    first = (spaces.uniform(space), spaces.largest(space), spaces.uniform(space), spaces.smallest(space))
    asked = drive(name, space, first=first, rounds=3)
    assert set(asked[0]) & set(first)
    flat = [p for points in asked for p in points]
    assert len(flat) == len(set(flat))


@pytest.mark.parametrize("name", SEARCHERS)
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_any_number_of_objectives_and_a_population_larger_than_the_space(name, count):
    space = make_space()
    asked = drive(name, space, population=100, count=count)
    flat = [p for points in asked for p in points]
    assert len(flat) == len(set(flat)) == 84


@pytest.mark.parametrize("name", SEARCHERS)
def test_a_space_of_one_candidate(name):
    space = SearchSpace(
        family="f", model_digest="m", genes=(Gene(name="depth", kind="architecture", choices=(2,)),), precisions=(FLOAT32,),
        targets=("cpu",), layer_order=(0, 1),
    )  # fmt: skip
    assert drive(name, space) == [(spaces.largest(space),)]


def hypervolume_of(points, space):
    every = objectives(list(spaces.enumerate_all(space)))
    return pareto.hypervolume(objectives(points), every.max(axis=0) + 1)


@pytest.mark.parametrize("name", ["linas", "linas-table", "mip", "ehvi"])
def test_it_finds_more_than_chance_does(name):
    """24 of the 84 candidates; the mean of three seeds, which one seed may miss by half a point, against ten of chance."""
    space = make_space()

    def best(searcher, seed):
        asked = [p for points in drive(searcher, space, seed=seed, rounds=6) for p in points][:24]
        return hypervolume_of(asked, space)

    found = np.mean([best(name, seed) for seed in range(3)])
    assert found > np.mean([best("random", seed) for seed in range(10)])
    assert found >= 0.97 * hypervolume_of(list(spaces.enumerate_all(space)), space)


def test_a_whole_space_in_rows_is_in_the_order_of_its_candidates():
    space = make_space()
    encoding = Encoding(space)
    assert [encoding.decode(row) for row in encoding.everything()] == list(spaces.enumerate_all(space))


@pytest.mark.parametrize("name", SEARCHERS)
def test_after_its_first_it_asks_for_no_larger_batches_than_it_says(name):
    batch = plugins.get("searchers", name).batch
    sizes = [len(points) for points in drive(name, make_space(), population=12)[1:]]
    assert max(sizes) == (batch or 12)


def test_a_row_is_the_candidate_that_the_space_has_at_its_indices():
    """Also where precisions are a target's own."""
    one = make_space()
    two = msgspec.structs.replace(one, targets=("cpu", "far"), legal=(("fp32", "int8"), ("int8",)))
    for space in (one, two):
        encoding = Encoding(space)
        rows = encoding.sample(np.random.default_rng(0), 200)
        assert len({row.tobytes() for row in rows}) > 40
        points = [encoding.decode(row) for row in rows]
        assert points == [spaces.decode(space, tuple(int(index) for index in row)) for row in rows]
        assert (encoding.encode(points) == rows).all()
        assert [spaces.encode(space, point) for point in points] == [tuple(row) for row in rows]
