"""`search --explain` on a run: printed, kept, in the report, and gone where the search is another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

from nascompile import beside, cli, pipeline
from nascompile.records import Explanation, Front, digest, encode, load
from nascompile.settings import Recipe


def searched(quick: Recipe, evaluations: int) -> Recipe:
    return msgspec.structs.replace(quick, search=msgspec.structs.replace(quick.search, evaluations=evaluations))


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["search", "--explain", "--out", "run", "--quiet", *arguments])


def test_a_search_is_explained_and_the_report_shows_it(quick: Recipe, elsewhere: Path) -> None:
    run = Path("run")
    pipeline.run(searched(quick, 24), run)
    assert "What the genes matter" not in (run / "report.html").read_text()
    done = invoke("--json")
    assert done.exit_code == 0, done.output
    body = json.loads(done.stdout)
    found = load(run / "explain.json", Explanation)
    assert body == {"run": "run", **json.loads(encode(found))}
    front = load(run / "front.json", Front)
    assert (found.front_digest, found.scored) == (digest(front), front.scored) == (digest(front), 24)
    assert {g.gene for g in found.genes} == {gene.name for gene in front.space.genes}
    context = pipeline.Context(searched(quick, 24), run, pipeline.Silent(), pipeline.Given())
    for t in found.layers:
        assert t.kind == "predicted" or t.spread is None
    base = context.pricing(found.base)[0]["latency_ms"]
    assert all(saved < base for t in found.layers for saved in t.ms)
    done = invoke()
    assert done.exit_code == 0, done.output
    assert f"R² {found.r2:.2f}" in done.stdout
    assert load(run / "explain.json", Explanation) == found
    # the report is written again, nothing else is done again
    before = (run / "test.json").stat().st_mtime_ns
    pipeline.run(searched(quick, 24), run)
    assert (run / "test.json").stat().st_mtime_ns == before
    assert "What the genes matter" in (run / "report.html").read_text()


def test_another_search_is_not_explained_by_the_one_before(quick: Recipe, elsewhere: Path) -> None:
    run = Path("run")
    pipeline.run(searched(quick, 20), run, until="search")
    first = beside.explain_search(run)
    pipeline.run(searched(quick, 26), run, until="search")
    second = beside.explain_search(run)
    assert (first.scored, second.scored) == (20, 26)


def test_too_few_candidates_are_an_error_with_a_hint(quick: Recipe, elsewhere: Path) -> None:
    pipeline.run(quick, Path("run"), until="search")
    done = invoke()
    assert done.exit_code == 1
    assert "too few scored candidates to explain anything: 12" in done.stderr
    assert "--evaluations 16" in done.stderr


@pytest.mark.parametrize("flag", ["--workers", "--patience"])
def test_what_cannot_be_meant_is_refused(flag: str, elsewhere: Path) -> None:
    done = CliRunner().invoke(cli.app, ["search", "--device", "fake", "--out", "run", "--quiet", flag, "-1"])
    assert done.exit_code == 1
    assert f"search.{flag.strip('-')} = -1" in done.stderr
