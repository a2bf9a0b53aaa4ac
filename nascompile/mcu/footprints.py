"""RAM and flash of very many networks: what `project.place` says of each, with everything remembered that networks share.

A search asks for thousands; writing a model's C to learn its size would take most of its time. Flash is a sum over layers that is taken
from a text written once a layer, and RAM is planned for every network, since offsets depend on all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from nascompile.errors import BudgetError, UnsupportedError
from nascompile.mcu import emit, planner, program as p, project, toolchain
from nascompile.mcu.board import Board
from nascompile.mcu.transformer import FUSIONS, Fusion, Shape, SizesOnly, build
from nascompile.records import Record


class Placed(Record, frozen=True):
    """What a network takes of a board by the fastest plan that fits, or by the smallest where none does."""

    ram: int
    flash: int
    fusion: Fusion
    fits: bool


@dataclass(frozen=True)
class _Text:
    """What a layer adds to a project's C."""

    model_bytes: int
    weights_bytes: int
    names_bytes: int
    counters: int
    functions: frozenset[str]


class Footprints:
    """Of the networks of one board."""

    def __init__(self, board: Board) -> None:
        self.board = board
        self._texts: dict[Any, _Text] = {}
        self._known: dict[Shape, Placed | UnsupportedError] = {}

    def of(self, shape: Shape) -> Placed:
        """RAM and flash of a network; UnsupportedError for sizes that the kernels do not take."""
        if shape not in self._known:
            try:
                self._known[shape] = self._placed(shape)
            except UnsupportedError as error:
                self._known[shape] = error
        found = self._known[shape]
        if isinstance(found, UnsupportedError):
            raise found
        return found

    def _placed(self, shape: Shape) -> Placed:
        for fusion in FUSIONS:
            structure = build("candidate", shape, SizesOnly(), fusion).structure
            p.check(structure)
            rest, flash = self._without_arena(shape, structure, fusion)
            if arena := self._arena(structure, rest, flash):
                return Placed(ram=rest + arena, flash=flash, fusion=fusion, fits=True)
        smallest = planner.plan(p.demand(structure), smallest=True).arena_bytes
        return Placed(ram=rest + smallest, flash=flash, fusion=fusion, fits=False)

    def _without_arena(self, shape: Shape, structure: p.Structure, fusion: Fusion) -> tuple[int, int]:
        """Bytes of RAM besides the arena, and of flash."""
        board, texts = self.board, self._of_parts(shape, structure, fusion)
        base = toolchain.base(board.core, tuple(sorted(frozenset[str]().union(*(text.functions for text in texts)))))
        rest = board.stack_bytes + base.bss + project.up(4 * (sum(text.counters for text in texts) + 1))
        flash = base.text + emit.shared_bytes(sum(text.names_bytes for text in texts))
        flash += sum(text.model_bytes + text.weights_bytes for text in texts)
        return rest, flash

    def _arena(self, structure: p.Structure, rest: int, flash: int) -> int:
        """Bytes of the arena with the fastest tiles that fit; 0 if none do."""
        board, limit = self.board, self.board.arena_limit(rest)
        if flash > board.flash.size or limit <= 0 or rest > board.ram[-1].size:
            return 0
        try:
            return planner.plan(p.demand(structure), limit).arena_bytes
        except BudgetError:
            return 0

    def _of_parts(self, shape: Shape, structure: p.Structure, fusion: Fusion) -> list[_Text]:
        """Of embedding, layers and head."""
        keys = list(_keys(shape, fusion))
        if any(key not in self._texts for key in keys):
            self._texts |= dict(zip(keys, _written(structure), strict=True))
        return [self._texts[key] for key in keys]


def _keys(shape: Shape, fusion: Fusion) -> Iterator[Any]:
    """What decides the C of each part: sizes, and how many digits its number has in names."""
    yield "embedding", shape.image, shape.patch, shape.width
    last = len(shape.layers) - 1
    for number, layer in enumerate(shape.layers):
        yield layer, shape.width, shape.tokens, number == last, fusion, len(str(number))
    yield "head", shape.width, shape.classes


def _written(structure: p.Structure) -> list[_Text]:
    """The C of each part of a transformer, in order; tiles and offsets do not change its size."""
    steps = p.demand(structure).steps
    nowhere = planner.Plan(
        arena_bytes=0, offsets={t.name: 0 for t in structure.tensors}, scratch=tuple((0, 0) for _ in steps),
        tiles=tuple(step.tiles[0][0] for step in steps), live=(),
    )  # fmt: skip
    writer, found = emit.Writer(structure, nowhere), list[_Text]()
    for operators in _parts(structure):
        bytes_, used, counted = writer.model_bytes, len(writer.used), len(writer.counted)
        for index in operators:
            writer.operator(index)
        new = writer.counted[counted:]
        constants = [name for name in list(writer.used)[used:] if name != emit.EXP_TABLE]  # which all layers share
        found.append(
            _Text(
                model_bytes=writer.model_bytes - bytes_, weights_bytes=emit.weights_bytes(structure, dict.fromkeys(constants)),
                names_bytes=sum(len(c.label) + 1 for c in new), counters=len(new),
                functions=frozenset(c.function for c in new if c.function.startswith("nc_")),
            )
        )  # fmt: skip
    return found


def _parts(structure: p.Structure) -> list[Sequence[int]]:
    """Indices of the operators of embedding, each layer, and what follows the layers."""
    groups: dict[str, list[int]] = {}
    for index, op in enumerate(structure.operations):
        at, layer = op.name.split("."), op.name.startswith("layers.")
        groups.setdefault(".".join(at[:2]) if layer else "embedding" if op.name == "embedding" else "head", []).append(index)
    return list(groups.values())
