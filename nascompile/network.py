"""What follows from a family's description for one candidate: kept blocks, slices, operator graph, size; no torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from nascompile import plugins, space as spaces
from nascompile.backends import Backend
from nascompile.errors import RecipeError, UnsupportedError
from nascompile.families import Family, Group, Segment
from nascompile.records import (
    FLOAT16,
    FLOAT32,
    INT8,
    WEIGHT_INT8,
    Candidate,
    Edge,
    Gene,
    Node,
    Operator,
    OperatorGraph,
    Precision,
    SearchSpace,
    Target,
)

AS_SEARCHED, HALF = "as-searched", FLOAT16.name
SEARCHED = (INT8.name, WEIGHT_INT8.name)
"""Precisions that a search offers beside FP32 unless it is told others."""


def search_space(
    family: Family, config: Any, backend: Backend, target: Target, model_digest: str, layer_order: tuple[int, ...] = (),
    precisions: tuple[str, ...] = SEARCHED,
) -> SearchSpace:  # fmt: skip
    """Architecture genes of the family, and a precision gene for every block that may take one of `precisions` the backend supports."""
    return shared_space(family, config, ((backend, target),), model_digest, layer_order, precisions)


def shared_space(
    family: Family, config: Any, places: Sequence[tuple[Backend, Target]], model_digest: str, layer_order: tuple[int, ...] = (),
    precisions: tuple[str, ...] = SEARCHED,
) -> SearchSpace:  # fmt: skip
    """The space of one architecture for several targets: widths that fit all backends, precision genes per target.

    A block has a precision gene where one of the backends gives it a choice; on the others it has what their backends know of that.
    """
    backends = [backend for backend, _ in places]
    choices = family.choices(config, math.lcm(*(backend.width_multiple for backend in backends)))
    layers = {group.gene: group.layer for group in family.groups(config)}
    count = max(choices.get("depth", (0,)))
    order = layer_order or tuple(range(count))
    genes = []
    if "depth" in choices:
        genes.append(Gene(name="depth", kind="architecture", choices=choices["depth"]))
    for name, values in choices.items():
        if name != "depth":
            genes.append(Gene(name=name, kind="architecture", choices=values, requires=_requires(choices, order, layers.get(name))))
    integers = all(backend.supports(FLOAT32) for backend in backends)  # nothing here computes in float
    used: dict[str, Precision] = {} if integers else {FLOAT32.name: FLOAT32}
    for segment in family.segments(config):
        found = [p for p in map(_precision, precisions) if _takes(segment, p) and not all(backend.supports(p) for backend in backends)]
        if found:
            used.update({precision.name: precision for precision in found})
            requires = _requires(choices, order, segment.layer)
            names = (*([] if integers else [FLOAT32.name]), *(precision.name for precision in found))
            genes.append(Gene(name=precision_gene(segment), kind="precision", choices=names, requires=requires))
    if not used:
        raise UnsupportedError(
            f"none of the precisions to search can be run: {', '.join(precisions) or 'none given'}",
            detail="\n".join(f"{backend.name}: {backend.supports(FLOAT32)}" for backend in backends),
            hint=f'search.precisions = ["{INT8.name}"]',
        )  # fmt: skip
    legal = tuple(tuple(name for name, p in used.items() if p == FLOAT32 or not backend.supports(p)) for backend in backends)
    return SearchSpace(
        family=family.name, model_digest=model_digest, genes=tuple(genes), precisions=tuple(used.values()),
        targets=tuple(target.id for _, target in places), layer_order=order, legal=legal if len(places) > 1 else (),
    )  # fmt: skip


def product_precisions() -> tuple[str, ...]:
    """Names of all precisions with integers that products may have, sorted."""
    return tuple(sorted({str(plugins.get("quantization", name).name) for name in plugins.names("quantization")} - {WEIGHT_INT8.name}))


def _precision(name: str) -> Precision:
    found: Precision = plugins.get("quantization", name).precision
    return found


def _takes(segment: Segment, precision: Precision) -> bool:
    """Whether a block may have the precision: its own scheme, or, if that is one of products, any other for products."""
    return segment.scheme == precision.name or (segment.scheme == INT8.name and precision != WEIGHT_INT8)


def precision_gene(segment: Segment) -> str:
    """Name of a block's precision gene."""
    return f"{segment.name}.precision"


