"""What a candidate takes of a microcontroller, before it is built: RAM and flash to the byte, and which rows of a table count it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import msgspec

from nascompile import network
from nascompile.errors import UnsupportedError
from nascompile.families import Family
from nascompile.mcu import program as p
from nascompile.mcu.board import Board, of_settings
from nascompile.mcu.footprints import Footprints
from nascompile.mcu.transformer import Fusion, Layer, Shape, SizesOnly, build
from nascompile.records import Budget, Operator, OperatorGraph, SearchSpace, Target

REPEATED = ("normalization", "every head")
"""Attribute of attention in the plan that never has a normalized tensor whole: it normalizes once more for each head."""

NO_DEVICE = 10**9


def is_program(backend: Any) -> bool:
    """Whether a backend takes integer programs, for microcontrollers, and no graphs."""
    return bool(backend.accepts == "program")


@dataclass(frozen=True)
class Taken:
    """What a candidate takes of its board."""

    ram: int
    """Bytes; as many as no device has for sizes that the kernels do not take."""
    flash: int
    fits: bool
    graph: OperatorGraph
    """With the operators of the plan it has."""
    refused: str = ""
    """Why there is no program of it."""


@dataclass(frozen=True)
class Chip:
    """The board of a target, asked about candidates by their operator graphs."""

    target: Target

    @cached_property
    def board(self) -> Board:
        return of_settings(self.target.device, dict(self.target.session))

    @cached_property
    def footprints(self) -> Footprints:
        return Footprints(self.board)

    def takes(self, graph: OperatorGraph) -> Taken:
        """RAM and flash of a candidate in the fastest plan that fits, and what that executes."""
        try:
            placed = self.footprints.of(Shape.of_graph(graph, self.target.workload.resolution))
        except UnsupportedError as error:
            return Taken(NO_DEVICE, NO_DEVICE, False, graph, error.message)
        ram, board = placed.ram, self.board
        if not placed.fits and ram <= board.ram_bytes and placed.flash <= board.flash.size:
            ram = board.ram_bytes + 8  # in all it would fit, but not the arena into the first memory
        return Taken(ram, placed.flash, placed.fits, in_plan(graph, placed.fusion))

    def limits(self) -> tuple[Budget, ...]:
        """The device's own budgets: RAM and flash."""
        sizes = (("memory_mb", self.board.ram_bytes), ("size_mb", self.board.flash.size))
        return tuple(Budget(metric=metric, bound=size / 1e6, target=self.target.id, limit=True) for metric, size in sizes)


def bounded(given: Iterable[Budget], chip: Chip) -> tuple[Budget, ...]:
    """The given budgets and the device's own, where those are not looser than what was asked for."""
    found = tuple(given)
    asked = {budget.metric: budget.bound for budget in found}
    return (*found, *(limit for limit in chip.limits() if limit.bound < asked.get(limit.metric, float("inf"))))


def in_plan(graph: OperatorGraph, fusion: Fusion) -> OperatorGraph:
    """The graph with the operators that a plan executes."""
    if fusion == "blocks":
        return graph
    nodes = (msgspec.structs.replace(node, operator=repeated(node.operator)) for node in graph.nodes)
    return msgspec.structs.replace(graph, nodes=tuple(nodes))


def repeated(operator: Operator) -> Operator:
    """Attention as `all` executes it; other operators are the same in both plans."""
    if operator.kind != "attention":
        return operator
    return msgspec.structs.replace(operator, attributes=(*operator.attributes, REPEATED))


def operators(family: Family, config: Any, space: SearchSpace, target: Target) -> tuple[Operator, ...]:
    """What a complete table of a microcontroller has rows for: all that the kernels take, attention in both plans."""
    found: dict[Operator, None] = {}
    for operator in network.operators(family, config, space, target):
        if not refusal(operator):
            found |= dict.fromkeys((operator, repeated(operator)))
    return tuple(found)


@cache
def refusal(operator: Operator) -> str:
    """Why no kernel takes an operator; empty if one does."""
    dims = dict(operator.dims)
    tokens = dims["sequence"] if operator.kind in ("attention", "embedding") else 1
    layers: tuple[Layer, ...] = ()
    if operator.kind == "attention":
        layers = (Layer(heads=dims["heads"], head_width=dims["head_dim"], hidden=4, rank=dims.get("rank", 0)),) * 2
    elif operator.kind == "mlp":
        layers = (Layer(heads=1, head_width=4, hidden=dims["width"], rank=dims.get("rank", 0)),) * 2
    patch = dims.get("patch", 1)
    image = (patch, patch * max(1, tokens - 1), dims.get("channels", 1))
    shape = Shape(image=image, patch=patch, width=dims["hidden"], layers=layers, classes=dims.get("labels", 2))
    try:
        p.check(build("one", shape, SizesOnly()).structure)
    except UnsupportedError as error:
        return error.message
    return ""
