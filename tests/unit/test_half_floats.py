"""A graph in half precision: what may be float16 is, what float16 cannot hold is refused; oracles are made by hand here."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from nascompile import plugins
from nascompile.errors import UnsupportedError
from nascompile.passes import PassContext


def model_of(nodes, constants, inputs):
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, None])],
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


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def half_model(weight, hidden=-3.4e38):
    """x (2, 4) · w + b, where y keeps what the mask allows and hides the rest."""
    nodes = [
        helper.make_node("MatMul", ["x", "w.T"], ["p"], name="/a/MatMul"),
        helper.make_node("Add", ["p", "b"], ["s"], name="/a/Add"),
        helper.make_node("Cast", ["allowed"], ["bits"], name="/a/Cast", to=TensorProto.BOOL),
        helper.make_node("Where", ["bits", "zero", "hidden"], ["m"], name="/a/Where"),
        helper.make_node("Shape", ["s"], ["shape"], name="/a/Shape"),
        helper.make_node("ConstantOfShape", ["shape"], ["ones"], name="/a/Ones", value=numpy_helper.from_array(np.ones(1, np.float32))),
        helper.make_node("Mul", ["s", "ones"], ["t"], name="/a/Mul"),
        helper.make_node("Add", ["t", "m"], ["u"], name="/a/Mask"),
        helper.make_node("Softmax", ["u"], ["y"], name="/a/Softmax", axis=-1),
    ]
    constants = {"w.T": weight, "b": np.array([0.1, -0.2, 0.3], np.float32), "zero": np.float32(0), "hidden": np.float32(hidden)}
    return model_of(nodes, constants, {"x": (TensorProto.FLOAT, [2, 4]), "allowed": (TensorProto.INT64, [2, 3])})


def test_half_floats_are_everywhere_but_at_the_border(rng):
    model = half_model(rng.standard_normal((4, 3)).astype(np.float32))
    assert apply("half_floats", model, half=False) == model, "only candidates that are FP16 become so"
    found = apply("half_floats", model, parameters={"w": (3, 4)}, half=True)
    onnx.checker.check_model(found, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(found, strict_mode=True, data_prop=True)
    kinds_of = {v.name: v.type.tensor_type.elem_type for v in (*inferred.graph.value_info, *found.graph.input, *found.graph.output)}
    assert {name for name, kind in kinds_of.items() if kind == TensorProto.FLOAT} == {"x", "y"}
    assert {t.data_type for t in found.graph.initializer} == {TensorProto.FLOAT16}
    feed = {"x": rng.standard_normal((2, 4)).astype(np.float32), "allowed": np.array([[1, 1, 0], [1, 0, 1]])}
    got, want = reference(found, **feed)[0], reference(model, **feed)[0]
    assert got.dtype == np.float32
    # eps is 2⁻¹⁰: inputs, weights and sums of four are rounded, softmax's slope is at most 1/4 per score
    np.testing.assert_allclose(got, want, atol=8 * 2**-10)
    assert not np.array_equal(got, want)
    assert (got[feed["allowed"] == 0] == 0).all(), "what a mask hides stays hidden"


def test_half_floats_refuse_what_half_cannot_hold(rng):
    weight = rng.standard_normal((4, 3)).astype(np.float32)
    weight[1, 1] = -7e4
    with pytest.raises(UnsupportedError, match=r"w\.T: 7e\+04"):
        apply("half_floats", half_model(weight), parameters={"w": (3, 4)}, half=True)
    weight[1, 1] = 1e30  # a mask may be as large, a weight not
    with pytest.raises(UnsupportedError, match=r"w\.T"):
        apply("half_floats", half_model(weight), parameters={"w": (3, 4)}, half=True)
    weight[1, 1] = 65504
    with pytest.raises(UnsupportedError, match="hidden: 1e\\+06"):
        apply("half_floats", half_model(weight, hidden=-1e6), parameters={"w": (3, 4)}, half=True)


def test_half_floats_keep_scales_positive_and_integers(rng):
    weight = rng.standard_normal((4, 3)).astype(np.float32) * np.array([1e-9, 1.0, 0.0], np.float32)
    model = model_of(
        [helper.make_node("MatMul", ["x", "w.T"], ["y"], name="/a/MatMul")], {"w.T": weight}, {"x": (TensorProto.FLOAT, [2, 4])}
    )
    context = {"parameters": {"w": (3, 4)}, "quantized": {"w": "int8-symmetric"}, "ranges": {"w": (-1.0, 3.0)}}
    quantized = apply("quantize_linear", model, **context)
    stored = {t.name: numpy_helper.to_array(t) for t in quantized.graph.initializer}
    assert {name: value.dtype for name, value in stored.items() if "zero_point" in name} == {
        "x.zero_point": np.int8, "w.T.zero_point": np.int8,
    }  # fmt: skip
    assert not any(value.any() for name, value in stored.items() if "zero_point" in name)
    found = apply("half_floats", quantized, **context, half=True)
    onnx.checker.check_model(found, full_check=True)
    halved = {t.name: numpy_helper.to_array(t) for t in found.graph.initializer}
    assert (halved["w.T.scale"] > 0).all()
    assert (halved["w.T.scale"].dtype, halved["w.T.int8"].dtype) == (np.float16, np.int8)
    np.testing.assert_allclose(halved["w.T.scale"], stored["w.T.scale"], rtol=2**-11, atol=2**-24)
    feed = {"x": rng.uniform(-4, 4, (2, 4)).astype(np.float32)}
    steps = np.clip(np.rint(feed["x"] / (3 / 127)), -128, 127)  # by hand: one signed grid, no zero point
    np.testing.assert_allclose(runtime(found, **feed)[0], steps * (3 / 127) @ weight, atol=0.05)  # half a step of 0.024 on four inputs
