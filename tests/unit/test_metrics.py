"""Metrics against scikit-learn and plain definitions, standard errors against brute-force resampling."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy.special import softmax
from sklearn.metrics import f1_score, roc_auc_score

from nascompile.errors import DataError, RecipeError
from nascompile.tasks import metrics as m
from nascompile.tasks.classification import PLUGIN as CLASSIFICATION
from nascompile.tasks.regression import PLUGIN as REGRESSION


def logits_and_labels(seed: int, n: int = 300, classes: int = 3, noise: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Unbalanced labels, logits that know something of them, in eighths: ties are exact in any arithmetic."""
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), rng.choice(classes, n - classes, p=np.arange(1, classes + 1) / sum(range(classes + 1)))])
    logits = np.eye(classes)[labels] + noise * rng.normal(size=(n, classes))
    return (np.round(8 * logits) / 8).astype(np.float32), labels.astype(np.int64)


@given(st.integers(0, 10_000), st.sampled_from([2, 3, 5]))
@settings(max_examples=25, deadline=None)
def test_classification_metrics_are_scikit_learns(seed: int, classes: int) -> None:
    logits, labels = logits_and_labels(seed, classes=classes)
    predicted = logits.argmax(1)
    assert CLASSIFICATION.score("accuracy", logits, labels)[0] == pytest.approx(100 * np.mean(predicted == labels))
    assert CLASSIFICATION.score("f1", logits, labels)[0] == pytest.approx(100 * f1_score(labels, predicted, average="macro"))
    share = softmax(logits.astype(np.float64), axis=1)
    want = roc_auc_score(labels, share[:, 1]) if classes == 2 else roc_auc_score(labels, share, multi_class="ovr")
    assert CLASSIFICATION.score("auc", logits, labels)[0] == pytest.approx(100 * want)
    assert 100 * CLASSIFICATION.per_sample("auc", logits, labels).mean() == pytest.approx(100 * want)


def test_f1_averages_over_the_classes_that_occur() -> None:
    logits, labels = np.eye(4, dtype=np.float32)[[0, 0, 1, 1]], np.array([0, 1, 1, 1])
    want = f1_score(labels, logits.argmax(1), average="macro")
    assert CLASSIFICATION.score("f1", logits, labels)[0] == pytest.approx(100 * want)


def test_per_sample_means() -> None:
    logits, labels = logits_and_labels(1)
    right = logits.argmax(1) == labels
    assert CLASSIFICATION.per_sample("accuracy", logits, labels).tolist() == right.astype(float).tolist()
    recall = np.mean([right[labels == c].mean() for c in range(3)])
    assert CLASSIFICATION.per_sample("f1", logits, labels).mean() == pytest.approx(recall)


@pytest.mark.parametrize("metric", ["accuracy", "f1", "auc"])
@pytest.mark.parametrize("classes", [2, 3])
def test_standard_errors_match_resampling(metric: str, classes: int) -> None:
    logits, labels = logits_and_labels(5, classes=classes)
    rng = np.random.default_rng(0)
    resamples = [rng.integers(len(labels), size=len(labels)) for _ in range(300)]
    draws = [CLASSIFICATION.score(metric, logits[i], labels[i])[0] for i in resamples]
    # 300 draws know a standard deviation to about 4 %; three times that, and DeLong's approximation.
    assert CLASSIFICATION.score(metric, logits, labels)[1] == pytest.approx(np.std(draws), rel=0.15)


def test_accuracy_error_is_binomial_and_scores_repeat() -> None:
    logits, labels = logits_and_labels(2, n=400)
    value, error = CLASSIFICATION.score("accuracy", logits, labels)
    assert error == pytest.approx(np.sqrt(value * (100 - value) / 400))
    assert CLASSIFICATION.score("f1", logits, labels) == CLASSIFICATION.score("f1", logits, labels)


def test_regression_metrics() -> None:
    rng = np.random.default_rng(0)
    labels = rng.normal(size=200).astype(np.float32)
    logits = (labels + rng.normal(scale=0.5, size=200)).astype(np.float32)[:, None]
    error = logits[:, 0].astype(float) - labels
    assert REGRESSION.score("rmse", logits, labels)[0] == pytest.approx(np.sqrt(np.mean(error**2)))
    assert REGRESSION.score("mae", logits, labels) == pytest.approx((np.abs(error).mean(), np.abs(error).std() / np.sqrt(200)))
    pandas = pytest.importorskip("pandas")
    want = pandas.Series(logits[:, 0]).round(1).rank().corr(pandas.Series(labels).round(1).rank())
    got = REGRESSION.score("spearman", logits.round(1), labels.round(1))[0]  # rounding makes ties
    assert got == pytest.approx(100 * want)
    assert [REGRESSION.direction(name) for name in REGRESSION.metrics] == ["minimize", "minimize", "maximize"]


