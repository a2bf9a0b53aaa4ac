"""What a search has scored, and what one for several devices found on each: fronts, how alike they are, what sharing costs each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nascompile import journal, pareto
from nascompile.records import Evaluation, Front, Interval, Score
from nascompile.scoring import gain


@dataclass(frozen=True)
class Seen:
    """A scored candidate as it is on one target."""

    evaluation: Evaluation
    score: Score
    latency: Interval
    size_bytes: int


@dataclass(frozen=True)
class Cost:
    """A shared candidate on one target, beside the fastest scored candidate that is at least as accurate there."""

    shared: Seen
    alone: Seen

    @property
    def ratio(self) -> float:
        """Latency of the shared one relative to the other; 1 where it is itself the fastest."""
        return self.shared.latency.value / self.alone.latency.value


def seen(evaluations: Sequence[Evaluation], number: int) -> tuple[Seen, ...]:
    """Every candidate as it is on target `number` of its search, 0 being the first."""
    if number == 0:
        return tuple(Seen(e, e.score, e.latency, e.size_bytes) for e in evaluations)
    pairs = [(e, e.elsewhere[number - 1]) for e in evaluations]
    return tuple(Seen(e, there.score, there.latency, there.size_bytes) for e, there in pairs)


def front(scored: Sequence[Seen]) -> tuple[Seen, ...]:
    """Those that no other beats in latency and score on the target, fastest first; of equal ones all.

    Several candidates may be one network on a target, where they differ in another target's precisions only.
    """
    kept = pareto.front([(s.latency.value, -gain(s.score)) for s in scored])
    return tuple(sorted((scored[i] for i in kept), key=lambda s: (s.latency.value, -gain(s.score), s.evaluation.candidate.id)))


def common(fronts: Sequence[Sequence[Seen]]) -> tuple[str, ...]:
    """Ids of the candidates that are on every one of the fronts, in the order of the first."""
    ids = [{s.evaluation.candidate.id for s in found} for found in fronts]
    return tuple(s.evaluation.candidate.id for s in fronts[0] if all(s.evaluation.candidate.id in others for others in ids[1:]))


def kendall(a: Sequence[Seen], b: Sequence[Seen]) -> float | None:
    """Kendall's τ-b between the latencies of the same candidates on two targets; None where one of them is constant."""
    from scipy.stats import kendalltau

    tau = float(kendalltau(*([s.latency.value for s in scored] for scored in (a, b))).statistic) if len(a) > 1 else math.nan
    return None if math.isnan(tau) else tau


def cost(scored: Sequence[Seen], shared: Evaluation) -> Cost:
    """What a shared candidate costs one target: it and the fastest one of the same scored set with no lower score there."""
    own = next(s for s in scored if s.evaluation.candidate == shared.candidate)
    fitting = (s for s in scored if gain(s.score) >= gain(own.score))
    return Cost(own, min(fitting, key=lambda s: (s.latency.value, -gain(s.score), s.evaluation.candidate.id)))


def scored(path: Path, front: Front | None) -> tuple[Evaluation, ...]:
    """Candidates of a journal that were scored as the front's were (same space, weights, data and evaluator), each once, by id.

    A journal's own order is that in which several workers happened to be done.
    """
    if front is None or not front.evaluations:
        return ()
    wanted = _comparable(front.evaluations[0])
    found = {e.candidate: e for e in journal.read(path, Evaluation) if _comparable(e) == wanted}
    return tuple(sorted(found.values(), key=lambda e: e.candidate.id))


def _comparable(e: Evaluation) -> tuple[str, ...]:
    return e.candidate.space, e.score.split_digest, e.score.weights_digest, e.score.evaluator_digest
