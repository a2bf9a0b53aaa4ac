"""Engines chosen among backends and session settings: whole runs of the toy with rivals from another package, and a real ViT."""

from __future__ import annotations

import csv
import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import nascompile
from nascompile import beside, cli, engine, measure, pipeline, plugins, report, targets, variants
from nascompile.errors import UnsupportedError
from nascompile.records import Choice, Correction, EngineManifest, Front, Measurement, load
from nascompile.settings import Recipe

RIVALS = '''
import msgspec
from nascompile.backends.fake import Fake, FakeRunner
from nascompile.records import FLOAT32

class Runner:
    def __init__(self, inner, share, off):
        self.inner, self.share, self.off = inner, share, off
    def run(self, inputs):
        return {name: value + value.dtype.type(self.off) for name, value in self.inner.run(inputs).items()}
    def simulated_ms(self, batch):
        return self.share * self.inner.simulated_ms(batch)

class Swift(Fake):
    name, share, off, width_multiple, devices = "swift", 0.5, 0.0, 16, ("fake",)
    tunable = (("turbo", ("off", "on", "odd")),)
    def session(self):
        return (("lanes", "2"),)
    def load(self, folder, graphs, target):
        settings = dict(target.session)
        turbo = settings.pop("turbo", "off")
        assert settings == {"lanes": "2"} and turbo != "odd", settings
        share = self.share * (0.8 if turbo == "on" else 1.0)
        return Runner(FakeRunner(folder / graphs[0], msgspec.structs.replace(target, session=())), share, self.off)

class Wrong(Swift):
    name, share, off = "wrong", 0.1, 100.0

class Broken(Swift):
    name = "broken"
    def build(self, form, target, folder):
        raise RuntimeError("cannot read this graph")

class Floats(Swift):
    name, share = "floats", 0.01
    def supports(self, precision):
        return "" if precision == FLOAT32 else "floats is for floats"

class Absent(Swift):
    name = "absent"
    def unavailable(self):
        return "absent is not installed: pip install absent"

SWIFT, WRONG, BROKEN, FLOATS, ABSENT = Swift(), Wrong(), Broken(), Floats(), Absent()
'''
NAMES = ("swift", "wrong", "broken", "floats", "absent")
BOARD = 'kind = "fake"\nbackends = ["fake", "swift", "wrong", "broken", "floats", "absent", "unheard-of"]\n'


