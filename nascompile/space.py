"""Genes, activity, legality: what is a candidate of a space, drawn, enumerated, encoded and checked."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import msgspec
import numpy as np

from nascompile.errors import RecipeError
from nascompile.records import FLOAT32, Candidate, Gene, SearchSpace

Value = int | str
Genome = dict[str, Value]
"""Gene ▸ value for every gene; a precision gene of target number t > 0 is named `gene@t`."""


def gene_names(space: SearchSpace) -> tuple[str, ...]:
    """Positions of the genome: architecture genes once, precision genes once per target."""
    return tuple(name for gene in space.genes for name in _slots(space, gene))


def slot_gene(space: SearchSpace, slot: str) -> Gene:
    """The gene a genome position belongs to, with the choices it has there."""
    name, _, target = slot.partition("@")
    gene = next(gene for gene in space.genes if gene.name == name)
    return on_target(space, gene, int(target or 0))


def on_target(space: SearchSpace, gene: Gene, target: int) -> Gene:
    """A gene with the choices it has for target number `target`: all, but for precisions that the target's backend does not know."""
    if gene.kind == "architecture" or not space.legal:
        return gene
    return msgspec.structs.replace(gene, choices=tuple(choice for choice in gene.choices if choice in space.legal[target]))


def of_targets(space: SearchSpace, kept: Sequence[int]) -> SearchSpace:
    """The space of some of the targets (their numbers, ascending): what a search for those alone has, at the same widths."""
    everything = (tuple(p.name for p in space.precisions),) * len(space.targets)
    legal = tuple((space.legal or everything)[t] for t in kept)
    genes = []
    for gene in space.genes:
        choices = tuple(c for c in gene.choices if gene.kind == "architecture" or any(c in names for names in legal))
        if gene.kind == "architecture" or len(choices) > 1 or FLOAT32 not in space.precisions:
            genes.append(msgspec.structs.replace(gene, choices=choices))
    used = {choice for gene in genes for choice in gene.choices}
    return msgspec.structs.replace(
        space, genes=tuple(genes), precisions=tuple(p for p in space.precisions if p.name in used or p == FLOAT32),
        targets=tuple(space.targets[t] for t in kept), legal=legal if len(kept) > 1 else (),
    )  # fmt: skip


def is_active(gene: Gene, genome: Mapping[str, Value]) -> bool:
    """Whether the gene has any effect, given the genes it requires."""
    return all(int(genome[name]) >= least for name, least in gene.requires)


def candidate(space: SearchSpace, genome: Mapping[str, Value]) -> Candidate:
    """The canonical candidate of a genome: inactive genes left out, so equal networks are equal candidates."""
    active = [gene for gene in space.genes if is_active(gene, genome)]
    return Candidate(
        space=space.id,
        architecture=tuple((gene.name, int(genome[gene.name])) for gene in active if gene.kind == "architecture"),
        precision=tuple(
            (target, tuple((gene.name, str(genome[_slots(space, gene)[t]])) for gene in active if gene.kind == "precision"))
            for t, target in enumerate(space.targets)
        ),
    )


def genome(space: SearchSpace, point: Candidate) -> Genome:
    """A full genome of the candidate; inactive genes take their first choice."""
    check(space, point)
    values: Genome = {slot: slot_gene(space, slot).choices[0] for slot in gene_names(space)}
    values.update(point.architecture)
    for t, (_, genes) in enumerate(point.precision):
        values.update({_slots(space, slot_gene(space, name))[t]: value for name, value in genes})
    return values


def check(space: SearchSpace, point: Candidate) -> None:
    """RecipeError naming the first value that is not of the space, or an active gene without a value."""
    if point.space != space.id:
        raise RecipeError(f"candidate {point.id} belongs to another space: {point.space}", hint=f"this run's space is {space.id}")
    values: Genome = dict(point.architecture)
    if tuple(target for target, _ in point.precision) != space.targets:
        raise RecipeError(f"candidate {point.id} has precisions for other targets than the space: {', '.join(space.targets)}")
    kinds = {gene.name: gene.kind for gene in space.genes}
    named = [("architecture", point.architecture), *(("precision", genes) for _, genes in point.precision)]
    for kind, name in ((kind, name) for kind, pairs in named for name, _ in pairs):
        if kinds.get(name) != kind:
            raise RecipeError(f"{name} is no {kind} gene of the space", hint=f"its genes: {', '.join(kinds)}")
    for t, (_, genes) in enumerate(point.precision):
        values.update({_slots(space, slot_gene(space, name))[t]: value for name, value in genes})
    for slot in gene_names(space):
        gene = slot_gene(space, slot)
        if all(name in values for name, _ in gene.requires) and is_active(gene, values):
            if values.get(slot) not in gene.choices:
                raise RecipeError(f"{slot} = {values.get(slot)} is not a choice", hint=f"choices: {', '.join(map(str, gene.choices))}")
        elif slot in values:
            raise RecipeError(f"{slot} is set but inactive in this candidate")


