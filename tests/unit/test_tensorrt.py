"""TensorRT: what is handed to it, what it builds for a GPU that is not here, and, on a stand-in for it, what it does where one is."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from transformers import BertConfig, ViTConfig

from nascompile import cuda_driver, lowering, network, plugins, space as spaces, supernet, targets
from nascompile.backends import CrossCompiler
from nascompile.devices import Job
from nascompile.errors import DataError, UnsupportedError
from nascompile.records import FLOAT16, INT8, INT8_SYMMETRIC, WEIGHT_INT8, Target

SIZES = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
CASES = {
    "vit": ("vit", ViTConfig, {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 5}),
    "bert": ("bert", BertConfig, {"vocab_size": 50, "num_labels": 3, "max_position_embeddings": 24}),
}
SEQUENCE = 16
RTX, TRT = plugins.get("backends", "tensorrt_rtx"), plugins.get("backends", "tensorrt")


@dataclass
class Case:
    """A random network, and one sub-network of it for a GPU."""

    net: supernet.Supernet
    space: object
    point: object
    target: Target
    blueprint: object
    batches: list

    @property
    def feed(self):
        return {name: tensor.numpy() for name, tensor in self.batches[0][0].items()}

    def ranges(self):
        return supernet.calibrate(self.net, self.space, self.point, self.target.id, self.batches, "minmax")

    def form(self):
        weights = {name: p.detach().numpy() for name, p in self.net.model.named_parameters()}
        family, config = self.net.family, self.net.config
        return lowering.lower(self.blueprint, family, config, self.space, self.point, self.target, weights, self.ranges(), RTX)

    def emulated(self):
        return supernet.emulate(self.net, self.space, self.point, self.target.id, self.batches, self.ranges())[0]


def make(name, precision, folder, device="rtx-4090", **changes):
    family_name, config, sizes = CASES[name]
    family, config = plugins.get("families", family_name), config(**SIZES | sizes | changes)
    torch.manual_seed(0)
    net = supernet.Supernet(family, family.create(config))
    with torch.no_grad():
        for parameter in net.model.parameters():
            parameter.mul_(3)  # logits of a useful size
    cpu = plugins.get("backends", "onnxruntime")
    own = Target(device="cpu", backend="onnxruntime", workload=family.workload(config, 1, SEQUENCE))
    space = network.search_space(family, config, cpu, own, "model", (2, 0, 1))
    width = next(gene.choices[1] for gene in space.genes if gene.name == "layers.0.width")
    genome = dict(spaces.genome(space, spaces.uniform(space))) | {"depth": 2, "layers.2.heads": 2, "layers.0.width": width}
    point = spaces.candidate(space, genome)
    target = targets.make(device, "tensorrt_rtx", own.workload)
    space, point = network.retarget(family, config, space, point, RTX, target, precision)
    blueprint = lowering.blueprint(family, config, lowering.export(family, config, folder), RTX)
    generator, inputs = torch.Generator().manual_seed(1), {}
    for spec in family.inputs(config):
        shape = [{"batch": 4, "sequence": SEQUENCE}.get(d, d) for d in spec.shape]
        random = torch.randint(spec.high, shape, generator=generator) if spec.high else torch.randn(shape, generator=generator)
        inputs[spec.name] = random
    if "attention_mask" in inputs:
        inputs["attention_mask"][:] = 1
        inputs["attention_mask"][1, 5:] = 0
    return Case(net, space, point, target, blueprint, [(inputs, torch.zeros(4, dtype=torch.long))])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("blueprints")


@pytest.fixture
def rtx(monkeypatch):
    """The installed TensorRT-RTX, without a GPU even where there is one."""
    if reason := RTX._missing():
        pytest.skip(reason)
    monkeypatch.setattr(cuda_driver, "library", lambda: None)
    return RTX


# ---------------------------------------------------------------------------------------------- what it is handed


@pytest.mark.parametrize("precision", ["fp16", "int8"])
@pytest.mark.parametrize("name", list(CASES))
def test_the_graph_computes_what_the_emulated_network_does(name, precision, folder):
    """ONNX Runtime runs what TensorRT is given; TensorRT's own arithmetic needs a GPU."""
    case = make(name, precision, folder)
    form = case.form()
    assert {node.domain for node in form.graph.node} == {""}
    session = ort.InferenceSession(form.SerializeToString(), providers=["CPUExecutionProvider"])
    got, want = session.run(["logits"], case.feed)[0], case.emulated()
    assert got.dtype == np.float32
    spread = np.ptp(want)
    # float16 rounds each of some 20 steps by 2⁻¹¹; integers besides fall on the other side of an edge now and then
    np.testing.assert_allclose(got, want, atol={"fp16": 20 * 2**-11, "int8": 0.05}[precision] * spread)
    assert spread > 0.5
    single = session.run(["logits"], {k: v[:1] for k, v in case.feed.items()})[0]
    np.testing.assert_allclose(single, got[:1], atol=0.01 * spread)


