"""Every pass leaves the function of a graph as it was, or as its own definition says; graphs and oracles are made by hand here."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from nascompile import lowering, plugins
from nascompile.backends.onnxruntime import integer_passes
from nascompile.errors import UnsupportedError
from nascompile.passes import PassContext
from nascompile.passes.graph import Graph, parameter_of


def model_of(nodes, constants, inputs, outputs=("y",), rank=None):
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, rank and [None] * rank) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def apply(name, model, **context):
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    return plugins.get("passes", name).apply(copied, PassContext(**{"parameters": {}} | context))


def reference(model, **feed):
    return ReferenceEvaluator(model).run(None, feed)


def runtime(model, **feed):
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feed)


def kinds(model):
    return [node.op_type for node in model.graph.node]


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def test_every_pass_is_listed_once_and_described():
    listed = lowering.STRUCTURE_PASSES + lowering.SLICED_PASSES + lowering.PASSES
    assert sorted(listed) == sorted(set(listed)) == sorted(plugins.names("passes"))
    for name in listed:
        step = plugins.get("passes", name)
        assert step.name == name
        assert step.requires
        assert step.ensures
        assert "\n" not in step.requires + step.ensures


def test_inline_constants(rng):
    x = rng.standard_normal(4).astype(np.float32)
    constant = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.float32([1, 2, 3, 4])))
    model = model_of([constant, helper.make_node("Add", ["x", "c"], ["y"])], {}, {"x": (TensorProto.FLOAT, [4])})
    after = apply("inline_constants", model)
    assert kinds(after) == ["Add"]
    np.testing.assert_array_equal(reference(after, x=x)[0], x + np.float32([1, 2, 3, 4]))


def test_split_gemm_keeps_the_function_and_the_module_path(rng):
    w, b, x = (rng.standard_normal(s).astype(np.float32) for s in ((3, 5), (3,), (2, 5)))
    gemm = helper.make_node("Gemm", ["x", "w", "b"], ["y"], name="/m/fc/Gemm", transB=1)
    after = apply("split_gemm", model_of([gemm], {"w": w, "b": b}, {"x": (TensorProto.FLOAT, [2, 5])}))
    assert [node.name for node in after.graph.node] == ["/m/fc/Transpose", "/m/fc/MatMul", "/m/fc/Add"]
    np.testing.assert_allclose(reference(after, x=x)[0], x @ w.T + b, atol=1e-6)  # five float32 products


@pytest.mark.parametrize("attributes", [{"alpha": 2.0, "transB": 1}, {"beta": 0.5, "transB": 1}, {"transA": 1, "transB": 1}, {}])
def test_split_gemm_declines_what_is_no_linear_layer(rng, attributes):
    w = rng.standard_normal((5, 5)).astype(np.float32)
    gemm = helper.make_node("Gemm", ["x", "w"], ["y"], name="/odd/Gemm", **attributes)
    with pytest.raises(UnsupportedError, match="/odd/Gemm"):
        apply("split_gemm", model_of([gemm], {"w": w}, {"x": (TensorProto.FLOAT, [5, 5])}))


def linear_model(rng, bias=True, products=1, name="a.weight"):
    """y{i} = x Wᵀ + b, before fold_linear."""
    nodes, constants = [], {}
    for i in range(products):
        weight = name if products == 1 else f"{'abc'[i]}.weight"
        constants[weight] = (rng.standard_normal((8, 16)) * 0.3).astype(np.float32)
        result = f"m{i}" if bias else f"y{i}"
        nodes.append(helper.make_node("Transpose", [weight], [f"t{i}"], perm=[1, 0]))
        nodes.append(helper.make_node("MatMul", ["x", f"t{i}"], [result], name=f"/{weight}/MatMul"))
        if bias:
            constants[f"b{i}"] = rng.standard_normal(8).astype(np.float32)
            nodes.append(helper.make_node("Add", [f"b{i}", result], [f"y{i}"]))
    outputs = [f"y{i}" for i in range(products)]
    return model_of(nodes, constants, {"x": (TensorProto.FLOAT, ["n", 16])}, outputs, rank=2), constants


def test_fold_linear(rng):
    model, constants = linear_model(rng)
    after = apply("fold_linear", model)
    x = rng.standard_normal((3, 16)).astype(np.float32)
    assert kinds(after) == ["MatMul", "Add"]
    assert {t.name: tuple(t.dims) for t in after.graph.initializer} == {"a.weight.T": (16, 8), "b0": (8,)}
    np.testing.assert_allclose(reference(after, x=x)[0], x @ constants["a.weight"].T + constants["b0"], atol=1e-5)


def test_a_weight_that_is_an_input_becomes_another_input(rng):
    model, constants = linear_model(rng)
    weight = next(t for t in model.graph.initializer if t.name == "a.weight")
    model.graph.initializer.remove(weight)
    model.graph.input.append(helper.make_tensor_value_info("a.weight", TensorProto.FLOAT, (8, 16)))
    after = apply("fold_linear", model, parameters={"a.weight": (8, 16)})
    assert kinds(after) == ["MatMul", "Add"]
    added = after.graph.input[-1]
    assert (added.name, [d.dim_value for d in added.type.tensor_type.shape.dim]) == ("a.weight.T", [16, 8])
    x = rng.standard_normal((3, 16)).astype(np.float32)
    feed = {"x": x, "a.weight": constants["a.weight"], "a.weight.T": constants["a.weight"].T}
    np.testing.assert_allclose(reference(after, **feed)[0], x @ constants["a.weight"].T + constants["b0"], atol=1e-5)


def integer_linear(x, weight, bias, low, high):
    """Static U8S8 linear by its definition, in int64: what an INT8 graph must compute."""
    step = (high - low) / 255
    zero = round(-low / step)
    x_int = np.clip(np.rint(x.astype(np.float64) / step) + zero, 0, 255).astype(np.int64)
    w_step = np.abs(weight.astype(np.float64)).max(axis=1) / 127
    w_int = np.rint(weight / w_step[:, None]).astype(np.int64)
    return (x_int - zero) @ w_int.T * (step * w_step) + bias


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("fused", [False, True])
def test_int8_linear_computes_its_definition(rng, bias, fused):
    model, constants = linear_model(rng, bias)
    context = {"quantized": {"a.weight": "int8"}, "ranges": {"a.weight": (-1.0, 3.0)}}
    after = apply("quantize_linear", apply("fold_linear", model), **context)
    assert kinds(after).count("DequantizeLinear") == 2
    if fused:
        after = apply("fuse_integer_matmul", after)
        assert sorted(kinds(after)) == ["MatMulIntegerToFloat", "QuantizeLinear"]
        assert after.graph.node[1].name == "/a.weight/MatMul"
    onnx.checker.check_model(after)
    x = rng.uniform(-2, 4, (64, 16)).astype(np.float32)  # beyond the range on both sides: clipping is part of the definition
    want = integer_linear(x, constants["a.weight"], constants["b0"] if bias else 0.0, -1.0, 3.0)
    for run in (runtime,) if fused else (runtime, reference):
        # one step of one input times the largest weight: x / scale in float32 may round to the other side of a tie
        np.testing.assert_allclose(run(after, x=x)[0], want, atol=4 / 255 * np.abs(constants["a.weight"]).max())
        assert np.median(np.abs(run(after, x=x)[0] - want)) < 1e-6  # ties are rare; everything else is float32 rounding


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("fused", [False, True])
def test_dynamic_int8_takes_the_range_of_the_whole_input_in_each_call(rng, bias, fused):
    model, constants = linear_model(rng, bias)
    after = apply("quantize_linear", apply("fold_linear", model), quantized={"a.weight": "int8-dynamic"})
    assert kinds(after).count("DynamicQuantizeLinear") == 1
    if fused:
        after = apply("fuse_integer_matmul", after)
        assert sorted(kinds(after)) == ["DynamicQuantizeLinear", "MatMulIntegerToFloat"]
    onnx.checker.check_model(after)
    for low, high in ((-2, 4), (0.5, 1.0), (-0.1, 0.0)):  # a range that does not hold 0 is stretched to it
        x = rng.uniform(low, high, (64, 16)).astype(np.float32)
        want = integer_linear(x, constants["a.weight"], constants["b0"] if bias else 0.0, min(x.min(), 0.0), max(x.max(), 0.0))
        for run in (runtime,) if fused else (runtime, reference):
            found = run(after, x=x)[0]
            # one step of one input times the largest weight: x / scale in float32 may round to the other side of a tie
            np.testing.assert_allclose(found, want, atol=(high - min(low, 0)) / 255 * np.abs(constants["a.weight"]).max())
            assert np.median(np.abs(found - want)) < 1e-6
    zeros = np.zeros((2, 16), np.float32)
    np.testing.assert_array_equal(runtime(after, x=zeros)[0], np.broadcast_to(constants["b0"] if bias else np.zeros(8), (2, 8)))


def test_products_of_one_tensor_find_its_range_once(rng):
    model, _ = linear_model(rng, products=3)
    quantized = {"a.weight": "int8-dynamic", "b.weight": "int8-dynamic", "c.weight": "int8"}
    after = apply("quantize_linear", apply("fold_linear", model), quantized=quantized, ranges={"c.weight": (-2.0, 1.0)})
    assert (kinds(after).count("DynamicQuantizeLinear"), kinds(after).count("QuantizeLinear")) == (1, 1)
    x = rng.uniform(-1, 1, (4, 16)).astype(np.float32)
    for got, want in zip(runtime(apply("fuse_integer_matmul", after), x=x), reference(after, x=x), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)  # the same integers; float32 sums in another order


def wide_linear(rng, columns, bias):
    weight, vector = rng.standard_normal((8, columns)).astype(np.float32), rng.standard_normal(8).astype(np.float32)
    nodes = [helper.make_node("MatMul", ["x", "a.weight.T"], ["m" if bias else "y"], name="/a/MatMul")]
    nodes += [helper.make_node("Add", ["b0", "m"], ["y"])] if bias else []
    constants = {"a.weight.T": weight.T.copy()} | ({"b0": vector} if bias else {})
    return model_of(nodes, constants, {"x": (TensorProto.FLOAT, ["n", columns])}, rank=2), weight, vector if bias else 0.0


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("columns", [64, 80, 160])
@pytest.mark.parametrize(("bits", "size"), [(4, 32), (4, 128), (8, 32), (8, 128)])
def test_groups_are_multiplied_as_scale_times_integers(rng, bits, size, columns, bias):
    model, weight, vector = wide_linear(rng, columns, bias)
    after = apply("quantize_blocks", model, quantized={"a.weight": f"weight-int{bits}-block{size}"})
    assert kinds(after) == ["MatMulNBits"]
    assert after.graph.node[0].name == "/a/MatMul"
    stored = {t.name: (t.data_type, tuple(t.dims)) for t in after.graph.initializer}
    groups = -(-columns // size)
    assert stored.pop("a.weight.blocks") == (TensorProto.UINT8, (8, groups, size * bits // 8))
    assert stored.pop("a.weight.scale") == (TensorProto.FLOAT, (8, groups))
    assert set(stored) == ({"b0"} if bias else set())
    top, rounded = 2 ** (bits - 1) - 1, np.zeros_like(weight)
    for r in range(8):
        for start in range(0, columns, size):
            part = weight[r, start : start + size]
            step = np.abs(part).max() / np.float32(top)
            rounded[r, start : start + size] = np.rint(part / step) * step
    assert 1e-3 < np.abs(rounded - weight).max() < 0.5
    x = rng.standard_normal((5, columns)).astype(np.float32)
    np.testing.assert_allclose(runtime(after, x=x)[0], x @ rounded.T + vector, atol=1e-4)  # float32 sums of 160 terms near 1
    assert parameter_of("a.weight.blocks") == "a.weight"


def test_groups_leave_other_precisions_and_other_weights_alone(rng):
    model, _, _ = wide_linear(rng, 64, True)
    for quantized in ({"a.weight": "int8"}, {"b.weight": "weight-int4-block32"}):
        assert kinds(apply("quantize_blocks", model, quantized=quantized)) == ["MatMul", "Add"]
    assert kinds(apply("quantize_linear", model, quantized={"a.weight": "weight-int4-block32"})) == ["MatMul", "Add"]


def test_unsigned_weights_are_the_same_numbers(rng):
    model, _ = linear_model(rng)
    context = {"quantized": {"a.weight": "int8"}, "ranges": {"a.weight": (-1.0, 3.0)}}
    signed = apply("quantize_linear", apply("fold_linear", model), **context)
    unsigned = apply("unsigned_weights", signed)
    x = rng.uniform(-2, 4, (64, 16)).astype(np.float32)
    np.testing.assert_array_equal(reference(unsigned, x=x)[0], reference(signed, x=x)[0])
    fused = apply("fuse_integer_matmul", unsigned)
    stored = {t.name: t.data_type for t in fused.graph.initializer}
    assert stored["a.weight.T.u8.int8"] == stored["a.weight.T.u8.zero_point"] == TensorProto.UINT8
    np.testing.assert_allclose(
        runtime(fused, x=x)[0], reference(signed, x=x)[0], atol=1e-5
    )  # the same integers; float32 sums in another order


def test_processors_without_vnni_get_unsigned_weights():
    assert integer_passes("x86_64", frozenset({"avx2", "avx512f"})) == ("unsigned_weights",)
    assert integer_passes("AMD64", frozenset()) == ("unsigned_weights",)
    assert integer_passes("x86_64", frozenset({"avx2", "avx_vnni"})) == ()
    assert integer_passes("aarch64", frozenset()) == ()


def test_products_share_a_quantized_input_exactly_where_the_grid_is_the_same(rng):
    model, _ = linear_model(rng, products=3)
    ranges = {"a.weight": (-1.0, 1.0), "b.weight": (-1.0, 1.0), "c.weight": (-2.0, 1.0)}
    after = apply("quantize_linear", apply("fold_linear", model), quantized=dict.fromkeys(ranges, "int8"), ranges=ranges)
    assert kinds(after).count("QuantizeLinear") == 2
    x = rng.uniform(-1, 1, (4, 16)).astype(np.float32)
    for got, want in zip(runtime(apply("fuse_integer_matmul", after), x=x), reference(after, x=x), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)  # the same integers; float32 sums in another order


def integer_attention_model(rng, *, width=16, bias=True, padded=True, ranges=(1.0, 1.0, 1.0), quantized=True, **attributes):
    """MultiHeadAttention of two heads over three INT8 products of x (batch, sequence, width), in the runtime's operators."""
    nodes, constants = [], {}
    for name in "abc":
        constants[f"{name}.weight.T"] = (rng.standard_normal((width, 8)) * width**-0.5).astype(np.float32)
        constants[f"{name}.bias"] = rng.standard_normal(8).astype(np.float32)
        product = f"{name}p" if bias else name
        nodes.append(helper.make_node("MatMul", ["x", f"{name}.weight.T"], [product], name=f"/core/{name}/MatMul"))
        if bias:
            nodes.append(helper.make_node("Add", [f"{name}.bias", product], [name]))
    inputs = ["a", "b", "c", *(["", "padding"] if padded else [])]
    kind = {"domain": "com.microsoft", "num_heads": 2, "name": "/core/MultiHeadAttention"}
    nodes.append(helper.make_node("MultiHeadAttention", inputs, ["y"], **kind, **attributes))
    known = {"x": (TensorProto.FLOAT, ["b", "s", width])} | ({"padding": (TensorProto.INT32, ["b", "s"])} if padded else {})
    model = model_of(nodes, constants, known, rank=3)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    if not quantized:
        return model
    spans = {f"{name}.weight": (-1.0, high) for name, high in zip("abc", ranges, strict=True)}
    return apply("quantize_linear", model, quantized=dict.fromkeys(spans, "int8"), ranges=spans)


