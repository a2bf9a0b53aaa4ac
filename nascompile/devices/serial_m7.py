"""A Cortex-M board on a serial line: the same harness as in QEMU, cycles read from the core's own counter."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import nascompile
from nascompile import latency_table
from nascompile.devices import Job
from nascompile.devices.interleave import quantity
from nascompile.devices.qemu_m7 import PLUGIN as EMULATED
from nascompile.errors import UnsupportedError
from nascompile.mcu import board as boards, serial_line, toolchain
from nascompile.records import Environment, Quantity, Target

RUNS = 5
"""Calls of a job: a microcontroller runs nothing else, so they hardly differ."""


class SerialM7:
    name = "serial_m7"
    deterministic = False

    def unavailable(self) -> str:
        """Needs the cross-compiler; whether a board is plugged in shows when it is asked."""
        return toolchain.missing(toolchain.COMPILER, "make")

    def describe(self) -> str:
        """Where numbers come from."""
        return "a board on a serial line: cycles by its own counter"

    def environment(self, target: Target, versions: tuple[tuple[str, Any], ...]) -> Environment:
        """Board, compiler and code must match; the way to the board is only recorded.

        QEMU's board counts instructions, of which milliseconds are modelled; every other one has the core's cycle counter.
        """
        words = dict(target.session).get("make", "").split()
        counted: tuple[tuple[str, str], ...] = (("counted", "cycles of the core"),)
        if serial_line.EMULATED in words:
            counted = (("counted", "instructions in QEMU"), ("modelled", boards.CYCLE_MODEL))
        way = set(boards.SERIAL_SETTINGS)
        session = tuple((f"session.{name}", value) for name, value in target.session if name not in way)
        recorded = tuple((name, value) for name, value in target.session if name in way)
        return Environment(
            must_match=(
                *counted, ("threads", target.threads), *session, *versions,
                ("lowering", latency_table.lowering_digest()),
            ),
            recorded=(*recorded, ("machine", platform.machine()), ("nascompile", nascompile.__version__)),
        )  # fmt: skip

    def reference(self) -> Job:
        """Nothing drifts: a constant."""
        return EMULATED.reference()

    def time(self, jobs: Sequence[Job], *, seconds: float, seed: int, min_samples: int = 30) -> tuple[Quantity, ...]:
        """Milliseconds of one call by the board's clock; each job is built and flashed in turn."""
        return tuple(_timed(job) for job in jobs)

    def throughput(self, job: Job, batch: int, seconds: float) -> Quantity:
        """What back-to-back calls would complete: a microcontroller takes samples one by one."""
        one = _timed(job)
        return Quantity(value=1e3 / one.value, unit="samples/s", kind=one.kind, n=one.n)

    def peak_memory(self, backend: str, folder: str, target: Target, inputs: Mapping[str, Any]) -> int:
        """Bytes of RAM: arena, stack and variables."""
        return EMULATED.peak_memory(backend, folder, target, inputs)


def _timed(job: Job) -> Quantity:
    if not hasattr(job.runner, "settings"):
        return EMULATED.time([job], seconds=0.0, seed=0)[0]  # the reference
    settings = serial_line.Settings.of(job.runner.settings)
    sample = job.runner.quantized(job.inputs)[:1]
    found = serial_line.run(Path(job.runner.folder), settings, np.repeat(sample, RUNS, axis=0))
    if (job.runner.scores(found) != next(iter(job.runner.run(job.inputs).values()))[:1]).any():
        raise UnsupportedError(f"{job.name} gives other outputs on the board than on this computer")
    counts, clock = found.counts.sum(axis=1, dtype=np.uint64), float(job.runner.board.clock_mhz)
    if found.unit == "cycles":
        return quantity([int(count) / (clock * 1e6) for count in counts], "measured")
    if found.unit == "instructions":  # an emulated board, whose cycles nobody knows
        return quantity([boards.modelled_ms(int(count), clock) / 1e3 for count in counts], "modelled")
    raise UnsupportedError(f"the firmware of {job.name} counts nothing")


PLUGIN = SerialM7()
