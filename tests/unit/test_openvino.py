"""What OpenVINO makes of the graphs: integers where integers were asked for, one network for the workload, one for every other shape."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import msgspec
import numpy as np
import onnx
import pytest
import torch
from transformers import BertConfig, ViTConfig

from nascompile import lowering, network, plugins, records, space as spaces, supernet
from nascompile.backends import openvino as backend_module
from nascompile.errors import NascompileError, RecordError, UnsupportedError
from nascompile.records import FLOAT32, INT8, WEIGHT_INT8, Target, Workload

ov = pytest.importorskip("openvino")

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
CASES = {
    "vit": lambda: ViTConfig(**SIZES, image_size=8, patch_size=4, num_channels=1, num_labels=5),
    "bert": lambda: BertConfig(**SIZES, vocab_size=400, num_labels=3, max_position_embeddings=24),
}
SEQUENCE = 9
PRODUCTS = ("FullyConnected", "MatMul")

exact_integers = pytest.mark.skipif(bool(backend_module.PLUGIN.supports(INT8)), reason="this processor does not multiply integers exactly")


@pytest.fixture
def backend():
    return plugins.get("backends", "openvino")


class Case:
    """A tiny network with its calibrated ranges."""

    def __init__(self, name, backend, folder):
        torch.set_num_threads(1)
        torch.manual_seed(1)
        self.backend, self.folder = backend, folder
        self.family, self.config = plugins.get("families", name), CASES[name]()
        model = self.family.create(self.config)
        with torch.no_grad():
            for parameter in model.parameters():  # HF starts biases at 0: errors in them would not show
                parameter.add_(0.05 * torch.randn_like(parameter))
        self.net = supernet.Supernet(self.family, model)
        workload = self.family.workload(self.config, 1, SEQUENCE)
        self.target = Target(device="cpu", backend=backend.name, workload=workload, session=backend.session())
        self.space = network.search_space(self.family, self.config, backend, self.target, "model")
        self.blueprint = lowering.blueprint(self.family, self.config, lowering.export(self.family, self.config, folder), backend)

    def lower(self, point, feed=None):
        weights = {name: p.detach().numpy() for name, p in self.net.model.named_parameters()}
        batches = self.batches(self.feed(16) if feed is None else feed)
        ranges = supernet.calibrate(self.net, self.space, point, self.target.id, batches, "minmax")
        args = (self.blueprint, self.family, self.config, self.space, point, self.target, weights, ranges, self.backend)
        return lowering.lower(*args), ranges

    def load(self, form, **session):
        target = msgspec.structs.replace(self.target, session=tuple(sorted((dict(self.target.session) | session).items())))
        return self.backend.load(self.folder, self.backend.build(form, target, self.folder), target)

    def feed(self, batch, sequence=SEQUENCE, seed=0):
        rng, feed = np.random.default_rng(seed), {}
        for spec in self.family.inputs(self.config):
            shape = [{"batch": batch, "sequence": sequence}.get(d, d) for d in spec.shape]
            feed[spec.name] = rng.integers(0, spec.high, shape) if spec.high else rng.standard_normal(shape).astype(np.float32)
        if "attention_mask" in feed:
            feed["attention_mask"][:] = np.arange(sequence) < np.linspace(3, sequence, batch).astype(int)[:, None]
        return feed

    @staticmethod
    def batches(feed):
        return [({name: torch.from_numpy(v) for name, v in feed.items()}, torch.zeros(1, dtype=torch.long))]


@pytest.fixture(params=list(CASES))
def case(request, backend, tmp_path):
    return Case(request.param, backend, tmp_path)


@pytest.fixture
def bert(backend, tmp_path):
    return Case("bert", backend, tmp_path)


# ---------------------------------------------------------------------------------------------- integers


def executed(request):
    """(type, how it is computed, layers of the graph it stands for) of every node that a request's last call ran."""
    found = []
    for node in request.get_compiled_model().get_runtime_model().get_ops():
        info = {key: value if isinstance(value, str) else value.astype(str) for key, value in node.get_rt_info().items()}
        found.append((info.get("layerType", ""), info.get("primitiveType", ""), info.get("originalLayersNames", "").split(",")))
    return found


@exact_integers
def test_every_quantized_product_runs_in_int8(case):
    form, _ = case.lower(spaces.uniform(case.space))
    integers = {t.name for t in form.graph.initializer if t.data_type == onnx.TensorProto.INT8}
    dequantized = {n.output[0] for n in form.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in integers}
    products = {n.name: n.input[1] in dequantized for n in form.graph.node if n.op_type == "MatMul"}
    assert sum(products.values()) == 2 * 6
    runner = case.load(form)
    for batch in (1, 8, 3):  # the network of the workload, another of fixed shape, and the one for any shape
        feed = case.feed(batch)
        runner.run(feed)
        how = {name: kind for layer, kind, names in executed(runner._request(feed)) for name in names if layer in PRODUCTS}
        assert {name for name, kind in how.items() if kind.endswith("_I8") and name in products} == {n for n in products if products[n]}


