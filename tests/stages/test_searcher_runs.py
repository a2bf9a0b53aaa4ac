"""Whole runs with searchers that use prices, on the toy network and the fake device."""

from __future__ import annotations

import msgspec
import pytest

from nascompile import pipeline, records
from nascompile.records import Choice, EngineManifest, Front
from nascompile.settings import Budgets


@pytest.mark.parametrize(("searcher", "budgets"), [
    ("ehvi", Budgets(max_drop=20.0)), ("ehvi", Budgets(max_drop=20.0, size_mb=0.03)), ("linas-table", Budgets(max_drop=20.0)),
    ("mip", Budgets(max_drop=20.0)),
])  # fmt: skip
def test_a_run_ends_with_a_front_within_its_budgets(searcher, budgets, quick, elsewhere):
    recipe = msgspec.structs.replace(quick, budgets=budgets, search=msgspec.structs.replace(quick.search, searcher=searcher))
    pipeline.run(recipe, elsewhere / "run")
    front = records.load(elsewhere / "run" / "front.json", Front)
    assert front.searcher == searcher
    assert 1 <= len(front.evaluations) <= front.scored <= 12
    assert all(e.size_bytes / 1e6 <= (budgets.size_mb or 1) for e in front.evaluations)


@pytest.mark.parametrize(("searcher", "objectives", "budgets"), [
    ("ehvi", ("error",), Budgets(memory_mb=0.015)),
    ("nsga2", ("memory_mb",), Budgets(max_drop=30.0)),
    ("nsga3", ("error", "latency_ms", "memory_mb"), Budgets(max_drop=30.0, memory_mb=0.02)),
    ("ehvi", ("error", "latency_ms", "size_mb", "macs_m"), Budgets(max_drop=30.0, macs_m=0.01, size_mb=0.05)),
])  # fmt: skip
def test_one_to_four_objectives_go_through_a_whole_run(searcher, objectives, budgets, quick, elsewhere):
    search = msgspec.structs.replace(quick.search, searcher=searcher, objectives=objectives, evaluations=20)
    pipeline.run(msgspec.structs.replace(quick, budgets=budgets, search=search), elsewhere / "run")
    front = records.load(elsewhere / "run" / "front.json", Front)
    assert front.objectives == objectives
    values = [
        {
            "error": -e.score.value, "latency_ms": e.latency.value, "size_mb": e.size_bytes / 1e6, "macs_m": e.macs / 1e6,
            "memory_mb": e.memory_bytes / 1e6,
        }
        for e in front.evaluations
    ]  # fmt: skip
    for value in values:
        assert 0 < value["memory_mb"] < 0.1
        for metric in ("size_mb", "macs_m", "memory_mb"):
            assert value[metric] <= (getattr(budgets, metric) or 1)
        others = [other for other in values if all(other[name] <= value[name] for name in objectives)]
        assert all(other[name] == value[name] for other in others for name in objectives)
    assert len(objectives) > 1 or len({value[objectives[0]] for value in values}) == 1
    chosen = records.load(elsewhere / "run" / "choice.json", Choice).engine
    manifest = records.load(elsewhere / "run" / "engines" / chosen / "manifest.json", EngineManifest)
    assert manifest.graph.memory_bytes / 1e6 <= (budgets.memory_mb or 1)
    report = (elsewhere / "run" / "report.md").read_text()
    assert "memory of a call, counted" in report
    assert all(name in report for name in objectives)
