"""Front and hypervolume against their definitions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from nascompile import pareto

# a coarse grid, so that ties, duplicates and dominated points are in nearly every example
points_of = {m: st.lists(st.tuples(*[st.integers(0, 5)] * m), max_size=12) for m in (1, 2, 3, 4)}


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [((1, 1), (2, 2), True), ((1, 2), (1, 3), True), ((1, 1), (1, 1), False), ((1, 3), (3, 1), False), ((2, 2), (1, 2), False)],
)
def test_dominates(a, b, expected):
    assert pareto.dominates(a, b) is expected


@pytest.mark.parametrize("m", points_of)
@settings(deadline=None)
@given(data=st.data())
def test_front_is_what_the_definition_says(m, data):
    points = data.draw(points_of[m])
    expected = []
    for i, a in enumerate(points):
        beaten = False
        for b in points:
            beaten |= max(y - x for x, y in zip(a, b, strict=True)) <= 0 and sum(b) < sum(a)
        if not beaten:
            expected.append(i)
    assert pareto.front(points) == tuple(expected)


@pytest.mark.parametrize("m", points_of)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_hypervolume_counts_unit_cells(m, data):
    points = data.draw(points_of[m])
    reference = (4,) * m  # some points lie on it or beyond: they must win nothing
    cells = sum(any(all(p[d] <= c[d] for d in range(m)) for p in points) for c in itertools.product(range(4), repeat=m))
    assert pareto.hypervolume(points, reference) == pytest.approx(cells, abs=1e-9)


def test_hypervolume_of_real_valued_points_by_monte_carlo():
    rng = np.random.default_rng(3)
    points, darts = rng.random((15, 3)), rng.random((60_000, 3)) * 1.1
    hit = (points[None, :, :] <= darts[:, None, :]).all(axis=2).any(axis=1).mean()
    # five standard deviations of a proportion of 60,000 darts, in a box of 1.1³
    assert pareto.hypervolume(points, (1.1,) * 3) == pytest.approx(hit * 1.1**3, abs=5 * 0.5 / 60_000**0.5 * 1.1**3)


def test_no_points():
    assert pareto.front([]) == ()
    assert pareto.hypervolume([], (1.0, 1.0)) == 0.0
    assert pareto.hypervolume([(2.0, 0.0)], (1.0, 1.0)) == 0.0


def test_a_nan_is_never_chosen_and_hides_nothing():
    assert pareto.front([(float("nan"), 0.0), (1.0, 1.0)]) == (1,)
