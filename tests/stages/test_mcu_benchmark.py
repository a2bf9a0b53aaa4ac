"""The benchmark of microcontrollers on networks that are tiny: its figures, what it compares, what it keeps, what it says is missing."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification

from nascompile import beside, pipeline
from nascompile.data import DataSettings
from nascompile.mcu import calibrated, convolutional, interpreter, transformer
from nascompile.mcu.transformer import Layer, Shape
from nascompile.settings import FinetuneSettings, MeasureSettings, Recipe, SearchSettings, check

torch.set_num_threads(1)

BENCHMARKS = Path(__file__).parents[2] / "tools" / "benchmarks"
SIDE, CLASSES, MEAN, DEVIATION = 16, 3, (0.5,), (0.5,)
RIVALLED = ("--batch", "32", "--rate", "3e-3")


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import mcu
        import mcu_rivals
        from microcontroller import kernels, networks, peer, plans, projects

        found = {
            "main": mcu,
            "rivals": mcu_rivals,
            "kernels": kernels,
            "networks": networks,
            "peer": peer,
            "plans": plans,
            "projects": projects,
        }
        yield SimpleNamespace(**found)


def test_kernels_are_counted_and_their_bars_are_said(bench, mcu_tools):
    wanted = [row for row in bench.kernels.rows() if row[0] in ("gelu_32x192", "mean_64x96")]
    gelu, mean = bench.kernels.measure("cortex-m7", wanted)
    assert gelu["instructions"] == round(gelu["instructions_per_element"] * 32 * 192) > 32 * 192 / 4
    assert (gelu["bar"], gelu["reached"], mean["reached"]) == (4, True, None)
    assert bench.kernels.figures([gelu, mean | {"core": "cortex-m4"}]) == {
        "gelu_32x192_insn_per_element": gelu["instructions_per_element"]
    }  # fmt: skip
    name, call, *rest = wanted[0]
    wrong = [(name, replace(call, expected=call.expected ^ np.int8(1)), *rest)]
    with pytest.raises(SystemExit, match="gelu_32x192 on cortex-m7 gives other bytes"):
        bench.kernels.measure("cortex-m7", wrong)


@pytest.fixture(scope="module")
def planned(bench, mcu_tools):
    shape = transformer.Shape.uniform((96, 96, 1), 8, 16, 2, 2, 24, 5)
    return bench.plans.measure(1, shape, "m7_64k", ("stm32f746",), bench.plans.PLANS[:3])


def test_plans_are_built_where_they_fit(planned):
    by_name = {row["plan"]: row for row in planned}
    naive, in_place, fused = (by_name[name] for name in ("naive", "in place", "fused"))
    assert naive["arena_bytes"] > in_place["arena_bytes"] > fused["arena_bytes"]
    assert (naive["fits"], naive["device"], fused["fits"], fused["device"]) == (False, "stm32f746", True, "m7_64k")
    assert "m7_64k: the arena does not fit" in naive["refused"]
    assert fused["ram_bytes"] < 65536 < naive["ram_bytes"]
    for row in planned:
        assert row["images_equal_in_qemu_host_interpreter"] == row["outputs_distinct"] == 2
        assert row["instructions_least"] <= row["instructions"] <= row["instructions_most"]
        assert row["modelled_ms"] == pytest.approx(row["instructions"] * 0.925 / 216e3, rel=1e-4)
        assert sum(op["macs"] for op in row["operators"]) == row["macs"]
    named = {op["operator"] for op in fused["operators"]}
    assert named >= {"embedding", "layers.attention", "layers.attention.keys", "layers.mlp.up", "head"}


def test_bytes_that_differ_are_seen(bench, mcu_tools, tmp_path, monkeypatch):
    net = convolutional.untrained(bench_shape(), 1)
    x = np.random.default_rng(0).normal(0, 1, (4, 1, 9, 9))
    program = convolutional.lower(net, convolutional.observe(net, [x]), x[0])
    made = bench.projects.build(program, bench.projects.board_of("m7_64k"), tmp_path)
    images = program.structure.pixels.quantize(x)
    outputs, facts = bench.projects.compared(made, images, 4, 1)
    want = np.stack([interpreter.run(program, image) for image in images])
    np.testing.assert_array_equal(bench.projects.scores(outputs), want)
    assert facts["ram_bytes"] < facts["ram_bytes_of_device"] == 65536
    right = interpreter.run
    monkeypatch.setattr(interpreter, "run", lambda program, image: right(program, image) + (image == images[2]).all())
    with pytest.raises(SystemExit, match="other bytes on this computer than in the NumPy interpreter: image 2"):
        bench.projects.compared(made, images, 4, 1)


def bench_shape() -> convolutional.Shape:
    stages = (convolutional.Stage(kind="conv", channels=5, pad=1, relu=True), convolutional.Stage(kind="depthwise", channels=5, stride=2))
    return convolutional.Shape(image=(9, 9, 1), stages=stages, classes=CLASSES)


# ---------------------------------------------------------------------------------------------- trained networks


def draw(folder: Path, n: int) -> None:
    """PNG files, by class: bars that lie, stand or cross, with noise."""
    rng = np.random.default_rng(3)
    labels, images = np.arange(n) % CLASSES, rng.integers(0, 90, (n, SIDE, SIDE)).astype(np.uint8)
    for number, (image, label, at) in enumerate(zip(images, labels, rng.integers(2, SIDE - 3, n), strict=True)):
        if label != 1:
            image[at : at + 2] += 120
        if label != 0:
            image[:, at : at + 2] += 120
        (folder / "abc"[label]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / "abc"[label] / f"{number}.png")


def searched() -> Recipe:
    """A search that is as short as one can be."""
    return check(Recipe(
        model="model", new_head=True, data=DataSettings(data="images", calibration_size=40), device="m7_64k",
        finetune=FinetuneSettings(teacher_epochs=6, epochs=1, candidate_epochs=2, batch_size=32, learning_rate=0.003),
        search=SearchSettings(searcher="nsga2", evaluations=4, population=4, calibration_samples=32, calibration_methods=("minmax",)),
        measure=MeasureSettings(top_k=1, seconds=0.1, batches=(1,), agreement=1),
    ))  # fmt: skip


@pytest.fixture(scope="module")
def runs(bench, into, tmp_path_factory, mcu_tools):
    """A folder as --runs has it: a finished run, and two trained rivals."""
    with pytest.MonkeyPatch.context() as patch:
        folder = into(tmp_path_factory.mktemp("work"), patch)
        torch.manual_seed(0)
        config = ViTConfig(
            hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=24, image_size=SIDE, patch_size=4, num_channels=1,
            initializer_range=0.2,
        )  # fmt: skip
        ViTForImageClassification(config).save_pretrained("model")
        draw(Path("images"), 750)
        shutil.copytree(BENCHMARKS / "profiles", "profiles")
        run = Path("runs/searched-64k")
        pipeline.run(searched(), run)
        beside.build_candidate(run, 1)
        (run / "engines" / "front-1-stm32f746").mkdir()  # as one for another device
        small = {
            "hand-64k": bench.rivals.Rival("vit", {"patch": 4, "width": 16, "depth": 2, "heads": 2, "hidden": 24}),
            "cnn-64k": bench.rivals.Rival("cnn", {"stem": 6, "blocks": [[10, 2], [12, 2]]}),
        }
        patch.setattr(bench.rivals, "RIVALS", small)
        patch.setattr(bench.networks, "SHARES", (0.999, 1.0))
        epochs = ["--epochs", "8", "--aware-epochs", "2"]
        bench.rivals.main(["--data", str(run / "data"), "--out", "runs", "--only", *small, *RIVALLED, *epochs])
        yield folder / "runs"


def test_a_rival_is_trained_once_and_is_what_it_was(bench, runs, capsys):
    own = ["--data", str(runs / "searched-64k" / "data"), "--out", str(runs), "--only", "cnn-64k", *RIVALLED]
    bench.rivals.main([*own, "--epochs", "8", "--aware-epochs", "2"])
    assert "cnn-64k: there already" in capsys.readouterr().out
    facts = bench.rivals.facts(runs / "cnn-64k.safetensors")
    assert facts["validation_accuracy"] > 80
    assert (facts["settings"]["epochs"], facts["settings"]["aware_epochs"]) == (8, 0)
    assert bench.rivals.facts(runs / "hand-64k.safetensors")["settings"]["aware_epochs"] == 2
    samples = bench.rivals.Samples.of_folder(runs / "searched-64k" / "data")
    for name in ("cnn-64k", "hand-64k"):
        rival = bench.rivals.RIVALS[name]
        path = runs / f"{name}.safetensors"
        own, module = bench.rivals.network(rival, path, samples, MEAN, DEVIATION)
        pixels = samples.validation[0][:20]
        x = (pixels / 255 - MEAN[0]) / DEVIATION[0]
        forward = convolutional.forward if name.startswith("cnn") else calibrated.forward
        with torch.no_grad():
            want = module(torch.from_numpy(x).float()).numpy()
        np.testing.assert_allclose(forward(own, x), want, atol=1e-3)


def test_maps_in_factors_are_trained_alone_too(bench):
    layers = (Layer(heads=2, head_width=4, hidden=16, rank=3), Layer(heads=1, head_width=4, hidden=8))
    module = bench.rivals.Vit(Shape(image=(8, 8, 1), patch=4, width=12, layers=layers, classes=3))
    sizes = {name: tuple(value.shape) for name, value in module.named().items()}
    assert sizes["layers.0.up.first"] == (3, 12)
    assert sizes["layers.0.up.second"] == (16, 3)
    assert sizes["layers.1.up.weight"] == (8, 12)
    assert module(torch.zeros(2, 1, 8, 8)).shape == (2, 3)
    assert bench.networks.sizes_of(module.shape) == "8 x 8, patch 4, width 12, 2 layers, heads 2 1, hidden 16 8, rank 3 0"


@pytest.fixture(scope="module")
def printed(bench, runs, mcu_tools, tmp_path_factory):
    """(arguments, what was printed): the small budget's cell on tiny networks."""

    cache = tmp_path_factory.mktemp("c")
    arguments = ["--cells", "fashion-64k", "--runs", str(runs), "--images", "30", "--jobs", "1", "--cache", str(cache)]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        bench.main.main([*arguments, "--json"])
    return arguments, json.loads(out.getvalue())


