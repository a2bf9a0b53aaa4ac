"""The search stage: candidates proposed by a searcher, priced by the table, scored once, journaled; the front comes back."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from nascompile import journal, latency_table, network, pareto, plugins, space as spaces
from nascompile.accuracy import ladder
from nascompile.errors import BudgetError
from nascompile.families import Family
from nascompile.program_accuracy import AnyEvaluator
from nascompile.program_costs import Chip, refusal
from nascompile.progress import Progress, Standing
from nascompile.records import (
    Budget,
    Candidate,
    Differences,
    Elsewhere,
    Evaluation,
    Front,
    LatencyTable,
    Node,
    Operator,
    OperatorGraph,
    Score,
    SearchSpace,
    TableRow,
    Target,
)  # fmt: skip
from nascompile.scoring import drop, gain, worst
from nascompile.searchers import Price, Problem
from nascompile.searchers.evolution import Evolving
from nascompile.settings import SearchSettings
from nascompile.stopping import Stopping, gain as growth, reference
from nascompile.targets import label, time_unit
from nascompile.worker import Job
from nascompile.workers import Executor, Inline

IDLE_ROUNDS = 25
"""Rounds in which every proposal was over budget or known before the search gives up on finding more."""
UNKNOWN = 1e6
"""What stands for the score of a candidate that has none."""
LIMITS = {"memory_mb": "RAM", "size_mb": "flash"}
"""Cost ▸ what it takes of a microcontroller."""
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
    chip: Chip | None = None
    """Of a microcontroller: RAM and flash then stand for memory and size."""

    def __call__(self, point: Candidate) -> tuple[dict[str, float], Any, int, int, int]:
        """({metric: value}, latency interval, size in bytes, parameters, MACs)."""
        graph = network.graph(self.family, self.config, self.space, point, self.target)
        taken = self.chip.takes(graph) if self.chip else None
        latency = latency_table.predict(self.table, taken.graph if taken else graph)
        size = taken.flash if taken else self.structure_bytes + sum(node.size_bytes for node in graph.nodes)
        memory = taken.ram if taken else graph.memory_bytes
        parameters, macs = sum(node.parameters for node in graph.nodes), sum(node.macs for node in graph.nodes)
        costs = {"latency_ms": latency.value, "size_mb": size / 1e6, "macs_m": macs / 1e6, "memory_mb": memory / 1e6}
        return costs, latency, size, parameters, macs

    def costs(self, point: Candidate) -> dict[str, float]:
        """{metric: value} as above, thousands of candidates a second: blocks are remembered."""
        graph = self._graph(point)
        taken = self.chip.takes(graph) if self.chip else None
        size = taken.flash if taken else self.structure_bytes + sum(node.size_bytes for node in graph.nodes)
        memory = taken.ram if taken else graph.memory_bytes
        times = self._times(taken.graph if taken else graph)
        return times | {"size_mb": size / 1e6, "memory_mb": memory / 1e6}

    def in_time(self, point: Candidate) -> dict[str, float]:
        """Latency and MACs alone, which take no planning: those of the plan that most candidates have."""
        return self._times(self._graph(point))

    def _times(self, graph: OperatorGraph) -> dict[str, float]:
        lacking = bool(self.chip) and any(node.operator not in self._rows for node in graph.nodes)
        latency = self._guess(graph) if lacking else latency_table.total(self.table, self._rows, graph)
        return {"latency_ms": latency, "macs_m": sum(node.macs for node in graph.nodes) / 1e6}

    def _guess(self, graph: OperatorGraph) -> float:
        """Milliseconds of what no kernel takes and so no row counts, by its products: searchers want a number."""
        pace = max(row.latency.value / max(1, self.family.macs(row.operator)) for row in self.table.rows)
        return pace * sum(node.macs for node in graph.nodes)

    def _graph(self, point: Candidate) -> OperatorGraph:
        """The candidate's nodes, of blocks that were seen before from memory; TableError if a block that can be run has no row."""
        keys = self._blocks(point)
        if any(key not in self._known for key in keys):
            graph = network.graph(self.family, self.config, self.space, point, self.target)
            runnable = tuple(node for node in graph.nodes if not (self.chip and refusal(node.operator)))
            latency_table.predict(self.table, OperatorGraph(nodes=runnable))
            self._known.update(zip(keys, graph.nodes, strict=True))
        return OperatorGraph(nodes=tuple(self._known[key] for key in keys))

    def _blocks(self, point: Candidate) -> list[tuple[Any, ...]]:
        """What decides the costs of each of the candidate's blocks, in execution order."""
        chosen, layers = dict(point.architecture), set(spaces.kept_layers(self.space, point))
        kept = [(segment, genes) for segment, genes in self._segments if segment.layer is None or segment.layer in layers]
        names = [network.block_precision(self.space, point, segment, self.target.id).name for segment, _ in kept]
        state = (max(layers, default=None), any(self._dynamic[name] for name in names))  # what is computed for the first token only
        return [(s.name, *(chosen.get(gene) for gene in genes), name, state) for (s, genes), name in zip(kept, names, strict=True)]

    @cached_property
    def _segments(self) -> list[tuple[Any, tuple[str, ...]]]:
        groups, known = self.family.groups(self.config), {gene.name for gene in self.space.genes}
        return [
            (segment, tuple(gene for gene in network.genes_of(self.family, groups, segment) if gene in known))
            for segment in self.family.segments(self.config)
        ]

    @cached_property
    def _known(self) -> dict[tuple[Any, ...], Node]:
        return {}

    @cached_property
    def _rows(self) -> dict[Operator, TableRow]:
        return {row.operator: row for row in self.table.rows}

    @cached_property
    def _dynamic(self) -> dict[str, bool]:
        return {"fp32": False, **{precision.name: precision.dynamic for precision in self.space.precisions}}


