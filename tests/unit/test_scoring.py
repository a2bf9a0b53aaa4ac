"""Scores of engine files, and what is lost against a baseline with its error."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest

from nascompile import plugins, scoring
from nascompile.data import Split
from nascompile.preprocess import Preprocessing, Preprocessor
from nascompile.records import FLOAT32, INT8, INT8_DYNAMIC, WEIGHT_ONLY, Score, Target, Workload

TASK = plugins.get("tasks", "classification")


def score(value, per_sample=(), metric="accuracy", stderr=0.0) -> Score:
    direction = "minimize" if metric == "mse" else "maximize"
    return Score(
        metric=metric, direction=direction, value=value, n=100, stderr=stderr, split_digest="s", weights_digest="w", evaluator_digest="e",
        per_sample=tuple(per_sample),
    )  # fmt: skip


def test_more_is_better_whatever_the_direction():
    assert scoring.gain(score(90.0)) == 90.0
    assert scoring.gain(score(0.3, metric="mse")) == -0.3
    assert scoring.drop(score(0.3, metric="mse"), score(0.5, metric="mse"))[0] == pytest.approx(0.2)
    assert scoring.drop(score(90.0), score(91.0))[0] == -1.0


@pytest.mark.parametrize("agreement", [0.99, 0.8, 0.3])
def test_the_error_of_a_drop_is_that_of_pairs(agreement):
    """Against a bootstrap of pairs: sampled indices, recomputed means, no formula."""
    rng = np.random.default_rng(0)
    a = rng.random(800) < 0.9
    b = np.where(rng.random(800) < agreement, a, rng.random(800) < 0.85)
    first, second = (score(100 * x.mean(), x.astype(float)) for x in (a, b))
    value, error = scoring.drop(first, second)
    resampled = [100 * (a[i].mean() - b[i].mean()) for i in (rng.integers(800, size=800) for _ in range(3000))]
    assert value == pytest.approx(100 * (a.mean() - b.mean()))
    # 3,000 resamples know a standard deviation to 1/√6000 = 1.3 %; four of those
    assert error == pytest.approx(np.std(resampled), rel=0.052)
    if agreement > 0.9:  # pairing matters: the errors of two independent samples would be several times this
        assert error < 0.5 * 100 * np.hypot(a.std(), b.std()) / np.sqrt(800)


def test_the_same_engine_loses_nothing_for_sure():
    samples = (1.0, 0.0, 1.0, 1.0)
    assert scoring.drop(score(75.0, samples), score(75.0, samples)) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (score(80.0, (1.0, 0.0), metric="f1", stderr=3.0), score(78.0, (1.0, 1.0), metric="f1", stderr=4.0)),
        (score(80.0, (), stderr=3.0), score(78.0, (), stderr=4.0)),
        (score(80.0, (1.0, 0.0, 1.0), stderr=3.0), score(78.0, (1.0, 0.0), stderr=4.0)),
        (score(80.0, (1.0,), stderr=3.0), score(78.0, (0.0,), stderr=4.0)),
    ],
)
def test_what_cannot_be_paired_adds_its_errors_as_independent(a, b):
    assert scoring.drop(a, b) == (2.0, 5.0)  # 3-4-5


def test_a_score_keeps_a_value_per_sample_and_where_it_came_from():
    logits, labels = np.array([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0], [1.0, 0.0]]), np.array([0, 1, 1, 0])
    found = scoring.score_of(TASK, "accuracy", logits, labels, split="s", weights="w", evaluator="e")
    assert (found.value, found.n, found.per_sample, found.direction) == (75.0, 4, (1.0, 1.0, 0.0, 1.0), "maximize")
    assert (found.split_digest, found.weights_digest, found.evaluator_digest) == ("s", "w", "e")


@dataclass
class Runner:
    calls: list[int] = field(default_factory=list)

    def run(self, inputs):
        self.calls.append(len(inputs["features"]))
        return {"logits": inputs["features"][:, :3]}


def make_split(samples, digest="d") -> Split:
    values = np.random.default_rng(0).standard_normal((samples, 4)).astype(np.float32)
    preprocessor = Preprocessor(Preprocessing(modality="vector", inputs=("features",)), {})
    labels = np.where(np.arange(samples) % 5 == 0, 0, values[:, :3].argmax(1))
    return Split("v", {"features": values}, labels, np.zeros((samples, 32), np.uint8), digest, preprocessor)


def test_an_engine_is_scored_on_every_sample_once_and_never_again(tmp_path):
    split, runner = make_split(70), Runner()
    manifest = SimpleNamespace(name="a", files=(("model.onnx", "1" * 64),), weights_digest="w", graph=None, target=None)
    engine = scoring.Loaded(tmp_path, manifest, runner)
    found = scoring.score_engine(engine, split, TASK, "accuracy", tmp_path)
    assert runner.calls == [32, 32, 6]
    right = [int(row[:3].argmax()) == label for row, label in zip(split.inputs["features"], split.labels, strict=True)]
    assert found.per_sample == tuple(map(float, right))
    assert found.value == pytest.approx(100 * sum(right) / 70)
    assert 0 < sum(right) < 70
    assert scoring.score_engine(engine, split, TASK, "accuracy", tmp_path) == found
    assert len(runner.calls) == 3
    # other files, another split or another metric are other scores
    scoring.score_engine(engine, make_split(8, "other"), TASK, "accuracy", tmp_path)
    scoring.score_engine(engine, split, TASK, "f1", tmp_path)
    changed = SimpleNamespace(name="a", files=(("model.onnx", "2" * 64),), weights_digest="w", graph=None, target=None)
    scoring.score_engine(scoring.Loaded(tmp_path, changed, runner), split, TASK, "accuracy", tmp_path)
    assert len(runner.calls) == 3 + 1 + 3 + 3


def test_samples_that_influence_each_other_are_scored_as_many_at_a_time_as_the_engine_will_get(tmp_path):
    target = Target(device="d", backend="b", workload=Workload(batch=2))
    assert [scoring.batch_of((FLOAT32, p), target) for p in (INT8, *WEIGHT_ONLY, INT8_DYNAMIC)] == [32] * 5 + [2]
    node = SimpleNamespace(operator=SimpleNamespace(precision=INT8_DYNAMIC))
    manifest = SimpleNamespace(name="a", files=(), weights_digest="w", graph=SimpleNamespace(nodes=(node,)), target=target)
    runner = Runner()
    scoring.score_engine(scoring.Loaded(tmp_path, manifest, runner), make_split(5), TASK, "accuracy", tmp_path)
    assert runner.calls == [2, 2, 1]


def test_a_single_text_comes_without_padding():
    seen = []

    class Lengths:
        def run(self, inputs):
            seen.append((inputs["input_ids"].shape, inputs["attention_mask"].sum()))
            return {"logits": np.zeros((len(inputs["input_ids"]), 2))}

    class Texts:
        def batches(self, size):
            mask = np.int64([[1, 1, 1, 0], [1, 0, 0, 0]])
            for i in range(0, 2, size):
                part = mask[i : i + size]
                yield {"input_ids": np.ones_like(part), "attention_mask": part}, np.zeros(len(part))

    for batch in (1, 32):
        scoring.score_runner(Lengths(), Texts(), TASK, "accuracy", "s", "w", "e", batch)
    assert seen == [((1, 3), 3), ((1, 1), 1), ((2, 4), 4)]