def test_rivals_are_built_compared_and_scored(printed):
    rows = {row["network"]: row for row in printed[1]["cells"]["fashion-64k"]["rows"]}
    assert set(rows) == {"searched", "front-1", "hand", "cnn"}
    for row in rows.values():
        assert row["images_equal_in_qemu_host_interpreter"] == 30
        assert row["test_images"] == 150, "a fifth of the images"
        assert row["accuracy_fp32"] > 60, "of three kinds"
        assert abs(row["accuracy_engine"] - row["accuracy_fp32"]) < 5
        assert row["device"] == "m7_64k"
        assert row["ram_bytes"] < 65536
        assert row["flash_bytes"] < 262144
        assert row["parameters"] > 500
    assert rows["cnn"]["sizes"] == "stem 6, blocks [[10, 2], [12, 2]]"
    assert rows["cnn"]["calibration"].endswith("% of values")
    assert rows["front-1"]["engine"] == "front-1"
    assert rows["front-1"]["files_equal_to_the_engine_of_the_run"]
    assert rows["front-1"]["sizes"] != rows["searched"]["sizes"]
    assert rows["front-1"]["instructions"] < rows["searched"]["instructions"]
    assert rows["searched"]["files_equal_to_the_engine_of_the_run"]
    assert rows["searched"]["epochs"] == 6 + 1 + 2, "teacher, super-network, by itself"


