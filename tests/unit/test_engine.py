"""Engine folders: whole or absent, every change noticed, usable without torch and without nascompile."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from nascompile import engine, lowering, network, plugins, records, run_template, space as spaces
from nascompile.errors import DataError, RecordError
from nascompile.families.toy import ToyConfig
from nascompile.preprocess import Preprocessing, Preprocessor
from nascompile.records import Target

SETTINGS = {"record": "Preprocessing", "version": 1, "data": {"modality": "vector", "inputs": ["features"], "features": 16}}
LABELS = ("red", "green", "blue")


def make_parts(backend_name, folder):
    family, config = plugins.get("families", "toy"), ToyConfig(layers=2, num_labels=3)
    backend = plugins.get("backends", backend_name)
    torch.manual_seed(0)
    model = family.create(config)
    target = Target(device="cpu", backend=backend.name, workload=family.workload(config, 1, 0), session=backend.session())
    space = network.search_space(family, config, backend, target, "model")
    point = spaces.largest(space)
    blueprint = lowering.blueprint(family, config, lowering.export(family, config, folder), backend)
    weights = {name: p.detach().numpy() for name, p in model.named_parameters()}
    features = np.random.default_rng(0).standard_normal((4, 16)).astype(np.float32)
    with torch.no_grad():
        logits = model(torch.from_numpy(features)).logits.numpy()
    return engine.Parts(
        name="candidate-1", role="candidate", target=target, task="classification", labels=LABELS, config=config.to_dict(),
        form=lowering.lower(blueprint, family, config, space, point, target, weights, None, backend),
        inputs=family.inputs(config), sample={"features": features}, expected={"logits": logits}, tolerance=1e-4,
        preprocessing={"preprocessing.json": json.dumps(SETTINGS).encode()}, candidate=point, space=space,
        graph=network.graph(family, config, space, point, target), versions=backend.versions(),
    )  # fmt: skip


@pytest.fixture(scope="module", params=["fake", "onnxruntime", "openvino"])
def parts(request, tmp_path_factory):
    if reason := plugins.get("backends", request.param).unavailable():
        pytest.skip(reason)
    return make_parts(request.param, tmp_path_factory.mktemp("blueprints"))


@pytest.fixture
def backend(parts):
    return plugins.get("backends", parts.target.backend)


@pytest.fixture
def folder(parts, backend, tmp_path):
    engine.write(tmp_path / "engines" / "candidate-1", parts, backend)
    return tmp_path / "engines" / "candidate-1"


def test_a_written_engine_verifies_and_its_manifest_says_what_it_is(folder, parts):
    checks = engine.verify(folder)
    manifest = engine.read_manifest(folder)
    assert {p.name for p in folder.iterdir()} == {name for name, _ in manifest.files} | {"manifest.json"}
    assert {c.name for c in checks} == {name for name, _ in manifest.files} | {"sample"}
    assert manifest.parameters == sum(
        p.numel() for p in plugins.get("families", "toy").create(ToyConfig(layers=2, num_labels=3)).parameters()
    )
    assert manifest.size_bytes == sum((folder / name).stat().st_size for name in manifest.graphs)
    assert dict(manifest.precision_counts) == {"fp32": 4}
    assert manifest.candidate == parts.candidate == records.load(folder / "candidate.json", records.Candidate)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "nascompile-toy"
    assert [p.name for p in folder.parent.iterdir()] == ["candidate-1"]


def test_a_flipped_byte_in_any_file_is_found(folder):
    for name, _ in engine.read_manifest(folder).files:
        path = folder / name
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(RecordError, match=f"changed file: {name}"):
            engine.verify(folder)
        path.write_bytes(content)
    engine.verify(folder)


def test_every_fault_is_named_at_once(folder):
    (folder / "run.py").unlink()
    (folder / "extra.bin").write_bytes(b"x")
    (folder / "deep").mkdir()
    (folder / "deep" / "file").write_bytes(b"x")
    (folder / "config.json").write_text("{}")
    with pytest.raises(RecordError) as raised:
        engine.verify(folder)
    for fault in ("missing file: run.py", "unknown file: extra.bin", "unknown file: deep/file", "changed file: config.json"):
        assert fault in str(raised.value)


def test_a_manifest_that_points_outside_is_refused(folder):
    (folder.parent / "secret").write_bytes(b"x")
    manifest = engine.read_manifest(folder)
    outside = (("../secret", records.file_digest(folder.parent / "secret")),)
    records.save(records.msgspec.structs.replace(manifest, files=manifest.files + outside), folder / "manifest.json")
    with pytest.raises(RecordError, match="outside the folder"):
        engine.verify(folder)


def test_wrong_outputs_are_found_even_if_every_hash_fits(folder, parts, backend):
    other = replace(parts, expected={"logits": parts.expected["logits"] + 2e-4})
    with pytest.raises(RecordError, match="differs by"):
        engine.write(folder, other, backend)
    engine.write(folder, replace(other, tolerance=1e-3), backend)
    manifest = engine.read_manifest(folder)
    records.save(records.msgspec.structs.replace(manifest, tolerance=1e-4), folder / "manifest.json")
    with pytest.raises(RecordError, match=r"differs by 0\.0002"):
        engine.verify(folder)


def test_a_damaged_manifest_is_not_written_again_by_a_stage(folder):
    (folder / "manifest.json").write_text("{")
    with pytest.raises(RecordError, match="damaged file") as raised:
        engine.verify(folder)
    assert raised.value.hint == "build the engine again"
    (folder / "manifest.json").write_text('{"record": "EngineManifest", "version": 0, "data": {}}')
    with pytest.raises(RecordError, match="is not a EngineManifest of version") as raised:
        engine.verify(folder)
    assert "another version of nascompile" in raised.value.hint


def test_no_manifest_is_no_engine(tmp_path):
    with pytest.raises(RecordError, match=r"manifest\.json"):
        engine.load(tmp_path)


def test_a_failed_build_leaves_the_old_engine_or_nothing(folder, parts, backend, monkeypatch):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(form, target, work):
        (work / "model.onnx").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(backend), "build", staticmethod(full))
    with pytest.raises(RecordError, match="no space left"):
        engine.write(folder, parts, backend)
    with pytest.raises(RecordError, match="no space left"):
        engine.write(folder.parent / "other", parts, backend)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in folder.parent.iterdir()] == ["candidate-1"]


def test_a_new_engine_replaces_the_old_one_whole(folder, parts, backend):
    (folder / "left-over").write_bytes(b"x")
    engine.write(folder, replace(parts, labels=("a", "b", "c")), backend)
    engine.verify(folder)
    assert engine.read_manifest(folder).labels == ("a", "b", "c")


def test_predictions_are_the_torch_models(folder, parts):
    loaded = engine.load(folder)
    rows = list(parts.sample["features"])
    shares = torch.softmax(torch.from_numpy(parts.expected["logits"]), dim=1).numpy()
    for batch in (1, 3, 32):
        found = loaded.predict(rows, batch=batch)
        assert [label for label, _ in found] == [LABELS[i] for i in shares.argmax(axis=1)]
        np.testing.assert_allclose([p for _, p in found], shares.max(axis=1), atol=1e-5)  # float32 softmax
    assert loaded.predict([]) == []
    with pytest.raises(DataError, match="list of samples"):
        loaded.predict("one text")


def test_regression_engines_give_values(tmp_path, parts, backend):
    engine.write(tmp_path / "e", replace(parts, labels=(), task="regression"), backend)
    found = engine.load(tmp_path / "e").predict(list(parts.sample["features"]))
    np.testing.assert_allclose([value for _, value in found], parts.expected["logits"][:, 0], atol=1e-5)  # float32 sums


def test_loading_imports_neither_torch_nor_transformers(folder):
    if engine.read_manifest(folder).target.backend == "fake":
        pytest.skip("the fake backend is for tests")
    code = f"""