def kept(family: Family, config: Any, space: SearchSpace, point: Candidate) -> tuple[Segment, ...]:
    """The candidate's blocks in execution order."""
    layers = set(spaces.kept_layers(space, point))
    return tuple(s for s in family.segments(config) if s.layer is None or s.layer in layers)


def values(family: Family, config: Any, space: SearchSpace, point: Candidate) -> dict[str, int]:
    """Architecture gene ▸ value for every gene; an inactive gene has its largest value, which nothing reads."""
    full = {gene.name: int(gene.choices[-1]) for gene in space.genes if gene.kind == "architecture"}
    return full | dict(point.architecture)


def slices(family: Family, config: Any, chosen: Mapping[str, int]) -> dict[str, tuple[tuple[int, int], ...]]:
    """Parameter ▸ ((axis, elements kept from the front), …) for every parameter that a gene slices."""
    cut: dict[str, dict[int, int]] = {}
    for group in family.groups(config):
        for parameter, axis in group.members:
            cut.setdefault(parameter, {})[axis] = group.unit * chosen[group.gene]
    return {parameter: tuple(sorted(axes.items())) for parameter, axes in cut.items()}


def block_precision(space: SearchSpace, point: Candidate, segment: Segment, target: str) -> Precision:
    """The precision the candidate gives to a block on one target; where it has no gene, what such blocks have."""
    genes = dict(dict(point.precision)[target])
    name = genes.get(precision_gene(segment))
    return without_gene(space) if name is None else space.precision(name)


def without_gene(space: SearchSpace) -> Precision:
    """The precision of blocks that have no gene for it: FP32, or that of a space without FP32."""
    return FLOAT32 if FLOAT32 in space.precisions else space.precisions[0]


def quantized_weights(family: Family, config: Any, space: SearchSpace, point: Candidate, target: str) -> dict[str, str]:
    """Weight parameter ▸ scheme name for everything the candidate quantizes on the target."""
    found = {}
    for segment in kept(family, config, space, point):
        precision = block_precision(space, point, segment, target)
        if precision.weights.kind == "int":
            found.update(dict.fromkeys(segment.quantizable, precision.name))
    return found


def first_token_only(family: Family, config: Any, space: SearchSpace, point: Candidate, target: str) -> frozenset[str]:
    """Names of the blocks whose output is computed for the first token only: the last layer's, and what follows it.

    None where the classifier reads other tokens, or where some block finds its ranges in a call (`passes/drop_unread_tokens.py`).
    """
    return _first_token_only(family, kept(family, config, space, point), space, point, target)


def _first_token_only(family: Family, blocks: Sequence[Segment], space: SearchSpace, point: Candidate, target: str) -> frozenset[str]:
    dynamic = any(block_precision(space, point, s, target).dynamic for s in blocks)
    last = max((s.layer for s in blocks if s.layer is not None), default=None)
    if not family.reads_first_token or dynamic or last is None:
        return frozenset()
    start = min(i for i, s in enumerate(blocks) if s.layer == last)
    return frozenset(s.name for s in blocks[start:])


