"""Two processes of one command: one run folder, the networks that one process trains, and none that waits for one that is gone."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from nascompile import data, pipeline
from nascompile.finetune import TrainingLog
from nascompile.records import load

pytestmark = pytest.mark.slow

RECIPE = """
model = "toy"
device = "fake"
profile_seconds = 0.1
[budgets]
max_drop = 20.0
[data]
test_size = 200
validation_size = 200
[finetune]
teacher_epochs = 1
epochs = 1
batch_size = 31
learning_rate = 5e-4
control = true
[search]
evaluations = 6
population = 6
calibration_samples = 32
calibration_methods = ["minmax"]
[measure]
top_k = 1
seconds = 0.05
batches = [1]
agreement = 2
"""
"""Batches that two processes cannot share evenly."""
STEPS = 43
"""Of the super-network: 1,344 training samples in batches of 31."""
TOLERANCE = 1e-5
"""Float32 sums in another order, through 43 steps of Adam at 5e-4 that grow the difference: 1e-7 was seen. A step is 5e-4."""
COMMAND = """
import os, signal, sys
from nascompile import finetune
from nascompile.errors import DataError
finetune.CHECKPOINT_SECONDS = 0.0

def at(name, rank, event):
    real = getattr(finetune, name)
    def call(*arguments):
        if os.environ["RANK"] == rank and (name != "_step" or (arguments[0].folder.name, arguments[5]) == ("supernet", 20)):
            if event == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise DataError("an error that was asked for")
        return real(*arguments)
    setattr(finetune, name, call)

if where := os.environ.get("WHERE"):
    at(*where.split())
if os.environ.get("STEPS"):
    real = finetune._step
    def counted(*arguments):
        with open(os.environ["STEPS"] + os.environ["RANK"], "a") as stream:
            stream.write(f"{arguments[0].folder.name} {arguments[5]}\\n")
        return real(*arguments)
    finetune._step = counted
from nascompile.cli import main
main()
"""
"""`nascompile` with a checkpoint after every step; WHERE: the function at which a rank is killed or fails."""

TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    (folder / "recipe.toml").write_text(RECIPE)
    (folder / "command.py").write_text(COMMAND)
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    """A run by one process."""
    done = nascompile(folder, "-m", "nascompile", "run", "recipe.toml", "--out", "alone")
    assert done.returncode == 0, done.stderr
    return folder / "alone"


def nascompile(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command in `folder`; a machine with accelerators does without them."""
    values = os.environ | {"ACCELERATE_USE_CPU": "true"} | environment
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=values, capture_output=True, text=True, timeout=240, check=False)


def pair(folder: Path, *arguments: str, **environment: str) -> Iterator[tuple[int, str]]:
    """Exit status and stderr of two processes that no launcher watches over."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"} | environment
    common |= {"ACCELERATE_USE_CPU": "true"}
    started = [
        subprocess.Popen(
            [sys.executable, "command.py", *arguments], cwd=folder, env=common | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for rank in "01"
    ]  # fmt: skip
    try:
        for process in started:
            _, errors = process.communicate(timeout=120)
            yield process.returncode, errors
    finally:
        for process in started:
            process.kill()
            process.wait()


def files(run: Path) -> set[str]:
    """Everything in a run folder; names of kept scores hold digests of weights."""
    kept = ("measurements/scores/", "measurements/agreement/")
    return {name for path in run.rglob("*") if not (name := str(path.relative_to(run))).startswith(kept)}


def assert_same_networks(found: Path, wanted: Path, names: tuple[str, ...] = ("teacher", "supernet", "control")) -> None:
    for name in names:
        got, want = load_file(found / name / "model.safetensors"), load_file(wanted / name / "model.safetensors")
        assert got.keys() == want.keys()
        for tensor, value in want.items():
            np.testing.assert_allclose(got[tensor], value, rtol=0, atol=TOLERANCE, err_msg=f"{name}: {tensor}")
        logs = [load(run / name / "training.json", TrainingLog) for run in (found, wanted)]
        assert logs[0].validation == logs[1].validation
        assert [(log.steps, log.samples, log.stopped) for log in logs] == [(logs[1].steps, logs[1].samples, "finished")] * 2
        assert all(log.best_epoch > 0 for log in logs)  # trained weights, not those it began with
    assert (found / "supernet/manifest.json").read_bytes() == (wanted / "supernet/manifest.json").read_bytes()


def test_a_launched_run_is_the_run_of_one_process(folder: Path, alone: Path) -> None:
    done = nascompile(folder, "-m", *ACCELERATE, "-m", "nascompile", "run", "recipe.toml", "--out", "launched")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("[3/8] finetune") == 1
    assert "2 processes train together" in done.stderr
    assert done.stdout.count("report: launched/report.html") == 1
    assert files(folder / "launched") == files(alone)
    assert load(alone / "supernet/training.json", TrainingLog).steps == STEPS
    assert_same_networks(folder / "launched", alone)
    opened = [[(entry["split"], entry["purpose"]) for entry in data.accesses(run / "data")] for run in (folder / "launched", alone)]
    assert opened[0] == opened[1]

    again = nascompile(folder, "-m", "nascompile", "run", "--out", "launched")
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("done before") == len(pipeline.STAGES)


def test_every_option_of_training_works_in_several_processes(folder: Path) -> None:
    """`accelerate launch -m nascompile finetune`: the losses, the scores and the weights of one process."""
    options = RECIPE.replace("control = true", """recipe = "bignas"
