"""Metrics in NumPy, how sure they are, and the paired bootstrap; no plug-in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from nascompile.errors import DataError, RecipeError
from nascompile.records import digest

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
RESAMPLES = 1000
"""Bootstrap resamples behind a standard error."""


def confusion(labels: Array, predicted: Array, classes: int) -> Array:
    """Counts (classes, classes): rows true, columns predicted."""
    return np.bincount(labels * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def macro_f1(matrix: Array) -> Floats:
    """Macro F1 in [0, 1] of confusion matrices (…, classes, classes), over the classes that occur in labels or predictions."""
    hits = np.diagonal(matrix, axis1=-2, axis2=-1)
    support = matrix.sum(-1) + matrix.sum(-2)
    f1 = 2 * hits / np.maximum(support, 1)
    return np.asarray(f1.sum(-1) / np.maximum((support > 0).sum(-1), 1), dtype=np.float64)


def macro_f1_stderr(matrix: Array, seed: int) -> float:
    """Bootstrap standard error of macro F1: resampling samples is a multinomial draw of the matrix's cells."""
    n = int(matrix.sum())
    draws = np.random.default_rng(seed).multinomial(n, matrix.ravel() / n, size=RESAMPLES)
    return float(macro_f1(draws.reshape(-1, *matrix.shape)).std(ddof=1))


def auc_parts(scores: Floats, labels: Array) -> tuple[Floats, Floats]:
    """Per sample: the share of the opposite classes it is ranked against correctly, weighted so that the mean is the macro AUC; and
    its contribution to the error, whose sum of squares is the variance (DeLong et al. 1988, averaged over one-against-rest AUCs).

    `scores` (n, classes); DataError if a class has no sample or all of them."""
    n, classes = scores.shape
    values, influence = np.zeros(n), np.zeros(n)
    columns = [1] if classes == 2 else range(classes)  # with two classes both one-against-rest AUCs are the same number
    for column in columns:
        positive = labels == column
        if positive.all() or not positive.any():
            raise DataError(
                f"AUC needs samples of every class and none has them all: class {column} has {int(positive.sum())} of {n}",
                hint="use --metric accuracy, or give a split that holds every class",
            )
        share = _ranked_above(scores[:, column], positive)
        values += np.where(positive, share / positive.sum(), share / (~positive).sum()) * n / 2
        centred = np.where(positive, share - share[positive].mean(), share - share[~positive].mean())
        influence += centred / np.where(positive, positive.sum(), (~positive).sum())
    return values / len(columns), influence / len(columns)


def _ranked_above(scores: Floats, positive: Array) -> Floats:
    """For a positive the share of negatives below it, for a negative the share of positives above it; a tie counts half."""
    below = np.empty(len(scores))
    for group, other, sign in ((positive, ~positive, 1), (~positive, positive, -1)):
        rivals = np.sort(sign * scores[other])
        own = sign * scores[group]
        below[group] = (np.searchsorted(rivals, own, "left") + np.searchsorted(rivals, own, "right")) / 2 / len(rivals)
    return below


def ranks(values: Floats) -> Floats:
    """Ranks from 1; tied values share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - counts + 1 + last) / 2)[inverse]


def bootstrap_stderr(metric: Callable[[Array], float], n: int, seed: int, resamples: int = RESAMPLES) -> float:
    """Standard deviation of `metric(indices)` over resamples of n indices with replacement; resamples it is undefined on are left out."""
    rng = np.random.default_rng(seed)
    values = np.array([metric(rng.integers(n, size=n)) for _ in range(resamples)], dtype=np.float64)
    values = values[np.isfinite(values)]
    return float(values.std(ddof=1)) if len(values) > 1 else float("nan")


def paired_bootstrap(
    a: Sequence[float] | Array, b: Sequence[float] | Array, seed: int, level: float = 0.95, n: int = 10_000
) -> tuple[float, float, float]:
    """(mean of a - b, low, high): percentile interval over n resamples of the pairs; DataError if they are not paired."""
    if len(a) != len(b) or not len(a):
        raise DataError(
            f"a paired comparison needs two equally long, non-empty lists: {len(a)} and {len(b)} values",
            hint="score both engines on the same split",
        )
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    rng = np.random.default_rng(seed)
    # Few distinct differences (right/wrong gives -1, 0, 1): drawing their counts is the same bootstrap and needs no index matrix.
    distinct, counts = np.unique(difference, return_counts=True)
    if len(distinct) <= 64:
        means = rng.multinomial(len(difference), counts / len(difference), size=n) @ distinct / len(difference)
    else:
        means = np.array([difference[rng.integers(len(difference), size=len(difference))].mean() for _ in range(n)])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(difference.mean()), float(low), float(high)


class CustomMetric:
    """A task whose default metric is a Python function f(labels, logits) ▸ float; everything else is the task's own. API only."""

    def __init__(
        self,
        task: Any,
        name: str,
        function: Callable[[Array, Array], float],
        direction: Literal["maximize", "minimize"] = "maximize",
        seed: int = 0,
    ) -> None:
        if name in task.metrics:
            raise RecipeError(f"a metric of `{task.name}` already has this name: {name}", hint="give the function another name")
        self.task, self.function, self.custom, self.custom_direction, self.seed = task, function, name, direction, seed
        self.name = task.name
        self.metrics = (name, *task.metrics)
        code = getattr(function, "__code__", None)
        plain = [value for value in code.co_consts if not hasattr(value, "co_code")] if code else []
        self.signature = digest(getattr(function, "__qualname__", ""), code.co_code.hex() if code else "", repr(plain))
        """Changes with the function's code, so that scores of another function are not taken for this one's."""

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self.task, attribute)

    def direction(self, metric: str) -> Literal["maximize", "minimize"]:
        """Of the function as given, of any other metric as its task says."""
        return self.custom_direction if metric == self.custom else self.task.direction(metric)

    def per_sample(self, metric: str, logits: Array, labels: Array) -> Array:
        """Of the task's default metric where the function itself is asked for: a function of a whole split has no values per sample."""
        return np.asarray(self.task.per_sample(self.task.metrics[0] if metric == self.custom else metric, logits, labels))

    def score(self, metric: str, logits: Array, labels: Array) -> tuple[float, float]:
        """(f(labels, logits), bootstrap standard error); RecipeError if the function does not return a finite number."""
        if metric != self.custom:
            value, error = self.task.score(metric, logits, labels)
            return float(value), float(error)
        result = self.function(labels, logits)
        if not isinstance(result, int | float | np.floating | np.integer) or not np.isfinite(result):
            raise RecipeError(
                f"metric `{self.custom}` did not return a finite number: {result!r}",
                hint="the function takes NumPy (labels, logits) of one split and returns one float",
            )
        return float(result), bootstrap_stderr(lambda i: float(self.function(labels[i], logits[i])), len(labels), self.seed, resamples=200)


def unknown_metric(task: str, metric: str, known: tuple[str, ...]) -> RecipeError:
    """The error to raise for a metric the task does not have."""
    return RecipeError(f"`{task}` has no metric of this name: {metric}", hint=f"choose one of: {', '.join(known)}")
