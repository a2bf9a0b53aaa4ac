"""Linears of quantized blocks in QDQ form: inputs through an 8-bit grid, weights int8 with a scale per output channel.

The grid of an input is calibrated, or, in a precision that finds it in each call, that of DynamicQuantizeLinear.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from nascompile import plugins
from nascompile.errors import UnsupportedError
from nascompile.passes import PassContext
from nascompile.passes.graph import INT8, SCALE, TRANSPOSED, ZERO_POINT, Graph


class QuantizeLinear:
    name = "quantize_linear"
    standard = True
    exact = False
    requires = "fold_linear; a range for the input of every quantized product with a calibrated grid"
    ensures = "every product of integers reads DequantizeLinear twice; products that read one tensor on one grid share its QuantizeLinear"

    def apply(self, model: onnx.ModelProto, context: PassContext) -> onnx.ModelProto:
        graph = Graph(model)
        grids: dict[tuple[str, float, int], str] = {}
        dynamic: dict[str, str] = {}
        for node in [n for n in graph.nodes if n.op_type == "MatMul"]:
            weight = node.input[1].removesuffix(TRANSPOSED)
            precision = context.quantized.get(weight)
            if precision is None or node.input[1] not in graph.constants:
                continue
            scheme = plugins.get("quantization", precision)
            if scheme.precision.dynamic:
                node.input[1] = _quantized_weight(graph, node.input[1], scheme)
                tensor = node.input[0]
                node.input[0] = dynamic[tensor] = dynamic.get(tensor) or _dynamic_input(graph, tensor)
                graph.index()
                continue
            if not scheme.precision.calibrated:
                continue
            if weight not in context.ranges:
                raise UnsupportedError(
                    f"no calibrated range for the input of a quantized product: {weight}",
                    hint="calibrate the candidate before lowering it",
                )
            grid = scheme.activation_parameters(*context.ranges[weight])
            key = (node.input[0], *grid)
            if key not in grids:
                zero_point = (np.int8 if scheme.precision.activations.signed else np.uint8)(grid[1])
                grids[key] = _quantized_input(graph, node.input[0], grid[0], zero_point, sum(k[0] == node.input[0] for k in grids))
            node.input[1] = _quantized_weight(graph, node.input[1], scheme)
            node.input[0] = grids[key]
            graph.index()
        return graph.finish()


def _quantized_input(graph: Graph, tensor: str, scale: float, zero_point: np.integer[Any], number: int) -> str:
    """The tensor after a round trip through the zero point's grid; `number`: how many other grids the tensor has already."""
    base = tensor.removesuffix("_output_0") + (f".{number}" if number else "")
    parameters = [
        graph.add_constant(base + SCALE, np.float32(scale)),
        graph.add_constant(base + ZERO_POINT, zero_point),
    ]
    integers, result = f"{base}/QuantizeLinear_output_0", f"{base}/DequantizeLinear_output_0"
    graph.nodes.append(graph.node("QuantizeLinear", f"{base}/QuantizeLinear", [tensor, *parameters], [integers]))
    graph.nodes.append(graph.node("DequantizeLinear", f"{base}/DequantizeLinear", [integers, *parameters], [result]))
    return result


def _dynamic_input(graph: Graph, tensor: str) -> str:
    """The tensor after a round trip through the grid of its own range."""
    base = tensor.removesuffix("_output_0")
    quantized = [f"{base}/DynamicQuantizeLinear_output_{i}" for i in range(3)]
    result = f"{base}/DynamicQuantizeLinear/DequantizeLinear_output_0"
    graph.nodes.append(graph.node("DynamicQuantizeLinear", f"{base}/DynamicQuantizeLinear", [tensor], quantized))
    graph.nodes.append(graph.node("DequantizeLinear", f"{base}/DynamicQuantizeLinear/DequantizeLinear", quantized, [result]))
    return result


def _quantized_weight(graph: Graph, name: str, scheme: object) -> str:
    value = graph.constant(name)
    assert value is not None
    integers, scale = scheme.quantize_weight(value.T)  # type: ignore[attr-defined]
    inputs = [
        graph.add_constant(name + INT8, integers.T),
        graph.add_constant(name + SCALE, scale),
        graph.add_constant(name + ZERO_POINT, np.zeros(len(scale), np.int8)),
    ]
    result = f"{name}/DequantizeLinear_output_0"
    graph.nodes.append(graph.node("DequantizeLinear", f"{name}/DequantizeLinear", inputs, [result], axis=1))
    return result


PLUGIN = QuantizeLinear()
