"""Choosing by hand-made numbers: who wins, who ties, who is out and why, and when the test split is read."""

from __future__ import annotations

from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

from nascompile import rerank
from nascompile.errors import BudgetError
from nascompile.records import (
    Budget,
    Candidate,
    Elsewhere,
    EngineManifest,
    Environment,
    Evaluation,
    Front,
    Interval,
    Measurement,
    Node,
    OnChip,
    Operator,
    OperatorGraph,
    Quantity,
    Score,
    SearchSpace,
    Target,
    Variant,
    Workload,
    digest,
    encode,
)

TARGET = Target(device="d", backend="b", workload=Workload())
SPACE = SearchSpace(family="f", model_digest="m", genes=(), precisions=(), targets=(TARGET.id,))
DROP = Budget(metric="drop", bound=1.0)
LATENCY = Budget(metric="latency_ms", bound=2.0)


def score(value: float, stderr: float = 0.0, metric: str = "accuracy", per_sample: tuple[float, ...] = ()) -> Score:
    direction = "minimize" if metric == "mse" else "maximize"
    return Score(
        metric=metric, direction=direction, value=value, n=100, stderr=stderr, split_digest="s", weights_digest="w", evaluator_digest="e",
        per_sample=per_sample,
    )  # fmt: skip


def evaluation(number: int, value: float, ms: float, stderr: float = 0.0, metric: str = "accuracy") -> Evaluation:
    return Evaluation(
        candidate=Candidate(space="x", architecture=(("depth", number),), precision=()), score=score(value, stderr, metric),
        latency=Interval(value=ms, low=ms, high=ms, unit="ms"), size_bytes=1, parameters=1, macs=1,
    )  # fmt: skip


def front(*evaluations: Evaluation, budgets=(DROP,)) -> Front:
    return Front(
        space=SPACE, target=TARGET, objectives=("error", "latency_ms"), budgets=budgets, evaluations=evaluations, searcher="s", seed=0,
        scored=9, seconds=0.0,
    )  # fmt: skip


def numbers(chosen) -> list[int]:
    return [e.candidate.value("depth") for e in chosen]


# ---------------------------------------------------------------------------------------------- select


def test_with_only_a_drop_the_fastest_are_built_and_those_over_it_never():
    found = front(evaluation(1, 90.0, 5.0), evaluation(2, 89.0, 3.0), evaluation(3, 88.9, 1.0), evaluation(4, 89.5, 4.0))
    assert numbers(rerank.select(found, score(90.0), 9, 0.0)) == [2, 4, 1]  # exactly at the bound is within
    assert numbers(rerank.select(found, score(90.0), 2, 0.0)) == [2, 4]


def test_with_a_cost_budget_the_most_accurate_are_built():
    found = front(evaluation(1, 90.0, 1.9), evaluation(2, 89.5, 1.0), evaluation(3, 90.0, 1.5), budgets=(LATENCY, DROP))
    assert numbers(rerank.select(found, score(90.0), 9, 0.0)) == [3, 1, 2]  # of the equally accurate the faster
    assert numbers(rerank.select(front(*found.evaluations, budgets=(LATENCY,)), score(99.0), 9, 2.0)) == [3, 1, 2]  # no drop, no margin


def test_who_has_standard_errors_to_spare_goes_first():
    # drop 0.8 ± 0.5: within the bound, but not with one standard error to spare; 0.5 ± 0.5 just is
    found = front(evaluation(1, 89.2, 1.0, stderr=0.5), evaluation(2, 89.5, 3.0, stderr=0.5), evaluation(3, 90.0, 4.0, stderr=0.5))
    assert numbers(rerank.select(found, score(90.0), 9, 0.0)) == [1, 2, 3]
    assert numbers(rerank.select(found, score(90.0), 9, 1.0)) == [2, 3, 1]
    assert numbers(rerank.select(found, score(90.0), 9, 1.01)) == [3, 1, 2]


def test_equal_candidates_are_ordered_by_their_id():
    a, b = evaluation(1, 90.0, 1.0), evaluation(2, 90.0, 1.0)
    by_id = sorted((a, b), key=lambda e: e.candidate.id)
    for pair in ((a, b), (b, a)):
        assert list(rerank.select(front(*pair), score(90.0), 2, 0.0)) == by_id


