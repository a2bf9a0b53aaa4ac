"""Micro-networks: projects whose counters count operators by themselves, many in one.

All blocks of a project read the same tokens, and every constant is drawn from its name and sizes alone, so an operator counts the same
whichever others are beside it, but for how the compiler loads the numbers of a call. Maps of the same sizes share their weights, which
keeps projects small.
"""

from __future__ import annotations

import shutil
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nascompile.mcu import program as p, project, toolchain
from nascompile.mcu.board import EMULATED_FLASH, EMULATED_RAM, Board, Region
from nascompile.mcu.transformer import Fusion, Layer, RandomNumbers, Shape, _Building, _embed, _fused_layer
from nascompile.records import Record


class Block(Record, frozen=True):
    """A layer to count: `rows` is 1 where only the first token goes on."""

    layer: Layer
    part: Literal["attention", "mlp"]
    first: bool


LEAST = {"heads": 1, "head_width": 4, "hidden": 4}
"""Sizes of what has to be beside a block that is counted."""


def attention(heads: int, head_width: int, rank: int, first: bool) -> Block:
    return Block(layer=Layer(heads=heads, head_width=head_width, hidden=LEAST["hidden"], rank=rank), part="attention", first=first)


def mlp(hidden: int, rank: int, first: bool) -> Block:
    layer = Layer(heads=LEAST["heads"], head_width=LEAST["head_width"], hidden=hidden, rank=rank)
    return Block(layer=layer, part="mlp", first=first)


class NamedNumbers(RandomNumbers):
    """Random numbers that depend on nothing but a seed, and what they are of: a part of a layer and its sizes."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self._seed = seed
        self._linears: dict[str, p.Linear] = {}

    def _linear(self, name: str, inputs: int, outputs: int, table: str, residual: bool, *spreads: Any, **more: Any) -> p.Linear:
        words = name.split(".")
        part = ".".join(words[-2:]) if words[-1] in ("first", "second") else words[-1]
        own = f"shared{inputs}x{outputs}{'r' * residual}.{part}"
        if own not in self._linears:
            self._draw(own)
            self._linears[own] = super()._linear(own, inputs, outputs, table, residual, *spreads, **more)
        return self._linears[own]

    def _map(self, name: str, inputs: int, outputs: int, table: str, residual: bool, rank: int, first: str) -> p.Map:
        self._first.clear()  # each is found by its sizes
        return super()._map(name, inputs, outputs, table, residual, rank, first)

    def norm(self, name: str, width: int) -> p.Norm:
        own = f"shared{width}.{name.rpartition('.')[2]}"
        self._draw(own)
        return super().norm(own, width)

    def head(self, name: str, inputs: int, width: int, rank: int = 0) -> p.Head:
        super().head(name, inputs, width, rank)  # so that its maps are drawn by now, which they may have been before
        self._draw(f"{name.rpartition('.')[2]} {inputs} {width} {rank}")
        return super().head(name, inputs, width, rank)

    def table(self, name: str, kind: Literal["gelu", "softmax"]) -> str:
        return super().table(f"shared.{kind}", kind)

    def rows(self, name: str, rows: int, width: int) -> str:
        self._draw(name)
        return super().rows(name, rows, width)

    def _draw(self, what: str) -> None:
        """Begin anew: what follows depends on this name alone."""
        self._rng = np.random.default_rng([self._seed, zlib.crc32(what.encode())])


def build(shape: Shape, blocks: Sequence[Block], fusion: Fusion, seed: int) -> p.Program:
    """A program whose operators `embedding`, `blocks.N.…`, `norm` and `head` are those to count; of the shape's layers there are none."""
    b = _Building(NamedNumbers(seed))
    tokens = b.add("embedding", _embed(shape, b.numbers, streamed=True), (), "tokens", (shape.tokens, shape.width))
    for number, block in enumerate(blocks):
        rows = 1 if block.first else shape.tokens
        _fused_layer(b, f"blocks.{number}", shape, block.layer, rows, tokens, fusion == "all")
    normalized = b.add("norm", p.Normalize(norm=b.numbers.norm("norm", shape.width), rows=1), (tokens,), "features", (1, shape.width))
    head = b.numbers.map("head", shape.width, shape.classes)
    assert isinstance(head, p.Linear)
    scores = b.add("head", p.Classify(linear=head), (normalized,), "scores", (shape.classes,), 4 * shape.classes)
    structure = p.Structure(name="micro", tensors=tuple(b.tensors), operations=tuple(b.operations), image=shape.image, output=scores)
    return p.Program(structure, b.numbers.constants)


def roomy(board: Board) -> Board:
    """The same processor with all the memory that QEMU has: where nothing has to fit, tiles are the fastest."""
    ram, flash = (Region(origin=origin, size=size) for origin, size in (EMULATED_RAM, EMULATED_FLASH))
    return Board(device=board.device, core=board.core, ram=(ram,), flash=flash, clock_mhz=board.clock_mhz, stack_bytes=board.stack_bytes)


@dataclass(frozen=True)
class Workshop:
    """Compiles and counts programs for one board in a folder; kernels and firmware are compiled once."""

    board: Board
    folder: Path

    def count(self, program: p.Program) -> dict[str, int]:
        """Operator ▸ instructions for one sample, in QEMU. BudgetError if the program does not fit the board."""
        planned = project.place(program.structure, self.board)
        output = program.structure.tensor(program.structure.output)
        sample = np.random.default_rng(0).integers(-128, 128, program.structure.image).astype(np.int8)
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            made = Path(scratch)
            project.write(made, program, planned, self.board, sample, np.zeros(output.size_bytes, np.uint8))
            self._make(made)
            run = toolchain.run_emulated(made, self.board.core, sample[None])
        found: dict[str, int] = {}
        for counted, instructions in zip(planned.writer.counted, run.counts[0], strict=True):
            found[counted.operator] = found.get(counted.operator, 0) + int(instructions)
        return found

    def _make(self, made: Path) -> None:
        """The firmware, with the object files of earlier ones: newer than their sources, make takes them."""
        objects = self.folder / f"objects-{self.board.core.name}"
        for kept in objects.glob("*/*.o"):
            place = made / "build" / kept.relative_to(objects)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(kept, place)
        toolchain.make(made, "firmware.elf")
        for new in (made / "build").glob("*/*.o"):
            place = objects / new.relative_to(made / "build")
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(new, place)
