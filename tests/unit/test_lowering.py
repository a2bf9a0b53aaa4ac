"""Lowering against the torch module and against what network.py says the graph contains."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from transformers import BertConfig, DistilBertConfig, RobertaConfig, ViTConfig

from nascompile import lowering, network, plugins, space as spaces, supernet
from nascompile.errors import ModelError, RecordError, UnsupportedError
from nascompile.families.toy import ToyConfig
from nascompile.passes.graph import parameter_of
from nascompile.quantization import ActivationRanges
from nascompile.records import Operator, Target

TEXT = {"vocab_size": 50, "num_labels": 3, "max_position_embeddings": 24}
SIZES = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
CASES = {
    "vit": ("vit", lambda: ViTConfig(**SIZES, image_size=8, patch_size=4, num_channels=1, num_labels=5)),
    "bert": ("bert", lambda: BertConfig(**SIZES, **TEXT)),
    "roberta": ("bert", lambda: RobertaConfig(**SIZES, **TEXT)),
    "distilbert": ("bert", lambda: DistilBertConfig(dim=64, n_layers=3, n_heads=4, hidden_dim=128, **TEXT)),
    "toy": ("toy", ToyConfig),
}
BACKENDS = ("onnxruntime", "openvino", "fake")
INTEGER = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
ATTENTION = ("MultiHeadAttention", "QAttention", "Attention")


@dataclass
class Case:
    family: object
    config: object
    model: object
    backend: object
    blueprint: object
    target: Target
    space: object
    ranges: ActivationRanges

    @property
    def weights(self):
        return {name: p.detach().numpy() for name, p in self.model.named_parameters()}

    def lower(self, candidate, **changes):
        arguments = {"weights": self.weights, "ranges": self.ranges} | changes
        return lowering.lower(
            self.blueprint, self.family, self.config, self.space, candidate, self.target, backend=self.backend, **arguments
        )

    def run(self, model, feed, folder):
        return self.backend.load(folder, self.backend.build(model, self.target, folder), self.target).run(feed)["logits"]

    def inputs(self, rng, batch=2, sequence=7):
        feed = {}
        for spec in self.family.inputs(self.config):
            shape = [{"batch": batch, "sequence": sequence}.get(d, d) for d in spec.shape]
            feed[spec.name] = rng.integers(0, spec.high, shape) if spec.high else rng.standard_normal(shape).astype(np.float32)
        if "attention_mask" in feed:
            feed["attention_mask"][:] = 1
            feed["attention_mask"][-1, sequence // 2 :] = 0
        return feed


@pytest.fixture(scope="session")
def exports(tmp_path_factory):
    torch.set_num_threads(1)
    folder, found = tmp_path_factory.mktemp("blueprints"), {}
    for name, (family, config) in CASES.items():
        plugin = plugins.get("families", family)
        found[name] = (plugin, config(), lowering.export(plugin, config(), folder))
    return found


def make_case(exports, name, backend):
    family, config, path = exports[name]
    torch.manual_seed(3)
    model = family.create(config)
    with torch.no_grad():
        for parameter in model.parameters():  # HF starts biases at 0 and norms at 1: errors in them would not show
            parameter.add_(0.05 * torch.randn_like(parameter))
    backend = plugins.get("backends", backend)
    if reason := backend.unavailable():
        pytest.skip(reason)
    target = Target(device="cpu", backend=backend.name, workload=family.workload(config, 1, 8), session=backend.session())
    space = network.search_space(family, config, backend, target, "model")
    sites = sorted(w for s in family.segments(config) if s.scheme == "int8" for w in s.quantizable)
    ranges = ActivationRanges(method="minmax", sites=tuple((site, -4.0, 4.0) for site in sites))
    blueprint = lowering.blueprint(family, config, path, backend)
    return Case(family, config, model, backend, blueprint, target, space, ranges)


@pytest.fixture(params=[(name, backend) for name in CASES for backend in BACKENDS], ids="-".join)
def case(request, exports):
    return make_case(exports, *request.param)


@pytest.fixture
def bert(exports):
    return make_case(exports, "bert", "onnxruntime")


def test_the_largest_network_computes_what_the_torch_module_computes(case, tmp_path):
    rng = np.random.default_rng(0)
    lowered = case.lower(spaces.largest(case.space))
    for batch, sequence in ((1, 5), (3, 9)):  # not the shapes of the export
        feed = case.inputs(rng, batch, sequence)
        with torch.no_grad():
            want = case.model(**{name: torch.from_numpy(value) for name, value in feed.items()}).logits.numpy()
        # float32 sums of at most 128 terms near 1, in another order, through 3 layers
        np.testing.assert_allclose(case.run(lowered, feed, tmp_path), want, atol=1e-5)


def test_the_graph_holds_what_the_network_description_says(case):
    rng = np.random.default_rng(1)
    points = [spaces.largest(case.space), spaces.uniform(case.space), spaces.smallest(case.space)]
    for point in points + [spaces.sample(case.space, rng) for _ in range(5)]:
        lowered = case.lower(point)
        said = network.graph(case.family, case.config, case.space, point, case.target)
        found = lowering.describe(lowered, case.family, case.config)
        assert [(b.name, b.kind) for b in found] == [(n.name, n.operator.kind) for n in said.nodes]
        for block, node in zip(found, said.nodes, strict=True):
            assert sum(np.prod(shape, dtype=int) for _, shape in block.weights) == node.parameters, node.name
            assert bool(block.quantized) == (node.operator.precision.name != "fp32"), node.name
        heads = [n.operator.dim("heads") for n in said.nodes if n.operator.kind == "attention"]
        fused = [onnx.helper.get_node_attr_value(n, "num_heads") for n in lowered.graph.node if n.op_type in ATTENTION]
        assert fused == (heads if case.backend.name == "onnxruntime" else [])


def test_stored_bytes_are_those_that_the_description_counts(case):
    point = spaces.uniform(case.space)
    stored = sum(t.ByteSize() for t in case.lower(point).graph.initializer)
    said = sum(n.size_bytes for n in network.graph(case.family, case.config, case.space, point, case.target).nodes)
    # names, zero points, activation grids and position indices come on top: some 100 bytes per tensor
    assert said < stored < said + 200 * len(case.lower(point).graph.initializer)


def test_weights_are_sliced_from_the_front(case, tmp_path):
    """Garbage behind the kept prefix and in dropped layers must not show."""
    rng = np.random.default_rng(2)
    point = spaces.smallest(case.space)
    kept = {p for s in network.kept(case.family, case.config, case.space, point) for p in s.parameters}
    shapes = network.sliced_shapes(case.family, case.config, network.values(case.family, case.config, case.space, point))
    spoilt = {}
    for name, value in case.weights.items():
        spoilt[name] = np.full_like(value, np.nan)
        if name in kept:
            prefix = tuple(slice(n) for n in shapes[name])
            spoilt[name][prefix] = value[prefix]
    feed = case.inputs(rng)
    clean = case.run(case.lower(point), feed, tmp_path)
    np.testing.assert_array_equal(case.run(case.lower(point, weights=spoilt), feed, tmp_path), clean)


def test_lowering_leaves_the_blueprint_alone_and_repeats_itself(case):
    before = case.blueprint.model.SerializeToString(deterministic=True)
    first = case.lower(spaces.uniform(case.space)).SerializeToString(deterministic=True)
    assert case.lower(spaces.uniform(case.space)).SerializeToString(deterministic=True) == first
    assert case.blueprint.model.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("backend", ["fake", "openvino"])
def test_some_backends_get_standard_onnx_only(exports, backend):
    for name in CASES:
        case = make_case(exports, name, backend)
        assert {node.domain for node in case.lower(spaces.uniform(case.space)).graph.node} == {""}


def test_a_graph_written_in_pieces_is_the_file_that_onnx_writes(bert, tmp_path):
    for point in (spaces.largest(bert.space), spaces.uniform(bert.space)):
        lowered = bert.lower(point)
        lowered.metadata_props.add(key="after", value="the graph")
        lowered.graph.doc_string = "after the initializers"
        bert.backend.build(lowered, bert.target, tmp_path)
        assert (tmp_path / "model.onnx").read_bytes() == lowered.SerializeToString()
        assert onnx.load(tmp_path / "model.onnx") == lowered


def test_weights_are_stored_as_the_products_read_them(bert):
    """Transposed while they are bound: what is stored twice, or dropped later, stays in the model's memory."""
    seen = []

    def watch(step, model):
        if step is None or step.name != "fuse_float_attention":  # which puts query, key and value of a narrow network side by side
            seen.append([t.name for t in model.graph.initializer if t.name != "first_token"])  # an index, no weight

    bert.lower(spaces.largest(bert.space), watch=watch)
    assert "bert.encoder.layer.0.output.dense.weight.T" in seen[0]
    assert all(names == seen[0] for names in seen)


