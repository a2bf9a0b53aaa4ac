"""QDQ products become ONNX Runtime's MatMulIntegerToFloat with bias: integers multiplied as integers, by choice and not by luck.

The runtime's own QDQ fusion leaves a float Add after it and, with MatMulAddFusion, may dequantize weights at every run.
"""

from __future__ import annotations

import onnx

from nascompile.passes import PassContext
from nascompile.passes.graph import MICROSOFT, Graph


class FuseIntegerMatMul:
    name = "fuse_integer_matmul"
    standard = False
    requires = "quantize_linear"
    ensures = "no float MatMul of a dequantized weight; equal up to the order of float operations"

    def apply(self, model: onnx.ModelProto, context: PassContext) -> onnx.ModelProto:
        graph = Graph(model)
        for product in [n for n in graph.nodes if n.op_type == "MatMul"]:
            left, right = (graph.producer.get(name) for name in product.input)
            if left is None or right is None or (left.op_type, right.op_type) != ("DequantizeLinear", "DequantizeLinear"):
                continue
            removed, result = [product], product.output[0]
            inputs = [left.input[0], right.input[0], left.input[1], right.input[1], left.input[2], right.input[2]]
            add = _bias_add(graph, result)
            if add is not None:
                removed.append(add)
                inputs.append(next(name for name in add.input if name != result))
                result = add.output[0]
            fused = graph.node("MatMulIntegerToFloat", product.name, inputs, [result], domain=MICROSOFT)
            graph.replace(removed, [fused])
        return graph.finish()


def _bias_add(graph: Graph, tensor: str) -> onnx.NodeProto | None:
    """The Add of a constant vector that alone reads the tensor."""
    readers = graph.readers(tensor)
    if len(readers) != 1 or readers[0].op_type != "Add" or tensor in {o.name for o in graph.model.graph.output}:
        return None
    other = [name for name in readers[0].input if name != tensor]
    if len(other) != 1 or other[0] not in graph.constants or len(graph.constants[other[0]].dims) != 1:
        return None
    return readers[0]


PLUGIN = FuseIntegerMatMul()
