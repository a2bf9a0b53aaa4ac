"""From a candidate to an ONNX graph: the largest network is exported once, a candidate is its graph cut and sliced.

The blueprint is the exported graph with every parameter as an input, so that it holds no weights, is valid ONNX, and takes
kilobytes. `lower` drops segments, binds sliced weights and applies the passes; `lower_operator` builds a stack of one block.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from nascompile import network, plugins
from nascompile.backends import Backend
from nascompile.errors import ModelError, RecordError, UnsupportedError
from nascompile.families import Family, Segment
from nascompile.passes import Pass, PassContext
from nascompile.passes.graph import BLOCKS, INT8, JOINED, TRANSPOSED, Graph, attribute, linear_weight, parameter_of
from nascompile.quantization import ActivationRanges
from nascompile.records import FLOAT16, Candidate, Operator, Precision, SearchSpace, Target, digest, write_atomic

OPSET = 20
STRUCTURE_PASSES = ("inline_constants", "split_gemm", "fuse_attention", "expand_attention", "fold_constants", "drop_no_ops")
"""Applied to the blueprint, before weights exist."""
SLICED_PASSES = ("fold_linear",)
"""Applied to a candidate's graph before it has weights, so that none is stored twice."""
PASSES = (
    "drop_unread_tokens", "quantize_linear", "quantize_blocks", "quantize_table", "unsigned_weights", "fuse_integer_matmul",
    "fuse_integer_attention", "fuse_float_attention", "half_floats",
)  # fmt: skip
"""Applied to a candidate's graph, with its weights."""
CHECKED_ELEMENTS = 1 << 10
"""Of initializers that are looked at when a graph is checked: shapes and constants, no weights."""
RANDOM_RANGE = (-4.0, 4.0)
"""Input range of quantized products in an operator's graph: about what follows a layer norm."""

Array = npt.NDArray[Any]
Watch = Callable[[Pass | None, onnx.ModelProto], None]
"""Sees a graph before the first pass (None) and after each; it may keep nothing of the graph, which is edited further."""


# ---------------------------------------------------------------------------------------------- export


def export(family: Family, config: Any, folder: Path) -> Path:
    """The exported graph of the largest network without its weights, made once per configuration and exporter version."""
    import torch
    import transformers

    own = {key: value for key, value in config.to_dict().items() if key not in ("_name_or_path", "id2label", "label2id")}
    versions = (str(torch.__version__), transformers.__version__, OPSET)
    key = digest(family.name, repr(sorted(own.items(), key=str)), config.num_labels, *versions)
    path = folder / f"blueprint-{key[:16]}.onnx"
    if not path.exists():
        write_atomic(path, _export(family, config).SerializeToString())
    return path


def _export(family: Family, config: Any) -> onnx.ModelProto:
    import torch

    model = family.create(type(config).from_dict(config.to_dict()))
    for i, parameter in enumerate(model.parameters()):
        # all different: the exporter merges parameters with equal values; one number each, repeated by strides: they take no memory
        parameter.data = torch.full((1,), 1e-3 * (i + 1)).expand(parameter.shape)
    inputs = family.inputs(config)
    names = {spec.name: {i: d for i, d in enumerate(spec.shape) if isinstance(d, str)} for spec in inputs}
    with tempfile.TemporaryDirectory() as folder, _quiet():
        path = Path(folder) / "model.onnx"
        torch.onnx.export(
            model, tuple(_example(spec.dtype, spec.shape, spec.high) for spec in inputs), str(path),
            input_names=[spec.name for spec in inputs], output_names=["logits"], dynamic_axes={**names, "logits": {0: "batch"}},
            opset_version=OPSET, do_constant_folding=False, dynamo=False, export_params=False,
        )  # fmt: skip
        exported = onnx.load(path)
    return _with_inputs(exported, family.parameters(config), {spec.name for spec in inputs})


def _example(dtype: str, shape: tuple[int | str, ...], high: int) -> Any:
    """Ones: real tokens in every mask, legal indices in every table with more than one row."""
    import torch

    sizes = [{"batch": 2, "sequence": 8}[d] if isinstance(d, str) else d for d in shape]
    return torch.full(sizes, min(1, high - 1)) if high else torch.ones(sizes, dtype=getattr(torch, dtype))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _with_inputs(model: onnx.ModelProto, parameters: Mapping[str, tuple[int, ...]], inputs: set[str]) -> onnx.ModelProto:
    """The exported graph, its inputs being the network's and then the parameters it reads; ModelError for any other."""
    graph = model.graph
    found = {value.name: value for value in graph.input}
    if unknown := sorted(found.keys() - parameters.keys() - inputs):
        raise ModelError(f"exported with values that are no parameters: {', '.join(unknown)}", hint="try another version of transformers")
    for i in reversed(range(len(graph.input))):
        if graph.input[i].name in parameters:
            del graph.input[i]
    for name, shape in parameters.items():
        if name in found:
            exported = tuple(d.dim_value for d in found[name].type.tensor_type.shape.dim)
            if exported != shape:
                raise ModelError(f"exported with another shape than the family describes: {name} {exported}, expected {shape}")
            graph.input.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape))
    del graph.value_info[:]
    return model


