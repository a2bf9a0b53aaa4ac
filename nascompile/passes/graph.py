"""An ONNX graph one can walk and edit: who produces and who reads a tensor, constants as NumPy arrays."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.shape_inference
from onnx import numpy_helper

from nascompile.errors import UnsupportedError

Array = npt.NDArray[Any]
MICROSOFT = "com.microsoft"


class Graph:
    """Indexes of one ModelProto. Edit `nodes` through the methods, then `finish` writes everything back."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.nodes: list[onnx.NodeProto] = []
        for node in model.graph.node:  # copies: the originals are deleted from the model before these are written back
            own = onnx.NodeProto()
            own.CopyFrom(node)
            self.nodes.append(own)
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self._added: list[onnx.TensorProto] = []
        self.index()

    def index(self) -> None:
        """Find producers and readers again after nodes were edited in place."""
        self.producer: dict[str, onnx.NodeProto] = {}
        self._readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in self.nodes:
            self.producer.update(dict.fromkeys(node.output, node))
            for name in dict.fromkeys(node.input):
                self._readers[name].append(node)

    def readers(self, tensor: str) -> list[onnx.NodeProto]:
        """Nodes that read the tensor, in execution order."""
        return self._readers.get(tensor, [])

    def constant(self, name: str) -> Array | None:
        """Value of an initializer; None if the name is none."""
        tensor = self.constants.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor)

    def value(self, name: str) -> Array:
        """Value of an initializer that is there."""
        found: Array = numpy_helper.to_array(self.constants[name])
        return found

    def add_constant(self, name: str, value: Array | np.generic) -> str:
        """The name, after storing the value under it; a name that is taken must hold the same value."""
        if name not in self.constants:
            tensor = numpy_helper.from_array(np.ascontiguousarray(value) if np.ndim(value) else np.asarray(value), name)
            self.constants[name] = tensor
            self._added.append(tensor)
        elif not np.array_equal(numpy_helper.to_array(self.constants[name]), value):
            raise ValueError(f"two different constants named {name}")
        return name

    def node(
        self, op_type: str, name: str, inputs: Sequence[str], outputs: Sequence[str], domain: str = "", **attributes: Any
    ) -> onnx.NodeProto:
        """A new node; its place is found by `finish`."""
        made = onnx.helper.make_node(op_type, inputs, outputs, name=name, domain=domain, **attributes)
        if domain and domain not in {entry.domain for entry in self.model.opset_import}:
            self.model.opset_import.append(onnx.helper.make_opsetid(domain, 1))
        return made

    def replace(self, removed: Iterable[onnx.NodeProto], added: Iterable[onnx.NodeProto]) -> None:
        """Exchange nodes; the new ones stand where the first removed one stood."""
        gone = {id(node) for node in removed}
        place = next((i for i, node in enumerate(self.nodes) if id(node) in gone), len(self.nodes))
        self.nodes[place:place] = list(added)
        self.nodes = [node for node in self.nodes if id(node) not in gone]
        self.index()

    def rename_uses(self, names: dict[str, str]) -> None:
        """Every reader of a key reads its value instead."""
        for node in self.nodes:
            for i, name in enumerate(node.input):
                if name in names:
                    node.input[i] = names[name]
        self.index()

    def finish(self) -> onnx.ModelProto:
        """The model: nodes in execution order, without nodes and constants that no output needs."""
        graph = self.model.graph
        self.nodes = self._ordered([output.name for output in graph.output])
        used = {name for node in self.nodes for name in node.input} | {output.name for output in graph.output}
        del graph.node[:]
        graph.node.extend(self.nodes)
        for i in reversed(range(len(graph.initializer))):
            if graph.initializer[i].name not in used:
                del graph.initializer[i]
        graph.initializer.extend(tensor for tensor in self._added if tensor.name in used)
        del graph.value_info[:]
        return self.model

    def _ordered(self, outputs: list[str]) -> list[onnx.NodeProto]:
        needed = {id(node) for node in self.ancestors(outputs)}
        ordered: list[onnx.NodeProto] = []
        done: set[int] = set()
        entered: set[int] = set()
        for root in (node for node in self.nodes if id(node) in needed):
            stack = [root]
            while stack:
                node = stack[-1]
                waiting = [p for name in node.input if (p := self.producer.get(name)) is not None and id(p) not in done]
                if waiting and id(node) not in done:
                    if id(node) in entered:
                        raise ValueError(f"the graph has a cycle through {node.name}")
                    entered.add(id(node))
                    stack.extend(reversed(waiting))
                    continue
                stack.pop()
                if id(node) not in done:
                    done.add(id(node))
                    ordered.append(node)
        return ordered

    def ancestors(self, tensors: Iterable[str], stop: Iterable[str] = ()) -> list[onnx.NodeProto]:
        """Nodes that the tensors depend on, walking back as far as the `stop` tensors; in the order of `nodes`."""
        found: set[int] = set()
        seen = set(stop)
        waiting = [name for name in tensors if name not in seen]
        while waiting:
            name = waiting.pop()
            node = self.producer.get(name)
            if name in seen or node is None:
                continue
            seen.update(node.output)
            found.add(id(node))
            waiting.extend(node.input)
        return [node for node in self.nodes if id(node) in found]


