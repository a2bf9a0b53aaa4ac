"""The C project of a planned program: written, and its RAM and flash known without building it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from nascompile.errors import BudgetError, RecordError
from nascompile.mcu import emit, planner, program as p, toolchain
from nascompile.mcu.board import COUNT_REMARK, CYCLES_PER_INSTRUCTION, Board, emulated, guard_regions, linker_script
from nascompile.records import Record

HERE = Path(__file__).parent
INPUT, OUTPUT, REPORT = "sample_input.bin", "sample_output.bin", "report.json"
PRODUCTS = ("build", "firmware_host", "firmware_uart.elf", "firmware_uart.elf.map", "firmware_board.elf", "firmware_board.elf.map")
"""What make leaves in a project, besides what an engine has."""
SMALLER = "fewer tokens (smaller image, larger patch) save most, then width, then what the MLPs hold"


class Footprint(Record, frozen=True):
    """Bytes that a program takes on a board, harness included."""

    ram: int
    flash: int
    arena: int
    peak: str
    """Operator at which most of the arena is in use."""


@dataclass(frozen=True)
class Planned:
    """A program's structure at its place in memory."""

    structure: p.Structure
    plan: planner.Plan
    footprint: Footprint
    writer: Any


def place(
    structure: p.Structure, board: Board, *, overlay: bool = True, tiles: Mapping[str, int] | None = None, smallest: bool = False,
    enforce: bool = True,
) -> Planned:  # fmt: skip
    """The fastest tiles that fit the board; BudgetError for a program that does not fit, unless `enforce` is off.

    UnsupportedError for sizes that the kernels do not take.
    """
    p.check(structure)
    demand = p.demand(structure)
    first = planner.plan(demand, overlay=overlay, smallest=True)
    writer = emit.written(structure, first)  # how many counters there are and what is read does not depend on tiles or offsets
    base = toolchain.base(board.core, writer.functions)
    rest = board.stack_bytes + base.bss + up(4 * (len(writer.counted) + 1))
    limit = board.arena_limit(rest) if enforce else 0
    try:
        if enforce and (limit <= 0 or rest > board.ram[-1].size):  # to the planner 0 is no limit
            raise BudgetError(f"stack and variables alone take {rest:,} bytes of {board.ram[-1].size:,}")
        found = first if smallest and first.arena_bytes <= (limit or first.arena_bytes) else None
        found = found or planner.with_tiles(demand, tiles or {}, limit, overlay=overlay)
    except BudgetError as error:
        about = f"RAM of `{board.device}`: {board.ram_bytes:,} bytes, {rest:,} of them for stack and variables"
        raise BudgetError(error.message, detail=about, hint=error.hint or SMALLER) from error
    writer = emit.written(structure, found)
    flash = base.text + emit.model_bytes(writer) + emit.weights_bytes(structure, writer.used)
    footprint = Footprint(ram=rest + found.arena_bytes, flash=flash, arena=found.arena_bytes, peak=demand.steps[found.peak].name)
    if enforce and flash > board.flash.size:
        largest = max(structure.operations, key=lambda op: _weights_of(op.kernel))
        raise BudgetError(
            f"the flash of `{board.device}` is too small: {flash:,} bytes of {board.flash.size:,}, {flash - board.flash.size:,} too many",
            detail=f"the largest operator is `{largest.name}` with {_weights_of(largest.kernel):,} weights",
            hint="narrower or fewer layers, or weights of low rank",
        )
    return Planned(structure, found, footprint, writer)


def write(
    folder: Path, program: p.Program, planned: Planned, board: Board, sample: npt.NDArray[np.int8], expected: npt.NDArray[Any]
) -> tuple[str, ...]:
    """The project's files (paths relative to `folder`), with one sample and what it must give."""
    source = emit.source(program, planned.plan)
    files: dict[str, bytes] = {
        "model.c": source.model_c.encode(), "weights.c": source.weights_c.encode(), "weights.h": source.weights_h.encode(),
        "memory_map.c": memory_map(board).encode(),
        "memory_map_board.c": memory_map(None).encode(), "Makefile": _makefile(board).encode(),
        INPUT: sample.astype(np.int8).tobytes(), OUTPUT: expected.tobytes(), REPORT: _report(program, planned, source, board),
    }  # fmt: skip
    template = (HERE / "firmware" / "link.ld").read_text("utf-8")
    files["qemu.ld"] = linker_script(template, emulated(board), f"{board.device} in QEMU", source.model_bytes).encode()
    files["board.ld"] = linker_script(template, board, board.device, source.model_bytes).encode()
    for path in (*_kernel_files(source.functions), *sorted((HERE / "firmware").glob("*.[ch]"))):
        files[f"{path.parent.name}/{path.name}"] = path.read_bytes()
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return tuple(sorted(files))


