"""What a C project has to know of a device: processor, memory, and the emulated board that stands for it."""

from __future__ import annotations

import math
from collections.abc import Mapping

from nascompile.errors import UnsupportedError
from nascompile.records import Record

CYCLES_PER_INSTRUCTION = 0.925
CYCLE_MODEL = (
    "0.925 cycles per instruction, one constant fitted to one published total (CMSIS-NN CIFAR-10, STM32F746 at 216 MHz, 99.1 ms); +-30 %"
)
COUNT_REMARK = (
    "Instruction counts are exact for this binary in QEMU. Cycles and milliseconds are modelled, not measured: " + CYCLE_MODEL + "."
)
STACK_BYTES = 4096


def modelled_ms(instructions: int, clock_mhz: float) -> float:
    """Milliseconds by `CYCLE_MODEL`."""
    return instructions * CYCLES_PER_INSTRUCTION / (clock_mhz * 1e3)


def instructions_of(modelled: float, clock_mhz: float) -> int:
    """The exact count that `modelled_ms` was given."""
    return round(modelled * clock_mhz * 1e3 / CYCLES_PER_INSTRUCTION)


class Core(Record, frozen=True):
    """A processor: how code is compiled for it, and which board of QEMU has it."""

    name: str
    flags: str
    machine: str


CORES = {
    core.name: core
    for core in (
        Core(name="cortex-m7", flags="-mcpu=cortex-m7 -mfpu=fpv5-d16 -mfloat-abi=hard", machine="mps2-an500"),
        Core(name="cortex-m4", flags="-mcpu=cortex-m4 -mfpu=fpv4-sp-d16 -mfloat-abi=hard", machine="mps2-an386"),
    )
}
EMULATED_FLASH = (0x00000000, 4 << 20)
EMULATED_RAM = (0x20000000, 4 << 20)
"""(origin, bytes) of the memory of both emulated boards."""
LEAST_GUARDED = 32
"""Bytes: what the memory protection unit can tell apart."""
MOST_GUARDED = 6
"""Regions of RAM: the unit has eight, and two shut what lies beside."""
FOR_NETWORKS = "give the part that networks may have: ram, ram_bytes, flash, flash_bytes"
SHUT, OPEN, READ_ONLY = 0, 3, 6
"""Access of a guarded region, as in memory_map.h."""


class Region(Record, frozen=True):
    """Bytes from an address on."""

    origin: int
    size: int


class Board(Record, frozen=True):
    """A device. The first RAM region holds the arena, the last stack and variables."""

    device: str
    core: Core
    ram: tuple[Region, ...]
    flash: Region
    clock_mhz: float
    stack_bytes: int = STACK_BYTES

    @property
    def ram_bytes(self) -> int:
        return sum(region.size for region in self.ram)

    def arena_limit(self, rest: int) -> int:
        """Bytes an arena may have if everything else in RAM takes `rest`."""
        return self.ram[0].size - (rest if len(self.ram) == 1 else 0)


SERIAL_SETTINGS = ("baud", "flash_command", "make", "port")
"""Of a board on a serial line (`serial_line.py`)."""
SETTINGS = ("clock_mhz", "core", "flash", "ram", "stack_bytes", *SERIAL_SETTINGS)


def of_settings(device: str, settings: Mapping[str, str]) -> Board:
    """From a target's session; UnsupportedError naming what is missing, unknown or more than can be emulated."""
    if unknown := sorted(settings.keys() - set(SETTINGS)):
        raise UnsupportedError(f"unknown session setting of mcu_c: {', '.join(unknown)}", hint=f"known: {', '.join(SETTINGS)}")
    if missing := sorted({"core", "ram", "flash", "clock_mhz"} - settings.keys()):
        raise UnsupportedError(f"`{device}` does not say its {', '.join(missing)}", hint="profiles/stm32f746.toml shows how")
    if settings["core"] not in CORES:
        raise UnsupportedError(f"no compiler settings for core {settings['core']}", hint=f"known: {', '.join(CORES)}")
    try:
        ram, [flash] = _regions(settings["ram"]), _regions(settings["flash"])
        clock, stack = float(settings["clock_mhz"]), int(settings.get("stack_bytes", STACK_BYTES))
    except ValueError as error:
        raise UnsupportedError(f"the memory of `{device}` cannot be read: {error}", hint='ram = "0x20000000:327680"') from error
    board = Board(device=device, core=CORES[settings["core"]], ram=ram, flash=flash, clock_mhz=clock, stack_bytes=stack)
    if not 0 < clock < math.inf:
        raise UnsupportedError(f"not a clock of `{device}`: clock_mhz = {settings['clock_mhz']}", hint="clock_mhz = 216.0")
    if uneven := [region.size for region in ram if region.size % LEAST_GUARDED]:
        raise UnsupportedError(
            f"not a size of RAM of `{device}`: {', '.join(f'{size:,}' for size in uneven)} bytes", hint=f"a multiple of {LEAST_GUARDED}"
        )
    if board.ram_bytes > EMULATED_RAM[1] or flash.size > EMULATED_FLASH[1]:
        raise UnsupportedError(
            f"`{device}` has more memory than the emulated board: {EMULATED_RAM[1]:,} bytes of RAM and of flash", hint=FOR_NETWORKS
        )
    if stack % 8 or stack < 512:
        raise UnsupportedError(f"not a size of a stack: stack_bytes = {stack}", hint="a multiple of 8, at least 512")
    if stack >= ram[-1].size:
        said = f"a stack of {stack:,} bytes does not fit the {ram[-1].size:,} of RAM that it lies in"
        raise UnsupportedError(f"{said}, of `{device}`", hint=f"stack_bytes: {STACK_BYTES} unless the profile says otherwise")
    return board