@pytest.mark.parametrize("name", list(CASES))
def test_integers_are_symmetric_and_floats_are_half(name, folder):
    form = make(name, "int8", folder).form()
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in form.graph.initializer}
    grids = [n for n in form.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert len([n for n in grids if n.input[0].endswith(".int8")]) == 2 * 6  # linears of two layers
    for node in grids:
        scale, zero = stored[node.input[1]], stored[node.input[2]]
        assert (scale.dtype, zero.dtype) == (np.float16, np.int8)
        assert (scale > 0).all()
        assert not zero.any()
    assert {value.dtype.kind + str(value.dtype.itemsize) for value in stored.values()} <= {"f2", "i1", "i8", "b1"}
    assert not [t for t in stored if t.endswith(".bias") and stored[t].dtype.kind == "i"]


# ---------------------------------------------------------------------------------------------- what it builds, with no GPU


@pytest.mark.parametrize("device", ["rtx-4090", "rtx-5090"])
@pytest.mark.parametrize("precision", ["fp16", "int8"])
@pytest.mark.parametrize("name", list(CASES))
def test_an_engine_is_really_built_for_a_gpu_that_is_not_here(rtx, name, precision, device, folder, tmp_path):
    case = make(name, precision, folder, device)
    assert rtx.unbuildable(case.target) == ""
    assert rtx.build(case.form(), case.target, tmp_path) == ("model.engine",)
    assert (tmp_path / "model.engine").stat().st_size > 1_000_000
    described = json.loads((tmp_path / "network.json").read_text())
    assert described["source"] == "the network given to the builder"
    types = {t["name"]: t["type"] for layer in described["layers"] for t in layer["inputs"] + layer["outputs"]}
    assert types["logits"] == "FLOAT"
    assert {types[name] for name in case.feed} <= {"FLOAT", "INT64"}
    products = [layer for layer in described["layers"] if layer["kind"] == "MATRIX_MULTIPLY"]
    assert len(products) >= 2 * 8 + 1
    assert {t["type"] for layer in products for t in layer["inputs"] + layer["outputs"]} == {"HALF"}
    assert ("INT8" in types.values()) is (precision == "int8")


@pytest.mark.parametrize(("precision", "per_weight"), [("fp16", 2), ("int8", 1)])
def test_an_engine_grows_by_the_bytes_of_its_weights(rtx, precision, per_weight, folder, tmp_path):
    """Without a GPU a built engine says little of itself, but its size tells whether integer weights stayed integers."""
    sizes = []
    for width in (2048, 8192):
        case = make("vit", precision, folder, intermediate_size=width)
        rtx.build(case.form(), case.target, tmp_path)
        sizes.append((tmp_path / "model.engine").stat().st_size)
    weights = 2 * 64 * (8192 - 2048) * 1.5  # two matrices a layer, of which one layer is cut in half
    assert (sizes[1] - sizes[0]) / weights == pytest.approx(per_weight, rel=0.1)  # biases, scales, other kernels


def test_what_the_builder_refuses_is_an_expected_failure(rtx, folder, tmp_path):
    case = make("vit", "fp16", folder)
    form = case.form()
    form.graph.node[5].op_type = "NoSuchOperator"
    with pytest.raises(UnsupportedError, match="TensorRT-RTX cannot read the graph") as raised:
        rtx.build(form, case.target, tmp_path)
    assert "NoSuchOperator" in raised.value.detail
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------- what it refuses


@pytest.mark.parametrize("capability", ["9.0", "8.7", "sm_89", "89"])
def test_a_capability_it_does_not_know_is_refused_with_those_it_does(capability, gpu, tmp_path, folder):
    gpu(status=100)
    case = make("vit", "fp16", folder)
    target = msgspec.structs.replace(case.target, session=(("compute_capability", capability), ("max_batch", "8")))
    reason = f"TensorRT-RTX does not build for compute capability {capability}, only for 8.9, 12.0"
    assert RTX.unbuildable(target) == reason
    with pytest.raises(UnsupportedError, match="cannot build for `rtx-4090`: TensorRT-RTX does not build"):
        RTX.build(case.form(), target, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_installed_library_refuses_hopper(rtx):
    allowed = rtx.capabilities()
    assert {"8.9", "12.0"} <= set(allowed)
    assert "9.0" not in allowed
    assert list(allowed) == sorted(allowed, key=lambda c: tuple(map(int, c.split("."))))


def test_without_a_gpu_only_rtx_builds(gpu, folder):
    gpu(status=100)
    target = make("vit", "fp16", folder).target
    bare = msgspec.structs.replace(target, session=())
    assert RTX.unbuildable(target) == ""
    assert RTX.unrunnable(target) == RTX.unavailable() == "no CUDA device: CUDA driver: no CUDA-capable device is detected (cuInit: 100)"
    assert RTX.unbuildable(bare) == "the device's profile names no compute_capability; TensorRT-RTX builds for 8.9, 12.0"
    assert TRT.unbuildable(target).endswith("; TensorRT builds on the GPU that it builds for, TensorRT-RTX does without")
    with pytest.raises(UnsupportedError, match="no CUDA-capable device"):
        RTX.load(folder, ("model.engine",), target)


def test_another_gpu_than_the_targets_runs_nothing(gpu, folder):
    gpu(capability=(9, 0))
    target = make("vit", "fp16", folder).target
    assert RTX.unbuildable(target) == ""
    assert RTX.unrunnable(target) == TRT.unbuildable(target) == "it is for compute capability 8.9, Stub GPU has 9.0"


@pytest.mark.parametrize(("version", "works"), [("10.12.0.36", True), ("11.4.0.106", True), ("10.11.1", False), ("8.6.1", False)])
def test_versions_before_strong_typing_are_refused(version, works, gpu):
    gpu(version=version)
    assert (TRT.unavailable() == "") is works
    assert works or TRT.unavailable() == f"TensorRT {version} is too old: 10.12 is the first that will do"


def test_a_broken_installation_is_not_a_missing_one(monkeypatch):
    def broken(name):
        raise OSError("libcudart.so.13: cannot open shared object file") if name == "tensorrt_rtx" else ModuleNotFoundError(name)

    monkeypatch.setattr("importlib.import_module", broken)
    assert RTX.unavailable() == "tensorrt_rtx cannot be loaded: libcudart.so.13: cannot open shared object file"
    assert TRT.unavailable() == "TensorRT is not installed: pip install tensorrt"
    assert TRT.versions() == (("tensorrt", "missing"),)


def test_precisions_it_cannot_do_have_a_reason():
    assert TRT.supports(FLOAT16) == TRT.supports(INT8_SYMMETRIC) == ""
    assert TRT.supports(INT8) == "TensorRT quantizes symmetrically: signed integers without zero points"
    assert RTX.supports(WEIGHT_INT8) == "TensorRT-RTX reads tables and weights of float products as floats"
    assert "fp32, fp16, int8-symmetric only" in TRT.supports(msgspec.structs.replace(FLOAT16, name="bf16"))
    for backend in (TRT, RTX):
        assert isinstance(backend, CrossCompiler)
        assert all(backend.supports(precision) == "" for precision in backend.counterparts.values())
    assert not isinstance(plugins.get("backends", "onnxruntime"), CrossCompiler)


@pytest.mark.parametrize("settings", [{"max_batch": "0"}, {"max_batch": "many"}, {"streams": "2"}])
def test_settings_that_mean_nothing_are_refused(settings, gpu, folder, tmp_path):
    gpu()
    case = make("vit", "fp16", folder)
    target = msgspec.structs.replace(case.target, session=tuple(settings.items()))
    with pytest.raises(UnsupportedError, match=next(iter(settings))):
        TRT.build(case.form(), target, tmp_path)


# ---------------------------------------------------------------------------------------------- on a GPU, which is a stand-in


@pytest.fixture
def built(gpu, folder, tmp_path):
    """(case, driver, runner) of a BERT in FP16 on a pretended RTX 4090."""
    driver = gpu()
    case = make("bert", "fp16", folder)
    graphs = TRT.build(case.form(), msgspec.structs.replace(case.target, backend="tensorrt"), tmp_path)
    return case, driver, TRT.load(tmp_path, graphs, case.target)


def test_where_the_gpu_is_the_inspector_speaks(built, tmp_path):
    assert sorted(p.name for p in tmp_path.iterdir()) == ["inspector.json", "model.engine"]
    assert json.loads((tmp_path / "inspector.json").read_text())["Layers"]


def test_calls_of_changing_shapes_give_what_the_network_gives(built):
    case, driver, runner = built
    want = case.emulated()
    for rows in ([1], [0, 1, 2, 3], [2, 3], [0]):
        got = runner.run({name: array[rows] for name, array in case.feed.items()})["logits"]
        np.testing.assert_allclose(got, want[rows], atol=20 * 2**-11 * np.ptp(want))
    strided = {name: np.asfortranarray(array) for name, array in case.feed.items()}
    np.testing.assert_array_equal(runner.run(strided)["logits"], runner.run(case.feed)["logits"])
    held = driver.used
    runner.run(case.feed)
    assert driver.used == held, "memory is kept, not taken again"


def test_a_shape_outside_the_profile_is_refused(built):
    case, _, runner = built
    long = {name: np.repeat(array, 2, axis=1) for name, array in case.feed.items()}
    with pytest.raises(DataError, match=r"input_ids has shape \(4, 32\), the engine takes \(1, 1\) to \(32, 16\)"):
        runner.run(long)
    with pytest.raises(DataError, match=r"shape \(33, 16\)"):
        runner.run({name: np.repeat(array, 9, axis=0)[:33] for name, array in case.feed.items()})
    with pytest.raises(DataError, match=r"shape \(4,\)"):
        runner.run({name: array[:, 0] for name, array in case.feed.items()})


def test_layers_have_times_and_timing_leaves_the_runner_as_it_was(built):
    case, _, runner = built
    before = runner.run(case.feed)["logits"]
    times = runner.layer_times(case.feed, repeats=4)
    assert len(times) > 20
    assert {ms for _, ms in times} == {0.25}
    np.testing.assert_array_equal(runner.run(case.feed)["logits"], before)
    assert len(runner.layer_times(case.feed)) == len(times), "the next profile starts at nothing"


def test_it_is_timed_as_a_processor_is(built):
    case, _, runner = built
    device = plugins.get("devices", "cuda")
    one = {name: array[:1] for name, array in case.feed.items()}
    latency, reference = device.time([Job("engine", runner, one), device.reference()], seconds=0.05, seed=0, min_samples=5)
    assert latency.value > 0
    assert reference.value > 0
    assert device.describe() == "Stub GPU, compute capability 8.9, 1 GiB, CUDA 13.1"
    assert dict(device.environment(case.target, ()).must_match)["gpu"] == "Stub GPU"


def test_calls_from_another_thread_work(built):
    case, _, runner = built
    found = []
    thread = threading.Thread(target=lambda: found.append(runner.run(case.feed)["logits"]))
    thread.start()
    thread.join()
    np.testing.assert_array_equal(found[0], runner.run(case.feed)["logits"])


def test_a_full_gpu_is_an_expected_failure(gpu):
    driver = gpu(memory=100)
    stream = cuda_driver.Stream()
    stream.enter()
    with pytest.raises(UnsupportedError, match=r"CUDA driver: out of memory \(cuMemAlloc_v2: 2\)"):
        stream.allocate(101)
    address = stream.allocate(60)
    assert cuda_driver.free_bytes() == 40
    with pytest.raises(UnsupportedError, match="invalid argument"):
        stream.upload(address, np.zeros(61, np.uint8))
    stream.free(address)
    assert driver.used == 0


def test_no_driver_and_no_device_are_told_apart(gpu, monkeypatch):
    gpu(devices=0)
    assert cuda_driver.unavailable() == "no CUDA device: the driver shows none"
    monkeypatch.setattr(cuda_driver, "library", lambda: None)
    assert cuda_driver.unavailable() == f"no CUDA device: the driver library {cuda_driver.LIBRARY} is not installed"
    with pytest.raises(UnsupportedError, match="no CUDA device"):
        cuda_driver.gpu()
