"""What people get wrong, through the command line: one clear error with a next step, the right exit code, and nothing lost."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from typer.testing import CliRunner

from nascompile import cli, data, engine, pipeline, plugins, records
from nascompile.errors import DataError
from nascompile.families.toy import ToyConfig
from nascompile.journal import read as read_journal
from nascompile.records import Environment, Evaluation, Front, LatencyTable, load
from nascompile.settings import Recipe

RECIPE = """
profile_seconds = 0.1
device = "fake"
[finetune]
teacher_epochs = 3
epochs = 1
learning_rate = 0.01
[search]
evaluations = 12
population = 6
calibration_samples = 32
calibration_methods = ["minmax"]
[measure]
top_k = 1
seconds = 0.05
batches = [1]
agreement = 2
"""
OWN = ("run", "quick.toml", "--model", "toy", "--data", "toy.csv", "--max-drop", "20", "--out", "out", "--quiet")


@pytest.fixture(autouse=True)
def work(elsewhere: Path, toy_csv: Any) -> None:
    torch.set_num_threads(1)
    Path("quick.toml").write_text(RECIPE)
    toy_csv(Path("toy.csv"))


@pytest.fixture(scope="module")
def made(into: Any, toy_csv: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run up to the measurements, and what it was made from."""
    with pytest.MonkeyPatch.context() as patch:
        folder = into(tmp_path_factory.mktemp("made"), patch)
        Path("quick.toml").write_text(RECIPE)
        toy_csv(Path("toy.csv"))
        done = invoke("measure", *OWN[1:])
        assert done.exit_code == 0, done.output
        return folder


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments], prog_name="nascompile")


def refused(*arguments: object, says: str, hint: str) -> str:
    """The error of a command that fails as expected; `says` is in its first line, `hint` in its hint."""
    done = invoke(*arguments)
    assert done.exit_code == 1, done.output
    assert isinstance(done.exception, SystemExit), done.exception
    return check_error(done.stdout, done.stderr, says, hint)


def check_error(stdout: str, stderr: str, says: str, hint: str) -> str:
    assert stdout == ""
    first = stderr.splitlines()[0]
    assert first.startswith("error: ")
    assert says in first
    assert "Traceback" not in stderr
    body, found, next_step = stderr.partition("\n\nhint: ")
    assert found
    assert "\n" not in next_step.strip(), "one next step"
    assert hint in next_step
    return body


def with_(**changes: str | None) -> list[str]:
    """OWN with other flags; None takes one away."""
    found = list(OWN)
    for name, value in changes.items():
        flag = "--" + name.replace("_", "-")
        if flag in found:
            at = found.index(flag)
            found[at : at + 2] = []
        found += [flag, value] if value is not None else []
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "lock"}


# ---------------------------------------------------------------------------------------------- data


def rows_of(path: Path) -> list[list[str]]:
    return [line.split(",") for line in path.read_text().splitlines()]


def write(path: str, rows: list[list[str]]) -> None:
    Path(path).write_text("".join(",".join(row) + "\n" for row in rows))


def damaged(how: str) -> dict[str, str]:
    """Data with one fault, as files; the flags that name them."""
    rows = rows_of(Path("toy.csv"))
    if how == "missing column":
        return {"label_column": "nope"}
    if how == "no label column":
        write("bad.csv", [[*rows[0][:-1], "x16"], *([*row[:-1], "1"] for row in rows[1:])])
    if how == "empty label":
        rows[7][-1] = ""
        write("bad.csv", rows)
    if how == "unlabelled class":
        write("bad.csv", rows)
        write("test.csv", [rows[0], *([*row[:-1], label] for row, label in zip(rows[1:4], "abd", strict=True))])
        return {"data": "bad.csv", "test": "test.csv"}
    if how == "one class":
        write("bad.csv", [rows[0], *([*row[:-1], "a"] for row in rows[1:])])
    if how == "empty file":
        Path("bad.csv").write_text("")
    if how == "header only":
        write("bad.csv", rows[:1])
    if how == "no file":
        return {"data": "nowhere.csv"}
    if how == "a short row":
        rows[5] = rows[5][1:]
        write("bad.csv", rows)
    if how == "not a number":
        rows[5][2] = "many"
        write("bad.csv", rows)
    if how == "too few":
        write("bad.csv", rows[:6])
    return {"data": "bad.csv"}


