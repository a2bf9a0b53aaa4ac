"""The command line: what goes to which stream, exit codes, and which setting a flag sets."""

from __future__ import annotations

import csv
import inspect
import io
import json
import os
import pty
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import msgspec
import pytest
from rich.console import Console
from typer.testing import CliRunner

from nascompile import cli, engine, pipeline, records, settings
from nascompile.errors import BudgetError
from nascompile.progress import Lines, Pace, Progress, Standing, time_left
from nascompile.records import INT8, Candidate, Environment, LatencyTable, Operator, Quantity, Residual, TableRow, Target, Workload
from nascompile.settings import Budgets, Recipe
from nascompile.terminal import Bars, spread

COMMAND = [sys.executable, "-m", "nascompile.cli"]


def invoke(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments], prog_name="nascompile")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def asked(monkeypatch):
    """What the pipeline was asked for: (recipe, folder, last stage); nothing is run."""
    calls = []

    def run(recipe, out, *, until, progress, table):
        print("a library that prints")
        calls.append((recipe, out, until, *([table] if table else [])))

    monkeypatch.setattr(pipeline, "run", run)
    monkeypatch.setattr(cli, "_print_closing", lambda out: None)
    monkeypatch.setattr(cli, "_print_stage", lambda out, stage, as_json: None)
    return calls


# ---------------------------------------------------------------------------------------------- start


def test_help_needs_nothing_heavy():
    code = (
        "import sys; sys.argv = ['nascompile', '--help']\n"
        "from nascompile.cli import main\n"
        "try: main()\n"
        "finally: print(*sorted({'torch', 'numpy', 'transformers', 'onnx', 'onnxruntime', 'pandas'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stderr.strip() == ""
    assert "devices" in done.stdout


def test_stages_are_those_of_the_pipeline():
    assert tuple(cli.STAGES) == tuple(stage for stage in pipeline.STAGES if stage != "data")
    for name in ("run", *cli.STAGES, "devices", "verify", "predict"):
        assert f" {name} " in invoke("--help").stdout


# ---------------------------------------------------------------------------------------------- flags

FLAGS = [flag for group in cli.FLAGS.values() for flag in group]
WRITTEN = {
    "--device": (["a", "b:c:2"], {"device": "a", "also": ["b:c:2"]}),
    "--latency-ms": (["0.5", "pi4=20"], {"budgets.latency_ms": {"": 0.5, "pi4": 20.0}}),
    "--objective": (["worst-ratio"], {"search.objectives": ["error", "worst_ratio"]}),
}
"""Flags whose words are taken apart ▸ the words, and what they set."""
SAMPLE = {bool: True, int: 3, float: 0.5, str: "x", list[str]: ["a", "b"]}


@pytest.mark.parametrize("flag", FLAGS, ids=lambda flag: flag.name)
def test_a_flag_sets_its_setting_and_no_other(flag, asked, monkeypatch):
    monkeypatch.setattr(settings, "check", lambda recipe: recipe)
    value, sets = WRITTEN.get(flag.name) or (SAMPLE[flag.kind], {flag.setting: SAMPLE[flag.kind]})
    words = [word for v in value for word in (flag.name, v)] if isinstance(value, list) else [flag.name.partition("/")[0], str(value)]
    if flag.setting == "minutes":
        words[1] = "30s"
    done = invoke("run", "--model", "m", *(words[:1] if flag.kind is bool else words))
    assert done.exit_code == 0, done.output
    expected = json.loads(records.encode(Recipe(model="m")))
    for setting, wanted in sets.items():
        section = expected
        *path, last = setting.split(".")
        for name in path:
            section = section[name]
        section[last] = wanted
    assert json.loads(records.encode(asked[0][0])) == expected


def test_every_setting_a_flag_names_has_its_type():
    for flag in FLAGS:
        kind = Recipe
        for name in flag.setting.split("."):
            kind = {field.name: field.type for field in msgspec.structs.fields(kind)}[name]
        if flag.name in WRITTEN:
            assert flag.kind == list[str]
            continue
        assert kind in (flag.kind, flag.kind | None, tuple[str, ...] if flag.kind == list[str] else None), flag.name


def test_one_device_may_be_written_with_backend_and_threads(asked):
    assert invoke("run", "--model", "m", "--max-drop", "1", "--device", "cpu:openvino:2").exit_code == 0
    recipe = asked[0][0]
    assert (recipe.device, recipe.backend, recipe.threads, recipe.also) == ("cpu", "openvino", 2, ())
    assert invoke("run", "--model", "m", "--max-drop", "1", "--device", "cpu::2", "--device", "cpu", "--threads", "2").exit_code == 0
    assert (asked[1][0].threads, asked[1][0].also) == (2, ("cpu",))


def test_one_latency_is_a_number(asked):
    assert invoke("run", "--model", "m", "--latency-ms", "2.5").exit_code == 0
    assert invoke("run", "--model", "m", "--latency-ms", "cpu:openvino=2.5").exit_code == 0
    assert [recipe.budgets.latency_ms for recipe, *_ in asked] == [2.5, {"cpu:openvino": 2.5}]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--device", "cpu:openvino", "--backend", "onnxruntime"), ("--device", "cpu::2", "--threads", "1"), ("--device", "cpu::x"),
        ("--device", ":openvino"), ("--latency-ms", "fast"), ("--latency-ms", "1", "--latency-ms", "2"),
        ("--latency-ms", "a=1", "--latency-ms", "a=2"), ("--latency-ms", "a="), ("--latency-ms", "-1"),
    ],
)  # fmt: skip
def test_devices_and_latencies_that_cannot_be_meant_are_bad_usage(arguments, asked):
    done = invoke("run", "--model", "m", *arguments)
    assert (done.exit_code, done.stdout, asked) == (2, "", [])