def test_class_labels_are_sorted_by_value_or_letter_and_encoded_in_any_case() -> None:
    assert CLASSIFICATION.labels([10, 9, "9", 9.0]) == ("9", "10")
    assert CLASSIFICATION.labels(["pos", "Neg ", "pos"]) == ("Neg", "pos")
    assert CLASSIFICATION.encode(["NEG", "pos", 1, "0"], ("Neg", "pos")).tolist() == [0, 1, 1, 0]
    assert CLASSIFICATION.encode([1, 0], ("1", "0")).tolist() == [0, 1]  # a name goes before an id


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: CLASSIFICATION.labels(["a", "a"]), "at least two classes: found 1"),
        (lambda: CLASSIFICATION.labels(["a", None, "b"]), "value 2 has no label"),
        (lambda: CLASSIFICATION.labels([]), "no samples"),
        (lambda: CLASSIFICATION.encode(["a", "c"], ("a", "b")), "unknown label of value 2: 'c'"),
        (lambda: CLASSIFICATION.encode([2], ("a", "b")), "unknown label of value 1: 2"),
        (lambda: CLASSIFICATION.score("auc", np.zeros((3, 2), np.float32), np.ones(3, np.int64)), "AUC needs samples of every class"),
        (lambda: CLASSIFICATION.score("accuracy", np.zeros((0, 2)), np.zeros(0, np.int64)), "empty split"),
        (lambda: REGRESSION.encode(["1.5", "dear"], ()), "value 2 is not a number: 'dear'"),
        (lambda: REGRESSION.encode(["1.5", "nan"], ()), "value 2 is not a finite"),
        (lambda: REGRESSION.labels([2, 2.0]), "two different values"),
        (lambda: m.paired_bootstrap([1.0], [1.0, 2.0], 0), "1 and 2 values"),
    ],
)
def test_what_cannot_be_learned_or_scored_is_refused(call, says: str) -> None:
    with pytest.raises(DataError, match=says.replace("(", r"\(")) as caught:
        call()
    assert caught.value.hint


def test_unknown_metric_names_the_known_ones() -> None:
    with pytest.raises(RecipeError) as caught:
        CLASSIFICATION.score("bleu", np.zeros((1, 2)), np.zeros(1, np.int64))
    assert "bleu" in caught.value.message
    assert "accuracy, f1, auc" in caught.value.hint


def test_paired_bootstrap_holds_the_true_difference_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    held = 0
    for trial in range(200):
        a = rng.random(300) < 0.85
        b = np.where(rng.random(300) < 0.9, a, rng.random(300) < 0.5)  # true difference: .1 · (.85 - .5) = .035
        difference, low, high = m.paired_bootstrap(a.astype(float), b.astype(float), seed=trial, n=1000)
        assert difference == pytest.approx(a.mean() - b.mean())
        held += low <= 0.035 <= high
    assert 0.89 <= held / 200 <= 0.99  # 95 % of 200: standard error 1.5 points


def test_paired_bootstrap_of_many_values_agrees_with_the_normal_interval() -> None:
    rng = np.random.default_rng(4)
    a, b = rng.normal(0.2, 1, 500), rng.normal(0, 1, 500)
    difference, low, high = m.paired_bootstrap(a, b, seed=1)
    half = 1.96 * np.std(a - b) / np.sqrt(500)
    assert (low, high) == (pytest.approx(difference - half, abs=0.1 * half), pytest.approx(difference + half, abs=0.1 * half))
    assert m.paired_bootstrap(a, b, seed=1) == (difference, low, high)
    assert m.paired_bootstrap(a, a, seed=1) == (0, 0, 0)


def test_custom_metric_scores_with_the_function_and_delegates_the_rest() -> None:
    logits, labels = logits_and_labels(6)
    task = m.CustomMetric(CLASSIFICATION, "misses", lambda y, z: float((z.argmax(1) != y).sum()), "minimize")
    assert task.metrics == ("misses", "accuracy", "f1", "auc")
    assert (task.direction("misses"), task.direction("f1")) == ("minimize", "maximize")
    value, error = task.score("misses", logits, labels)
    assert value == (logits.argmax(1) != labels).sum()
    p = value / len(labels)
    assert error == pytest.approx(np.sqrt(len(labels) * p * (1 - p)), rel=0.2)  # 200 resamples: 5 % standard error
    assert task.score("accuracy", logits, labels) == CLASSIFICATION.score("accuracy", logits, labels)
    assert task.labels(["b", "a"]) == ("a", "b")
    with pytest.raises(RecipeError, match="did not return a finite number: 'high'"):
        m.CustomMetric(CLASSIFICATION, "bad", lambda y, z: "high").score("bad", logits, labels)
    with pytest.raises(RecipeError, match="already has this name"):
        m.CustomMetric(CLASSIFICATION, "f1", lambda y, z: 0.0)


def test_losses_are_their_formulas() -> None:
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    logits, labels = logits_and_labels(7, n=20)
    share = softmax(logits, axis=1)
    weights = np.array([1.0, 2.0, 0.5])
    each = -np.log(share[np.arange(20), labels])
    plain = CLASSIFICATION.loss(torch.tensor(logits), torch.tensor(labels))
    weighted = CLASSIFICATION.loss(torch.tensor(logits), torch.tensor(labels), torch.tensor(weights, dtype=torch.float32))
    assert plain.item() == pytest.approx(each.mean(), rel=1e-5)  # float32 sums
    assert weighted.item() == pytest.approx((each * weights[labels]).sum() / weights[labels].sum(), rel=1e-5)
    teacher = logits_and_labels(8, n=20)[0]
    t, s = softmax(teacher / 2, axis=1), softmax(logits / 2, axis=1)
    want = 4 * (t * np.log(t / s)).sum() / 20
    assert CLASSIFICATION.distillation(torch.tensor(logits), torch.tensor(teacher), 2.0).item() == pytest.approx(want, rel=1e-4)
    values = torch.tensor([[1.0], [3.0]])
    assert REGRESSION.loss(values, torch.tensor([2.0, 1.0])).item() == pytest.approx(2.5)
    assert REGRESSION.distillation(values, values + 2, 4.0).item() == pytest.approx(4)
