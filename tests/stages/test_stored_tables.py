"""A stored table: against the machine as it is now, and what a profile adds to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

from nascompile import cli, latency_table, pipeline, plugins, profiler
from nascompile.errors import TableError
from nascompile.progress import Silent
from nascompile.records import LatencyTable, TableRow, load, save
from nascompile.settings import Recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, into: Any, quick: Recipe) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        folder: Path = into(tmp_path_factory.mktemp("canary"), patch)
        pipeline.run(quick, Path("run"), until="profile")
        table = load(Path("run/table.json"), LatencyTable)
        rows = tuple(TableRow(operator=row.operator, latency=latency_table.rescaled(row.latency, 0.5)) for row in table.rows)
        save(msgspec.structs.replace(table, rows=rows), Path("fast.json"))
        return folder


@pytest.fixture(autouse=True)
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


class Told(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_operators_that_a_table_lacks_are_added_to_its_rows(
    elsewhere: Path, folder: Path, quick: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By every profile, without a flag; killed half-way, only the rest is timed."""
    table = load(folder / "run" / "table.json", LatencyTable)
    few = latency_table.store(msgspec.structs.replace(table, rows=table.rows[4:]))
    before = few.read_bytes()
    monkeypatch.setattr(profiler, "BATCH_ROWS", 1)
    device, timed = plugins.get("devices", "fake"), []
    time = type(device).time

    def counted(self: Any, jobs: Any, **options: Any) -> Any:
        timed.append(len(jobs))
        if len(timed) == 4:
            raise KeyboardInterrupt
        return time(self, jobs, **options)

    monkeypatch.setattr(type(device), "time", counted)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(quick, Path("again"), until="profile")
    told = Told()
    pipeline.run(quick, Path("again"), until="profile", progress=told)
    assert f"adding 4 of {len(table.rows)} operators to the rows of {few}" in told.notes
    assert next(note for note in told.notes if "to time" in note).startswith(f"2 of {len(table.rows)} operators to time")
    assert timed[:4] == [5, 4, 4, 4], "canary, two rows, one unfinished; two anchors each"
    assert timed[4:] == [5, 4, 4, 9, 39], "canary, two rows, stacks of different depths, networks"
    made = load(Path("again/table.json"), LatencyTable)
    assert {row.operator for row in made.rows} == {row.operator for row in table.rows}
    assert few.read_bytes() == before, "a table is never edited"
    assert len(list(few.parent.glob("*.json"))) == 2


def test_nothing_is_added_to_rows_of_another_speed(elsewhere: Path, folder: Path, quick: Recipe) -> None:
    fast = load(folder / "fast.json", LatencyTable)
    stored = latency_table.store(msgspec.structs.replace(fast, rows=fast.rows[4:]))
    with pytest.raises(TableError, match="not as fast as when its latency table was made"):
        pipeline.run(quick, Path("again"), until="profile")
    assert list(stored.parent.glob("*.json")) == [stored]

    heads = tuple(row for row in fast.rows if row.operator.kind == "head")
    stored.unlink()
    latency_table.store(msgspec.structs.replace(fast, rows=heads))
    pipeline.run(quick, Path("again"), until="profile")  # nothing there that a canary could time
    assert len(load(Path("again/table.json"), LatencyTable).rows) == len(fast.rows)


def validate(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, ["table", "validate", *map(str, arguments), "--canary"], prog_name="nascompile")


@pytest.mark.parametrize("source", [("--run", "run"), ("--model", "toy")])
def test_operators_are_timed_again(source: tuple[str, str]) -> None:
    before = sorted(path for path in Path().rglob("*"))
    done = validate("run/table.json", *source, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["canary"] == pytest.approx(1.0, abs=0.03)
    assert sorted(path for path in Path().rglob("*")) == before, "nothing is left in the run folder"
    assert "canary: operators take" in validate("run/table.json", *source).stdout


@pytest.mark.parametrize("source", [("--run", "run"), ("--model", "toy")])
def test_a_table_that_promises_too_much_is_not_valid(source: tuple[str, str]) -> None:
    done = validate("fast.json", *source)
    assert (done.exit_code, done.stdout) == (1, "")
    assert "not as fast as when its latency table was made" in done.stderr


def test_a_table_of_another_model_cannot_be_tried() -> None:
    table = load(Path("run/table.json"), LatencyTable)
    rows = tuple(msgspec.structs.replace(row, operator=msgspec.structs.replace(row.operator, kind="other")) for row in table.rows)
    save(msgspec.structs.replace(table, rows=rows), Path("other.json"))
    done = validate("other.json", "--model", "toy")
    assert done.exit_code == 1
    assert "has no operator of this space's layers" in done.stderr
