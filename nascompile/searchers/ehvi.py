"""Expected hypervolume improvement where only the score is uncertain: what a table tells of a candidate is taken as it is.

A Gaussian process over genomes predicts the score; a candidate is worth the hypervolume it is expected to add to the front, which for one
uncertain objective is a sum of expected improvements over the others' steps. In small spaces every candidate is looked at, in others
those that a few generations lead to; within a batch a chosen candidate counts as scored as predicted (kriging believer, Ginsbourger et
al. 2010).
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from scipy.special import ndtr

from nascompile import pareto, space as spaces
from nascompile.errors import RecipeError
from nascompile.records import Candidate
from nascompile.searchers import Problem
from nascompile.searchers.blocks import Blocks
from nascompile.searchers.encoding import Array, Encoding
from nascompile.searchers.gaussian import Features, Process

BATCH, BEGIN = 4, 6
"""Candidates asked for at a time, and at first."""
SMALL = 20_000
"""Spaces of so many candidates are looked at whole."""
POOL, ROUNDS, PARENTS = 512, 8, 96
"""Elsewhere: candidates of a generation, generations, and how many of the best are parents of the next."""
PROMISING = 512
"""Of those, so many of the highest worth can be part of a batch: what is believed makes no other candidate worth more."""
NODES = 512
"""Points that stand for the space of three and more objectives."""
FEW = 64
"""As many where prices are slow."""
TRIES = 200
MARGIN = 0.1
"""How far the reference lies beyond the worst score, in units of a logarithm."""
REFIT = 1.2
"""The process is fitted anew when it has so many times the scores of the last time."""


class EhviRun:
    def __init__(self, problem: Problem, population: int, first: tuple[Candidate, ...], seed: int) -> None:
        self.problem, self.population = problem, population
        self.encoding, self.rng = Encoding(problem.space), np.random.default_rng(seed)
        self.blocks, self.features = Blocks(problem, self.encoding), Features(self.encoding)
        self.small = self.encoding.everything() if spaces.size(problem.space) <= SMALL else None
        known = problem.price(self.encoding.decode(self.blocks.top)).objectives
        if known.count(None) != 1:
            raise RecipeError(
                f"ehvi searches with one objective that only a score tells, here are {known.count(None)} of {len(known)}",
                hint="add the error to the objectives, or take --searcher nsga2",
            )
        self.uncertain = known.index(None)
        self.given = self.encoding.encode(first)
        self.asked: dict[bytes, None] = {}
        self.rows = np.empty((0, len(self.encoding.sizes)), dtype=np.int64)
        self.values, self.violations = np.empty((0, problem.objectives)), np.empty(0)
        self.theta: Array | None = None
        self.fitted = 0

    # ------------------------------------------------------------------------------------------ ask and tell

    def ask(self) -> tuple[Candidate, ...]:
        chosen = self._new(self._promising() if len(self.rows) else self._design(), BATCH if len(self.rows) else BEGIN)
        if not chosen and self.small is not None:
            chosen = self._new(self.small, BATCH)
        for _ in range(TRIES):
            if chosen or self.small is not None:
                break
            chosen = self._new(self.encoding.sample(self.rng, 10 * self.population), BATCH)
        return tuple(self.encoding.decode(row) for row in chosen)

    def _new(self, rows: Array | list[Array], most: int) -> list[Array]:
        """The rows that were never asked for, at most so many."""
        found: list[Array] = []
        for row in rows:
            if len(found) < min(most, self.population) and row.tobytes() not in self.asked:
                self.asked[row.tobytes()] = None
                found.append(row)
        return found

    def know(self, points: tuple[Candidate, ...], objectives: Any, violations: Any) -> None:
        self.asked.update(dict.fromkeys(row.tobytes() for row in self.encoding.encode(points)))
        self.tell(points, objectives, violations)

    def tell(self, points: tuple[Candidate, ...], objectives: Any, violations: Any) -> None:
        self.rows = np.concatenate([self.rows, self.encoding.encode(points)])
        self.values = np.concatenate([self.values, np.asarray(objectives, dtype=float)])
        self.violations = np.concatenate([self.violations, np.asarray(violations, dtype=float)])

    # ------------------------------------------------------------------------------------------ proposals

    def _design(self) -> list[Array]:
        """Extremes, then candidates of every size between them, at random; those within the budgets first, given ones if they are few."""
        cheap = np.array([0 if g.kind == "architecture" else len(g.choices) - 1 for g in self.encoding.genes], dtype=np.int64)
        uniform = np.where([g.kind == "architecture" for g in self.encoding.genes], self.blocks.top, self.encoding.sizes - 1)
        found = [*self.given[:2], self.encoding.canonical(uniform[None])[0], self.encoding.canonical(cheap[None])[0]]
        for level in self.rng.permutation(np.linspace(0.1, 0.9, BEGIN)):
            up = self.rng.random(len(self.encoding.sizes)) < level
            middle = self.rng.integers(0, self.encoding.sizes)
            row = np.where(self.rng.random(len(up)) < 0.3, middle, np.where(up, uniform, cheap))
            found.append(self.encoding.canonical(row[None])[0])
        found += list(self.given[2:])
        order = np.argsort(self.blocks.over(np.array(found)), kind="stable")
        return [found[i] for i in order]

    def _promising(self) -> list[Array]:
        """New candidates, those expected to add most to the front first."""
        if not (self.blocks.over(self.rows) == 0).any():
            return list(self._affordable())
        model = _Model(self)
        rows = self.small if self.small is not None else self._bred(model)
        rows = rows[[row.tobytes() not in self.asked for row in rows]]
        if self.problem.values is None:
            rows = rows[self.blocks.over(rows) == 0]
        if not len(rows):
            return []
        mean, deviation, known = *model.process.predict(rows), self.blocks.prices(rows)
        order = np.argsort(-model.worth(mean, deviation, known), kind="stable")
        few = order[:PROMISING] if self.problem.values is None else self._first_affordable(rows, order)
        if not len(few):
            return []
        rows, mean, deviation, known = rows[few], mean[few], deviation[few], known[few]
        chosen: list[int] = []
        for _ in range(min(BATCH, len(rows))):
            worth = model.worth(mean, deviation, known)
            worth[chosen] = -1.0
            chosen.append(int(worth.argmax()))
            model.believe(mean[chosen[-1]], known[chosen[-1]])
        return [rows[best] for best in chosen]

    def _first_affordable(self, rows: Array, order: Array) -> Array:
        """The first of an order that are within the budgets, and no more of them asked for their price than that takes."""
        fine = (index for index in order if self.blocks.over(rows[index][None])[0] == 0)
        return np.array(list(itertools.islice(fine, FEW)), dtype=np.int64)

    def _affordable(self) -> Array:
        """Candidates nearest to the budgets, those within them first, where none that was asked for is: bred on prices alone."""
        if self.small is not None:
            return self.small[np.argsort(self.blocks.over(self.small), kind="stable")]
        rows = np.concatenate([self.rows, self.encoding.sample(self.rng, POOL)])
        for _ in range(ROUNDS):
            rows = np.unique(rows, axis=0)
            best = rows[np.argsort(self.blocks.over(rows), kind="stable")[:PARENTS]]
            if self.blocks.over(best[BATCH - 1 : BATCH]).max(initial=0.0) == 0:
                return best
            rows = np.concatenate([best, self._changed(best, POOL)])
        return rows[np.argsort(self.blocks.over(rows), kind="stable")]

    def _bred(self, model: _Model) -> Array:
        """Candidates that a few generations of changes to the front lead to."""
        pool = np.concatenate([self.encoding.sample(self.rng, POOL), self._changed(model.rows[model.front], POOL)])
        seen: dict[bytes, Array] = {}
        rows, worth, bound = np.empty((0, pool.shape[1]), np.int64), np.empty(0), np.empty((0, model.known.shape[1] + 1))
        for _ in range(ROUNDS):
            fresh = {row.tobytes(): row for row in pool}
            new = np.array([row for key, row in fresh.items() if key not in seen]).reshape(-1, pool.shape[1])
            seen |= fresh
            mean, deviation = model.process.predict(new)
            known = self.blocks.prices(new)
            rows, worth = np.concatenate([rows, new]), np.concatenate([worth, model.worth(mean, deviation, known)])
            bound = np.concatenate([bound, np.column_stack([mean - deviation, known])])
            best = np.argsort(-worth, kind="stable")[: PARENTS // 2]
            edge = self.rng.permutation(_edge(bound))[: PARENTS // 2]
            pool = self._changed(rows[np.concatenate([best, edge])], POOL)
        return rows

    def _changed(self, rows: Array, count: int) -> Array:
        """Children: of two parents position by position, or of one; then one to three positions drawn anew."""
        mothers, fathers = (rows[self.rng.integers(len(rows), size=count)] for _ in range(2))
        mixed = (self.rng.random((count, 1)) < 0.5) & (self.rng.random(mothers.shape) < 0.5)
        children = np.where(mixed, fathers, mothers)
        free = np.flatnonzero(self.encoding.sizes > 1)
        for number in range(3):
            slots = self.rng.choice(free, count)
            hit = np.flatnonzero(self.rng.random(count) < (1.0, 0.5, 0.25)[number])
            children[hit, slots[hit]] = self.rng.integers(0, self.encoding.sizes[slots[hit]])
        return self.encoding.canonical(children)


class _Model:
    """The fitted process and the front, as long as a batch is put together."""

    def __init__(self, run: EhviRun) -> None:
        scored = run.blocks.over(run.rows) == 0
        self.rows, scores, fine = run.rows[scored], run.values[scored, run.uncertain], run.violations[scored] <= 0
        self.known = np.delete(run.values[scored], run.uncertain, axis=1)
        low = float(scores.min())
        self.targets = np.log1p((scores - low) / (float(np.median(scores)) - low or 1.0))
        fit = run.theta is None or len(scores) >= REFIT * run.fitted
        self.process = Process(run.features, self.rows, self.targets, theta=run.theta, fit=fit)
        run.theta, run.fitted = self.process.theta, len(scores) if fit else run.fitted
        self.noise = self.process.scale * float(np.exp(self.process.theta[4]))
        self.front = _edge(np.column_stack([self.targets, self.known]))
        self.corner = np.maximum(run.blocks.price(run.blocks.top), self.known.max(axis=0))
        self.worst = float(self.targets[fine].max() if fine.any() else self.targets.max()) + MARGIN
        self.at, self.best = self.known[self.front], self.targets[self.front]
        if self.known.shape[1] > 1:
            low = run.blocks.prices(run.encoding.sample(np.random.default_rng(0), POOL)).min(axis=0)
            self.nodes = low + np.random.default_rng(0).random((NODES, self.known.shape[1])) * (self.corner - low)

    def believe(self, mean: float, known: Array) -> None:
        """Takes a prediction for a score."""
        self.at, self.best = np.concatenate([self.at, known[None]]), np.append(self.best, mean)

    def worth(self, mean: Array, deviation: Array, known: Array) -> Array:
        """Expected hypervolume that each candidate adds (n,), up to a factor."""
        deviation = np.sqrt(deviation**2 + self.noise**2)
        if known.shape[1] == 0:
            return _improvement(np.minimum(self.best.min(), self.worst), mean, deviation)
        if known.shape[1] == 1:
            order = np.argsort(self.at[:, 0], kind="stable")
            bounds = np.append(self.worst, np.minimum.accumulate(np.minimum(self.best[order], self.worst)))
            edges = np.concatenate([[-np.inf], self.at[order, 0], self.corner])
            weights = np.clip(edges[None, 1:] - np.maximum(edges[None, :-1], known), 0, None)
        else:
            below = _reaches(self.at, self.nodes).T
            bounds = np.where(below, self.best[None], self.worst).min(axis=1, initial=self.worst)
            weights = _reaches(known, self.nodes)
        return np.asarray((weights * _improvement(bounds[None], mean[:, None], deviation[:, None])).sum(axis=1))


def _edge(points: Array) -> Array:
    """Indices of the points (n, m) that no other dominates, one of each that are equal in all but the first."""
    if points.shape[1] != 2:
        return np.array(pareto.front(points))
    order = np.lexsort((points[:, 0], points[:, 1]))
    least = np.minimum.accumulate(np.append(np.inf, points[order, 0]))[:-1]
    return np.asarray(order[points[order, 0] < least])


def _reaches(points: Array, nodes: Array) -> Array:
    """(points, nodes): which points are nowhere above which nodes."""
    found = points[:, :1] <= nodes[None, :, 0]
    for number in range(1, nodes.shape[1]):
        found &= points[:, [number]] <= nodes[None, :, number]
    return np.asarray(found)


def _improvement(bound: Array, mean: Array, deviation: Array) -> Array:
    """E[max(0, exp(bound) - exp(x))] for a normal x: scores are modelled as logarithms."""
    d = (bound - mean) / deviation
    return np.asarray(np.exp(bound) * ndtr(d) - np.exp(mean + deviation**2 / 2) * ndtr(d - deviation))


class Ehvi:
    name = "ehvi"
    batch = BATCH

    def start(self, problem: Problem, population: int, first: tuple[Candidate, ...], seed: int) -> EhviRun:
        return EhviRun(problem, population, first, seed)


PLUGIN = Ehvi()