# ---------------------------------------------------------------------------------------------- blueprint


@dataclass(frozen=True)
class Blueprint:
    """The largest network's graph after the structure passes, and where it can be cut."""

    model: onnx.ModelProto
    """Parameters are inputs; never edited after it was made."""
    parameters: Mapping[str, tuple[int, ...]]
    segments: tuple[Segment, ...]
    cuts: tuple[str, ...]
    """Main input tensor of each segment; empty for the first."""

    def end(self, index: int) -> str:
        """Main output tensor of a segment."""
        return self.cuts[index + 1] if index + 1 < len(self.cuts) else str(self.model.graph.output[0].name)


def blueprint(family: Family, config: Any, path: Path, backend: Backend, watch: Watch | None = None) -> Blueprint:
    """Read an exported graph and apply the structure passes that the backend takes."""
    try:
        model = onnx.load(path)
    except Exception as error:  # protobuf's DecodeError is no public type
        raise RecordError(f"damaged file: {path}", detail=str(error), hint="remove it; it will be exported again") from error
    parameters = family.parameters(config)
    model = _apply(STRUCTURE_PASSES, model, PassContext(parameters=parameters), backend, watch)
    graph, segments = Graph(model), family.segments(config)
    return Blueprint(model=model, parameters=parameters, segments=segments, cuts=tuple(_cut(graph, s) for s in segments))


def _cut(graph: Graph, segment: Segment) -> str:
    if segment.start is None:
        return ""
    parameter, side = segment.start
    readers = graph.readers(parameter)
    if len(readers) == 1 and readers[0].op_type == "Transpose":
        parameter = readers[0].output[0]
        readers = graph.readers(parameter)
    if len(readers) != 1:
        raise UnsupportedError(f"cannot find where {segment.name} starts: {len(readers)} nodes read {parameter}")
    (node,) = readers
    return str(node.output[0] if side == "output" else next(name for name in node.input if name != parameter))


def _apply(
    names: tuple[str, ...], model: onnx.ModelProto, context: PassContext, backend: Backend, watch: Watch | None = None
) -> onnx.ModelProto:
    if watch is not None:
        watch(None, model)
    for name in names:
        step = plugins.get("passes", name)
        if step.standard or name in backend.passes:
            model = step.apply(model, context)
            if watch is not None:
                watch(step, model)
    return model


# ---------------------------------------------------------------------------------------------- a candidate


def lower(
    blueprint: Blueprint,
    family: Family,
    config: Any,
    space: SearchSpace,
    candidate: Candidate,
    target: Target,
    weights: Mapping[str, Array],
    ranges: ActivationRanges | None,
    backend: Backend,
    watch: Watch | None = None,
) -> onnx.ModelProto:
    """The candidate's graph for one backend; `weights`: the largest network's state dict; `watch` sees the graph after each pass."""
    segments = network.kept(family, config, space, candidate)
    shapes = network.sliced_shapes(family, config, network.values(family, config, space, candidate))
    graph = Graph(_copy(blueprint.model))
    _keep_segments(graph, blueprint, {s.name for s in segments})
    model = graph.finish()
    _check_dropped(model, blueprint, {s.name for s in segments})
    _set_heads(model, blueprint.parameters, shapes)
    context = PassContext(
        parameters=shapes,
        quantized=network.quantized_weights(family, config, space, candidate, target.id),
        ranges={name: (low, high) for name, low, high in ranges.sites} if ranges else {},
        half=_half({network.block_precision(space, candidate, segment, target.id) for segment in segments}),
    )
    model = _apply(SLICED_PASSES, model, context, backend)
    _bind(model, blueprint.parameters, lambda name: _prefix(name, weights, shapes[name]))
    return _checked(_quantized(_apply(PASSES, model, context, backend, watch), context))


