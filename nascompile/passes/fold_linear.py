"""The transposition of a weight is done once, here, instead of in every session."""

from __future__ import annotations

import onnx

from nascompile.passes import PassContext
from nascompile.passes.graph import TRANSPOSED, Graph, attribute


class FoldLinear:
    name = "fold_linear"
    standard = True
    exact = True
    requires = "weights are bound as initializers"
    ensures = "no Transpose of an initializer; a transposed weight is named `<weight>.T`, shape (in, out)"

    def apply(self, model: onnx.ModelProto, context: PassContext) -> onnx.ModelProto:
        graph = Graph(model)
        folded = {}
        for node in [n for n in graph.nodes if n.op_type == "Transpose" and n.input[0] in graph.constants]:
            value = graph.constant(node.input[0])
            assert value is not None
            folded[node.output[0]] = graph.add_constant(node.input[0] + TRANSPOSED, value.transpose(attribute(node, "perm")))
        graph.rename_uses(folded)
        return graph.finish()


PLUGIN = FoldLinear()
