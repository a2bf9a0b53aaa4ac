"""A run that predicts by a table of another environment says so in everything it leaves behind; other runs say nothing of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

from nascompile import cli, journal, pipeline, plugins, report
from nascompile.errors import TableError
from nascompile.records import (
    Choice,
    Correction,
    EngineManifest,
    Environment,
    Evaluation,
    ForeignUse,
    Front,
    LatencyTable,
    digest,
    load,
    save,
)
from nascompile.settings import Recipe

DIFFER = (("cpu", "another-cpu", "fake"),)
SENTENCE = "cpu: table has another-cpu, here it is fake"


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments], prog_name="nascompile")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, into: Any, quick: Recipe) -> Path:
    """A folder with `own`, a run by its own table, and `run`, the same by a table that is said to be of another processor."""
    with pytest.MonkeyPatch.context() as patch:
        folder: Path = into(tmp_path_factory.mktemp("foreign"), patch)
        pipeline.run(quick, Path("own"))
        table = load(Path("own/table.json"), LatencyTable)
        pairs = tuple((name, "another-cpu" if name == "cpu" else value) for name, value in table.environment.must_match)
        save(msgspec.structs.replace(table, environment=Environment(must_match=pairs)), Path("elsewhere.json"))
        pipeline.run(msgspec.structs.replace(quick, tables="elsewhere.json", allow_foreign=True), Path("run"))
        return folder


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    return Path("run")


def test_every_record_says_what_differs(run: Path) -> None:
    use = load(run / "foreign.json", ForeignUse)
    assert (use.differences, use.table_digest) == (DIFFER, digest(load(run / "table.json", LatencyTable)))
    front = load(run / "front.json", Front)
    assert front.foreign == DIFFER
    scored = list(journal.read(run / "journal.jsonl", Evaluation))
    assert len(scored) == 12
    assert {e.foreign for e in (*front.evaluations, *scored)} == {DIFFER}
    manifests = [load(path, EngineManifest) for path in run.glob("engines/*/manifest.json")]
    assert {(m.predicted is None, m.foreign) for m in manifests} == {(False, DIFFER)}
    assert load(run / "correction.json", Correction).foreign == DIFFER
    assert load(run / "choice.json", Choice).foreign == DIFFER


def test_the_report_says_it_in_each_of_its_forms(run: Path) -> None:
    body = json.loads((run / "report.json").read_text())
    assert body["foreign"] == body["summary"]["foreign"] == [{"field": "cpu", "table": "another-cpu", "here": "fake"}]
    for name, sections in (("report.html", 4), ("report.md", 4)):
        assert (run / name).read_text().count(SENTENCE) == sections, name
    done = invoke("report", "--out", run)
    assert SENTENCE in " ".join(done.stdout.split())
    assert json.loads(invoke("run", "--out", run, "--json", "--quiet").stdout)["foreign"][0]["field"] == "cpu"


def test_an_engine_says_it_wherever_it_is_taken(run: Path) -> None:
    engine = run / "engines" / load(run / "choice.json", Choice).engine
    checks = json.loads(invoke("verify", engine, "--json").stdout)["checks"]
    assert SENTENCE in next(check["detail"] for check in checks if check["name"] == "prediction")
    (engine.parent.parent.parent / "features").write_text("")
    done = invoke("predict", engine, "@features")
    assert done.exit_code == 0, done.output
    assert done.stdout == ""
    assert done.stderr == f"note: this engine was found by a latency table of another environment: {SENTENCE}\n"


def test_one_more_candidate_says_it_too(run: Path) -> None:
    engine = invoke("build", "--out", run, "--candidate", 1, "--quiet").stdout.strip()
    assert load(Path(engine) / "manifest.json", EngineManifest).foreign == DIFFER


def test_a_run_by_its_own_table_says_nothing(run: Path) -> None:
    own = run.with_name("own")
    assert not (own / "foreign.json").exists()
    assert "foreign" not in json.loads((own / "choice.json").read_text())["data"], "it would change the digest that test was read under"
    assert load(own / "front.json", Front).foreign == ()
    body = json.loads((own / "report.json").read_text())
    assert (body["foreign"], "foreign" in body["summary"]) == ([], False)
    for name in ("report.html", "report.md"):
        assert "another environment" not in (own / name).read_text()
    engine = own / "engines" / load(own / "choice.json", Choice).engine
    assert "prediction" not in {check["name"] for check in json.loads(invoke("verify", engine, "--json").stdout)["checks"]}


def test_records_from_before_are_still_read(run: Path, tmp_path: Path) -> None:
    """As they were written when no result could say it."""
    old = {"front.json": Front, "correction.json": Correction, "choice.json": Choice, "engines/baseline/manifest.json": EngineManifest}
    for name, kind in old.items():
        body = json.loads((run.with_name("own") / name).read_text())
        body["data"].pop("foreign", None)
        for evaluation in body["data"].get("evaluations", ()):
            evaluation.pop("foreign", None)
        (tmp_path / "old.json").write_text(json.dumps(body))
        assert load(tmp_path / "old.json", kind) == load(run.with_name("own") / name, kind)


def test_the_same_table_in_a_changed_environment_marks_the_engines_that_were_there(
    elsewhere: Path, quick: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline.run(quick, Path("run"), until="build")
    before = load(Path("run/engines/baseline/manifest.json"), EngineManifest)
    device = plugins.get("devices", "fake")
    here = type(device).environment

    def changed(self: Any, target: Any, versions: Any) -> Environment:
        pairs = here(self, target, versions).must_match
        return Environment(must_match=tuple((name, "upgraded" if name == "cpu" else value) for name, value in pairs))

    monkeypatch.setattr(type(device), "environment", changed)
    Path("run/table.json").rename("taken.json")
    again = msgspec.structs.replace(quick, tables="taken.json")
    with pytest.raises(TableError, match="other cpu"):
        pipeline.run(again, Path("run"), until="build")
    pipeline.run(msgspec.structs.replace(again, allow_foreign=True), Path("run"), until="build")
    after = load(Path("run/engines/baseline/manifest.json"), EngineManifest)
    assert (before.foreign, after.foreign) == ((), (("cpu", "fake", "upgraded"),))
    assert (after.table_digest, after.predicted) == (before.table_digest, before.predicted)
    assert load(Path("run/front.json"), Front).foreign == after.foreign
    environment = report.gather(Path("run"))["environment"]
    assert environment["must_match"]["cpu"] == "upgraded", "nothing was measured yet: what is shown is not where the table was made"

    pipeline.run(msgspec.structs.replace(quick, tables="own"), Path("run"), until="build")
    assert not Path("run/foreign.json").exists()
    assert load(Path("run/engines/baseline/manifest.json"), EngineManifest).foreign == ()