def test_an_error_that_is_minimized_drops_when_it_rises():
    found = front(evaluation(1, 0.5, 3.0, metric="mse"), evaluation(2, 2.5, 1.0, metric="mse"), evaluation(3, 1.4, 2.0, metric="mse"))
    assert numbers(rerank.select(found, score(0.5, metric="mse"), 9, 0.0)) == [3, 1]


# ---------------------------------------------------------------------------------------------- choose


def engine(name, value, p50, p10=None, stderr=0.0, size_mb=1.0, macs_m=1.0, predicted=1.0, metric="accuracy", memory=0):
    kind, macs = Operator(kind="k", dims=()), int(macs_m * 1e6)
    node = Node(name="n", operator=kind, module="m", macs=macs, size_bytes=10**6, activation_bytes=memory)
    graph = OperatorGraph(nodes=(node,))
    manifest = EngineManifest(
        name=name, role="candidate", target=TARGET, files=(), graphs=("model.onnx",), inputs=(), outputs=("logits",), labels=(),
        task="classification", graph=graph, size_bytes=int(size_mb * 1e6),
        predicted=None if predicted is None else Interval(value=predicted, low=predicted, high=predicted, unit="ms"),
    )  # fmt: skip
    low = p50 if p10 is None else p10
    latency = Quantity(value=low, unit="ms", kind="measured", n=9, quantiles=((0.1, low), (0.5, p50), (0.9, p50), (0.99, p50)))
    measurement = Measurement(
        engine=name, latency=latency, throughput=(), peak_memory_bytes=0, environment=Environment(must_match=()),
        score=score(value, stderr, metric),
    )  # fmt: skip
    return manifest, measurement


def choose(*engines, budgets=(DROP,), safety=0.0):
    return rerank.choose({m.name: m for m, _ in engines}, [m for _, m in engines], budgets, safety)


def test_the_fastest_within_the_drop_is_chosen_by_what_was_measured():
    choice = choose(
        engine("baseline", 90.0, 4.0),
        engine("uniform-int8", 88.0, 1.0),
        engine("candidate-1", 89.4, 2.0, p10=1.0),
        engine("candidate-2", 89.6, 1.9, p10=1.5),
    )
    assert choice.engine == "candidate-1"  # by the quantile that predictions are of, whatever the median
    assert choice.ranking == ("candidate-1", "candidate-2", "baseline")
    assert choice.rejected == (("uniform-int8", "drop 2 > 1"),)
    assert "drop 0.60" in choice.reason
    assert "lowest measured latency" in choice.reason


def test_with_a_cost_budget_the_most_accurate_is_chosen():
    choice = choose(
        engine("baseline", 90.0, 4.0, size_mb=9.0), engine("candidate-1", 89.4, 1.0), engine("candidate-2", 89.6, 2.0),
        engine("candidate-3", 89.6, 1.9, size_mb=3.1, macs_m=8.0), budgets=(LATENCY, Budget(metric="size_mb", bound=3.0)),
    )  # fmt: skip
    assert choice.engine == "candidate-2"  # exactly at the latency bound
    assert choice.ranking == ("candidate-2", "candidate-1")
    assert dict(choice.rejected) == {"baseline": "latency_ms 4 > 2; size_mb 9 > 3", "candidate-3": "size_mb 3.1 > 3"}
    assert "accuracy" in choice.reason
    light = (Budget(metric="macs_m", bound=5.0),)
    choice = choose(engine("baseline", 90.0, 4.0, macs_m=9.0), engine("candidate-1", 80.0, 1.0), budgets=light)
    assert choice.rejected == (("baseline", "macs_m 9 > 5"),)
    small = (Budget(metric="memory_mb", bound=3.0),)  # 1 MB of weights
    choice = choose(engine("baseline", 90.0, 4.0, memory=2_100_000), engine("candidate-1", 80.0, 1.0, memory=2_000_000), budgets=small)
    assert choice.rejected == (("baseline", "memory_mb 3.1 > 3"),)


def test_ties_go_to_speed_then_to_the_name():
    budgets = (LATENCY,)
    a, b, c = engine("a", 89.0, 1.0), engine("b", 89.0, 1.0), engine("c", 89.0, 0.9)
    base = engine("baseline", 90.0, 4.0)
    for order in ((a, b, c), (c, b, a), (b, a, c)):
        assert choose(base, *order, budgets=budgets).ranking == ("c", "a", "b")