def graph(family: Family, config: Any, space: SearchSpace, point: Candidate, target: Target) -> OperatorGraph:
    """What the candidate executes on the target, with sizes and MACs; tables, reports and budgets read this."""
    chosen = values(family, config, space, point)
    block = stored(family, config, chosen)
    genes, groups = {gene.name for gene in space.genes}, family.groups(config)
    nodes = []
    blocks = kept(family, config, space, point)
    narrow = _first_token_only(family, blocks, space, point, target.id)
    for segment in blocks:
        precision = block_precision(space, point, segment, target.id)
        operator = family.operator(config, segment, chosen, target.workload, precision, first=segment.name in narrow)
        own = genes_of(family, groups, segment)
        mine, shapes = block(segment)
        nodes.append(
            Node(
                name=segment.name, operator=operator, module=segment.module,
                genes=tuple(sorted({*own, precision_gene(segment)} & genes)),
                parameters=sum(math.prod(shapes[p]) for p in mine.parameters),
                size_bytes=block_bytes(mine, shapes, precision),
                macs=family.macs(family.operator(config, segment, chosen, target.workload, precision)),
                activation_bytes=family.activations(operator) * (precision.weights.bits // 8 if precision.weights.kind == "float" else 4),
            )
        )  # fmt: skip
    edges = tuple(Edge(source=i - 1, target=i, shape=_main_shape(nodes[i].operator)) for i in range(len(nodes)))
    return OperatorGraph(nodes=tuple(nodes), edges=edges)


def genes_of(family: Family, groups: Sequence[Group], segment: Segment) -> tuple[str, ...]:
    """Genes that decide what a block executes: those that slice its parameters, and others that the family names."""
    own = [group.gene for group in groups if any(parameter in segment.parameters for parameter, _ in group.members)]
    return tuple(dict.fromkeys((*own, *getattr(family, "further_genes", lambda segment: ())(segment))))


def stored(family: Family, config: Any, chosen: Mapping[str, int]) -> Callable[[Segment], tuple[Segment, Mapping[str, tuple[int, ...]]]]:
    """Block ▸ what a candidate stores of it, and the shapes: its sliced parameters, unless the family keeps others of them."""
    if own := getattr(family, "stored", None):
        return lambda segment: own(config, segment, chosen)
    shapes = sliced_shapes(family, config, chosen)
    return lambda segment: (segment, shapes)


def sliced_shapes(family: Family, config: Any, chosen: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters after slicing (layers that are dropped included)."""
    shapes = {name: list(shape) for name, shape in family.parameters(config).items()}
    for parameter, axes in slices(family, config, chosen).items():
        for axis, count in axes:
            shapes[parameter][axis] = count
    return {name: tuple(shape) for name, shape in shapes.items()}


def block_bytes(segment: Segment, shapes: Mapping[str, tuple[int, ...]], precision: Precision) -> int:
    """Bytes of a block's weights as stored: quantized ones at their bits plus a float32 scale per channel or group, the rest float32.

    A block of FP16 is FP16 throughout. What is float in a symmetric INT8 block is counted as float32 although FP16 may hold it.
    """
    total, float_bytes = 0, precision.weights.bits // 8 if precision.weights.kind == "float" else 4
    for parameter in segment.parameters:
        count = math.prod(shapes[parameter])
        if parameter in segment.quantizable and precision.weights.granularity == "group":
            (rows, columns), size = shapes[parameter], precision.weights.group_size
            total += rows * -(-columns // size) * (size * precision.weights.bits // 8 + 4)
        elif parameter in segment.quantizable and precision.weights.kind == "int":
            total += count * precision.weights.bits // 8 + 4 * shapes[parameter][0]
        else:
            total += float_bytes * count
    return total


def operators(family: Family, config: Any, space: SearchSpace, target: Target) -> tuple[Operator, ...]:
    """Every different operator that some candidate executes on the target: what a complete table has rows for."""
    return tuple(operator_bytes(family, config, space, target))


def operator_bytes(family: Family, config: Any, space: SearchSpace, target: Target) -> dict[Operator, int]:
    """Every different operator of `operators` ▸ bytes of its stored weights."""
    choices = {gene.name: gene.choices for gene in space.genes if gene.kind == "architecture"}
    top, groups = {name: int(options[-1]) for name, options in choices.items()}, family.groups(config)
    found: dict[Operator, int] = {}
    full = any(p.dynamic for p in space.precisions)  # some candidates compute all tokens up to the end
    for segment in family.segments(config):
        genes = [gene for gene in genes_of(family, groups, segment) if gene in choices]
        names = next((g.choices for g in space.genes if g.name == precision_gene(segment)), (without_gene(space).name,))
        combinations: list[dict[str, int]] = [{}]
        for gene in genes:
            combinations = [c | {gene: int(v)} for c in combinations for v in choices[gene]]
        tokens = ((False, True) if full or segment.layer is not None else (True,)) if family.reads_first_token else (False,)
        for combination in combinations:
            mine, shapes = stored(family, config, top | combination)(segment)
            for name, first in itertools.product(names, tokens):
                precision = space.precision(str(name))
                if not (first and precision.dynamic):
                    operator = family.operator(config, segment, top | combination, target.workload, precision, first)
                    found.setdefault(operator, block_bytes(mine, shapes, precision))
    return found


def retarget(
    family: Family, config: Any, space: SearchSpace, point: Candidate, backend: Backend, target: Target, precision: str = AS_SEARCHED
) -> tuple[SearchSpace, Candidate]:
    """The candidate's architecture for another target, and the space it is a point of: every block has a gene with one choice.

    `precision`: each block keeps what it was searched with, or is FP16, or is of the named one where it can be (of its own scheme where
    it cannot, as tables); then what the backend has for that (its `counterparts`). UnsupportedError naming the first block whose
    precision the backend refuses.
    """
    if precision not in (known := (AS_SEARCHED, HALF, *product_precisions())):
        raise RecipeError(f"unknown precision of a build: {precision}", hint=f"known: {', '.join(known)}")
    depth = {gene.name: tuple(int(choice) for choice in gene.choices) for gene in space.genes if gene.name == "depth"}
    genes, used = [gene for gene in space.genes if gene.kind == "architecture"], {}
    for segment in family.segments(config):
        chosen = _chosen(space, point, segment, backend, precision)
        used[chosen.name] = chosen
        requires = _requires(depth, space.layer_order, segment.layer)
        genes.append(Gene(name=precision_gene(segment), kind="precision", choices=(chosen.name,), requires=requires))
    other = SearchSpace(
        family=space.family, model_digest=space.model_digest, genes=tuple(genes), precisions=tuple(used.values()),
        targets=(target.id,), layer_order=space.layer_order,
    )  # fmt: skip
    fixed = {gene.name: gene.choices[0] for gene in genes if gene.kind == "precision"}
    return other, spaces.candidate(other, spaces.genome(space, point) | fixed)


def half_space(family: Family, config: Any, space: SearchSpace) -> SearchSpace:
    """The space with FP16 in place of FP32, for which then every block has a gene: a graph has one kind of floats."""
    own = {gene.name: gene for gene in space.genes}
    depth = {"depth": tuple(int(choice) for choice in own["depth"].choices)} if "depth" in own else {}
    genes = [gene for gene in space.genes if gene.kind == "architecture"]
    for segment in family.segments(config):
        name = precision_gene(segment)
        choices = own[name].choices[1:] if name in own else ()
        requires = _requires(depth, space.layer_order, segment.layer)
        genes.append(Gene(name=name, kind="precision", choices=(FLOAT16.name, *choices), requires=requires))
    precisions = (FLOAT16, *(p for p in space.precisions if p != FLOAT32))
    return msgspec.structs.replace(space, genes=tuple(genes), precisions=precisions)


def moved(space: SearchSpace, point: Candidate, target: Target) -> tuple[SearchSpace, Candidate]:
    """The same point with the same precisions, its genes keyed by another target: one of another backend or with another session."""
    other = msgspec.structs.replace(space, targets=(target.id,), legal=())
    genes = dict(point.precision)[space.targets[0]]
    return other, msgspec.structs.replace(point, space=other.id, precision=((target.id, genes),))


def _chosen(space: SearchSpace, point: Candidate, segment: Segment, backend: Backend, precision: str) -> Precision:
    wanted = block_precision(space, point, segment, space.targets[0])
    if precision == HALF:
        wanted = FLOAT16
    elif precision != AS_SEARCHED:
        named = _precision(precision)
        wanted = named if _takes(segment, named) else _precision(segment.scheme) if segment.scheme else FLOAT32
    if not segment.scheme and wanted in (FLOAT32, INT8):  # float whatever is searched, where the backend has floats
        wanted = INT8 if backend.supports(FLOAT32) and not backend.supports(INT8) else FLOAT32
    chosen: Precision = getattr(backend, "counterparts", {}).get(wanted.name, wanted)
    if reason := backend.supports(chosen):
        hint = "" if precision == AS_SEARCHED else "leave --precision out for what was searched"
        raise UnsupportedError(f"`{backend.name}` cannot run {segment.name} in {chosen.name}: {reason}", hint=hint)
    return chosen


def _requires(choices: Mapping[str, tuple[int, ...]], order: tuple[int, ...], layer: int | None) -> tuple[tuple[str, int], ...]:
    if layer is None or "depth" not in choices or order.index(layer) < choices["depth"][0]:
        return ()
    return (("depth", order.index(layer) + 1),)


def _main_shape(operator: Operator) -> tuple[int, ...]:
    dims = dict(operator.dims)
    return tuple(dims[name] for name in ("batch", "sequence", "hidden") if name in dims)
