"""Single-label classification: cross-entropy, accuracy, macro F1 and AUC (one class against the rest), all in percent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from nascompile.errors import DataError
from nascompile.tasks import metrics as m

BOOTSTRAP_SEED = 0


def label_text(value: Any) -> str:
    """A label as written: trimmed text, integers without a fraction; empty for what is no label (None, NaN, blank)."""
    if value is None:
        return ""
    if isinstance(value, bytes):
        value = value.decode("utf-8")
    if isinstance(value, bool | np.bool_):
        return str(bool(value)).lower()
    if isinstance(value, float | np.floating):
        if np.isnan(value):
            return ""
        return str(int(value)) if float(value).is_integer() else str(float(value))
    return str(value).strip()


class Classification:
    name = "classification"
    metrics: tuple[str, ...] = ("accuracy", "f1", "auc")

    def direction(self, metric: str) -> Literal["maximize", "minimize"]:
        """More is better for every metric."""
        self._known(metric)
        return "maximize"

    def labels(self, column: Sequence[Any]) -> tuple[str, ...]:
        """Distinct labels, integers by value and text by letter; DataError if one is empty or there are fewer than two."""
        texts = [label_text(value) for value in column]
        if "" in texts:
            raise DataError(f"value {texts.index('') + 1} has no label: {column[texts.index('')]!r}", hint="label it, or leave it out")
        distinct = set(texts)
        if len(distinct) < 2:
            raise DataError(
                f"classification needs at least two classes: found {len(distinct)} ({', '.join(distinct) or 'no samples'})",
                hint="check --label-column; for numbers to predict, use --task regression",
            )
        if all(text.lstrip("-").isdecimal() for text in distinct):
            return tuple(sorted(distinct, key=int))
        return tuple(sorted(distinct))

    def encode(self, column: Sequence[Any], labels: tuple[str, ...]) -> m.Array:
        """Class indices (n,) int64: by name, else by name in any case, else by integer id; DataError naming the first unknown one."""
        known = {str(index): index for index in range(len(labels))}
        known |= {name.casefold(): index for index, name in enumerate(labels)}
        exact = {name: index for index, name in enumerate(labels)}
        indices = np.empty(len(column), dtype=np.int64)
        for i, value in enumerate(column):
            text = label_text(value)
            index = exact.get(text, known.get(text.casefold()))
            if index is None:
                raise DataError(f"unknown label of value {i + 1}: {value!r}", hint=f"the labels are: {', '.join(labels)}")
            indices[i] = index
        return indices

    def per_sample(self, metric: str, logits: m.Array, labels: m.Array) -> m.Array:
        """(n,): accuracy right/wrong; AUC the share of rivals ranked correctly; F1 right/wrong weighted to equal classes. Their mean is
        the accuracy, the AUC, and the macro recall: macro F1 itself is no mean over samples."""
        self._known(metric)
        if metric == "auc":
            return m.auc_parts(_probabilities(logits), labels)[0]
        right: m.Floats = (logits.argmax(1) == labels).astype(np.float64)
        if metric == "accuracy":
            return right
        counts = np.bincount(labels, minlength=logits.shape[1])
        balanced: m.Floats = right * len(labels) / (np.count_nonzero(counts) * counts[labels])
        return balanced

    def score(self, metric: str, logits: m.Array, labels: m.Array) -> tuple[float, float]:
        """(percent, standard error in percent): binomial for accuracy, bootstrap for F1, DeLong for AUC."""
        self._known(metric)
        if not len(labels):
            raise DataError("cannot score an empty split: 0 samples", hint="give the split samples")
        if metric == "accuracy":
            share = float((logits.argmax(1) == labels).mean())
            return 100 * share, 100 * float(np.sqrt(share * (1 - share) / len(labels)))
        if metric == "f1":
            matrix = m.confusion(labels, logits.argmax(1), logits.shape[1])
            return 100 * float(m.macro_f1(matrix)), 100 * m.macro_f1_stderr(matrix, BOOTSTRAP_SEED)
        values, influence = m.auc_parts(_probabilities(logits), labels)
        return 100 * float(values.mean()), 100 * float(np.sqrt((influence**2).sum()))

    def loss(self, logits: Any, labels: Any, class_weights: Any = None) -> Any:
        """Cross-entropy, averaged over the batch (by weight where classes have weights)."""
        from torch.nn import functional

        return functional.cross_entropy(logits, labels, weight=class_weights)

    def distillation(self, student: Any, teacher: Any, temperature: float) -> Any:
        """temperature² · KL(teacher ‖ student) of the softened outputs, averaged over the batch (Hinton et al. 2015)."""
        from torch.nn import functional

        soft = [functional.log_softmax(logits / temperature, dim=-1) for logits in (student, teacher)]
        return functional.kl_div(soft[0], soft[1], reduction="batchmean", log_target=True) * temperature**2

    def _known(self, metric: str) -> None:
        if metric not in self.metrics:
            raise m.unknown_metric(self.name, metric, self.metrics)


def _probabilities(logits: m.Array) -> m.Floats:
    """Softmax (n, classes): one class against the rest is ranked by it, which logits alone do not give."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return np.asarray(shifted / shifted.sum(1, keepdims=True), dtype=np.float64)


PLUGIN = Classification()
