"""Whole runs with searchers that use prices, on the toy network and the fake device."""

from __future__ import annotations

import msgspec
import pytest

from nascompile import pipeline, records
from nascompile.records import Front
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
