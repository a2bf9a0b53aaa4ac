"""The benchmark of latency tables: how it brings measurements to a table's pace, and a toy cell from table to summary."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

BENCHMARKS = Path(__file__).parents[2] / "tools" / "benchmarks"
SCRIPT = BENCHMARKS / "table_accuracy.py"


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import table_accuracy

    return table_accuracy


def test_the_pace_is_a_curve_over_bytes_that_one_disturbed_network_does_not_bend(tool):
    sizes = {name: 2**20 << i for i, name in enumerate("abcdefg")}
    then = {name: 1.0 + i for i, name in enumerate("abcdefg")}
    residuals = [SimpleNamespace(candidate=name, measured=SimpleNamespace(value=ms)) for name, ms in then.items()]
    case = SimpleNamespace(footprint=lambda table, name: sizes.get(name, 2**18), kind=lambda name: "fp32")
    known = tool.Known(case, SimpleNamespace(validation=residuals), Path(), "fp32")
    pace = {name: math.exp(0.01 * math.log2(size) - 0.2) for name, size in sizes.items()}
    now = [SimpleNamespace(value=then[name] / pace[name] * (1.5 if name == "d" else 1.0)) for name in "abcdefg"]
    assert known.paces(now, ["a", "d", "g"]) == pytest.approx([pace["a"], pace["d"], pace["g"]], rel=5e-3)
    assert known.paces(now, ["smaller"]) == pytest.approx([math.exp(0.01 * 18 - 0.2)], rel=1e-2)
    same = tool.Known(SimpleNamespace(footprint=lambda table, name: 9, kind=case.kind), known.table, Path(), "fp32")
    assert same.paces(now, ["a"]) == pytest.approx([pace["d"]], rel=0.02), "about the median where all are alike"
    assert len(known.own_paces(now)) == 7


@pytest.mark.slow
def test_toy_cells(tmp_path):
    command = [sys.executable, str(SCRIPT), "--json", "--cells", "toy:mixed", "toy:int8", "--networks", "6", "--seconds", "0.02"]
    command += ["--cache", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [(row["precision"], row["n"]) for row in found["rows"]] == [("mixed", 6), ("int8", 6)]
    for row in found["rows"]:
        assert set(row["rivals"]) == {"rows", "stacks", "isolated", "profiler", "macs", "ridge", "boosting"}
        assert 0 < row["fastest_ms"] < row["slowest_ms"]
        assert 0.5 < row["pace"] < 2
        assert row["mape"] < 50
        assert 0 <= row["inside"] <= 6
    again = subprocess.run([*command, "--resume"], capture_output=True, text=True, check=False)
    assert json.loads(again.stdout)["rows"] == found["rows"], "nothing is timed twice"
