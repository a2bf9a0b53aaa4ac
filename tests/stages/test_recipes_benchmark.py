"""The benchmark of recipes on the toy network: a whole table in seconds, resumed without training, its numbers against a recount."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nascompile import space as spaces
from nascompile.records import SearchSpace, load
from nascompile.supernet import Supernet

torch.set_num_threads(1)

TOOL = Path(__file__).parents[2] / "tools" / "benchmarks" / "recipes.py"
CELLS = ("toy:instatune", "toy:bignas", "toy:spos", "toy:alone", "toy:none")


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("recipes_benchmark", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")  # which the tool sets, and nobody after it should see
        spec.loader.exec_module(module)
        yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    cache = tmp_path_factory.mktemp("recipes")
    return ["--json", "--device", "cpu", "--cache", str(cache), "--alone", "1", "--epochs", "2", "--cells", *CELLS]


@pytest.fixture(scope="module")
def printed(bench, arguments):
    """What the tool prints, parsed; the capture of a single test does not reach here."""
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as out:
        bench.main(arguments)
    return json.loads(out.getvalue())


def test_every_cell_has_its_rows(printed):
    found = {(row["task"], row["recipe"], row["quantization"]) for row in printed["rows"]}
    kinds = {("toy", recipe, kind) for recipe in ("instatune", "bignas", "spos", "alone") for kind in ("ptq", "qat")}
    assert found == kinds | {("toy", "none", "ptq")}
    steps = {row["recipe"]: row["steps"] for row in printed["rows"]}
    assert steps.pop("none") == 0
    assert len(set(steps.values())) == 1  # the same number for each, alone or not
    assert next(iter(steps.values())) > 10


def test_accuracies_are_those_of_the_kept_rows(bench, printed, arguments):
    cache = Path(arguments[arguments.index("--cache") + 1])
    kept = [json.loads(path.read_text()) for path in cache.glob("toy-*/seed-0/rows/*.json")]
    assert len(kept) == 3 * 2 + 3 * 2 + 1  # three recipes, three networks alone, twice each; and nothing trained
    (bignas,) = (row for row in kept if (row["recipe"], row["aware"]) == ("bignas", True))
    (shown,) = (row for row in printed["rows"] if (row["recipe"], row["quantization"]) == ("bignas", "qat"))
    for kind in ("fp32", "int8"):
        values = [entry[kind] for entry in bignas["networks"]]
        assert len(values) == 22
        assert all(0 < value <= 100 for value in values)
        assert shown[kind]["smallest"] == pytest.approx(values[0])
        assert shown[kind]["largest"] == pytest.approx(values[1])
        assert shown[kind]["random"] == pytest.approx(np.mean(values[2:]))
        assert shown[kind]["random_worst"] == pytest.approx(min(values[2:]))
        alone = {row["network"]: row["networks"][0][kind] for row in kept if row["recipe"] == "alone" and row["aware"]}
        assert sorted(alone) == [0, 1, 2]
        gap = shown[kind]["gap"]["alone"]
        assert gap["smallest"]["points"] == pytest.approx(values[0] - alone[0])
        assert gap["all"]["points"] == pytest.approx(np.mean(values[:3]) - np.mean(list(alone.values())))
        low, high = gap["all"]["interval"]
        assert low < gap["all"]["points"] < high
        other = next(row for row in kept if (row["recipe"], row["aware"]) == ("spos", True))["networks"]
        ahead = np.mean(values[2:]) - np.mean([e[kind] for e in other[2:]])
        assert shown[kind]["against"]["spos"]["random"]["points"] == pytest.approx(ahead)
        (before,) = (row for row in kept if (row["recipe"], row["aware"]) == ("bignas", False))
        over = np.mean(values) - np.mean([entry[kind] for entry in before["networks"]])
        assert shown[kind]["over_ptq"]["points"] == pytest.approx(over)
    assert "gap" not in next(row for row in printed["rows"] if row["recipe"] == "alone")["fp32"]


def test_what_is_kept_is_not_trained_again(bench, printed, arguments, monkeypatch, capsys):
    def train(*arguments):
        raise AssertionError("trained again")

    monkeypatch.setattr(bench.finetune, "train", train)
    bench.main([*arguments, "--resume"])
    assert json.loads(capsys.readouterr().out) == printed
    with pytest.raises(AssertionError, match="trained again"):
        bench.main([*arguments, "--seeds", "1"])
    bench.main([*arguments, "--seeds", "0", "1", "--only-kept"])
    assert json.loads(capsys.readouterr().out) == printed


def test_a_network_alone_leaves_the_others_weights_alone(bench, printed, arguments, monkeypatch):
    """Trained alone, the smallest network changes nothing that it does not have."""
    cache, seen = Path(arguments[arguments.index("--cache") + 1]), {}
    given = bench.Bench(cache, {name: bench.replace(task, epochs=2) for name, task in bench.TASKS.items()})
    real = bench.score

    def score(net, space, points, material):
        seen["net"], seen["space"], seen["point"] = net, space, points[0]
        return real(net, space, points, material)

    monkeypatch.setattr(bench, "score", score)
    cell = bench.Cell("toy", "alone", 0, False, 0)
    given.row(cell).unlink()
    bench.run(given, cell)
    folder = given.folder("toy", 0) / "start"
    before = Supernet(seen["net"].family, seen["net"].family.load(str(folder)))
    space, point = load(folder / "manifest.json", SearchSpace), seen["point"]
    assert point == spaces.smallest(space)
    kept = set(spaces.kept_layers(space, point))
    changed = {
        name for (name, value), (_, old) in zip(seen["net"].named_parameters(), before.named_parameters(), strict=True)
        if not torch.equal(value, old)
    }  # fmt: skip
    layers = {int(name.split(".")[2]) for name in changed if ".blocks." in name}
    assert layers == kept != set(range(4))
    width = dict(point.architecture)[f"layers.{min(kept)}.width"]
    weight = f"blocks.{min(kept)}.up.bias"
    now, then = (net.model.get_parameter(weight) for net in (seen["net"], before))
    assert torch.equal(now[width:], then[width:])
    assert not torch.equal(now[:width], then[:width])


@pytest.mark.parametrize(
    ("wrong", "says"), [(["--cells", "toy:instatuna"], "unknown cells: toy:instatuna"), (["--alone", "21"], "--alone 21: 0 to 20")]
)
def test_wrong_arguments_are_said(bench, wrong, says):
    with pytest.raises(SystemExit, match=says):
        bench.main(["--device", "cpu", *wrong])


@pytest.mark.slow
def test_two_processes_make_the_same_table(printed, tmp_path):
    options = ["--json", "--device", "cpu", "--cache", str(tmp_path), "--alone", "1", "--epochs", "2", "--jobs", "2", "--cells", *CELLS]
    done = subprocess.run([sys.executable, str(TOOL), *options], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == printed


def test_the_committed_rows_are_whole_and_print_the_table(bench, capsys):
    """Three seeds of both tasks: every recipe's 22 networks, and all 22 of them alone."""
    rows = bench.stored()
    assert bench.STORED.stat().st_size < 300_000
    cells = {(row["task"], row["seed"], row["recipe"], row["aware"], row["network"]) for row in rows}
    assert len(cells) == len(rows)
    for task in bench.DEFAULT:
        for seed in range(3):
            assert {(task, seed, "alone", aware, number) for aware in (False, True) for number in range(22)} <= cells
            assert {(task, seed, recipe, aware, -1) for recipe in bench.RECIPES for aware in (False, True)} <= cells
    bench.main(["--stored", "--json", "--device", "cpu"])
    shown = {(row["task"], row["recipe"], row["quantization"]): row for row in json.loads(capsys.readouterr().out)["rows"]}
    for (task, recipe, _), row in shown.items():
        assert row["versions"]["torch"]
        assert len({r["steps"] for (t, name, _), r in shown.items() if t == task and name != bench.NONE}) == 1
        if recipe in bench.RECIPES:
            assert row["fp32"]["gap"]["alone"]["random"]["networks"] == 60
    one = next(r for r in rows if (r["task"], r["recipe"], r["seed"], r["aware"]) == ("reviews", "spos", 1, True))
    assert 100 * bench.rights(one, 0, "int8").mean() == pytest.approx(one["networks"][0]["int8"])