def test_a_safe_engine_goes_before_a_faster_one_on_the_edge():
    edge, safe = engine("edge", 89.2, 1.0, stderr=0.5), engine("safe", 89.8, 2.0, stderr=0.5)
    base = engine("baseline", 90.0, 4.0, stderr=0.0)
    assert choose(base, edge, safe, safety=0.0).engine == "edge"
    assert choose(base, edge, safe, safety=1.0).ranking == ("safe", "baseline", "edge")
    alone = choose(engine("baseline", 90.0, 4.0, stderr=2.0), edge, safety=3.0)  # nobody has so much to spare
    assert alone.engine == "edge"
    assert "not with 3 standard errors to spare" in alone.reason


def test_if_no_engine_is_left_the_error_names_every_fault_and_the_nearest():
    with pytest.raises(BudgetError) as caught:
        choose(engine("baseline", 90.0, 4.0), engine("candidate-1", 88.0, 3.0), budgets=(LATENCY, DROP))
    assert "latency_ms ≤ 2" in caught.value.message
    assert caught.value.detail.splitlines() == ["baseline: latency_ms 4 > 2", "candidate-1: latency_ms 3 > 2; drop 2 > 1"]
    assert "baseline" in caught.value.hint


# ---------------------------------------------------------------------------------------------- correct


def there(value, ms, *, baseline=90.0, kind="predicted", size_mb=1.0) -> rerank.There:
    return rerank.There("pi", "pi4:b:1", kind, ms, int(size_mb * 1e6), score(value), score(baseline), memory_mb=3 * size_mb)


def test_a_network_must_keep_the_budgets_of_every_device():
    engines = [engine("baseline", 90.0, 9.0), engine("candidate-1", 90.0, 2.0), engine("candidate-2", 89.5, 3.0)]
    manifests, measured = {e[0].name: e[0] for e in engines}, [e[1] for e in engines]
    budgets = (DROP, Budget(metric="latency_ms", bound=20.0, target="pi"), Budget(metric="size_mb", bound=2.0, target="pi"))
    found = {"baseline": [there(90.0, 99.0)], "candidate-1": [there(88.0, 10.0)], "candidate-2": [there(89.0, 20.0, size_mb=1.5)]}
    choice = rerank.choose(manifests, measured, budgets, 0.0, found)
    assert choice.engine == "candidate-2"
    assert dict(choice.rejected) == {
        "baseline": "on pi4:b:1: latency_ms 99 > 20 (predicted)", "candidate-1": "on pi4:b:1: drop 2 > 1",
    }  # fmt: skip
    assert "on pi4:b:1 20 ms predicted, drop 1.00" in choice.reason
    assert choice.budgets == budgets


def test_with_only_a_drop_no_device_weighs_more_than_another():
    engines = [engine("baseline", 90.0, 9.0), engine("candidate-1", 90.0, 1.0), engine("candidate-2", 90.0, 2.0)]
    manifests, measured = {e[0].name: e[0] for e in engines}, [e[1] for e in engines]
    found = {"baseline": [there(90.0, 90.0)], "candidate-1": [there(90.0, 50.0)], "candidate-2": [there(90.0, 20.0)]}
    assert rerank.choose(manifests, measured, (DROP,), 0.0, found).ranking == ("candidate-2", "candidate-1", "baseline")  # 40, 50, 810
    assert rerank.choose(manifests, measured, (DROP,), 0.0).engine == "candidate-1"


def test_with_a_cost_budget_the_worst_device_decides():
    engines = [engine("baseline", 90.0, 9.0), engine("candidate-1", 91.0, 1.0), engine("candidate-2", 90.5, 1.0)]
    manifests, measured = {e[0].name: e[0] for e in engines}, [e[1] for e in engines]
    budgets = (Budget(metric="latency_ms", bound=2.0, target=TARGET.id),)
    of_some = {"candidate-1": [there(69.0, 9.0, baseline=70.0)], "candidate-2": [there(70.0, 9.0, baseline=70.0)]}  # on fewer samples
    found = {"baseline": [there(90.0, 9.0)], **of_some}
    assert rerank.choose(manifests, measured, budgets, 0.0, found).engine == "candidate-2"  # one point is lost there by the other
    assert rerank.choose(manifests, measured, budgets, 0.0).engine == "candidate-1"