def search(
    evaluator: AnyEvaluator, pricing: Pricing, baseline: Score, budgets: tuple[Budget, ...], settings: SearchSettings, seed: int,
    path: Path, progress: Progress, deadline: float = float("inf"), also: Sequence[Pricing] = (), executor: Executor | None = None,
) -> Front:  # fmt: skip
    """The non-dominated scored candidates within the cost budgets, cheapest first; BudgetError if no candidate meets every budget.

    `also`: prices on further targets of the same space. A candidate then has a score and costs on each, and must keep every budget.
    `executor`: who scores; this process if nobody else. Ctrl-C ends the search with what it has; KeyboardInterrupt if that is nothing.
    """
    began, space, aim = time.monotonic(), pricing.space, Aim(settings.objectives, budgets, (pricing, *also))
    known = Known(path, space)
    searcher = plugins.get("searchers", settings.searcher)
    if settings.space_evolution:
        searcher = Evolving(searcher, progress.note)
    first, problem = ladder(space), aim.problem(space)
    affordable = tuple(p for p in first if problem.price(p).over == 0) or first
    run = searcher.start(problem, settings.population, affordable, seed)
    scored: dict[Candidate, Evaluation] = {}
    outcomes: list[list[float]] = []
    idle, nearest, stopped = 0, None, ""
    score = Scoring(evaluator, executor or Inline(evaluator), known, pricing.foreign)
    with Stopping(deadline, settings.patience, progress.note) as stop:
        while len(scored) < settings.evaluations and not stopped:
            points = run.ask()
            if not points:
                break
            costs = {point: aim.costs(point) for point in points}
            overs = {point: aim.over(costs[point]) for point in costs}
            for point, over in overs.items():
                if over > 0 and (nearest is None or over < nearest[0]):
                    nearest = (over, point, costs[point])
            new = [point for point in costs if overs[point] <= 0 and point not in scored][: settings.evaluations - len(scored)]
            found: dict[Candidate, Evaluation] = {}
            for evaluation in score({point: aim.prices(point) for point in new}, stop.go_on):
                found[evaluation.candidate] = evaluation
                stop.scored += 1
                progress.step("candidates scored", stop.scored, settings.evaluations, stop.left())
            done = [point for point in new if point in found]  # in the order of the asks, whoever was first to come back
            scored.update((point, found[point]) for point in done)
            outcomes += [aim.values(costs[point], worst(found[point])) for point in done]
            rows = [aim.values(costs[p], worst(scored[p]) if p in scored else None) for p in points]
            violations = [overs[p] if overs[p] > 0 else _drop_violation(scored.get(p), baseline, budgets) for p in points]
            run.tell(points, np.array(rows), np.array(violations))
            idle = 0 if done else idle + 1
            stopped = stop.after(np.array(outcomes)) or f"nothing new in {IDLE_ROUNDS} rounds" * (idle == IDLE_ROUNDS)
            if done:
                progress.standing(_standing(list(scored.values()), np.array(outcomes), len(done), aim, settings.evaluations))
    if not scored and stop.interrupted:
        raise KeyboardInterrupt
    if not scored:
        raise _unaffordable(nearest, aim, space)
    evaluations = list(scored.values())
    _require_accuracy(evaluations, baseline, budgets)
    matrix = np.array(outcomes)
    fine = list(range(len(evaluations)))
    if "error" not in settings.objectives:  # which else holds the accurate ones on the front
        fine = [i for i in fine if _drop_violation(evaluations[i], baseline, budgets, 0.0) == 0]
    best = (evaluations[fine[i]] for i in pareto.front(matrix[fine]))
    chosen = sorted(best, key=lambda e: (e.latency.value, -gain(worst(e)), e.candidate.id))
    return Front(
        space=space, target=pricing.target, objectives=settings.objectives, budgets=budgets, evaluations=tuple(chosen),
        searcher=settings.searcher, seed=seed, scored=len(evaluations), seconds=time.monotonic() - began, hypervolume=_trace(matrix),
        also=tuple(other.target for other in also), foreign=pricing.foreign, stopped=stopped if len(scored) < settings.evaluations else "",
    )  # fmt: skip