@exact_integers
def test_integers_are_computed_as_the_search_emulates_them(case):
    feed = case.feed(16)
    batches = case.batches(feed)
    for seed in range(4):
        point = spaces.sample(case.space, np.random.default_rng(seed)) if seed else spaces.uniform(case.space)
        form, ranges = case.lower(point, feed)
        emulated, _ = supernet.emulate(case.net, case.space, point, case.target.id, batches, ranges)
        # The same grids; a value on the edge of two steps may fall to either side and moves on through later layers.
        assert np.abs(case.load(form).run(feed)["logits"] - emulated).max() < 0.02 * np.abs(emulated).max()


@exact_integers
def test_weights_are_stored_as_integers_and_once(case):
    form, _ = case.lower(spaces.uniform(case.space))
    case.backend.build(form, case.target, case.folder)
    weights = sum(len(t.raw_data) for t in form.graph.initializer)
    stored = (case.folder / "model.bin").stat().st_size
    assert weights - 100 * len(form.graph.initializer) < stored <= weights + 64 * len(form.graph.initializer)  # merged or aligned constants
    model = ov.Core().read_model(case.folder / "model.xml")
    kinds = {n.get_friendly_name(): n.get_element_type() for n in model.get_ops() if n.get_type_name() == "Constant"}
    wanted = {t.name for t in form.graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 2}
    assert len(wanted) == 2 * 6 + (case.family.name == "bert")  # and the word table
    assert {name: str(kinds[name]) for name in wanted} == dict.fromkeys(wanted, "<Type: 'int8_t'>")


def test_processors_that_add_products_in_16_bits_get_no_int8(backend, monkeypatch, tmp_path):
    """x86 with AVX2 or AVX-512 but without VNNI: there OpenVINO gave 165 for a sum of 293."""
    monkeypatch.setattr(backend_module, "cpu_flags", lambda: frozenset({"avx2", "avx512f"}))
    monkeypatch.setattr(backend_module.platform, "machine", lambda: "x86_64")
    assert "saturate" in backend.supports(INT8)
    assert (backend.supports(FLOAT32), backend.supports(WEIGHT_INT8)) == ("", "")
    assert {p.name for p in Case("bert", backend, tmp_path).space.precisions} == {"fp32", "weight-int8"}
    monkeypatch.setattr(backend_module.platform, "machine", lambda: "aarch64")
    assert backend.supports(INT8) == ""


# ---------------------------------------------------------------------------------------------- shapes


def test_calls_of_the_workloads_shape_have_a_network_of_their_own(case):
    runner = case.load(case.lower(spaces.largest(case.space))[0])
    one, three = case.feed(1), case.feed(3)
    found = runner.run(one)["logits"]
    assert runner._any is None, "the other is compiled when it is needed"
    assert runner._request(one) is not runner._request(three)
    assert runner._request(one) is runner._request(case.feed(1, seed=1))
    general = case.load(case.lower(spaces.largest(case.space))[0], static_shape="none")
    assert general._request(one) is general._request(three)
    np.testing.assert_allclose(general.run(one)["logits"], found, atol=1e-6)  # float32 sums near 1 in another order
    np.testing.assert_allclose(general.run(three)["logits"], runner.run(three)["logits"], atol=1e-6)


@pytest.mark.parametrize(
    ("value", "fixed", "any_shape"),
    [
        ("workload", (1,), (2, 8, 3)),
        ("workload,8,2", (1, 8, 2), (3, 4)),
        ("3", (3,), (1, 8)),
        ("1,workload", (1,), (2,)),
        ("none", (), (1, 8)),
        ("seen", (1, 5, 2, 7), (8, 3)),
    ],
)
def test_shapes_that_have_networks_of_their_own(bert, value, fixed, any_shape):
    form, _ = bert.lower(spaces.largest(bert.space))
    runner = bert.load(form, static_shape=value)
    assert len(runner._fixed) == (1 in fixed), "only the workload's is compiled before it is called"
    for batch in (*fixed, *any_shape, *fixed):
        feed = bert.feed(batch)
        with torch.no_grad():
            want = bert.net.model(**{name: torch.from_numpy(v) for name, v in feed.items()}).logits.numpy()
        np.testing.assert_allclose(runner.run(feed)["logits"], want, atol=1e-5)  # float32 sums in another order, values near 1
        assert (runner._request(feed) is runner._any) is (batch in any_shape), batch
    assert {shapes[0][0] for shapes in runner._fixed} == set(fixed)
    assert all(r.get_compiled_model().inputs[0].partial_shape.is_static for r in runner._fixed.values())
    if value == "workload":
        assert runner._request(bert.feed(1, SEQUENCE - 2)) is runner._any, "another length is another shape"


