"""The report says what the records say, says what is missing, and lets no user text become markup."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from nascompile import journal, records, settings
from nascompile.errors import RecordError
from nascompile.records import Choice, EngineManifest, Evaluation, LatencyTable
from nascompile.report import closing_table, duration, file_size, gather, number, report, signed, summary, toml

ROOT = Path(__file__).parents[2]
NOTE = "nothing was trained, searched or measured"


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = importlib.util.spec_from_file_location("sample_run", ROOT / "tools" / "sample_run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder: Path = module.write(tmp_path_factory.mktemp("runs") / "sample")
    return folder


@pytest.fixture
def run(sample: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(sample, tmp_path / "sample"))


def raw(path: Path) -> Any:
    """A record's plain data, without our reader."""
    return json.loads(path.read_text())["data"]


def edit(path: Path, change: Callable[[Any], None]) -> None:
    body = json.loads(path.read_text())
    change(body["data"] if "record" in body else body)
    path.write_text(json.dumps(body))


def own_html(html: str) -> str:
    """The page without plotly's script and without the data of the charts, which is tested as JSON."""
    from plotly.offline import get_plotlyjs

    return re.sub(r'<script type="application/json".*?</script>', "", html.replace(get_plotlyjs(), ""), flags=re.S)


# ---------------------------------------------------------------------------------------------- numbers


def test_summary_has_the_documented_keys_and_the_measured_numbers(run: Path) -> None:
    found = summary(run)
    assert set(found) == {"tasks", "environment", "run", "engine"}
    (task,) = found["tasks"]
    assert {"name", "baseline", "uniform_int8", "chosen", "seconds"} == set(task)
    scores = dict(raw(run / "test.json")["scores"])
    for key, engine in (("baseline", "baseline"), ("uniform_int8", "uniform-int8"), ("chosen", "candidate-1")):
        measurement = raw(run / "measurements" / f"{engine}.json")
        assert task[key]["p50_ms"] == dict(map(tuple, measurement["latency"]["quantiles"]))[0.5]
        assert task[key]["throughput"] == next(q["value"] for batch, q in measurement["throughput"] if batch == 1)
        assert task[key]["size_bytes"] == raw(run / "engines" / engine / "manifest.json")["size_bytes"]
        assert (task[key]["accuracy"], task[key]["accuracy_split"]) == (scores[engine]["value"], "test")
    assert task["chosen"]["predicted_ms"] == raw(run / "engines" / "candidate-1" / "manifest.json")["predicted"]["value"]
    assert task["chosen"]["candidate"]["architecture"]["depth"] == 5
    assert task["seconds"]["search"] == 62.4
    assert list(task["seconds"]) == ["data", "profile", "finetune", "search", "build", "measure", "rerank"]
    assert found["environment"]["threads"] == 1
    assert found["engine"] == str(run / "engines" / "candidate-1")


def test_report_json_holds_the_summary_and_the_documented_sections(run: Path) -> None:
    import nascompile.report as module

    body = json.loads(report(run)[2].read_text())
    assert body["summary"] == summary(run)
    for section in body:
        assert section in ("name", "note") or re.search(rf"^  {section} ", module.__doc__ or "", flags=re.M), section


def test_before_test_is_read_the_summary_says_validation(run: Path) -> None:
    (run / "test.json").unlink()
    chosen = summary(run)["tasks"][0]["chosen"]
    score = raw(run / "measurements" / "candidate-1.json")["score"]["value"]
    assert (chosen["accuracy"], chosen["accuracy_split"]) == (score, "validation")
    html = report(run)[0].read_text()
    assert "no interval: test has not been read" in html


def test_speedup_is_throughput_over_the_baselines_at_the_same_batch(run: Path) -> None:
    def slower(body: Any) -> None:
        body["throughput"] = [[8, body["throughput"][1][1] | {"value": 5000.0}], [1, body["throughput"][0][1] | {"value": 100.0}]]

    edit(run / "measurements" / "baseline.json", slower)
    engines = {e["name"]: e for e in gather(run)["engines"]}
    ours = next(q["value"] for batch, q in raw(run / "measurements" / "candidate-1.json")["throughput"] if batch == 1)
    assert engines["candidate-1"]["speedup"] == pytest.approx(ours / 100, rel=1e-12)
    assert engines["baseline"]["throughput_best"]["batch"] == 8