Priced = tuple[dict[str, float], Any, int, int, int]
"""What a Pricing says of a candidate."""
Costs = Sequence[dict[str, float]]
"""{metric: value} of a candidate on every target."""


@dataclass(frozen=True)
class Aim:
    """What is minimized and bounded, on which targets."""

    names: tuple[str, ...]
    budgets: tuple[Budget, ...]
    pricings: tuple[Pricing, ...]

    @property
    def count(self) -> int:
        """Objectives: a latency is one per target."""
        return sum(len(self.pricings) if name == "latency_ms" else 1 for name in self.names)

    def problem(self, space: SearchSpace) -> Problem:
        """What searchers are told."""
        bounded = any(budget.metric != "drop" for budget in self.budgets)
        slow = any(getattr(pricing, "chip", None) for pricing in self.pricings) and not set(self.names) & set(LIMITS)
        return Problem(space, self.count, self._price, bounded, self._values if slow else None)

    def _price(self, point: Candidate) -> Price:
        costs = self.costs(point)
        return Price(tuple(self.objectives(costs, None)), self.over(costs))

    def _values(self, point: Candidate) -> tuple[float | None, ...]:
        return tuple(self.objectives(tuple(pricing.in_time(point) for pricing in self.pricings), None))

    def prices(self, point: Candidate) -> tuple[Priced, ...]:
        """What each Pricing says of the candidate."""
        return tuple(pricing(point) for pricing in self.pricings)

    def costs(self, point: Candidate) -> Costs:
        """The candidate's costs on every target."""
        return tuple(pricing.costs(point) for pricing in self.pricings)

    def objectives(self, costs: Costs, score: Score | None) -> list[float | None]:
        """In the order of the names, None for the error without a score; `score` is the worst of the targets', as the largest size is."""
        found: list[float | None] = []
        for name in self.names:
            if name == "error":
                found.append(None if score is None else -gain(score))
            elif name == "latency_ms":
                found += [each["latency_ms"] for each in costs]
            elif name == "worst_ratio":
                found.append(max(cost / budget.bound for budget, cost in self.bounded(costs) if budget.metric == "latency_ms"))
            else:
                found.append(max(each[name] for each in costs))
        return found

    def values(self, costs: Costs, score: Score | None) -> list[float]:
        """The same in numbers: an error that is not known is very bad."""
        return [UNKNOWN if value is None else value for value in self.objectives(costs, score)]

    def bounded(self, costs: Costs) -> list[tuple[Budget, float]]:
        """Every budget of a cost, with the cost."""
        index = {pricing.target.id: i for i, pricing in enumerate(self.pricings)}
        return [(b, costs[index.get(b.target, 0)][b.metric]) for b in self.budgets if b.metric in costs[0]]

    def over(self, costs: Costs) -> float:
        """Sum of relative excesses over the cost budgets."""
        return sum(max(0.0, cost / budget.bound - 1) for budget, cost in self.bounded(costs))

    def named(self, budget: Budget) -> str:
        """The target a budget is for, as it may be written; empty where there is one."""
        return next((label(p.target) for p in self.pricings if p.target.id == budget.target), "") if len(self.pricings) > 1 else ""


