"""Timing in blocks: every call once a block, in a fresh order, so that a machine's drift and its other users hit all alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nascompile.devices.interleave import STATISTIC

WARM, VISIT = 0.03, 0.12
"""Seconds of a visit that are not recorded, and that are; at least one call each."""
MOST = 15
"""Blocks, however short they are."""
DRAWS, LEVEL = 2000, 0.95

Times = npt.NDArray[np.float64]
"""Seconds per call: contender × block."""


@dataclass(frozen=True)
class Plan:
    """Calls of a visit."""

    warm: int
    recorded: int


def plan(call: Callable[[], Any]) -> Plan:
    """From a call that is not the first, or from the faster of two if it is short."""
    once = _timed(call)
    once = max(once if once > VISIT else min(once, _timed(call)), 1e-6)
    return Plan(warm=max(1, round(WARM / once)), recorded=max(1, round(VISIT / once)))


def blocks(calls: Sequence[Callable[[], Any]], plans: Sequence[Plan], *, at_least: int, seconds: float, seed: int) -> Times:
    """The low decile of every visit, as `interleave` takes it of a row; blocks until `seconds` have passed."""
    rng = np.random.default_rng(seed)
    found: list[list[float]] = [[] for _ in calls]
    collecting, start, count = gc.isenabled(), time.perf_counter(), 0
    gc.disable()
    try:
        while count < at_least or (count < MOST and time.perf_counter() - start < seconds):
            for i in rng.permutation(len(calls)):
                for _ in range(plans[i].warm):
                    calls[i]()
                found[i].append(float(np.quantile([_timed(calls[i]) for _ in range(plans[i].recorded)], STATISTIC)))
            count += 1
    finally:
        if collecting:
            gc.enable()
    return np.array(found)


def _timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def advantage(ours: Times, rivals: Times, counts: npt.NDArray[np.bool_], seed: int) -> dict[str, float]:
    """Time of the best rival over that of our best engine: the median over blocks and its bootstrap interval.

    `counts` (ours × rivals): which rivals each engine is compared with. Which engine and which rival is the best is decided anew in
    every resample of blocks, so that the interval covers that choice too.
    """
    number = ours.shape[1]
    draws = np.random.default_rng(seed).integers(0, number, (DRAWS, number))
    sample = _best(ours[:, draws], rivals[:, draws], counts)
    low, high = np.quantile(sample, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {"value": float(_best(ours[:, None], rivals[:, None], counts)[0]), "low": float(low), "high": float(high)}


def _best(ours: Times, rivals: Times, counts: npt.NDArray[np.bool_]) -> Times:
    """(draws,) from (contender, draws, blocks)."""
    medians = np.median(rivals[None] / ours[:, None], axis=-1)
    worst: Times = np.where(counts[:, :, None], medians, np.inf).min(axis=1).max(axis=0)
    return worst
