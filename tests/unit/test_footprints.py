"""What a search is told of RAM and flash is what the planner and the linker say of the project."""

from __future__ import annotations

import numpy as np
import pytest

from nascompile import targets
from nascompile.errors import UnsupportedError
from nascompile.mcu import board as boards, transformer
from nascompile.mcu.footprints import Footprints
from nascompile.mcu.transformer import Layer, Shape
from nascompile.records import Workload


def board_of(name: str, ram: int = 0, flash: int = 0) -> boards.Board:
    target = targets.make(name, "", Workload())
    settings = dict(target.session)
    if ram:
        settings["ram"] = f"0x20000000:{ram}"
    if flash:
        settings["flash"] = f"0x08000000:{flash}"
    return boards.of_settings(target.device, settings)


def shape_of(rng: np.random.Generator) -> Shape:
    """A network of two to eleven layers (numbers of one digit and of two), none like the other."""
    layers = tuple(
        Layer(heads=int(rng.integers(1, 4)), head_width=8, hidden=4 * int(rng.integers(2, 20)), rank=int(rng.choice([0, 0, 4])))
        for _ in range(rng.integers(2, 12))
    )
    side, patch = (int(n) for n in rng.choice([(24, 4), (24, 8), (16, 4)]))
    return Shape(image=(side, side, 3), patch=patch, width=4 * int(rng.integers(4, 12)), layers=layers, classes=7)


@pytest.mark.parametrize(("device", "ram", "flash"), [("stm32f746", 0, 0), ("stm32f427", 0, 0), ("stm32f746", 16384, 98304)])
def test_footprints_are_those_of_the_plan(mcu_tools, device, ram, flash):
    """On a board with room, on one of two memories, and on one that is too small for many."""
    board = board_of(device, ram, flash)
    footprints, rng, seen = Footprints(board), np.random.default_rng(2), set()
    for _ in range(25):
        shape = shape_of(rng)
        program, planned = transformer.fitting(
            lambda fusion, shape=shape: transformer.build("x", shape, transformer.SizesOnly(), fusion), board
        )
        found = footprints.of(shape)
        assert (found.ram, found.flash) == (planned.footprint.ram, planned.footprint.flash)
        repeated = any(getattr(op.kernel, "heads", ()) and op.kernel.norm for op in program.structure.operations)
        assert (found.fusion == "all") == repeated
        seen.add((found.fits, found.fusion))
    assert (True, "blocks") in seen
    if ram:
        assert {(False, "all"), (True, "all")} & seen, "what is tried when there is little room was tried"


def test_what_kernels_do_not_take_is_refused_each_time(mcu_tools):
    layers = (Layer(heads=1, head_width=8, hidden=8),) * 2
    shape = Shape(image=(96, 96, 3), patch=4, width=16, layers=layers, classes=2)
    footprints = Footprints(board_of("stm32f746"))
    for _ in range(2):
        with pytest.raises(UnsupportedError, match="577 tokens, its kernel takes 1 to 512"):
            footprints.of(shape)