def test_by_default_batches_of_8_and_32_have_networks_of_their_own(bert):
    runner = bert.load(bert.lower(spaces.largest(bert.space))[0])
    for batch in (1, 8, 32):
        runner.run(bert.feed(batch))
    assert (len(runner._fixed), runner._any) == (3, None)
    assert dict(bert.target.session)["static_shape"] == "workload,8,32", "so every manifest says it"


@pytest.mark.parametrize("value", ["workload,0", "8,-1", "batch", "", "1,2,3,4,5", "seen,8"])
def test_shapes_that_mean_nothing_or_too_much_are_refused(bert, value):
    form, _ = bert.lower(spaces.largest(bert.space))
    with pytest.raises(UnsupportedError, match="unknown value of static_shape") as caught:
        bert.load(form, static_shape=value)
    assert "up to 4 of workload and batch sizes" in caught.value.hint


def test_every_sequence_length_gives_what_torch_gives(bert):
    runner = bert.load(bert.lower(spaces.largest(bert.space))[0])
    for batch, sequence in ((1, SEQUENCE), (1, 5), (2, SEQUENCE), (3, 24), (1, 5)):
        feed = bert.feed(batch, sequence)
        with torch.no_grad():
            want = bert.net.model(**{name: torch.from_numpy(value) for name, value in feed.items()}).logits.numpy()
        np.testing.assert_allclose(runner.run(feed)["logits"], want, atol=1e-5)  # float32 sums in another order, values near 1


def test_a_workload_that_leaves_a_dimension_open_has_no_network_of_its_own(bert):
    form, _ = bert.lower(spaces.largest(bert.space))
    target = msgspec.structs.replace(bert.target, workload=Workload())
    runner = bert.backend.load(bert.folder, bert.backend.build(form, target, bert.folder), target)
    assert runner._fixed == {}
    assert runner.run(bert.feed(2, 7))["logits"].shape == (2, 3)


# ---------------------------------------------------------------------------------------------- calls


def test_inputs_stay_as_they_are_and_outputs_are_the_callers(case):
    runner = case.load(case.lower(spaces.largest(case.space))[0])
    feed = case.feed(1)
    kept = {name: value.copy() for name, value in feed.items()}
    first = runner.run(feed)["logits"]
    saved = first.copy()
    other = runner.run(case.feed(1, seed=1))["logits"]
    assert np.abs(other - saved).max() > 0
    np.testing.assert_array_equal(first, saved)
    first[:] = 0
    for name, value in feed.items():
        np.testing.assert_array_equal(value, kept[name])
        value.flags.writeable = False
    np.testing.assert_array_equal(runner.run(feed)["logits"], saved)
    backwards = {name: value[..., ::-1].copy()[..., ::-1] for name, value in kept.items()}
    assert not all(value.flags.c_contiguous for value in backwards.values())
    np.testing.assert_array_equal(runner.run(backwards)["logits"], saved)


def test_threads_may_share_a_runner(bert):
    runner = bert.load(bert.lower(spaces.largest(bert.space))[0])
    feeds = [bert.feed(1 + i % 2, seed=i) for i in range(24)]
    wanted = [runner.run(feed)["logits"] for feed in feeds]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda feed: runner.run(feed)["logits"], feeds))
    for have, want in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(have, want)


def test_a_loaded_engine_outlives_its_files(bert):
    """The profiler removes them at once; a folder may be built again while an engine of it serves."""
    runner = bert.load(bert.lower(spaces.largest(bert.space))[0])
    feed = bert.feed(2)  # the network for any shape has not been compiled yet
    bert.backend.build(bert.lower(spaces.smallest(bert.space))[0], bert.target, bert.folder)
    shutil.rmtree(bert.folder)
    with torch.no_grad():
        want = bert.net.model(**{name: torch.from_numpy(value) for name, value in feed.items()}).logits.numpy()
    np.testing.assert_allclose(runner.run(feed)["logits"], want, atol=1e-5)  # float32 sums in another order, values near 1


# ---------------------------------------------------------------------------------------------- settings and files


