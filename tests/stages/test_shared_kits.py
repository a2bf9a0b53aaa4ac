"""A kit for a device that is searched together with others: it has the operators of the shared widths, and errors say how to make it."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import ViTConfig, ViTForImageClassification
from typer.testing import CliRunner

from nascompile import cli, network, plugins, profiler, settings, several, space as spaces, targets
from nascompile.devices import interleave
from nascompile.kit import KitManifest
from nascompile.models import read_config
from nascompile.records import FLOAT32, INT8, LatencyTable, Operator, Workload, load

SIZES = {"hidden_size": 32, "intermediate_size": 192, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments], prog_name="nascompile")


@pytest.fixture(autouse=True)
def board(elsewhere: Path) -> None:
    """A profile of something that nothing here can time, of two threads."""
    Path("profiles").mkdir()
    Path("profiles/board.toml").write_text('kind = "elsewhere"\nbackends = ["onnxruntime", "openvino"]\nthreads = 2\n')


@pytest.fixture
def vit() -> Path:
    """A vision transformer whose MLP has other widths in multiples of 64 than in multiples of 32."""
    ViTForImageClassification(ViTConfig(**SIZES, num_channels=1)).save_pretrained("vit")
    return Path("vit")


def export(*arguments: object, out: str = "kit") -> KitManifest:
    done = invoke("kit", "export", *arguments, "--out", out, "--seconds", "0.5", "--networks", "4", "-q")
    assert done.exit_code == 0, done.output
    return load(Path(out) / "manifest.json", KitManifest)


def shared(model: Path, *names: str) -> list[set[Any]]:
    """What a search for these devices needs a table of each for, by the search's own functions."""
    config, family = read_config(model), plugins.get("families", "vit")
    first = targets.make(*names[0].split(":")[:2], family.workload(config, 1, 0), 1)
    found = targets.several(first, names[1:])
    places = [(plugins.get("backends", target.backend), target) for target in found]
    space = network.shared_space(family, config, places, "")
    return [set(network.operators(family, config, spaces.of_targets(space, (n,)), target)) for n, target in enumerate(found)]


def test_a_kit_has_exactly_the_operators_of_the_shared_space(vit: Path) -> None:
    _, wanted = shared(vit, "cpu:openvino", "board:onnxruntime")
    manifest = export("--model", vit, "--device", "board:onnxruntime", "--device", "cpu:openvino", "--processor", "vnni")
    assert manifest.operators == wanted
    assert (manifest.target.device, manifest.target.threads) == ("board", 2)
    alone = export("--model", vit, "--device", "board:onnxruntime", "--processor", "vnni", out="alone")
    assert wanted != alone.operators, "the network has widths that are no multiples of 64"
    assert {o.dim("width") for o in wanted if o.kind == "mlp"} == {64, 128, 192}
    assert {o.dim("width") for o in alone.operators if o.kind == "mlp"} == {64, 96, 128, 192}


def test_a_kit_of_a_run_is_for_all_devices_of_the_run(vit: Path) -> None:
    recipe = settings.Recipe(model=str(vit), device="cpu", backend="openvino", also=("board",), budgets=settings.Budgets(max_drop=1.0))
    target, others = several.others(recipe, targets.Named.parse("board")) or (None, ())
    assert target == targets.make("board", "onnxruntime", Workload(), 2)
    assert others == ("cpu:openvino:1",)
    assert several.others(recipe, targets.Named.parse("board:openvino")) is None
    assert several.others(recipe, targets.Named.parse("cpu")) == (targets.make("cpu", "openvino", Workload(), 1), ("board:onnxruntime:2",))


SEARCH = ("--model", "toy", "--device", "cpu:onnxruntime", "--device", "board", "--max-drop", "20", "--tables", "mine", "--out", "run")


def suggested(stderr: str) -> list[str]:
    """The command that an error's hint tells to run, and its words after the program's name."""
    (command,) = re.findall(r"`nascompile (kit export .*?)`", stderr)
    return shlex.split(command)


