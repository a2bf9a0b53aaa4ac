"""A stored table: against the machine as it is now, and what a profile adds to it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

from nascompile import cli, latency_table, pipeline, places, plugins, profiler
from nascompile.errors import TableError
from nascompile.progress import Silent
from nascompile.records import Environment, LatencyTable, TableRow, Workload, load, save
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


def test_a_packaged_table_of_another_speed_is_passed_over(
    elsewhere: Path, folder: Path, quick: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who runs the tool did not make it; one of the same speed is used."""
    real = places._packaged
    monkeypatch.setattr(places, "_packaged", lambda kind: (tmp_path / "package" / kind,) if kind == places.TABLES else real(kind))
    packaged = latency_table.store(load(folder / "fast.json", LatencyTable), tmp_path / "package" / "latency_tables")
    told = Told()
    pipeline.run(quick, Path("again"), until="profile", progress=told)
    assert any(note.startswith("a packaged latency table is passed over: ") and str(packaged) in note for note in told.notes)
    assert any(note.startswith("new latency table: ") for note in told.notes)
    assert packaged.exists()

    latency_table.store(load(folder / "run" / "table.json", LatencyTable), tmp_path / "package" / "latency_tables")
    packaged.unlink()
    for made in Path("latency_tables").glob("*/*.json"):
        made.unlink()
    told.notes.clear()
    pipeline.run(quick, Path("third"), until="profile", progress=told)
    assert any(note.startswith("operators take ") for note in told.notes)
    assert any(note.startswith("using the latency table") for note in told.notes)


def test_a_table_of_another_pace_is_brought_to_that_of_now(elsewhere: Path, folder: Path, quick: Recipe) -> None:
    """In the run's own copy, and by as much as the note says; what is added is stored at the stored table's pace."""
    table = load(folder / "run" / "table.json", LatencyTable)
    rows = tuple(msgspec.structs.replace(row, latency=latency_table.rescaled(row.latency, 1 / 1.07)) for row in table.rows)
    stored = latency_table.store(msgspec.structs.replace(table, rows=rows))
    before, told = stored.read_bytes(), Told()
    pipeline.run(quick, Path("again"), until="profile", progress=told)
    made = load(Path("again/table.json"), LatencyTable)
    ratio = made.scale / table.scale
    assert ratio == pytest.approx(1.07, abs=0.02)
    assert f"operators take {ratio:.3f} times what {stored} says, so its times are multiplied by that" in told.notes
    assert (made.rows, made.relative_error > table.relative_error) == (rows, True)
    assert dict(made.environment.recorded)["pace"] == pytest.approx(ratio, abs=1e-4)
    assert stored.read_bytes() == before, "a table is never edited"

    stored.unlink()
    latency_table.store(msgspec.structs.replace(table, rows=rows[4:]))
    pipeline.run(quick, Path("third"), until="profile", progress=told)
    wider = load(Path("third/table.json"), LatencyTable)
    [whole] = [t for t in (load(p, LatencyTable) for p in stored.parent.glob("*.json")) if len(t.rows) == len(rows)]
    assert wider.scale / whole.scale == pytest.approx(1.07, abs=0.02)
    assert (wider.rows, "pace" in dict(whole.environment.recorded)) == (whole.rows, False)


def test_only_adding_refuses_where_there_is_nothing_to_add_to(elsewhere: Path, folder: Path, quick: Recipe) -> None:
    with pytest.raises(TableError, match="of this environment to add operators to: fake, fake, forward-b1, 1 thread") as none:
        pipeline.run(quick, Path("again"), until="profile", table="add-missing")
    assert (none.value.detail, "leave --add-missing out" in none.value.hint) == ("", True)

    table = load(folder / "run" / "table.json", LatencyTable)
    must_match = tuple((name, "older" if name == "lowering" else value) for name, value in table.environment.must_match)
    old = latency_table.store(msgspec.structs.replace(table, environment=Environment(must_match=must_match)))
    batch = msgspec.structs.replace(table.target, workload=Workload(batch=8))
    other = latency_table.store(msgspec.structs.replace(table, target=batch))
    with pytest.raises(TableError, match="to add operators to") as refused:
        pipeline.run(quick, Path("again"), until="profile", table="add-missing")
    assert f"{old}: made with other lowering" in refused.value.detail
    assert f"{other}: made for another workload" in refused.value.detail

    few = latency_table.store(msgspec.structs.replace(table, rows=table.rows[4:]))
    told = Told()
    pipeline.run(quick, Path("again"), until="profile", table="add-missing", progress=told)
    assert f"adding 4 of {len(table.rows)} operators to the rows of {few}" in told.notes
    assert {row.operator for row in load(Path("again/table.json"), LatencyTable).rows} == {row.operator for row in table.rows}
    told.notes.clear()
    pipeline.run(quick, Path("third"), until="profile", table="add-missing", progress=told)
    assert any(note.startswith("using the latency table") for note in told.notes), "nothing is missing any more"