def test_a_negative_flag_overrides_the_recipe(asked, tmp_path):
    (tmp_path / "r.toml").write_text('model = "m"\n[finetune]\nclass_weights = true\nepochs = 9\n[budgets]\nmax_drop = 1.0')
    assert invoke("run", "r.toml", "--no-class-weights", "--time", "1h30m").exit_code == 0
    recipe, out, until = asked[0]
    assert (recipe.finetune.class_weights, recipe.finetune.epochs, recipe.minutes) == (False, 9, 90.0)
    assert (str(out), until) == ("runs/m", "report")


@pytest.mark.parametrize(("text", "minutes"), [("90s", 1.5), ("30m", 30.0), ("2h", 120.0), ("1h30m", 90.0), ("0.5h", 30.0)])
def test_durations(text, minutes):
    assert cli.minutes(text) == minutes


@pytest.mark.parametrize("text", ["", "30", "m", "30x", "-3m", "30m later", "3 m"])
def test_what_is_no_duration_is_bad_usage(text):
    assert invoke("run", "--max-drop", "1", f"--time={text}").exit_code == 2


def test_no_argument_means_the_demo(asked):
    assert invoke("run").exit_code == 0
    assert asked == [(settings.demo_recipe(), cli.Path("runs/demo"), "report")]


def test_the_fake_device_means_the_toy(asked):
    invoke("run", "--device", "fake")
    assert asked == [(settings.toy_recipe(), cli.Path("runs/toy"), "report")]


def test_a_budget_for_the_demo_replaces_its_own(asked):
    invoke("run", "--size-mb", "2")
    assert asked[0][0].budgets == Budgets(size_mb=2.0)


@pytest.mark.parametrize("arguments", [("--model", "my/model"), ("--data", "my.csv")])
def test_own_model_or_data_needs_a_budget(arguments, asked):
    done = invoke("run", *arguments)
    assert done.exit_code == 1
    assert "--max-drop" in done.stderr
    assert asked == []


def test_a_run_folder_remembers_its_recipe(asked, tmp_path):
    stored = Recipe(model="mine", threads=2, budgets=Budgets(max_drop=1.0))
    records.save(stored, tmp_path / "old" / "recipe.json")
    invoke("search", "--out", "old")
    invoke("search", "--out", "old", "--max-drop", "0.5")
    invoke("run", "--out", "old", "--model", "other", "--max-drop", "2")
    assert asked[0] == (stored, cli.Path("old"), "search")
    assert asked[1][0] == msgspec.structs.replace(stored, budgets=Budgets(max_drop=0.5))
    assert asked[2][0] == Recipe(model="other", budgets=Budgets(max_drop=2.0))


