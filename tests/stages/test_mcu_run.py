"""A whole run for a small microcontroller: from images to C projects that fit it, the report, and again with nothing left to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification
from typer.testing import CliRunner

from nascompile import beside, cli, engine, journal, pipeline, space as spaces, table_view, targets, worker
from nascompile.data import DataSettings
from nascompile.errors import BudgetError, RecipeError, UnsupportedError
from nascompile.mcu import project, serial_line, toolchain
from nascompile.mcu.board import CORES
from nascompile.progress import Silent
from nascompile.records import (
    Choice,
    Correction,
    EngineManifest,
    Evaluation,
    Front,
    LatencyTable,
    Measurement,
    Score,
    TestResult,
    Workload,
    load,
    save,
)
from nascompile.settings import Budgets, FinetuneSettings, MeasureSettings, Recipe, SearchSettings, check

PROFILE = """kind = "qemu_m7"
backends = ["mcu_c"]
core = "cortex-m7"
clock_mhz = 100.0
ram_bytes = {ram}
flash_bytes = {flash}
ram = ["0x20000000:{ram}"]
flash = "0x08000000:{flash}"
"""
RAM, FLASH = 16384, 49152


def images(folder: Path) -> None:
    """Three classes: where the bright square is."""
    rng = np.random.default_rng(0)
    for number in range(360):
        pixels = rng.integers(0, 120, (12, 12), dtype=np.uint8)
        label = number % 3
        pixels[4 * label : 4 * label + 4] += 110
        place = folder / "abc"[label]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / f"{number}.png")


def recipe() -> Recipe:
    return check(Recipe(
        model="model", new_head=True, data=DataSettings(data="images", calibration_size=32), device="tiny",
        finetune=FinetuneSettings(teacher_epochs=6, epochs=1, batch_size=16, learning_rate=0.003),
        search=SearchSettings(searcher="nsga2", evaluations=8, population=8, calibration_samples=32, calibration_methods=("minmax",)),
        measure=MeasureSettings(top_k=1, seconds=0.1, batches=(1,), agreement=1),
    ))  # fmt: skip


def prepare() -> None:
    """Model, images and profiles in the working folder."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=24, image_size=12, patch_size=4, num_channels=1,
        initializer_range=0.2,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained("model")
    images(Path("images"))
    Path("profiles").mkdir()
    for name, ram, flash in (("tiny", RAM, FLASH), ("tiniest", 4608, FLASH)):
        Path(f"profiles/{name}.toml").write_text(PROFILE.format(ram=ram, flash=flash))


class Told(Silent):
    """Keeps what the search said of its front, in the working folder."""

    def standing(self, found):
        Path("standing").write_text(found.headline + " " + ", ".join(found.columns))


@pytest.fixture(scope="module")
def finished(into, tmp_path_factory, mcu_tools):
    """The working folder of a whole run."""
    with pytest.MonkeyPatch.context() as patch:
        folder = into(tmp_path_factory.mktemp("mcu"), patch)
        prepare()
        pipeline.run(recipe(), Path("run"), progress=Told())
        return folder


@pytest.fixture
def run(finished, monkeypatch, into) -> Path:
    into(finished, monkeypatch)
    return Path("run")


def test_engines_are_projects_that_fit(run):
    names = {path.name for path in (run / "engines").iterdir()}
    assert names == {"uniform-int8", "candidate-1"}, "there is no engine of the float network"
    for name in names:
        manifest = load(run / "engines" / name / "manifest.json", EngineManifest)
        assert engine.verify(run / "engines" / name)
        chip, facts = manifest.chip, project.facts(run / "engines" / name)
        assert 0 < chip.ram_bytes <= chip.ram_limit == RAM
        assert chip.flash_bytes == manifest.size_bytes == facts["flash"]["used"] <= chip.flash_limit == FLASH
        assert 100 < chip.stack_bytes < chip.stack_limit
        assert chip.instructions == sum(facts["reference"]["instructions"]) > 10_000
        assert {node.operator.precision.name for node in manifest.graph.nodes} == {"int8"}


