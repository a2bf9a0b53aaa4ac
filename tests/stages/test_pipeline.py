"""The pipeline as a whole: every stage once, what is finished is left alone, what changed is done again and nothing else."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import nascompile
from nascompile import beside, cli, data, engine, latency_table, pipeline, plugins, records
from nascompile.errors import DataError, RecipeError, RecordError, UnsupportedError
from nascompile.families.toy import ToyConfig, demo_data
from nascompile.journal import read as read_journal
from nascompile.records import (
    Choice,
    Correction,
    EngineManifest,
    Evaluation,
    Front,
    Measurement,
    Score,
    SearchSpace,
    StageDone,
    TestResult,
    load,
    save,
)
from nascompile.settings import Recipe

BEFORE_TEST = "measure"
"""The last stage that does not read test."""


@pytest.fixture(autouse=True)
def work(elsewhere: Path) -> None:
    torch.set_num_threads(1)


@pytest.fixture
def performed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stages whose work was done, in order."""
    calls: list[str] = []

    def counted(stage: str, work: Callable[..., list[Path]]) -> Callable[..., list[Path]]:
        def run(self: pipeline.Context) -> list[Path]:
            calls.append(stage)
            return work(self)

        return run

    for stage in pipeline.STAGES:
        monkeypatch.setattr(pipeline.Context, f"_{stage}", counted(stage, getattr(pipeline.Context, f"_{stage}")))
    return calls


