"""What the constants of `nascompile/devices/interleave.py` and of the profiler's stacks rest on.

    python tools/benchmarks/timing_method.py --json
    python tools/benchmarks/timing_method.py --models vit_demo --parts warm_up

`warm_up`: networks take turns, and each of their first calls of a turn is timed, over the last ones (lower quartile over turns).
`depth`: milliseconds of a block in stacks of itself, by the stack's bytes of weights.
`statistic`: the same networks in consecutive windows; how far a network differs from itself, once what all networks of a window have in
common is taken out (standard deviation), by several quantiles of its samples.

Random weights, batch 1, one thread, ONNX Runtime; nothing is kept.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from table_accuracy import CELLS, MODELS, Case

from nascompile import plugins, space as spaces, targets
from nascompile.devices import interleave

SEED = 11
TURN, TURNS = 20, 30
"""Calls of a turn, and turns."""
DEPTHS = (2, 5, 10, 20, 30, 40, 60)
"""Megabytes of weights."""
WINDOWS = 4
QUANTILES = (0.02, 0.1, 0.25, 0.5)


def networks(case: Case, count: int, scratch: Path) -> list[tuple[str, Any]]:
    """(precision, job) of random networks, a third in float, a third in integers, a third mixed."""
    rng, found = np.random.default_rng(SEED), []
    for i in range(count):
        name = CELLS[i % len(CELLS)]
        space = case.cell_space(name)
        found.append((name, case.bench.network(case.point(space, spaces.sample(space, rng)), scratch)))
    return found


def warm_up(case: Case, count: int, seconds: float) -> dict[str, Any]:
    """Precision ▸ the calls of a turn over its last quarter, the median over networks."""
    rng = np.random.default_rng(SEED)
    with tempfile.TemporaryDirectory() as scratch:
        jobs = networks(case, count, Path(scratch))
        calls = [partial(job.runner.run, job.inputs) for _, job in jobs]
        times: list[list[list[float]]] = [[] for _ in jobs]
        for _ in range(TURNS):
            for i in rng.permutation(len(jobs)):
                times[i].append([_timed(calls[i]) for _ in range(TURN)])
    profiles: dict[str, list[Any]] = {}
    for (name, _), turns in zip(jobs, times, strict=True):
        calls_of = np.quantile(np.array(turns), 0.25, axis=0)
        profiles.setdefault(name, []).append(calls_of / calls_of[-TURN // 4 :].mean())
    return {name: [round(float(v), 3) for v in np.median(np.array(of), axis=0)] for name, of in profiles.items()}


def depth(case: Case, count: int, seconds: float) -> dict[str, Any]:
    """Operator ▸ [megabytes, milliseconds of a copy] of the largest and the smallest of each kind and precision that repeats."""
    sizes = case.bench.operator_bytes
    groups: dict[Any, list[Any]] = {}
    for operator in sorted((o for o in sizes if o.kind in case.bench.repeated), key=lambda o: sizes[o]):
        groups.setdefault((operator.kind, operator.precision.name, dict(operator.dims).get("sequence")), []).append(operator)
    ends = [o for of in groups.values() for o in (of[0], of[-1])]
    wanted = [(o, n) for o in ends for n in sorted({max(1, round(mb * 1e6 / sizes[o])) for mb in DEPTHS})]
    wanted = [(o, n) for o, n in wanted if n <= 2 * max(DEPTHS) and n * sizes[o] <= 1.1e6 * max(DEPTHS)]
    with tempfile.TemporaryDirectory() as scratch:
        jobs = [case.bench.operator(o, n, Path(scratch)) for o, n in wanted]
        timed = case.device.time(jobs, seconds=seconds * len(jobs), seed=SEED)
    found: dict[str, Any] = {}
    for (o, n), quantity in zip(wanted, timed, strict=True):
        found.setdefault(o.label, []).append([round(n * sizes[o] / 1e6, 1), round(quantity.value / n, 4)])
    return found


def statistic(case: Case, count: int, seconds: float) -> dict[str, Any]:
    """Quantile ▸ percent that a network differs from itself between windows."""
    with tempfile.TemporaryDirectory() as scratch:
        calls = [partial(job.runner.run, job.inputs) for _, job in networks(case, count, Path(scratch))]
        windows = [interleave.interleave(calls, seconds=seconds * count, seed=SEED + w, min_samples=15) for w in range(WINDOWS)]
    found = {}
    for level in QUANTILES:
        logs = np.log([[np.quantile(samples, level) for samples in window] for window in windows])
        own = logs - np.median(logs, axis=1, keepdims=True)
        spread = np.sqrt(np.square(own - own.mean(axis=0)).sum() / (own.size - count))
        found[str(level)] = round(100 * float(spread), 2)
    return found


PARTS: dict[str, Callable[[Case, int, float], dict[str, Any]]] = {"warm_up": warm_up, "depth": depth, "statistic": statistic}


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=["vit_demo", "minilm"])
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--networks", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=0.5, help="of timing for each network or stack in a window")
    given = parser.parse_args()
    found: dict[str, Any] = {}
    for model in given.models:
        with tempfile.TemporaryDirectory() as folder:
            case = Case(model, "onnxruntime", 1, Path(folder))
            for name in given.parts:
                print(f"{model}: {name}", file=sys.stderr, flush=True)
                found.setdefault(model, {})[name] = PARTS[name](case, given.networks, given.seconds)
    device = plugins.get("devices", targets.LOCAL).describe()
    content = {"models": found, "device": device, "versions": dict(plugins.get("backends", "onnxruntime").versions())}
    print(json.dumps(content, indent=1 if given.json else None))


if __name__ == "__main__":
    main()