def _quantized(model: onnx.ModelProto, context: PassContext) -> onnx.ModelProto:
    """The model, if everything that should be is stored as integers, and nothing of it as floats too; UnsupportedError naming the rest."""
    stored = {t.name for t in model.graph.initializer}
    integers = {p for name in stored if name.endswith((INT8, BLOCKS)) for p in parameter_of(name).split(JOINED)}
    floats = {p for p in context.quantized if not stored.isdisjoint((p, p + TRANSPOSED))}
    if left := sorted((context.quantized.keys() - integers) | floats):
        raise UnsupportedError(
            f"{len(left)} of {len(context.quantized)} weights were not quantized as asked",
            detail="\n".join(f"{name}: {context.quantized[name]}" for name in left),
            hint="no pass of `lowering.PASSES` that this backend takes found a product with them",
        )
    return model


def _half(precisions: set[Precision]) -> bool:
    """Whether the graph's floats are float16: those of all its blocks are, or of none."""
    floats = {p.name for p in precisions if p.weights.kind == "float"}
    if FLOAT16.name in floats and len(floats) > 1:
        raise UnsupportedError(f"a graph has one kind of floats, the candidate has {', '.join(sorted(floats))}")
    return FLOAT16.name in floats


def _keep_segments(graph: Graph, blueprint: Blueprint, names: set[str]) -> None:
    """Join each kept segment to the one kept before it; what only dropped segments need becomes unreachable."""
    kept = [i for i, segment in enumerate(blueprint.segments) if segment.name in names]
    graph.rename_uses({blueprint.cuts[i]: blueprint.end(previous) for previous, i in itertools.pairwise(kept)})


def _check_dropped(model: onnx.ModelProto, blueprint: Blueprint, kept: set[str]) -> None:
    gone = {p: s.name for s in blueprint.segments if s.name not in kept for p in s.parameters}
    for node in model.graph.node:
        for name in node.input:
            if name in gone:
                raise UnsupportedError(f"{gone[name]} cannot be dropped: {node.name} is needed elsewhere")


def _prefix(name: str, weights: Mapping[str, Array], shape: tuple[int, ...]) -> Array:
    """The leading part of a parameter, of the given shape."""
    if name not in weights:
        raise ModelError(f"the weights have no such parameter: {name}", hint="is this the state dict of the largest network?")
    value = np.asarray(weights[name])
    if value.ndim != len(shape) or any(have < want for have, want in zip(value.shape, shape, strict=True)):
        raise ModelError(f"parameter {name} has shape {value.shape}, smaller than the candidate's {shape}")
    return value[tuple(slice(count) for count in shape)].astype(np.float32, copy=False)


def _bind(model: onnx.ModelProto, parameters: Collection[str], value: Callable[[str], Array]) -> None:
    """Parameters that are inputs become initializers, transposed where the input is; those that nothing reads are left out."""
    read = {name for node in model.graph.node for name in node.input}
    inputs = [entry for entry in model.graph.input if parameter_of(entry.name) in parameters]
    for name in [entry.name for entry in inputs if entry.name in read]:
        array = value(parameter_of(name))
        array = array.T if name.endswith(TRANSPOSED) else array
        model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
    gone = {entry.name for entry in inputs}
    for i in reversed(range(len(model.graph.input))):
        if model.graph.input[i].name in gone:
            del model.graph.input[i]


def _set_heads(model: onnx.ModelProto, full: Mapping[str, tuple[int, ...]], sliced: Mapping[str, tuple[int, ...]]) -> None:
    """Head counts of fused attention follow the rows that are left of the query weight."""
    graph = Graph(model)
    for node in model.graph.node:
        for field in node.attribute:
            if node.op_type == "MultiHeadAttention" and field.name == "num_heads":
                weight = linear_weight(graph, node.input[0], full)
                field.i = field.i * sliced[weight][0] // full[weight][0]


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    return copied


