"""Cortex-M microcontrollers in QEMU: instructions are counted exactly, time is modelled from them. No board is involved.

A quantity of this device is modelled milliseconds; `board.instructions_of` gives back the count it is made of.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import nascompile
from nascompile import latency_table
from nascompile.devices import Job
from nascompile.errors import UnsupportedError
from nascompile.mcu import board as boards, project, toolchain
from nascompile.records import Environment, Quantity, Target

LEVELS = (0.1, 0.25, 0.5, 0.9, 0.99)
REFERENCE_INSTRUCTIONS = 1_000_000


class QemuM7:
    name = "qemu_m7"
    deterministic = True

    def unavailable(self) -> str:
        """Needs QEMU and the cross-compiler."""
        return toolchain.missing(toolchain.COMPILER, toolchain.EMULATOR)

    def describe(self) -> str:
        """What counts and what models."""
        return f"{toolchain.version(toolchain.EMULATOR)}: instructions counted, time modelled by {boards.CYCLE_MODEL}"

    def environment(self, target: Target, versions: tuple[tuple[str, Any], ...]) -> Environment:
        """Board, compiler and code must match; the computer QEMU runs on is only recorded."""
        session = tuple((f"session.{name}", value) for name, value in target.session)
        return Environment(
            must_match=(
                ("counted", "instructions in QEMU"), ("modelled", boards.CYCLE_MODEL), ("threads", target.threads), *session, *versions,
                ("lowering", latency_table.lowering_digest()),
            ),
            recorded=(
                ("qemu", toolchain.version(toolchain.EMULATOR)), ("machine", platform.machine()), ("nascompile", nascompile.__version__),
            ),
        )  # fmt: skip

    def reference(self) -> Job:
        """A million instructions: on this device nothing drifts."""
        return Job("reference", _Reference(), {})

    def time(self, jobs: Sequence[Job], *, seconds: float, seed: int, min_samples: int = 30) -> tuple[Quantity, ...]:
        """Modelled ms of one call of each job, from one run: all others would count the same."""
        return tuple(quantity(_instructions(job), _clock(job)) for job in jobs)

    def throughput(self, job: Job, batch: int, seconds: float) -> Quantity:
        """What back-to-back calls of the modelled time would complete: a microcontroller takes samples one by one."""
        ms = boards.modelled_ms(_instructions(job), _clock(job))
        return Quantity(value=1e3 / ms, unit="samples/s", kind="modelled", n=max(1, int(seconds * 1e3 / ms)))

    def peak_memory(self, backend: str, folder: str, target: Target, inputs: Mapping[str, Any]) -> int:
        """Bytes of RAM: arena, stack and variables."""
        return int(project.facts(Path(folder))["ram"]["used"])


def quantity(instructions: int, clock_mhz: float) -> Quantity:
    """Modelled milliseconds of one run; a count has no spread."""
    ms = boards.modelled_ms(instructions, clock_mhz)
    return Quantity(value=ms, unit="ms", kind="modelled", n=1, quantiles=tuple((level, ms) for level in LEVELS))


class _Board:
    clock_mhz = 100.0


class _Reference:
    """Always the same."""

    board = _Board()

    def count(self, inputs: Mapping[str, Any]) -> toolchain.Run:
        counts = np.array([[REFERENCE_INSTRUCTIONS]], np.uint32)
        return toolchain.Run(np.zeros((1, 0), np.uint8), counts, 0, 0, 0)


def _instructions(job: Job) -> int:
    if not hasattr(job.runner, "count"):
        raise UnsupportedError(f"instructions of `{job.name}` cannot be counted: it was not built by mcu_c", hint='backends = ["mcu_c"]')
    return int(job.runner.count(job.inputs).counts[0].sum(dtype=np.uint64))


def _clock(job: Job) -> float:
    return float(job.runner.board.clock_mhz)


PLUGIN = QemuM7()
