"""A device kind: how to find out what a machine is, and how to time runners on it without believing noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from nascompile.records import Environment, Quantity, Target


@dataclass(frozen=True)
class Job:
    """A loaded engine with the inputs of one call."""

    name: str
    runner: Any
    inputs: Mapping[str, Any]


class Device(Protocol):
    name: str
    deterministic: bool
    """Whether the same call always costs the same: then nothing is repeated and no noise is looked for."""

    def unavailable(self) -> str:
        """Why nothing can run here; empty if it can."""

    def describe(self) -> str:
        """One line for a person: processor, cores, instruction sets that matter."""

    def environment(self, target: Target, versions: tuple[tuple[str, Any], ...]) -> Environment:
        """What must match for numbers to be comparable, and what is only recorded."""

    def reference(self) -> Job:
        """Work that no change of ours makes faster; timed beside other jobs it shows how the machine itself drifts."""

    def time(self, jobs: Sequence[Job], *, seconds: float, seed: int, min_samples: int = 30) -> tuple[Quantity, ...]:
        """Latency of one call of each job in ms, interleaved in random order in one time window of about `seconds` in all.

        The value is a low quantile, which a busy machine disturbs least; the median and the tail are among the quantiles.
        """

    def throughput(self, job: Job, batch: int, seconds: float) -> Quantity:
        """Samples completed per second in a wall-clock window of at least `seconds`."""

    def peak_memory(self, backend: str, folder: str, target: Target, inputs: Mapping[str, Any]) -> int:
        """Peak resident bytes of a fresh process that loads the engine folder (its `manifest.json` names the graphs) and runs one call."""
