"""The engine benchmark on a toy network: every contender that can be here is timed, judged and compared."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "tools" / "benchmarks"
SCRIPT = BENCHMARKS / "engine_speed.py"


@pytest.fixture
def turns(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from speed import turns

    return turns


def test_advantage_is_that_over_the_best_rival_that_counts(turns):
    ours = np.array([[2.0, 2.0, 2.0, 2.0, 2.0], [9.0, 9.0, 9.0, 9.0, 9.0]])
    rivals = np.array([[1.0, 1.0, 1.0, 1.0, 1.0], [3.0, 3.0, 4.0, 3.0, 3.0]])
    every, second = np.ones((2, 2), bool), np.array([[False, True], [True, True]])
    assert turns.advantage(ours, rivals, every, seed=0) == {"value": 0.5, "low": 0.5, "high": 0.5}
    found = turns.advantage(ours, rivals, second, seed=0)
    assert found["value"] == 1.5
    assert found["low"] == 1.5
    assert found["high"] == 2.0  # 5.8 % of resamples hold the slow block most often


def test_blocks_visit_every_call_once_a_block(turns):
    seen = []
    calls = [lambda i=i: seen.append(i) for i in range(3)]
    times = turns.blocks(calls, [turns.Plan(1, 2)] * 3, at_least=4, seconds=0, seed=0)
    assert times.shape == (3, 4)
    assert all(sorted(seen[start : start + 9]) == [0, 0, 0, 1, 1, 1, 2, 2, 2] for start in range(0, 36, 9))


@pytest.mark.slow
def test_a_toy_cell(tmp_path):
    command = [sys.executable, str(SCRIPT), "--json", "--cells", "toy:1:1", "--cache", str(tmp_path), "--skip", "optimum", "torch.compile"]
    command += ["--blocks", "3", "--seconds", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    (row,) = found["rows"]
    assert (row["model"], row["batch"], row["threads"], row["blocks"]) == ("toy", 1, 1, 3)
    skipped = {name for name, reason in row["missing"].items() if "--skip" in reason}
    assert skipped == {"optimum O3", "optimum dynamic", "optimum static", "torch.compile", "torch.compile bf16"}
    assert {"torch eager", "onnxruntime, TorchScript export", "onnxruntime dynamic"} <= row["rival_ms"].keys()
    for label in ("fp32", "int8"):
        ratio = row["ratio_to_best_rival"][label]
        times = {**row["rival_ms"], **row["ours_by_backend_ms"]}
        assert ratio["low"] <= ratio["value"] <= ratio["high"]
        assert row["ours_ms"][label] == times[ratio["ours"]]
        assert ratio["rival"] not in row["excluded"]
    assert row["error"]["ours onnxruntime fp32"]["sqnr_db"] > 80 > row["error"]["ours onnxruntime int8"]["sqnr_db"] > 10
    assert math.isfinite(found["summary"]["all fp32"]["geometric_mean"])
    assert found["limits"][0]["fp32_gmacs"] > 0
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert json.loads(again.stdout)["rows"] == found["rows"]  # nothing was timed a second time