def test_what_was_predicted_is_what_was_counted(run):
    table = load(run / "table.json", LatencyTable)
    assert max(abs(r.measured.value / r.predicted_ms - 1) for r in table.validation) < 0.01
    for _, predicted, modelled in load(run / "correction.json", Correction).residuals:
        assert modelled == pytest.approx(predicted, rel=0.01)
    for path in (run / "measurements").glob("*.json"):
        measurement = load(path, Measurement)
        manifest = load(run / "engines" / measurement.engine / "manifest.json", EngineManifest)
        assert measurement.latency.kind == "modelled"
        assert measurement.peak_memory_bytes == manifest.chip.ram_bytes
        point, space = manifest.candidate, manifest.space
        assert {name for _, genes in point.precision for _, name in genes} == {"int8"}
        assert [p.name for p in space.precisions] == ["int8"]
    [front, scored] = load(run / "front.json", Front), list(journal.read(run / "journal.jsonl", Evaluation))
    assert [(b.metric, b.bound, b.limit) for b in front.budgets] == [("memory_mb", RAM / 1e6, True), ("size_mb", FLASH / 1e6, True)]
    assert all(e.memory_bytes <= RAM and e.size_bytes <= FLASH for e in scored)
    chosen = load(run / "engines" / "candidate-1" / "manifest.json", EngineManifest)
    own = next(e for e in scored if e.candidate == chosen.candidate)
    assert (own.memory_bytes, own.size_bytes) == (chosen.chip.ram_bytes, chosen.chip.flash_bytes), "exact before anything is built"


def test_accuracy_is_of_the_engines_bytes_and_the_baseline_of_floats(run):
    result, choice = load(run / "test.json", TestResult), load(run / "choice.json", Choice)
    scores = dict(result.scores)
    assert set(scores) == {"baseline", "uniform-int8", choice.engine}
    assert load(run / "baseline.json", Score).value > 60, "it has learned something"
    assert {d.reference for d in result.differences} == set(scores) - {choice.engine}
    agreement = json.loads((run / "agreement.json").read_bytes())
    assert agreement["mean_absolute_points"] <= 5
    assert " modelled" in choice.reason
    assert Path("standing").read_text().endswith(" on the front modelled ms, accuracy, MB")


def test_the_report_says_what_is_counted_and_what_is_modelled(run):
    facts = json.loads((run / "report.json").read_bytes())
    assert [e["role"] for e in facts["engines"]] == ["uniform", "candidate"]
    assert facts["chip"]["float_test"]["value"] == dict(load(run / "test.json", TestResult).scores)["baseline"].value
    assert facts["summary"]["tasks"][0]["baseline"] == {
        "accuracy": facts["chip"]["float_test"]["value"], "accuracy_split": "test", "latency_ms": None, "p50_ms": None,
        "throughput": None, "size_bytes": None,
    }  # fmt: skip
    assert facts["engines"][0]["speedup"] == 1.0, "speed is relative to the uniform engine"
    assert facts["headline"]["change"]["value"] is not None
    html, text = ((run / f"report.{suffix}").read_text("utf-8") for suffix in ("html", "md"))
    for page in (html, text):
        assert "counted" in page
        assert "modelled" in page
        assert f"{facts['engines'][1]['chip']['instructions']:,}" in page
        assert "no engine can be made" in page or "there is no engine" in page
    done = CliRunner().invoke(cli.app, ["report", "--out", str(run)])
    assert done.exit_code == 0, done.output
    ways = {c["command"] for c in facts["reproduce"]["commands"]}
    assert f"make -C {run}/engines/candidate-1 run" in ways
    assert not any("run.py" in way for way in ways), "a C project has none"
    assert {"instructions,", "counted", "modelled", "RAM", "flash", "stack"} <= set(done.stdout.split())
    assert "Milliseconds are modelled" in " ".join(done.stdout.split())


def test_tables_show_instructions(run):
    table = load(run / "table.json", LatencyTable)
    rows = table_view.rows_of(table)
    assert all(row["instructions"] == round(row["ms"] * 100e3 / 0.925) for row in rows)
    [path] = Path("latency_tables/tiny").glob("*.json")
    shown = CliRunner().invoke(cli.app, ["table", "show", str(path)])
    assert "instructions" in shown.stdout
    assert "modelled, not measured" in " ".join(shown.stdout.split())
    checked = CliRunner().invoke(cli.app, ["table", "validate", str(path), "--canary", "--run", str(run)])
    assert checked.exit_code == 0, checked.output
    assert "1.000 times" in checked.stdout


