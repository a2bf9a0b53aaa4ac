"""The measuring stage: every engine file timed side by side, its throughput and memory, its accuracy on validation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nascompile import plugins
from nascompile.data import Split
from nascompile.devices import Device, Job
from nascompile.progress import Progress
from nascompile.records import Measurement, Quantity, save
from nascompile.scoring import Loaded, score_engine
from nascompile.settings import MeasureSettings

ROUNDS = 4
"""Throughput windows per engine and batch size, taken in turns so that a busy spell does not fall on one engine."""
LATENCY_SECONDS = 2.0
"""Timing per engine, all engines interleaved."""


def measure(
    folders: Sequence[Path], device: Device, validation: Split, task: Any, metric: str, settings: MeasureSettings, seed: int, out: Path,
    progress: Progress,
) -> tuple[Measurement, ...]:  # fmt: skip
    """One Measurement per engine folder, in their order; scores are kept as they come, timings are taken together."""
    engines = [Loaded.open(folder) for folder in folders]
    scores = []
    for number, engine in enumerate(engines):
        scores.append(score_engine(engine, validation, task, metric, out / "scores"))
        progress.step("engines scored on validation", number + 1, len(engines))
    one = validation.take(np.arange(1)).arrays()
    jobs = [Job(engine.manifest.name, engine.runner, one) for engine in engines]
    timing = f"timing {len(jobs)} engines side by side for {LATENCY_SECONDS * len(jobs):.0f} s"
    progress.note(f"counting the instructions of {len(jobs)} engines" if all(e.manifest.chip for e in engines) else timing)
    latencies = device.time(jobs, seconds=LATENCY_SECONDS * len(jobs), seed=seed)
    rates = _throughput(engines, device, validation, settings, seed, progress)
    found = []
    for engine, latency, rate, score in zip(engines, latencies, rates, scores, strict=True):
        target = engine.manifest.target
        environment = device.environment(target, plugins.get("backends", target.backend).versions())
        peak = device.peak_memory(target.backend, str(engine.folder), target, one)
        measurement = Measurement(
            engine=engine.manifest.name, latency=latency, throughput=rate, peak_memory_bytes=peak, environment=environment, score=score
        )
        save(measurement, out / f"{engine.manifest.name}.json")
        found.append(measurement)
    return tuple(found)


def _throughput(
    engines: Sequence[Loaded], device: Device, split: Split, settings: MeasureSettings, seed: int, progress: Progress
) -> list[tuple[tuple[int, Quantity], ...]]:
    """Per engine: (batch, samples per second) over interleaved windows that add up to `settings.seconds`."""
    rng = np.random.default_rng(seed)
    found: list[list[tuple[int, Quantity]]] = [[] for _ in engines]
    for done, batch in enumerate(settings.batches):
        inputs = split.take(np.arange(batch) % len(split)).arrays()
        windows: list[list[Quantity]] = [[] for _ in engines]
        for round_ in range(ROUNDS):
            for index in rng.permutation(len(engines)):
                job = Job(engines[index].manifest.name, engines[index].runner, inputs)
                windows[index].append(device.throughput(job, batch, settings.seconds / ROUNDS))
            progress.step("throughput windows", done * ROUNDS + round_ + 1, ROUNDS * len(settings.batches))
        for row, parts in zip(found, windows, strict=True):
            values = sorted(p.value for p in parts)
            row.append((batch, _joined(parts, values)))
    return [tuple(row) for row in found]


def _joined(parts: Sequence[Quantity], values: Sequence[float]) -> Quantity:
    """Equal windows: their mean rate is all samples over all time; the extremes show the spread."""
    return Quantity(
        value=float(np.mean(values)), unit=parts[0].unit, kind=parts[0].kind, n=sum(p.n for p in parts),
        quantiles=((0.0, values[0]), (1.0, values[-1])),
    )  # fmt: skip


def best_throughput(measurement: Measurement) -> tuple[int, Quantity]:
    """(batch, rate) of the batch size with the highest throughput."""
    return max(measurement.throughput, key=lambda pair: pair[1].value)


def agreement(pairs: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
    """How well emulated accuracy stands for the built engine's: mean absolute difference in points and Kendall's τ-b."""
    from scipy.stats import kendalltau

    emulated = [a for a, _ in pairs.values()]
    engine = [b for _, b in pairs.values()]
    tau = float(kendalltau(emulated, engine).statistic) if len(pairs) > 1 else float("nan")
    body = {
        "n": len(pairs), "mean_absolute_points": float(np.mean(np.abs(np.subtract(emulated, engine)))), "kendall_tau": tau,
        "pairs": [[name, a, b] for name, (a, b) in pairs.items()],
    }  # fmt: skip
    return json.loads(json.dumps(body))  # type: ignore[no-any-return]
