"""Scores of engine files, and what is lost against a baseline; no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nascompile import plugins
from nascompile.data import Split
from nascompile.records import EngineManifest, Evaluation, Precision, Score, Target, digest, load, save

SCORING_BATCH = 32
MASK = "attention_mask"


def score_of(task: Any, metric: str, logits: Any, labels: Any, *, split: str, weights: str, evaluator: str) -> Score:
    """A Score of logits (n, labels) against labels (n,), with one value per sample for paired comparisons."""
    value, stderr = task.score(metric, logits, labels)
    return Score(
        metric=metric, direction=task.direction(metric), value=float(value), n=len(labels), stderr=float(stderr), split_digest=split,
        weights_digest=weights, evaluator_digest=evaluator,
        per_sample=tuple(float(v) for v in np.asarray(task.per_sample(metric, logits, labels), dtype=np.float64).round(6)),
    )  # fmt: skip


def gain(score: Score) -> float:
    """The metric with its sign turned so that more is better."""
    return score.value if score.direction == "maximize" else -score.value


def worst(e: Evaluation) -> Score:
    """The lowest score of a candidate over the targets it was searched for."""
    return min((e.score, *(other.score for other in e.elsewhere)), key=gain)


def drop(baseline: Score, score: Score) -> tuple[float, float]:
    """(how much worse than the baseline in the metric's points, its standard error): paired for accuracy, else unpaired."""
    value = gain(baseline) - gain(score)
    if baseline.metric == "accuracy" and len(baseline.per_sample) == len(score.per_sample) > 1:
        difference = np.asarray(baseline.per_sample) - np.asarray(score.per_sample)
        return value, float(100 * difference.std(ddof=1) / math.sqrt(len(difference)))
    return value, math.hypot(baseline.stderr, score.stderr)


@dataclass(frozen=True)
class Loaded:
    """An engine folder, its manifest and its runner."""

    folder: Path
    manifest: EngineManifest
    runner: Any

    @classmethod
    def open(cls, folder: Path) -> Loaded:
        manifest = load(folder / "manifest.json", EngineManifest)
        backend = plugins.get("backends", manifest.target.backend)
        return cls(folder, manifest, backend.load(folder, manifest.graphs, manifest.target))


def score_engine(engine: Loaded, split: Split, task: Any, metric: str, folder: Path) -> Score:
    """The engine file's metric on a split, kept in `folder` so that it is computed once."""
    key = digest([engine.manifest.files, split.digest, metric])
    path = folder / f"{engine.manifest.name}-{key[:12]}.json"
    if path.is_file():
        return load(path, Score)
    manifest = engine.manifest
    batch = batch_of((node.operator.precision for node in manifest.graph.nodes) if manifest.graph else (), manifest.target)
    score = score_runner(engine.runner, split, task, metric, split.digest, manifest.weights_digest, key, batch)
    save(score, path)
    return score


def batch_of(precisions: Iterable[Precision], target: Target) -> int:
    """Samples in a call when a network is scored: those of the workload where they influence each other's results, else many."""
    return target.workload.batch if any(precision.dynamic for precision in precisions) else SCORING_BATCH


def score_runner(
    runner: Any, split: Split, task: Any, metric: str, split_digest: str, weights: str, evaluator: str, batch: int = SCORING_BATCH
) -> Score:
    """The metric of a loaded engine on a split; fewer samples in a call than usual are without the padding they do not need."""
    rows, labels = [], []
    for inputs, truth in split.batches(batch):
        if batch < SCORING_BATCH and MASK in inputs:
            longest = int(np.flatnonzero(inputs[MASK].any(axis=0)).max(initial=0)) + 1
            inputs = {name: array[:, :longest] for name, array in inputs.items()}
        rows.append(next(iter(runner.run(inputs).values())))
        labels.append(truth)
    return score_of(
        task, metric, np.concatenate(rows), np.concatenate(labels), split=split_digest, weights=weights, evaluator=evaluator
    )
