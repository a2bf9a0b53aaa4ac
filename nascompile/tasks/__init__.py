"""A task: what labels are, which loss and metrics fit them, and how sure a metric is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol


class Task(Protocol):
    name: str
    metrics: tuple[str, ...]
    """Names of the metrics, the default first."""

    def direction(self, metric: str) -> Literal["maximize", "minimize"]:
        """Whether more is better."""

    def labels(self, column: Sequence[Any]) -> tuple[str, ...]:
        """Label names in a stable order (empty for regression); DataError if they cannot be learned from."""

    def encode(self, column: Sequence[Any], labels: tuple[str, ...]) -> Any:
        """NumPy labels (n,): class indices int64, or float32 values; DataError naming the first unknown one."""

    def per_sample(self, metric: str, logits: Any, labels: Any) -> Any:
        """NumPy (n,): one value per sample whose mean orders engines as the metric does (right/wrong, squared error)."""

    def score(self, metric: str, logits: Any, labels: Any) -> tuple[float, float]:
        """(metric in its own unit: accuracy, F1 and AUC in percent; standard error, by bootstrap where no formula is exact)."""

    def loss(self, logits: Any, labels: Any, class_weights: Any = None) -> Any:
        """Torch scalar: the task's own training loss (cross-entropy, mean squared error)."""

    def distillation(self, student: Any, teacher: Any, temperature: float) -> Any:
        """Torch scalar: how far the student's outputs are from the teacher's (KL divergence, squared error)."""
