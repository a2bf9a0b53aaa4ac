"""A Gaussian process over genomes: effects that add up, effects that genes of a kind share, and what those do together."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.linalg import cho_factor, cho_solve, solve_triangular
from scipy.optimize import minimize

from nascompile.searchers.encoding import Array, Encoding

STARTS = ((-1.0, 0.0, -0.5, 0.0, -3.0), (-2.0, 0.5, -1.5, 0.5, -2.0))
"""Logarithms of standard deviations: own effects, shared effects, joint effects; of the joint ones' length; of the noise."""
SPREAD = np.array([1.5, 1.5, 1.5, 1.0, 1.5])
"""Standard deviations of those logarithms beforehand, around the first start."""
PARTS = np.ones(3)
"""What own, shared and joint effects count: 0 leaves one out."""
JITTER = 1e-8


class Features:
    """Genomes as numbers: per position and choice, whether the choice is below it (a thermometer; inactive: as the largest), and sums of
    those over genes of a kind, which are named alike but for a layer's number."""

    def __init__(self, encoding: Encoding) -> None:
        self.encoding = encoding
        columns, kinds = [], []
        for number, (slot, gene) in enumerate(zip(encoding.slots, encoding.genes, strict=True)):
            for level in range(1, len(gene.choices)):
                columns.append((number, level, gene.kind == "architecture"))
                kinds.append((re.sub(r"\d+", "", slot), level))
        self.columns, self.names = columns, sorted(set(kinds))
        self.member = np.array([[kind == name for name in self.names] for kind in kinds], dtype=float).reshape(len(kinds), len(self.names))

    def __call__(self, rows: Array) -> tuple[Array, Array]:
        """((n, own) 0 or 1, 1 where a gene takes something away; (n, shared) sums as shares of their largest)."""
        active = self.encoding.active(rows)
        own = np.zeros((len(rows), len(self.columns)))
        for column, (number, level, descending) in enumerate(self.columns):
            below = rows[:, number] < level if descending else rows[:, number] == level
            own[:, column] = below & active[:, number]
        return own, own @ self.member / np.maximum(self.member.sum(axis=0), 1)


class Process:
    """Fitted to values (n,) of genomes (n, positions)."""

    def __init__(self, features: Features, rows: Array, values: Array, theta: Array | None = None, fit: bool = True) -> None:
        self.features = features
        self.own, self.shared = features(rows)
        self.mean, self.scale = float(values.mean()), float(values.std()) or 1.0
        self.values = (values - self.mean) / self.scale
        self.theta = self._fit(STARTS if theta is None else (theta,)) if fit or theta is None else theta
        self._factor()

    def _fit(self, starts: Sequence[Any]) -> Array:
        best = None
        for start in starts:
            found = minimize(self._loss, np.array(start), method="L-BFGS-B", options={"maxiter": 25}, bounds=[(-7.0, 4.0)] * len(start))
            if best is None or found.fun < best.fun:
                best = found
        assert best is not None
        return np.asarray(best.x)

    def _loss(self, theta: Array) -> float:
        """Negative log of the marginal likelihood times the prior."""
        kernel = _kernel(theta, self.own, self.shared, self.own, self.shared)
        kernel[np.diag_indices_from(kernel)] += np.exp(2 * theta[4]) + JITTER
        try:
            factor = cho_factor(kernel, lower=True)
        except np.linalg.LinAlgError:
            return 1e10
        fit = 0.5 * float(self.values @ cho_solve(factor, self.values)) + float(np.log(np.diag(factor[0])).sum())
        return fit + 0.5 * float((((theta - np.array(STARTS[0])) / SPREAD) ** 2).sum())

    def _factor(self) -> None:
        kernel = _kernel(self.theta, self.own, self.shared, self.own, self.shared)
        kernel[np.diag_indices_from(kernel)] += np.exp(2 * self.theta[4]) + JITTER
        self.factor = cho_factor(kernel, lower=True)
        self.weights = cho_solve(self.factor, self.values)

    def predict(self, rows: Array) -> tuple[Array, Array]:
        """(mean (n,), standard deviation (n,)) of what scoring would give, noise included in neither."""
        own, shared = self.features(rows)
        cross = _kernel(self.theta, own, shared, self.own, self.shared)
        half = solve_triangular(self.factor[0], cross.T, lower=True)
        prior = _diagonal(self.theta, own, shared)
        variance = np.maximum(prior - (half**2).sum(axis=0), 1e-10)
        return self.mean + self.scale * (cross @ self.weights), self.scale * np.sqrt(variance)


def _kernel(theta: Array, own: Array, shared: Array, own2: Array, shared2: Array) -> Array:
    a, b, c = _variances(theta, own)
    joint = np.exp(-0.5 * _squares(shared, shared2) / np.exp(2 * theta[3]))
    return np.asarray(a * (own @ own2.T) + b * (shared @ shared2.T) + c * joint)


def _diagonal(theta: Array, own: Array, shared: Array) -> Array:
    a, b, c = _variances(theta, own)
    return np.asarray(a * (own**2).sum(axis=1) + b * (shared**2).sum(axis=1) + c)


def _variances(theta: Array, own: Array) -> Array:
    """Of each part of the kernel."""
    return np.asarray(PARTS * np.exp(2 * theta[:3]) / np.array([max(own.shape[1], 1) ** 0.5, 1.0, 1.0]))


def _squares(a: Array, b: Array) -> Any:
    return np.maximum((a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1)[None] - 2 * a @ b.T, 0.0)