def test_engines_are_listed_baseline_uniform_chosen_then_by_rank(run: Path) -> None:
    names = [e["name"] for e in gather(run)["engines"]]
    ranking = raw(run / "choice.json")["ranking"]
    assert names == ["baseline", "uniform-int8", "candidate-1", *(name for name in ranking if name != "candidate-1")]


def test_operator_times_are_the_tables_rows_times_its_scale(run: Path) -> None:
    table = records.load(run / "table.json", LatencyTable)
    for engine in gather(run)["operators"]["engines"]:
        graph = records.load(run / "engines" / engine["name"] / "manifest.json", EngineManifest).graph
        assert graph is not None
        assert table.call is not None
        expected = table.call.value * table.scale
        for node in graph.nodes:
            (row,) = [row for row in table.rows if row.operator == node.operator]
            expected += row.latency.value * table.scale
        assert engine["total_ms"] == pytest.approx(expected, rel=1e-12)
        assert sum(engine["by_kind"].values()) == pytest.approx(expected, rel=1e-12)


def test_an_operator_without_a_row_is_named_and_not_guessed(run: Path) -> None:
    edit(run / "table.json", lambda body: body["rows"].pop(0))  # the embedding
    for engine in gather(run)["operators"]["engines"]:
        assert [text.partition(":")[0] for text in engine["without_row"]] == ["embedding"]
        assert "embedding" not in engine["by_kind"]
    assert "so its sum is incomplete" in report(run)[0].read_text()


def test_residuals_and_their_mean_follow_the_correction(run: Path) -> None:
    stated = {name: (predicted, measured) for name, predicted, measured in raw(run / "correction.json")["residuals"]}
    found = gather(run)["prediction"]
    for row in found["engines"]:
        predicted, measured = stated[row["engine"]]
        assert row["residual_percent"] == pytest.approx((measured - predicted) / predicted * 100, abs=1e-9)
        interval = raw(run / "engines" / row["engine"] / "manifest.json")["predicted"]
        assert row["inside"] == (interval["low"] <= measured <= interval["high"])
    mean = sum(abs(predicted - measured) / measured for predicted, measured in stated.values()) / len(stated)
    assert found["mape_engines"] == pytest.approx(100 * mean, rel=1e-9)


def test_latencies_in_other_units_become_milliseconds_and_unknown_ones_are_refused(run: Path) -> None:
    before = gather(run)["operators"]["engines"][0]["total_ms"]

    def microseconds(body: Any) -> None:
        for row in body["rows"]:
            row["latency"] |= {"value": row["latency"]["value"] * 1000, "unit": "us"}

    edit(run / "table.json", microseconds)
    assert gather(run)["operators"]["engines"][0]["total_ms"] == pytest.approx(before, rel=1e-12)
    edit(run / "table.json", lambda body: body["rows"][0]["latency"].update(unit="cycles"))
    with pytest.raises(RecordError, match="unknown unit: cycles"):
        gather(run)


def test_simulated_latency_is_never_called_measured(run: Path) -> None:
    for path in (run / "measurements").glob("*.json"):
        edit(path, lambda body: body["latency"].update(kind="simulated"))
        edit(path, lambda body: [q.update(kind="simulated") for _, q in body["throughput"]])
    html, markdown, _ = (path.read_text() for path in report(run))
    text = own_html(html).partition("<body>")[2].partition("<footer>")[0].replace(NOTE, "")
    text = re.sub(r"<script>.*?</script>", "", text, flags=re.S)
    assert "measured" not in text.lower()
    assert "measured" not in markdown.replace(NOTE, "").lower()
    assert "1,200 calls" in text
    assert text.count("simulated") >= 8