DATA = {
    "missing column": ("no such column in toy.csv: nope", "--label-column must be one of: x0"),
    "no label column": ("no column looks like the labels in bad.csv", "--label-column"),
    "empty label": ("no label in column `label` (train): bad.csv, row 8", "label the sample, or leave it out"),
    "unlabelled class": ("a label of test that train lacks: 'd' (test.csv, row 4)", "labels of train: a, b, c"),
    "one class": ("at least two classes: found 1 (a)", "--label-column"),
    "empty file": ("empty file: bad.csv", "first row must name the columns"),
    "header only": ("no samples in bad.csv", "give a source with labelled samples"),
    "no file": ("no such file or folder: nowhere.csv", "check the path"),
    "a short row": ("bad.csv, row 6 has 16 fields instead of 17", "quote fields"),
    "not a number": ("bad.csv, row 6: not a vector of numbers: ", "every feature must be a number"),
    "too few": ("too few samples", "add samples"),
}


@pytest.mark.parametrize("how", list(DATA))
def test_data_that_cannot_be_used(how: str) -> None:
    says, hint = DATA[how]
    refused(*with_(**damaged(how)), says=says, hint=hint)
    assert {p.name for p in Path("out").rglob("*")} <= {"recipe.json", "lock", "model", "config.json", "model.safetensors"}
    done = invoke("profile", *OWN[1:])  # the mistake put right, in the same folder
    assert done.exit_code == 0, done.output


