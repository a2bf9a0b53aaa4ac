"""What only the first token of the last layer is read for is computed for the first token only.

Classifiers on a class token read one token of the last layer: after its attention, one row of the output linear, of both norms and of the
MLP. Exporters and runtimes compute all of them: that costs 14 % of the time of a network of four layers, and half of one of two, at batch 1
in FP32 (docs/benchmarks.md, "Forms"). One query instead of all was tried: it parts the query from the fused attention operators and
costs more than it saves.
"""

from __future__ import annotations

import numpy as np
import onnx

from nascompile import plugins
from nascompile.passes import PassContext
from nascompile.passes.graph import Graph, attribute

ELEMENTWISE = ("Gelu", "Relu", "Tanh", "Erf", "Sigmoid")


class DropUnreadTokens:
    name = "drop_unread_tokens"
    standard = True
    exact = True
    requires = "inline_constants, fold_linear; before anything is quantized"
    ensures = "layer norms, linears, activations and sums after the last attention have one token where only the first is read"

    def apply(self, model: onnx.ModelProto, context: PassContext) -> onnx.ModelProto:
        graph = Graph(model)
        if any(plugins.get("quantization", name).precision.dynamic for name in set(context.quantized.values())):
            return model  # a grid found in a call is that of all its tokens: without some it would be another
        narrow = _narrow(graph)
        made: dict[str, str] = {}
        for node in [n for n in graph.nodes if n.output[0] in narrow]:
            for i in _token_inputs(graph, node):
                source = node.input[i]
                if source not in narrow:
                    node.input[i] = made.get(source) or _first(graph, source, made)
        graph.index()
        return graph.finish()


def _narrow(graph: Graph) -> set[str]:
    """Tensors of which only the first token is read, and which can be computed for it alone."""
    full = {output.name for output in graph.model.graph.output}
    first: set[str] = set()
    model = graph.finish()  # in execution order
    for node in reversed(model.graph.node):
        if _reads_first(graph, node):
            first.add(node.input[0])
            full.update(node.input[1:])
            continue
        tokens = _token_inputs(graph, node) if full.isdisjoint(node.output) and node.output[0] in first else ()
        for i, name in enumerate(node.input):
            (first if i in tokens else full).add(name)
    return {name for name in first - full if name in graph.producer and _token_inputs(graph, graph.producer[name])}


def _reads_first(graph: Graph, node: onnx.NodeProto) -> bool:
    index = graph.constant(node.input[1]) if node.op_type == "Gather" else None
    return index is not None and attribute(node, "axis", 0) == 1 and index.shape == () and int(index) == 0


def _token_inputs(graph: Graph, node: onnx.NodeProto) -> tuple[int, ...]:
    """Inputs of which one token is enough to compute one token of the output; none: the node mixes tokens."""
    made = [i for i, name in enumerate(node.input) if name in graph.producer]
    if node.op_type == "Add":
        return tuple(made)
    if node.op_type in ("MatMul", "LayerNormalization", *ELEMENTWISE):
        return (0,) if made == [0] else ()
    return ()


def _first(graph: Graph, tensor: str, made: dict[str, str]) -> str:
    index = graph.add_constant("first_token", np.zeros(1, np.int64))
    made[tensor] = f"{tensor}.first"
    graph.nodes.append(graph.node("Gather", f"{tensor}/First", [tensor, index], [made[tensor]], axis=1))
    return made[tensor]


PLUGIN = DropUnreadTokens()
