"""The benchmark of searchers: its stored spaces, its arithmetic, its bars."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from nascompile import pareto, space as spaces

BENCHMARKS = Path(__file__).parents[2] / "tools" / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import search_efficiency

    return search_efficiency


def test_stored_spaces_are_whole_and_small(bench):
    known = json.loads((bench.DATA / "digests.json").read_text())
    assert set(known) == {f"search_{name}.npz" for name in bench.REFERENCES if name != "synthetic"}
    for name in bench.REFERENCES:
        if name == "synthetic":
            continue
        world = bench.open_space(name)
        assert spaces.size(world.space) == len(world.latency) == len(world.bits) == len(world.test_bits) >= 3000
        assert (bench.DATA / f"search_{name}.npz").stat().st_size < 600_000
        top, least = spaces.largest(world.space), spaces.smallest(world.space, "int8")
        assert world.price(top) > world.price(least) > 0
        assert world.right(top).mean() > 0.8
        assert abs(100 - 100 * world.right(top).mean() - world.test_error(top)) < 3
        error, ms = bench.REFERENCES[name]  # ten points above the largest network's error, twice the latency of uniform INT8
        assert error == pytest.approx(110 - 100 * world.right(top).mean(), abs=1)
        assert ms == pytest.approx(2 * world.price(spaces.uniform(world.space)), rel=0.1)


def test_a_changed_file_is_refused(bench, monkeypatch, tmp_path):
    shutil.copytree(bench.DATA, tmp_path / "data")
    monkeypatch.setattr(bench, "DATA", tmp_path / "data")
    path = tmp_path / "data" / "search_demo.npz"
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(SystemExit, match=r"digests\.json"):
        bench.open_space("demo")


def test_the_formula_prices_every_candidate_and_hurts_with_every_reduction(bench):
    world, rng = bench.open_space("synthetic"), np.random.default_rng(0)
    error = lambda point: 100 * (1 - world.right(point).mean())  # noqa: E731
    top, least = spaces.largest(world.space), spaces.smallest(world.space, "int8")
    assert error(top) == pytest.approx(8, abs=1)
    assert error(least) > 35
    points = [spaces.sample(world.space, rng) for _ in range(50)]
    assert all(world.price(least) < world.price(p) < world.price(top) for p in points)
    assert len({round(error(p), 2) for p in points}) > 20
    assert spaces.size(world.space) > 1e19


def search(bench, errors, latencies):
    return bench.Search(tuple(errors), tuple(latencies), 0.0, ())


def test_a_curve_is_the_hypervolume_of_what_was_scored_so_far(bench):
    rng = np.random.default_rng(0)
    errors, latencies = rng.uniform(0, 20, 30), rng.uniform(0, 2, 30)
    values = bench.curve(search(bench, errors, latencies), (15.0, 1.5))
    assert len(values) == bench.BUDGET + 1
    assert values[0] == 0
    for cost in (1, 7, 30, 31, 250):
        points = np.column_stack([errors, latencies])[:cost]
        assert values[cost] == pytest.approx(pareto.hypervolume(points, (15.0, 1.5)) / 22.5)


def test_costs_to_the_target_and_bars(bench, monkeypatch):
    monkeypatch.setitem(bench.REFERENCES, "made-up", (10.0, 10.0))
    slow = [search(bench, [9.0] * 99 + [1.0] * 151, [9.0] * 99 + [1.0] * 151) for _ in range(3)]
    fast = [search(bench, [9.0] * 39 + [1.0], [9.0] * 39 + [1.0]) for _ in range(3)]
    never = [search(bench, [9.0], [9.0]) for _ in range(3)]
    row = bench.summary("made-up", {"linas": slow, "ours": fast, "random": never})
    reached = {label: found["median"] for label, found in row["measurements_to_reach"].items()}
    assert reached == {"linas": 100, "ours": 40, "random": 251}
    assert row["target"] == pytest.approx(0.99 * 0.81)
    assert row["checks"] == {"share_of_linas": 0.4, "half_of_linas": True, "at_most_125": True, "below_linas_at": []}
    row = bench.summary("made-up", {"linas": fast, "ours": slow})
    assert row["checks"] == {"share_of_linas": 2.5, "half_of_linas": False, "at_most_125": True, "below_linas_at": [50, 75]}


def test_a_replay_scores_no_more_than_its_budget_and_nothing_twice(bench):
    world = bench.open_space("synthetic")
    found = bench.replay(world, "random", 0, budget=30, population=8)
    assert len(found.errors) == len(found.latencies) == 30
    assert len(set(zip(found.errors, found.latencies, strict=True))) == 30
    again = bench.replay(world, "random", 0, budget=30, population=8)
    assert (again.errors, again.latencies) == (found.errors, found.latencies)


def test_a_variant_lasts_no_longer_than_its_replay(bench):
    from nascompile.searchers import ehvi

    assert ehvi.BATCH != 50
    with bench.varied("batches of 50"):
        assert ehvi.BATCH == 50
    assert ehvi.BATCH != 50
