"""What every searcher promises: new candidates of the space, the same for the same seed, and an end."""

from __future__ import annotations

import numpy as np
import pytest

from nascompile import plugins, space as spaces
from nascompile.records import FLOAT32, INT8, Gene, SearchSpace

SEARCHERS = plugins.names("searchers")


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
    """Deterministic, conflicting, with ties: width wins error and costs time."""
    rows = []
    for p in points:
        widths = sum(v for n, v in p.architecture if n != "depth")
        saved = sum(v == "int8" for _, v in p.precision[0][1])
        rows.append([100 - widths + saved, widths - 3 * saved, float(len(p.architecture))][:count])
    return np.array(rows, dtype=float)


def drive(name, space, seed=0, population=8, first=(), rounds=40, violation=lambda point: 0.0, count=2):
    """Everything a searcher asks for, round by round."""
    run = plugins.get("searchers", name).start(space, count, population, tuple(first), seed)
    asked = []
    for _ in range(rounds):
        points = run.ask()
        if not points:
            break
        asked.append(points)
        run.tell(points, objectives(points, count), np.array([violation(p) for p in points]))
    return asked


@pytest.mark.parametrize("name", SEARCHERS)
def test_candidates_are_legal_and_never_repeated(name):
    space = make_space()
    asked = drive(name, space)
    flat = [p for points in asked for p in points]
    for point in flat:
        spaces.check(space, point)
    assert len(flat) == len(set(flat))
    assert all(len(points) <= 8 for points in asked)


@pytest.mark.parametrize("name", SEARCHERS)
def test_a_small_space_is_seen_whole_and_then_it_ends(name):
    space = make_space()
    assert spaces.size(space) == 84
    asked = drive(name, space, rounds=200)
    assert {p for points in asked for p in points} == set(spaces.enumerate_all(space))
    assert len(asked) < 200


@pytest.mark.parametrize("name", SEARCHERS)
def test_it_ends_even_where_nothing_is_affordable(name):
    asked = drive(name, make_space(), rounds=200, violation=lambda point: 1.0)
    assert sum(map(len, asked)) <= 84
    assert len(asked) < 200


@pytest.mark.parametrize("name", SEARCHERS)
def test_the_same_seed_asks_for_the_same_candidates_and_another_for_others(name):
    space = make_space()
    a, b, c = (drive(name, space, seed=seed, rounds=4) for seed in (1, 1, 2))
    assert a == b
    assert a != c


@pytest.mark.parametrize("name", SEARCHERS)
def test_it_begins_with_some_of_what_it_was_given(name):
    space = make_space()
    first = (spaces.uniform(space), spaces.largest(space), spaces.uniform(space), spaces.smallest(space))
    asked = drive(name, space, first=first, rounds=3)
    assert set(asked[0]) & set(first)
    flat = [p for points in asked for p in points]
    assert len(flat) == len(set(flat))


@pytest.mark.parametrize("name", SEARCHERS)
@pytest.mark.parametrize("count", [2, 3])
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
