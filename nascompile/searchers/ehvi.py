"""Expected hypervolume improvement where only the score is uncertain: what a table tells of a candidate is taken as it is.

A Gaussian process over genomes predicts the score; a candidate is worth the hypervolume it is expected to add to the front, which for one
uncertain objective is a sum of expected improvements over the others' steps. Proposals are bred on that worth, from the front outwards;
within a batch a chosen candidate counts as scored as predicted (kriging believer, Ginsbourger et al. 2010).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.stats import norm, qmc

from nascompile.records import Candidate
from nascompile.searchers import Problem, Request
from nascompile.searchers.blocks import Blocks
from nascompile.searchers.encoding import Array, Encoding
from nascompile.searchers.gaussian import Features, Process

LEVELS = 5
"""Networks of the first batch: between the smallest and the largest."""
POOL, ROUNDS, KEPT = 512, 6, 64
"""Candidates of a generation, generations, and how many of the best are parents of the next."""
NODES = 512
"""Points that stand for the space of three and more objectives."""
TRIES = 200
MARGIN = 0.1
"""How far the reference lies beyond the worst of the first batch, as a share of the range."""


class EhviRun:
    def __init__(self, problem: Problem, population: int, first: tuple[Candidate, ...], seed: int) -> None:
        self.problem, self.population = problem, population
        self.encoding, self.rng = Encoding(problem.space), np.random.default_rng(seed)
        self.blocks, self.features = Blocks(problem, self.encoding), Features(self.encoding)
        self.first = [*self.encoding.encode(first)[:2], *self._ladder()]
        self.asked: dict[bytes, None] = {}
        self.rows = np.empty((0, len(self.encoding.sizes)), dtype=np.int64)
        self.values, self.violations = np.empty((0, problem.objectives)), np.empty(0)
        self.theta: Array | None = None
        self.fitted = 0

    # ------------------------------------------------------------------------------------------ ask and tell

    def ask(self) -> tuple[Request, ...]:
        if len(self.first):
            chosen = self._new(self.first)
            self.first = self.first[len(self.first) :] if len(chosen) < self.population else [r for r in self.first if not self._known(r)]
        else:
            chosen = self._best()
        for _ in range(TRIES):
            if chosen:
                break
            chosen = self._new(list(self.encoding.sample(self.rng, 10 * self.population)))
        return tuple(Request(self.encoding.decode(row)) for row in chosen)

    def _known(self, row: Array) -> bool:
        return row.tobytes() in self.asked

    def _new(self, rows: list[Array]) -> list[Array]:
        """The rows that were never asked for, at most a population of them."""
        found: list[Array] = []
        for row in rows:
            if len(found) < self.population and not self._known(row):
                self.asked[row.tobytes()] = None
                found.append(row)
        return found

    def tell(self, requests: tuple[Request, ...], objectives: Any, violations: Any) -> None:
        self.rows = np.concatenate([self.rows, self.encoding.encode([r.candidate for r in requests])])
        self.values = np.concatenate([self.values, np.asarray(objectives, dtype=float)])
        self.violations = np.concatenate([self.violations, np.asarray(violations, dtype=float)])

    # ------------------------------------------------------------------------------------------ proposals

    def _ladder(self) -> list[Array]:
        """Networks with all genes at the same relative size, alternately with the cheapest and with mixed precisions."""
        found = []
        for level in np.linspace(1.0, 0.0, LEVELS):
            row = [
                round(level * (size - 1)) if gene.kind == "architecture" else size - 1
                for gene, size in zip(self.encoding.genes, self.encoding.sizes, strict=True)
            ]
            found.append(self.encoding.canonical(np.array(row, dtype=np.int64)[None])[0])
        found.append(self.blocks.top)
        return found

    def _best(self) -> list[Array]:
        """A batch of the most promising candidates; none where no candidate is new."""
        uncertain = [m for m, value in enumerate(self.problem.price(self.encoding.decode(self.blocks.top)).objectives) if value is None]
        if len(uncertain) != 1:
            return []
        model = _Model(self, uncertain[0])
        chosen: list[Array] = []
        for _ in range(self.population):
            row = self._bred(model)
            if row is None:
                break
            self.asked[row.tobytes()] = None
            chosen.append(row)
            model.believe(row)
        self.theta = model.theta
        return chosen

    def _bred(self, model: _Model) -> Array | None:
        """The new candidate of highest worth that a few generations of changes to the front lead to."""
        pool = np.concatenate([self.encoding.sample(self.rng, POOL), self._changed(model.front, POOL)])
        seen: dict[bytes, tuple[float, Array]] = {}
        for _ in range(ROUNDS):
            fresh = {row.tobytes(): row for row in pool}
            rows = np.array([row for key, row in fresh.items() if key not in seen and key not in self.asked])
            if len(rows):
                for row, worth in zip(rows, model.worth(rows), strict=True):
                    seen[row.tobytes()] = float(worth), row
            parents = np.array([row for _, row in sorted(seen.values(), key=lambda pair: -pair[0])[:KEPT]])
            if not len(parents):
                return None
            pool = self._changed(parents, POOL)
        return max(seen.values(), key=lambda pair: pair[0])[1]

    def _changed(self, rows: Array, count: int) -> Array:
        """Children: of two parents position by position, or of one; then one to three positions drawn anew."""
        if not len(rows):
            return self.encoding.sample(self.rng, count)
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

    def __init__(self, run: EhviRun, uncertain: int) -> None:
        self.run, self.uncertain = run, uncertain
        usable = np.array([not run.problem.bounded or run.problem.price(run.encoding.decode(row)).over == 0 for row in run.rows])
        self.rows, scores = run.rows[usable], run.values[usable, uncertain]
        self.fine = run.violations[usable] <= 0
        self.known = np.delete(run.values[usable], uncertain, axis=1)
        low, spread = float(scores.min()), float(np.median(scores) - scores.min()) or 1.0
        self.low, self.unit = low - 0.0 * spread, spread
        self.targets = np.log1p((scores - self.low) / self.unit)
        fit = run.theta is None or len(scores) >= 1.15 * run.fitted
        self.process = Process(run.features, self.rows, self.targets, theta=None if fit else run.theta)
        self.theta = self.process.theta
        if fit:
            run.fitted = len(scores)
        top = run.blocks.price(run.blocks.top)
        self.corner = np.maximum(top, self.known.max(axis=0))
        self.worst = float(self.targets[self.fine].max() if self.fine.any() else self.targets.max()) + MARGIN
        self._nodes()

    def believe(self, row: Array) -> None:
        """Takes a prediction for a score."""
        mean, _ = self.process.predict(row[None])
        self.rows = np.concatenate([self.rows, row[None]])
        self.targets = np.concatenate([self.targets, mean])
        self.fine = np.concatenate([self.fine, [True]])
        self.known = np.concatenate([self.known, self.run.blocks.prices(row[None])])
        self.process = Process(self.run.features, self.rows, self.targets, theta=self.theta)
        self._nodes()

    @property
    def front(self) -> Array:
        """Rows that no other dominates."""
        from nascompile import pareto

        points = np.column_stack([self.targets, self.known])[self.fine]
        return self.rows[self.fine][list(pareto.front(points))]

    def _nodes(self) -> None:
        """Where the known objectives are looked at (k, m - 1), the best score of what is no worse there (k,), and what each counts."""
        known, targets = self.known[self.fine], self.targets[self.fine]
        count = known.shape[1]
        if count == 1:
            edges = np.unique(np.concatenate([known[:, 0], self.corner]))
            edges = edges[edges <= self.corner[0]]
            self.at = edges[:, None]
            self.weights = np.diff(edges, append=self.corner[0])
        else:
            low = self.run.blocks.prices(self.run.encoding.sample(np.random.default_rng(0), 256)).min(axis=0)
            points = qmc.Sobol(count, seed=0).random(NODES)
            self.at = low + points * (self.corner - low)
            self.weights = np.full(NODES, float(np.prod(self.corner - low)) / NODES)
        below = (known[None] <= self.at[:, None]).all(axis=2)
        self.best = np.where(below, np.minimum(targets, self.worst)[None], self.worst).min(axis=1, initial=self.worst)

    def worth(self, rows: Array) -> Array:
        """Expected hypervolume that each row adds (n,)."""
        mean, deviation = self.process.predict(rows)
        deviation = np.sqrt(deviation**2 + (self.process.scale * np.exp(self.theta[6])) ** 2)
        known = self.run.blocks.prices(rows)
        if known.shape[1] == 1:
            ends = np.append(self.at[1:, 0], self.corner[0])
            weights = np.clip(ends[None] - np.maximum(self.at[:, 0][None], known), 0, None)
        else:
            weights = (known[:, None] <= self.at[None]).all(axis=2) * self.weights[None]
        return np.asarray((weights * _improvement(self.best[None], mean[:, None], deviation[:, None])).sum(axis=1))


def _improvement(bound: Array, mean: Array, deviation: Array) -> Array:
    """E[max(0, exp(bound) - exp(x))] for a normal x: scores are modelled as logarithms."""
    d = (bound - mean) / deviation
    return np.asarray(np.exp(bound) * norm.cdf(d) - np.exp(mean + deviation**2 / 2) * norm.cdf(d - deviation))


class Ehvi:
    name = "ehvi"

    def start(self, problem: Problem, population: int, first: tuple[Candidate, ...], seed: int) -> EhviRun:
        return EhviRun(problem, population, first, seed)


PLUGIN = Ehvi()