@pytest.mark.parametrize("stage", list(cli.STAGES))
def test_each_stage_is_a_command(stage, asked):
    assert invoke(stage, "--out", "x", "--device", "fake", "--quiet").exit_code == 0
    assert asked == [(settings.toy_recipe(), cli.Path("x"), stage)]


@pytest.mark.parametrize("flag", ["fresh", "add-missing"])
def test_a_profile_is_told_where_its_table_comes_from(flag, asked):
    assert invoke("profile", "--out", "x", "--device", "fake", "--quiet", f"--{flag}").exit_code == 0
    assert asked == [(settings.toy_recipe(), cli.Path("x"), "profile", flag)]


# ---------------------------------------------------------------------------------------------- streams and exit codes


@pytest.mark.parametrize(
    "arguments",
    [("--nonsense",), ("nonsense",), ("run", "--epochs", "many"), ("run", "--nope"), ("table", "diff", "a"), ("verify",), ("predict", "x")],
)
def test_bad_usage_exits_2_with_nothing_on_stdout(arguments):
    done = invoke(*arguments)
    assert (done.exit_code, done.stdout) == (2, "")


def test_an_expected_failure_has_one_form(monkeypatch):
    def fail(*_, **__):
        raise BudgetError("none meets the budget: 2 ms", detail="nearest: 3.4 ms\nseed 7", hint="raise `--latency-ms` to 3.4")

    monkeypatch.setattr(pipeline, "run", fail)
    done = invoke("run", "--quiet", "--json")
    assert done.exit_code == 1
    assert done.stdout == ""
    assert done.stderr == "error: none meets the budget: 2 ms\n  nearest: 3.4 ms\n  seed 7\n\nhint: raise `--latency-ms` to 3.4\n"


