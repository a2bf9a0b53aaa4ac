"""The choosing stage: measured engines against their predictions and the budgets; then, and only then, the test split."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from nascompile.errors import BudgetError
from nascompile.records import (
    Budget,
    Choice,
    Correction,
    Difference,
    Differences,
    EngineManifest,
    Evaluation,
    Front,
    Measurement,
    Score,
    TestResult,
    digest,
)
from nascompile.scoring import Loaded, drop, gain, score_engine, worst
from nascompile.tasks.metrics import paired_bootstrap

BASELINE, UNIFORM = "baseline", "uniform-int8"


def select(front: Front, baseline: Score, count: int, safety: float) -> tuple[Evaluation, ...]:
    """The candidates worth building, best first: before all others those with `safety` standard errors to spare in `max_drop`.

    Of several targets the worst score counts, and the product of the latencies: by it no unit and no target weighs more than another.
    """
    ranked = sorted(
        (e for e in front.evaluations if _least_margin(baseline, e, front.budgets, 0.0) >= 0),
        key=lambda e: (
            _least_margin(baseline, e, front.budgets, safety) < 0,
            *_order(front.budgets, gain(worst(e)), math.prod((e.latency.value, *(other.latency.value for other in e.elsewhere)))),
            e.candidate.id,
        ),
    )
    return tuple(ranked[:count])


def correct(manifests: Mapping[str, EngineManifest], measured: Sequence[Measurement], table_digest: str) -> Correction:
    """Residuals of every engine that had a prediction: (engine, predicted ms, measured ms), and the median ratio.

    Where another variant than the predicted one was kept, what was predicted is compared with what that one took.
    """
    rows = []
    for m in measured:
        manifest = manifests[m.engine]
        pairs = [(manifest.predicted, m.latency), *((v.predicted, v.latency) for v in manifest.variants)]
        rows += [(m.engine, predicted.value, latency.value) for predicted, latency in pairs if predicted and latency][:1]
    ratios = [b / a for _, a, b in rows] or [1.0]  # nothing that was predicted could run
    return Correction(
        table_digest=table_digest, foreign=_foreign(manifests), residuals=tuple(rows), factor=float(np.median(ratios)),
        spread=float(np.max(np.abs(np.array(ratios) / np.median(ratios) - 1))),
    )  # fmt: skip


@dataclass(frozen=True)
class There:
    """What a network is on a further target: its engine, measured, or what is predicted and emulated where none can run here."""

    target: str
    """Target id."""
    label: str
    kind: str
    """Of the latency: measured, simulated, predicted."""
    latency_ms: float
    size_bytes: int
    score: Score
    baseline: Score
    """What the score is compared with: of the same samples, by the same means."""
    memory_mb: float
    """Of a call, counted."""


def choose(
    manifests: Mapping[str, EngineManifest], measured: Sequence[Measurement], budgets: tuple[Budget, ...], safety: float,
    there: Mapping[str, Sequence[There]] | None = None,
    baseline: Score | None = None,
) -> Choice:  # fmt: skip
    """The best engine file by what was measured; BudgetError with the nearest one if none meets the budgets.

    `there`: engine ▸ what its network is on further targets. Their budgets count as much, and `select`'s order holds. `baseline`: the
    float network's score where there is no engine of it.
    """
    scores = {m.engine: m.score for m in measured if m.score is not None}
    baseline, there = baseline or scores[BASELINE], there or {}
    rejected, sound = {}, []
    for m in measured:
        others = there.get(m.engine, ())
        own = tuple(b for b in budgets if b.target not in {t.target for t in others})
        faults = [_fault(m, manifests[m.engine], scores[m.engine], baseline, own), *(_fault_there(t, budgets) for t in others)]
        if fault := "; ".join(filter(None, faults)):
            rejected[m.engine] = fault
        else:
            sound.append(m)
    if not sound:
        nearest = min(measured, key=lambda m: drop(baseline, scores[m.engine])[0])
        raise BudgetError(
            f"none of the {len(measured)} measured engines meets the budget: " + ", ".join(f"{b.metric} ≤ {b.bound:g}" for b in budgets),
            detail="\n".join(f"{name}: {why}" for name, why in rejected.items()),
            hint=f"nearest in accuracy is {nearest.engine}; widen a budget and run again: nothing is scored or measured twice",
        )

    def margin(m: Measurement) -> float:
        everywhere = ((baseline, scores[m.engine]), *((t.baseline, t.score) for t in there.get(m.engine, ())))
        return min(_margin(*pair, budgets, safety) for pair in everywhere)

    def place(m: Measurement) -> tuple[Any, ...]:
        others = there.get(m.engine, ())
        accuracy = min(gain(scores[m.engine]), *(gain(baseline) - drop(t.baseline, t.score)[0] for t in others), math.inf)
        latency = math.prod((m.latency.value, *(t.latency_ms for t in others)))
        return margin(m) < 0, *_order(budgets, accuracy, latency), m.engine

    ranked = sorted(sound, key=place)
    best = ranked[0]
    lost, error = drop(baseline, scores[best.engine])
    aim = f"best validation {baseline.metric}" if _accuracy_first(budgets) else f"lowest {best.latency.kind} latency"
    spare = "" if margin(best) >= 0 else f", though not with {safety:g} standard errors to spare"
    others = there.get(best.engine, ())
    if others:
        aim += " on the worst of the devices" if _accuracy_first(budgets) else ", multiplied over the devices,"
    return Choice(
        engine=best.engine,
        reason=f"{aim} among the engines that meet every budget on validation{spare}: "
        f"{best.latency.value:.3g} ms{' modelled' * (best.latency.kind == 'modelled')}, drop {lost:.2f} ± {error:.2f} points"
        + "".join(f"; on {t.label} {t.latency_ms:.3g} ms {t.kind}, drop {drop(t.baseline, t.score)[0]:.2f}" for t in others),
        budgets=budgets, ranking=tuple(m.engine for m in ranked), rejected=tuple(sorted(rejected.items())),
        foreign=_foreign(manifests) or msgspec.UNSET,
    )  # fmt: skip


def _foreign(manifests: Mapping[str, EngineManifest]) -> Differences:
    """What differs where the engines were found by a table of another environment; all of a run by the same."""
    return next((m.foreign for m in manifests.values() if m.foreign), ())


def examine(
    choice: Choice, engines: Path, open_test: Callable[[], Any], task: Any, metric: str, folder: Path, seed: int,
    float_score: Callable[[Any], Score] | None = None,
) -> TestResult:  # fmt: skip
    """Test scores of the chosen engine, the baseline and the uniform engine: the one reading of the test split.

    `float_score`: the baseline's score of a split where there is no engine of it.
    """
    split = open_test()
    names = list(dict.fromkeys((BASELINE, UNIFORM, choice.engine)))
    scores = {name: score_engine(Loaded.open(engines / name), split, task, metric, folder) for name in names if (engines / name).is_dir()}
    if float_score:
        scores = {BASELINE: float_score(split)} | scores
    differences = [
        _difference(choice.engine, name, scores[choice.engine], scores[name], seed) for name in scores if name != choice.engine
    ]
    return TestResult(choice_digest=digest(choice), scores=tuple(scores.items()), differences=tuple(differences))


def _difference(engine: str, reference: str, a: Score, b: Score, seed: int) -> Difference:
    value, low, high = paired_bootstrap(np.asarray(a.per_sample), np.asarray(b.per_sample), seed=seed)
    unit, scale = ("points", 100.0) if a.metric == "accuracy" else ("per-sample value", 1.0)
    return Difference(engine=engine, reference=reference, value=value * scale, low=low * scale, high=high * scale, unit=unit)


def _order(budgets: tuple[Budget, ...], accuracy: float, latency_ms: float) -> tuple[float, float]:
    """What is best within the budgets: accuracy or speed first."""
    return (-accuracy, latency_ms) if _accuracy_first(budgets) else (latency_ms, -accuracy)


def _accuracy_first(budgets: tuple[Budget, ...]) -> bool:
    """Whether accuracy goes before speed: where somebody bounded a cost, and where nothing but the device's limits bounds anything."""
    asked = [b for b in budgets if b.limit is not True]
    return any(b.metric != "drop" for b in asked) or (bool(budgets) and not asked)