def test_a_fresh_table_is_made_beside_a_stale_one_and_found_from_then_on(elsewhere: Path, folder: Path, quick: Recipe) -> None:
    """What the canary's hint says; the stale one has the smaller error and would otherwise be found again."""
    fast = msgspec.structs.replace(load(folder / "fast.json", LatencyTable), relative_error=latency_table.FLOOR)
    stale = latency_table.store(fast)
    os.utime(stale, (1e9, 1e9))
    with pytest.raises(TableError, match="not as fast") as caught:
        pipeline.run(quick, Path("run"), until="profile")
    assert "`nascompile profile --fresh` with the same settings" in caught.value.hint
    done = invoke("profile", "--out", "run", "--fresh", "-q")
    assert done.exit_code == 0, done.output
    made = load(Path("run/table.json"), LatencyTable)
    assert len(list(stale.parent.glob("*.json"))) == 2
    told = Told()
    for place in (Path("run"), Path("other")):
        pipeline.run(quick, place, until="profile", progress=told)
    assert told.notes.count("done before, nothing to do") == 2, "data and the profile of the first folder"
    assert load(Path("other/table.json"), LatencyTable) == made
    assert not Path("run/profiling-fresh").exists()


def test_a_finished_profile_is_done_again_where_a_fresh_one_is_asked_for(
    elsewhere: Path, quick: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted, it goes on with what it timed itself, and with nothing that was timed before it."""
    monkeypatch.setattr(profiler, "BATCH_ROWS", 1)
    device, timed = plugins.get("devices", "fake"), []
    time, stop = type(device).time, [3]

    def counted(self: Any, jobs: Any, **options: Any) -> Any:
        timed.append(len(jobs))
        if len(timed) == stop[0]:
            raise KeyboardInterrupt
        return time(self, jobs, **options)

    monkeypatch.setattr(type(device), "time", counted)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(quick, Path("run"), until="profile")
    began, stop[0] = len(timed), len(timed) + 4
    first = Told()
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(quick, Path("run"), until="profile", table="fresh", progress=first)
    stop[0] = 0
    told = Told()
    pipeline.run(quick, Path("run"), until="profile", table="fresh", progress=told)
    total = len(load(Path("run/table.json"), LatencyTable).rows)
    (note,) = [note for note in told.notes if "to time" in note]
    left = int(note.split()[0])
    assert any(n.startswith(f"{total} of {total} operators to time") for n in first.notes), "with none of the first profile's"
    assert 0 < left < total, "what the interrupted fresh profile had timed is not timed again"
    assert began == 3, "the first profile had timed something too"
    pipeline.run(quick, Path("run"), until="profile", table="fresh", progress=told)
    assert [note for note in told.notes if "to time" in note][-1].startswith(f"{total} of {total} operators")


def test_flags_that_contradict_each_other_are_refused(elsewhere: Path, folder: Path) -> None:
    both = invoke("profile", "--model", "toy", "--device", "fake", "--fresh", "--add-missing", "--out", "run")
    assert (both.exit_code, "exclude" in both.stderr) == (2, True)
    one = invoke("profile", "--model", "toy", "--device", "fake", "--fresh", "--tables", folder / "fast.json", "--out", "run")
    assert one.exit_code == 1
    assert "--fresh makes a new latency table, and --tables names the one to use" in one.stderr
    assert not Path("run").exists()


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments], prog_name="nascompile")


def validate(*arguments: object) -> Any:
    return invoke("table", "validate", *arguments, "--canary")


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
