"""Tables that come with the package, and the tool that makes them."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from pathlib import Path

import msgspec
import pytest

import nascompile
from nascompile import latency_table, network, places, plugins, profiler, records, table_check, targets
from nascompile.errors import TableError
from nascompile.families.toy import PLUGIN as TOY, ToyConfig
from nascompile.records import LatencyTable, Workload

ROOT = Path(__file__).parents[2]
PACKAGED = Path(nascompile.__file__).parent / "latency_tables"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("ship_tables", ROOT / "tools" / "ship_tables.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A table of the toy on the simulated device."""
    target, backend = targets.make("fake", "fake", Workload()), plugins.get("backends", "fake")
    space = network.search_space(TOY, ToyConfig(), backend, target, "")
    folder = tmp_path_factory.mktemp("work")
    return profiler.profile(TOY, ToyConfig(), space, target, backend, plugins.get("devices", "fake"), folder, 0, seconds=0.1)


def faults_of(folder: Path) -> list[str]:
    """What is wrong with the tables in a folder: each by itself, and operators that two of one target and environment have."""
    found, seen = [], Counter()
    for path in sorted(folder.glob("**/*.json")):
        table = records.load(path, LatencyTable)
        found += [f"{path.name}: {fault}" for fault in table_check.faults(table)]
        if path != latency_table.path_for(folder, table):
            found.append(f"{path.name}: not under its own name")
        if path.stat().st_size > 200_000:
            found.append(f"{path.name}: {path.stat().st_size} bytes")
        seen.update(records.digest(table.target, table.environment.must_match, row.operator) for row in table.rows)
    return found + [f"{n} rows of one operator on one target" for n in seen.values() if n > 1]


def test_the_tables_in_the_package_are_sound_and_none_is_there_twice():
    assert faults_of(PACKAGED) == []


def test_faults_of_such_tables_are_seen(tool, made, tmp_path):
    tool.ship(made, [], tmp_path)
    assert faults_of(tmp_path) == []
    other = msgspec.structs.replace(made, rows=made.rows[:1], seconds=1.0)
    path = tool.ship(other, [], tmp_path)
    assert faults_of(tmp_path) == ["2 rows of one operator on one target"]
    path.rename(path.with_name("fake-b.json"))
    assert "fake-b.json: not under its own name" in faults_of(tmp_path)


def test_a_shipped_file_is_small_and_says_what_the_table_said(tool, made, tmp_path):
    path = tool.ship(made, [], tmp_path / "shipped")
    records.save(made, tmp_path / "plain.json")
    assert path.stat().st_size < 0.5 * (tmp_path / "plain.json").stat().st_size
    read = records.load(path, LatencyTable)
    assert [row.operator for row in read.rows] == [row.operator for row in made.rows]
    for ours, theirs in zip(read.rows, made.rows, strict=True):
        assert ours.latency.value == pytest.approx(theirs.latency.value, rel=6e-4)
        assert (ours.footprint, [place for place, _ in ours.reach]) == (theirs.footprint, [place for place, _ in theirs.reach])
        assert (ours.noisy, ours.latency.kind, ours.latency.n) == (theirs.noisy, theirs.latency.kind, theirs.latency.n)
    assert msgspec.structs.replace(read, rows=()) == msgspec.structs.replace(made, rows=())
    found = latency_table.find(made.target, made.environment, [row.operator for row in made.rows], tmp_path / "shipped")
    assert (found.path, found.missing) == (path, ())


def test_a_new_table_takes_the_place_of_the_old_one_and_an_unsound_one_of_none(tool, made, tmp_path):
    old = tool.ship(made, [], tmp_path)
    with pytest.raises(TableError, match="not sound"):
        tool.ship(msgspec.structs.replace(made, relative_error=0.0), [old], tmp_path)
    assert old.exists()
    new = tool.ship(msgspec.structs.replace(made, seconds=made.seconds + 1), [old], tmp_path)
    assert [path for path, _ in tool.shipped(tmp_path)] == [new]
    assert tool.ship(msgspec.structs.replace(made, seconds=made.seconds + 1), [new], tmp_path) == new
    assert new.exists()


def test_a_case_is_what_a_profile_on_this_machine_looks_for(tool, made, tmp_path, monkeypatch):
    """Which of the tables in the package are up to date, and which a new one takes the place of."""
    names = [case.name for case in tool.cases()]
    assert len(set(names)) == len(names) == 2 * len(tool.MODELS) * len(targets.runnable("cpu"))
    assert "bert-base-onnxruntime-t2" in names
    monkeypatch.setattr(tool, "TABLES", tmp_path)
    case = next(case for case in tool.cases() if case.name == "demo-onnxruntime-t1")
    assert (case.stored(), case.outdated()) == (None, [])
    wanted = network.operators(case.family, case.config, case.space, case.target)
    rows = tuple(msgspec.structs.replace(made.rows[0], operator=operator) for operator in wanted)
    fitting = msgspec.structs.replace(made, target=case.target, environment=case.environment, rows=rows)
    path = tool.ship(fitting, [], tmp_path)
    assert case.stored() == path
    changed = tuple((name, "0.1" if name == "onnxruntime" else value) for name, value in case.environment.must_match)
    path.unlink()
    older = tool.ship(msgspec.structs.replace(fitting, environment=records.Environment(must_match=changed)), [], tmp_path)
    assert (case.stored(), case.outdated()) == (None, [older])
    elsewhere = tuple((name, "Another" if name == "cpu" else value) for name, value in changed)
    older.unlink()
    tool.ship(msgspec.structs.replace(fitting, environment=records.Environment(must_match=elsewhere)), [], tmp_path)
    assert case.outdated() == [], "of another processor, where this one has nothing to say"


def test_a_users_own_tables_come_before_those_of_the_package():
    assert places.folders(places.TABLES)[-1] == PACKAGED
    assert places.folders(places.TABLES, Path("mine"))[0] == Path("mine")
