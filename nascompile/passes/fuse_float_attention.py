"""Float query, key and value products and their attention become one com.microsoft.Attention, in narrow networks.

One product instead of three: a whole network of width 160 to 256 gains 3 to 5 % at batch 1 and up to 2 % at batch 8. At width 384 it gains
at batch 1 and loses at batch 8, at 768 it does nothing (docs/benchmarks.md, "Forms").
"""

from __future__ import annotations

import numpy as np
import onnx

from nascompile.passes import PassContext
from nascompile.passes.graph import JOINED, MICROSOFT, TRANSPOSED, Graph, attention_padding, attribute, bias_add, parameter_of

WIDEST = 256
"""Input features up to which the fused operator wins at every batch size: it is ahead at 256 and behind at 384."""


class FuseFloatAttention:
    name = "fuse_float_attention"
    standard = False
    exact = True
    requires = "fuse_attention, fold_linear; weights are initializers"
    ensures = "attention of at most WIDEST features whose three float products with bias read one tensor is Attention"

    def apply(self, model: onnx.ModelProto, context: PassContext) -> onnx.ModelProto:
        graph = Graph(model)
        for attention in [n for n in graph.nodes if n.op_type == "MultiHeadAttention"]:
            if products := _products(graph, attention):
                biases = [bias_add(graph, product.output[0]) for product in products]
                graph.replace([*products, *(b for b in biases if b is not None), attention], [_fused(graph, attention, products)])
        return graph.finish()


def _products(graph: Graph, attention: onnx.NodeProto) -> list[onnx.NodeProto]:
    """The products that make query, key and value, if the fused operator can take their place; empty otherwise."""
    if attention_padding(attention) is None:
        return []
    products = []
    for name in attention.input[:3]:
        add = graph.producer.get(name)
        made = [graph.producer.get(term) for term in add.input] if add is not None and add.op_type == "Add" else []
        product = next((p for p in made if p is not None and p.op_type == "MatMul" and p.input[1] in graph.constants), None)
        if product is None or add is None or bias_add(graph, product.output[0]) is not add or graph.readers(name) != [attention]:
            return []
        products.append(product)
    shapes = {tuple(graph.constants[product.input[1]].dims) for product in products}
    shared = len({product.input[0] for product in products}) == len(shapes) == 1
    return products if shared and shapes.pop()[0] <= WIDEST else []


def _fused(graph: Graph, attention: onnx.NodeProto, products: list[onnx.NodeProto]) -> onnx.NodeProto:
    adds = [graph.producer[name] for name in attention.input[:3]]
    biases = [next(term for term in add.input if term in graph.constants) for add in adds]
    weights = [product.input[1] for product in products]
    weight = JOINED.join(map(parameter_of, weights)) + TRANSPOSED
    padding = attention_padding(attention)
    inputs = [
        products[0].input[0],
        graph.add_constant(weight, np.concatenate([graph.value(name) for name in weights], axis=1)),
        graph.add_constant(JOINED.join(biases), np.concatenate([graph.value(name) for name in biases])),
        *([padding] if padding else []),
    ]
    path, heads = attention.name.rpartition("/")[0], attribute(attention, "num_heads")
    return graph.node("Attention", f"{path}/Attention", inputs, list(attention.output), domain=MICROSOFT, num_heads=heads)


PLUGIN = FuseFloatAttention()