@pytest.fixture(scope="module")
def rivals(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Another package with backends of its own, installed for these tests."""
    site = tmp_path_factory.mktemp("site")
    (site / "rival_backends.py").write_text(RIVALS)
    (site / "rivals-1.0.dist-info").mkdir()
    (site / "rivals-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: rivals\nVersion: 1.0\n")
    points = "\n".join(f"{name} = rival_backends:{name.upper()}" for name in NAMES)
    (site / "rivals-1.0.dist-info" / "entry_points.txt").write_text(f"[nascompile.backends]\n{points}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        importlib.invalidate_caches()
        for cached in (plugins.names, plugins.get):
            cached.cache_clear()
        yield
    for cached in (plugins.names, plugins.get):
        cached.cache_clear()


def auto(recipe: Recipe, **measure: Any) -> Recipe:
    return msgspec.structs.replace(
        recipe, device="board", backend=targets.AUTO, measure=msgspec.structs.replace(recipe.measure, **measure)
    )


@pytest.fixture(scope="module")
def finished(quick: Recipe, into: Any, rivals: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run whose engines were chosen among backends and settings."""
    with pytest.MonkeyPatch.context() as patch:
        folder = into(tmp_path_factory.mktemp("rivals"), patch)
        torch.set_num_threads(1)
        (folder / "profiles").mkdir()
        (folder / "profiles" / "board.toml").write_text(BOARD)
        pipeline.run(auto(quick, tune_session=True), Path("run"))
        return folder


@pytest.fixture
def run(finished: Path, elsewhere: Path) -> Path:
    """A copy to go on with."""
    shutil.copytree(finished, elsewhere, dirs_exist_ok=True)
    return Path("run")


def manifests(run: Path) -> dict[str, EngineManifest]:
    return {path.parent.name: load(path, EngineManifest) for path in sorted(run.glob("engines/*/manifest.json"))}


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


# ---------------------------------------------------------------------------------------------- a whole run


def test_the_search_is_for_the_default_and_engines_are_of_the_fastest_backend(finished: Path) -> None:
    run = finished / "run"
    front, found = load(run / "front.json", Front), manifests(run)
    assert front.target.backend == "fake"
    assert set(found) == {"baseline", "uniform-int8", "candidate-1", "candidate-2"}
    for name, m in found.items():
        floats = {precision for precision, _ in m.precision_counts} == {"fp32"}
        assert m.target.backend == ("floats" if floats else "swift"), name
        assert dict(m.target.session) == {"lanes": "2", "turbo": "on"}
        tried = {v.backend: v for v in m.variants if not v.setting}
        assert set(tried) == {"fake", "swift", "wrong", "broken", "floats"}, "what is not installed does not take part"
        assert "its logits are off by 100" in tried["wrong"].reason
        assert tried["broken"].reason == "fails: RuntimeError: cannot read this graph"
        assert floats or tried["floats"].reason == "cannot run int8: floats is for floats"
        assert tried["swift"].latency.quantile(0.5) == pytest.approx(0.5 * tried["fake"].latency.quantile(0.5), rel=0.05)
        settings = {v.setting: v for v in m.variants if v.setting}
        assert settings["turbo=on"].kept
        assert settings["turbo=odd"].reason.startswith("fails: AssertionError")
    assert any(m.target.backend == "swift" for m in found.values())


def test_genes_are_valid_for_the_target_the_engine_is_for(finished: Path) -> None:
    front = load(finished / "run" / "front.json", Front)
    searched = {e.candidate.architecture: e.candidate for e in front.evaluations}
    for name, m in manifests(finished / "run").items():
        assert m.candidate
        assert m.space
        assert (m.space.targets, m.candidate.space) == ((m.target.id,), m.space.id)
        for gene, precision in dict(m.candidate.precision)[m.target.id]:
            assert m.candidate.precision_of(gene, m.target.id) == precision
        if name.startswith("candidate"):
            assert [genes for _, genes in m.candidate.precision] == [genes for _, genes in searched[m.candidate.architecture].precision]


def test_the_engine_runs_with_what_was_chosen(finished: Path) -> None:
    folder = finished / "run" / "engines" / "uniform-int8"
    loaded = engine.load(folder)
    measured = load(finished / "run" / "measurements" / "uniform-int8.json", Measurement)
    assert loaded.runner.share == pytest.approx(0.4)
    assert measured.latency.quantile(0.5) == pytest.approx(loaded.runner.simulated_ms(1), rel=0.05)
    assert dict(measured.environment.must_match)["session.turbo"] == "on"
    assert engine.verify(folder)
    assert nascompile.load(folder).predict([np.ones(16, np.float32)])


def test_predictions_are_compared_with_what_was_predicted(finished: Path) -> None:
    """The table is of the search's backend: its prediction is held against that variant, not against the engine that was kept."""
    rows = {row[0]: row for row in load(finished / "run" / "correction.json", Correction).residuals}
    for name, m in manifests(finished / "run").items():
        own = next(v for v in m.variants if v.backend == "fake")
        assert (m.predicted, rows[name][1:]) == (None, (own.predicted.value, own.latency.value))
    facts = report.gather(finished / "run")
    assert all("fake as it comes" in row["title"] for row in facts["prediction"]["engines"])
    assert all(0.5 < row["measured_ms"] / row["predicted_ms"] < 2 for row in facts["prediction"]["engines"])


def test_report_and_closing_output_name_choice_and_losers(run: Path) -> None:
    done = invoke("report", "--out", run)
    assert done.exit_code == 0
    chosen = load(run / "choice.json", Choice).engine
    (line,) = [line for line in done.stdout.splitlines() if line.startswith(f"{chosen}: ")]
    kept = manifests(run)[chosen].target.backend
    assert line.startswith(f"{chosen}: {kept} ")
    for said in ("not fake: ", "ms (n ", "not wrong: its logits are off", "not broken: fails", "turbo=on × 0."):
        assert said in line
    for name in ("report.html", "report.md"):
        text = (run / name).read_text()
        for said in ("turbo=on", "turbo=odd", "logits are off by 100", "cannot read this graph"):
            assert said in text, (name, said)
    body = json.loads((run / "report.json").read_text())
    e = next(e for e in body["engines"] if e["chosen"])
    assert (e["backend"], e["session"]["turbo"]) == (kept, "on")
    assert sum(v["kept"] for v in e["variants"]) == 2


# ---------------------------------------------------------------------------------------------- again, and one more


def test_what_was_compared_is_not_built_again(run: Path) -> None:
    before = {name: (run / "engines" / name / "manifest.json").stat().st_ino for name in manifests(run)}
    (run / "stages" / "build.json").unlink()
    done = invoke("build", "--out", run)
    assert done.exit_code == 0, done.stderr
    assert {name: (run / "engines" / name / "manifest.json").stat().st_ino for name in manifests(run)} == before


def test_one_more_candidate_is_compared_too(run: Path, quick: Recipe) -> None:
    done = invoke("build", "--out", run, "--candidate", 1)
    assert done.exit_code == 0, done.stderr
    assert "not wrong: its logits are off" in done.stderr
    m = load(run / "engines" / "front-1" / "manifest.json", EngineManifest)
    assert m.target.backend in ("swift", "floats")
    inode = (run / "engines" / "front-1" / "manifest.json").stat().st_ino
    assert invoke("build", "--out", run, "--candidate", 1).exit_code == 0
    assert (run / "engines" / "front-1" / "manifest.json").stat().st_ino == inode
    assert invoke("build", "--out", run, "--candidate", 1, "--no-tune-session").exit_code == 0
    m = load(run / "engines" / "front-1" / "manifest.json", EngineManifest)
    assert (dict(m.target.session), [v for v in m.variants if v.setting]) == ({"lanes": "2"}, [])


def test_a_candidate_of_another_run_can_be_given_to_all_backends(quick: Recipe, rivals: Any, elsewhere: Path) -> None:
    (elsewhere / "profiles").mkdir()
    (elsewhere / "profiles" / "board.toml").write_text(BOARD)
    pipeline.run(msgspec.structs.replace(quick, device="board"), Path("run"), until="search")
    done = invoke("build", "run", "--candidate", 1, "--backend", "auto", "--json")
    assert done.exit_code == 0, done.stderr
    folder = Path(json.loads(done.stdout)["engine"])
    assert folder.name == "front-1-board-auto"
    m = load(folder / "manifest.json", EngineManifest)
    assert m.target.backend in ("swift", "floats")
    assert m.space
    assert m.space.targets == (m.target.id,)
    assert engine.verify(folder)
    inode = (folder / "manifest.json").stat().st_ino
    assert invoke("build", "run", "--candidate", 1, "--backend", "auto").exit_code == 0
    assert (folder / "manifest.json").stat().st_ino == inode
    whole = beside.build_candidate(Path("run"), 1, backend="auto", precision="int8")
    assert load(whole / "manifest.json", EngineManifest).target.backend == "swift"


def test_manifests_from_before_have_no_variants(run: Path) -> None:
    path = run / "engines" / "baseline" / "manifest.json"
    body = json.loads(path.read_text())
    del body["data"]["variants"]
    path.write_text(json.dumps(body))
    assert load(path, EngineManifest).variants == ()
    assert engine.verify(path.parent)
    assert invoke("report", "--out", run).exit_code == 0


def test_the_plan_says_what_will_be_compared(quick: Recipe) -> None:
    (row,) = [row for row in pipeline.plan(auto(quick, tune_session=True), Path("nowhere")) if row["stage"] == "build"]
    assert row["what"].endswith("; each by every backend that runs here, with its session settings tried")


# ---------------------------------------------------------------------------------------------- what is refused


def test_auto_where_no_backend_runs_is_refused_before_any_work(quick: Recipe, rivals: Any, elsewhere: Path) -> None:
    (elsewhere / "profiles").mkdir()
    (elsewhere / "profiles" / "board.toml").write_text('kind = "fake"\nbackends = ["absent", "unheard-of"]\n')
    done = invoke("run", "--model", "toy", "--device", "board", "--backend", "auto", "--max-drop", 5, "--out", "new", "--quiet")
    assert done.exit_code == 1
    assert done.stderr.startswith("error: no backend that builds for `board` runs here, so none can be chosen by measuring")
    assert "absent: absent is not installed: pip install absent" in done.stderr
    assert "unheard-of: not installed" in done.stderr
    assert "hint: " in done.stderr
    assert not (elsewhere / "new").exists()


def test_auto_for_a_gpu_that_is_not_here_is_refused(run: Path, gpu: Any) -> None:
    gpu(status=100)
    with pytest.raises(UnsupportedError, match="no backend that builds for `rtx-4090` runs here"):
        beside.build_candidate(run, 1, device="rtx-4090", backend="auto")


def test_an_unknown_setting_is_refused(elsewhere: Path) -> None:
    (elsewhere / "r.toml").write_text("[measure]\ntune_sessions = true\n")
    done = invoke("run", "r.toml")
    assert done.exit_code == 1
    assert "measure.tune_sessions: did you mean measure.tune_session?" in done.stderr


# ---------------------------------------------------------------------------------------------- real runtimes


@pytest.fixture(scope="module")
def vit(into: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run of a tiny ViT on images of stripes, its engines built by ONNX Runtime and OpenVINO and tuned."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("openvino")
    from PIL import Image
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    with pytest.MonkeyPatch.context() as patch:
        folder = into(tmp_path_factory.mktemp("vit"), patch)
        for name, value in (("BACKEND_SECONDS", 0.3), ("BLOCK_SECONDS", 0.1), ("FINALISTS", 1)):
            patch.setattr(variants, name, value)
        patch.setattr(measure, "LATENCY_SECONDS", 0.3)
        torch.set_num_threads(1)
        torch.manual_seed(0)
        rng = np.random.default_rng(0)
        rows = []
        for i in range(320):
            image = rng.integers(0, 60, (8, 8), np.uint8)
            image[:, ::2] += np.uint8(120 * (i % 2))
            image[::2, :] += np.uint8(120 * (1 - i % 2))
            Image.fromarray(image).save(folder / f"{i}.png")
            rows.append((f"{i}.png", ("rows", "columns")[i % 2]))
        with (folder / "data.csv").open("w", newline="") as stream:
            csv.writer(stream).writerows([("image", "label"), *rows])
        config = ViTConfig(
            hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, image_size=8, patch_size=4, num_channels=1,
            id2label={0: "columns", 1: "rows"}, label2id={"columns": 0, "rows": 1},
        )  # fmt: skip
        ViTForImageClassification(config).save_pretrained(folder / "model")
        size = {"height": 8, "width": 8}
        ViTImageProcessor(size=size, image_mean=[0.5], image_std=[0.5]).save_pretrained(folder / "model")
        (folder / "r.toml").write_text(
            'profile_seconds = 1.0\n[finetune]\nteacher_epochs = 2\nepochs = 1\nlearning_rate = 2e-3\n[search]\nevaluations = 6\n'
            'population = 4\ncalibration_samples = 32\ncalibration_methods = ["minmax"]\n'
            "[measure]\ntop_k = 1\nseconds = 0.2\nbatches = [1, 8]\nagreement = 2\n"
        )
        data = ("--model", "model", "--data", "data.csv", "--image-column", "image", "--label-column", "label")
        done = invoke("run", "r.toml", *data, "--max-drop", 50, "--backend", "auto", "--tune-session", "--out", "run")
        assert done.exit_code == 0, done.stderr
        assert "not " in done.stdout
        return folder / "run"


def test_a_vit_is_built_by_both_runtimes_and_the_faster_is_kept(vit: Path) -> None:
    for name, m in manifests(vit).items():
        tried = {v.backend: v for v in m.variants if not v.setting}
        assert set(tried) >= {"onnxruntime", "openvino"}, name
        running = [v for v in tried.values() if v.latency]
        assert {v.backend for v in running} >= {"onnxruntime", "openvino"} or "int8" in dict(m.precision_counts)
        best = min(running, key=lambda v: v.latency.quantile(0.5))
        assert (m.target.backend, best.kept) == (best.backend, True)
        settings = {v.setting.partition("=")[0] for v in m.variants if v.setting}
        assert settings == {setting for setting, _ in plugins.get("backends", m.target.backend).tunable}
        for v in m.variants:
            assert v.kept != bool(v.reason)
            assert not v.ratio or v.kept == (v.ratio.high < variants.MARGIN)
        assert engine.verify(vit / "engines" / name)


def test_run_py_applies_the_same_session(vit: Path) -> None:
    for name in manifests(vit):
        command = [sys.executable, str(vit / "engines" / name / "run.py"), "--json", "--seconds", "0.05"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["sample"]["ok"]
