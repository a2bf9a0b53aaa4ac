"""LINAS (Cummings et al. 2022): measure, fit predictors to everything measured, breed on the predictors, measure the best; repeat.

As published and as its code has it: the first population is random; per objective, ridge regression or a support vector machine on
one-hot genes, whichever predicts better in cross-validation; NSGA-II with 400 generations of 50 on the predictions; the whole last
generation is measured. Where the code differs from its own idea, the idea: what was measured before is not measured again (the next
best predictions are), what is returned is always measured, given candidates do start the search, and predictors see whole batches.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from pymoo.operators.survival.rank_and_crowding.metrics import calc_crowding_distance
from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import Ridge
from sklearn.svm import SVR

from nascompile import space as spaces
from nascompile.records import Candidate
from nascompile.searchers import Problem
from nascompile.searchers.blocks import Blocks
from nascompile.searchers.breeding import breed
from nascompile.searchers.encoding import Array, Encoding

GENERATIONS, BREEDING, CROSSOVER, MUTATION = 400, 50, 0.9, 0.02
CROSSOVER_ETA, MUTATION_ETA = 15.0, 20.0
ALPHAS, COSTS = np.geomspace(0.1, 10, 9), np.geomspace(1, 100, 9)
"""Of the ranges that the published code has in steps of 0.1 and 1, nine values each."""
FOLDS = 5
WHOLE = 500
"""Spaces of so many candidates are predicted whole: nothing is left to breed there."""
TRIES = 200


class LinasRun:
    exact = False
    """Whether what costs nothing to know is taken from the problem instead of predicted."""

    def __init__(self, problem: Problem, population: int, first: tuple[Candidate, ...], seed: int) -> None:
        self.problem, self.population = problem, population
        self.encoding, self.rng = Encoding(problem.space), np.random.default_rng(seed)
        self.blocks = Blocks(problem, self.encoding)
        self.first = self.encoding.encode(first)
        width = len(self.encoding.sizes)
        self.asked: dict[bytes, None] = {}
        self.rows, self.objectives, self.violations = np.empty((0, width), np.int64), np.empty((0, problem.objectives)), np.empty(0)

    def ask(self) -> tuple[Candidate, ...]:
        proposals = self._promising() if len(self.rows) else self.first
        chosen = self._new(proposals)
        for _ in range(TRIES):
            if len(chosen) == self.population:
                break
            chosen += self._new(self.encoding.sample(self.rng, self.population))[: self.population - len(chosen)]
        return tuple(self.encoding.decode(row) for row in chosen)

    def _new(self, rows: Array) -> list[Array]:
        """The rows that were never asked for, at most a population of them."""
        found: list[Array] = []
        for row in rows:
            if len(found) < self.population and row.tobytes() not in self.asked:
                self.asked[row.tobytes()] = None
                found.append(row)
        return found

    def know(self, points: tuple[Candidate, ...], objectives: Any, violations: Any) -> None:
        self.asked.update(dict.fromkeys(row.tobytes() for row in self.encoding.encode(points)))
        self.tell(points, objectives, violations)

    def tell(self, points: tuple[Candidate, ...], objectives: Any, violations: Any) -> None:
        self.rows = np.concatenate([self.rows, self.encoding.encode(points)])
        self.objectives = np.concatenate([self.objectives, np.asarray(objectives, dtype=float)])
        self.violations = np.concatenate([self.violations, np.asarray(violations, dtype=float)])

    def _promising(self) -> Array:
        """The last generation bred on the predictors, then everything else it saw, the least dominated first."""
        objectives, violations = self._predictors()
        search = _Predicted(objectives, violations)
        if spaces.size(self.problem.space) <= WHOLE:
            search(self.encoding.everything())
        else:
            breed(self.encoding, search, BREEDING, GENERATIONS, CROSSOVER, CROSSOVER_ETA, MUTATION, MUTATION_ETA, self.rng)
        return search.best(self.population, self.asked, len(self.encoding.sizes))

    def _predictors(self) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
        """(rows ▸ objectives (n, m), rows ▸ violations (n,)), fitted to what was told."""
        features = self.encoding.one_hot(self.rows)
        scored = self.blocks.over(self.rows) == 0
        known = self.problem.price(self.encoding.decode(self.rows[0])).objectives
        fitted = [
            None if self.exact and known[m] is not None else _fit(features[scored], self.objectives[scored, m])
            for m in range(self.problem.objectives)
        ]
        limits = None if self.exact or not self.violations.any() else _fit(features, self.violations)

        def objectives(rows: Array) -> Array:
            hot = self.encoding.one_hot(rows)
            found = np.stack([np.zeros(len(rows)) if predict is None else predict(hot) for predict in fitted], axis=1)
            if self.exact:
                found[:, [m for m, predict in enumerate(fitted) if predict is None]] = self.blocks.prices(rows)
            return found

        def violations(rows: Array) -> Array:
            if self.exact and self.problem.bounded:
                return self.blocks.over(rows)
            return np.zeros(len(rows)) if limits is None else np.maximum(limits(self.encoding.one_hot(rows)), 0.0)

        return objectives, violations


def _fit(features: Array, values: Array) -> Callable[[Array], Array]:
    """Ridge regression or RBF support vectors, the better one in cross-validation by mean absolute percentage error."""
    if len(values) < FOLDS or np.ptp(values) == 0:
        constant = float(values.mean()) if len(values) else 0.0
        return lambda hot: np.full(len(hot), constant)
    varied = np.flatnonzero(features.var(axis=0))
    unit = 10 ** (np.floor(np.log10(np.abs(values).max())) - 1.0)
    features, values = features[:, varied], values / unit
    models = [Ridge(alpha=alpha) for alpha in ALPHAS]
    models += [SVR(kernel="rbf", gamma="auto", epsilon=0.0, C=cost, max_iter=10**6) for cost in COSTS]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        best = min(models, key=lambda model: _error(model, features, values)).fit(features, values)
    return lambda hot: np.asarray(best.predict(hot[:, varied]) * unit)


def _error(model: Any, features: Array, values: Array) -> float:
    """Mean absolute percentage error in cross-validation."""
    errors, rows = [], np.arange(len(values))
    for fold in np.array_split(rows, FOLDS):
        rest = np.setdiff1d(rows, fold)
        predicted = model.fit(features[rest], values[rest]).predict(features[fold])
        errors.append(float((np.abs(predicted - values[fold]) / np.maximum(np.abs(values[fold]), np.finfo(float).eps)).mean()))
    return float(np.mean(errors))


class _Predicted:
    """Predictions of whole generations; remembers all it was asked."""

    def __init__(self, objectives: Callable[[Array], Array], violations: Callable[[Array], Array]) -> None:
        self.objectives, self.violations = objectives, violations
        self.seen: dict[bytes, tuple[Array, Array, float]] = {}

    def __call__(self, rows: Array) -> tuple[Array, Array]:
        """Objectives (n, m) and violations (n,)."""
        objectives, violations = self.objectives(rows), self.violations(rows)
        for row, values, over in zip(rows, objectives, violations, strict=True):
            self.seen[row.tobytes()] = row, values, float(over)
        return objectives, violations

    def best(self, count: int, known: dict[bytes, None], width: int) -> Array:
        """Rows (about count, width) of the least dominated predictions within the budgets that are not `known`."""
        found = [entry for key, entry in self.seen.items() if key not in known]
        if not found:
            return np.empty((0, width), dtype=np.int64)
        rows, values, over = (np.array([entry[i] for entry in found]) for i in range(3))
        order: list[int] = []
        for level in sorted(set(np.minimum(over, 1e-9))):  # those within the budgets first
            part = np.flatnonzero(np.minimum(over, 1e-9) == level)
            for layer in NonDominatedSorting().do(values[part], n_stop_if_ranked=count):
                order += _spread(part[layer], values)
            if len(order) >= count:
                break
        return rows[order]


def _spread(layer: Array, values: Array) -> list[int]:
    """A layer's members, those of the least crowded places first (Deb et al. 2002)."""
    distance = calc_crowding_distance(values[layer])
    return [int(i) for i in layer[np.argsort(-distance, kind="stable")]]


class Linas:
    name = "linas"
    batch = 0

    def start(self, problem: Problem, population: int, first: tuple[Candidate, ...], seed: int) -> LinasRun:
        return LinasRun(problem, population, first, seed)


PLUGIN = Linas()