def _margin(baseline: Score, score: Score, budgets: tuple[Budget, ...], safety: float) -> float:
    """Points left inside `max_drop` after `safety` standard errors; infinite without that budget."""
    bound = next((b.bound for b in budgets if b.metric == "drop"), None)
    if bound is None:
        return float("inf")
    lost, error = drop(baseline, score)
    return bound - lost - safety * error


def _fault_there(t: There, budgets: tuple[Budget, ...]) -> str:
    """Why a network breaks a budget of a further target; empty if it does not."""
    actual = {
        "latency_ms": t.latency_ms, "size_mb": t.size_bytes / 1e6, "memory_mb": t.memory_mb, "drop": drop(t.baseline, t.score)[0],
    }  # fmt: skip
    broken = [b for b in budgets if b.target in (t.target, "") and b.metric in actual and actual[b.metric] > b.bound]
    said = [f"{b.metric} {actual[b.metric]:.3g} > {b.bound:g}{f' ({t.kind})' if b.metric == 'latency_ms' else ''}" for b in broken]
    return f"on {t.label}: {', '.join(said)}" if said else ""


def _least_margin(baseline: Score, e: Evaluation, budgets: tuple[Budget, ...], safety: float) -> float:
    return min(_margin(baseline, score, budgets, safety) for score in (e.score, *(other.score for other in e.elsewhere)))


def _fault(m: Measurement, manifest: EngineManifest, score: Score, baseline: Score, budgets: tuple[Budget, ...]) -> str:
    """Why a measured engine breaks a budget; empty if it does not."""
    graph = manifest.graph
    macs = sum(node.macs for node in graph.nodes) / 1e6 if graph else 0.0
    memory = manifest.chip.ram_bytes / 1e6 if manifest.chip else graph.memory_bytes / 1e6 if graph else 0.0
    actual = {
        "latency_ms": m.latency.value, "size_mb": manifest.size_bytes / 1e6, "macs_m": macs, "memory_mb": memory,
        "drop": drop(baseline, score)[0],
    }  # fmt: skip
    return "; ".join(f"{b.metric} {actual[b.metric]:.3g} > {b.bound:g}" for b in budgets if actual[b.metric] > b.bound)
