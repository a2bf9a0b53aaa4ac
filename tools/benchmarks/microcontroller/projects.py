"""Programs really built for a board: bytes of QEMU, this computer and the definition compared, memory as linked, instructions counted."""

from __future__ import annotations

import re
import shutil
import tempfile
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nascompile import targets
from nascompile.mcu import board as boards, interpreter, plan_check, program as programs, project, toolchain
from nascompile.records import Workload

PROFILES = Path(__file__).resolve().parents[1] / "profiles"
FASTER_HOST = "SANITIZE=-O3 -march=native"
"""Flags after those of the project: this computer's build of a large network has many images to run."""
CHUNK = 50
"""Images that one process of QEMU, or of the interpreter, is given."""
Bytes = npt.NDArray[np.int8]


@dataclass(frozen=True)
class Project:
    """A program at its place on a board, compiled."""

    program: programs.Program
    board: boards.Board
    planned: project.Planned
    folder: Path


def board_of(device: str) -> boards.Board:
    """A board by the name of its profile, the benchmark's own ones included."""
    target = targets.make(device, "mcu_c", Workload(), profiles=PROFILES)
    return boards.of_settings(device, dict(target.session))


def build(program: programs.Program, board: boards.Board, folder: Path, *, here_only: bool = False, **placing: Any) -> Project:
    """Written and compiled; BudgetError for what the board has no room for. The plan is checked by what shares no code with the planner.

    `here_only`: for this computer alone.
    """
    planned = project.place(program.structure, board, **placing)
    if faults := plan_check.faults(programs.demand(program.structure), planned.plan):
        raise SystemExit(f"error: the memory plan is wrong: {faults[0]}")
    sample = np.zeros(program.structure.image, np.int8) if program.sample is None else program.sample
    project.write(folder, program, planned, board, sample, interpreter.run(program, sample))
    toolchain.make(folder, "firmware_host", FASTER_HOST)
    if not here_only:
        objects = Path(_objects(board.core.name).name)
        shutil.copytree(objects, folder / "build", copy_function=shutil.copy, dirs_exist_ok=True)  # newer than their sources
        toolchain.make(folder, "firmware.elf")
        for part in ("kernels", "firmware"):
            shutil.copytree(folder / "build" / part, objects / part, dirs_exist_ok=True)
    return Project(program, board, planned, folder)


@cache
def _objects(core: str) -> tempfile.TemporaryDirectory[str]:
    """Where compiled kernels and firmware are kept while this process lives: they are the same in all projects for a core."""
    return tempfile.TemporaryDirectory(prefix=f"{core}-objects-")


def hosted(made: Project, images: Bytes, jobs: int) -> npt.NDArray[np.uint8]:
    """Output bytes on this computer."""
    with ThreadPoolExecutor(jobs) as threads:
        parts = np.array_split(images, max(min(jobs, len(images)), len(images) // 500))
        return np.concatenate([run.outputs for run in threads.map(partial(toolchain.run_host, made.folder), parts)])


def compared(made: Project, images: Bytes, count: int, jobs: int) -> tuple[npt.NDArray[np.uint8], dict[str, Any]]:
    """Output bytes of all images on this computer; what the first `count` were compared on, and the instructions they took.

    SystemExit at the first image whose bytes differ.
    """
    parts = [images[:count][i : i + CHUNK] for i in range(0, count, CHUNK)]
    with ThreadPoolExecutor(jobs) as threads:
        emulated = list(threads.map(lambda part: toolchain.run_emulated(made.folder, made.board.core, part), parts))
    host, qemu = hosted(made, images, jobs), np.concatenate([run.outputs for run in emulated])
    defined = interpreted(made.program, images[:count], jobs)
    for where, found in (("QEMU", qemu), ("the NumPy interpreter", defined)):
        if len(wrong := np.flatnonzero((found != host[:count]).any(1))):
            raise SystemExit(f"error: {made.folder.name} gives other bytes on this computer than in {where}: image {wrong[0]}")
    totals = np.concatenate([run.counts for run in emulated]).sum(1, dtype=np.uint64)
    linked = {(run.ram_bytes, run.flash_bytes) for run in emulated}
    if linked != {(made.planned.footprint.ram, made.planned.footprint.flash)}:
        raise SystemExit(f"error: {made.folder.name} takes other memory than was planned: {linked}")
    facts = {
        "images_equal_in_qemu_host_interpreter": count, "outputs_distinct": len(np.unique(host[:count], axis=0)),
        "instructions": float(totals.mean()), "instructions_least": int(totals.min()), "instructions_most": int(totals.max()),
        "modelled_cycles": float(totals.mean()) * boards.CYCLES_PER_INSTRUCTION,
        "modelled_ms": boards.modelled_ms(int(totals.mean()), made.board.clock_mhz),
        "ram_bytes": made.planned.footprint.ram, "flash_bytes": made.planned.footprint.flash, "arena_bytes": made.planned.plan.arena_bytes,
        "peak_operator": made.planned.footprint.peak, "stack_bytes_used": max(run.stack_bytes for run in emulated),
        "macs": made.program.structure.macs, "instructions_per_mac": float(totals.mean()) / made.program.structure.macs,
        "device": made.board.device, "ram_bytes_of_device": made.board.ram_bytes, "flash_bytes_of_device": made.board.flash.size,
        "operators": _operators(made, emulated[0]),
    }  # fmt: skip
    return host, facts


def interpreted(program: programs.Program, images: Bytes, jobs: int) -> npt.NDArray[np.uint8]:
    """Output bytes by the NumPy definition of every kernel."""
    parts = [images[i : i + CHUNK] for i in range(0, len(images), CHUNK)]
    if jobs == 1 or len(parts) == 1:
        return np.concatenate([_interpreted(program, part) for part in parts])
    with ProcessPoolExecutor(jobs) as processes:
        return np.concatenate(list(processes.map(partial(_interpreted, program), parts)))


def _interpreted(program: programs.Program, images: Bytes) -> npt.NDArray[np.uint8]:
    return np.stack([np.ascontiguousarray(interpreter.run(program, image)).reshape(-1).view(np.uint8) for image in images])


def scores(outputs: npt.NDArray[np.uint8]) -> npt.NDArray[np.int32]:
    """Class scores (n, classes) of output bytes."""
    return np.ascontiguousarray(outputs).view(np.int32)


def _operators(made: Project, run: toolchain.Run) -> list[dict[str, Any]]:
    """Instructions and MACs of the first image by operator, those of all layers together, in order."""
    found: dict[str, dict[str, Any]] = {}
    for counter, count in zip(project.facts(made.folder)["operators"], run.counts[0], strict=True):
        name = re.sub(r"^(layers|stages)\.\d+", r"\1", counter["label"])
        row = found.setdefault(name, {"operator": name, "kernel": counter["function"], "macs": 0, "instructions": 0})
        row["macs"] += counter["macs"]
        row["instructions"] += int(count)
    for row in found.values():
        row["instructions_per_mac"] = row["instructions"] / row["macs"] if row["macs"] else None
    return list(found.values())
