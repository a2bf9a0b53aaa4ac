"""Fronts of several devices against their definitions, on candidates made by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from nascompile import fronts
from nascompile.records import Candidate, Elsewhere, Evaluation, Interval, Score


def score(value: float) -> Score:
    return Score(
        metric="accuracy", direction="maximize", value=value, n=9, stderr=1.0, split_digest="s", weights_digest="w", evaluator_digest="e"
    )


def ms(value: float) -> Interval:
    return Interval(value=value, low=value, high=value, unit="ms")


def evaluation(number: int, a: tuple[float, float], b: tuple[float, float]) -> Evaluation:
    """`a` and `b`: (accuracy, ms) on the first and on the second target."""
    return Evaluation(
        candidate=Candidate(space="x", architecture=(("depth", number),), precision=()), score=score(a[0]), latency=ms(a[1]), size_bytes=1,
        parameters=1, macs=1, elsewhere=(Elsewhere(target="b", score=score(b[0]), latency=ms(b[1]), size_bytes=2),),
    )  # fmt: skip


SCORED = (
    evaluation(1, (90.0, 5.0), (90.0, 50.0)),
    evaluation(2, (90.0, 4.0), (88.0, 60.0)),  # beaten on the second target, though not on the first
    evaluation(3, (85.0, 3.0), (89.0, 20.0)),
    evaluation(4, (80.0, 6.0), (80.0, 70.0)),  # beaten everywhere
    evaluation(5, (80.0, 1.0), (85.0, 20.0)),
)


def numbers(found) -> list[int]:
    return [s.evaluation.candidate.value("depth") for s in found]


def test_every_target_has_its_own_front():
    assert numbers(fronts.front(fronts.seen(SCORED, 0))) == [5, 3, 2]
    assert numbers(fronts.front(fronts.seen(SCORED, 1))) == [3, 1]
    assert fronts.seen(SCORED, 1)[0].size_bytes == 2


def test_fronts_have_in_common_what_is_on_each():
    a, b = (fronts.front(fronts.seen(SCORED, number)) for number in (0, 1))
    assert fronts.common((a, b)) == (SCORED[2].candidate.id,)
    assert fronts.common((a,)) == tuple(s.evaluation.candidate.id for s in a)
    assert fronts.common((a, ())) == ()


def test_a_shared_network_costs_what_the_fastest_as_accurate_one_saves():
    first, second = (fronts.seen(SCORED, number) for number in (0, 1))
    costs = [fronts.cost(first, SCORED[0]), fronts.cost(second, SCORED[0])]
    assert [numbers((c.shared, c.alone)) for c in costs] == [[1, 2], [1, 1]]
    assert [c.ratio for c in costs] == [1.25, 1.0]
    worse = fronts.cost(second, SCORED[1])  # 88 at 60 ms, where 89 takes 20
    assert (numbers((worse.alone,)), worse.ratio) == ([3], 3.0)


@pytest.mark.parametrize("seed", range(4))
def test_kendalls_tau_is_that_of_counted_pairs(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.permutation(9).astype(float), rng.permutation(9).astype(float)
    scored = [evaluation(i, (1.0, x), (1.0, y)) for i, (x, y) in enumerate(zip(a, b, strict=True))]
    same = [(a[i] < a[j]) == (b[i] < b[j]) for i, j in itertools.combinations(range(9), 2)]
    found = fronts.kendall(fronts.seen(scored, 0), fronts.seen(scored, 1))
    assert found == pytest.approx((same.count(True) - same.count(False)) / len(same))


def test_kendalls_tau_of_nothing_to_order_is_none():
    scored = [evaluation(i, (1.0, 2.0), (1.0, float(i))) for i in range(3)]
    assert fronts.kendall(fronts.seen(scored, 0), fronts.seen(scored, 1)) is None
    assert fronts.kendall(fronts.seen(scored[:1], 0), fronts.seen(scored[:1], 1)) is None