@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_integer_attention_is_the_same_function(rng, padded, unsigned):
    model = integer_attention_model(rng, padded=padded)
    apart = apply("fuse_integer_matmul", apply("unsigned_weights", model) if unsigned else model)
    joined = apply("fuse_integer_attention", apart)
    assert sorted(kinds(joined)) == ["QAttention", "QuantizeLinear"]
    weight = next(t for t in joined.graph.initializer if t.name.endswith(".int8"))
    assert parameter_of(weight.name).split("+") == ["a.weight", "b.weight", "c.weight"]
    assert tuple(weight.dims) == (16, 24)
    feed = {"x": rng.uniform(-1.5, 1.5, (3, 5, 16)).astype(np.float32)}
    if padded:
        feed["padding"] = np.int32([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    np.testing.assert_allclose(runtime(joined, **feed)[0], runtime(apart, **feed)[0], atol=1e-5)  # softmax in another order


def float_attention_model(rng, **changes):
    """As above in floats: what `fuse_float_attention` finds."""
    return integer_attention_model(rng, quantized=False, **changes)


@pytest.mark.parametrize("padded", [False, True])
def test_float_attention_is_the_same_function(rng, padded):
    model = float_attention_model(rng, padded=padded)
    joined = apply("fuse_float_attention", model)
    assert kinds(joined) == ["Attention"]
    weight = next(t for t in joined.graph.initializer if t.name.endswith(".T"))
    assert parameter_of(weight.name).split("+") == ["a.weight", "b.weight", "c.weight"]
    assert tuple(weight.dims) == (16, 24)  # heads of 4 of a network of 16: as after slicing
    feed = {"x": rng.uniform(-1.5, 1.5, (3, 5, 16)).astype(np.float32)}
    if padded:
        feed["padding"] = np.int32([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    np.testing.assert_allclose(runtime(joined, **feed)[0], runtime(model, **feed)[0], atol=1e-5)  # softmax in another order


@pytest.mark.parametrize("case", [{"width": 288}, {"bias": False}, {"scale": 0.25}])
def test_float_attention_leaves_what_it_cannot_take_or_what_it_would_slow(rng, case):
    model = float_attention_model(rng, **case)
    assert "Attention" not in kinds(apply("fuse_float_attention", model))


@pytest.mark.parametrize("case", [{"width": 544}, {"bias": False}, {"ranges": (1.0, 1.0, 2.0)}, {"scale": 0.25}])
def test_integer_attention_leaves_what_it_cannot_take_or_what_it_would_slow(rng, case):
    apart = apply("fuse_integer_matmul", integer_attention_model(rng, **case))
    assert "QAttention" not in kinds(apply("fuse_integer_attention", apart))


def test_only_named_weights_are_quantized_and_a_missing_range_is_refused(rng):
    model = apply("fold_linear", linear_model(rng)[0])
    assert kinds(apply("quantize_linear", model, quantized={"other.weight": "int8"})) == ["MatMul", "Add"]
    with pytest.raises(UnsupportedError, match=r"a\.weight"):
        apply("quantize_linear", model, quantized={"a.weight": "int8"})


def test_quantized_table_rows_are_scale_times_integers(rng):
    table = rng.standard_normal((20, 6)).astype(np.float32)
    ids = rng.integers(0, 20, (2, 5))
    gather = helper.make_node("Gather", ["t.weight", "ids"], ["y"], name="/t/Gather")
    model = model_of([gather], {"t.weight": table}, {"ids": (TensorProto.INT64, ["b", "s"])})
    after = apply("quantize_table", model, quantized={"t.weight": "weight-int8"})
    scale = (np.abs(table).max(axis=1, keepdims=True) / np.float32(127)).astype(np.float32)
    integers = np.rint(table / scale).astype(np.int8)
    for run in (reference, runtime):
        np.testing.assert_array_equal(run(after, ids=ids)[0], (integers.astype(np.float32) * scale)[ids])
    stored = {t.name: t.data_type for t in after.graph.initializer}
    assert stored == {"t.weight.int8": TensorProto.INT8, "t.weight.scale": TensorProto.FLOAT}


# ---------------------------------------------------------------------------------------------- attention


def attention_model(mask="", scale=0.5, divide=False):
    """Two heads of 4 on (batch, sequence, 8), as the exporter writes them; the context goes through an output linear."""
    n = helper.make_node
    nodes, constants = (
        [],
        {"four": np.int64([0, 0, -1, 4]), "three": np.int64([0, 0, -1]), "scale": np.float32(1 / scale if divide else scale)},
    )
    for name in "qkvo":
        x = "context" if name == "o" else "x"
        nodes += [n("Transpose", [f"{name}.weight"], [f"{name}t"], perm=[1, 0]), n("MatMul", [x, f"{name}t"], [f"{name}m"])]
        nodes.append(n("Add", [f"{name}.bias", f"{name}m"], ["y" if name == "o" else f"{name}l"]))
        if name != "o":
            nodes.append(n("Reshape", [f"{name}l", "four"], [f"{name}r"]))
            nodes.append(n("Transpose", [f"{name}r"], [f"{name}h"], perm=[0, 2, 3, 1] if name == "k" else [0, 2, 1, 3]))
    nodes += [n("MatMul", ["qh", "kh"], ["s0"]), n("Div" if divide else "Mul", ["s0", "scale"], ["s1"])]
    if mask:
        constants |= {"least": np.float32(-3e38), "none": np.float32(0), "axes": np.int64([1, 2]), "causal": np.tril(np.ones((5, 5), bool))}
        nodes += [n("Cast", ["attention_mask"], ["mb"], to=TensorProto.BOOL), n("Unsqueeze", ["mb", "axes"], ["mu"])]
        nodes += [n("Shape", ["attention_mask"], ["ms"]), n("Gather", ["ms", "last"], ["mn"])]
        constants |= {"last": np.int64([1]), "start": np.int64([0, 0]), "both": np.int64([0, 1])}
        nodes += [n("Concat", ["mn", "mn"], ["mnn"], axis=0), n("Slice", ["causal", "start", "mnn", "both"], ["mc"])]
        nodes.append(n("And", ["mu", "mc"], ["ma"]) if mask == "causal" else n("Identity", ["mu"], ["ma"]))
        nodes += [n("Where", ["ma", "none", "least"], ["additive"]), n("Add", ["s1", "additive"], ["s2"])]
    nodes += [n("Softmax", ["s2" if mask else "s1"], ["p"], name="/attention/Softmax", axis=-1), n("MatMul", ["p", "vh"], ["c0"])]
    nodes += [n("Transpose", ["c0"], ["c1"], perm=[0, 2, 1, 3]), n("Reshape", ["c1", "three"], ["context"])]
    inputs = {"x": (TensorProto.FLOAT, ["batch", "sequence", 8])}
    inputs |= {"attention_mask": (TensorProto.INT64, ["batch", "sequence"])} if mask else {}
    shapes = {f"{name}.{kind}": (8, 8)[: 2 if kind == "weight" else 1] for name in "qkvo" for kind in ("weight", "bias")}
    model = model_of(nodes, constants, inputs | {name: (TensorProto.FLOAT, shape) for name, shape in shapes.items()})
    model = Graph(model).finish()  # in execution order
    return model, shapes


@pytest.mark.parametrize("divide", [False, True])
@pytest.mark.parametrize("scale", [0.5, 0.3])
@pytest.mark.parametrize("mask", ["", "padding"])
def test_fused_attention_computes_the_same(rng, mask, scale, divide):
    model, shapes = attention_model(mask, scale, divide)
    after = apply("fuse_attention", model, parameters=shapes)
    assert "Softmax" not in kinds(after)
    attention = next(node for node in after.graph.node if node.op_type == "MultiHeadAttention")
    assert attention.name == "/attention/MultiHeadAttention"
    # 0.5 = 1/√4 is the operator's own default
    assert {a.name for a in attention.attribute} == ({"num_heads"} if scale == 0.5 else {"num_heads", "scale"})
    assert kinds(after).count("Cast") == bool(mask)
    feed = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    feed["x"] = rng.standard_normal((2, 5, 8)).astype(np.float32)
    if mask:
        feed["attention_mask"] = np.int64([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    np.testing.assert_allclose(runtime(after, **feed)[0], reference(model, **feed)[0], atol=1e-4)  # outputs reach 30; float32 sums
    feed["q.weight"] = feed["q.weight"] * 2
    assert np.abs(runtime(after, **feed)[0] - runtime(model, **feed)[0]).max() < 1e-4


@pytest.mark.parametrize("scale", [0.5, 0.3])
@pytest.mark.parametrize("mask", ["", "padding"])
def test_expanded_attention_computes_the_same(rng, mask, scale):
    model, shapes = attention_model(mask, scale)
    after = apply("expand_attention", apply("fuse_attention", model, parameters=shapes), parameters=shapes)
    assert {node.domain for node in after.graph.node} == {""}
    assert kinds(after).count("Where") == bool(mask)
    softmax = next(node for node in after.graph.node if node.op_type == "Softmax")
    assert Graph(after).producer[softmax.input[0]].op_type == ("Add" if mask else "MatMul"), "the factor is the query's"
    feed = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    feed["x"] = rng.standard_normal((2, 5, 8)).astype(np.float32)
    if mask:
        feed["attention_mask"] = np.int64([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    want = reference(model, **feed)[0]
    np.testing.assert_allclose(reference(after, **feed)[0], want, atol=1e-4)  # outputs reach 30; float32 sums
    if mask:
        feed["attention_mask"] = np.ones((2, 5), np.int64)
        assert np.abs(reference(after, **feed)[0] - want).max() > 1e-2, "the mask hides something"


def test_expanded_attention_follows_the_heads_that_are_left(rng):
    """One head of two: the first half of the rows, in a graph that was expanded before it was cut."""
    model, shapes = attention_model("", 0.3)
    after = apply("expand_attention", apply("fuse_attention", model, parameters=shapes), parameters=shapes)
    feed = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    feed["x"] = rng.standard_normal((2, 5, 8)).astype(np.float32)
    cut = feed | {f"{name}.{kind}": feed[f"{name}.{kind}"][:4] for name in "qkv" for kind in ("weight", "bias")}
    cut["o.weight"] = feed["o.weight"][:, :4]
    without = feed | {"o.weight": np.concatenate([cut["o.weight"], np.zeros((8, 4), np.float32)], axis=1)}
    np.testing.assert_allclose(reference(after, **cut)[0], reference(model, **without)[0], atol=1e-4)  # float32 sums of terms near 10


def test_attention_that_is_more_than_a_mask_is_not_expanded():
    model, shapes = attention_model("padding")
    fused = apply("fuse_attention", model, parameters=shapes)
    attention = next(node for node in fused.graph.node if node.op_type == "MultiHeadAttention")
    attention.input.append("a_bias_of_the_scores")
    with pytest.raises(UnsupportedError, match="attention of an unknown form"):
        apply("expand_attention", fused, parameters=shapes)


def test_a_mask_that_hides_more_than_padding_is_refused():
    model, shapes = attention_model("causal")
    with pytest.raises(UnsupportedError, match="hides more than padded keys"):
        apply("fuse_attention", model, parameters=shapes)


def test_something_else_added_to_the_scores_is_refused(rng):
    model, shapes = attention_model("padding")
    for node in model.graph.node:
        if node.op_type == "Add" and "additive" in node.input:
            node.input[1] = "bias"
    model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal((2, 1, 1)).astype(np.float32), "bias"))
    with pytest.raises(UnsupportedError, match="no padding mask"):
        apply("fuse_attention", model, parameters=shapes)


def test_parameter_names_survive_every_suffix():
    for suffix in ("", ".T", ".int8", ".T.int8", ".T.u8.int8", ".T.scale", ".T.zero_point", ".scale"):
        assert parameter_of(f"layers.0.fc.weight{suffix}") == "layers.0.fc.weight"


@pytest.mark.parametrize(("source", "value", "fused"), [("Shape", 0.0, True), ("Shape", 1.0, False), ("x", 0.0, False)])
def test_only_a_mask_that_is_zero_whatever_the_inputs_hold_goes(source, value, fused):
    """Some versions of transformers trace a network without padding with a mask made from the shape of its input."""
    model, shapes = attention_model()
    n = helper.make_node
    made = [n("Shape", ["x"], ["xs"]), n("Gather", ["xs", "one"], ["size"]), n("Expand", ["added", "size"], ["all"])]
    made = made if source == "Shape" else [n("ReduceMax", ["x"], ["most"], keepdims=0), n("Mul", ["most", "added"], ["all"])]
    for node in model.graph.node:
        if node.op_type == "Softmax":
            node.input[0] = "masked"
    model.graph.node.extend([*made, n("Add", ["s1", "all"], ["masked"])])
    model.graph.initializer.append(numpy_helper.from_array(np.int64([1]), "one"))
    model.graph.initializer.append(numpy_helper.from_array(np.float32(value), "added"))
    model = Graph(model).finish()
    if not fused:
        with pytest.raises(UnsupportedError, match="no padding mask"):
            apply("fuse_attention", model, parameters=shapes)
        return
    after = kinds(apply("fuse_attention", model, parameters=shapes))
    assert "MultiHeadAttention" in after
    assert "Expand" not in after


# ---------------------------------------------------------------------------------------------- constants and what does nothing


def test_constants_are_folded_and_shapes_that_are_known(rng):
    n = helper.make_node
    nodes = [
        n("Unsqueeze", ["two", "axis"], ["vector"]), n("Shape", ["w"], ["size"]), n("Shape", ["x"], ["open"]),
        n("Gather", ["open", "zero"], ["batch"]), n("Unsqueeze", ["batch", "axis"], ["first"]),
        n("Concat", ["first", "vector", "rest"], ["target"], axis=0), n("Reshape", ["x", "target"], ["r"]),
        n("Gather", ["size", "zero"], ["rows"]), n("Cast", ["rows"], ["factor"], to=TensorProto.FLOAT), n("Mul", ["r", "factor"], ["y"]),
        n("RandomNormal", [], ["noise"], shape=[2]),
    ]  # fmt: skip
    constants = {"two": np.int64(2), "axis": np.int64([0]), "zero": np.int64(0), "rest": np.int64([-1])}
    model = model_of(nodes, constants, {"x": (TensorProto.FLOAT, ["batch", 6]), "w": (TensorProto.FLOAT, [5, 3])}, rank=3)
    after = apply("fold_constants", model)
    assert kinds(after) == ["Shape", "Gather", "Unsqueeze", "Concat", "Reshape", "Mul"]  # the batch is not known
    x = rng.standard_normal((4, 6)).astype(np.float32)
    np.testing.assert_array_equal(reference(after, x=x, w=np.zeros((5, 3), np.float32))[0], x.reshape(4, 2, 3) * 5)


def test_a_large_result_is_left_to_be_computed():
    nodes = [helper.make_node("ConstantOfShape", ["shape"], ["large"]), helper.make_node("Add", ["x", "large"], ["y"])]
    for size, left in ((1 << 16, ["Add"]), ((1 << 16) + 1, ["ConstantOfShape", "Add"])):
        model = model_of(nodes, {"shape": np.int64([size])}, {"x": (TensorProto.FLOAT, [size])})
        assert kinds(apply("fold_constants", model)) == left


def test_what_gives_back_what_it_reads_is_dropped(rng):
    n = helper.make_node
    nodes = [
        n("Identity", ["x"], ["a"]), n("Cast", ["a"], ["b"], to=TensorProto.FLOAT), n("Dropout", ["b"], ["c"]),
        n("Transpose", ["c"], ["d"], perm=[0, 1]), n("Shape", ["d"], ["s"]), n("Reshape", ["s", "flat"], ["v"]),
        n("Reshape", ["d", "v"], ["e"]), n("Transpose", ["e"], ["f"], perm=[1, 0]), n("Reshape", ["f", "flat"], ["g"]),
        n("Cast", ["g"], ["h"], to=TensorProto.FLOAT16), n("Cast", ["h"], ["i"], to=TensorProto.FLOAT), n("Identity", ["i"], ["y"]),
    ]  # fmt: skip
    model = model_of(nodes, {"flat": np.int64([-1])}, {"x": (TensorProto.FLOAT, ["batch", 3])}, rank=1)
    after = apply("drop_no_ops", model)
    # what moves numbers, rounds them or makes an output stays
    assert kinds(after) == ["Shape", "Reshape", "Transpose", "Reshape", "Cast", "Cast", "Identity"]
    x = rng.standard_normal((4, 3)).astype(np.float32)
    np.testing.assert_array_equal(reference(after, x=x)[0], reference(model, x=x)[0])


def class_token_model(rng, index=0, also_read=False):
    """y = first token of LN(h + MLP(h)) for h = softmax(x) over the tokens: what mixes tokens, and then a block that does not."""
    n = helper.make_node
    nodes = [
        n("Softmax", ["x"], ["h"], axis=1), n("MatMul", ["h", "up"], ["u0"]), n("Add", ["u0", "bias"], ["u1"]), n("Gelu", ["u1"], ["u2"]),
        n("MatMul", ["u2", "down"], ["d0"]), n("Add", ["h", "d0"], ["r"]), n("LayerNormalization", ["r", "one", "zero"], ["norm"]),
        n("Gather", ["norm", "index"], ["y"], axis=1),
    ]  # fmt: skip
    constants = {
        "up": rng.standard_normal((4, 8)).astype(np.float32), "bias": rng.standard_normal(8).astype(np.float32),
        "down": rng.standard_normal((8, 4)).astype(np.float32), "one": np.ones(4, np.float32), "zero": np.zeros(4, np.float32),
        "index": np.array(index, np.int64),
    }  # fmt: skip
    outputs = ("y", "u2") if also_read else ("y",)
    return model_of(nodes, constants, {"x": (TensorProto.FLOAT, ["batch", "sequence", 4])}, outputs)


def test_tokens_that_nobody_reads_are_not_computed(rng):
    model = class_token_model(rng)
    after = apply("drop_unread_tokens", model)
    assert kinds(after).count("Gather") == 2  # one before everything that works token by token, and the one that was there
    assert kinds(after).index("Gather") == 1
    x = rng.standard_normal((3, 5, 4)).astype(np.float32)
    np.testing.assert_allclose(runtime(after, x=x)[0], runtime(model, x=x)[0], atol=1e-6)  # float sums of other shapes


@pytest.mark.parametrize("case", [{"index": 1}, {"also_read": True}])
def test_tokens_that_are_read_stay(rng, case):
    model = class_token_model(rng, **case)
    after = apply("drop_unread_tokens", model)
    x = rng.standard_normal((3, 5, 4)).astype(np.float32)
    for got, want in zip(runtime(after, x=x), runtime(model, x=x), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)
    assert kinds(after).count("Gather") == (1 if "index" in case else 3)


def test_a_range_over_all_tokens_keeps_them(rng):
    model = class_token_model(rng)
    assert kinds(apply("drop_unread_tokens", model, quantized={"up": "int8-dynamic"})) == kinds(model)
