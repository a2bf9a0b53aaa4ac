"""The script that times on a device elsewhere does what the profiler's own device does here."""

from __future__ import annotations

import ast
import importlib
import json
import sys
import types
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from nascompile import kit, kit_template, records
from nascompile.devices import cpu, interleave

METHOD = json.loads(records.encode(kit.KitMethod()))


class Clock:
    """Advances by what the calls take."""

    def __init__(self):
        self.now, self.log = 0.0, []

    def __call__(self):
        return self.now

    def call(self, name, seconds):
        def run():
            self.log.append(name)
            self.now += seconds * (1 + 0.01 * (len(self.log) % 7))

        return run


@pytest.mark.parametrize("lengths", [(3e-3, 2e-5, 4e-2), (1e-6,), (0.3, 0.2)])
@pytest.mark.parametrize(("seconds", "seed", "least"), [(0.5, 0, 30), (0.01, 7, 5)])
def test_calls_are_visited_as_by_the_profiler(lengths, seconds, seed, least):
    ours, theirs = Clock(), Clock()
    found = kit_template.interleave([ours.call(i, s) for i, s in enumerate(lengths)], seconds, seed, least, METHOD, ours)
    calls = [theirs.call(i, s) for i, s in enumerate(lengths)]
    assert found == interleave.interleave(calls, seconds=seconds, seed=seed, min_samples=least, clock=theirs)
    assert ours.log == theirs.log


X86 = {"model name": "Some CPU @ 2 GHz", "cpu family": "6", "model": "85", "stepping": "7", "flags": "fpu avx2 avx512_vnni fma other"}
ARM = {"cpu implementer": "0x41", "cpu part": "0xd0c", "cpu variant": "0x3", "features": "fp asimd asimddp i8mm"}


@pytest.mark.parametrize("info", [X86, ARM, {}, {"flags": "none"}], ids=["x86", "arm", "nothing", "virtual"])
def test_a_processor_has_one_name_wherever_it_is_asked(info, monkeypatch):
    monkeypatch.setattr(cpu, "_cpuinfo", lambda: info)
    assert kit_template.cpu_model(info) == cpu._model()
    assert tuple(kit_template.isa(info, cpu.ISA)) == cpu._isa()
    assert bool(cpu._isa()) == ("avx2" in info.get("flags", "") or "features" in info)


def test_this_processor_is_read_alike():
    assert kit_template.cpuinfo() == cpu._cpuinfo()


def test_the_script_is_python_3_9_and_imports_what_a_device_has():
    tree = ast.parse(Path(kit_template.__file__).read_text("utf-8"), feature_version=(3, 9))
    modules = {alias.name.partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert modules - set(sys.stdlib_module_names) == {"numpy"}
    zips = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "zip"]
    assert zips
    assert not any(call.keywords for call in zips), "zip has no `strict` before 3.10"


def model():
    rng = np.random.default_rng(0)
    arrays = {
        "small": rng.standard_normal(8, dtype=np.float32),
        "floats": rng.normal(0.5, 0.05, (64, 64)).astype(np.float32),
        "same": np.full((64, 64), 0.25, np.float32),
        "halves": rng.standard_normal((64, 64)).astype(np.float16),
        "signed": rng.integers(-127, 128, (64, 128)).astype(np.int8),
        "unsigned": rng.integers(3, 250, (64, 128)).astype(np.uint8),
        "mask": np.where(np.arange(4096) % 2, 0, -1e9).astype(np.float32),
        "indices": np.arange(4096, dtype=np.int64),
    }
    arrays["equal"] = arrays["floats"]
    outputs = [helper.make_tensor_value_info(f"{n}.out", TensorProto.FLOAT, None) for n in arrays]
    nodes = [helper.make_node("Cast", [n], [f"{n}.out"], to=TensorProto.FLOAT) for n in arrays]
    weights = [numpy_helper.from_array(array, n) for n, array in arrays.items()]
    return arrays, helper.make_model(helper.make_graph(nodes, "g", [], outputs, weights))