def test_every_figure_says_what_it_is(bench, printed):
    labels = printed[1]["labels"]
    assert labels["instructions"] == labels["figures"] == "exact instructions in QEMU"
    assert labels["modelled_cycles"].startswith("modelled cycles")
    for row in printed[1]["cells"]["fashion-64k"]["rows"]:
        measured = {name for name in row if name.startswith(("instructions", "modelled", "accuracy")) or name.endswith("bytes")}
        assert measured <= set(labels)


def test_what_is_kept_is_not_measured_again(bench, printed, monkeypatch, capsys):
    def again(*given, **named):
        raise AssertionError("measured again")

    monkeypatch.setattr(bench.networks, "measure", again)
    bench.main.main([*printed[0], "--json"])
    assert json.loads(capsys.readouterr().out) == printed[1]
    bench.main.main(printed[0])
    said = capsys.readouterr().out
    assert "bytes equal in QEMU, on this computer and in NumPy: 30 images" in said
    assert "modelled cycles: 0.925 cycles per instruction" in said
    with pytest.raises(AssertionError, match="measured again"):
        bench.main.main([*printed[0], "--images", "31"])


def test_what_is_missing_is_said(bench, mcu_tools, tmp_path, capsys, monkeypatch):
    cache = ["--cache", str(tmp_path / "c")]
    bench.main.main(["--cells", "fashion-320k", *cache])
    assert "not here: networks for 320k: --runs names the folder that has them" in capsys.readouterr().out
    bench.main.main(["--cells", "fashion-320k", "--runs", str(tmp_path), *cache])
    said = capsys.readouterr().out
    assert f"{tmp_path}/searched-320k: `nascompile run --model mcu_vit --device stm32f746" in said
    assert f"{tmp_path}/cnn-320k.safetensors: python tools/benchmarks/mcu_rivals.py" in said
    failed = subprocess.CompletedProcess([], 1, "", "no index can be reached")
    monkeypatch.setattr(bench.peer.subprocess, "run", lambda *given, **named: failed)
    monkeypatch.setattr(bench.main, "_code", lambda: "")
    monkeypatch.setattr(bench.main.toolchain, "version", lambda name: name)
    bench.main.main(["--cells", "tvm", "--json", *cache])
    [reason] = json.loads(capsys.readouterr().out)["cells"]["tvm"]["missing"]
    assert reason == "apache-tvm==0.27.0.post1 does not install: no index can be reached"
    with pytest.raises(SystemExit, match="no such program: /nowhere/python"):
        bench.main.main(["--cells", "tvm", "--tvm", "/nowhere/python", *cache])
