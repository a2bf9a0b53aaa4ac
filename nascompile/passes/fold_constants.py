"""What depends on constants only is computed once, here: positions, shapes of tensors whose shape is known, and their arithmetic."""

from __future__ import annotations

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from nascompile.passes import PassContext
from nascompile.passes.graph import Array, Graph, inferred

LARGEST = 1 << 16
"""Elements of a result that is still stored."""
RANDOM = ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli")


class FoldConstants:
    name = "fold_constants"
    standard = True
    exact = True
    requires = "inline_constants; nodes in execution order"
    ensures = "no standard node, reading at least one tensor, that reads constants only or the shape of a tensor whose shape is known"

    def apply(self, model: onnx.ModelProto, context: PassContext) -> onnx.ModelProto:
        known, graph = inferred(model), Graph(model)
        folded = []
        for node in graph.nodes:
            inputs = [name for name in node.input if name]
            if not inputs or node.domain or node.op_type in RANDOM:
                continue
            shape = known.get(node.input[0], (0, None))[1] if node.op_type == "Shape" and not node.attribute else None
            if shape is not None and None not in shape:
                results = [np.array(shape, np.int64)]
            elif all(name in graph.constants for name in inputs):
                results = _computed(graph, node)
            else:
                continue
            if sum(result.size for result in results) <= LARGEST:
                for name, result in zip(node.output, results, strict=True):
                    graph.add_constant(name, result)
                folded.append(node)
        graph.replace(folded, [])
        return graph.finish()


def _computed(graph: Graph, node: onnx.NodeProto) -> list[Array]:
    used = {name for name in node.input if name}
    outputs = [onnx.helper.make_empty_tensor_value_info(name) for name in node.output]
    part = onnx.helper.make_graph([node], "constant", [], outputs, [graph.constants[name] for name in sorted(used)])
    found: list[Array] = ReferenceEvaluator(onnx.helper.make_model(part, opset_imports=list(graph.model.opset_import))).run(None, {})
    return found


PLUGIN = FoldConstants()
