"""One search for two targets: every candidate of a small space against brute force, its scores and budgets by target."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest

from nascompile import journal, pareto, plugins, records, search as stage, space as spaces
from nascompile.errors import BudgetError
from nascompile.progress import Silent
from nascompile.records import (
    FLOAT32,
    INT8,
    Budget,
    Candidate,
    Evaluation,
    Front,
    Gene,
    Interval,
    Score,
    SearchSpace,
    Target,
    Workload,
)
from nascompile.settings import SearchSettings
from nascompile.targets import label

HERE = Target(device="near", backend="b", workload=Workload())
THERE = Target(device="there", backend="b", workload=Workload())
SPEED = {HERE.id: 4.0, THERE.id: 0.5}
"""How many times faster INT8 is: on one target it pays, on the other it costs."""


def make_space(targets: tuple[Target, ...] = (HERE, THERE)) -> SearchSpace:
    """For two targets 72 candidates: 8 of depth 1 and 64 of depth 2."""
    genes = [Gene(name="depth", kind="architecture", choices=(1, 2))]
    for layer, requires in ((1, ()), (0, (("depth", 2),))):
        genes.append(Gene(name=f"layers.{layer}.width", kind="architecture", choices=(8, 16), requires=requires))
        genes.append(Gene(name=f"layers.{layer}.precision", kind="precision", choices=("fp32", "int8"), requires=requires))
    return SearchSpace(
        family="f", model_digest="m", genes=tuple(genes), precisions=(FLOAT32, INT8), targets=tuple(t.id for t in targets),
        layer_order=(1, 0), legal=(("fp32", "int8"),) * len(targets) if len(targets) > 1 else (),
    )  # fmt: skip


SPACE = make_space()
EVERY = tuple(spaces.enumerate_all(SPACE))


def accuracy(point: Candidate, target: str) -> float:
    """Percent; INT8 of layer 0 costs nothing, so that there are ties."""
    widths = sum(value for name, value in point.architecture if name.endswith("width"))
    return 60.0 + widths - (2.5 if dict(dict(point.precision)[target])["layers.1.precision"] == "int8" else 0.0)


def latency(point: Candidate, target: str) -> float:
    """ms."""
    precisions = dict(dict(point.precision)[target])
    pairs = [(name, value) for name, value in point.architecture if name.endswith("width")]
    return 1.0 + sum(v / (SPEED[target] if precisions[n.replace("width", "precision")] == "int8" else 1) for n, v in pairs)


@dataclass
class Formula:
    """An evaluator that counts what it is asked."""

    target: str = HERE.id
    digest: str = "evaluator"
    split_digest: str = "split"
    weights_digest: str = "weights"
    calls: list[tuple[Any, Any]] = field(default_factory=list)
    kill_at: int = 0

    def on(self, target: str) -> Formula:
        return Formula(target, self.digest, self.split_digest, self.weights_digest, self.calls, self.kill_at)

    def score(self, point: Candidate) -> Score:
        if self.kill_at and len(self.calls) == self.kill_at:
            raise KeyboardInterrupt
        self.calls.append((point.architecture, dict(point.precision)[self.target]))
        return score_of(accuracy(point, self.target))


def score_of(value: float) -> Score:
    return Score(
        metric="accuracy", direction="maximize", value=value, n=100, stderr=1.0, split_digest="split", weights_digest="weights",
        evaluator_digest="evaluator",
    )  # fmt: skip


@dataclass(frozen=True)
class Prices:
    target: Target
    space: SearchSpace = SPACE
    foreign: tuple[()] = ()

    def costs(self, point: Candidate) -> Any:
        return self(point)[0]

    def __call__(self, point: Candidate) -> Any:
        ms = latency(point, self.target.id)
        int8 = sum(value == "int8" for _, value in dict(point.precision)[self.target.id])
        size = 1_000_000 * len(point.architecture) - 100_000 * int8
        costs = {"latency_ms": ms, "size_mb": size / 1e6, "macs_m": 1.0, "memory_mb": size / 5e5}
        return costs, Interval(value=ms, low=ms, high=ms, unit="ms"), size, 1, 1_000_000


def run(path: Any, evaluator: Any = None, budgets: Any = (), space: Any = SPACE, targets: Any = (HERE, THERE), **settings: Any) -> Front:
    first, *also = (Prices(target, space) for target in targets)
    chosen = SearchSettings(**{"evaluations": 100, "population": 8} | settings)
    return stage.search(
        evaluator or Formula(targets[0].id), first, score_of(90.0), budgets, chosen, 0, path / "journal.jsonl", Silent(), also=also
    )


def brute_force(costs: Any, within: Any = lambda p: True) -> set[Candidate]:
    """Candidates that no other of the allowed ones beats: nowhere worse, somewhere better."""
    allowed = [(p, costs(p)) for p in EVERY if within(p)]
    better = [{q for q, b in allowed if all(y <= x for x, y in zip(a, b, strict=True)) and a != b} for _, a in allowed]
    return {p for (p, _), others in zip(allowed, better, strict=True) if not others}


def error(p: Candidate) -> float:
    return -min(accuracy(p, HERE.id), accuracy(p, THERE.id))


def test_the_fixture_has_targets_that_disagree_and_ties():
    assert len(EVERY) == spaces.size(SPACE) == 72
    fastest = {min((p for p in EVERY if p.value("depth") == 2), key=lambda p: latency(p, t)).precision[0] for t in SPEED}
    assert len(fastest) == 2
    assert len({(accuracy(p, HERE.id), latency(p, HERE.id)) for p in EVERY}) < 20


@pytest.mark.parametrize("name", plugins.names("searchers"))
def test_the_shared_front_is_that_of_the_worst_error_and_both_latencies(name, tmp_path):
    front = run(tmp_path, searcher=name)
    assert {e.candidate for e in front.evaluations} == brute_force(lambda p: (error(p), latency(p, HERE.id), latency(p, THERE.id)))
    assert (front.scored, front.target, front.also) == (72, HERE, (THERE,))
    for e in front.evaluations:
        (there,) = e.elsewhere
        assert (e.score.value, e.latency.value) == (accuracy(e.candidate, HERE.id), latency(e.candidate, HERE.id))
        assert (there.score.value, there.latency.value) == (accuracy(e.candidate, THERE.id), latency(e.candidate, THERE.id))
        assert (there.target, there.size_bytes) == (THERE.id, Prices(THERE)(e.candidate)[2])
    assert records.load(save(front, tmp_path), Front) == front


def save(front: Front, folder: Any) -> Any:
    records.save(front, folder / "front.json")
    return folder / "front.json"


def test_equal_precisions_are_scored_once_whichever_target_has_them(tmp_path):
    evaluator = Formula()
    run(tmp_path, evaluator)
    assert len(evaluator.calls) == len(set(evaluator.calls)) == 20  # the networks of one target, not 72 or 144
    assert len(list(journal.read(tmp_path / "journal.jsonl", Evaluation))) == 72


BUDGETS = (Budget(metric="latency_ms", bound=9.0, target=HERE.id), Budget(metric="latency_ms", bound=30.0, target=THERE.id))


def within(p: Candidate) -> bool:
    return latency(p, HERE.id) <= 9.0 and latency(p, THERE.id) <= 30.0


def test_every_target_has_its_own_bound(tmp_path):
    front = run(tmp_path, budgets=BUDGETS)
    each = [sum(latency(p, b.target) <= b.bound for p in EVERY) for b in BUDGETS]
    assert 0 < sum(within(p) for p in EVERY) < min(each)
    assert front.scored == sum(within(p) for p in EVERY)
    assert {e.candidate for e in front.evaluations} == brute_force(lambda p: (error(p), latency(p, HERE.id), latency(p, THERE.id)), within)
    assert front.budgets == BUDGETS


def test_the_worst_ratio_is_one_objective_for_all_targets(tmp_path):
    front = run(tmp_path, budgets=BUDGETS, objectives=("error", "worst_ratio"))
    assert {e.candidate for e in front.evaluations} == brute_force(
        lambda p: (error(p), max(latency(p, HERE.id) / 9.0, latency(p, THERE.id) / 30.0)), within
    )


def test_a_size_is_the_largest_and_is_bounded_on_each(tmp_path):
    budgets = (Budget(metric="size_mb", bound=2.8, target=HERE.id), Budget(metric="size_mb", bound=2.9, target=THERE.id))
    front = run(tmp_path, budgets=budgets, objectives=("error", "size_mb"))
    sizes = {p: (Prices(HERE)(p)[2], Prices(THERE)(p)[2]) for p in EVERY}
    fine = [p for p in EVERY if sizes[p][0] <= 2_800_000 and sizes[p][1] <= 2_900_000]
    assert front.scored == len(fine) < 72
    assert {e.candidate for e in front.evaluations} == brute_force(lambda p: (error(p), max(sizes[p])), lambda p: p in fine)


def test_a_drop_counts_on_the_worst_target(tmp_path):
    best = max(min(accuracy(p, t) for t in SPEED) for p in EVERY)
    assert best == 92.0
    drop = Budget(metric="drop", bound=0.0)
    tight = tuple(msgspec.structs.replace(b, bound=bound) for b, bound in zip(BUDGETS, (9.0, 90.0), strict=True))
    with pytest.raises(BudgetError) as caught:  # INT8 in layer 1 is what makes the bound here, and loses 2.5 points
        run(tmp_path, budgets=(*tight, drop))
    assert "where it is lowest" in caught.value.detail


def test_what_nothing_meets_is_named_by_device(tmp_path):
    budgets = (BUDGETS[0], msgspec.structs.replace(BUDGETS[1], bound=2.0))
    with pytest.raises(BudgetError) as caught:
        run(tmp_path, budgets=budgets)
    assert caught.value.message == f"no candidate meets the budget: latency_ms ≤ 9 on {label(HERE)}, latency_ms ≤ 2 on {label(THERE)}"
    assert f"{label(THERE)}: latency_ms 9" in caught.value.detail
    bound = float(caught.value.hint.split(f"to {label(THERE)}=")[1].split(",")[0])
    assert caught.value.hint.count("=") == 1
    front = run(tmp_path, budgets=(budgets[0], msgspec.structs.replace(BUDGETS[1], bound=bound)))  # the hint works
    assert front.scored >= 1


@pytest.mark.parametrize("kill", [1, 7, 15])
def test_a_killed_search_goes_on_where_it_was(kill, tmp_path):
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole = run(tmp_path / "whole", evaluations=60)
    dying, rest = Formula(kill_at=kill), Formula()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", dying, evaluations=60)
    front = run(tmp_path / "killed", rest, evaluations=60)
    assert [e.candidate for e in front.evaluations] == [e.candidate for e in whole.evaluations]
    assert not set(dying.calls) & set(rest.calls)
    lines = (tmp_path / "killed" / "journal.jsonl").read_bytes()
    run(tmp_path / "killed", rest, evaluations=60)
    assert (tmp_path / "killed" / "journal.jsonl").read_bytes() == lines, "a third run adds nothing"


@pytest.mark.parametrize("first", [(HERE,), (THERE,)], ids=["here", "there"])
def test_what_was_scored_for_one_target_is_not_scored_again_for_two(first, tmp_path):
    alone, both, again = Formula(first[0].id), Formula(), Formula(first[0].id)
    run(tmp_path, alone, space=make_space(first), targets=first)
    assert len(alone.calls) == 20
    run(tmp_path, both)
    assert both.calls == []
    front = run(tmp_path, again, space=make_space(first), targets=first)
    assert again.calls == []
    assert [e.elsewhere for e in front.evaluations] == [()] * len(front.evaluations)


def test_a_score_of_other_layers_or_of_other_weights_is_not_taken(tmp_path):
    run(tmp_path)
    other = Formula(weights_digest="other")
    run(tmp_path, other)
    assert len(other.calls) == 20
    reordered = msgspec.structs.replace(SPACE, layer_order=(0, 1))
    evaluator = Formula()
    run(tmp_path, evaluator, space=reordered)
    assert len(evaluator.calls) == 20


def test_new_prices_are_written_with_old_scores(tmp_path, monkeypatch):
    run(tmp_path)
    monkeypatch.setitem(SPEED, THERE.id, 3.0)
    evaluator = Formula()
    front = run(tmp_path, evaluator)
    assert evaluator.calls == []
    last = {e.candidate: e for e in journal.read(tmp_path / "journal.jsonl", Evaluation)}
    assert {c: e.elsewhere[0].latency.value for c, e in last.items()} == {p: latency(p, THERE.id) for p in EVERY}
    assert all(last[e.candidate].elsewhere == e.elsewhere for e in front.evaluations)


def test_records_of_one_target_are_written_as_ever():
    e = Evaluation(
        candidate=EVERY[0], score=score_of(1.0), latency=Interval(value=1.0, low=1.0, high=1.0, unit="ms"), size_bytes=1, parameters=1,
        macs=1, seconds=0.5,
    )  # fmt: skip
    assert set(msgspec.json.decode(records.encode(e))) == {"candidate", "score", "latency", "size_bytes", "parameters", "macs", "seconds"}


@pytest.mark.parametrize("dimensions", [2, 3, 4])
def test_volumes_are_those_of_a_grid(dimensions):
    """Whole coordinates: the volume is the number of unit cells that some point dominates."""
    import itertools

    import numpy as np

    rng = np.random.default_rng(dimensions)
    for _ in range(10):
        points = rng.integers(0, 6, (8, dimensions))
        cells = sum(any(all(p <= c) for p in points) for c in itertools.product(range(5), repeat=dimensions))
        assert pareto.hypervolume(points, [5] * dimensions) == cells


@dataclass
class Pressed(Formula):
    """Ctrl-C while evaluation number `kill_at` is at work."""

    def on(self, target: str) -> Formula:
        return Pressed(target, self.digest, self.split_digest, self.weights_digest, self.calls, self.kill_at)

    def score(self, point: Candidate) -> Score:
        at, self.kill_at = self.kill_at, 0
        if len(self.calls) + 1 == at:
            os.kill(os.getpid(), signal.SIGINT)
        found = super().score(point)
        self.kill_at = at
        return found


@pytest.mark.parametrize("at", range(3, 9))
def test_ctrl_c_costs_no_score_of_a_candidate_that_was_begun(at, tmp_path):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        evaluator, rest = Pressed(kill_at=at), Formula()
        front = run(tmp_path, evaluator)
    finally:
        signal.signal(signal.SIGINT, before)
    assert front.stopped == "interrupted"
    assert at <= len(evaluator.calls) <= at + 1
    run(tmp_path, rest)
    assert len(set(evaluator.calls)) == len(evaluator.calls)
    assert not set(evaluator.calls) & set(rest.calls)