def test_onnxruntime_gets_integer_products_and_fused_attention(bert):
    nodes = [node.op_type for node in bert.lower(spaces.uniform(bert.space)).graph.node]
    assert nodes.count("MatMulIntegerToFloat") == 3 * 3
    assert nodes.count("QAttention") == 3  # query, key and value in one, and the attention
    assert nodes.count("QuantizeLinear") == 3 * 4  # attention, its output, and two products of the MLP
    assert nodes.count("MatMul") == 2  # pooler and classifier stay float
    assert "DequantizeLinear" not in nodes
    assert "Softmax" not in nodes


def test_node_names_keep_the_module_path(bert):
    names = {node.name for point in (spaces.largest, spaces.uniform) for node in bert.lower(point(bert.space)).graph.node}
    assert "/bert/encoder/layer.1/attention/output/dense/MatMul" in names
    assert "/bert/encoder/layer.1/attention/self/Attention" in names
    assert "/bert/encoder/layer.1/attention/self/QAttention" in names
    assert "/bert/encoder/layer.1/intermediate/dense/MatMul" in names


def test_watching_sees_the_graph_before_and_after_each_pass(bert, tmp_path):
    seen = []
    bert.lower(spaces.uniform(bert.space), watch=lambda step, model: seen.append((step and step.name, model.SerializeToString())))
    applied = [n for n in lowering.PASSES if plugins.get("passes", n).standard or n in bert.backend.passes]
    assert [name for name, _ in seen] == [None, *applied]
    graphs = dict(seen)
    feed = bert.inputs(np.random.default_rng(0))
    # from quantize_linear to quantize_table only the table changes: its rows are off by at most half a step
    results = [bert.run(onnx.load_from_string(graphs[name]), feed, tmp_path) for name in ("quantize_linear", "quantize_table")]
    assert 0 < np.abs(results[0] - results[1]).max() < 0.05


