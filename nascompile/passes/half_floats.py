"""Floats become float16; what the network reads and gives stays float32, cast where it enters and leaves."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from nascompile.errors import UnsupportedError
from nascompile.passes import PassContext
from nascompile.passes.graph import Array, Graph, parameter_of

LIMIT = float(np.finfo(np.float16).max)
INFINITE = 1e9
"""Constants beyond this are what a mask adds to the scores it hides; float16's own largest number hides them as well."""
NEAREST_ZERO = float(np.finfo(np.float16).smallest_subnormal)
"""A scale of nearly nothing must not become nothing."""
HALF = ".half"


class HalfFloats:
    name = "half_floats"
    standard = False
    exact = False
    requires = "fold_linear, quantize_linear; only float32 among the floats"
    ensures = "if the candidate is FP16: no float32 but in the graph's inputs and outputs and the Casts beside them"

    def apply(self, model: onnx.ModelProto, context: PassContext) -> onnx.ModelProto:
        if not context.half:
            return model
        scales = {node.input[1] for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")}
        for tensor in model.graph.initializer:
            if tensor.data_type == TensorProto.FLOAT:
                parameter = not {tensor.name, parameter_of(tensor.name)}.isdisjoint(context.parameters)
                tensor.CopyFrom(_half(tensor, tensor.name, parameter, NEAREST_ZERO if tensor.name in scales else -LIMIT))
        graph = Graph(model)
        for node in graph.nodes:
            for attribute in node.attribute:
                if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                    attribute.i = TensorProto.FLOAT16
                elif attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type == TensorProto.FLOAT:
                    attribute.t.CopyFrom(_half(attribute.t, node.name))
        _cast_inputs(graph)
        _cast_outputs(graph)
        return graph.finish()


def _half(tensor: onnx.TensorProto, where: str, parameter: bool = False, least: float = -LIMIT) -> onnx.TensorProto:
    """The tensor in float16, no number below `least`. UnsupportedError for one that float16 cannot hold and no mask needs."""
    value: Array = numpy_helper.to_array(tensor)
    large = np.abs(value[np.abs(value) > LIMIT])
    if large.size and (parameter or large.min() < INFINITE):
        raise UnsupportedError(
            f"float16 cannot hold a number of {where}: {large.max():.3g}, its limit is {LIMIT:,.0f}", hint="build another precision"
        )
    return numpy_helper.from_array(np.clip(value, least, LIMIT).astype(np.float16), tensor.name)


def _cast_inputs(graph: Graph) -> None:
    floats = [v.name for v in graph.model.graph.input if v.type.tensor_type.elem_type == TensorProto.FLOAT]
    graph.rename_uses({name: name + HALF for name in floats})
    graph.nodes[:0] = [graph.node("Cast", f"{name}/Cast", [name], [name + HALF], to=TensorProto.FLOAT16) for name in floats]
    graph.index()


def _cast_outputs(graph: Graph) -> None:
    floats = {v.name: v.name + HALF for v in graph.model.graph.output if v.type.tensor_type.elem_type == TensorProto.FLOAT}
    graph.rename_uses(floats)
    for node in graph.nodes:
        for i, name in enumerate(node.output):
            node.output[i] = floats.get(name, name)
    graph.nodes += [graph.node("Cast", f"{name}/Cast", [half], [name], to=TensorProto.FLOAT) for name, half in floats.items()]
    graph.index()


PLUGIN = HalfFloats()
