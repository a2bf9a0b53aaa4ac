"""The most that a kit's manifest may name: counted before anything is expanded, because a manifest may come from anywhere.

A search space is a few lines of JSON whatever its size, and so is a configuration of a billion layers. What is counted here is what the
profiler would otherwise build lists, modules and sets of.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from nascompile import network, plugins, space as spaces
from nascompile.errors import RecipeError, RecordError
from nascompile.families import Family
from nascompile.records import FLOAT16, FLOAT32, Candidate, SearchSpace, Target

LAYERS = 64
"""Of a network; XLM-R XXL has 48."""
INTEGER = 2**20
"""Largest number in a configuration: vocabularies end at a quarter of that."""
ENTRIES, DEPTH = 200_000, 8
"""Values in a configuration, label names included, and how deep they may be nested."""
OPERATORS = 20_000
"""Operators that the genes name, counted before equal ones of several layers are one."""
NETWORKS = 100
"""Whole networks that calibrate and validate."""
SAID = 20
"""Faults that are listed."""
OWN_KIT = "give your own copy of the kit with --kit: `nascompile kit export` writes none like this"


def check_config(config: Mapping[str, Any], hint: str = OWN_KIT) -> None:
    """RecordError for a configuration that no model here has, before it is read as one."""
    _refuse(_of_config(config), "kits are not made for such a model", hint)


def check_space(
    family: Family, config: Any, space: SearchSpace, target: Target, networks: int, timed: Sequence[Candidate] = (), hint: str = OWN_KIT
) -> None:  # fmt: skip
    """RecordError for a space that is none of the model's, or too large; `timed`: a candidate for every time that one is in a window."""
    _refuse(_of_space(family, config, space, target), "the kit's search space is not one of its model", hint)
    faults = []
    if (count := operators(family, config, space)) > OPERATORS:
        faults.append(f"its genes name {count:,} operators: at most {OPERATORS:,}")
    for what, number in (("calibrated and validated by", networks), ("windows hold", len(timed))):
        if number > NETWORKS:
            faults.append(f"{what} {number:,} whole networks: at most {NETWORKS}")
    _refuse(faults, "the kit's search space is too large", hint)
    _refuse(_of_candidates(space, timed), "the kit holds networks that are not of its search space", hint)


def operators(family: Family, config: Any, space: SearchSpace) -> int:
    """Operators that `network.operators` would go through, without going through them."""
    choices = {gene.name: len(gene.choices) for gene in space.genes}
    groups, total = family.groups(config), 0
    for segment in family.segments(config):
        own = [gene for gene in network.genes_of(family, groups, segment) if gene in choices]
        tokens = 2 if family.reads_first_token else 1
        total += tokens * choices.get(network.precision_gene(segment), 1) * math.prod(choices[name] for name in own)
    return total


def _refuse(faults: Iterable[str], message: str, hint: str) -> None:
    if found := list(faults):
        more = [f"and {len(found) - SAID} more"] if len(found) > SAID else []
        raise RecordError(message, detail="\n".join([*found[:SAID], *more]), hint=hint)


def _of_config(config: Mapping[str, Any]) -> Iterator[str]:
    left: list[tuple[str, Any, int]] = [("", config, 0)]
    seen = 0
    while left:
        name, value, depth = left.pop()
        seen += 1
        if depth > DEPTH:
            yield f"{_short(name)}: nested deeper than {DEPTH}"
            return
        if isinstance(value, Mapping | list):
            if (seen := seen + len(value)) > ENTRIES:
                yield f"more than {ENTRIES:,} values"
                return
            pairs = value.items() if isinstance(value, Mapping) else ((name, part) for part in value)
            left += [(str(key), part, depth + 1) for key, part in pairs]
        elif isinstance(value, int) and not isinstance(value, bool):
            most = LAYERS if "layer" in name else INTEGER
            if abs(value) > most:
                said = f"{value:,}" if value.bit_length() <= 64 else f"a number of {value.bit_length():,} bits"
                yield f"{_short(name)} = {said}: at most {most:,}"


def _of_space(family: Family, config: Any, space: SearchSpace, target: Target) -> Iterator[str]:
    architecture = family.choices(config, 1)
    precisions = {network.precision_gene(segment) for segment in family.segments(config)}
    named = {p.name: p for p in space.precisions}
    known = {p.name: p for p in (FLOAT32, FLOAT16, *(plugins.get("quantization", n).precision for n in plugins.names("quantization")))}
    yield from (f"precision {_short(name)}: none of this version" for name, p in named.items() if known.get(name) != p)
    if len(named) != len(space.precisions):
        yield "a precision is named twice"
    if space.targets != (target.id,) or space.legal:
        yield "it is not for the kit's target alone"
    layers = max(architecture.get("depth", (0,)))
    if sorted(space.layer_order) != list(range(layers)):
        yield f"layer_order does not name each of {layers} layers once"
    if len({gene.name for gene in space.genes}) != len(space.genes):
        yield "a gene is named twice"
    for gene in space.genes:
        if gene.name not in (architecture if gene.kind == "architecture" else precisions):
            yield f"{_short(gene.name)}: no {gene.kind} gene of the model"
        elif gene.kind == "architecture" and not _ascends(gene.choices, architecture[gene.name][-1]):
            yield f"{gene.name}: its choices do not ascend from 1 to {architecture[gene.name][-1]} at most"
        elif gene.kind == "precision" and not (gene.choices and set(gene.choices) <= named.keys() and _once(gene.choices)):
            yield f"{gene.name}: its choices are not different precisions of the space"
        elif len(gene.requires) > 1 or any(name != "depth" for name, _ in gene.requires):
            yield f"{gene.name}: it can require a depth and nothing else"


def _of_candidates(space: SearchSpace, timed: Iterable[Candidate]) -> Iterator[str]:
    for point in timed:
        try:
            spaces.check(space, point)
        except RecipeError as error:
            yield error.message


def _ascends(choices: Sequence[int | str], most: int) -> bool:
    numbers = [choice for choice in choices if isinstance(choice, int)]
    ascend = all(a < b for a, b in zip([0, *numbers], numbers, strict=False))
    return 0 < len(numbers) == len(choices) and ascend and numbers[-1] <= most


def _once(choices: Sequence[int | str]) -> bool:
    return len(set(choices)) == len(choices)


def _short(name: str) -> str:
    return repr(name[:60])
