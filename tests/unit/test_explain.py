"""What a search says it has learned, against a formula that is known."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from nascompile import explain, space as spaces
from nascompile.errors import RecordError
from nascompile.explain import Genome
from nascompile.progress import Silent
from nascompile.records import (
    FLOAT32,
    INT8,
    Candidate,
    Evaluation,
    Explanation,
    Front,
    Gene,
    Interval,
    Score,
    SearchSpace,
    Target,
    Workload,
    load,
    save,
)

TARGET = Target(device="d", backend="b", workload=Workload())


def make_space() -> SearchSpace:
    """Depth 1 to 3; layer 2 goes first, then layer 1. A width and a precision each."""
    genes = [Gene(name="depth", kind="architecture", choices=(1, 2, 3))]
    for layer, least in ((0, 1), (1, 2), (2, 3)):
        requires = (("depth", least),) if least > 1 else ()
        genes.append(Gene(name=f"layers.{layer}.width", kind="architecture", choices=(4, 8, 12, 16), requires=requires))
        genes.append(Gene(name=f"layers.{layer}.precision", kind="precision", choices=("fp32", "int8"), requires=requires))
    return SearchSpace(
        family="f", model_digest="m", genes=tuple(genes), precisions=(FLOAT32, INT8), targets=(TARGET.id,), layer_order=(0, 1, 2)
    )


SPACE = make_space()
WORTH = {0: 1.0, 1: 0.25, 2: 0.05}
"""Points per unit of width; precision is worth nothing."""


def accuracy(point: Candidate) -> float:
    return 50 + sum(WORTH[int(name.split(".")[1])] * value for name, value in point.architecture if name != "depth")


def latency(point: Candidate) -> float:
    """ms: 0.5 a unit of width in FP32, half of that in INT8; layer 1 costs nothing."""
    precisions = dict(point.precision[0][1])
    total = 1.0
    for name, value in point.architecture:
        if name != "depth" and name != "layers.1.width":
            total += value * (0.25 if precisions[name.replace("width", "precision")] == "int8" else 0.5)
    return total


def evaluation(point: Candidate, value: float) -> Evaluation:
    ms = latency(point)
    score = Score(
        metric="accuracy", direction="maximize", value=value, n=100, stderr=1.0, split_digest="s", weights_digest="w", evaluator_digest="e"
    )
    widths = sum(v for n, v in point.architecture if n != "depth")
    interval = Interval(value=ms, low=ms, high=ms, unit="ms")
    return Evaluation(candidate=point, score=score, latency=interval, size_bytes=1, parameters=1, macs=widths)


def drawn(count: int, seed: int = 0, first: tuple[Candidate, ...] = ()) -> list[Candidate]:
    rng = np.random.default_rng(seed)
    points = dict.fromkeys(first)
    while len(points) < count:
        points[spaces.sample(SPACE, rng)] = None
    return list(points)


def explained(points: list[Candidate], noise: float = 0.0, seed: int = 0, target: Target = TARGET) -> Explanation:
    rng = np.random.default_rng(5)
    scored = [evaluation(p, accuracy(p) + noise * rng.standard_normal()) for p in points]
    front = Front(
        space=SPACE, target=target, objectives=("error", "latency_ms"), budgets=(), evaluations=tuple(scored[:1]), searcher="random",
        seed=0, scored=len(scored), seconds=1.0,
    )  # fmt: skip
    return explain.explain(SPACE, front, scored, lambda point: (latency(point),), seed, Silent())


@pytest.fixture(scope="module")
def found() -> Explanation:
    return explained(drawn(160, first=(spaces.uniform(SPACE),)))


def test_a_formula_that_adds_up_is_found_and_believed(found):
    assert found.r2 > 0.99
    assert found.model == "ridge"
    assert [name for name, _ in found.others] == ["forest"]
    assert found.trust == explain.trust(0.99)
    assert found.scored == 160


def test_genes_rank_as_they_matter(found):
    points = {g.gene: g.points for g in found.genes}
    assert set(points) == set(spaces.gene_names(SPACE))
    order = sorted(points, key=lambda name: -points[name])
    assert order[0] == "layers.0.width"
    assert points["layers.0.width"] > 2 * points["layers.1.width"] > 2 * points["layers.2.width"]
    # shuffled values of a uniform gene differ by √2 standard deviations in the mean: 4.47 · √2 · 1 point
    assert points["layers.0.width"] == pytest.approx(6.3, rel=0.15)
    assert max(points[f"layers.{n}.precision"] for n in range(3)) < 0.1


def test_latency_is_the_tables_and_nothing_is_fitted(found):
    ms = {g.gene: g.ms[0] for g in found.genes}
    assert ms["layers.1.width"] == ms["layers.1.precision"] == 0.0
    assert min(ms[name] for name in ("depth", "layers.0.width", "layers.0.precision", "layers.2.width", "layers.2.precision")) > 0.2


def test_thinning_says_what_the_formula_says(found):
    assert found.base == spaces.uniform(SPACE)
    rows = {(t.layer, t.change): t for t in found.layers}
    assert len(rows) == len(found.layers) == 5
    for layer, saved in ((0, 3.0), (1, 0.0), (2, 3.0)):
        t = rows[layer, "width 16 to 4"]
        assert t.ms == pytest.approx((saved,))
        assert t.points == pytest.approx(12 * WORTH[layer], abs=0.3)
        assert t.kind == ("predicted" if t.spread is not None else "scored")
    assert rows[-1, "depth 3 to 2, without layer 3"].points == pytest.approx(16 * 0.05, abs=0.3)
    assert rows[-1, "depth 3 to 1, without layers 2, 3"].ms == pytest.approx((4.0,))


def test_what_was_scored_is_not_predicted():
    base = spaces.uniform(SPACE)
    thin = spaces.candidate(SPACE, {**spaces.genome(SPACE, base), "layers.0.width": 4})
    found = explained(drawn(60, first=(base, thin)), noise=3.0)
    (t,) = [t for t in found.layers if t.layer == 0]
    rng = np.random.default_rng(5)
    first, second = 3.0 * rng.standard_normal(2)
    assert (t.kind, t.spread) == ("scored", None)
    assert t.points == pytest.approx(12 + first - second)
    assert {t.kind for t in found.layers if t.layer > 0} == {"predicted"}


def test_noise_is_not_believed():
    points = drawn(60)
    flat = [evaluation(p, float(v)) for p, v in zip(points, np.random.default_rng(1).standard_normal(60), strict=True)]
    front = explained(points)
    assert front.r2 > 0.9
    found = explain.explain(
        SPACE, Front(
            space=SPACE, target=TARGET, objectives=("error", "latency_ms"), budgets=(), evaluations=(), searcher="r", seed=0, scored=60,
            seconds=1.0,
        ), flat, lambda point: (latency(point),), 0, Silent(),
    )  # fmt: skip
    assert found.r2 < explain.HINT
    assert "not to be believed" in found.trust
    assert "not to be believed" in explain.lines(found)[0]


def test_the_same_seed_says_the_same():
    points = drawn(40)
    assert explained(points, 1.0) == explained(points, 1.0)
    assert explained(points, 1.0).genes != explained(points, 1.0, seed=1).genes


def test_too_few_and_all_alike_are_errors():
    with pytest.raises(RecordError, match="too few scored candidates to explain anything: 15"):
        explained(drawn(15))
    scored = [evaluation(p, 80.0) for p in drawn(20)]
    with pytest.raises(RecordError, match="all 20 scored candidates score 80"):
        explain.explain(SPACE, None, scored, lambda point: (latency(point),), 0, Silent())  # type: ignore[arg-type]


def test_without_the_whole_network_the_largest_that_was_scored_is_thinned():
    points = [p for p in drawn(60) if p != spaces.uniform(SPACE)]
    base = explained(points).base
    assert sum(v for n, v in base.architecture if n != "depth") == max(sum(v for n, v in p.architecture if n != "depth") for p in points)


def test_milliseconds_of_a_microcontroller_are_modelled(found):
    assert found.unit == "ms"
    assert explained(drawn(40), target=msgspec.structs.replace(TARGET, session=(("core", "cortex-m7"),))).unit == "modelled ms"


def test_it_is_a_record_that_comes_back_and_text_that_has_every_gene(found, tmp_path):
    save(found, tmp_path / "explain.json")
    assert load(tmp_path / "explain.json", Explanation) == found
    text = "\n".join(explain.lines(found))
    assert f"R² {found.r2:.2f}" in text
    for g in found.genes:
        assert any(line.endswith(f"  {g.gene}") for line in text.splitlines())
    assert text.count("  predicted  ") + text.count("  scored  ") == len(found.layers) == 5
    two = msgspec.structs.replace(
        found, targets=("a", "b"), genes=tuple(msgspec.structs.replace(g, ms=(g.ms[0], 1.0)) for g in found.genes), layers=()
    )
    assert "ms on b" in "\n".join(explain.lines(two))
    modelled = "\n".join(explain.lines(msgspec.structs.replace(found, unit="modelled ms")))
    assert modelled.count("modelled ms") == 2, "over both tables"


# ---------------------------------------------------------------------------------------------- genes as numbers


def test_columns_stand_for_candidates_and_inactive_ones_for_nothing():
    genome = Genome.of(SPACE)
    points = drawn(50)
    x = genome.rows(points, np.random.default_rng(0))
    assert genome.candidates(x) == points
    shallow = np.array([p.value("depth") == 1 for p in points])
    assert shallow.any()
    column = genome.slots.index("layers.2.width")
    assert len(set(x[shallow, column])) > 1  # drawn
    assert not genome.active(x)[shallow, column].any()
    hot = genome.one_hot(x)
    assert hot.shape == (50, 3 + 3 * (4 + 2))
    for point, row in zip(points, hot, strict=True):
        assert row.sum() == 1 + 2 * point.value("depth")
    assert (genome.masked(x)[shallow, column] == -1).all()
    other = x.copy()
    other[shallow, column] = (other[shallow, column] + 1) % 4
    assert (genome.one_hot(other) == hot).all()


def test_genes_without_a_choice_are_no_columns():
    single = msgspec.structs.replace(SPACE, genes=(Gene(name="depth", kind="architecture", choices=(3,)), *SPACE.genes[1:]))
    genome = Genome.of(single)
    assert "depth" not in genome.slots
    point = spaces.uniform(single)
    x = genome.rows((point,), np.random.default_rng(0))
    assert genome.active(x).all()
    assert genome.candidates(x) == [point]


def test_what_a_depth_without_a_choice_never_activates_counts_for_nothing():
    shallow = msgspec.structs.replace(SPACE, genes=(Gene(name="depth", kind="architecture", choices=(2,)), *SPACE.genes[1:]))
    genome = Genome.of(shallow)
    x = genome.rows([spaces.uniform(shallow), spaces.smallest(shallow)], np.random.default_rng(0))
    there = [not slot.startswith("layers.2") for slot in genome.slots]
    assert (genome.active(x) == there).all()
    assert genome.one_hot(x).shape == (2, 3 * (4 + 2))
    assert (genome.one_hot(x).sum(axis=1) == 4).all()
