"""Constant nodes become initializers, so that every constant is found in one place."""

from __future__ import annotations

import onnx

from nascompile.errors import UnsupportedError
from nascompile.passes import PassContext
from nascompile.passes.graph import Graph, attribute


class InlineConstants:
    name = "inline_constants"
    standard = True
    exact = True
    requires = "nothing"
    ensures = "no Constant nodes"

    def apply(self, model: onnx.ModelProto, context: PassContext) -> onnx.ModelProto:
        graph = Graph(model)
        constants = [node for node in graph.nodes if node.op_type == "Constant"]
        for node in constants:
            if (value := attribute(node, "value")) is None:
                raise UnsupportedError(f"Constant node without a tensor value: {node.name}")
            graph.add_constant(node.output[0], onnx.numpy_helper.to_array(value))
        graph.replace(constants, [])
        return graph.finish()


PLUGIN = InlineConstants()