def facts(folder: Path) -> dict[str, Any]:
    """`report.json` of a project; RecordError if it cannot be read."""
    try:
        return dict(msgspec.json.decode((folder / REPORT).read_bytes()))
    except (OSError, msgspec.DecodeError) as error:
        raise RecordError(f"not a project for a microcontroller: {folder}", detail=str(error), hint="build the engine again") from error


def note_run(folder: Path, run: toolchain.Run) -> None:
    """Adds what the reference sample took in QEMU to `report.json`: instructions per counter, and the deepest stack."""
    taken = {"instructions": [int(count) for count in run.counts[0]], "stack_bytes": run.stack_bytes}
    body = facts(folder) | {"reference": taken}
    (folder / REPORT).write_bytes(msgspec.json.format(msgspec.json.encode(body), indent=1) + b"\n")


def up(size: int) -> int:
    return -(-size // planner.ALIGN) * planner.ALIGN


def _kernel_files(functions: Sequence[str]) -> list[Path]:
    """Files that define the kernels, what those include, and the definitions behind what is included."""
    kernels = HERE / "kernels"
    texts = {path.name: path.read_text("utf-8") for path in sorted(kernels.glob("*.[ch]"))}
    wanted = [name for name, text in texts.items() if _defined(text) & set(functions)]
    for name in wanted:  # grows on the way
        for header in re.findall(r'#include "(\w+\.h)"', texts[name]):
            wanted += [other for other in (header, header.replace(".h", ".c")) if other in texts and other not in wanted]
    return [kernels / name for name in sorted(wanted)]


def _defined(text: str) -> set[str]:
    return set(re.findall(r"^NC_OPERATOR void (nc_\w+)\(", text, re.MULTILINE))


def memory_map(board: Board | None) -> str:
    """The guard around RAM for the emulated board; none for a board itself."""
    regions = guard_regions(emulated(board)) if board else ((0, 0, 0),)
    rows = ",\n".join(f"    {{0x{base:08X}u, {log2}, {access}}}" for base, log2, access in regions)
    title = f"RAM of {board.device}, where QEMU has it" if board else "No guard: beyond a board's own memory there is none"
    return f'/* {title} */\n#include "memory_map.h"\n\nconst nc_region_t guard_regions[8] = {{\n{rows},\n}};\n'


def _makefile(board: Board) -> str:
    text = (HERE / "firmware" / "Makefile").read_text("utf-8")
    for key, value in {"DEVICE": board.device, "CORE_FLAGS": board.core.flags, "MACHINE": board.core.machine}.items():
        text = text.replace(f"@{key}@", value)
    return text


def _report(program: p.Program, planned: Planned, source: emit.Source, board: Board) -> bytes:
    structure, plan, demand = planned.structure, planned.plan, p.demand(planned.structure)
    output = structure.tensor(structure.output)
    steps = [
        {"operator": step.name, "live_bytes": live, "tile": tile, "scratch_bytes": scratch[1]}
        for step, live, tile, scratch in zip(demand.steps, plan.live, plan.tiles, plan.scratch, strict=True)
    ]
    tensors = [
        {
            "name": t.name, "shape": t.shape, "bytes": t.size_bytes, "offset": plan.offsets[t.name], "scale": t.scale,
            "zero_point": t.zero_point, "over": plan.overlaid.get(t.name),
        }
        for t in structure.tensors
    ]  # fmt: skip
    body = {
        "model": structure.name, "device": board.device, "macs": structure.macs, "image": structure.image, "pixels": structure.pixels,
        "logits": structure.logits, "output_word": output.size_bytes // math.prod(output.shape),
        "ram": {"used": planned.footprint.ram, "of": board.ram_bytes, "arena": plan.arena_bytes, "stack": board.stack_bytes},
        "flash": {"used": planned.footprint.flash, "of": board.flash.size, "weights": source.weights_bytes},
        "peak": planned.footprint.peak, "order": plan.order,
        "cycles_per_instruction": CYCLES_PER_INSTRUCTION, "clock_mhz": board.clock_mhz, "remark": COUNT_REMARK,
        "operators": [{"label": c.label, "function": c.function, "macs": c.macs} for c in source.counted],
        "steps": steps, "tensors": tensors,
    }  # fmt: skip
    return msgspec.json.format(msgspec.json.encode(body), indent=1) + b"\n"


def _weights_of(kernel: p.Kernel) -> int:
    return sum(m.macs for m in p.maps(kernel)) + (9 * kernel.channels if isinstance(kernel, p.Depthwise) else 0)