def test_candidates_worth_building_are_so_on_every_device():
    def shared(number, here, pi):
        latency = Interval(value=pi[1], low=0.0, high=99.0, unit="ms")
        elsewhere = Elsewhere(target="pi", score=score(pi[0]), latency=latency, size_bytes=1)
        return msgspec.structs.replace(evaluation(number, *here), elsewhere=(elsewhere,))

    found = front(shared(1, (90.0, 1.0), (88.0, 1.0)), shared(2, (90.0, 2.0), (90.0, 5.0)), shared(3, (90.0, 3.0), (89.5, 3.0)))
    assert numbers(rerank.select(found, score(90.0), 9, 0.0)) == [3, 2]  # 9 and 10 ms²; the first loses two points on the second device


def test_the_correction_is_the_median_ratio_of_what_was_predicted():
    engines = [
        engine("baseline", 90.0, 9.0, p10=8.0, predicted=10.0), engine("a", 90.0, 2.0, p10=2.2, predicted=2.0),
        engine("b", 90.0, 1.0, p10=1.5, predicted=1.0), engine("custom", 90.0, 7.0, predicted=None),
    ]  # fmt: skip
    found = rerank.correct({m.name: m for m, _ in engines}, [m for _, m in engines], "table")
    assert found.residuals == (("baseline", 10.0, 8.0), ("a", 2.0, 2.2), ("b", 1.0, 1.5))
    assert found.factor == pytest.approx(1.1)  # of 0.8, 1.1, 1.5
    assert found.spread == pytest.approx(max(1 - 0.8 / 1.1, 1.5 / 1.1 - 1))
    assert found.table_digest == "table"


def test_a_prediction_is_compared_with_the_variant_it_was_made_for():
    found = Interval(value=4.0, low=3.0, high=5.0, unit="ms")
    took = Quantity(value=5.0, unit="ms", kind="measured", quantiles=((0.5, 6.0),))
    tried = (Variant(backend="b", latency=took, predicted=found), Variant(backend="c", kept=True))
    manifest, measured = engine("a", 90.0, 2.0, predicted=None)
    kept = msgspec.structs.replace(manifest, variants=tried)
    assert rerank.correct({"a": kept}, [measured], "table").residuals == (("a", 4.0, 5.0),)
    unrun = msgspec.structs.replace(manifest, variants=(msgspec.structs.replace(tried[0], latency=None), tried[1]))
    nothing = rerank.correct({"a": unrun}, [measured], "table")
    assert (nothing.residuals, nothing.factor, nothing.spread) == ((), 1.0, 0.0)


# ---------------------------------------------------------------------------------------------- examine


@pytest.mark.parametrize(
    ("chosen", "read"),
    [("candidate-1", ["baseline", "uniform-int8", "candidate-1"]), ("baseline", ["baseline", "uniform-int8"])],
)
def test_test_is_opened_once_for_the_chosen_engine_and_its_baselines(chosen, read, tmp_path, monkeypatch):
    for name in ("baseline", "uniform-int8", "candidate-1", "candidate-2"):
        (tmp_path / name).mkdir()
    right = {"baseline": [1, 1, 1, 0] * 50, "uniform-int8": [1, 0, 1, 0] * 50, "candidate-1": [1, 1, 0, 0] * 50}
    opened, scored = [], []

    def open_test():
        opened.append(len(scored))
        return "the test split"

    def score_engine(engine, split, task, metric, folder):
        assert split == "the test split"
        scored.append(engine.name)
        samples = tuple(float(v) for v in right[engine.name])
        return score(100 * float(np.mean(samples)), per_sample=samples)

    monkeypatch.setattr(rerank, "Loaded", SimpleNamespace(open=lambda folder: folder))
    monkeypatch.setattr(rerank, "score_engine", score_engine)
    choice = rerank.Choice(engine=chosen, reason="", budgets=(), ranking=())
    result = rerank.examine(choice, tmp_path, open_test, None, "accuracy", tmp_path, seed=0)
    assert opened == [0]
    assert scored == read == [name for name, _ in result.scores]
    assert result.choice_digest == digest(choice)
    differences = {d.reference: d for d in result.differences}
    assert set(differences) == {name for name in read if name != chosen}
    for name, d in differences.items():
        mean = 100 * (np.mean(right[chosen]) - np.mean(right[name]))
        assert d.engine == chosen
        assert d.value == pytest.approx(mean)
        # 200 pairs: the normal interval of their mean; a bootstrap of 10,000 resamples is within a fifth of it
        half = 1.96 * 100 * np.std(np.subtract(right[chosen], right[name]), ddof=1) / np.sqrt(200)
        assert (d.low, d.high) == (pytest.approx(mean - half, abs=0.2 * half + 1e-9), pytest.approx(mean + half, abs=0.2 * half + 1e-9))


