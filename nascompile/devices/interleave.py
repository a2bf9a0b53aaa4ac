"""Timing several calls against each other so that a machine's drift and its other users hit all of them alike.

Each round visits every call once, in a fresh random order. A visit first calls without recording until the call's data is back in the
caches (`WARM`), then records for about `VISIT` seconds. Calls shorter than `SAMPLE` are recorded in batches,
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

WARM, FEWEST_WARM, MOST_WARM = 0.1, 2, 12
"""Seconds of calls without recording, and how many there are at least and at most. An engine in use runs again and again, its weights
where the caches keep them, and it takes a dozen calls to get them there (`tools/benchmarks/timing_method.py`)."""
VISIT = 3e-2
SAMPLE = 1e-4
LEVELS = (0.1, 0.25, 0.5, 0.9, 0.99)
STATISTIC = 0.25
"""The value of a timed quantity. A busy neighbour only ever adds time, so the low end is the machine's own; but a shared processor also
has short fast spells, which a lower quantile picks out for some calls and not for others (`tools/benchmarks/timing_method.py`)."""
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


def quantity(samples: Sequence[float], kind: Literal["measured", "simulated", "modelled"]) -> Quantity:
    """Samples in seconds ▸ ms with quantiles; the value is the lower quartile."""
    levels = np.quantile(np.asarray(samples) * 1e3, LEVELS)
    quantiles = tuple((level, float(value)) for level, value in zip(LEVELS, levels, strict=True))
    return Quantity(value=dict(quantiles)[STATISTIC], unit="ms", kind=kind, n=len(samples), quantiles=quantiles)


def _plan(call: Call, clock: Callable[[], float]) -> _Plan:
    """Sizes from the fastest of some calls; the first call of all prepares buffers and is not looked at."""
    call()
    start, once = clock(), math.inf
    for number in range(1, MOST_WARM + 1):
        once = max(min(_timed(call, 1, clock), once), 1e-9)
        if number >= FEWEST_WARM and clock() - start >= WARM:
            break
    batch = max(1, math.ceil(SAMPLE / once))
    warm = min(MOST_WARM, max(FEWEST_WARM, math.ceil(WARM / once)))
    return _Plan(warm=warm, samples=max(1, round(VISIT / (once * batch))), calls=batch)


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