def emulated(board: Board) -> Board:
    """The same sizes where the emulated board has its memory: RAM regions one after the other, that of the stack first.

    Below the stack there must be no memory, as on the device: a stack that grows too deep has to fault, not to write over tensors.
    """
    regions, origin = [], EMULATED_RAM[0]
    for region in (board.ram[-1], *board.ram[:-1]):
        regions.append(Region(origin=origin, size=region.size))
        origin += region.size
    regions.append(regions.pop(0))
    flash = Region(origin=EMULATED_FLASH[0], size=board.flash.size)
    return Board(
        device=board.device, core=board.core, ram=tuple(regions), flash=flash, clock_mhz=board.clock_mhz, stack_bytes=board.stack_bytes
    )


def linker_script(template: str, board: Board, title: str, model_bytes: int) -> str:
    """`link.ld` for a board, `model_bytes` set aside for the calls and parameters of model.c."""
    names = ["RAM", *(f"RAM{i + 1}" for i in range(1, len(board.ram)))]
    lines = [f"  FLASH (rx)  : ORIGIN = 0x{board.flash.origin:08X}, LENGTH = {board.flash.size}"]
    lines += [f"  {name} (rwx) : ORIGIN = 0x{r.origin:08X}, LENGTH = {r.size}" for name, r in zip(names, board.ram, strict=True)]
    values = {
        "TITLE": title, "REGIONS": "\n".join(lines), "STACK_BYTES": board.stack_bytes, "RAM_BYTES": board.ram_bytes,
        "FLASH_BYTES": board.flash.size, "STACK_REGION": names[-1], "MODEL_BYTES": model_bytes,
    }  # fmt: skip
    for key, value in values.items():
        template = template.replace(f"@{key}@", str(value))
    return template


def guard_regions(board: Board) -> tuple[tuple[int, int, int], ...]:
    """(base, log2 of bytes, access) for the memory protection unit.

    What lies on both sides of RAM is shut, since the emulated boards take stores there in silence; then the device's RAM is opened. The
    boards' flash is RAM too: it is made read-only where a region is left for that.
    """
    found = [(EMULATED_RAM[0] - (1 << 28), 28, SHUT), (EMULATED_RAM[0], 29, SHUT)]
    at, end = EMULATED_RAM[0], EMULATED_RAM[0] + board.ram_bytes
    while at < end:
        size = 1 << min((at - EMULATED_RAM[0] or EMULATED_RAM[1]).bit_length() - 1, (end - at).bit_length() - 1)
        size = min(size, (at & -at) if at != EMULATED_RAM[0] else size)
        found.append((at, size.bit_length() - 1, OPEN))
        at += size
    if len(found) > MOST_GUARDED + 2:
        nearest = board.ram_bytes
        while nearest.bit_count() > MOST_GUARDED:
            nearest &= nearest - 1
        raise UnsupportedError(
            f"a RAM of {board.ram_bytes:,} bytes cannot be guarded: it is no sum of six powers of two", hint=f"{nearest:,} bytes can be"
        )
    if len(found) < MOST_GUARDED + 2:
        found.append((EMULATED_FLASH[0], 28, READ_ONLY))
    return tuple(found)


def _regions(text: str) -> tuple[Region, ...]:
    found = []
    for part in text.split(","):
        origin, size = part.split(":")
        found.append(Region(origin=int(origin, 0), size=int(size, 0)))
    if any(region.size <= 0 for region in found):
        raise ValueError(f"a region without bytes: {text}")
    return tuple(found)