def test_an_engine_that_was_not_built_is_not_examined(tmp_path, monkeypatch):
    (tmp_path / "baseline").mkdir()
    monkeypatch.setattr(rerank, "Loaded", SimpleNamespace(open=lambda folder: folder))
    monkeypatch.setattr(rerank, "score_engine", lambda engine, *rest: score(90.0, per_sample=(1.0, 0.0)))
    choice = rerank.Choice(engine="baseline", reason="", budgets=(), ranking=())
    result = rerank.examine(choice, tmp_path, lambda: None, None, "accuracy", tmp_path, seed=0)
    assert [name for name, _ in result.scores] == ["baseline"]
    assert result.differences == ()


# ---------------------------------------------------------------------------------------------- microcontrollers


RAM = Budget(metric="memory_mb", bound=0.3, limit=True)


def on_chip(name, value, ms, ram):
    """An engine whose RAM is not what its operators' activations come to."""
    manifest, measurement = engine(name, value, ms, memory=10**9)
    chip = OnChip(
        ram_bytes=ram, ram_limit=300_000, flash_bytes=1, flash_limit=2, stack_bytes=1, stack_limit=2, instructions=5, peak="head"
    )
    latency = msgspec.structs.replace(measurement.latency, kind="modelled")
    return msgspec.structs.replace(manifest, chip=chip), msgspec.structs.replace(measurement, latency=latency)


def test_limits_of_a_device_do_not_say_what_is_wanted():
    """A drop alone asks for speed, nothing at all for accuracy, whatever the device's memory bounds besides."""
    found = front(evaluation(1, 90.0, 5.0), evaluation(2, 89.5, 3.0), budgets=(RAM, DROP))
    assert numbers(rerank.select(found, score(90.0), 9, 0.0)) == [2, 1]
    assert numbers(rerank.select(front(*found.evaluations, budgets=(RAM,)), score(90.0), 9, 0.0)) == [1, 2]


def test_a_choice_without_an_engine_of_the_baseline():
    engines = [on_chip("candidate-1", 89.0, 2.0, 200_000), on_chip("candidate-2", 91.0, 1.0, 300_001)]
    choice = rerank.choose({m.name: m for m, _ in engines}, [m for _, m in engines], (RAM, DROP), 0.0, baseline=score(89.5))
    assert choice.engine == "candidate-1"
    assert choice.rejected == (("candidate-2", "memory_mb 0.3 > 0.3"),)
    assert "2 ms modelled, drop 0.50" in choice.reason


def test_the_baselines_test_score_without_an_engine_of_it(tmp_path, monkeypatch):
    split, (manifest, measured) = SimpleNamespace(digest="test"), engine("candidate-1", 89.6, 1.9)
    choice = rerank.choose({"candidate-1": manifest}, [measured], (DROP,), 0.0, baseline=score(90.0))
    monkeypatch.setattr(rerank.Loaded, "open", lambda folder: folder.name)
    monkeypatch.setattr(rerank, "score_engine", lambda name, *_: score(80.0, per_sample=(1.0, 0.0)))
    (tmp_path / "candidate-1").mkdir()
    opened = []
    result = rerank.examine(
        choice, tmp_path, lambda: opened.append(1) or split, None, "accuracy", tmp_path, 0,
        lambda given: score(90.0, per_sample=(1.0, 1.0)) if given is split else None,
    )  # fmt: skip
    assert opened == [1], "test is read once"
    assert [(name, s.value) for name, s in result.scores] == [("baseline", 90.0), ("candidate-1", 80.0)]
    assert [(d.reference, d.value) for d in result.differences] == [("baseline", -50.0)]


def test_a_limit_changes_no_digest_of_what_has_none():
    assert encode(DROP) == b'{"metric":"drop","bound":1.0,"target":""}'