Known = dict[str, tuple[int, tuple[int | None, ...] | None]]
"""Tensor ▸ (type, shape), as far as they are known: 0 or None where they are not."""


def inferred(model: onnx.ModelProto) -> Known:
    """Types and shapes of the tensors of a graph without weights that follow from its inputs and from constants."""
    found: Known = {tensor.name: (tensor.data_type, tuple(tensor.dims)) for tensor in model.graph.initializer}
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    for value in (*graph.input, *graph.value_info, *graph.output):
        tensor = value.type.tensor_type
        dims = tuple(d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim) if tensor.HasField("shape") else None
        found[value.name] = (tensor.elem_type, dims)
    return found


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """Value of a node's attribute."""
    return next((onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def attention_padding(attention: onnx.NodeProto) -> str | None:
    """Padding mask of a MultiHeadAttention, empty without one; None if packed operators cannot take its place: another scale or input."""
    padding = attention.input[4] if len(attention.input) > 4 else ""
    others = [name for name in attention.input[3:] if name and name != padding]
    return None if others or attribute(attention, "scale") is not None else padding


def linear_weight(graph: Graph, tensor: str, parameters: Iterable[str]) -> str:
    """The parameter whose product the tensor is, at most a bias away."""
    names = set(parameters)
    node = graph.producer.get(tensor)
    if node is not None and node.op_type == "Add":
        node = next((p for name in node.input if (p := graph.producer.get(name)) is not None), None)
    if node is not None and node.op_type == "MatMul":
        source = graph.producer.get(node.input[1])
        weight: str = source.input[0] if source is not None and source.op_type == "Transpose" else node.input[1]
        if weight in names:
            return weight
    raise UnsupportedError(f"expected the output of a linear layer: {tensor}")


def bias_add(graph: Graph, tensor: str) -> onnx.NodeProto | None:
    """The Add of a constant vector that alone reads the tensor."""
    readers = graph.readers(tensor)
    if len(readers) != 1 or readers[0].op_type != "Add" or tensor in {o.name for o in graph.model.graph.output}:
        return None
    other = [name for name in readers[0].input if name != tensor]
    if len(other) != 1 or other[0] not in graph.constants or len(graph.constants[other[0]].dims) != 1:
        return None
    return readers[0]


def parameter_of(tensor: str) -> str:
    """State-dict name of the parameter that an initializer was made from."""
    for suffix in SUFFIXES:
        tensor = tensor.removesuffix(suffix)
    return tensor


INT8, BLOCKS, SCALE, ZERO_POINT, UNSIGNED, TRANSPOSED = ".int8", ".blocks", ".scale", ".zero_point", ".u8", ".T"
JOINED = "+"
"""Between the names of parameters that a pass put side by side, all of one shape."""
SUFFIXES = (INT8, BLOCKS, SCALE, ZERO_POINT, UNSIGNED, TRANSPOSED)
"""What passes append to a parameter's name, outermost first."""
