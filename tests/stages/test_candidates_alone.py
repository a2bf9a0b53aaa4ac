"""Candidates that are trained on by themselves before they are built: what is trained again when, and whose weights engines have."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from nascompile import beside, cli, finetune, models, pipeline
from nascompile.errors import RecipeError, RecordError
from nascompile.progress import Silent
from nascompile.records import EngineManifest, Front, load
from nascompile.settings import Recipe, check

UNTIL = "measure"
"""The last stage that does not read test."""


@pytest.fixture(autouse=True)
def work(elsewhere: Path) -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def searched(quick: Recipe, into: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has built the super-network's candidates."""
    with pytest.MonkeyPatch.context() as patch:
        folder = into(tmp_path_factory.mktemp("searched"), patch)
        pipeline.run(quick, Path("run"), until=UNTIL)
        return folder / "run"


@pytest.fixture
def run(searched: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(searched, tmp_path / "run"))


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Trainings that began, and stages that did something."""
    found: list[str] = []
    real = finetune._train

    def train(plan: Any, name: str, *arguments: Any) -> Any:
        found.append(name.partition("-")[0])
        return real(plan, name, *arguments)

    monkeypatch.setattr(finetune, "_train", train)
    for stage in ("search", "build"):
        work = getattr(pipeline.Context, f"_{stage}")
        monkeypatch.setattr(pipeline.Context, f"_{stage}", lambda self, work=work, stage=stage: found.append(stage) or work(self))
    return found


def alone(recipe: Recipe, epochs: int = 3) -> Recipe:
    return msgspec.structs.replace(recipe, finetune=msgspec.structs.replace(recipe.finetune, candidate_epochs=epochs))


def manifest(run: Path, name: str = "candidate-1") -> EngineManifest:
    return load(run / "engines" / name / "manifest.json", EngineManifest)


def weights_of(run: Path) -> dict[str, Any]:
    """Digest of weights ▸ folder's name."""
    context = pipeline.Context(load(run / "recipe.json", Recipe), run, Silent(), pipeline.Given())
    return {context.weights(folder.name).evaluator.weights_digest: folder.name for folder in (run / "candidates").iterdir()}


def test_engines_have_the_weights_of_their_own_training(run: Path, quick: Recipe, done: list[str]) -> None:
    before, subnet = manifest(run), load_file(run / "subnets" / "candidate-1" / "model.safetensors")
    pipeline.run(alone(quick), run, until=UNTIL)
    count = len(list((run / "engines").glob("candidate-*")))
    assert done[0] == "build", "neither super-network nor search"
    assert set(done[1:]) == {"candidate"}
    assert len(list((run / "candidates").iterdir())) <= count, "candidates that differ in precisions alone share their weights"
    after, known = manifest(run), weights_of(run)
    assert after.candidate == before.candidate
    assert known[after.weights_digest] == finetune.architecture_of(after.candidate).id
    assert before.weights_digest not in known
    own = load_file(run / "subnets" / "candidate-1" / "model.safetensors")
    assert own.keys() == subnet.keys()
    assert any(not torch.equal(own[name], subnet[name]) for name in own), "the float weights beside the engine are the new ones, too"
    assert manifest(run, "baseline").weights_digest not in known
    for folder in (run / "candidates").iterdir():
        log = load(folder / "training.json", finetune.TrainingLog)
        assert log.recipe == "alone"
        assert log.best >= log.validation[0][1], "the best weights are kept, those it began with among them"
        assert models.weights_digest(folder) != models.weights_digest(run / "supernet")
    assert not list((run / "training").glob("candidate-*")), "nothing is left of a training that has ended"


def test_what_is_trained_again_and_what_is_not(run: Path, quick: Recipe, done: list[str]) -> None:
    pipeline.run(alone(quick), run, until=UNTIL)
    del done[:]
    pipeline.run(alone(quick), run, until=UNTIL)
    assert done == []
    pipeline.run(alone(quick, 2), run, until=UNTIL)
    assert set(done) == {"build", "candidate"}
    del done[:]
    pipeline.run(quick, run, until=UNTIL)
    assert done == ["build"]
    assert manifest(run).weights_digest not in weights_of(run), "without it engines have the super-network's weights again"
    context = pipeline.Context(quick, run, Silent(), pipeline.Given())
    assert context.source_of(manifest(run)) is context.sources["supernet"]
    assert context.source_of(manifest(run, "baseline")) is context.sources["baseline"]