def test_a_bug_keeps_its_traceback(monkeypatch):
    def fail(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr(pipeline, "run", fail)
    assert isinstance(invoke("run").exception, ZeroDivisionError)


def test_what_libraries_print_stays_out_of_stdout(asked):
    done = invoke("run", "--quiet")
    assert done.stdout == ""
    assert done.stderr == "a library that prints\n"


def test_interrupted_it_says_how_to_go_on(tmp_path):
    code = (
        "import signal, time\nfrom nascompile import pipeline\nfrom nascompile.cli import main\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # what a shell starts in the background ignores it
        "def run(*_, **__): print('working', flush=True); time.sleep(30)\n"
        "pipeline.run = run\nimport sys; sys.argv = ['nascompile', 'run']\nmain()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        assert process.stderr.readline() == "working\n"
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=20)
    assert process.returncode == 130
    assert out == ""
    assert error.strip() == "interrupted; run the same command again to continue"


# ---------------------------------------------------------------------------------------------- devices and tables


def test_devices_in_both_forms():
    listed = {device["name"]: device for device in json.loads(invoke("devices", "--json").stdout)}
    assert listed["fake"]["runs_here"] is True
    assert "cpu" in listed
    assert [line.split()[0] for line in invoke("devices").stdout.splitlines()] == ["device", *listed]


def test_a_new_profile_is_a_device(tmp_path):
    done = invoke("devices", "--init", "my-box", "--json")
    assert json.loads(done.stdout) == {"profile": str(tmp_path / "profiles" / "my-box.toml")}
    assert "my-box" in invoke("devices").stdout
    assert invoke("devices", "--init", "my-box").exit_code == 1


def quantity(value):
    return Quantity(value=value, unit="ms", kind="simulated", n=30, quantiles=((0.1, value), (0.5, 1.02 * value)))


@pytest.fixture
def tables(tmp_path):
    """Two tables of the fake device: `a` with two rows, `b` with one of them, slower, and another."""
    from nascompile import plugins, targets

    target = Target(device="fake", backend="fake", workload=Workload())
    environment = targets.device("fake").environment(target, plugins.get("backends", "fake").versions())
    one, two, three = (Operator(kind="mlp", dims=(("batch", 1), ("width", w)), precision=INT8) for w in (8, 16, 24))
    network = Candidate(space="", architecture=(), precision=())
    for name, rows in (("a", ((one, 1.0), (two, 2.0))), ("b", ((two, 3.0), (three, 4.0)))):
        table = LatencyTable(
            target=target, environment=environment, rows=tuple(TableRow(operator=o, latency=quantity(ms)) for o, ms in rows), seconds=2.0,
            validation=(Residual(candidate=network, predicted_ms=3.0, measured=quantity(3.0)),), relative_error=0.05,
        )  # fmt: skip
        records.save(table, tmp_path / f"{name}.json")
    return tmp_path


def test_a_table_is_shown_and_exported(tables):
    shown = invoke("table", "show", "a.json").stdout
    assert "2 rows, 0 of them noisy" in shown
    assert "mlp: 2 rows, 0 noisy; batch=1" in shown
    assert max(map(len, shown.splitlines())) <= 100
    assert len(json.loads(invoke("table", "show", "a.json", "--json").stdout)["rows"]) == 2
    exported = invoke("table", "export", "a.json").stdout
    assert invoke("table", "show", "a.json", "--csv").stdout == exported
    rows = list(csv.DictReader(io.StringIO(exported)))
    assert [(row["kind"], row["precision"], row["dim.width"], float(row["ms"]), float(row["p50_ms"])) for row in rows] == [
        ("mlp", "int8", "8", 1.0, 1.02), ("mlp", "int8", "16", 2.0, 2.04),
    ]  # fmt: skip
    assert json.loads(invoke("table", "export", "a.json", "--json").stdout)[1]["ms"] == 2.0


@pytest.mark.parametrize("suffix", ["csv", "parquet", "json"])
def test_a_table_is_exported_to_a_file(tables, suffix):
    assert invoke("table", "export", "a.json", "--out", f"new/rows.{suffix}").stdout == f"new/rows.{suffix}\n"
    assert (tables / "new" / f"rows.{suffix}").stat().st_size > 100
    done = invoke("table", "export", "a.json", "--out", "rows.xlsx")
    assert (done.exit_code, done.stdout) == (1, "")
    assert ".csv, .parquet, .json" in done.stderr


def test_tables_are_compared(tables):
    rows = json.loads(invoke("table", "diff", "a.json", "b.json", "--json").stdout)["rows"]
    assert [(row["a_ms"], row["b_ms"], row["ratio"]) for row in rows] == [(2.0, 3.0, 1.5), (1.0, None, None), (None, 4.0, None)]
    assert "1.500" in invoke("table", "diff", "a.json", "b.json").stdout
    listed = list(csv.DictReader(io.StringIO(invoke("table", "diff", "a.json", "b.json", "--csv").stdout)))
    assert [row["ratio"] for row in listed] == ["1.5", "", ""]
    done = invoke("table", "diff", "a.json", "b.json", "--plot", "d.html")
    assert (done.exit_code, done.stderr) == (0, "chart: d.html\n")
    assert (tables / "d.html").is_file()
    refused = invoke("table", "diff", "a.json", "b.json", "--plot", "d.svg")
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "kaleido" in refused.stderr


def test_tables_are_merged_into_a_new_one(tables):
    before = (tables / "a.json").read_bytes()
    path = tables / json.loads(invoke("table", "merge", "a.json", "b.json", "--json").stdout)["table"]
    assert len(records.load(path, LatencyTable).rows) == 3
    assert (tables / "a.json").read_bytes() == before
    assert path.name in invoke("table", "show").stdout


def test_a_table_is_valid_only_where_it_was_made(tables):
    assert json.loads(invoke("table", "validate", "a.json", "--json").stdout)["valid"] is True
    assert "sound, and of this environment" in invoke("table", "validate", "a.json").stdout
    table = records.load(tables / "a.json", LatencyTable)
    foreign = Environment(must_match=tuple((name, "another" if name == "cpu" else value) for name, value in table.environment.must_match))
    records.save(msgspec.structs.replace(table, environment=foreign), tables / "a.json")
    done = invoke("table", "validate", "a.json")
    assert (done.exit_code, done.stdout) == (1, "")
    assert "cpu: table has another, here it is fake" in done.stderr


def test_a_table_that_is_not_sound_is_not_valid(tables):
    table = records.load(tables / "a.json", LatencyTable)
    records.save(msgspec.structs.replace(table, rows=(*table.rows, table.rows[0]), relative_error=0.001), tables / "a.json")
    done = invoke("table", "validate", "a.json", "--json")
    assert (done.exit_code, done.stdout) == (1, "")
    assert "2 faults\n  2 rows of one operator: mlp batch=1 width=8 [int8]\n  its interval" in done.stderr


@pytest.mark.parametrize("flags", [("--canary",), ("--model", "toy"), ("--run", "x"), ("--canary", "--model", "toy", "--run", "x")])
def test_a_canary_needs_one_model(tables, flags):
    done = invoke("table", "validate", "a.json", *flags)
    assert (done.exit_code, done.stdout) == (1, "")
    assert "--canary takes one of --model and --run" in done.stderr
    assert "--canary --model ID|FOLDER" in done.stderr


def test_a_file_that_is_no_table_is_an_error(tables):
    (tables / "a.json").write_text("{")
    for command in ("show", "validate", "export"):
        done = invoke("table", command, "a.json")
        assert (done.exit_code, done.stdout) == (1, "")
        assert done.stderr.startswith("error: not a latency table of this version: a.json\n  damaged file: a.json")
        assert "remove" not in done.stderr  # it may be anything of theirs


# ---------------------------------------------------------------------------------------------- progress


def narrate(progress: Progress):
    progress.stage("search", 4, 8)
    for done in range(4):
        progress.step("candidates [1]", done, 3)
    progress.standing(Standing("3 of 9 scored, 2 on the front", ("ms", "f[1]"), (("1.5", "90.1"), ("2.5", "91.7"))))
    progress.step("candidates [1]", 3, 3)
    progress.note("a [note] kept")


def test_both_kinds_of_progress_say_the_same():
    lines, screen = io.StringIO(), io.StringIO()
    narrate(Lines(every=0.0, stream=lines))
    with Bars(Console(file=screen, width=100, force_terminal=True, no_color=True)) as bars:
        narrate(bars)
    for text in (lines.getvalue(), screen.getvalue()):
        assert "[4/8] search" in text
        assert "a [note] kept" in text
        assert "candidates [1]" in text
        assert "left" in text
        for part in ("3 of 9 scored, 2 on the front", "ms", "f[1]", "1.5", "90.1", "2.5", "91.7"):
            assert part in text
    assert screen.getvalue().rindex("\x1b[?25h") > screen.getvalue().rindex("\x1b[?25l")  # the cursor is shown again


def test_the_time_left_is_what_the_units_so_far_took():
    clock = iter([0.0, 10.0, 30.0, 31.0, 40.0, 50.0, 60.0, 70.0])
    pace = Pace(lambda: next(clock))
    assert pace.left("rows", 0, 10) is None
    assert pace.left("rows", 0, 10) is None, "nothing is finished"
    assert pace.left("rows", 3, 10) == pytest.approx(70.0), "three in 30 s"
    assert pace.left("networks", 2, 4) is None, "an earlier call did two"
    assert pace.left("rows", 4, 10) == pytest.approx(60.0), "another step in between changes nothing"
    assert pace.left("networks", 3, 4) == pytest.approx(19.0)
    assert pace.left("rows", 0, 10) is None, "the same step begins again"
    pace.restart()
    assert pace.left("networks", 4, 4) is None


def test_no_more_time_is_left_than_until_the_limit():
    clock = iter([0.0, 10.0, 20.0, 30.0])
    pace = Pace(lambda: next(clock))
    assert pace.left("rows", 0, 10, 5.0) is None
    assert pace.left("rows", 1, 10, 200.0) == pytest.approx(90.0)
    assert pace.left("rows", 2, 10, 7.0) == 7.0
    assert pace.left("rows", 3, 10, -2.0) == 0.0


def test_what_was_found_is_said_now_and_then_its_ends_only(monkeypatch):
    clock, stream = [100.0], io.StringIO()
    monkeypatch.setattr("nascompile.progress.time.monotonic", lambda: clock[0])
    lines = Lines(every=2.0, stream=stream)
    for n in range(4):
        lines.standing(Standing(f"{n} scored", ("ms", "accuracy"), tuple((str(i), str(90 + i)) for i in range(n))))
        clock[0] += 6
    assert stream.getvalue().splitlines() == ["      0 scored: ", "      2 scored: ms 0, accuracy 90; ms 1, accuracy 91"]


@pytest.mark.parametrize("count", [0, 1, 9, 10, 11, 57])
def test_a_long_front_is_shown_in_part_with_both_its_ends(count):
    rows = tuple((str(i),) for i in range(count))
    shown = spread(rows, 10)
    assert len(shown) == min(count, 10)
    assert sorted(set(shown), key=rows.index) == list(shown)
    assert shown[:1] + shown[-1:] == rows[:1] + rows[-1:]


def test_time_left_is_written_for_a_person():
    assert [time_left(seconds) for seconds in (None, 4.4, 185.0)] == ["", ", 4 s left", ", 3 min 05 s left"]


def test_both_kinds_of_progress_fit_the_contract():
    for kind in (Lines, Bars):
        for name in ("stage", "step", "note", "standing"):
            assert list(inspect.signature(getattr(kind, name)).parameters) == list(inspect.signature(getattr(Progress, name)).parameters)


@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
def test_a_terminal_gets_colour_unless_it_says_no(no_color, coloured):
    code = "from nascompile.terminal import Bars\nwith Bars() as bars: bars.step('candidates', 1, 3)"
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "NO_COLOR": no_color, "COLORTERM": "truecolor"}
    with subprocess.Popen([sys.executable, "-c", code], stderr=follower, env=environment) as process:
        process.wait(timeout=20)
    os.close(follower)
    text = os.read(leader, 100_000).decode()
    os.close(leader)
    assert "candidates" in text
    assert ("\x1b[3" in text) is coloured