def test_again_there_is_nothing_to_do(run, monkeypatch):
    for stage in pipeline.STAGES:
        monkeypatch.setattr(pipeline.Context, f"_{stage}", lambda self, stage=stage: pytest.fail(f"{stage} was done again"))
    pipeline.run(recipe(), run)


def test_another_run_takes_the_table_and_the_scores(run):
    """A latency budget later: the table is found and its canary repeats, what was scored is not scored again."""
    before = (run / "journal.jsonl").read_bytes()
    other = msgspec.structs.replace(recipe(), budgets=Budgets(max_drop=50.0))
    Path("other").mkdir(exist_ok=True)
    pipeline.run(other, Path("other"), until="profile")
    assert load(Path("other/table.json"), LatencyTable) == load(run / "table.json", LatencyTable)
    assert (run / "journal.jsonl").read_bytes() == before


def test_one_more_of_the_front(run):
    folder = beside.build_candidate(run, 1)
    assert load(folder / "manifest.json", EngineManifest).chip.ram_bytes <= RAM
    with pytest.raises(UnsupportedError, match="takes no graph that passes could change"):
        beside.check_passes(folder)


def test_a_candidate_on_a_board(run, monkeypatch):
    """Built, then sent to the board by the profile's settings; QEMU stands for the board."""
    lines, said = [], []

    def board(folder, settings, samples):
        lines.append(settings)
        return toolchain.run_emulated(folder, CORES["cortex-m7"], samples)

    class Noted(Silent):
        def note(self, text):
            said.append(text)

    with monkeypatch.context() as patch:
        patch.setattr(serial_line, "run", board)
        patch.setattr(toolchain, "UNITS", ("", "cycles", "cycles"))
        profile = PROFILE.format(ram=RAM, flash=FLASH).replace("qemu_m7", "serial_m7")
        Path("profiles/board.toml").write_text(f'{profile}[session]\nport = "/dev/no"\nmake = "firmware_board.elf BOARD=b.c"\n')
        folder = beside.build_candidate(run, 1, Noted(), device="board")
        beside.build_candidate(run, 1, Noted(), device="board")
    count = load(folder / "manifest.json", EngineManifest).chip.instructions
    assert lines == [serial_line.Settings("/dev/no", "", "firmware_board.elf BOARD=b.c")] * 2, "a board is asked each time"
    [first, again] = [text for text in said if text.startswith("board: ")]
    assert first == again == f"board: {count / 1e5:.4g} ms measured, 5 calls; outputs as on this computer"


# ---------------------------------------------------------------------------------------------- what cannot be


def test_what_does_not_fit_another_board_names_those_that_do(run, tmp_path):
    """A front of the smallest and the largest network, for a board that has room for one of them."""
    front = load(run / "front.json", Front)
    ends = [spaces.smallest(front.space), spaces.largest(front.space), spaces.smallest(front.space)]
    shutil.copytree(run, tmp_path / "run")
    two = msgspec.structs.replace(front, evaluations=tuple(msgspec.structs.replace(front.evaluations[0], candidate=c) for c in ends))
    save(two, tmp_path / "run" / "front.json")
    Path("profiles/smaller.toml").write_text(PROFILE.format(ram=5184, flash=FLASH))
    try:
        with pytest.raises(BudgetError, match="the peak is at `layers") as caught:
            beside.build_candidate(tmp_path / "run", 2, device="smaller")
        assert caught.value.hint == "of this front 1, 3 would fit: --candidate 3"
        assert beside.build_candidate(tmp_path / "run", 3, device="smaller").name == "front-3-smaller"
    finally:
        Path("profiles/smaller.toml").unlink()
    with pytest.raises(BudgetError) as caught:
        beside.build_candidate(tmp_path / "run", 1, device="tiniest")
    assert caught.value.hint == "none of this front fits: search with --device tiniest"


