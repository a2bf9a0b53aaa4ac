"""What every task promises, whatever its labels are."""

from __future__ import annotations

import numpy as np
import pytest

from nascompile import plugins
from nascompile.errors import RecipeError

TASKS = plugins.names("tasks")


def example(task) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Logits (60, …), encoded labels (60,) and label names, from a column that suits any task: numbers."""
    column = [str(value) for value in np.random.default_rng(0).integers(3, size=60)]
    names = task.labels(column)
    labels = task.encode(column, names)
    return np.random.default_rng(1).normal(size=(60, max(1, len(names)))).astype(np.float32), labels, names


@pytest.mark.parametrize("name", TASKS)
def test_labels_are_stable_and_encoded_one_by_one(name: str) -> None:
    task = plugins.get("tasks", name)
    column = ["2", "0", "1", "2"]
    assert task.name == name
    assert task.labels(column) == task.labels(column[::-1])
    labels = task.encode(column, task.labels(column))
    assert labels.shape == (4,)
    assert labels.dtype == (np.int64 if task.labels(column) else np.float32)
    assert labels[0] == labels[3] != labels[1]


@pytest.mark.parametrize("name", TASKS)
def test_every_metric_scores_with_an_error_and_a_direction(name: str) -> None:
    task = plugins.get("tasks", name)
    logits, labels, _ = example(task)
    for metric in task.metrics:
        value, error = task.score(metric, logits, labels)
        assert np.isfinite(value), metric
        assert error > 0, metric
        assert task.score(metric, logits, labels) == (value, error)
        assert task.direction(metric) in ("maximize", "minimize")
        assert task.per_sample(metric, logits, labels).shape == (60,)


@pytest.mark.parametrize("name", TASKS)
def test_a_perfect_output_is_best_by_every_metric(name: str) -> None:
    task = plugins.get("tasks", name)
    logits, labels, names = example(task)
    perfect = 10 * np.eye(len(names), dtype=np.float32)[labels] if names else labels[:, None]
    for metric in task.metrics:
        sign = 1 if task.direction(metric) == "maximize" else -1
        assert sign * task.score(metric, perfect, labels)[0] > sign * task.score(metric, logits, labels)[0]
        assert sign * task.per_sample(metric, perfect, labels).mean() > sign * task.per_sample(metric, logits, labels).mean()


@pytest.mark.parametrize("name", TASKS)
def test_losses_fall_towards_the_truth_and_the_teacher(name: str) -> None:
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    task = plugins.get("tasks", name)
    logits, labels, _ = example(task)
    student = torch.tensor(logits, requires_grad=True)
    teacher = torch.tensor(logits[::-1].copy())
    for loss in (lambda z: task.loss(z, torch.tensor(labels)), lambda z: task.distillation(z, teacher, 2.0)):
        before = loss(student)
        (gradient,) = torch.autograd.grad(before, student)
        assert before.ndim == 0
        assert loss(student - 0.1 * gradient).item() < before.item()
    assert task.distillation(teacher, teacher, 2.0).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", TASKS)
def test_an_unknown_metric_is_refused(name: str) -> None:
    task = plugins.get("tasks", name)
    for call in (task.direction, lambda metric: task.score(metric, np.zeros((1, 2)), np.zeros(1, np.int64))):
        with pytest.raises(RecipeError, match="no-such-metric"):
            call("no-such-metric")
