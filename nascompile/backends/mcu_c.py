"""C projects for Cortex-M microcontrollers: INT8 programs, memory planned beforehand, bytes proved equal in QEMU and on this computer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nascompile.backends import Runner
from nascompile.errors import UnsupportedError
from nascompile.mcu import board as boards, interpreter, project, toolchain, transformer
from nascompile.mcu.footprints import Footprints
from nascompile.mcu.program import Program
from nascompile.mcu.runner import McuRunner
from nascompile.records import INT8, OnChip, OperatorGraph, Precision, Target

FLASH_IMAGE = "firmware.bin"
"""What is flashed, and so the size of an engine."""
TOOLS = (toolchain.COMPILER, toolchain.EMULATOR, toolchain.HOST_COMPILER, "make")


class McuC:
    name = "mcu_c"
    accepts: Literal["onnx", "torch", "hf_folder", "program"] = "program"
    width_multiple = 4
    passes: tuple[str, ...] = ()
    tunable: tuple[tuple[str, tuple[str, ...]], ...] = ()
    rounding: tuple[tuple[str, tuple[str, ...]], ...] = ()
    devices = ("qemu_m7", "serial_m7")
    run_script = ""
    """An engine is a C project with a Makefile."""
    products = project.PRODUCTS
    """What its Makefile may leave behind."""

    def unavailable(self) -> str:
        """Needs the cross-compiler, QEMU, a compiler for this computer, and make."""
        return toolchain.missing(*TOOLS)

    def supports(self, precision: Precision) -> str:
        """Static INT8; its unsigned activations are these kernels' signed ones less 128."""
        return "" if precision == INT8 else f"microcontroller programs are whole in {INT8.name}: {precision.name} has no kernels"

    def versions(self) -> tuple[tuple[str, str], ...]:
        return (("arm_gcc", toolchain.version(toolchain.COMPILER)), ("mcu_sources", toolchain.sources_digest()))

    def session(self) -> tuple[tuple[str, str], ...]:
        return (("stack_bytes", str(boards.STACK_BYTES)),)

    def footprint(self, graph: OperatorGraph, target: Target) -> project.Footprint:
        """RAM and flash of a candidate without building it, the fastest plan that fits; the smallest one where none does.

        UnsupportedError for sizes that the kernels do not take. Compiles the kernels once in a process.
        """
        board = _board(target)
        shape = transformer.Shape.of_graph(graph, target.workload.resolution)

        def make(fusion: transformer.Fusion) -> Program:
            return transformer.build("candidate", shape, transformer.SizesOnly(), fusion)

        return transformer.fitting(make, board)[1].footprint

    def footprints(self, target: Target) -> Footprints:
        """The same for very many candidates: what they share is remembered."""
        return Footprints(_board(target))

    def build(self, form: Any, target: Target, folder: Path) -> tuple[str, ...]:
        """Write and compile the project; BudgetError if it does not fit, UnsupportedError if its bytes are not the program's."""
        if not isinstance(form, Program):
            raise TypeError(f"mcu_c builds programs, not {type(form).__name__}")
        board = _board(target)
        sample = np.zeros(form.structure.image, np.int8) if form.sample is None else form.sample
        expected = interpreter.run(form, sample)
        planned = project.place(form.structure, board)
        project.write(folder, form, planned, board, sample, expected)
        toolchain.make(folder, "firmware.elf", "firmware_host", FLASH_IMAGE)
        emulated = _emulated(folder, board, sample)
        for where, run in (("this computer", toolchain.run_host(folder, sample[None])), ("QEMU", emulated)):
            if run.outputs.tobytes() != expected.tobytes():
                raise UnsupportedError(f"the project for `{target.device}` gives other bytes on {where} than its program")
        project.note_run(folder, emulated)
        shutil.rmtree(folder / "build")
        (folder / "firmware_host").unlink()  # of no other computer
        return (FLASH_IMAGE,)

    def on_chip(self, folder: Path) -> OnChip:
        """Memory and instructions of a built engine, as its project's report has them."""
        facts = project.facts(folder)
        ran = facts["reference"]
        return OnChip(
            ram_bytes=facts["ram"]["used"], ram_limit=facts["ram"]["of"], flash_bytes=facts["flash"]["used"],
            flash_limit=facts["flash"]["of"], stack_bytes=ran["stack_bytes"], stack_limit=facts["ram"]["stack"],
            instructions=sum(ran["instructions"]), peak=facts["peak"],
        )  # fmt: skip

    def load(self, folder: Path, graphs: tuple[str, ...], target: Target) -> Runner:
        """A runner whose `run` is the host build and whose `count` is QEMU."""
        return McuRunner(folder, _board(target), dict(target.session))


def _board(target: Target) -> boards.Board:
    return boards.of_settings(target.device, dict(target.session))


def _emulated(folder: Path, board: boards.Board, sample: Any) -> toolchain.Run:
    return toolchain.run_emulated(folder, board.core, sample[None])


PLUGIN = McuC()