def test_a_device_without_limits_needs_no_budget_to_be_built_for(run):
    done = CliRunner().invoke(cli.app, ["build", "--out", str(run), "--candidate", "1", "--device", "cpu", "-q"])
    assert done.exit_code == 0, done.output
    assert done.stdout.split() == [str(run / "engines" / "front-1-cpu")]


def test_nothing_fits(run):
    small = msgspec.structs.replace(recipe(), device="tiniest")
    with pytest.raises(BudgetError, match=r"no network of the space fits `tiniest`: .* bytes of RAM \(4,608 there\)"):
        pipeline.run(small, Path("small"))


def test_a_budget_that_nothing_keeps_names_the_nearest(run):
    fast = msgspec.structs.replace(recipe(), budgets=Budgets(latency_ms=0.001))
    context = pipeline.Context(fast, run, pipeline.Silent(), pipeline.Given())
    context.done = {}
    says = r"no candidate meets the budget: latency_ms ≤ 0\.001, memory_mb ≤ 0\.016384 \(all the RAM"
    with pytest.raises(BudgetError, match=says) as caught:
        context._search()
    assert "nearest: " in caught.value.detail
    assert caught.value.hint.startswith("raise `--latency-ms` to ")


def test_one_core_and_one_backend(run):
    with pytest.raises(RecipeError, match="`tiny` has one core, so there are no 2 threads"):
        pipeline.run(msgspec.structs.replace(recipe(), threads=2), Path("refused"))
    with pytest.raises(UnsupportedError, match="no backend named onnxruntime") as caught:
        pipeline.run(msgspec.structs.replace(recipe(), backend="onnxruntime"), Path("refused"))
    assert caught.value.hint == "its backends: mcu_c", "and not auto, which is refused"


def test_milliseconds_of_an_explanation_are_modelled(run):
    target = targets.make("tiny", "", Workload())
    assert targets.time_unit(target) == "modelled ms"
    assert targets.time_unit(targets.make("cpu", "", Workload())) == "ms"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"also": ("cpu",)}, "a search for `tiny` and `cpu` together is not there yet"),
        ({"backend": "auto"}, "--backend auto compares ways to run an engine"),
        ({"measure": MeasureSettings(tune_session=True)}, "--tune-session compares ways"),
        ({"search": SearchSettings(precisions=("weight-int8",))}, "programs for `tiny` are whole in int8"),
        ({"model": "toy"}, "no microcontroller program for the family toy"),
    ],
)
def test_what_a_microcontroller_has_not_is_refused_before_any_work(run, changes, says):
    with pytest.raises(UnsupportedError, match=says):
        pipeline.run(msgspec.structs.replace(recipe(), **changes), Path("refused"))
    assert not Path("refused/stages").exists()


def test_a_plan_says_what_is_done(run):
    what = {row["stage"]: row["what"] for row in pipeline.plan(recipe(), Path("nowhere"))}
    assert "count every operator" in what["profile"]
    assert "C projects" in what["build"]


def test_workers_score_programs_as_this_process_does(run):
    context = pipeline.Context(recipe(), run.resolve(), pipeline.Silent(), pipeline.Given())
    bench, point = context._bench("minmax"), load(run / "front.json", Front).evaluations[0].candidate
    assert bench.program == context.target
    answer = worker.load(bench)(worker.Job(candidate=point))
    assert answer.score == context.evaluator(run / "supernet", "minmax").score(point)


@pytest.mark.parametrize(("device", "name"), [("stm32f427", "front-1-stm32f427"), ("cpu", "front-1-cpu")])
def test_a_candidate_for_another_device(run, device, name):
    """Another microcontroller, whose integers are the same; and a runtime, which has floats where nothing was searched."""
    folder = beside.build_candidate(run, 1, device=device)
    assert folder.name == name
    manifest = load(folder / "manifest.json", EngineManifest)
    assert (manifest.target.device, manifest.chip is None) == (device, device == "cpu")
    assert dict(manifest.precision_counts) == ({"fp32": 2, "int8": 2} if device == "cpu" else {"int8": 4})
    assert engine.verify(folder)
