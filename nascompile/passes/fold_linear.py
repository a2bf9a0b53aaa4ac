"""The transposition of a weight is done once, here, instead of in every session."""

from __future__ import annotations

import onnx

from nascompile.passes import PassContext
from nascompile.passes.graph import TRANSPOSED, Graph, attribute


class FoldLinear:
    name = "fold_linear"
    standard = True
    exact = True
    requires = "weights are parameters that are inputs, or initializers"
    ensures = "no Transpose of a weight; a transposed weight is named `<weight>.T`, shape (in, out), and still an input if it was one"

    def apply(self, model: onnx.ModelProto, context: PassContext) -> onnx.ModelProto:
        graph = Graph(model)
        folded = {}
        for node in [n for n in graph.nodes if n.op_type == "Transpose" and n.input[0] in graph.constants]:
            value = graph.constant(node.input[0])
            assert value is not None
            folded[node.output[0]] = graph.add_constant(node.input[0] + TRANSPOSED, value.transpose(attribute(node, "perm")))
        inputs = {entry.name: entry for entry in model.graph.input if entry.name in context.parameters}
        for node in [n for n in graph.nodes if n.op_type == "Transpose" and n.input[0] in inputs]:
            name = node.input[0] + TRANSPOSED
            if name not in folded.values():
                shape = context.parameters[node.input[0]]
                reversed_shape = [shape[i] for i in attribute(node, "perm")]
                model.graph.input.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, reversed_shape))
            folded[node.output[0]] = name
        graph.rename_uses(folded)
        return graph.finish()


PLUGIN = FoldLinear()