def made(words: list[str]) -> LatencyTable:
    """What the hint goes on with: the kit run, in a hurry, and imported."""
    out = words[words.index("--out") + 1]
    assert out == "kit.zip"
    done = invoke(*words, "--seconds", "0.5", "--networks", "4", "-q")
    assert done.exit_code == 0, done.output
    shutil.rmtree("there", ignore_errors=True)
    subprocess.run([sys.executable, "-m", "zipfile", "-e", out, "there"], check=True)
    manifest = json.loads(Path("there/kit/manifest.json").read_text())
    manifest["data"]["method"].update(warm=1e-4, visit=1e-4, fewest_warm=1, most_warm=2, rounds=2)
    Path("there/kit/manifest.json").write_text(json.dumps(manifest))
    subprocess.run([sys.executable, "there/kit/run_kit.py"], check=True, capture_output=True)
    done = invoke("kit", "import", "there/kit", "--tables", "mine", "--json", "-q")
    assert done.exit_code == 0, done.output
    return load(Path(json.loads(done.stdout)["table"]), LatencyTable)


def test_the_errors_say_the_commands_that_make_the_table_they_want(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WARM", "VISIT"):
        monkeypatch.setattr(interleave, name, 1e-4)
    monkeypatch.setattr(profiler, "CANARY", 1e9)  # timed in such a hurry, speed is not what it is about
    Path("mine").mkdir()
    missing = invoke("profile", *SEARCH)
    assert missing.exit_code == 1
    assert "`board:onnxruntime:2` cannot run here and has no latency table" in missing.stderr
    words = suggested(missing.stderr)
    assert words[:4] == ["kit", "export", "--model", "toy"]
    table = made(words)
    assert (table.target.device, table.target.threads) == ("board", 2)
    found = invoke("profile", *SEARCH, "-q")
    assert found.exit_code == 0, found.output
    assert load(Path("run/tables/board-onnxruntime-t2.json"), LatencyTable) == table

    (path,) = Path("mine/board").glob("*.json")
    body = json.loads(path.read_text())
    body["data"]["rows"] = [row for row in body["data"]["rows"] if row["operator"]["kind"] != "head"]
    path.write_text(json.dumps(body))
    lacking = invoke("profile", *SEARCH)
    assert lacking.exit_code == 1
    assert "lacks 2 of the network's operators" in lacking.stderr
    words = suggested(lacking.stderr)
    assert words == ["kit", "export", "run", "--device", "board:onnxruntime:2", "--out", "kit.zip"]
    Path("kit.zip").unlink()
    assert made(words).rows
    assert invoke("profile", *SEARCH, "-q").exit_code == 0


def test_what_cannot_be_searched_together_is_refused() -> None:
    done = invoke("kit", "export", "--model", "toy", "--device", "board", "--device", "cpu", "--provider", "cuda", "--out", "kit")
    assert done.exit_code == 1
    assert "a search takes no table by cuda, so none with cpu" in done.stderr
    done = invoke("kit", "export", "--model", "toy", "--device", "board", "--device", "board:onnxruntime:2", "--out", "kit")
    assert "the same device twice: board:onnxruntime:2" in done.stderr
    done = invoke("kit", "export", "--model", "toy", "--device", "board:openvino", "--backend", "onnxruntime", "--out", "kit")
    assert (done.exit_code, "exclude" in done.stderr) == (2, True)
    assert not Path("kit").exists()


def test_a_kit_of_openvino_in_a_search_needs_a_processor_that_has_its_integers() -> None:
    """The default form for any processor has none, so that a search that has them is told so."""
    recipe = settings.Recipe(model="toy", device="cpu", also=("board:openvino",), budgets=settings.Budgets(max_drop=1.0))
    (f,) = several.further(recipe, targets.make("cpu", "onnxruntime", Workload(), 1), Path("runs/a b"))
    assert f.kit == "nascompile kit export 'runs/a b' --device board:openvino:2 --out kit.zip"
    said = [f._hint([Operator(kind="mlp", dims=(), precision=p)]) for p in (FLOAT32, INT8)]
    assert ["--processor vnni" in hint for hint in said] == [False, True]
