"""Gemm of a linear layer becomes Transpose, MatMul, Add: from here on every linear looks the same."""

from __future__ import annotations

import onnx

from nascompile.errors import UnsupportedError
from nascompile.passes import PassContext
from nascompile.passes.graph import Graph, attribute


class SplitGemm:
    name = "split_gemm"
    standard = True
    exact = True
    requires = "Gemm nodes are linear layers: alpha = beta = 1, weight transposed"
    ensures = "no Gemm nodes"

    def apply(self, model: onnx.ModelProto, context: PassContext) -> onnx.ModelProto:
        graph = Graph(model)
        for gemm in [node for node in graph.nodes if node.op_type == "Gemm"]:
            plain = attribute(gemm, "alpha", 1.0) == 1.0 == attribute(gemm, "beta", 1.0)
            if not plain or attribute(gemm, "transA", 0) or not attribute(gemm, "transB", 0):
                raise UnsupportedError(f"Gemm node that is no linear layer: {gemm.name}")
            base = gemm.name.rpartition("/")[0]
            x, weight, *bias = gemm.input
            (y,) = gemm.output
            product = f"{base}/MatMul_output_0" if bias else y
            added = [
                graph.node("Transpose", f"{base}/Transpose", [weight], [f"{base}/Transpose_output_0"], perm=[1, 0]),
                graph.node("MatMul", f"{base}/MatMul", [x, f"{base}/Transpose_output_0"], [product]),
            ]
            if bias:
                added.append(graph.node("Add", f"{base}/Add", [bias[0], product], [y]))
            graph.replace([gemm], added)
        return graph.finish()


PLUGIN = SplitGemm()
