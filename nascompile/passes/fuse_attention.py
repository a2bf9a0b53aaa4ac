"""An attention core becomes one com.microsoft.MultiHeadAttention; the mask arithmetic becomes its key_padding_mask."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx

from nascompile.errors import UnsupportedError
from nascompile.passes import PassContext
from nascompile.passes.graph import MICROSOFT, Array, Graph, linear_weight

MASK = "attention_mask"
_TRANSPARENT = ("Cast", "Identity", "Dropout")
_LAYOUT = ("Transpose", "Reshape")
_SCORES = ("MatMul", "Mul", "Div")


@dataclass(frozen=True)
class _Core:
    """One attention core: its tensors, what it computes with them, and where it stands."""

    name: str
    query: str
    key: str
    value: str
    mask: str
    """The additive mask tensor; empty if there is none."""
    output: onnx.NodeProto
    """The Reshape whose output is the context, (batch, sequence, inner)."""
    head_dim: int
    heads: int
    scale: float


class FuseAttention:
    name = "fuse_attention"
    standard = False
    exact = True
    requires = "inline_constants; softmax(scale · q kᵀ + mask) v with a mask that only hides padded keys"
    ensures = "no Softmax; query, key and value of MultiHeadAttention are (batch, sequence, heads · head_dim)"

    def apply(self, model: onnx.ModelProto, context: PassContext) -> onnx.ModelProto:
        graph = Graph(model)
        cores = [_core(graph, node, context) for node in graph.nodes if node.op_type == "Softmax"]
        for mask in dict.fromkeys(core.mask for core in cores if core.mask):
            _check_mask(graph, mask)
        padding = ""
        if any(core.mask for core in cores):
            padding = "key_padding_mask"
            graph.nodes.insert(0, graph.node("Cast", "/key_padding_mask/Cast", [MASK], [padding], to=onnx.TensorProto.INT32))
        for core in cores:
            inputs = [core.query, core.key, core.value, *(["", padding] if core.mask else [])]
            default = math.isclose(core.scale, core.head_dim**-0.5, rel_tol=1e-5)
            graph.replace(
                [core.output],
                [
                    graph.node(
                        "MultiHeadAttention", f"{core.name}/MultiHeadAttention", inputs, list(core.output.output),
                        domain=MICROSOFT, num_heads=core.heads, **({} if default else {"scale": core.scale}),
                    )
                ],
            )  # fmt: skip
        return graph.finish()


def _core(graph: Graph, softmax: onnx.NodeProto, context: PassContext) -> _Core:
    name = softmax.name.rpartition("/")[0]
    mask, scale = "", 1.0
    scores = _before(graph, softmax.input[0])
    while scores.op_type != "MatMul":
        if scores.op_type == "Add" and not mask:
            added = next((t for t in scores.input if _made_by(graph, t) not in _SCORES), "")
            if added and _reads_mask(graph, added):
                mask = added
            elif not added or not _adds_nothing(graph, added, context):
                raise UnsupportedError(f"attention adds something that is no padding mask: {scores.name}")
            following = next(t for t in scores.input if t != added)
        elif scores.op_type in ("Mul", "Div"):
            following, factor = _scalar(graph, scores)
            scale *= factor
        else:
            raise UnsupportedError(f"unknown node before softmax: {scores.op_type} {scores.name}")
        scores = _before(graph, following)
    query, query_scale, shape = _projection(graph, scores.input[0])
    key, key_scale, _ = _projection(graph, scores.input[1])
    product = _reader(graph, softmax.output[0], "MatMul", _TRANSPARENT, name)
    value, value_scale, _ = _projection(graph, product.input[1])
    output = _reader(graph, product.output[0], "Reshape", ("Transpose",), name)
    head_dim = _last_dimension(graph, shape)
    inner = _width(graph, query, context)
    if value_scale != 1.0 or head_dim <= 0 or inner % head_dim:
        raise UnsupportedError(f"attention of an unknown form: {name}")
    return _Core(name, query, key, value, mask, output, head_dim, inner // head_dim, scale * query_scale * key_scale)


def _projection(graph: Graph, tensor: str) -> tuple[str, float, str]:
    """(the linear's output that was split into heads, constant factor on the way, shape tensor of the split)."""
    scale, shape = 1.0, ""
    while (node := _before(graph, tensor)).op_type in (*_LAYOUT, "Mul", "Div"):
        if node.op_type in _LAYOUT:
            tensor = node.input[0]
            shape = node.input[1] if node.op_type == "Reshape" else shape
        else:
            tensor, factor = _scalar(graph, node)
            scale *= factor
    return tensor, scale, shape


def _before(graph: Graph, tensor: str) -> onnx.NodeProto:
    if tensor not in graph.producer:
        raise UnsupportedError(f"attention of an unknown form, it starts at {tensor}")
    return graph.producer[tensor]


def _made_by(graph: Graph, tensor: str) -> str:
    node = graph.producer.get(tensor)
    return node.op_type if node is not None else ""


def _scalar(graph: Graph, node: onnx.NodeProto) -> tuple[str, float]:
    """(the other input, factor) of a multiplication by, or division through, a constant."""
    for i in (1, 0):
        value = graph.constant(node.input[i])
        if value is not None and value.size == 1 and (i == 1 or node.op_type == "Mul"):
            factor = float(value.item())
            return node.input[1 - i], factor if node.op_type == "Mul" else 1 / factor
    raise UnsupportedError(f"expected a constant factor in attention: {node.name}")


def _reader(graph: Graph, tensor: str, wanted: str, through: Iterable[str], name: str) -> onnx.NodeProto:
    """The next `wanted` node that reads the tensor, passing `through` others."""
    for _ in range(8):
        readers = graph.readers(tensor)
        if len(readers) == 1 and readers[0].op_type == wanted:
            return readers[0]
        if len(readers) != 1 or readers[0].op_type not in through:
            break
        tensor = readers[0].output[0]
    raise UnsupportedError(f"attention of an unknown form, no {wanted} after {tensor}: {name}")


def _last_dimension(graph: Graph, shape: str) -> int:
    """Last entry of a shape tensor, 0 if it is not constant."""
    value = graph.constant(shape)
    if value is not None:
        return int(value[-1])
    node = graph.producer.get(shape)
    if node is not None and node.op_type == "Concat":
        return _last_dimension(graph, node.input[-1])
    if node is not None and node.op_type in ("Unsqueeze", "Cast", "Reshape"):
        value = graph.constant(node.input[0])
        return int(value.reshape(-1)[-1]) if value is not None else 0
    return 0


def _width(graph: Graph, tensor: str, context: PassContext) -> int:
    """Features of a linear's output, from the weight it was made with."""
    return context.parameters[linear_weight(graph, tensor, context.parameters)][0]


def _reads_mask(graph: Graph, tensor: str) -> bool:
    return any(MASK in node.input for node in graph.ancestors([tensor]))


def _adds_nothing(graph: Graph, tensor: str, context: PassContext) -> bool:
    """Whether it is zero whatever the inputs hold: a network without padding is traced with a mask by some versions of transformers."""
    if (constant := graph.constant(tensor)) is not None:
        return not np.any(constant)
    inputs = {value.name for value in graph.model.graph.input} | set(context.parameters)
    waiting = [tensor]
    while waiting:
        name = waiting.pop()
        node = graph.producer.get(name)
        if name in inputs:
            return False  # depends on what an input holds
        if node is not None and node.op_type != "Shape":  # a shape is the same whatever the input holds
            waiting.extend(node.input)
    return not np.any(_example(graph, tensor, {}))


def _example(graph: Graph, tensor: str, known: dict[str, Array]) -> Array:
    """The tensor for two samples of three tokens, all inputs zero but the known ones."""
    from onnx.reference import ReferenceEvaluator

    nodes = graph.ancestors([tensor])
    used = {name for node in nodes for name in node.input}
    inputs = [value for value in graph.model.graph.input if value.name in used]
    feed: dict[str, Array] = {}
    for value in inputs:
        shape = [d.dim_value or {"batch": 2}.get(d.dim_param, 3) for d in value.type.tensor_type.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        feed[value.name] = known[value.name].astype(dtype) if value.name in known else np.zeros(shape, dtype)
    result = onnx.helper.make_tensor_value_info(tensor, onnx.TensorProto.FLOAT, None)
    constants = [graph.constants[name] for name in used if name in graph.constants]
    part = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "example", inputs, [result], constants), opset_imports=list(graph.model.opset_import)
    )
    (value,) = ReferenceEvaluator(part).run(None, feed)
    return np.asarray(value)


def _check_mask(graph: Graph, tensor: str) -> None:
    """Run the mask arithmetic on an example: it must hide padded keys from every query, and nothing else."""
    padding = np.array([[1, 1, 1], [1, 0, 0]], np.int64)
    mask = _example(graph, tensor, {MASK: padding})
    hidden = np.broadcast_to(padding[:, None, None, :] == 0, (2, 1, 3, 3))
    mask = np.broadcast_to(mask, hidden.shape)
    if not np.array_equal(mask == 0, ~hidden) or not (mask[hidden] < -1e4).all():
        raise UnsupportedError(f"attention mask hides more than padded keys: {tensor}", hint="only bidirectional encoders are handled")


PLUGIN = FuseAttention()
