"""A run of the toy network that is as small as a whole run can be, in a folder of its own."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from nascompile import places
from nascompile.data import DataSettings
from nascompile.settings import Budgets, FinetuneSettings, MeasureSettings, Recipe, SearchSettings


@pytest.fixture(scope="session")
def quick() -> Recipe:
    """The embedded toy on the fake device: about two seconds."""
    return Recipe(
        model="toy",
        device="fake",
        budgets=Budgets(max_drop=20.0),
        finetune=FinetuneSettings(teacher_epochs=3, epochs=1, batch_size=32, learning_rate=0.01),
        search=SearchSettings(  # ehvi soon finds the end of the toy's front that is best in all: this one builds several engines
            searcher="nsga2", evaluations=12, population=6, calibration_samples=32, calibration_methods=("minmax",)
        ),
        measure=MeasureSettings(top_k=2, seconds=0.05, batches=(1,), agreement=2),
        profile_seconds=0.1,
    )


@pytest.fixture(scope="session")
def into() -> Callable[[Path, pytest.MonkeyPatch], Path]:
    """into(folder, monkeypatch): work in that folder, with no latency tables from the checkout."""
    packaged = places._packaged

    def enter(folder: Path, patch: pytest.MonkeyPatch) -> Path:
        patch.setattr(places, "_packaged", lambda kind: () if kind == places.TABLES else packaged(kind))
        patch.chdir(folder)
        return folder

    return enter


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, into: Any) -> Path:
    """An empty working folder."""
    return into(tmp_path, monkeypatch)


@pytest.fixture(scope="session")
def toy_csv() -> Any:
    """toy_csv(path, samples=400, seed=0) ▸ path: 16 features a row and a label, a, b or c."""

    def write(path: Path, samples: int = 400, seed: int = 0) -> Path:
        from nascompile.families.toy import demo_data

        features, labels = demo_data(samples, seed)
        with path.open("w", newline="") as stream:
            rows = ([*map(str, x.tolist()), "abc"[y]] for x, y in zip(features, labels, strict=True))
            csv.writer(stream, lineterminator="\n").writerows([[*(f"x{i}" for i in range(16)), "label"], *rows])
        return path

    return write


@pytest.fixture(scope="session")
def trained(quick: Recipe, toy_csv: Any, into: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recipe]:
    """(folder of a run that comes to its search next, its recipe). Scoring a candidate takes long enough to be killed in."""
    from nascompile import pipeline

    with pytest.MonkeyPatch.context() as patch:
        folder = into(tmp_path_factory.mktemp("trained"), patch)
        toy_csv(Path("toy.csv"), samples=14_000)
        recipe = msgspec.structs.replace(
            quick,
            data=DataSettings(data=str(folder / "toy.csv"), validation_size=12_000, test_size=400),
            finetune=msgspec.structs.replace(quick.finetune, teacher_epochs=1),
            search=msgspec.structs.replace(quick.search, evaluations=40, population=10),
        )
        pipeline.run(recipe, Path("run"), until="finetune")
        return folder, recipe


@pytest.fixture
def work(trained: tuple[Path, Recipe], tmp_path: Path, into: Any, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """The recipe; the working folder is a copy of that one."""
    shutil.copytree(trained[0], tmp_path / "work")
    into(tmp_path / "work", monkeypatch)
    return trained[1]


@pytest.fixture
def bare(work: Recipe) -> Any:
    """What workers of that run's search are given (`bench`), what scores in this process (`evaluator`), and 40 `jobs`."""
    from nascompile import pipeline, space as spaces
    from nascompile.progress import Silent
    from nascompile.worker import Job

    run = Path("run").resolve()
    context = pipeline.Context(work, run, Silent(), pipeline.Given())
    evaluator, bench = context.evaluator(run / "supernet", "minmax"), context._bench("minmax")
    rng = np.random.default_rng(0)
    points: dict[Any, None] = {}
    while len(points) < 40:
        points[spaces.sample(context.space, rng)] = None
    return SimpleNamespace(bench=bench, evaluator=evaluator, jobs=tuple(Job(candidate=point) for point in points))
