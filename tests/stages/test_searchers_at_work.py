"""Searchers that use prices, with everything that a search has around it: workers, an early end, what it has learned."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

from nascompile import beside, pipeline
from nascompile.progress import Silent
from nascompile.records import Front, load
from nascompile.searchers import linas
from nascompile.settings import Recipe


@pytest.fixture(autouse=True)
def few_generations(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a space as small as the toy's the published 400 take LINAS ten seconds a batch and change nothing here."""
    monkeypatch.setattr(linas, "GENERATIONS", 20)


def with_search(recipe: Recipe, **changes: Any) -> Recipe:
    return msgspec.structs.replace(recipe, search=msgspec.structs.replace(recipe.search, **changes))


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def outcome(front: Front) -> tuple[Any, ...]:
    """A front without times."""
    return [msgspec.structs.replace(e, seconds=0.0) for e in front.evaluations], front.scored, front.hypervolume, front.stopped


@pytest.mark.parametrize(("searcher", "evolving"), [("ehvi", False), ("linas", False), ("nsga2", True)])
def test_the_front_does_not_depend_on_the_workers_and_can_be_explained(searcher: str, evolving: bool, work: Recipe) -> None:
    fronts, said = [], Notes()
    for workers in (1, 2):
        folder = Path(f"run{workers}")
        shutil.copytree("run", folder)
        recipe = with_search(work, searcher=searcher, evaluations=24, population=12, workers=workers, space_evolution=evolving)
        pipeline.run(recipe, folder, until="search", progress=said)
        fronts.append(load(folder / "front.json", Front))
    assert fronts[0].searcher == searcher
    assert fronts[0].scored == 24
    assert bool([note for note in said.notes if note.startswith("windows of the space")]) is evolving
    assert outcome(fronts[0]) == outcome(fronts[1])
    explained = [beside.explain_search(Path(f"run{workers}")) for workers in (1, 2)]
    assert explained[0].scored == 24
    assert explained[0].genes == explained[1].genes


@pytest.mark.parametrize("searcher", ["ehvi", "linas"])
def test_it_ends_where_the_hypervolume_does_not_grow_and_goes_on_from_there(searcher: str, quick: Recipe, elsewhere: Path) -> None:
    recipe = with_search(quick, searcher=searcher, evaluations=300, population=30, patience=1)
    pipeline.run(recipe, Path("run"), until="search")
    front = load(Path("run/front.json"), Front)
    assert front.stopped == "no better hypervolume in 1 batch"
    assert front.scored < 300
    lines = Path("run/journal.jsonl").read_bytes().count(b"\n")
    assert lines == front.scored
    pipeline.run(with_search(recipe, patience=0, evaluations=front.scored + 5), Path("run"), until="search")
    longer = load(Path("run/front.json"), Front)
    assert (longer.scored, longer.stopped) == (front.scored + 5, "")
    assert longer.hypervolume[0][0] == 1
    assert Path("run/journal.jsonl").read_bytes().count(b"\n") == front.scored + 5  # the same candidates first, scored once