# ---------------------------------------------------------------------------------------------- a real run of the toy

QUICK = """
model = "toy"
device = "fake"
profile_seconds = 0.1
[budgets]
max_drop = 50.0
[finetune]
teacher_epochs = 1
epochs = 1
batch_size = 128
[search]
evaluations = 6
population = 4
calibration_samples = 32
calibration_methods = ["minmax"]
[measure]
top_k = 1
seconds = 0.05
batches = [1]
agreement = 2
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, completed process) of a whole run printed as JSON."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "quick.toml").write_text(QUICK)
    return folder, subprocess.run(
        [*COMMAND, "run", "quick.toml", "--json"], cwd=folder, capture_output=True, text=True, check=False, timeout=300
    )


@pytest.fixture
def inside(finished, monkeypatch):
    """The folder of the finished run, as the working folder."""
    monkeypatch.chdir(finished[0])
    return finished[0]


def test_a_run_prints_one_json_document_and_its_progress_apart(finished):
    folder, done = finished
    assert done.returncode == 0, done.stderr
    body = json.loads(done.stdout)
    assert len(body["tasks"]) == 1
    assert (folder / body["run"]).is_dir()
    assert (folder / body["engine"] / "manifest.json").is_file()
    assert "[8/8] report" in done.stderr


def test_run_again_it_does_nothing_and_prints_the_same(finished, inside):
    began = time.time()
    assert invoke("run", "quick.toml", "--json").stdout == finished[1].stdout
    assert [path for path in (inside / "runs" / "toy" / "stages").iterdir() if path.stat().st_mtime > began] == []


def test_a_finished_run_is_closed_with_a_table(inside):
    done = invoke("run", "quick.toml", "--quiet")
    assert "baseline" in done.stdout
    assert done.stdout.splitlines()[-2].startswith("engine: runs/toy/engines/")
    assert done.stdout.splitlines()[-1] == "report: runs/toy/report.html"
    assert done.stderr == ""


def test_other_settings_in_the_same_folder_are_refused(inside):
    done = invoke("run", "--model", "demo", "--device", "fake", "--out", "runs/toy")
    assert (done.exit_code, done.stdout) == (1, "")
    assert "model: toy there, demo asked for" in done.stderr
    assert "--out" in done.stderr


def test_the_plan_of_a_finished_run_has_nothing_to_do(inside):
    body = json.loads(invoke("run", "quick.toml", "--dry-run", "--json").stdout)
    assert [row["stage"] for row in body["stages"]] == list(pipeline.STAGES)
    assert all(row["done"] for row in body["stages"])
    assert body["minutes"] == body["disk_mb"] == 0


def test_a_plan_gives_no_sum_of_what_it_cannot_tell(tmp_path):
    (tmp_path / "r.toml").write_text('model = "mcu_vit"\ndevice = "stm32f746"\n[finetune]\ncandidate_epochs = 3\n')
    body = json.loads(invoke("run", "r.toml", "--dry-run", "--json").stdout)
    assert {row["minutes"] for row in body["stages"]} == {None}
    assert body["minutes"] is body["disk_mb"] is None
    [build] = (row["what"] for row in body["stages"] if row["stage"] == "build")
    assert build.endswith("equal here and in QEMU; each candidate is trained on by itself for 3 epochs before")


def test_a_plan_creates_nothing(tmp_path):
    done = invoke("run", "--device", "fake", "--dry-run")
    assert done.exit_code == 0
    assert [line.split()[0] for line in done.stdout.splitlines()[1:9]] == list(pipeline.STAGES)
    assert list(tmp_path.iterdir()) == []


def test_an_engine_is_verified(finished, inside):
    engine = json.loads(finished[1].stdout)["engine"]
    assert json.loads(invoke("verify", engine, "--json").stdout)["checks"][-1]["name"] == "sample"
    assert "config.json" in invoke("verify", engine).stdout
    (inside / engine / "config.json").write_text((content := (inside / engine / "config.json").read_text()) + " ")
    done = invoke("verify", engine)
    (inside / engine / "config.json").write_text(content)
    assert (done.exit_code, done.stdout) == (1, "")
    assert "changed file: config.json" in done.stderr


def test_one_more_candidate_is_built(inside):
    done = invoke("build", "--out", "runs/toy", "--candidate", 1, "--quiet", "--json")
    assert done.exit_code == 0, done.stderr
    assert (inside / json.loads(done.stdout)["engine"] / "manifest.json").is_file()
    absent = invoke("build", "--out", "runs/toy", "--candidate", 999)
    assert (absent.exit_code, absent.stdout) == (1, "")
    assert "no such candidate: 999" in absent.stderr
    mixed = invoke("build", "--out", "runs/toy", "--candidate", 1, "--max-drop", 1)
    assert mixed.exit_code == 1
    assert "--candidate takes its settings from the run" in mixed.stderr


def test_a_stage_prints_its_files(inside):
    body = json.loads(invoke("search", "--out", "runs/toy", "--json").stdout)
    assert body["stage"] == "search"
    assert all((inside / name).is_file() for name in body["files"])


def test_predictions_are_labels_alone(monkeypatch, tmp_path):
    class Loaded:
        manifest = SimpleNamespace(foreign=())

        def predict(self, items):
            return [("", 0.25) if item == "number" else (item.upper(), 0.5) for item in items]

    monkeypatch.setattr(engine, "load", lambda folder: Loaded())
    (tmp_path / "texts").write_text("good\nbad\n")
    assert invoke("predict", "x", "fine", "@texts").stdout == "FINE\nGOOD\nBAD\n"
    assert invoke("predict", "x", "number").stdout == "0.25\n"
    rows = json.loads(invoke("predict", "x", "number", "fine", "--json").stdout)
    assert rows == [{"input": "number", "value": 0.25}, {"input": "fine", "label": "FINE", "probability": 0.5}]
    absent = invoke("predict", "x", "@nowhere")
    assert (absent.exit_code, absent.stdout) == (1, "")
    assert "cannot read the inputs: nowhere" in absent.stderr
