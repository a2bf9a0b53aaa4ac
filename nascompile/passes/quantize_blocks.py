"""Products with weight-only integers become com.microsoft.MatMulNBits: groups of 4 or 8 bits with a scale each, multiplied as floats.

The operator packs two 4-bit integers into a byte, the first in its low half, and takes half its range off: no zero points are stored.
"""

from __future__ import annotations

import numpy as np
import onnx

from nascompile import plugins
from nascompile.passes import PassContext
from nascompile.passes.graph import BLOCKS, MICROSOFT, SCALE, TRANSPOSED, Array, Graph, bias_add

FLOAT_PRODUCTS = 1
"""Accuracy level: sums of float32 products. Level 4 would round the inputs to 8 bits as well."""


class QuantizeBlocks:
    name = "quantize_blocks"
    standard = False
    exact = False
    requires = "fold_linear"
    ensures = "every product whose weight has a scale per group is MatMulNBits, its bias included"

    def apply(self, model: onnx.ModelProto, context: PassContext) -> onnx.ModelProto:
        graph = Graph(model)
        for product in [n for n in graph.nodes if n.op_type == "MatMul" and n.input[1] in graph.constants]:
            weight = product.input[1].removesuffix(TRANSPOSED)
            if weight not in context.quantized:
                continue
            scheme = plugins.get("quantization", context.quantized[weight])
            integers = scheme.precision.weights
            if integers.granularity != "group":
                continue
            value = graph.value(product.input[1]).T
            quantized, scale = scheme.quantize_weight(value)
            inputs = [
                product.input[0],
                graph.add_constant(weight + BLOCKS, packed(quantized, integers.bits, integers.group_size)),
                graph.add_constant(weight + SCALE, scale),
            ]
            removed, result = [product], product.output[0]
            if (add := bias_add(graph, result)) is not None:
                removed.append(add)
                inputs += ["", "", next(name for name in add.input if name != result)]
                result = add.output[0]
            form = {"N": value.shape[0], "K": value.shape[1], "bits": integers.bits, "block_size": integers.group_size}
            fused = graph.node("MatMulNBits", product.name, inputs, [result], domain=MICROSOFT, accuracy_level=FLOAT_PRODUCTS, **form)
            graph.replace(removed, [fused])
        return graph.finish()


def packed(integers: Array, bits: int, size: int) -> Array:
    """int8 (out, in) as the operator stores it: uint8 (out, groups, size · bits / 8), half the range added, the last group filled up."""
    rows, columns = integers.shape
    middle = 2 ** (bits - 1)
    full = np.full((rows, -(-columns // size) * size), middle, np.uint8)
    full[:, :columns] = integers.astype(np.int16) + middle
    full = full.reshape(rows, -1, size)
    return full if bits == 8 else full[..., 0::2] | (full[..., 1::2] << 4)


PLUGIN = QuantizeBlocks()