def test_modelled_milliseconds_say_by_what_model(run: Path) -> None:
    sentence = "Milliseconds are modelled, not measured: two cycles per instruction."
    assert all(sentence not in path.read_text() for path in report(run))
    for path in (run / "measurements").glob("*.json"):
        edit(path, lambda body: body["latency"].update(kind="modelled"))
        edit(path, lambda body: body["environment"]["must_match"].append(["modelled", "two cycles per instruction"]))
    html, markdown, facts = (path.read_text() for path in report(run))
    assert sentence in own_html(html)
    assert sentence in markdown
    assert sentence in facts
    for page in (own_html(html), markdown):
        assert len(re.findall("[Pp]redicted(?:<small>)?[ ]?modelled ms", page)) >= 3, "tables of engines, of the front, of blocks"
        assert not re.findall("[Pp]redicted(?:<small>)?[ ]?ms", page)
    assert any(str(column.header) == "predicted modelled ms" for column in closing_table(run).columns)
    table = closing_table(run)
    assert table.caption == sentence
    assert any(str(column.header).startswith("modelled ") for column in table.columns)


def test_the_drawing_has_every_block_with_the_part_that_is_kept(run: Path) -> None:
    drawing = gather(run)["architecture"]
    chosen = raw(run / "engines" / "candidate-1" / "manifest.json")
    genes = dict(map(tuple, chosen["candidate"]["architecture"]))
    whole = [node["name"] for node in raw(run / "engines" / "baseline" / "manifest.json")["graph"]["nodes"]]
    kept = {node["name"]: node for node in chosen["graph"]["nodes"]}
    assert [b["block"] for b in drawing["blocks"]] == whole
    assert (drawing["layers_kept"], drawing["layers_full"]) == (5, 6)
    for block in drawing["blocks"]:
        assert block["kept"] == (block["block"] in kept)
        if not block["kept"]:
            assert block["fraction"] == 0
        elif block["kind"] == "attention":
            assert block["fraction"] == pytest.approx(genes[block["block"].replace("attention", "heads")] / 5)
        elif block["kind"] == "mlp":
            assert block["fraction"] == pytest.approx(genes[block["block"].replace("mlp", "width")] / 640)
        else:
            assert block["fraction"] == 1
    html = report(run)[0].read_text()
    assert html.count('<li class="attention dropped">') == 1
    assert html.count('<li class="mlp dropped">') == 1


def test_scored_candidates_come_from_the_journal_once_and_only_those_of_this_search(run: Path) -> None:
    lines = (run / "journal.jsonl").read_bytes().splitlines(keepends=True)
    unique = {json.dumps(json.loads(line)["data"]["candidate"]) for line in lines}
    old = next(e for e in journal.read(run / "journal.jsonl", Evaluation))
    (run / "journal.jsonl").write_bytes(b"".join([*lines, lines[0]]))
    journal.append(run / "journal.jsonl", msgspec.structs.replace(old, score=msgspec.structs.replace(old.score, weights_digest="older")))
    with (run / "journal.jsonl").open("ab") as stream:
        stream.write(b'{"data": {"candidate": {"spa')
    found = gather(run)["front"]
    assert len(found["scored"]) + len(found["points"]) == len(unique)


def test_the_uniform_engine_can_be_the_choice(run: Path) -> None:
    choice = records.load(run / "choice.json", Choice)
    records.save(msgspec.structs.replace(choice, engine="uniform-int8"), run / "choice.json")
    body = gather(run)
    assert body["headline"]["engine"]["title"] == "Chosen: Uniform INT8"
    assert [e["name"] for e in body["operators"]["engines"]] == ["baseline", "uniform-int8"]
    report(run)


# ---------------------------------------------------------------------------------------------- what is missing


@pytest.mark.parametrize(
    ("gone", "expected"),
    [
        ("choice.json", "No engine has been chosen yet"),
        ("test.json", "Test is read once, after the choice"),
        ("front.json", "Not available: front.json (stage search)"),
        ("journal.jsonl", "Not available: journal.jsonl (stage search)"),
        ("table.json", "Not available: table.json (stage profile)"),
        ("correction.json", "Not available: correction.json (stage rerank)"),
        ("agreement.json", "Not available: agreement.json (stage measure)"),
        ("measurements", "Not available: measurements (stage measure)"),
        ("engines", "Not available: engines (stage build)"),
        ("stages", "Not available: stages"),
        ("data", "Not available: data/data.json"),
        ("recipe.json", "Not available: recipe.json"),
    ],
)
def test_a_missing_record_is_said_in_its_section(run: Path, gone: str, expected: str) -> None:
    assert expected not in report(run)[0].read_text()
    shutil.rmtree(run / gone) if (run / gone).is_dir() else (run / gone).unlink()
    html, markdown, body = report(run)
    assert expected in html.read_text()
    json.loads(body.read_text())
    if expected.startswith("Not available: ") and gone not in ("journal.jsonl", "measurements"):
        assert expected in markdown.read_text()
    closing_table(run)