def test_a_graph_comes_back_whole_with_weights_like_those_it_had(tmp_path, monkeypatch):
    arrays, made = model()
    (tmp_path / "there").mkdir()
    (tmp_path / "model.onnx").write_bytes(made.SerializeToString())
    cuts = kit._cuts(tmp_path, "model.onnx", made)
    part = kit._store_cut(tmp_path, "model.onnx", tmp_path / "there", cuts)
    assert len(cuts) == 6, "masks, indices and small ones are kept"
    assert (tmp_path / "there" / "model.onnx.cut").stat().st_size < 60_000

    stored = {"path": "there/model.onnx.cut", "name": "back.onnx", "size_bytes": part.size_bytes, "cuts": part.cuts}
    monkeypatch.setattr(kit_template, "HERE", tmp_path)
    kit_template.restore(stored, tmp_path, 1)
    back = {t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / "back.onnx").graph.initializer}
    assert {n: (a.dtype, a.shape) for n, a in back.items()} == {n: (a.dtype, a.shape) for n, a in arrays.items()}
    for name in ("small", "mask", "indices", "same"):
        np.testing.assert_array_equal(back[name], arrays[name])
    for name in ("floats", "halves", "signed", "unsigned"):
        want, got = arrays[name].astype(float), back[name].astype(float)
        assert not np.array_equal(want, got)
        assert got.mean() == pytest.approx(want.mean(), abs=0.1 * want.std())  # of 4,096 draws: six standard errors
        assert got.std() == pytest.approx(want.std(), rel=0.1)
    assert back["unsigned"].min() >= 3
    with pytest.raises(kit_template.KitError, match="does not restore"):
        kit_template.restore({**stored, "size_bytes": part.size_bytes + 1}, tmp_path, 1)


@pytest.mark.parametrize(("text", "want"), [("1.31.1", (1, 31)), ("2026.0.0-20965-c6d6a13a886-releases", (2026, 0)), ("2.1rc1", (2,))])
def test_versions_are_compared_by_their_leading_numbers(text, want):
    assert kit_template.numbers(text) == want


def test_the_version_is_that_of_the_package_that_is_imported(tmp_path, monkeypatch):
    """onnxruntime and onnxruntime-gpu are one module; installed in two folders, the first one's is what runs."""
    for place, package, number in (("first", "onnxruntime-gpu", "9.1"), ("second", "onnxruntime", "9.0")):
        (tmp_path / place / "onnxruntime").mkdir(parents=True)
        (tmp_path / place / "onnxruntime" / "__init__.py").write_text("")
        info = tmp_path / place / f"{package.replace('-', '_')}-{number}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {number}\n")
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    for order, number in ((("first", "second"), "9.1"), (("second", "first"), "9.0")):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "path", [str(tmp_path / place) for place in order])
            importlib.invalidate_caches()
            assert kit_template.package_version("onnxruntime") == number
    with monkeypatch.context() as patch:
        patch.setattr(sys, "path", [])
        assert kit_template.package_version("onnxruntime") == ""


class Options:
    """Session options that note what is set, as a provider would get them."""

    def __init__(self):
        self.entries = {}

    def add_session_config_entry(self, name, value):
        self.entries[name] = value


def gpu_kit(takes):
    """A kit by a stand-in of onnxruntime with CUDA, which has kernels for the files that `takes` names."""

    class Session:
        def __init__(self, path, options, providers, disabled_optimizers):
            self.providers = [providers[0][0], "CPUExecutionProvider"]
            if options.entries.get("session.disable_cpu_ep_fallback") == "1" and Path(path).parent.name not in takes:
                raise RuntimeError("This session contains graph nodes that are assigned to the default CPU EP")

        def get_providers(self):
            return self.providers

        def get_outputs(self):
            return []

        def run(self, names, inputs):
            return [np.ones(1, np.float32)]

    runtime = types.SimpleNamespace(
        SessionOptions=Options, GraphOptimizationLevel=types.SimpleNamespace(ORT_ENABLE_ALL=1), InferenceSession=Session, __version__="1",
    )  # fmt: skip
    graphs = {name: {"id": name, "parts": [{"name": "model.onnx"}], "inputs": []} for name in ("a", "b")}
    fields = {"graphs": graphs, "runtime": runtime, "session": {}, "provider": "cuda"}
    return types.SimpleNamespace(**fields, target={"backend": "onnxruntime", "threads": 1}, data={"seed": 0})


def test_what_a_gpu_leaves_to_the_processor_is_said(monkeypatch, capsys):
    monkeypatch.setattr(kit_template, "restore", lambda part, folder, seed: (folder / part["name"]).write_bytes(b""))
    assert kit_template.check(gpu_kit({"a"})) == 0
    assert capsys.readouterr().out.splitlines() == ["[1/2] the reference: runs", "[2/2] the reference: runs, in part on the processor"]
