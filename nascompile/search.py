"""The search stage: candidates proposed by a searcher, priced by the table, scored once, journaled; the front comes back."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nascompile import journal, latency_table, network, pareto, plugins
from nascompile.accuracy import Evaluator, ladder
from nascompile.errors import BudgetError
from nascompile.families import Family
from nascompile.progress import Progress
from nascompile.records import Budget, Candidate, Differences, Evaluation, Front, LatencyTable, Score, SearchSpace, Target
from nascompile.scoring import drop, gain
from nascompile.settings import SearchSettings

IDLE_ROUNDS = 25
"""Rounds in which every proposal was over budget or known before the search gives up on finding more."""
DROP_SLACK = 1.0
"""Points beyond `max_drop` that the search still explores, so that the border is seen from both sides."""


@dataclass(frozen=True)
class Pricing:
    """What a candidate costs on one target, without building or running it."""

    family: Family
    config: Any
    space: SearchSpace
    target: Target
    table: LatencyTable
    structure_bytes: int = 0
    """What a graph file holds besides weights, about."""
    foreign: Differences = ()
    """What differs where the table is of another environment."""

    def __call__(self, point: Candidate) -> tuple[dict[str, float], Any, int, int, int]:
        """({metric: value}, latency interval, size in bytes, parameters, MACs)."""
        graph = network.graph(self.family, self.config, self.space, point, self.target)
        latency = latency_table.predict(self.table, graph)
        size = self.structure_bytes + sum(node.size_bytes for node in graph.nodes)
        parameters, macs = sum(node.parameters for node in graph.nodes), sum(node.macs for node in graph.nodes)
        return {"latency_ms": latency.value, "size_mb": size / 1e6, "macs_m": macs / 1e6}, latency, size, parameters, macs


def search(
    evaluator: Evaluator, pricing: Pricing, baseline: Score, budgets: tuple[Budget, ...], settings: SearchSettings, seed: int,
    path: Path, progress: Progress, deadline: float = float("inf"),
) -> Front:  # fmt: skip
    """The non-dominated scored candidates within the cost budgets, cheapest first; BudgetError if no candidate meets every budget."""
    began, space = time.monotonic(), pricing.space
    known = {_key(e): e for e in journal.read(path, Evaluation)}
    searcher = plugins.get("searchers", settings.searcher)
    run = searcher.start(space, len(settings.objectives), settings.population, _affordable(ladder(space), pricing, budgets), seed)
    scored: dict[Candidate, Evaluation] = {}
    idle, nearest = 0, None
    while len(scored) < settings.evaluations and idle < IDLE_ROUNDS and not (scored and time.monotonic() > deadline):
        points = run.ask()
        if not points:
            break
        rows, violations, before = [], [], len(scored)
        for point in points:
            costs, *rest = pricing(point)
            over = _over(costs, budgets)
            if over > 0:
                if nearest is None or over < nearest[0]:
                    nearest = (over, point, costs)
            elif point not in scored and len(scored) < settings.evaluations and not (scored and time.monotonic() > deadline):
                scored[point] = _evaluate(point, rest, evaluator, known, path, pricing.foreign)
                progress.step("candidates scored", len(scored), settings.evaluations)
            rows.append(_objectives(costs, scored[point].score if point in scored else None, settings.objectives))
            violations.append(over if over > 0 else _drop_violation(scored.get(point), baseline, budgets))
        run.tell(points, np.array(rows), np.array(violations))
        idle = idle + 1 if len(scored) == before else 0
    if not scored:
        raise _unaffordable(nearest, budgets, space)
    evaluations = list(scored.values())
    _require_accuracy(evaluations, baseline, budgets)
    matrix = np.array([_objectives(_costs_of(e), e.score, settings.objectives) for e in evaluations])
    chosen = sorted((evaluations[i] for i in pareto.front(matrix)), key=lambda e: (e.latency.value, -gain(e.score), e.candidate.id))
    return Front(
        space=space, target=pricing.target, objectives=settings.objectives, budgets=budgets, evaluations=tuple(chosen),
        searcher=settings.searcher, seed=seed, scored=len(evaluations), seconds=time.monotonic() - began, hypervolume=_trace(matrix),
        foreign=pricing.foreign,
    )  # fmt: skip


def _evaluate(
    point: Candidate, costs: list[Any], evaluator: Evaluator, known: Mapping[Any, Evaluation], path: Path, foreign: Differences
) -> Evaluation:
    """From the journal if this candidate was ever scored by the same evaluator on the same weights and data, else scored now."""
    key = (point, evaluator.digest, evaluator.split_digest, evaluator.weights_digest)
    latency, size, parameters, macs = costs
    began = time.monotonic()
    score = known[key].score if key in known else evaluator.score(point)
    seconds = known[key].seconds if key in known else time.monotonic() - began
    evaluation = Evaluation(
        candidate=point, score=score, latency=latency, size_bytes=size, parameters=parameters, macs=macs, seconds=seconds,
        foreign=foreign,
    )  # fmt: skip
    if key not in known:
        journal.append(path, evaluation)
    return evaluation


def _key(e: Evaluation) -> Any:
    return (e.candidate, e.score.evaluator_digest, e.score.split_digest, e.score.weights_digest)


def _costs_of(e: Evaluation) -> dict[str, float]:
    return {"latency_ms": e.latency.value, "size_mb": e.size_bytes / 1e6, "macs_m": e.macs / 1e6}


def _objectives(costs: Mapping[str, float], score: Score | None, names: tuple[str, ...]) -> list[float]:
    return [(1e6 if score is None else -gain(score)) if name == "error" else costs[name] for name in names]


def _over(costs: Mapping[str, float], budgets: tuple[Budget, ...]) -> float:
    """Sum of relative excesses over the cost budgets."""
    return sum(max(0.0, costs[b.metric] / b.bound - 1) for b in budgets if b.metric in costs)


def _drop_violation(e: Evaluation | None, baseline: Score, budgets: tuple[Budget, ...]) -> float:
    bound = next((b.bound for b in budgets if b.metric == "drop"), None)
    if bound is None or e is None:
        return 0.0
    return max(0.0, drop(baseline, e.score)[0] - bound - DROP_SLACK)


def _affordable(points: tuple[Candidate, ...], pricing: Pricing, budgets: tuple[Budget, ...]) -> tuple[Candidate, ...]:
    return tuple(p for p in points if _over(pricing(p)[0], budgets) == 0) or points


def _trace(matrix: np.ndarray[Any, Any]) -> tuple[tuple[int, float], ...]:
    """Hypervolume after each scored candidate, against the worst value of each objective."""
    worst = matrix.max(axis=0)
    reference = worst + np.maximum(np.abs(worst), 1e-9) * 0.01
    return tuple((n, float(pareto.hypervolume(matrix[:n], reference))) for n in range(1, len(matrix) + 1))


def _unaffordable(nearest: Any, budgets: tuple[Budget, ...], space: SearchSpace) -> BudgetError:
    asked = ", ".join(f"{b.metric} ≤ {b.bound:g}" for b in budgets if b.metric != "drop")
    if nearest is None:
        return BudgetError(f"no candidate could be tried within {asked}", hint="raise `--time`")
    _, point, costs = nearest
    detail = "nearest: " + ", ".join(f"{name} {value:.3g}" for name, value in costs.items()) + f" ({_shape(point)})"
    broken = [b.metric for b in budgets if b.metric in costs and costs[b.metric] > b.bound]
    changes = " and ".join(f"`--{metric.replace('_', '-')}` to {_ceil(costs[metric]):.3g}" for metric in broken)
    return BudgetError(f"no candidate meets the budget: {asked}", detail=detail, hint=f"raise {changes}, or start from a smaller model")


def _require_accuracy(evaluations: list[Evaluation], baseline: Score, budgets: tuple[Budget, ...]) -> None:
    bound = next((b.bound for b in budgets if b.metric == "drop"), None)
    if bound is None:
        return
    best = min(evaluations, key=lambda e: (drop(baseline, e.score)[0], e.latency.value))
    least = drop(baseline, best.score)[0]
    if least > bound:
        raise BudgetError(
            f"none of {len(evaluations)} scored candidates meets the budget: drop ≤ {bound:g} points",
            detail=f"nearest: {best.score.metric} {best.score.value:.2f}, a drop of {least:.2f} from {baseline.value:.2f}, "
            f"at {best.latency.value:.3g} ms ({_shape(best.candidate)})",
            hint=f"raise `--max-drop` to {_ceil(least):.3g}, or train longer (`--epochs`); every score is kept and not repeated",
        )


def _ceil(value: float) -> float:
    """Slightly up, to three digits, so that the printed bound is met."""
    return float(f"{value * 1.005 + 0.0005:.3g}")


def _shape(point: Candidate) -> str:
    widths: dict[str, list[int]] = {}
    for name, value in point.architecture:
        widths.setdefault(name.rpartition(".")[2], []).append(value)
    return ", ".join(f"{name}={'/'.join(map(str, values))}" for name, values in widths.items())


