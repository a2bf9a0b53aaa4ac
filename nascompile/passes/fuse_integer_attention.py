"""Integer query, key and value products and their attention become one com.microsoft.QAttention, in narrow networks.

One product instead of three, and no transposes between it and the attention: a whole network of width 160 to 256 gains 10 to 12 % at
batch 1 and 3 to 9 % at batch 8, one of width 384 4 %; at 768 it gains nothing and loses 6 % at batch 8 (docs/benchmarks.md, "Forms").
"""

from __future__ import annotations

import numpy as np
import onnx

from nascompile.passes import PassContext
from nascompile.passes.graph import (
    INT8,
    JOINED,
    MICROSOFT,
    SCALE,
    TRANSPOSED,
    UNSIGNED,
    ZERO_POINT,
    Graph,
    attention_padding,
    attribute,
    parameter_of,
)

WIDEST = 512
"""Input features up to which the fused operator wins: it is ahead at 384 and behind at 768."""


class FuseIntegerAttention:
    name = "fuse_integer_attention"
    standard = False
    exact = True
    requires = "fuse_attention, fuse_integer_matmul"
    ensures = "attention of at most WIDEST features whose three products read one integer tensor is QAttention; equal up to float order"

    def apply(self, model: onnx.ModelProto, context: PassContext) -> onnx.ModelProto:
        graph = Graph(model)
        for attention in [n for n in graph.nodes if n.op_type == "MultiHeadAttention"]:
            products = _products(graph, attention)
            if products:
                graph.replace([*products, attention], [_fused(graph, attention, products)])
        return graph.finish()


def _products(graph: Graph, attention: onnx.NodeProto) -> list[onnx.NodeProto]:
    """The products that make query, key and value, if the fused operator can take their place; empty otherwise."""
    products = [p for name in attention.input[:3] if (p := graph.producer.get(name)) is not None]
    if attention_padding(attention) is None or len(products) != 3:
        return []
    for product in products:
        alone = graph.readers(product.output[0]) == [attention]
        if product.op_type != "MatMulIntegerToFloat" or len(product.input) != 7 or not alone:
            return []
    (first, *rest), shapes = products, {tuple(graph.constants[p.input[1]].dims) for p in products}
    shared = all(other.input[i] == first.input[i] for other in rest for i in (0, 2, 4))
    return products if shared and len(shapes) == 1 and shapes.pop()[0] <= WIDEST else []


def _fused(graph: Graph, attention: onnx.NodeProto, products: list[onnx.NodeProto]) -> onnx.NodeProto:
    def joined(index: int, name: str) -> str:
        return graph.add_constant(name, np.concatenate([graph.value(p.input[index]) for p in products], axis=-1))

    first = products[0]
    name = JOINED.join(parameter_of(p.input[1]) for p in products) + TRANSPOSED
    name += UNSIGNED if first.input[1].endswith(UNSIGNED + INT8) else ""
    weight, scale, zero_point = joined(1, name + INT8), joined(3, name + SCALE), joined(5, name + ZERO_POINT)
    bias = joined(6, JOINED.join(p.input[6] for p in products))
    inputs = [first.input[0], weight, bias, first.input[2], scale, attention_padding(attention) or "", first.input[4], zero_point]
    path, heads = attention.name.rpartition("/")[0], attribute(attention, "num_heads")
    return graph.node("QAttention", f"{path}/QAttention", inputs, list(attention.output), domain=MICROSOFT, num_heads=heads)


PLUGIN = FuseIntegerAttention()