class Known:
    """What the journal has of earlier searches for the same targets, or for some of them, on the same weights."""

    def __init__(self, path: Path, space: SearchSpace) -> None:
        self.path = path
        self.scores: dict[Any, tuple[Score, float]] = {}
        """What decides a score (network, precisions, evaluator, split, weights) ▸ the score, and the seconds it took."""
        self.lines: dict[Any, Evaluation] = {}
        """The last line of a candidate of this space."""
        numbers = range(len(space.targets))
        ids = {spaces.of_targets(space, kept).id for n in numbers for kept in itertools.combinations(numbers, n + 1)}
        for e in journal.read(path, Evaluation):
            if e.candidate.space in ids:
                self._note(e)

    def _note(self, e: Evaluation) -> None:
        self.lines[self._line(e)] = e
        scores = (e.score, *(other.score for other in e.elsewhere))
        for score, (_, genes) in zip(scores, e.candidate.precision, strict=True):
            self.scores[(e.candidate.architecture, genes, *_by(score))] = (score, e.seconds / len(scores))

    def record(self, e: Evaluation) -> None:
        """A line in the journal, unless it has that one."""
        before = self.lines.get(self._line(e))
        if before is None or msgspec.structs.replace(e, seconds=before.seconds) != before:  # priced by another table
            journal.append(self.path, e)
            self._note(e)

    def _line(self, e: Evaluation) -> Any:
        return (e.candidate, *_by(e.score))


def _by(scored: Any) -> tuple[str, str, str]:
    return (scored.evaluator_digest, scored.split_digest, scored.weights_digest)


@dataclass(frozen=True)
class Scoring:
    """Scores what the journal does not have, through an executor, and writes each evaluation there as soon as it is whole."""

    evaluator: AnyEvaluator
    executor: Executor
    known: Known
    foreign: Differences

    def __call__(self, prices: Mapping[Candidate, Sequence[Priced]], go_on: Callable[[], bool]) -> Iterator[Evaluation]:
        """Evaluations as they come in, until `go_on` says no; the same network with the same precisions is scored once."""
        jobs: dict[Any, Job] = {}
        wanted = {point: self._keys(point) for point in prices}
        for point, keys in wanted.items():
            for number, (key, (target, _)) in enumerate(zip(keys, point.precision, strict=True)):
                if key not in self.known.scores:
                    jobs.setdefault(key, Job(candidate=point, target=target if number else ""))
        order = list(jobs)
        waiting = dict(prices)
        yield from self._whole(waiting, wanted, go_on)
        for index, score, seconds in self.executor.score_all(tuple(jobs.values()), go_on):
            self.known.scores[order[index]] = (score, seconds)
            yield from self._whole(waiting, wanted)

    def _whole(
        self, waiting: dict[Candidate, Sequence[Priced]], wanted: Mapping[Candidate, Sequence[Any]], go_on: Callable[[], bool] | None = None
    ) -> Iterator[Evaluation]:  # fmt: skip
        """Evaluations of those that have all their scores; they wait no longer."""
        for point in [p for p in waiting if all(key in self.known.scores for key in wanted[p])]:
            if go_on and not go_on():
                return
            yield self._evaluation(point, waiting.pop(point), [self.known.scores[key] for key in wanted[point]])

    def _keys(self, point: Candidate) -> list[Any]:
        """What decides the score on each target."""
        by = (self.evaluator.digest, self.evaluator.split_digest, self.evaluator.weights_digest)
        return [(point.architecture, genes, *by) for _, genes in point.precision]

    def _evaluation(self, point: Candidate, prices: Sequence[Priced], scores: Sequence[tuple[Score, float]]) -> Evaluation:
        (costs, latency, size, parameters, macs), *others = prices
        (score, seconds), *there = scores
        elsewhere = tuple(
            Elsewhere(target=target, score=s, latency=price[1], size_bytes=price[2])
            for (target, _), (s, _), price in zip(point.precision[1:], there, others, strict=True)
        )
        evaluation = Evaluation(
            candidate=point, score=score, latency=latency, size_bytes=size, parameters=parameters, macs=macs,
            memory_bytes=round(costs["memory_mb"] * 1e6), seconds=seconds + sum(took for _, took in there), elsewhere=elsewhere,
            foreign=self.foreign,
        )  # fmt: skip
        self.known.record(evaluation)
        return evaluation


def _drop_violation(e: Evaluation | None, baseline: Score, budgets: tuple[Budget, ...], slack: float = DROP_SLACK) -> float:
    bound = next((b.bound for b in budgets if b.metric == "drop"), None)
    if bound is None or e is None:
        return 0.0
    return max(0.0, drop(baseline, worst(e))[0] - bound - slack)