def test_an_empty_run_folder_still_reports(tmp_path: Path) -> None:
    html, markdown, body = report(tmp_path)
    assert "No engine has been chosen yet" in html.read_text()
    assert "No engine has been chosen yet" in markdown.read_text()
    assert json.loads(body.read_text())["summary"]["tasks"][0]["chosen"] is None


def test_no_folder_and_damaged_records_are_errors(run: Path, tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="no such run folder"):
        report(tmp_path / "nothing")
    for name, content in (("front.json", b'{"record": "Fr'), ("agreement.json", b"[]"), ("recipe.json", b"{")):
        good = (run / name).read_bytes()
        (run / name).write_bytes(content)
        with pytest.raises(RecordError, match=re.escape(name)):
            report(run)
        (run / name).write_bytes(good)


# ---------------------------------------------------------------------------------------------- text and files

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(1)> | **b** `c` [x](javascript:alert)"


def test_no_user_text_becomes_markup(run: Path) -> None:
    edit(run / "recipe.json", lambda body: body.update(name=EVIL, note=EVIL))
    edit(run / "data" / "data.json", lambda body: body.update({"label_names": [EVIL], EVIL: 1}))
    edit(run / "data" / "data.json", lambda body: body["splits"][0].update(name=EVIL, class_counts=[[EVIL, 3]]))
    edit(run / "choice.json", lambda body: body.update(reason=EVIL, rejected=[["candidate-2", EVIL]]))
    edit(run / "engines" / "candidate-2" / "manifest.json", lambda body: body.update(name=EVIL))
    edit(run / "agreement.json", lambda body: body["pairs"][0].__setitem__(0, EVIL))
    html, markdown, _ = report(run)
    text = html.read_text()
    assert "<script>alert" not in text
    assert "<img" not in own_html(text)
    assert text.count("</script>") == 3
    outside_code = re.sub(r"^    .*$", "", markdown.read_text(), flags=re.M)
    assert "<script" not in outside_code
    assert "<img" not in outside_code
    assert "](javascript" not in outside_code.replace("\\]", "")
    assert_tables_are_whole(markdown.read_text())


def test_the_page_refers_to_nothing_outside_itself(run: Path) -> None:
    text = own_html(report(run)[0].read_text())
    assert re.findall(r"""(?:src|href|action)\s*=\s*["']?(?!#|data:)[^"'\s>]+""", text) == []
    assert not re.search(r"@import|url\(\s*[\"']?(?!#)|https?://", text)
    assert "default-src 'none'" in text


def test_ids_are_unique_and_labels_point_at_them(run: Path) -> None:
    text = own_html(report(run)[0].read_text())
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    for target in re.findall(r'aria-labelledby="([^"]+)"|href="#([^"]+)"', text):
        assert (target[0] or target[1]) in [*ids, "facts"]
    for chart in re.findall(r'<div id="plot-[^>]*>', text):
        assert 'role="img"' in chart
        assert re.search(r'aria-label="[^"]{30,}"', chart)


def test_two_reports_of_one_run_are_equal_byte_for_byte(run: Path) -> None:
    first = [path.read_bytes() for path in report(run)]
    assert first == [path.read_bytes() for path in report(run)]


def test_markdown_tables_have_as_many_cells_as_columns(run: Path) -> None:
    assert_tables_are_whole(report(run)[1].read_text())


def assert_tables_are_whole(markdown: str) -> None:
    width = 0
    for line in markdown.splitlines():
        cells = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else 0
        assert not (width and cells) or cells == width, line
        width = cells


