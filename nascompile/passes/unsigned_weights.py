"""Weights of integer products stored with an offset of 128, unsigned: the same numbers, for processors that multiply u8·s8 inexactly.

x86 without VNNI adds pairs of u8·s8 products in 16 bits with saturation (VPMADDUBSW); for u8·u8 ONNX Runtime takes an exact way.
"""

from __future__ import annotations

import numpy as np
import onnx

from nascompile.passes import PassContext
from nascompile.passes.graph import INT8, UNSIGNED, ZERO_POINT, Graph

OFFSET = 128


class UnsignedWeights:
    name = "unsigned_weights"
    standard = False
    exact = True
    requires = "quantize_linear, before fuse_integer_matmul"
    ensures = "weights of quantized products are uint8 with zero point 128; their values are unchanged"

    def apply(self, model: onnx.ModelProto, context: PassContext) -> onnx.ModelProto:
        graph = Graph(model)
        for node in [n for n in graph.nodes if n.op_type == "DequantizeLinear" and n.input[0].endswith(INT8)]:
            for i, suffix in ((0, INT8), (2, ZERO_POINT)):
                name = node.input[i]
                value = graph.constant(name)
                assert value is not None
                shifted = (value.astype(np.int16) + OFFSET).astype(np.uint8)
                node.input[i] = graph.add_constant(name.removesuffix(suffix) + UNSIGNED + suffix, shifted)
        graph.index()
        return graph.finish()


PLUGIN = UnsignedWeights()