@pytest.fixture(scope="module")
def unread(quick: Recipe, toy_csv: Any, into: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run on a CSV file that has measured its engines and not read test yet, the file, and the tables."""
    with pytest.MonkeyPatch.context() as patch:
        folder = into(tmp_path_factory.mktemp("unread"), patch)
        toy_csv(Path("toy.csv"))
        pipeline.run(with_file(quick), Path("run"), until=BEFORE_TEST)
        return folder


@pytest.fixture(scope="module")
def finished(quick: Recipe, into: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run."""
    with pytest.MonkeyPatch.context() as patch:
        folder = into(tmp_path_factory.mktemp("finished"), patch)
        pipeline.run(quick, Path("run"))
        return folder / "run"


@pytest.fixture
def copy(unread: Path, tmp_path: Path) -> Path:
    """A copy of `unread` to work in; its run folder."""
    shutil.copytree(unread, tmp_path, dirs_exist_ok=True)
    return tmp_path / "run"


def with_file(recipe: Recipe) -> Recipe:
    return msgspec.structs.replace(recipe, data=data.DataSettings(data="toy.csv"))


def changed(recipe: Recipe, section: str, **values: object) -> Recipe:
    return msgspec.structs.replace(recipe, **{section: msgspec.structs.replace(getattr(recipe, section), **values)})


def results(run: Path) -> dict[str, bytes]:
    """The records a run ends in, without what time it took."""
    found = {}
    for name in ("front.json", "choice.json", "test.json", "baseline.json", "calibration.json", "agreement.json"):
        body = json.loads((run / name).read_bytes())
        if name == "front.json":
            body["data"].pop("seconds")
            for e in body["data"]["evaluations"]:
                e.pop("seconds")
        found[name] = json.dumps(body, sort_keys=True).encode()
    return found


# ---------------------------------------------------------------------------------------------- a whole run


def test_a_whole_run_leaves_every_record(finished: Path) -> None:
    assert {p.stem for p in (finished / "stages").iterdir()} == set(pipeline.STAGES)
    for stage in pipeline.STAGES:
        done = load(finished / "stages" / f"{stage}.json", StageDone)
        assert done.files, stage
        assert all(records.file_digest(finished / name) == sha for name, sha in done.files)
    names = {"baseline", "uniform-int8", "candidate-1", "candidate-2"}
    assert {p.name for p in (finished / "engines").iterdir()} == names
    for name in names:
        assert engine.verify(finished / "engines" / name)
        assert load(finished / "measurements" / f"{name}.json", Measurement).engine == name
    assert {row[0] for row in load(finished / "correction.json", Correction).residuals} == names


def test_the_front_is_the_journals_own(finished: Path, quick: Recipe) -> None:
    """By the definition: nobody on it is dominated by anybody scored, and nobody scored is missing."""
    front, scored = load(finished / "front.json", Front), list(read_journal(finished / "journal.jsonl", Evaluation))
    assert front.scored == len(scored) == quick.search.evaluations
    costs = {e.candidate.id: (e.latency.value, -e.score.value) for e in scored}
    assert len(costs) == len(scored)
    best = {
        name for name, a in costs.items()
        if not any(b != a and all(x <= y for x, y in zip(b, a, strict=True)) for b in costs.values())
    }  # fmt: skip
    assert {costs[e.candidate.id] for e in front.evaluations} == {costs[name] for name in best}
    assert len(best) > 1


def test_the_choice_is_the_fastest_engine_within_the_drop(finished: Path, quick: Recipe) -> None:
    choice = load(finished / "choice.json", Choice)
    measured = {p.stem: load(p, Measurement) for p in (finished / "measurements").glob("*.json")}
    within = {n: m for n, m in measured.items() if measured["baseline"].score.value - m.score.value <= quick.budgets.max_drop}
    fastest = min(within, key=lambda n: within[n].latency.value)
    assert choice.engine == fastest
    assert set(choice.ranking) == set(within)
    assert {name for name, _ in choice.rejected} == set(measured) - set(within)


def test_test_is_opened_once_after_the_choice_and_scored_as_torch_does(finished: Path) -> None:
    result, choice = load(finished / "test.json", TestResult), load(finished / "choice.json", Choice)
    opened = [entry for entry in data.accesses(finished / "data") if entry["split"] == "test"]
    assert [entry["choice"] for entry in opened] == [records.digest(choice)] == [result.choice_digest]
    family = plugins.get("families", "toy")
    arrays = {
        name: np.frombuffer(bytes(255 - b for b in (finished / "data" / "test" / f"{name}.sealed").read_bytes()), np.uint8)
        for name in ("features", "labels")
    }
    (finished.parent / "unsealed").mkdir(exist_ok=True)
    for name, content in arrays.items():
        (finished.parent / "unsealed" / f"{name}.npy").write_bytes(content.tobytes())
    features, labels = (np.load(finished.parent / "unsealed" / f"{name}.npy") for name in arrays)
    with torch.no_grad():
        logits = family.load(str(finished / "teacher"))(torch.from_numpy(features)).logits.numpy()
    assert dict(result.scores)["baseline"].value == pytest.approx(100 * (logits.argmax(1) == labels).mean())
    assert dict(result.scores)["baseline"].n == len(labels) == 400


def test_predictions_need_neither_torch_nor_transformers(finished: Path) -> None:
    chosen = finished / "engines" / load(finished / "choice.json", Choice).engine
    features = demo_data(20, 5)[0]
    np.save(finished.parent / "features.npy", features)
    code = (
        "import sys\n"
        "class Forbidden:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('torch', 'transformers'): raise ImportError('forbidden: ' + name)\n"
        "sys.meta_path.insert(0, Forbidden())\n"
        "import json, numpy, nascompile\n"
        "print(json.dumps(nascompile.load(sys.argv[1]).predict(list(numpy.load(sys.argv[2])))))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(chosen), str(finished.parent / "features.npy")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [label for label, _ in rows] == [label for label, _ in engine.load(chosen).predict(list(features))]
    assert len({label for label, _ in rows}) > 1


# ---------------------------------------------------------------------------------------------- stages alone and together


def test_stages_alone_give_what_all_together_give(finished: Path, quick: Recipe, performed: list[str]) -> None:
    shutil.copytree(finished.parent / "latency_tables", "latency_tables")
    out = Path("run")
    for number, stage in enumerate(pipeline.STAGES, 1):
        before = {p.name: p.read_bytes() for p in (out / "stages").glob("*.json")}
        pipeline.run(quick, out, until=stage)
        assert {p.name: p.read_bytes() for p in (out / "stages").glob("*.json") if p.name in before} == before
        assert performed == list(pipeline.STAGES[:number])
    assert results(out) == results(finished)
    pipeline.run(quick, out)
    assert len(performed) == len(pipeline.STAGES)


def test_a_file_that_is_gone_is_made_again(copy: Path, quick: Recipe, performed: list[str]) -> None:
    before = (copy / "front.json").read_bytes()
    (copy / "front.json").unlink()
    (copy / "measurements" / "baseline.json").write_text("{}")
    pipeline.run(with_file(quick), copy, until=BEFORE_TEST)
    assert performed[0] == "search"
    assert "finetune" not in performed
    old = msgspec.convert(json.loads(before)["data"], Front)
    assert [e.candidate for e in load(copy / "front.json", Front).evaluations] == [e.candidate for e in old.evaluations]
    assert load(copy / "measurements" / "baseline.json", Measurement).engine == "baseline"


LATER = ("search", "build")
"""Then `measure`, if that left other engines."""
EDITS = {
    "nothing": (lambda r: r, ()),
    "profile_seconds": (lambda r: msgspec.structs.replace(r, profile_seconds=0.2), ("profile",)),
    "minutes": (lambda r: msgspec.structs.replace(r, minutes=60.0), ()),
    "teacher_epochs": (lambda r: changed(r, "finetune", teacher_epochs=2), ("finetune", *LATER)),
    "evaluations": (lambda r: changed(r, "search", evaluations=11), LATER),
    "budget": (lambda r: changed(r, "budgets", max_drop=30.0), LATER),
    "top_k": (lambda r: changed(r, "measure", top_k=1), ("build", "measure")),
    "seconds": (lambda r: changed(r, "measure", seconds=0.1), ("measure",)),
}


@pytest.mark.parametrize("edit", list(EDITS))
def test_an_edited_recipe_repeats_what_depends_on_it(edit: str, copy: Path, quick: Recipe, performed: list[str]) -> None:
    change, expected = EDITS[edit]
    engines = load(copy / "stages" / "build.json", StageDone).files
    pipeline.run(change(with_file(quick)), copy, until=BEFORE_TEST)
    others = load(copy / "stages" / "build.json", StageDone).files != engines
    assert others >= (edit in ("teacher_epochs", "top_k"))  # these two must leave others
    assert tuple(performed) == ((*expected, "measure") if others and "measure" not in expected else expected)


def test_a_super_network_that_was_trained_for_another_device_is_searched_for_this_one(copy: Path, quick: Recipe) -> None:
    manifest = copy / "supernet" / "manifest.json"
    trained = load(manifest, SearchSpace)
    save(msgspec.structs.replace(trained, targets=("elsewhere-fake-00000000",)), manifest)
    weights = (copy / "supernet" / "model.safetensors").read_bytes()
    outputs = copy / "training" / "teacher_logits.npy"
    outputs.unlink(missing_ok=True)
    pipeline.run(with_file(quick), copy, until="search")
    assert not outputs.exists(), "a teacher's outputs are for training, and there is none"
    assert {target for e in load(copy / "front.json", Front).evaluations for target, _ in e.candidate.precision} == set(trained.targets)
    assert (copy / "supernet" / "model.safetensors").read_bytes() == weights


def test_edited_data_are_read_and_used(copy: Path, quick: Recipe, performed: list[str]) -> None:
    path = copy.parent / "toy.csv"
    rows = path.read_text().splitlines()
    before = (copy / "supernet" / "model.safetensors").read_bytes()
    path.write_text("\n".join(rows[:-40]) + "\n")
    pipeline.run(with_file(quick), copy, until=BEFORE_TEST)
    assert tuple(performed) == ("data", "finetune", *LATER, "measure")
    assert sum(info.samples for info in data.load_manifest(copy / "data").splits) == 360
    assert (copy / "supernet" / "model.safetensors").read_bytes() != before


def test_rows_in_another_order_are_the_same_data(copy: Path, quick: Recipe, performed: list[str]) -> None:
    path = copy.parent / "toy.csv"
    header, *rows = path.read_text().splitlines()
    path.write_text("\n".join([header, *reversed(rows)]) + "\n")
    pipeline.run(with_file(quick), copy, until=BEFORE_TEST)
    assert performed == ["data"]


def test_a_new_budget_solves_again_without_scoring_again(copy: Path, quick: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = (copy / "journal.jsonl").read_bytes()
    scored = list(read_journal(copy / "journal.jsonl", Evaluation))
    bound = round(sorted(e.size_bytes for e in scored)[len(scored) // 2] / 1e6, 4)  # some of them meet it, some do not
    looser = changed(with_file(quick), "budgets", max_drop=40.0)
    with monkeypatch.context() as patch:
        patch.setattr("nascompile.accuracy.Evaluator.score", scores_of_baselines_only(copy))
        pipeline.run(looser, copy, until=BEFORE_TEST)
    assert load(copy / "front.json", Front).budgets[0].bound == 40.0
    assert (copy / "journal.jsonl").read_bytes() == journal
    pipeline.run(changed(looser, "budgets", size_mb=bound), copy, until="search")
    keys = [(e.candidate.id, e.score.weights_digest, e.score.evaluator_digest) for e in read_journal(copy / "journal.jsonl", Evaluation)]
    assert len(set(keys)) == len(keys)
    assert (copy / "journal.jsonl").read_bytes().startswith(journal)
    assert all(e.size_bytes / 1e6 <= bound for e in load(copy / "front.json", Front).evaluations)


def scores_of_baselines_only(run: Path) -> Callable[..., Score]:
    """Evaluator.score that refuses candidates of the super-network."""
    from nascompile.accuracy import Evaluator

    score = Evaluator.score
    supernet = records.digest([("model.safetensors", records.file_digest(run / "supernet" / "model.safetensors"))])

    def once(self: Evaluator, point: records.Candidate) -> Score:
        assert self.weights_digest != supernet, "a candidate is scored a second time"
        return score(self, point)

    return once


def test_what_test_was_read_for_cannot_change(finished: Path, quick: Recipe, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with pytest.raises(RecipeError, match="test was read") as caught:
        pipeline.run(changed(quick, "budgets", max_drop=1.0), run)
    assert "--out" in caught.value.hint
    assert caught.value.detail.splitlines() == [f"budgets.max_drop: {quick.budgets.max_drop} there, 1.0 asked for"], "no other setting"
    with pytest.raises(RecipeError) as caught:  # nor is that what it advises
        beside.train_candidate(run, 1)
    assert caught.value.hint.startswith("begin a run with that in its recipe")
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
    pipeline.run(quick, run)


def test_another_choice_after_test_was_read_overwrites_nothing(finished: Path, quick: Recipe, tmp_path: Path) -> None:
    """Measured anew a real machine may choose another engine: the first choice stands."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    old = load(run / "choice.json", Choice)
    done = load(run / "stages" / "measure.json", StageDone)
    path = run / "measurements" / f"{old.engine}.json"
    slow = load(path, Measurement)
    records.save(msgspec.structs.replace(slow, latency=latency_table.rescaled(slow.latency, 100)), path)
    files = tuple((name, records.file_digest(run / name)) for name, _ in done.files)
    records.save(msgspec.structs.replace(done, files=files), run / "stages" / "measure.json")
    before = {name: (run / name).read_bytes() for name in ("choice.json", "test.json", "report.json")}
    with pytest.raises(DataError, match="another choice"):
        pipeline.run(quick, run)
    assert {name: (run / name).read_bytes() for name in before} == before


# ---------------------------------------------------------------------------------------------- two processes


def test_a_run_folder_belongs_to_one_process_until_it_dies(quick: Recipe, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom nascompile import pipeline, settings\n"
        "def wait(*_): print('inside', flush=True); sys.stdin.read()\n"
        "pipeline.Context.perform = wait\npipeline.run(settings.toy_recipe(), Path(sys.argv[1]))\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, "run"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout
        assert other.stdout.readline() == "inside\n"
        with pytest.raises(RecordError, match="another process is working in this run folder: run"):
            pipeline.run(quick, Path("run"), until="data")
        with pytest.raises(RecordError, match="another process"):
            beside.build_candidate(Path("run"), 1)
        assert load(Path("run/recipe.json"), Recipe) != quick  # still the other's
        other.send_signal(signal.SIGKILL)
    shutil.rmtree("run/stages", ignore_errors=True)
    pipeline.run(quick, Path("run"), until="data")
    assert load(Path("run/stages/data.json"), StageDone).stage == "data"


# ---------------------------------------------------------------------------------------------- beside a run


def test_what_each_pass_does_is_kept_beside_the_engines(copy: Path) -> None:
    pytest.importorskip("onnxruntime")
    number = len(load(copy / "front.json", Front).evaluations)
    done = CliRunner().invoke(cli.app, ["build", str(copy), "--candidate", str(number), "--keep-intermediate", "--json", "--quiet"])
    assert done.exit_code == 0, done.stderr
    (found,) = json.loads(done.stdout)["engines"]
    assert found["engine"] == str(copy / "engines" / f"front-{number}")
    names = [row["name"] for row in found["passes"]]
    assert names[:2] == ["inline_constants", "split_gemm"]
    assert names[-1] == "quantize_table"
    graphs = copy / "engines" / f"front-{number}.graphs"
    assert json.loads((graphs / "passes.json").read_text()) == found["passes"]
    assert (graphs / found["passes"][-1]["file"]).read_bytes() == (graphs.with_suffix("") / "model.onnx").read_bytes()
    assert engine.verify(copy / "engines" / f"front-{number}")
    again = CliRunner().invoke(cli.app, ["build", str(copy), "--keep-intermediate", "--quiet"])
    assert again.exit_code == 0, again.stderr
    lines = again.stdout.splitlines()
    assert lines.count(lines[1]) == 4  # a heading under each of the baseline, uniform INT8, and two candidates
    assert "rounds" in next(line for line in lines if line.endswith("quantize_linear"))
    assert (copy / "engines" / "baseline.graphs" / "00-exported.onnx").is_file()


def test_a_candidate_in_another_precision_for_the_same_device(copy: Path) -> None:
    precision = "int8-dynamic"
    folder = beside.build_candidate(copy, 1, precision=precision)
    assert folder.name == f"front-1-fake-{precision}"
    manifest = load(folder / "manifest.json", EngineManifest)
    assert {name for name, _ in manifest.precision_counts} == {"fp32", precision}
    assert engine.verify(folder)


def test_precisions_of_the_search_can_be_changed_without_training_again(copy: Path, quick: Recipe, performed: list[str]) -> None:
    recipe = changed(with_file(quick), "search", precisions=("int8", "int8-dynamic"), evaluations=6)
    pipeline.run(recipe, copy, until="build")
    assert performed == ["profile", "search", "build"]
    front = load(copy / "front.json", Front)
    assert [p.name for p in front.space.precisions] == ["fp32", "int8", "int8-dynamic"]
    uniform = load(copy / "engines" / "uniform-int8" / "manifest.json", EngineManifest)
    assert {name for name, _ in uniform.precision_counts} == {"fp32", "int8-dynamic"}
    with pytest.raises(UnsupportedError, match="`fake` cannot search weight-int4-block32"):
        pipeline.run(changed(recipe, "search", precisions=("weight-int4-block32",)), copy, until="build")


def test_one_more_candidate_of_a_front(copy: Path, performed: list[str]) -> None:
    front = load(copy / "front.json", Front)
    folder = beside.build_candidate(copy, len(front.evaluations))
    manifest = load(folder / "manifest.json", EngineManifest)
    assert folder == copy / "engines" / f"front-{len(front.evaluations)}"
    assert manifest.candidate == front.evaluations[-1].candidate
    assert engine.verify(folder)
    inode = (folder / "manifest.json").stat().st_ino
    assert beside.build_candidate(copy, len(front.evaluations)) == folder
    assert (folder / "manifest.json").stat().st_ino == inode  # built once
    assert performed == []
    for number in (0, len(front.evaluations) + 1):
        with pytest.raises(RecipeError, match=f"no such candidate: {number}"):
            beside.build_candidate(copy, number)


def test_a_plan_says_what_is_left_and_touches_nothing(copy: Path, quick: Recipe, tmp_path: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    rows = pipeline.plan(with_file(quick), copy)
    assert [row["stage"] for row in rows] == list(pipeline.STAGES)
    assert [row["stage"] for row in rows if not row["done"]] == ["rerank", "report"]
    assert not any(row["done"] for row in pipeline.plan(quick, tmp_path / "nowhere"))
    engines = next(row for row in rows if row["stage"] == "build")["what"]
    assert f"{quick.measure.top_k + 2} engines" in engines
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


# ---------------------------------------------------------------------------------------------- the Python API


def macro_recall(labels: np.ndarray, logits: np.ndarray) -> float:
    right = logits.argmax(1) == labels
    return 100 * float(np.mean([right[labels == c].mean() if (labels == c).any() else 0.0 for c in range(3)]))


def toy_model(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return plugins.get("families", "toy").create(ToyConfig(num_labels=3))


def compile_toy(quick: Recipe, seed: int = 0, samples: int = 400, **options: object) -> nascompile.api.Compiled:
    sections = {name: msgspec.to_builtins(getattr(quick, name)) for name in ("search", "measure", "finetune")}
    return nascompile.compile(
        toy_model(seed), demo_data(samples, 3), validation=demo_data(120, 4), target="fake", metric=macro_recall, max_drop=30.0,
        out="run", progress=False, profile_seconds=0.1, data={"calibration_size": 32}, **sections, **options,
    )  # fmt: skip


def test_compile_takes_objects_and_leaves_a_run(quick: Recipe, performed: list[str], tmp_path: Path) -> None:
    made = compile_toy(quick)
    task = made.summary["tasks"][0]
    assert made.run == Path("run")
    assert made.report.is_file()
    assert set(task) >= {"baseline", "uniform_int8", "chosen"}
    features, labels = demo_data(120, 4)  # validation, as it was given
    measured = load(made.run / "measurements" / f"{made.engine.name}.json", Measurement)
    logits = made.load().logits(list(features))
    assert measured.score.n == 120
    assert measured.score.metric == "custom"
    assert measured.score.value == pytest.approx(macro_recall(labels, logits))
    assert performed == list(pipeline.STAGES)

    def numbers(compiled: Any) -> Any:
        return {name: value for name, value in compiled.summary["tasks"][0].items() if name != "seconds"}

    assert numbers(compile_toy(quick)) == numbers(made)
    assert performed[len(pipeline.STAGES) :] == ["data"]  # objects are read again and found to be the same

    with pytest.raises(RecipeError, match="holds a run of another model"):
        compile_toy(quick, seed=1)
    with pytest.raises(DataError, match="has been read"):
        compile_toy(quick, samples=380)
    assert numbers(compile_toy(quick)) == numbers(made)

    folder = beside.build_candidate(made.run, 1)  # without the model in memory
    assert engine.verify(folder)
    assert not list(Path("run").glob(".*"))


def test_data_given_for_an_embedded_model_are_used(quick: Recipe) -> None:
    given = pipeline.Given(data={"train": demo_data(90, 3)})
    pipeline.run(quick, Path("run"), until="data", given=given)
    assert sum(info.samples for info in data.load_manifest(Path("run/data")).splits) == 90


def test_a_model_of_another_kind_is_refused(quick: Recipe) -> None:
    with pytest.raises(RecipeError, match="not a Hugging Face model: int"):
        nascompile.compile(3, demo_data(90, 3), target="fake", max_drop=1.0, out="run")
    with pytest.raises(RecipeError, match="no budget"):
        nascompile.compile(toy_model(0), demo_data(90, 3), target="fake", out="run")
    with pytest.raises(RecipeError, match=r"did you mean data\.max_length") as caught:
        nascompile.compile(toy_model(0), demo_data(90, 3), target="fake", max_drop=1.0, out="run", data={"max_lenght": 3}, epoch=1)
    assert "epoch" in caught.value.detail  # both faults at once
    assert not Path("run").exists()


def test_a_mistake_before_anything_is_done_binds_nobody(quick: Recipe, toy_csv: Any) -> None:
    toy_csv(Path("toy.csv"))
    wrong = changed(with_file(quick), "data", label_column="nope")
    with pytest.raises(DataError, match="no such column"):
        pipeline.run(wrong, Path("run"), until="data")
    pipeline.run(with_file(quick), Path("run"), until="data")
    with pytest.raises(RecipeError, match="holds another run") as caught:
        pipeline.run(wrong, Path("run"), until="data")
    assert caught.value.detail == "data.label_column: '' there, nope asked for"
