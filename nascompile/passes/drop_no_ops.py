"""Nodes that give back what they read: casts to the type that is there, reshapes of vectors to vectors."""

from __future__ import annotations

import onnx

from nascompile.passes import PassContext
from nascompile.passes.graph import Graph, Known, attribute, inferred


class DropNoOps:
    name = "drop_no_ops"
    standard = True
    exact = True
    requires = "inline_constants, fold_constants"
    ensures = "no Identity, Dropout, Cast to the same type, Transpose that moves nothing, or Reshape of a vector to one"

    def apply(self, model: onnx.ModelProto, context: PassContext) -> onnx.ModelProto:
        known, graph = inferred(model), Graph(model)
        ends = {output.name for output in model.graph.output}
        replaced: dict[str, str] = {}
        for node in graph.nodes:
            if not ends.intersection(node.output) and (source := _same(graph, known, node)):
                replaced[node.output[0]] = replaced.get(source, source)
        graph.rename_uses(replaced)
        return graph.finish()


def _same(graph: Graph, known: Known, node: onnx.NodeProto) -> str:
    """The input that the node's output is equal to; empty if none is known to be."""
    kind, shape = known.get(node.input[0], (0, None)) if node.input else (0, None)
    if node.domain:
        return ""
    match node.op_type:
        case "Identity":
            same = True
        case "Dropout":
            same = len(node.input) == 1
        case "Cast":
            same = kind == attribute(node, "to")
        case "Transpose":
            same = list(perm := attribute(node, "perm", [1, 0])) == sorted(perm)
        case "Reshape":
            target = graph.constant(node.input[1])
            same = shape is not None and len(shape) == 1 and target is not None and target.tolist() == [-1]
        case _:
            same = False
    return str(node.input[0]) if same else ""


PLUGIN = DropNoOps()