start = "pretrained"
epochs = 2
accumulation = 2
ema_decay = 0.9
quantization_aware_epochs = 1""").replace("epochs = 1\nbatch_size", "batch_size")  # fmt: skip
    (folder / "options.toml").write_text(options)
    done = nascompile(folder, "-m", "nascompile", "finetune", "options.toml", "--out", "options-alone")
    assert done.returncode == 0, done.stderr
    done = nascompile(folder, "-m", *ACCELERATE, "-m", "nascompile", "finetune", "options.toml", "--out", "options-launched")
    assert done.returncode == 0, done.stderr
    assert "2 processes train together" in done.stderr
    found, wanted = folder / "options-launched", folder / "options-alone"
    logs = [load(run / "supernet/training.json", TrainingLog) for run in (found, wanted)]
    assert [(log.recipe, log.quantized_from, len(log.losses)) for log in logs] == [("bignas", 1.0, 2)] * 2
    np.testing.assert_allclose(logs[0].losses, logs[1].losses, rtol=1e-4)  # sums in another order, through 86 steps
    assert_same_networks(found, wanted, ("teacher", "supernet"))


ERROR, KILLED = "error: an error that was asked for", ""
GONE, FAILED = "error: another of the 2 processes of this command has ended", "error: the first process of this command has failed"


@pytest.mark.parametrize(
    ("where", "codes", "says"),
    [
        ("_step 0 kill", (-signal.SIGKILL, 1), (KILLED, GONE)),
        ("_step 0 fail", (1, 1), (ERROR, GONE)),
        ("_step 1 fail", (1, 1), (GONE, ERROR)),
        ("sort_by_importance 0 kill", (-signal.SIGKILL, 1), (KILLED, GONE)),
        ("sort_by_importance 0 fail", (1, 1), (ERROR, FAILED)),
    ],
)
def test_no_process_outlives_another(
    where: str, codes: tuple[int, int], says: tuple[str, str], folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = tmp_path_factory.mktemp("run")
    ended = list(pair(folder, "finetune", "recipe.toml", "--out", str(run), "--quiet", WHERE=where))
    assert [code for code, _ in ended] == list(codes), ended
    for (_, errors), wanted in zip(ended, says, strict=True):
        assert wanted in errors
        assert "Traceback" not in errors
    assert not (run / "supernet").exists()


def test_bad_settings_end_both(folder: Path, alone: Path) -> None:
    ended = list(pair(folder, "finetune", "recipe.toml", "--out", "small", "--batch-size", "1"))
    assert [code for code, _ in ended] == [1, 1]
    assert all("a batch of 1 cannot be shared by 2 processes" in errors for _, errors in ended)
    ended = list(pair(folder, "run", "recipe.toml", "--out", "alone", "--seed", "9"))
    assert [code for code, _ in ended] == [1, 1]
    assert "alone holds another run" in ended[0][1]
    assert FAILED in ended[1][1]


def test_a_killed_training_continues(folder: Path, alone: Path) -> None:
    """kill -9 of one process ends the launcher and the other process; the same command goes on from the step it had come to."""
    command = ("-m", *TORCHRUN, "command.py", "finetune", "recipe.toml", "--out", "killed")
    killed = nascompile(folder, *command, WHERE="_step 0 kill")
    assert killed.returncode != 0
    reached = json.loads((folder / "killed/training/supernet/checkpoint.json").read_text())["step"]
    assert reached == 20
    done = nascompile(folder, *command, STEPS="steps")
    assert done.returncode == 0, done.stderr
    for rank in "01":
        taken = [line.split() for line in (folder / f"steps{rank}").read_text().splitlines()]
        assert [int(step) for name, step in taken if name == "supernet"] == list(range(reached, STEPS))
        assert not [name for name, _ in taken if name == "teacher"]
    assert_same_networks(folder / "killed", alone)
