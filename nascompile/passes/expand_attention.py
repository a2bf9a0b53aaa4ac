"""com.microsoft.MultiHeadAttention becomes products, softmax and transposes again, in the form that OpenVINO compiles into one kernel.

Keys are transposed to heads first and then within a head, the factor of the scores belongs to the query's linear, and the mask is
(batch, 1, 1, sequence). A whole INT8 network gains 2 to 7 % on the attention that torch exports (docs/benchmarks.md, "Forms").
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from nascompile.errors import UnsupportedError
from nascompile.passes import PassContext
from nascompile.passes.graph import Graph, attribute, linear_weight

HEADS_FIRST, WITHIN_HEAD = (0, 2, 1, 3), (0, 1, 3, 2)
HIDDEN = float(np.finfo(np.float32).min)
"""Added to the scores of padded keys."""


class ExpandAttention:
    name = "expand_attention"
    standard = False  # the result is standard ONNX, but only backends that name the pass had fused attention before
    exact = True
    requires = "fuse_attention; query, key and value are outputs of linears, the query's with a bias or without"
    ensures = "no MultiHeadAttention; equal up to the order of float operations, for any number of heads that is left of a weight"

    def apply(self, model: onnx.ModelProto, context: PassContext) -> onnx.ModelProto:
        graph = Graph(model)
        masks: dict[str, str] = {}
        for attention in [n for n in graph.nodes if n.op_type == "MultiHeadAttention"]:
            padding = attention.input[4] if len(attention.input) > 4 else ""
            if [name for name in attention.input[3:] if name not in ("", padding)]:
                raise UnsupportedError(f"attention of an unknown form: {attention.name}")
            if padding and padding not in masks:
                masks[padding] = _mask(graph, padding)
            width = context.parameters[linear_weight(graph, attention.input[0], context.parameters)][0]
            head_dim = width // attribute(attention, "num_heads")
            _expand(graph, attention, head_dim, attribute(attention, "scale") or head_dim**-0.5, masks.get(padding, ""))
        return graph.finish()


def _mask(graph: Graph, padding: str) -> str:
    """What is added to the scores, (batch, 1, 1, sequence): 0, or HIDDEN where `padding` (batch, sequence) is 0."""
    base = "/padding"
    axes, zero = graph.add_constant(f"{base}/axes", np.array([1, 2])), graph.add_constant(f"{base}/zero", np.float32(0))
    hidden = graph.add_constant(f"{base}/hidden", np.float32(HIDDEN))
    wide, kept, mask = (f"{base}/{op}_output_0" for op in ("Unsqueeze", "Cast", "Where"))
    graph.nodes += [
        graph.node("Unsqueeze", f"{base}/Unsqueeze", [padding, axes], [wide]),
        graph.node("Cast", f"{base}/Cast", [wide], [kept], to=onnx.TensorProto.BOOL),
        graph.node("Where", f"{base}/Where", [kept, zero, hidden], [mask]),
    ]
    graph.index()
    return mask


def _expand(graph: Graph, attention: onnx.NodeProto, head_dim: int, scale: float, mask: str) -> None:
    base = attention.name  # names of its own: the linears beside it have tensors called query/Transpose
    split = graph.add_constant(f"{base}/split", np.array([0, 0, -1, head_dim]))
    merge = graph.add_constant(f"{base}/merge", np.array([0, 0, -1]))
    added: list[onnx.NodeProto] = []

    def then(op_type: str, name: str, *inputs: str, **attributes: Any) -> str:
        added.append(graph.node(op_type, f"{base}/{name}", inputs, [f"{base}/{name}_output_0"], **attributes))
        return str(added[-1].output[0])

    def heads(tensor: str, name: str) -> str:
        return then("Transpose", f"{name}/Transpose", then("Reshape", f"{name}/Reshape", tensor, split), perm=HEADS_FIRST)

    key = then("Transpose", "key/Transpose_1", heads(attention.input[1], "key"), perm=WITHIN_HEAD)
    scores = then("MatMul", "MatMul", heads(_scaled(graph, attention.input[0], base, scale), "query"), key)
    if mask:
        scores = then("Add", "Add", scores, mask)
    context = then("MatMul", "MatMul_1", then("Softmax", "Softmax", scores, axis=-1), heads(attention.input[2], "value"))
    merged = then("Transpose", "Transpose", context, perm=HEADS_FIRST)
    added.append(graph.node("Reshape", f"{base}/Reshape", [merged, merge], list(attention.output)))
    graph.replace([attention], added)


def _scaled(graph: Graph, query: str, base: str, scale: float) -> str:
    """The query's linear times a factor, its product and its bias each for itself: the compiler merges that with their constants."""
    factor, linear = graph.add_constant(f"{base}/scale", np.float32(scale)), graph.producer[query]
    terms = list(linear.input) if linear.op_type == "Add" else [query]
    scaled = [f"{base}/scale/Mul_{i}" for i in range(len(terms))]
    graph.nodes += [graph.node("Mul", name, [term, factor], [f"{name}_output_0"]) for name, term in zip(scaled, terms, strict=True)]
    if len(terms) > 1:
        graph.nodes.append(graph.node("Add", f"{base}/scale/Add", [f"{name}_output_0" for name in scaled], [f"{base}/scale/Add_output_0"]))
    graph.index()
    return f"{base}/scale/Add_output_0" if len(terms) > 1 else f"{scaled[0]}_output_0"


PLUGIN = ExpandAttention()