def test_the_export_is_made_once(exports, tmp_path, monkeypatch):
    family, config, path = exports["toy"]
    first = lowering.export(family, config, tmp_path)
    assert first.read_bytes() == path.read_bytes()  # nothing random in it
    monkeypatch.setattr(torch.onnx, "export", None)
    assert lowering.export(family, config, tmp_path) == first
    with pytest.raises(TypeError):
        lowering.export(family, ToyConfig(layers=2), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [first.name]


def test_a_blueprint_file_holds_no_weights_and_is_valid(exports):
    family, config, path = exports["bert"]
    assert path.stat().st_size < 200_000
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert {i.name for i in model.graph.input} == {s.name for s in family.inputs(config)} | set(family.parameters(config))


def test_a_damaged_blueprint_is_named(exports, tmp_path):
    family, config, path = exports["toy"]
    (tmp_path / "broken.onnx").write_bytes(path.read_bytes()[:-100] + b"\xff" * 50)
    with pytest.raises(RecordError, match=r"broken\.onnx"):
        lowering.blueprint(family, config, tmp_path / "broken.onnx", plugins.get("backends", "fake"))


def test_wrong_weights_are_named(bert):
    point = spaces.largest(bert.space)
    name = "bert.encoder.layer.0.output.dense.weight"
    with pytest.raises(ModelError, match=name):
        bert.lower(point, weights={k: v for k, v in bert.weights.items() if k != name})
    with pytest.raises(ModelError, match=name):
        bert.lower(point, weights=bert.weights | {name: bert.weights[name][:, :64]})


def test_quantizing_without_ranges_is_refused(bert):
    with pytest.raises(UnsupportedError, match="no calibrated range"):
        bert.lower(spaces.uniform(bert.space), ranges=None)


# ---------------------------------------------------------------------------------------------- precisions beside those searched

OTHERS = ("int8-dynamic", "weight-int8-block32", "weight-int8-block128", "weight-int4-block32", "weight-int4-block128")


@pytest.mark.parametrize("precision", OTHERS)
@pytest.mark.parametrize("name", ["vit", "bert", "toy"])
def test_other_precisions_compute_what_is_emulated_and_store_what_is_counted(exports, name, precision, tmp_path):
    """The graph, called with one sample at a time without padding, against the emulation of all of them together."""
    case = make_case(exports, name, "onnxruntime")
    arguments = (case.family, case.config, case.backend, case.target, "model")
    case.space = network.search_space(*arguments, precisions=(precision, "weight-int8"))
    rng, net = np.random.default_rng(4), supernet.Supernet(case.family, case.model)
    for point in (spaces.uniform(case.space), spaces.sample(case.space, rng)):
        lowered = case.lower(point, ranges=None)
        said = network.graph(case.family, case.config, case.space, point, case.target)
        found = lowering.describe(lowered, case.family, case.config)
        for block, node in zip(found, said.nodes, strict=True):
            assert sum(np.prod(shape, dtype=int) for _, shape in block.weights) == node.parameters, node.name
            assert bool(block.quantized) == (node.operator.precision.name != "fp32"), node.name
        stored, counted = sum(t.ByteSize() for t in lowered.graph.initializer), sum(n.size_bytes for n in said.nodes)
        assert counted < stored < counted + 200 * len(lowered.graph.initializer)  # names, zero points, position indices
        feed = case.inputs(rng, batch=6)
        batches = [({k: torch.from_numpy(v) for k, v in feed.items()}, torch.zeros(6, dtype=torch.long))]
        emulated, _ = supernet.emulate(net, case.space, point, case.target.id, batches, None)
        runner = case.backend.load(tmp_path, case.backend.build(lowered, case.target, tmp_path), case.target)
        for i, want in enumerate(emulated):
            length = int(feed["attention_mask"][i].sum()) if "attention_mask" in feed else None
            one = {k: v[i : i + 1] if v.ndim != 2 or k == "features" else v[i : i + 1, :length] for k, v in feed.items()}
            # float weights: float32 sums in another order; integers: a value on the edge of two steps may fall to either side
            limit = 0.02 * np.abs(emulated).max() if precision == "int8-dynamic" else 1e-5
            assert np.abs(runner.run(one)["logits"][0] - want).max() < limit


def test_a_grid_found_in_a_call_depends_on_the_samples_in_it(exports, tmp_path):
    case = make_case(exports, "toy", "onnxruntime")
    case.space = network.search_space(case.family, case.config, case.backend, case.target, "model", precisions=("int8-dynamic",))
    point = spaces.uniform(case.space)
    feed = case.inputs(np.random.default_rng(0), batch=6)
    net, batches = supernet.Supernet(case.family, case.model), [({"features": torch.from_numpy(feed["features"])}, torch.zeros(6))]
    single, triple = (supernet.emulate(net, case.space, point, case.target.id, batches, None, batch)[0] for batch in (1, 3))
    runner = case.backend.load(tmp_path, case.backend.build(case.lower(point), case.target, tmp_path), case.target)
    built = np.concatenate([runner.run({"features": feed["features"][i : i + 3]})["logits"] for i in (0, 3)])
    # 64 x 6 inputs of products, of which hardly one lies so near a tie that float32 noise moves it
    assert np.abs(built - triple).max() < 0.2 * np.abs(single - triple).max()


def test_operators_of_other_precisions_are_built(exports, tmp_path):
    case = make_case(exports, "bert", "onnxruntime")
    for precision in OTHERS:
        space = network.search_space(case.family, case.config, case.backend, case.target, "model", precisions=(precision,))
        operator = next(o for o in network.operators(case.family, case.config, space, case.target) if o.precision.name == precision)
        stack = lowering.lower_operator(case.blueprint, case.family, case.config, operator, 2, case.backend, seed=0)
        wanted = "MatMulNBits" if precision.startswith("weight") else "MatMulIntegerToFloat"
        assert [n.op_type for n in stack.graph.node].count(wanted) + 3 * [n.op_type for n in stack.graph.node].count("QAttention") == 8


def test_a_product_that_no_pass_quantized_is_an_error(exports, monkeypatch):
    case = make_case(exports, "bert", "onnxruntime")
    arguments = (case.family, case.config, case.backend, case.target, "model")
    case.space = network.search_space(*arguments, precisions=("weight-int4-block32",))
    monkeypatch.setattr(type(case.backend), "passes", ("fuse_attention",))
    with pytest.raises(UnsupportedError, match="18 of 18 weights were not quantized as asked") as error:
        case.lower(spaces.uniform(case.space))
    assert "bert.encoder.layer.2.output.dense.weight: weight-int4-block32" in error.value.detail


# ---------------------------------------------------------------------------------------------- operators


def test_every_operator_of_the_space_is_built_as_described(case, tmp_path):
    """A stack holds `repeat` copies with the operator's sizes, precision, and weights of their own."""
    for operator in network.operators(case.family, case.config, case.space, case.target):
        stack = lowering.lower_operator(case.blueprint, case.family, case.config, operator, 3, case.backend, seed=0)
        runner = case.backend.load(tmp_path, case.backend.build(stack, case.target, tmp_path), case.target)
        names = {value.name for value in stack.graph.input}
        feed = {name: value for name, value in case.inputs(np.random.default_rng(0)).items() if name in names}
        if "hidden" in names:
            tokens = {0: [], 1: [1]}.get(dict(operator.dims).get("sequence", 0), [7])
            shape = [2, *tokens, operator.dim("hidden")]
            feed["hidden"] = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        results = list(runner.run(feed).values())
        assert len(results) == (1 if operator.kind in ("attention", "mlp") and not _reads_first(operator) else 3)
        assert all(np.isfinite(r).all() and 1e-3 < np.abs(r).max() < 100 for r in results)
        assert len({r.tobytes() for r in results}) == len(results), "copies computed the same: they could be merged"
        integer = [t for t in stack.graph.initializer if t.data_type in INTEGER and len(t.dims) == 2]
        assert bool(integer) == (operator.precision.name != "fp32")
        if operator.kind == "mlp" and case.family.name != "toy" and operator.dim("width") != 64:
            first = [tuple(t.dims) for t in stack.graph.initializer if tuple(t.dims) == (64, operator.dim("width"))]
            assert len(first) == 3
        if case.backend.name == "onnxruntime" and operator.kind == "attention":
            fused = [n for n in stack.graph.node if n.op_type in ATTENTION]
            assert [onnx.helper.get_node_attr_value(n, "num_heads") for n in fused] == [operator.dim("heads")] * 3
            assert [n.op_type for n in stack.graph.node].count("Cast") == (case.family.name == "bert")  # one mask for all copies


def _reads_first(operator: Operator) -> bool:
    return ("out", "first token") in operator.attributes


@pytest.mark.parametrize("depth", [1, 3])
def test_the_operator_graph_says_of_which_products_one_token_is_computed(exports, tmp_path, depth):
    """Rows of every product's input in the built graph are those of its operator: the last layer's and the head's are one a sample."""
    for name in ("vit", "bert"):
        case = make_case(exports, name, "onnxruntime")
        point = spaces.candidate(case.space, spaces.genome(case.space, spaces.largest(case.space)) | {"depth": depth})
        model = case.lower(point)
        products = [n for n in model.graph.node if n.op_type in ("MatMul", "Attention")]
        for node in products:
            model.graph.output.append(onnx.helper.make_tensor_value_info(node.output[0], onnx.TensorProto.FLOAT, None))
        session = onnxruntime.InferenceSession(model.SerializeToString())
        feed = case.inputs(np.random.default_rng(0), batch=2)
        rows = {n.output[0]: session.run([n.output[0]], feed)[0].shape[1] for n in products if n.op_type == "MatMul"}
        nodes = network.graph(case.family, case.config, case.space, point, case.target).nodes
        for node in nodes:
            if node.operator.kind in ("attention", "mlp"):
                first = node.operator.dim("sequence") == 1 or _reads_first(node.operator)
                weights = {p for s in case.family.segments(case.config) if s.name == node.name for p in s.quantizable}
                ends = [n.output[0] for n in products if parameter_of(n.input[1]) in weights and n.op_type == "MatMul"]
                assert ends
                assert first == (node.name.startswith(f"layers.{depth - 1}."))
                written = [rows[end] for end in (ends[-1:] if node.operator.kind == "attention" else ends)]
                assert {r == 1 for r in written} == {first}, (node.name, rows)


def test_a_stack_is_a_chain_of_what_a_layer_computes(bert, tmp_path):
    """A stack's copies, with a layer's weights put into them, compute what the torch layers compute one after the other."""
    operator = next(
        n.operator
        for n in network.graph(bert.family, bert.config, bert.space, spaces.largest(bert.space), bert.target).nodes
        if n.operator.kind == "mlp"
    )
    stack = lowering.lower_operator(bert.blueprint, bert.family, bert.config, operator, 2, bert.backend, seed=0)
    for tensor in stack.graph.initializer:
        copy, _, name = tensor.name.removeprefix("copies.").partition(".")
        value = bert.weights[name.removesuffix(".T").replace("layer.0", f"layer.{copy}")]
        tensor.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(value.T if name.endswith(".T") else value), tensor.name))
    x = np.random.default_rng(0).standard_normal((2, 5, 64)).astype(np.float32)
    runner = bert.backend.load(tmp_path, bert.backend.build(stack, bert.target, tmp_path), bert.target)
    want = torch.from_numpy(x)
    with torch.no_grad():
        for layer in bert.model.bert.encoder.layer[:2]:
            want = layer.output(layer.intermediate(want), want)
    np.testing.assert_allclose(runner.run({"hidden": x})["output"], want.numpy(), atol=1e-5)  # float32 sums in another order


def test_an_operator_of_another_model_is_refused(bert):
    foreign = Operator(kind="mlp", dims=(("batch", 1), ("sequence", 8), ("hidden", 64), ("width", 77)))
    with pytest.raises(UnsupportedError, match="width=77"):
        lowering.lower_operator(bert.blueprint, bert.family, bert.config, foreign, 2, bert.backend, seed=0)
