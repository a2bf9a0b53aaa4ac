"""QDQ products become ONNX Runtime's MatMulIntegerToFloat with bias: integers multiplied as integers, by choice and not by luck.

The runtime's own QDQ fusion leaves a float Add after it and, with MatMulAddFusion, may dequantize weights at every run.
"""

from __future__ import annotations

import onnx

from nascompile.passes import PassContext
from nascompile.passes.graph import MICROSOFT, Graph, bias_add


class FuseIntegerMatMul:
    name = "fuse_integer_matmul"
    standard = False
    exact = True
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
            add = bias_add(graph, result)
            if add is not None:
                removed.append(add)
                inputs.append(next(name for name in add.input if name != result))
                result = add.output[0]
            fused = graph.node("MatMulIntegerToFloat", product.name, inputs, [result], domain=MICROSOFT)
            graph.replace(removed, [fused])
        return graph.finish()


PLUGIN = FuseIntegerMatMul()
