"""The benchmark of space evolution: its budgets, its arithmetic, what it keeps."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from nascompile import space as spaces

BENCHMARKS = Path(__file__).parents[2] / "tools" / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import space_evolution

    return space_evolution


def test_budgets_leave_what_they_say_and_the_best_is_that_of_all(bench):
    there = bench.world("demo")
    fine = there.inner.latency <= there.bound(0.01)
    assert 100 <= fine.sum() <= 130
    errors = [100 - 100 * np.unpackbits(bits)[: there.inner.samples].mean() for bits in there.inner.bits[fine]]
    assert there.best("accuracy", 0.01) == pytest.approx(100 - min(errors))
    assert there.best("front", 0.01) < there.best("front", 0.05) < 1
    assert there.best("accuracy", 0.01) <= there.best("accuracy", 0.05)


def test_the_fine_world_has_more_choices_and_the_same_formula(bench):
    fine, coarse = bench.Fine(), bench.known.Synthetic()
    assert spaces.size(fine.space) > 1e5 * spaces.size(coarse.space)
    rng = np.random.default_rng(0)
    for point in (spaces.sample(coarse.space, rng) for _ in range(5)):
        assert fine.price(point) == coarse.price(point)
        assert (fine.right(point) == coarse.right(point)).all()
    assert len({gene.choices for gene in fine.space.genes}) == 4


@pytest.mark.parametrize("evolving", [False, True])
def test_a_replay_scores_only_what_is_within_the_budget_and_again_the_same(bench, evolving):
    found, again = (bench.replay("synthetic", "random", evolving, "front", 0.05, 1, budget=20) for _ in range(2))
    assert (found.errors, found.latencies) == (again.errors, again.latencies)
    assert 0 < len(found.errors) <= 20
    assert max(found.latencies) <= bench.world("synthetic").bound(0.05)


def test_costs_to_the_target_and_verdicts(bench):
    bound = bench.world("demo").bound(0.05)
    best = bench.world("demo").best("accuracy", 0.05)
    made = lambda errors: bench.known.Search(tuple(errors), (0.1,) * len(errors), 1.0, ())  # noqa: E731
    quick, slow, never = made([50.0, 100 - best]), made([50.0] * 40 + [100 - best]), made([50.0] * 96)
    assert bench.curve("accuracy", bound, quick)[[0, 1, 2, 96]] == pytest.approx([0, 50, best, best])
    found = {("random", True): [quick] * 9 + [never], ("random", False): [slow] * 10}
    found |= {("ehvi", True): [slow] * 10, ("ehvi", False): [slow] * 10}
    row = bench.summary("demo", "accuracy", 0.05, found)
    assert row["searchers"]["random"]["with"]["to_99"] == [2, 2, 2]
    assert row["searchers"]["random"]["without"]["per_seed"] == [41] * 10
    assert row["searchers"]["random"]["with"]["per_seed"][-1] == bench.NEVER
    assert [row["searchers"][name]["verdict"] for name in ("random", "ehvi")] == ["helps", "same"]
    assert bench.verdict([41] * 10, [2] * 10) == "hurts"


def test_finished_searches_are_kept_and_an_early_end_says_so(bench, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "BUDGET", 8)
    monkeypatch.setattr(bench, "CHECKPOINTS", (4, 8))
    words = ["x", "--worlds", "demo", "--searchers", "random", "--shares", "0.05", "--seeds", "2", "--json", "--cache"]
    monkeypatch.setattr(sys, "argv", [*words, str(tmp_path)])
    with monkeypatch.context() as short:
        short.setattr(sys, "argv", [*sys.argv, "--seconds", "-1"])
        with pytest.raises(SystemExit, match="0 of 8 searches are there"):
            bench.main()
    bench.main()
    files = sorted(tmp_path.iterdir())
    assert len(files) == 8
    first = capsys.readouterr().out
    monkeypatch.setattr(bench, "replay", None)
    bench.main()
    assert capsys.readouterr().out == first
