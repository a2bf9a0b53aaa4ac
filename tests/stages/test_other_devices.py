"""A searched candidate built for a GPU: one that is not here, and one that a stand-in pretends is."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from typer.testing import CliRunner

from nascompile import beside, cli, cuda_driver, engine, network, pipeline, plugins, records
from nascompile.errors import RecipeError, RecordError, UnsupportedError
from nascompile.records import EngineManifest, Front, load
from nascompile.settings import Recipe
from nascompile.supernet import emulate, load_batches

GPU = "rtx-4090"


@pytest.fixture(scope="module")
def finished(quick: Recipe, tmp_path_factory: Any, into: Any) -> Any:
    """A run folder with a front."""
    with pytest.MonkeyPatch.context() as patch:
        folder = into(tmp_path_factory.mktemp("searched"), patch)
        pipeline.run(quick, Path("run"), until="search")
    return folder / "run"


@pytest.fixture
def run(finished: Path, elsewhere: Path) -> Path:
    """A copy of it to build in."""
    shutil.copytree(finished, elsewhere / "run")
    return elsewhere / "run"


@pytest.fixture
def number(finished: Path) -> int:
    """A candidate with blocks of FP32 and of INT8."""
    for i, e in enumerate(load(finished / "front.json", Front).evaluations, 1):
        if len(found := {name for _, genes in e.candidate.precision for _, name in genes}) > 1:
            assert found == {"fp32", "int8"}
            return i
    raise AssertionError("no candidate of the front mixes precisions: choose another seed")


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


# ---------------------------------------------------------------------------------------------- the real TensorRT-RTX, no GPU


def test_the_command_builds_for_a_gpu_that_is_not_here_and_says_so(run: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := plugins.get("backends", "tensorrt_rtx")._missing():
        pytest.skip(reason)
    monkeypatch.setattr(cuda_driver, "library", lambda: None)  # where there is one, too
    done = invoke("build", run, "--candidate", number, "--device", GPU, "--json")
    assert done.exit_code == 0, done.stderr
    folder = run / "engines" / f"front-{number}-{GPU}"
    assert json.loads(done.stdout) == {"run": str(run), "candidate": number, "engine": str(folder), "executed": False}
    assert "built, not run: no CUDA device" in done.stderr
    manifest = engine.read_manifest(folder)
    assert manifest.graphs == ("model.engine",)
    assert {"model.engine", "network.json", "sample.npz"} <= {name for name, _ in manifest.files}
    assert "run.py" not in {name for name, _ in manifest.files}, "there is no runtime it could use without nascompile"
    assert dict(manifest.target.session)["compute_capability"] == "8.9"
    assert (manifest.predicted, manifest.table_digest) == (None, "")
    assert manifest.remarks[0].startswith("built, not run: no CUDA device")
    assert "network.json" in manifest.remarks[1]
    checked = invoke("verify", folder)
    assert checked.exit_code == 0
    assert "NOT RUN" in checked.stdout
    (folder / "model.engine").write_bytes(b"x")
    assert "changed file: model.engine" in invoke("verify", folder).stderr


# ---------------------------------------------------------------------------------------------- stand-ins


def test_architecture_stays_and_precisions_become_the_gpus(run: Path, number: int, gpu: Any) -> None:
    gpu(status=100)
    searched = load(run / "front.json", Front).evaluations[number - 1].candidate
    kinds = Counter(name for _, genes in searched.precision for _, name in genes)
    for precision, integer in (("as-searched", kinds["int8"]), ("fp16", 0), ("int8", sum(kinds.values()))):
        folder = beside.build_candidate(run, number, device=GPU, precision=precision)
        assert folder.name == f"front-{number}-{GPU}" + ("" if precision == "as-searched" else f"-{precision}")
        manifest = engine.read_manifest(folder)
        assert manifest.candidate
        assert manifest.graph
        assert manifest.candidate.architecture == searched.architecture
        counts = dict(manifest.precision_counts)
        assert counts.get("int8-symmetric", 0) == integer
        assert counts["fp16"] == len(manifest.graph.nodes) - integer
        assert not manifest.executed
    assert len(list((run / "engines").iterdir())) == 3


def test_an_engine_nobody_ran_is_checked_where_its_gpu_is(run: Path, number: int, gpu: Any) -> None:
    gpu(status=100)
    folder = beside.build_candidate(run, number, device=GPU)
    assert engine.verify(folder)[-1].detail.startswith("NOT RUN, neither here nor where it was built: no CUDA device")
    with pytest.raises(UnsupportedError, match="no CUDA-capable device"):
        engine.load(folder)
    gpu(capability=(9, 0))
    assert "Stub GPU has 9.0" in engine.verify(folder)[-1].detail
    gpu()
    assert engine.verify(folder)[-1].detail.startswith("largest difference")
    assert len(engine.load(folder).predict([np.ones(16, np.float32)])) == 1
    inputs, outputs = engine.read_sample(folder)
    (folder / "sample.npz").write_bytes(engine._npz(inputs, {"logits": -outputs["logits"]}))
    manifest = engine.read_manifest(folder)
    files = tuple((name, records.file_digest(folder / name)) for name, _ in manifest.files)
    records.save(msgspec.structs.replace(manifest, files=files), folder / "manifest.json")
    with pytest.raises(RecordError, match="differs by"):
        engine.verify(folder)


def test_its_sample_is_what_the_emulated_network_gives(run: Path, number: int, gpu: Any) -> None:
    gpu(status=100)
    folder = beside.build_candidate(run, number, device=GPU)
    manifest = engine.read_manifest(folder)
    assert manifest.candidate
    assert manifest.space
    context = pipeline.Context(load(run / "recipe.json", Recipe), run, pipeline.Silent(), pipeline.Given())
    context.space = manifest.space
    evaluator = context.evaluator(run / "supernet", context.method)
    batches = load_batches(context.split("calibration", "a test"), np.arange(4), 4)
    want, _ = emulate(evaluator.net, manifest.space, manifest.candidate, manifest.target.id, batches, evaluator.ranges(manifest.candidate))
    np.testing.assert_array_equal(engine.read_sample(folder)[1]["logits"], want)
    assert manifest.tolerance < np.abs(want).max(), "an engine that gives zeros would be noticed"


def test_where_the_gpu_is_the_engine_is_run_and_then_left_alone(run: Path, number: int, gpu: Any) -> None:
    gpu(status=100)
    folder = beside.build_candidate(run, number, device=GPU)
    inode = (folder / "manifest.json").stat().st_ino
    beside.build_candidate(run, number, device=GPU)
    assert (folder / "manifest.json").stat().st_ino == inode
    gpu()
    beside.build_candidate(run, number, device=GPU)
    manifest = engine.read_manifest(folder)
    assert manifest.executed, "an engine that was never run is built again where it can be"
    assert manifest.remarks == ()
    assert "inspector.json" in {name for name, _ in manifest.files}
    other = beside.build_candidate(run, number, device=GPU, backend="tensorrt")
    assert other.name == f"front-{number}-{GPU}-tensorrt"
    assert engine.verify(other)


def test_manifests_from_before_are_of_engines_that_were_run(run: Path, number: int, tmp_path: Path) -> None:
    folder = beside.build_candidate(run, number)
    body = json.loads((folder / "manifest.json").read_text())
    del body["data"]["executed"], body["data"]["remarks"]
    (folder / "manifest.json").write_text(json.dumps(body))
    assert load(folder / "manifest.json", EngineManifest).executed
    assert "largest difference" in engine.verify(folder)[-1].detail
    body["data"]["executed"] = False  # a claim that the backend could not have made does not spare the sample
    (folder / "manifest.json").write_text(json.dumps(body))
    assert "largest difference" in engine.verify(folder)[-1].detail


# ---------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("profile", "arguments", "says"),
    [
        ("9.0", {}, "TensorRT-RTX does not build for compute capability 9.0, only for 8.9, 12.0"),
        ("", {}, "the device's profile names no compute_capability; TensorRT-RTX builds for 8.9, 12.0"),
        ("8.9", {"backend": "tensorrt"}, "TensorRT builds on the GPU that it builds for"),
        ("8.9", {"backend": "onnxruntime"}, "`board` has no backend named onnxruntime"),
    ],
)
def test_what_cannot_be_built_is_refused_before_any_work(
    profile: str, arguments: dict[str, str], says: str, run: Path, number: int, gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(status=100)
    monkeypatch.setattr(pipeline.Context, "evaluator", _forbidden)
    (run.parent / "profiles").mkdir()
    text = f'kind = "cuda"\nbackends = ["tensorrt_rtx", "tensorrt"]\ncompute_capability = "{profile}"\n'
    (run.parent / "profiles" / "board.toml").write_text(text)
    with pytest.raises(UnsupportedError, match=says):
        beside.build_candidate(run, number, device="board", **arguments)
    assert not (run / "engines").exists()


def _forbidden(*_: object) -> None:
    raise AssertionError("work was begun")


def test_precisions_that_another_device_lacks_are_refused(run: Path, number: int, gpu: Any) -> None:
    gpu(status=100)
    with pytest.raises(RecipeError, match="unknown precision of a build: int4") as raised:
        beside.build_candidate(run, number, device=GPU, precision="int4")
    assert raised.value.hint.startswith("known: as-searched, fp16, int8, int8-dynamic, int8-symmetric, weight-int4-block128")
    with pytest.raises(UnsupportedError, match="`fake` cannot run embedding in fp16: the fake backend knows fp32, int8, int8-dynamic"):
        beside.build_candidate(run, number, precision=network.HALF)
    folder = beside.build_candidate(run, number, precision="int8")  # which it has
    assert folder.name == f"front-{number}-fake-int8"
    assert engine.read_manifest(folder).executed


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--candidate", 1, "--device", "h100"), "cannot build for `h100` with tensorrt: no CUDA device"),
        (("--candidate", 1, "--device", "h100", "--backend", "tensorrt_rtx"), "`h100` has no backend named tensorrt_rtx"),
        (("--candidate", 1, "--device", "nowhere"), "unknown device: nowhere"),
        (("--candidate", 999, "--device", GPU), "no such candidate: 999"),
        (("--candidate", 1, "--device", GPU, "--epochs", 3), "--candidate takes its settings from the run, all but --device and --backend"),
        (("--precision", "fp16"), "--precision fp16 is for one --candidate"),
    ],
)
def test_the_command_refuses(arguments: tuple[object, ...], says: str, run: Path, gpu: Any) -> None:
    gpu(status=100)
    done = invoke("build", run, *arguments)
    assert done.exit_code == 1
    assert says in done.stderr
    assert done.stderr.startswith("error: ")
    assert not (run / "engines").exists()


def test_a_search_for_a_gpu_is_refused_before_any_work(elsewhere: Path, gpu: Any) -> None:
    gpu()
    for arguments in (("run", "--device", GPU), ("profile", "--device", GPU, "--backend", "tensorrt")):
        done = invoke(*arguments, "--out", "new", "--quiet")
        assert done.exit_code == 1
        assert f"error: a search for `{GPU}` is not there yet" in done.stderr
        assert f"nascompile build RUN --candidate N --device {GPU}" in done.stderr
    assert not list(elsewhere.iterdir())


def test_devices_that_are_not_here_say_why(gpu: Any) -> None:
    gpu(status=100)
    rows = {row["name"]: row for row in json.loads(invoke("devices", "--json").stdout)}
    for name in ("rtx-4090", "rtx-5090", "h100"):
        assert not rows[name]["runs_here"]
        assert rows[name]["reason"].startswith("no CUDA device")
        assert rows[name]["reason"].endswith("tensorrt_rtx can build for it here") is (name != "h100")
    assert "tensorrt_rtx" not in rows["h100"]["backends"]
    assert rows["cpu"]["backends"].count("tensorrt") == 0
    gpu()
    rows = {row["name"]: row for row in json.loads(invoke("devices", "--json").stdout)}
    assert rows["rtx-4090"]["runs_here"]