def _checked(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model, if onnx finds it valid; shapes are inferred too where every operator is standard ONNX.

    Large initializers are inputs of what is checked: the checker copies its argument twice.
    """
    standard = all(node.domain in ("", "ai.onnx") for node in model.graph.node)
    light = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    graph = model.graph
    light.graph.MergeFrom(onnx.GraphProto(name=graph.name, node=graph.node, input=graph.input, output=graph.output))
    for tensor in graph.initializer:
        if math.prod(tensor.dims) > CHECKED_ELEMENTS:
            light.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        else:
            light.graph.initializer.append(tensor)
    onnx.checker.check_model(light, full_check=standard)
    return model


# ---------------------------------------------------------------------------------------------- one operator


def lower_operator(
    blueprint: Blueprint, family: Family, config: Any, operator: Operator, repeat: int, backend: Backend, seed: int
) -> onnx.ModelProto:
    """`repeat` copies of the block that the operator describes, each with its own random weights so that none can be merged.

    Blocks that read and write the main tensor are chained: input `hidden`, output `output`. The first and the last block of a
    network cannot be, nor an attention of which the first token only is read; their copies stand side by side and each has an output
    of its own, so that all are executed. What does not depend on the main tensor's values or on parameters (mask arithmetic, position
    indices) is there once, as in a network.
    """
    index, values, first = _find(family, config, operator, backend)
    segment, shapes = blueprint.segments[index], network.sliced_shapes(family, config, values)
    sequence = dict(operator.dims).get("sequence", 0)
    tokens: dict[int, list[str | int]] = {0: [], 1: [1]}  # a sequence of one is that of the first token, however long the network's is
    main = ["batch", *tokens.get(sequence, ["sequence"]), operator.dim("hidden")]
    model = _stack(blueprint, index, repeat, main, narrows=first and sequence != 1)
    copies = {_copy_name(j, p): p for j in range(repeat) for p in segment.parameters}
    full = {name: blueprint.parameters[p] for name, p in copies.items()}
    sliced = {name: shapes[p] for name, p in copies.items()}
    _set_heads(model, full, sliced)
    rng = np.random.default_rng(seed)
    norms = {node.input[1] for node in model.graph.node if node.op_type == "LayerNormalization"}
    quantized = [name for name, p in copies.items() if p in segment.quantizable and operator.precision.weights.kind == "int"]
    context = PassContext(
        parameters=sliced,
        quantized=dict.fromkeys(quantized, operator.precision.name),
        ranges={name: _range(name) for name in quantized},
        half=_half({operator.precision}),
    )
    model = _apply(SLICED_PASSES, model, context, backend)
    _bind(model, sliced, lambda name: _random(sliced[name], name in norms, rng))
    return _checked(_quantized(_apply(PASSES, model, context, backend), context))


def _find(family: Family, config: Any, operator: Operator, backend: Backend) -> tuple[int, dict[str, int], bool]:
    """(segment index, gene values, whether its output has the first token only) of the first block that becomes the operator."""
    workload = family.workload(config, operator.dim("batch"), dict(operator.dims).get("sequence", 0))
    choices = family.choices(config, backend.width_multiple)
    top = {gene: options[-1] for gene, options in choices.items()}
    for index, segment in enumerate(family.segments(config)):
        if segment.kind == operator.kind:
            own = {g.gene for g in family.groups(config) if any(p in segment.parameters for p, _ in g.members)}
            genes = [gene for gene in choices if gene in own]
            for combination in itertools.product(*(choices[gene] for gene in genes)):
                values = top | dict(zip(genes, combination, strict=True))
                for first in (False, True):
                    if family.operator(config, segment, values, workload, operator.precision, first) == operator:
                        return index, values, first
    raise UnsupportedError(f"no block of this {family.name} becomes the operator: {operator.label}")


def _copy_name(number: int, name: str) -> str:
    return f"copies.{number}.{name}"


def _stack(blueprint: Blueprint, index: int, repeat: int, main: list[str | int], narrows: bool) -> onnx.ModelProto:
    """Copies of one segment, chained where its output can be its input: not where it `narrows`, its first token alone being read."""
    graph = Graph(_copy(blueprint.model))
    segment, end = blueprint.segments[index], blueprint.end(index)
    chained = 0 < index < len(blueprint.segments) - 1 and not narrows
    joints = {cut for cut in blueprint.cuts if cut and cut != end}
    shared, own = _partition(graph.ancestors([end], stop=joints), segment, joints)
    graph.nodes = shared
    for node in shared:
        _rename(node, dict.fromkeys(joints, "hidden"))
    source, ends = "hidden", []
    made = {name for node in own for name in node.output} | set(segment.parameters)
    for j in range(repeat):
        names = {name: _copy_name(j, name) for name in made} | dict.fromkeys(joints, source)
        for node in own:
            copied = onnx.NodeProto()
            copied.CopyFrom(node)
            copied.name = _copy_name(j, node.name)
            _rename(copied, names)
            graph.nodes.append(copied)
        ends.append(names[end])
        source = ends[-1] if chained else source
    if narrows:
        index_of_first = graph.add_constant("token_read", np.array(0, np.int64))
        for j, name in enumerate(ends):
            graph.nodes.append(graph.node("Gather", _copy_name(j, "First"), [name, index_of_first], [f"{name}.read"], axis=1))
        ends = [f"{name}.read" for name in ends]
    graph.index()
    result = [main[0], main[-1]] if narrows else main
    return _with_ends(graph, blueprint, segment, repeat, main, result, ends[-1:] if chained else ends)


def _partition(nodes: list[onnx.NodeProto], segment: Segment, joints: set[str]) -> tuple[list[onnx.NodeProto], list[onnx.NodeProto]]:
    """(nodes that all copies of a segment share, nodes of the segment); the shape of the main tensor is shared."""
    own_tensors = set(segment.parameters)
    shared, own = [], []
    for node in nodes:
        values = own_tensors | (joints if node.op_type != "Shape" else set())
        if values.intersection(node.input):
            own_tensors.update(node.output)
            own.append(node)
        else:
            shared.append(node)
    return shared, own


def _rename(node: onnx.NodeProto, names: Mapping[str, str]) -> None:
    for tensors in (node.input, node.output):
        for i, name in enumerate(tensors):
            tensors[i] = names.get(name, name)


def _with_ends(
    graph: Graph, blueprint: Blueprint, segment: Segment, repeat: int, main: list[str | int], result: list[str | int], ends: list[str]
) -> onnx.ModelProto:
    """The model with inputs and outputs of a stack: `hidden` and the graph inputs it needs; `output`, `output.1`, …"""
    proto, last = graph.model.graph, blueprint.segments[-1] is segment
    logits = [d.dim_param or d.dim_value for d in proto.output[0].type.tensor_type.shape.dim]
    outputs = [f"output.{i}" if i else "output" for i in range(len(ends))]
    for node in graph.nodes:
        _rename(node, dict(zip(ends, outputs, strict=True)))
    graph.index()
    read = {name for node in graph.nodes for name in node.input}
    inputs = [value for value in proto.input if value.name in read]
    if "hidden" in read:
        inputs.insert(0, onnx.helper.make_tensor_value_info("hidden", onnx.TensorProto.FLOAT, main))
    parameters = [_copy_name(j, p) for j in range(repeat) for p in segment.parameters]
    inputs += [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in parameters]
    results = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, logits if last else result) for name in outputs]
    for field, content in ((proto.input, inputs), (proto.output, results)):
        kept = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in content]
        del field[:]
        field.extend(kept)
    return graph.finish()


def _range(name: str) -> tuple[float, float]:
    """An input range for a weight in a stack; another one for every copy, or what copies side by side read would be quantized once."""
    wider = 1 + 0.001 * int(name.split(".")[1])
    return RANDOM_RANGE[0] * wider, RANDOM_RANGE[1] * wider


def _random(shape: tuple[int, ...], norm: bool, rng: np.random.Generator) -> Array:
    """Weights that keep activations near unit size through a long stack."""
    values = rng.standard_normal(shape, dtype=np.float32)
    if norm:
        return 1 + np.float32(0.02) * values
    return values * np.float32(np.prod(shape[1:], dtype=float) ** -0.5 if len(shape) > 1 else 0.02)


# ---------------------------------------------------------------------------------------------- reading a graph back


class Block(NamedTuple):
    """A segment as found in a lowered graph."""

    name: str
    kind: str
    weights: tuple[tuple[str, tuple[int, ...]], ...]
    """(parameter, shape in the orientation of the state dict), sorted."""
    quantized: tuple[str, ...]
    """Weights stored as integers, sorted."""


def describe(model: onnx.ModelProto, family: Family, config: Any) -> list[Block]:
    """The segments whose parameters a lowered graph holds, in execution order."""
    shapes: dict[str, tuple[int, ...]] = {}
    integers = set()
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            integers.add(parameter_of(node.input[1]))
            shapes[parameter_of(node.input[1])] = (attribute(node, "N"), attribute(node, "K"))
    for tensor in model.graph.initializer:
        name = parameter_of(tensor.name)
        stored = tensor.name.removeprefix(name)
        if stored in ("", TRANSPOSED) or stored.endswith(INT8):
            joined = name.split(JOINED)
            dims = [*tensor.dims[:-1], tensor.dims[-1] // len(joined)] if len(joined) > 1 else list(tensor.dims)
            shapes |= dict.fromkeys(joined, tuple(reversed(dims)) if TRANSPOSED in stored else tuple(dims))
            if INT8 in stored:
                integers.update(joined)
    found = []
    for segment in family.segments(config):
        weights = tuple((p, shapes[p]) for p in sorted(segment.parameters) if p in shapes)
        if weights:
            found.append(Block(segment.name, segment.kind, weights, tuple(p for p, _ in weights if p in integers)))
    return found
