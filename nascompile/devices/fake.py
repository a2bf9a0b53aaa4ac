"""A device that needs no hardware: times are what the runner says, give or take a seeded percent. Runs the whole tool anywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nascompile import latency_table
from nascompile.devices import Job
from nascompile.devices.interleave import quantity
from nascompile.records import Environment, Quantity, Target, digest

NOISE = 0.01
"""Standard deviation of a sample, as a fraction."""


class Fake:
    name = "fake"
    deterministic = False

    def unavailable(self) -> str:
        """Always here."""
        return ""

    def describe(self) -> str:
        """Says that nothing is measured."""
        return "a simulated device; nothing is measured"

    def environment(self, target: Target, versions: tuple[tuple[str, Any], ...]) -> Environment:
        """The same on every machine."""
        session = tuple((f"session.{name}", value) for name, value in target.session)
        must_match = (("cpu", "fake"), ("threads", target.threads), *session, *versions, ("lowering", latency_table.lowering_digest()))
        return Environment(must_match=must_match)

    def reference(self) -> Job:
        """Always one millisecond, before noise."""
        return Job("reference", _Reference(), {})

    def time(self, jobs: Sequence[Job], *, seconds: float, seed: int, min_samples: int = 30) -> tuple[Quantity, ...]:
        """`min_samples` simulated samples each; no time passes."""
        found = []
        for i, job in enumerate(jobs):
            noise = np.random.default_rng((seed, i)).normal(1.0, NOISE, min_samples)
            found.append(quantity(job.runner.simulated_ms(_batch(job.inputs)) / 1e3 * noise, "simulated"))
        return tuple(found)

    def throughput(self, job: Job, batch: int, seconds: float) -> Quantity:
        """What back-to-back calls of the simulated time would complete."""
        ms = job.runner.simulated_ms(batch)
        return Quantity(value=1e3 * batch / ms, unit="samples/s", kind="simulated", n=max(1, int(seconds * 1e3 / ms)))

    def peak_memory(self, backend: str, folder: str, target: Target, inputs: Mapping[str, Any]) -> int:
        """A constant and a few bytes that depend on the target."""
        return 10_000_000 + int(digest(target)[:4], 16)


@dataclass(frozen=True)
class _Reference:
    def simulated_ms(self, batch: int) -> float:
        return 1.0

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {}


def _batch(inputs: Mapping[str, Any]) -> int:
    return len(next(iter(inputs.values()))) if inputs else 1


PLUGIN = Fake()