import sys
sys.modules["torch"] = sys.modules["transformers"] = sys.modules["onnx"] = None
from nascompile import engine
print(engine.load({str(folder)!r}).predict([[0.5] * 16])[0][0])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() in LABELS, done.stderr


def test_run_py_runs_alone(folder, parts, tmp_path):
    """`run.py` needs the runtime that the engine was built for and NumPy only; that of an ONNX graph is onnxruntime."""
    item = ",".join(map(str, parts.sample["features"][0]))
    command = [
        sys.executable,
        "-S",
        "-c",
        _ALONE.format(folder=str(folder), packages=_packages(), other=OTHER_RUNTIME.get(parts.target.backend, "openvino")),
        "--json",
        "--seconds",
        "0.1",
        "--",
        item,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["sample"]["ok"]
    assert result["latency_ms"]["n"] >= 10
    assert result["latency_ms"]["p50"] <= result["latency_ms"]["p99"]
    assert result["predictions"][0]["label"] == LABELS[int(parts.expected["logits"][0].argmax())]
    engine.verify(folder)

    inputs, expected = engine.read_sample(folder)
    (folder / "sample.npz").write_bytes(engine._npz(inputs, {"logits": expected["logits"] + 1}))
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 1
    assert not json.loads(done.stdout)["sample"]["ok"]


OTHER_RUNTIME = {"openvino": "onnxruntime"}
_ALONE = """
import sys, runpy
sys.path[:0] = {packages!r}
sys.modules["torch"] = sys.modules["transformers"] = sys.modules["nascompile"] = sys.modules["onnx"] = None
sys.modules[{other!r}] = None
sys.argv[0] = "run.py"
runpy.run_path({folder!r} + "/run.py", run_name="__main__")
"""


def _packages():
    return [path for path in sys.path if "site-packages" in path]


# ---------------------------------------------------------------------------------------------- run.py prepares as the package does


@pytest.mark.parametrize(
    "settings",
    [
        {"channels": 1, "resize": (28, 28)},
        {"channels": 3, "resize": (20, 0), "crop": (16, 16), "resample": 3, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)},
    ],
    ids=["grey", "cropped"],
)
def test_run_py_prepares_images_as_the_package_does(tmp_path, monkeypatch, settings):
    prepared = Preprocessor(Preprocessing(modality="image", inputs=("pixel_values",), **settings), {})
    pixels = np.random.default_rng(0).integers(0, 256, (30, 47, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    found = run_py_inputs(prepared, tmp_path, monkeypatch, run_template.images, str(tmp_path / "image.png"))
    np.testing.assert_array_equal(found["pixel_values"], prepared([str(tmp_path / "image.png")])["pixel_values"])


def test_run_py_prepares_texts_as_the_package_does(tmp_path, monkeypatch):
    words = {"[PAD]": 0, "[UNK]": 1, "a": 2, "good": 3, "film": 4}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    settings = Preprocessing(modality="text", inputs=("input_ids", "attention_mask", "token_type_ids"), max_length=4)
    prepared = Preprocessor(settings, {"tokenizer.json": tokenizer.to_str().encode()})
    for text in ("a good film", " a bad film that is cut "):
        found = run_py_inputs(prepared, tmp_path, monkeypatch, run_template.texts, text)
        for name, value in prepared([text], pad="longest").items():
            np.testing.assert_array_equal(found[name], value)
            assert found[name].dtype == value.dtype


def run_py_inputs(prepared, folder, monkeypatch, prepare, item):
    for name, content in prepared.files().items():
        (folder / name).write_bytes(content)
    monkeypatch.setattr(run_template, "HERE", folder)
    return prepare(run_template.data("preprocessing.json"), item)