def sample(space: SearchSpace, rng: np.random.Generator) -> Candidate:
    """A candidate with every gene drawn uniformly from its choices."""
    return candidate(space, {slot: choices[int(rng.integers(len(choices)))] for slot, choices in _choices(space)})


def largest(space: SearchSpace, precision: str = "") -> Candidate:
    """The whole network; every precision gene at `precision` where it is a choice, else at its first (float) choice."""
    return _extreme(space, -1, precision)


def smallest(space: SearchSpace, precision: str = "") -> Candidate:
    """The smallest network, precisions as in `largest`."""
    return _extreme(space, 0, precision)


def uniform(space: SearchSpace) -> Candidate:
    """The whole network with every precision gene at its last (cheapest) choice: what quantizing everything gives."""
    return candidate(space, {slot: choices[-1] for slot, choices in _choices(space)})


def quantized(space: SearchSpace, point: Candidate) -> Candidate:
    """The same architecture with every precision gene at its last (cheapest) choice."""
    cheapest = {slot: choices[-1] for slot, choices in _choices(space) if slot_gene(space, slot).kind == "precision"}
    return candidate(space, genome(space, point) | cheapest)


def size(space: SearchSpace) -> int:
    """Number of different candidates."""
    roots = {name for gene in space.genes for name, _ in gene.requires}
    total = 0
    free = [gene for gene in space.genes if gene.name in roots]
    for values in itertools.product(*(gene.choices for gene in free)):
        chosen = {gene.name: value for gene, value in zip(free, values, strict=True)}
        rest = [gene for gene in space.genes if gene.name not in roots and is_active(gene, chosen)]
        total += math.prod(len(slot_gene(space, slot).choices) for gene in rest for slot in _slots(space, gene))
    return total


def enumerate_all(space: SearchSpace) -> Iterator[Candidate]:
    """Every candidate once, in genome order; for small spaces."""
    seen = set()
    slots = _choices(space)
    for values in itertools.product(*(choices for _, choices in slots)):
        point = candidate(space, dict(zip((slot for slot, _ in slots), values, strict=True)))
        if point not in seen:
            seen.add(point)
            yield point


def encode(space: SearchSpace, point: Candidate) -> tuple[int, ...]:
    """Indices into each position's choices; inactive positions 0."""
    values = genome(space, point)
    return tuple(choices.index(values[slot]) for slot, choices in _choices(space))


def decode(space: SearchSpace, indices: tuple[int, ...]) -> Candidate:
    """The candidate at these indices."""
    slots = _choices(space)
    return candidate(space, {slot: choices[index] for (slot, choices), index in zip(slots, indices, strict=True)})


def kept_layers(space: SearchSpace, point: Candidate) -> tuple[int, ...]:
    """Layers of the candidate in network order: the first `depth` of the importance order."""
    depth = dict(point.architecture).get("depth", len(space.layer_order))
    return tuple(sorted(space.layer_order[:depth]))


def _slots(space: SearchSpace, gene: Gene) -> tuple[str, ...]:
    if gene.kind == "architecture":
        return (gene.name,)
    return tuple(gene.name if t == 0 else f"{gene.name}@{t}" for t in range(len(space.targets)))


def _choices(space: SearchSpace) -> list[tuple[str, tuple[Value, ...]]]:
    return [(slot, on_target(space, gene, t).choices) for gene in space.genes for t, slot in enumerate(_slots(space, gene))]


def _extreme(space: SearchSpace, end: int, precision: str) -> Candidate:
    values: Genome = {}
    for gene in space.genes:
        for t, slot in enumerate(_slots(space, gene)):
            choices = on_target(space, gene, t).choices
            if gene.kind == "architecture":
                values[slot] = choices[end]
            else:
                values[slot] = precision if precision in choices else choices[0]
    return candidate(space, values)