def test_an_engine_is_known_by_its_weights(run: Path, quick: Recipe) -> None:
    pipeline.run(alone(quick), run, until=UNTIL)
    context = pipeline.Context(alone(quick), run, Silent(), pipeline.Given())
    found = manifest(run)
    assert context.source_of(found) is context.weights(finetune.architecture_of(found.candidate).id)
    shutil.rmtree(run / "candidates")
    with pytest.raises(RecordError, match="the weights of candidate-1 are no longer in"):
        context.built_from(found)


def test_one_more_of_the_front_is_trained_too(run: Path, quick: Recipe, done: list[str]) -> None:
    one = msgspec.structs.replace(quick, measure=msgspec.structs.replace(quick.measure, top_k=1))
    pipeline.run(alone(one), run, until=UNTIL)
    front = load(run / "front.json", Front)
    known = {folder.name for folder in (run / "candidates").iterdir()}
    number, other = next((n, e) for n, e in enumerate(front.evaluations, 1) if finetune.architecture_of(e.candidate).id not in known)
    del done[:]
    folder = beside.build_candidate(run, number)
    assert done == ["candidate"]
    assert weights_of(run)[manifest(run, folder.name).weights_digest] == finetune.architecture_of(other.candidate).id
    beside.build_candidate(run, number)
    assert done == ["candidate"]


def test_one_is_trained_where_there_is_no_more_than_the_run(run: Path, quick: Recipe, done: list[str], tmp_path: Path) -> None:
    pipeline.run(alone(quick), run, until="search")
    there = Path(shutil.copytree(run, tmp_path / "there", ignore=shutil.ignore_patterns("model", "teacher", "engines", "table.json")))
    del done[:]
    weights = beside.train_candidate(there, 2)
    assert done == ["candidate"]
    assert not (there / "model").exists(), "the model was not asked for"
    shutil.copytree(there / "candidates", run / "candidates")
    del done[:]
    folder = beside.build_candidate(run, 2)
    assert done == [], "what was trained there is found here"
    assert weights_of(run) == {manifest(run, folder.name).weights_digest: weights.name}


def test_the_command_trains_one(run: Path, quick: Recipe, done: list[str]) -> None:
    def said(*arguments: str) -> Any:
        return CliRunner().invoke(cli.app, ["finetune", *arguments, "--candidate", "1", "--quiet"])

    refused = said(str(run))
    assert refused.exit_code == 1
    assert f"candidates of {run} are not trained by themselves: finetune.candidate_epochs is 0" in refused.stderr
    assert "search again with that" in refused.stderr, "test was not read"
    front = (run / "front.json").rename(run / "elsewhere.json")
    assert f"nascompile search RECIPE --out {run}" in said(str(run)).stderr
    front.rename(run / "front.json")
    pipeline.run(alone(quick), run, until="search")
    done.clear()
    found = json.loads(said(str(run), "--json").stdout)
    [folder] = (run / "candidates").iterdir()
    assert found == {"run": str(run), "candidate": 1, "weights": str(folder)}
    assert said("--out", str(run)).stdout == f"{folder}\n"
    assert done == ["candidate"], "once"
    assert "--candidate takes its settings from the run" in said("--out", str(run), "--epochs", "3").stderr


def test_a_training_that_was_killed_ends_the_same(run: Path, quick: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Path(shutil.copytree(run, tmp_path / "whole"))
    pipeline.run(alone(quick), whole, until="build")
    monkeypatch.setattr(finetune, "CHECKPOINT_SECONDS", -1.0)
    real, left = finetune._step, iter(range(5))

    def step(*arguments: Any) -> Any:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(finetune, "_step", step)
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(alone(quick), run, until="build")
    assert list((run / "training").glob("candidate-*/checkpoint.json"))
    pipeline.run(alone(quick), run, until="build")
    for folder in (whole / "candidates").iterdir():
        a, b = (load_file(place / "candidates" / folder.name / "model.safetensors") for place in (whole, run))
        assert all(np.array_equal(a[name].numpy(), b[name].numpy()) for name in a)


def test_the_report_says_whose_scores_stand_where(run: Path, quick: Recipe) -> None:
    pipeline.run(alone(quick), run)
    said = (run / "report.html").read_text()
    assert "those that were built were trained on by themselves for 3 epochs before" in said


def test_fewer_than_no_epochs_are_refused(quick: Recipe) -> None:
    with pytest.raises(RecipeError) as caught:
        check(alone(quick, -1))
    assert "finetune.candidate_epochs = -1: 0 or more" in caught.value.detail