def test_data_that_turned_bad_leave_the_run_alone(made: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    good = Path("toy.csv").read_bytes()
    before = contents(Path("out"))
    Path("toy.csv").write_text("")
    refused(*OWN, says="empty file: toy.csv", hint="first row")
    assert contents(Path("out")) == before
    Path("toy.csv").write_bytes(good)
    assert invoke(*OWN).exit_code == 0
    assert (Path("out") / "journal.jsonl").read_bytes() == before["journal.jsonl"]


# ---------------------------------------------------------------------------------------------- models and recipes


def model_folder(kind: str) -> str:
    folder = Path("model")
    folder.mkdir()
    if kind == "unknown architecture":
        (folder / "config.json").write_text('{"model_type": "mamba"}')
        (folder / "model.safetensors").write_bytes(b"")
    elif kind == "pickled weights":
        (folder / "config.json").write_text('{"model_type": "bert"}')
        (folder / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    elif kind == "no config":
        (folder / "model.safetensors").write_bytes(b"")
    elif kind == "damaged config":
        (folder / "config.json").write_text('{"model_type": ')
        (folder / "model.safetensors").write_bytes(b"")
    return str(folder)


MODELS = {
    "unknown architecture": ("unknown architecture: mamba", "known: bert (bert"),
    "pickled weights": ("no safetensors weights in model", "save_pretrained"),
    "no config": ("no config.json in model", "save_pretrained"),
    "damaged config": ("damaged config.json in model", "download or save the model again"),
}


@pytest.mark.parametrize("kind", list(MODELS))
def test_models_that_cannot_be_used(kind: str) -> None:
    says, hint = MODELS[kind]
    refused(*with_(model=model_folder(kind)), says=says, hint=hint)
    assert invoke("profile", *OWN[1:]).exit_code == 0


def test_a_head_with_other_labels_asks_for_a_new_one() -> None:
    labels = ("red", "green", "blue")
    config = ToyConfig(num_labels=3, id2label=dict(enumerate(labels)), label2id={n: i for i, n in enumerate(labels)})
    plugins.get("families", "toy").create(config).save_pretrained("model")
    body = refused(*with_(model="model"), says="other labels than the data: red, green, blue", hint="--new-head")
    assert "labels of the data: a, b, c" in body
    done = invoke("profile", *with_(model="model")[1:], "--new-head")
    assert done.exit_code == 0, done.output
    assert data.load_manifest(Path("out/data")).label_names == ("a", "b", "c")


def test_every_fault_of_a_recipe_is_told_at_once() -> None:
    Path("bad.toml").write_text("modle = 3\n[search]\nevaluation = 5\n[measure]\ntop_k = 'all'\n")
    body = refused("run", "bad.toml", "--out", "out", says="unknown settings in bad.toml: 2", hint="nascompile run --help")
    assert "did you mean model?" in body
    assert "did you mean search.evaluations?" in body
    assert "$.measure.top_k" in body
    Path("bad.toml").write_text('threads = 0\n[search]\npopulation = 1\nobjectives = ["speed", "error"]\n[finetune]\nepochs = -1\n')
    body = refused("run", "bad.toml", "--out", "out", says="the recipe cannot be run", hint="nascompile run --help")
    for fault in ("threads = 0", "search.population = 1", "search.objectives", "finetune.epochs = -1", "no budget"):
        assert fault in body
    Path("bad.toml").write_text("threads = \n")
    assert "line 1" in refused("run", "bad.toml", says="not a TOML file: bad.toml", hint="quoted")
    refused("run", "nowhere.toml", says="no such recipe: nowhere.toml", hint="nascompile run --help")
    assert not Path("out").exists()


def test_a_device_or_a_folder_that_is_none() -> None:
    Path("taken").write_text("mine")
    refused(*with_(out="taken"), says="the run folder is a file: taken", hint="--out")
    assert Path("taken").read_text() == "mine"
    refused(*with_(device="toaster"), says="unknown device: toaster", hint="known here:")
    refused(*with_(backend="abacus"), says="has no backend named abacus", hint="its backends: fake")


# ---------------------------------------------------------------------------------------------- budgets


@pytest.mark.parametrize(("flag", "metric"), [(name, name) for name in ("latency_ms", "size_mb", "macs_m", "memory_mb")])
def test_a_budget_nothing_meets_names_the_nearest_and_what_would(flag: str, metric: str, copied: None) -> None:
    before = contents(Path("out"))
    command = with_(**{flag: "0.00001"})
    body = refused(*command, says=f"no candidate meets the budget: {metric} ≤ 1e-05", hint=f"raise `--{flag.replace('_', '-')}` to ")
    assert re.search(rf"nearest: .*{metric} \d.*depth=\d.*hidden=\d", body)
    for name in ("journal.jsonl", "front.json", "choice.json", "supernet/model.safetensors", "engines/baseline/model.onnx"):
        assert contents(Path("out")).get(name) == before.get(name)
    done = invoke("search", *with_(**{flag: bound_of(invoke(*command).stderr)})[1:])  # the hint, followed
    assert done.exit_code == 0, done.output
    assert len(load(Path("out/front.json"), Front).evaluations) >= 1
    assert contents(Path("out"))["journal.jsonl"].startswith(before["journal.jsonl"])


def test_a_drop_nothing_meets_names_the_nearest_and_keeps_every_score() -> None:
    """A super-network that was not trained at all: its small networks are bad."""
    Path("quick.toml").write_text(RECIPE.replace("\nepochs = 1", "\nepochs = 0\nimportance = false"))
    least = bound_of(invoke(*with_(size_mb="0.00001")).stderr)  # the smallest network, and no other, has this size
    command = with_(max_drop="0", size_mb=least)
    body = refused(*command, says="scored candidates meets the budget: drop ≤ 0 points", hint="raise `--max-drop` to ")
    assert re.search(r"nearest: accuracy \d+\.\d\d, a drop of \d+\.\d\d from \d+\.\d\d, at [\d.]+ ms \(depth=", body)
    scored = Path("out/journal.jsonl").read_bytes()
    done = invoke("search", *with_(max_drop=bound_of(invoke(*command).stderr), size_mb=least)[1:])
    assert done.exit_code == 0, done.output
    assert Path("out/journal.jsonl").read_bytes() == scored


def bound_of(stderr: str) -> str:
    """The bound that a hint asks for."""
    found = re.search(r"to ([\d.e+-]*\d)", stderr.partition("hint: ")[2])
    assert found, stderr
    return found[1]


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> None:
    """The run of `made`, copied into the working folder."""
    import shutil

    shutil.copytree(made, tmp_path, dirs_exist_ok=True)


# ---------------------------------------------------------------------------------------------- disks and damage


def test_a_full_disk_at_any_record_loses_nothing(copied: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fills up at the first write, then at the first the next attempt makes beyond it, and so on."""
    import shutil

    shutil.rmtree("out/stages")  # every stage is to write something again
    sync, room = os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal room
        if room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        room -= 1
        sync(descriptor)

    for more in (0, 1, 5, 11, 12, 13, 14, 16, 20):
        before = contents(Path("out/engines")) | contents(Path("out/supernet")) | contents(Path("out/measurements"))
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            room = more
            done = invoke(*OWN)
        assert done.exit_code == 1, done.output
        check_error(done.stdout, done.stderr, "", "run the same command again")
        assert re.search(r"no space left|cannot write", done.stderr.splitlines()[0], re.IGNORECASE)
        assert contents(Path("out/engines")) | contents(Path("out/supernet")) | contents(Path("out/measurements")) == before
    done = invoke(*OWN)
    assert done.exit_code == 0, done.output


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True, check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("room", [20, 120, 300, 550, 800, 1100])
def test_a_disk_that_is_full_stops_a_run_and_room_lets_it_go_on(room: int, small_disk: Path) -> None:
    """`room` KB are left; which library finds no more is left to chance."""
    command = with_(out=str(small_disk / "run"))
    (small_disk / "ballast").write_bytes(b"0" * (8 * 1024 - room) * 1024)
    done = invoke(*command)
    assert done.exit_code == 1, done.output
    check_error(done.stdout, done.stderr, "", "run the same command again")
    stages = {p.name: p.read_bytes() for p in (small_disk / "run" / "stages").glob("*.json")}
    (small_disk / "ballast").unlink()
    done = invoke(*command)
    assert done.exit_code == 0, done.output
    for name, content in stages.items():
        assert (small_disk / "run" / "stages" / name).read_bytes() == content  # not done twice
    assert [p for p in (small_disk / "run").rglob("*") if ".part" in p.name] == []


@pytest.mark.parametrize("line", [1, 6])
def test_a_damaged_line_of_the_journal_is_named_and_the_hint_repairs_it(line: int, copied: None) -> None:
    path = Path("out/journal.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    middle = len(lines[line - 1]) // 2
    flipped = bytearray(lines[line - 1])
    flipped[middle] ^= 1
    path.write_bytes(b"".join([*lines[: line - 1], bytes(flipped), *lines[line:]]))
    damaged_journal = path.read_bytes()
    Path("out/front.json").unlink()
    refused(*OWN, says=f"damaged line in out/journal.jsonl: line {line}", hint=f"sed -i {line}d out/journal.jsonl")
    assert path.read_bytes() == damaged_journal
    command = re.search(r"`(sed [^`]*)`", invoke(*OWN).stderr)
    assert command
    subprocess.run(shlex.split(command[1]), check=True)
    done = invoke("search", *OWN[1:])
    assert done.exit_code == 0, done.output
    after = path.read_bytes().splitlines(keepends=True)
    assert after[: len(lines) - 1] == [*lines[: line - 1], *lines[line:]]
    found = [e.candidate.id for e in read_journal(path, Evaluation)]
    assert len(found) == len(set(found)) == len(lines)  # only the lost one was scored again


def test_a_damaged_engine_is_found(copied: None) -> None:
    path = Path("out/engines/candidate-1/model.onnx")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    body = refused("verify", "out/engines/candidate-1", says="candidate-1 is not as it was built", hint="build it again")
    assert "changed file: model.onnx" in body


def test_a_damaged_record_is_named_and_can_be_removed(copied: None) -> None:
    Path("out/stages/search.json").write_text('{"record": "StageDone", ')
    refused(*OWN, says="damaged file: out/stages/search.json", hint="remove it")
    Path("out/stages/search.json").unlink()
    assert invoke("search", *OWN[1:]).exit_code == 0


# ---------------------------------------------------------------------------------------------- other machines


@pytest.fixture
def foreign(copied: None) -> LatencyTable:
    """`foreign.json`: the run's table, said to be of another processor."""
    table = load(Path("out/table.json"), LatencyTable)
    pairs = tuple((name, "another-cpu" if name == "cpu" else value) for name, value in table.environment.must_match)
    records.save(msgspec.structs.replace(table, environment=Environment(must_match=pairs)), Path("foreign.json"))
    return load(Path("foreign.json"), LatencyTable)


def test_a_table_of_another_machine_is_refused(foreign: LatencyTable) -> None:
    before = contents(Path("out"))
    command = ("profile", *with_(tables="foreign.json", out="new")[1:])
    body = refused(*command, says="made elsewhere: it belongs to fake with other cpu", hint="nascompile profile --device fake")
    assert "cpu: table has another-cpu, here it is fake" in body
    refused("profile", *with_(tables="foreign.json")[1:], says="made elsewhere", hint="nascompile profile")  # a finished run alike
    assert {**contents(Path("out")), "recipe.json": b""} == {**before, "recipe.json": b""}
    assert not Path("new/table.json").exists()


def test_a_foreign_table_is_used_where_that_is_asked_for(foreign: LatencyTable) -> None:
    command = [word for word in with_(tables="foreign.json", out="new")[1:] if word != "--quiet"]
    done = invoke("profile", *command, "--allow-foreign")
    assert done.exit_code == 0, done.output
    assert load(Path("new/table.json"), LatencyTable) == foreign  # it says itself where it was made
    assert "using a foreign latency table, with other cpu: foreign.json" in done.stderr
    few = msgspec.structs.replace(foreign, rows=foreign.rows[3:])
    records.save(few, Path("foreign.json"))
    command = ("profile", *with_(tables="foreign.json", out="newer")[1:], "--allow-foreign")
    body = refused(*command, says="made elsewhere and lacks 3 of the network's operators", hint="--tables")
    assert foreign.rows[0].operator.label in body


def test_a_table_of_another_target_is_refused(foreign: LatencyTable) -> None:
    other = msgspec.structs.replace(foreign, target=msgspec.structs.replace(foreign.target, threads=8))
    records.save(other, Path("foreign.json"))
    body = refused("profile", *with_(tables="foreign.json", out="new")[1:], "--allow-foreign", says="another target", hint="table")
    assert "threads: 8 and 1" in body


# ---------------------------------------------------------------------------------------------- order


def test_two_runs_in_one_folder(copied: None) -> None:
    code = (
        "import sys\nfrom nascompile import pipeline\nfrom nascompile.cli import main\n"
        "def wait(*_): print('inside', file=sys.stderr, flush=True); sys.stdin.read()\n"
        "pipeline.Context.perform = wait\nmain()\n"
    )
    command = [sys.executable, "-c", code, *OWN]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as other:
        assert other.stderr
        assert other.stderr.readline() == "inside\n"
        before = contents(Path("out"))
        refused(*OWN, says="another process is working in this run folder: out", hint="give another --out")
        refused("build", "--out", "out", "--candidate", "1", says="another process", hint="--out")
        assert contents(Path("out")) == before
        other.send_signal(signal.SIGKILL)
    assert invoke(*OWN).exit_code == 0  # its lock died with it


def test_test_data_cannot_be_read_before_the_choice(copied: None) -> None:
    folder = Path("out/data")
    with pytest.raises(DataError, match=r"test data read too early: out/choice\.json has not been written") as caught:
        data.open_split(folder, "test", "curiosity")
    assert "once, after the choice" in caught.value.hint
    Path("out/choice.json").write_text('{"record": "Choice", "version": 1, "data": {}}')
    with pytest.raises(DataError, match="without a valid choice"):
        data.open_split(folder, "test", "forged")
    assert not [entry for entry in data.accesses(folder) if entry["split"] == "test"]
    Path("out/choice.json").unlink()
    done = invoke(*OWN)
    assert done.exit_code == 0, done.output
    assert len([entry for entry in data.accesses(folder) if entry["split"] == "test"]) == 1
    before = contents(Path("out"))
    refused(*with_(max_drop="1"), says="test was read for the choice in out", hint="--out")
    assert contents(Path("out")) == before


def test_stages_and_engines_that_are_not_there() -> None:
    refused("verify", "nowhere", says="not an engine folder, it has no manifest.json: nowhere", hint="`engines` folder")
    refused("build", "--out", "nowhere", "--candidate", "1", says="no front in nowhere", hint="nascompile search RECIPE --out nowhere")
    assert not Path("nowhere").exists()


def test_usage_errors_exit_with_2_and_do_nothing() -> None:
    for arguments in (("run", "--max-drop", "little"), ("run", "--no-such-flag"), ("verify",), ("build", "--candidate", "x")):
        done = invoke(*arguments)
        assert (done.exit_code, done.stdout) == (2, "")
    assert sorted(p.name for p in Path().iterdir()) == ["quick.toml", "toy.csv"]


def test_json_is_printed_on_success_alone() -> None:
    done = invoke(*with_(label_column="nope"), "--json")
    assert (done.exit_code, done.stdout) == (1, "")
    done = invoke(*OWN, "--json")
    assert done.exit_code == 0, done.output
    body = json.loads(done.stdout)
    assert engine.verify(Path(body["engine"]))
    assert load(Path(body["run"]) / "recipe.json", Recipe).budgets.max_drop == 20.0
    assert pipeline.STAGES[-1] == "report"
