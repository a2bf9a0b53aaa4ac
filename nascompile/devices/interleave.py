"""Timing several calls against each other so that a machine's drift and its other users hit all of them alike.

Each round visits every call once, in a fresh random order. A visit first calls without recording for about `WARM` seconds, until
the call's data is back in the caches, then records for about `VISIT` seconds. Calls shorter than `SAMPLE` are recorded in batches,
because the clock and the interpreter would be a visible part of them; longer ones singly, so that quantiles are those of single calls.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from nascompile.records import Quantity

WARM = 5e-3
"""An engine in use runs again and again, its weights where the caches keep them. One call does not get them there: a network of
7 MB took 25 % longer in its second call after others had run than in its tenth, on a processor with 2 MB of L2."""
VISIT = 1e-2
SAMPLE = 1e-4
LEVELS = (0.1, 0.25, 0.5, 0.9, 0.99)
STATISTIC = 0.1
"""The value of a timed quantity. A busy neighbour only ever adds time, so the low end is the machine's own; the minimum itself falls
with the number of samples, the tenth percentile hardly does, and it holds while one call in ten runs undisturbed. On two cores with a
load of 4.6, sums of rows predicted mixed-precision networks to 1.7 % (standard deviation) by it, to 2.2 % by the lower quartile and
to 2.6 % by the median."""
ROUNDS = 10
"""Fewest rounds: samples of fewer visits would share the same disturbance."""
CAP = 4.0
"""Timing ends after this multiple of the asked time, whatever has been collected."""

Call = Callable[[], object]


@dataclass(frozen=True)
class _Plan:
    warm: int
    """Unrecorded calls at the start of a visit."""
    samples: int
    """Samples per visit."""
    calls: int
    """Calls per sample."""


def interleave(
    calls: Sequence[Call], *, seconds: float, seed: int, min_samples: int, clock: Callable[[], float] = time.perf_counter
) -> list[list[float]]:
    """Seconds per call: a list of samples for each call; at least `min_samples` each unless the cap ends it sooner."""
    rng = np.random.default_rng(seed)
    collecting = gc.isenabled()
    gc.disable()
    try:
        plans = [_plan(call, clock) for call in calls]
        found: list[list[float]] = [[] for _ in calls]
        start, rounds = clock(), 0
        while not _finished(clock() - start, rounds, found, seconds, min_samples):
            for i in rng.permutation(len(calls)):
                found[i] += _visit(calls[i], plans[i], clock)
            rounds += 1
        return found
    finally:
        if collecting:
            gc.enable()


def quantity(samples: Sequence[float], kind: Literal["measured", "simulated"]) -> Quantity:
    """Samples in seconds ▸ ms with quantiles; the value is the tenth percentile."""
    levels = np.quantile(np.asarray(samples) * 1e3, LEVELS)
    quantiles = tuple((level, float(value)) for level, value in zip(LEVELS, levels, strict=True))
    return Quantity(value=dict(quantiles)[STATISTIC], unit="ms", kind=kind, n=len(samples), quantiles=quantiles)


def _plan(call: Call, clock: Callable[[], float]) -> _Plan:
    """Sizes from the faster of two calls; the first call of all prepares buffers and is not looked at."""
    call()
    once = max(min(_timed(call, 1, clock) for _ in range(2)), 1e-9)
    batch = max(1, math.ceil(SAMPLE / once))
    return _Plan(warm=max(1, round(WARM / once)), samples=max(1, round(VISIT / (once * batch))), calls=batch)


def _visit(call: Call, plan: _Plan, clock: Callable[[], float]) -> list[float]:
    for _ in range(plan.warm):
        call()
    return [_timed(call, plan.calls, clock) for _ in range(plan.samples)]


def _timed(call: Call, times: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(times):
        call()
    return (clock() - start) / times


def _finished(elapsed: float, rounds: int, found: list[list[float]], seconds: float, min_samples: int) -> bool:
    if not found or (rounds and elapsed >= CAP * seconds):
        return True
    return elapsed >= seconds and rounds >= ROUNDS and min(map(len, found)) >= min_samples