def test_the_closing_table_shows_every_engine(run: Path) -> None:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=200, no_color=True)
    console.print(closing_table(run))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for name in ("Baseline", "Uniform INT8", "Chosen: candidate-1", "candidate-2", "1.00×"):
        assert name in text


def test_the_recipe_is_valid_toml_with_the_same_settings() -> None:
    body = {"name": 'a "b" ü', "rate": 5e-4, "seed": 3, "on": True, "none": None, "list": [1, 2]}
    body["search"] = {"x y": "z", "deep": {"a": [0.5]}}
    expected = {key: value for key, value in body.items() if value is not None}
    assert tomllib.loads(toml(body)) == expected


def test_a_stored_recipe_comes_back_from_the_printed_one(run: Path) -> None:
    recipe = settings.demo_recipe()
    records.save(recipe, run / "recipe.json")
    printed = gather(run)["reproduce"]["toml"]
    assert settings.from_mapping(tomllib.loads(printed), "the report") == recipe


def test_numbers_read_well() -> None:
    assert [number(v) for v in (1234.5, 99.9, 12.34, 1.234, 0.01234, 0, -0.5, None)] == [
        "1,234",
        "99.9",
        "12.3",
        "1.23",
        "0.0123",
        "0",
        "-0.500",
        "–",
    ]
    assert [signed(v) for v in (0.5, -0.5)] == ["+0.50", "−0.50"]
    assert [file_size(v) for v in (6400, 2_500_000)] == ["6.40 kB", "2.50 MB"]
    assert [duration(v) for v in (4.21, 65, 3725)] == ["4.2 s", "1 min 05 s", "1 h 02 min"]


# ---------------------------------------------------------------------------------------------- how the search ended, what it learned


def test_a_search_that_was_stopped_is_said_to_be(run: Path) -> None:
    assert "stopped" not in summary(run)["tasks"][0]
    assert all("stopped early" not in path.read_text() for path in report(run)[:2])
    edit(run / "front.json", lambda body: body.update(stopped="no better hypervolume in 3 batches"))
    assert summary(run)["tasks"][0]["stopped"] == "no better hypervolume in 3 batches"
    for path in report(run)[:2]:
        assert "It was stopped early: no better hypervolume in 3 batches." in path.read_text()


def explanation(run: Path, **changes: Any) -> records.Explanation:
    front = records.load(run / "front.json", records.Front)
    found = records.Explanation(
        front_digest=records.digest(front), metric="accuracy", model="ridge", r2=0.812, others=(("forest", 0.64),), trust="large ones only",
        scored=40, targets=("synthetic-cpu",), base=front.evaluations[-1].candidate,
        genes=(
            records.GeneImportance(gene="layers.0.heads", points=0.25, ms=(0.125,)),
            records.GeneImportance(gene="depth", points=1.5, ms=(0.0625,)),
        ),
        layers=(
            records.Thinning(layer=-1, change="depth 6 to 5, without layer 4", points=0.7, spread=0.2, ms=(0.3,), kind="predicted"),
            records.Thinning(layer=2, change="heads 5 to 2", points=-0.125, spread=None, ms=(0.1,), kind="scored"),
        ),
    )  # fmt: skip
    return msgspec.structs.replace(found, **changes)


def test_what_the_search_learned_is_in_the_report_with_its_r2(run: Path) -> None:
    assert "explain" not in gather(run)
    records.save(explanation(run), run / "explain.json")
    found = gather(run)["explain"]
    assert [g["gene"] for g in found["genes"]] == ["depth", "layers.0.heads"]
    assert [(t["title"], t["kind"]) for t in found["layers"]] == [("Layer 3", "scored"), ("Fewer layers", "predicted")]
    html, markdown, _ = report(run)
    for text in (own_html(html.read_text()), markdown.read_text()):
        assert "0.81" in text
        assert "forest 0.64" in text
        assert "large ones only" in text
        assert "1.500" in text
        assert "−0.12" in text
        assert "+0.70" in text
        assert "scored" in text


def test_what_an_earlier_search_learned_is_not_shown(run: Path) -> None:
    records.save(explanation(run, front_digest="of another front"), run / "explain.json")
    assert "explain" not in gather(run)
    assert "What the genes matter" not in report(run)[0].read_text()
