"""Regression to one number: mean squared error, RMSE and MAE in the label's own unit, Spearman correlation in percent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from nascompile.errors import DataError
from nascompile.tasks import metrics as m

BOOTSTRAP_SEED = 0


class Regression:
    name = "regression"
    metrics: tuple[str, ...] = ("rmse", "mae", "spearman")

    def direction(self, metric: str) -> Literal["maximize", "minimize"]:
        """Errors are minimized, the correlation maximized."""
        self._known(metric)
        return "maximize" if metric == "spearman" else "minimize"

    def labels(self, column: Sequence[Any]) -> tuple[str, ...]:
        """Always empty; DataError if a value is no number, or all are equal."""
        values = self.encode(column, ())
        if len(np.unique(values)) < 2:
            shown = values[0] if len(values) else "no samples"
            raise DataError(f"regression needs at least two different values: found {shown}", hint="check --label-column")
        return ()

    def encode(self, column: Sequence[Any], labels: tuple[str, ...]) -> m.Array:
        """Values (n,) float32; DataError naming the first that is no finite number."""
        values = np.empty(len(column), dtype=np.float32)
        for i, value in enumerate(column):
            try:
                values[i] = float(value)
            except (TypeError, ValueError) as error:
                raise DataError(f"value {i + 1} is not a number: {value!r}", hint="check --label-column and --task") from error
            if not np.isfinite(values[i]):
                raise DataError(f"value {i + 1} is not a finite float32 number: {value!r}", hint="leave the row out, or scale the labels")
        return values

    def per_sample(self, metric: str, logits: m.Array, labels: m.Array) -> m.Array:
        """(n,): squared error, absolute error, or product of standardized ranks, whose mean is the squared RMSE, MAE, correlation."""
        self._known(metric)
        predicted, truth = logits.reshape(len(labels)).astype(np.float64), labels.astype(np.float64)
        if metric == "rmse":
            return (predicted - truth) ** 2
        if metric == "mae":
            return np.abs(predicted - truth)
        return _standardized_ranks(predicted) * _standardized_ranks(truth)

    def score(self, metric: str, logits: m.Array, labels: m.Array) -> tuple[float, float]:
        """(metric, standard error): the formula of a mean for MAE, bootstrap for the others."""
        self._known(metric)
        if not len(labels):
            raise DataError("cannot score an empty split: 0 samples", hint="give the split samples")
        values = self.per_sample(metric, logits, labels)
        if metric == "mae":
            return float(values.mean()), float(values.std() / np.sqrt(len(values)))
        if metric == "rmse":
            error = m.bootstrap_stderr(lambda i: float(np.sqrt(values[i].mean())), len(values), BOOTSTRAP_SEED)
            return float(np.sqrt(values.mean())), error

        def resampled(i: m.Array) -> float:
            return float(self.per_sample("spearman", logits[i], labels[i]).mean())

        return 100 * float(values.mean()), 100 * m.bootstrap_stderr(resampled, len(values), BOOTSTRAP_SEED, resamples=200)

    def loss(self, logits: Any, labels: Any, class_weights: Any = None) -> Any:
        """Mean squared error; classes have no meaning here, so neither have their weights."""
        from torch.nn import functional

        return functional.mse_loss(logits.reshape(labels.shape), labels)

    def distillation(self, student: Any, teacher: Any, temperature: float) -> Any:
        """Mean squared difference; a temperature has no meaning here."""
        from torch.nn import functional

        return functional.mse_loss(student, teacher)

    def _known(self, metric: str) -> None:
        if metric not in self.metrics:
            raise m.unknown_metric(self.name, metric, self.metrics)


def _standardized_ranks(values: m.Floats) -> m.Floats:
    """Ranks with mean 0 and variance 1; zeros where all values are equal, so that a constant output correlates with nothing."""
    ranked = m.ranks(values)
    spread = ranked.std()
    return (ranked - ranked.mean()) / spread if spread else np.zeros_like(ranked)


PLUGIN = Regression()