def _trace(matrix: np.ndarray[Any, Any]) -> tuple[tuple[int, float], ...]:
    """Hypervolume after each scored candidate, against the worst value of each objective."""
    corner = reference(matrix)
    return tuple((n, float(pareto.hypervolume(matrix[:n], corner))) for n in range(1, len(matrix) + 1))


def _standing(scored: Sequence[Evaluation], matrix: np.ndarray[Any, Any], new: int, aim: Aim, most: int) -> Standing:
    """What is to be said of a search after a batch in which the last `new` candidates were scored."""
    front = sorted((scored[i] for i in pareto.front(matrix)), key=lambda e: (e.latency.value, -gain(worst(e))))
    volume = f"hypervolume {pareto.hypervolume(matrix, reference(matrix)):.4g}"
    if new < len(scored):
        volume += f" ({100 * growth(matrix, len(scored) - new):+.1f} % by the last batch)"
    labels = [label(pricing.target) for pricing in aim.pricings]
    units = [time_unit(pricing.target) for pricing in aim.pricings]
    latencies = [f"{unit} on {name}" for unit, name in zip(units, labels, strict=True)] if len(labels) > 1 else units
    rows = []
    for e in front:
        ms = [f"{latency.value:.3g}" for latency in (e.latency, *(there.latency for there in e.elsewhere))]
        rows.append((*ms, f"{worst(e).value:.2f}", f"{e.size_bytes / 1e6:.3g}"))
    headline = f"{len(scored)} of {most} scored, {volume}, {len(front)} on the front"
    return Standing(headline, (*latencies, scored[0].score.metric, "MB"), tuple(rows))


def _unaffordable(nearest: Any, aim: Aim, space: SearchSpace) -> BudgetError:
    costs = [b for b in aim.budgets if b.metric != "drop"]
    asked = ", ".join(" ".join(filter(None, (b.metric, "≤", f"{b.bound:g}", _whose(aim, b)))) for b in costs)
    if nearest is None:
        return BudgetError(f"no candidate could be tried within {asked}", hint="raise `--time`")
    _, point, spent = nearest
    many = len(spent) > 1
    found = [", ".join(f"{name} {value:.3g}" for name, value in costs.items()) for costs in spent]
    if many:
        found = [f"{label(p.target)}: {text}" for p, text in zip(aim.pricings, found, strict=True)]
    detail = f"nearest: {'; '.join(found)} ({_shape(point)})"
    changes, lacking = [], []
    for b, cost in aim.bounded(spent):
        if cost > b.bound and b.limit is True:
            lacking.append(f"{LIMITS[b.metric]} (at least {math.ceil(cost * 1e6):,} bytes)")
        elif cost > b.bound:
            on = f"{aim.named(b)}=" if many and b.metric == "latency_ms" else ""
            changes.append(f"`--{b.metric.replace('_', '-')}` to {on}{_ceil(cost):.3g}")
    changes = list(dict.fromkeys(changes))
    ways = [f"raise {' and '.join(changes)}"] * bool(changes) + [f"take a device with more {' and '.join(lacking)}"] * bool(lacking)
    return BudgetError(
        f"no candidate meets the budget: {asked}", detail=detail, hint=f"{' and '.join(ways)}, or start from a smaller model"
    )


def _whose(aim: Aim, b: Budget) -> str:
    """Of which device a budget is, where that has to be said."""
    if b.limit is True:
        return f"(all the {LIMITS[b.metric]} of the device)"
    return aim.named(b) and f"on {aim.named(b)}"


def _require_accuracy(evaluations: list[Evaluation], baseline: Score, budgets: tuple[Budget, ...]) -> None:
    bound = next((b.bound for b in budgets if b.metric == "drop"), None)
    if bound is None:
        return
    best = min(evaluations, key=lambda e: (drop(baseline, worst(e))[0], e.latency.value))
    least = drop(baseline, worst(best))[0]
    if least > bound:
        where = " where it is lowest" * bool(best.elsewhere)
        raise BudgetError(
            f"none of {len(evaluations)} scored candidates meets the budget: drop ≤ {bound:g} points",
            detail=f"nearest: {best.score.metric} {worst(best).value:.2f}{where}, a drop of {least:.2f} from {baseline.value:.2f}, "
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
