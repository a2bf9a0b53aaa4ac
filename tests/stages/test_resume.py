"""kill -9 at any moment, the same command again: it goes on, and ends where an uninterrupted run ends, byte for byte."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from nascompile import engine, records
from nascompile.journal import read as read_journal
from nascompile.records import Evaluation, LatencyTable, TableRow, load

RECIPE = """
model = "toy"
device = "fake"
profile_seconds = 0.1
[budgets]
max_drop = 20.0
[finetune]
teacher_epochs = 2
epochs = 2
learning_rate = 0.01
[search]
evaluations = 12
population = 6
calibration_samples = 64
[measure]
top_k = 2
seconds = 0.1
batches = [1, 8]
agreement = 4
"""
COMMAND = """
import os, signal, sys
from nascompile import finetune, places
packaged = places._packaged
places._packaged = lambda kind: () if kind == places.TABLES else packaged(kind)
finetune.CHECKPOINT_SECONDS = float(os.environ["CHECKPOINTS"])
left, where = int(os.environ["WRITES"]), os.environ["WHERE"]

def dying(call):
    # what makes a file or folder be there: dies instead of, or right after, one of these calls
    def run(*arguments, **options):
        global left
        path = os.readlink(f"/proc/self/fd/{arguments[0]}") if isinstance(arguments[0], int) else str(arguments[-1])
        left -= where in path
        if left == 0 and where in path and os.environ["BEFORE"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        call(*arguments, **options)
        if left == 0 and where in path:
            os.kill(os.getpid(), signal.SIGKILL)
    return run

os.replace, os.rename, os.fsync = dying(os.replace), dying(os.rename), dying(os.fsync)
from nascompile.cli import main
main()
"""
"""`nascompile`, with frequent checkpoints, no tables of the checkout, and a wish to die at the WRITES-th write of WHERE (0: none)."""
VOLATILE = ("seconds", "build_seconds", "table_digest")
"""Wall-clock times; and the digest of a table, which holds one."""


Process = subprocess.Popen[str]


def start(folder: Path, *arguments: str, checkpoints: float = 0.05, writes: int = 0, where: str = "", before: bool = True) -> Process:
    """The command in `folder`; its progress is to be read from stderr."""
    wish = {"CHECKPOINTS": str(checkpoints), "WRITES": str(writes), "WHERE": where, "BEFORE": str(int(before))}
    environment = {**os.environ, **wish}
    command = [sys.executable, "-c", COMMAND, *arguments]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def complete(folder: Path, *arguments: str, **options: Any) -> float:
    """Run to the end; seconds since the first stage began."""
    with start(folder, *arguments, **options) as process:
        assert process.stderr
        process.stderr.readline()
        began = time.monotonic()
        error = process.stderr.read()
    assert process.returncode == 0, error
    return time.monotonic() - began


def killed(folder: Path, *arguments: str, after: float, **options: Any) -> bool:
    """Whether it was killed `after` so many seconds of work, or by its own hand; False: it had finished before."""
    with start(folder, *arguments, **options) as process:
        assert process.stderr
        process.stderr.readline()
        try:
            process.wait(after)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        error = process.stderr.read()
    assert process.returncode in (0, -signal.SIGKILL), error
    return process.returncode != 0


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """(folder of a run nobody disturbed, its seconds of work)."""
    folder = tmp_path_factory.mktemp("reference")
    (folder / "recipe.toml").write_text(RECIPE)
    return folder, complete(folder, "run", "recipe.toml", "--out", "run", checkpoints=1e9)


@pytest.fixture
def folder(reference: tuple[Path, float], tmp_path: Path) -> Path:
    """A new working folder with the recipe and the table of the reference: two timings of one operator are never equal."""
    shutil.copy(reference[0] / "recipe.toml", tmp_path)
    shutil.copytree(reference[0] / "latency_tables", tmp_path / "latency_tables")
    return tmp_path


# ---------------------------------------------------------------------------------------------- what must always hold


def check_whole(run: Path) -> None:
    """Everything that has its final name is complete."""
    for path in run.rglob("*.json"):
        if any(part.startswith((".", "tmp")) for part in path.relative_to(run).parts):
            continue  # what the killed process was writing
        body = json.loads(path.read_bytes())
        kind = getattr(records, body.get("record", ""), None) if isinstance(body, dict) else None
        if kind is not None:
            load(path, kind)
    for folder in (run / "engines").glob("[!.]*"):
        assert engine.verify(folder)
    scored = list(read_journal(run / "journal.jsonl", Evaluation))
    keys = {(e.candidate.id, e.score.weights_digest, e.score.evaluator_digest, e.score.split_digest) for e in scored}
    assert len(keys) == len(scored), "a candidate was scored twice"
    for path in run.glob("[!.]*/model.safetensors"):
        from safetensors.numpy import load_file

        assert load_file(path)


def results(run: Path) -> dict[str, Any]:
    """All that a run ends in: records without times, weights, graphs."""
    found: dict[str, Any] = {}
    names = ["front", "choice", "test", "baseline", "calibration", "agreement", "correction", "data/data", "supernet/manifest"]
    for path in [*(run / f"{name}.json" for name in names), *run.glob("measurements/*.json"), *run.glob("engines/*/candidate.json")]:
        found[str(path.relative_to(run))] = stripped(json.loads(path.read_bytes()))
    journal = [msgspec.to_builtins(e) for e in read_journal(run / "journal.jsonl", Evaluation)]
    found["journal"] = stripped(journal)
    for path in [*run.glob("*/model.safetensors"), *run.glob("engines/*/model.onnx")]:
        found[str(path.relative_to(run))] = records.file_digest(path)
    return found


def stripped(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: stripped(v) for k, v in value.items() if k not in VOLATILE}
    return [stripped(v) for v in value] if isinstance(value, list) else value


def check_equal(run: Path, wanted: Path) -> None:
    found, expected = results(run), results(wanted)
    assert list(found) == list(expected)
    assert [name for name in expected if found[name] != expected[name]] == []


def resume(folder: Path, reference: tuple[Path, float], plan: Sequence[dict[str, Any]]) -> int:
    """Kill the run by the plan, begin anew where it ended in spite of it, then let it end; how often it was killed in its work."""
    times = 0
    for death in plan:
        if killed(folder, "run", "recipe.toml", "--out", "run", **death):
            times += 1
            check_whole(folder / "run")
        else:
            check_equal(folder / "run", reference[0] / "run")
            shutil.rmtree(folder / "run")
    complete(folder, "run", "recipe.toml", "--out", "run")
    check_whole(folder / "run")
    check_equal(folder / "run", reference[0] / "run")
    return times


# ---------------------------------------------------------------------------------------------- kills


def drawn(seed: int, count: int, seconds: float) -> list[dict[str, Any]]:
    """Deaths at random moments and at random writes; early ones among them, so that the run is not over at once."""
    rng = np.random.default_rng(seed)
    found: list[dict[str, Any]] = []
    for _ in range(count):
        if rng.random() < 0.5:
            found.append({"after": float(rng.uniform(0, seconds) * rng.choice([0.2, 1.0]))})
        else:
            found.append({"after": 60.0, "writes": int(rng.integers(1, 40)), "before": bool(rng.random() < 0.5)})
    return found


IN_TRAINING = {"after": 60.0, "writes": 70, "where": "checkpoint.json", "checkpoints": 0.0}
"""The teacher takes 58 steps, so this is the twelfth of the super-network's."""
IN_SEARCH = {"after": 60.0, "writes": 7, "where": "journal.jsonl"}
IN_CHOICE = {"after": 60.0, "writes": 1, "where": "/choice.json", "before": False}


def test_killed_a_few_times_it_ends_the_same(folder: Path, reference: tuple[Path, float]) -> None:
    """In training, in the search, at the choice; with worse lying about than what a killed process leaves."""
    command, run = ("run", "recipe.toml", "--out", "run"), folder / "run"
    for death in (IN_TRAINING, IN_SEARCH, IN_CHOICE):
        assert killed(folder, *command, **death), death
        check_whole(run)
        litter(run)
    complete(folder, *command)
    check_whole(run)
    check_equal(run, reference[0] / "run")
    assert [p for p in run.rglob("*") if ".part" in p.name] == []


def litter(run: Path) -> None:
    """Half-written things of every kind."""
    for name in (".supernet.part", ".teacher.part", ".data.abc.part", ".engine.abc.part", "engines/.candidate-1.abc.part"):
        (run / name).mkdir(parents=True, exist_ok=True)
        for file, content in (("model.safetensors", b"half of it"), ("data.json", b"{"), ("manifest.json", b"{")):
            (run / name / file).write_bytes(content)
    for name in ("front.json", "choice.json", "test.json", "stages/search.json"):
        (run / name).with_name(f".{Path(name).name}.abc.part").write_text("{")
    with (run / "journal.jsonl").open("ab") as stream:
        stream.write(b'{"digest":"0123456789abcdef","record":"Evaluation","data":{"cand')


def test_a_profile_that_was_killed_goes_on(reference: tuple[Path, float], tmp_path: Path) -> None:
    shutil.copy(reference[0] / "recipe.toml", tmp_path)
    assert killed(tmp_path, "profile", "recipe.toml", "--out", "run", after=60.0, writes=12, where="profiling/rows-")
    (part,) = (tmp_path / "run" / "profiling").glob("rows-*.part")
    timed = list(read_journal(part, TableRow))
    assert len(timed) > 1
    complete(tmp_path, "profile", "recipe.toml", "--out", "run")
    table, expected = (load(folder / "run" / "table.json", LatencyTable) for folder in (tmp_path, reference[0]))
    ms, wanted = ({row.operator: row.latency.value for row in t.rows} for t in (table, expected))
    assert len(table.rows) == len(ms)
    assert set(ms) == set(wanted)
    # the simulated noise is 1 % of a sample, and a row is a low quantile of 30 of them
    assert all(ms[o] == pytest.approx(wanted[o], rel=0.05) for o in ms)
    kept = {row.operator: row.latency.value for row in timed if row.operator in ms}
    assert kept
    assert kept == {operator: ms[operator] for operator in kept}  # not timed again


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_killed_many_times_it_ends_the_same(seed: int, folder: Path, reference: tuple[Path, float]) -> None:
    assert resume(folder, reference, drawn(100 + seed, 8, reference[1])) >= 3