def test_settings_reach_the_runtime(bert):
    form, _ = bert.lower(spaces.largest(bert.space))
    runner = bert.load(form, performance_hint="throughput", enable_hyper_threading="no")
    compiled = runner._request(bert.feed(1)).get_compiled_model()
    found = {name: compiled.get_property(name) for name in ("INFERENCE_NUM_THREADS", "NUM_STREAMS", "ENABLE_CPU_PINNING")}
    assert found == {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "ENABLE_CPU_PINNING": False}
    assert str(compiled.get_property("PERFORMANCE_HINT")).endswith("THROUGHPUT")
    assert compiled.get_property("INFERENCE_PRECISION_HINT") == ov.Type.f32, "not bfloat16, which is the default where it is fast"


@pytest.mark.parametrize("name", [*backend_module.PROPERTIES, backend_module.STATIC_SHAPE])
def test_values_of_settings_are_checked(bert, name):
    form, _ = bert.lower(spaces.largest(bert.space))
    with pytest.raises(NascompileError, match=f"unknown value of {name}: perhaps"):
        bert.load(form, **{name: "perhaps"})


def test_a_graph_beyond_the_limit_of_protobuf_is_built_through_files(bert, monkeypatch):
    form, _ = bert.lower(spaces.largest(bert.space))
    bert.backend.build(form, bert.target, bert.folder)
    small = {name: (bert.folder / name).read_bytes() for name in backend_module.GRAPHS}
    monkeypatch.setattr(backend_module, "PROTOBUF_LIMIT", 1000)
    bert.backend.build(form, bert.target, bert.folder)
    assert (bert.folder / "model.bin").read_bytes() == small["model.bin"]
    feed = bert.feed(2)
    want = bert.load(form).run(feed)["logits"]
    monkeypatch.undo()
    np.testing.assert_array_equal(bert.load(form).run(feed)["logits"], want)


def test_the_same_graph_gives_the_same_files_without_a_path_in_them(bert, tmp_path):
    form, _ = bert.lower(spaces.uniform(bert.space))
    files = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        bert.backend.build(form, bert.target, tmp_path / name)
        files.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert files[0] == files[1]
    assert sorted(files[0]) == ["model.bin", "model.xml"]
    assert str(tmp_path).encode() not in files[0]["model.xml"]


def test_an_operator_that_openvino_lacks_is_an_expected_failure(backend, tmp_path):
    value = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("NoSuchOperator", ["x"], ["y"], domain="made.up")
    x, y = (value(name, onnx.TensorProto.FLOAT, [1]) for name in "xy")
    form = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [x], [y]))
    with pytest.raises(UnsupportedError, match="cannot read the graph") as caught:
        backend.build(form, Target(device="cpu", backend="openvino", workload=Workload()), tmp_path)
    assert "NoSuchOperator" in caught.value.detail


def test_a_full_disk_is_said_to_be_full(bert, monkeypatch):
    form, _ = bert.lower(spaces.largest(bert.space))

    def fails(*args, **kwargs):
        raise RuntimeError("basic_ios::clear: iostream error")

    monkeypatch.setattr(ov, "save_model", fails)
    monkeypatch.setattr(backend_module.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(OSError) as caught:  # noqa: PT011
        bert.backend.build(form, bert.target, bert.folder)
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.setattr(backend_module.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**12, 0, 10**12))
    with pytest.raises(RecordError, match=r"cannot write .*model\.xml"):
        bert.backend.build(form, bert.target, bert.folder)


def test_damaged_weights_are_an_expected_failure(bert):
    form, _ = bert.lower(spaces.largest(bert.space))
    graphs = bert.backend.build(form, bert.target, bert.folder)
    content = (bert.folder / "model.bin").read_bytes()
    (bert.folder / "model.bin").unlink()
    with pytest.raises(RecordError, match=r"cannot load .*model\.xml"):
        bert.backend.load(bert.folder, graphs, bert.target)
    (bert.folder / "model.bin").write_bytes(content[: len(content) // 2])
    with pytest.raises(RecordError, match=r"cannot load .*model\.xml"):
        bert.backend.load(bert.folder, graphs, bert.target)


CTRL_C = """
import os, signal, sys
from pathlib import Path
from nascompile import plugins, records
folder = Path(sys.argv[1])
target = records.load(folder / "target.json", records.Target)
backend = plugins.get("backends", "openvino")
first, second = (backend.load(folder, tuple(sys.argv[2:]), target) for _ in range(2))
del first
del second
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_ctrl_c_after_engines_are_gone_is_an_interruption_not_a_crash(case):
    """Of several cores OpenVINO's plugin leaves signal handlers a stack that is not mapped."""
    form, _ = case.lower(spaces.uniform(case.space))
    graphs = case.backend.build(form, case.target, case.folder)
    records.save(case.target, case.folder / "target.json")
    command = [sys.executable, "-c", CTRL_C, str(case.folder), *graphs]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr
