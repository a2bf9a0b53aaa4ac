"""One search for two simulated devices of which one runs integers fast and the other slowly, through the whole pipeline."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from typer.testing import CliRunner

from nascompile import beside, cli, engine, pipeline, report, space as spaces, targets
from nascompile.accuracy import Evaluator
from nascompile.errors import BudgetError, TableError, UnsupportedError
from nascompile.journal import read as read_journal
from nascompile.progress import Silent
from nascompile.records import Candidate, Choice, EngineManifest, Evaluation, Front, LatencyTable, Measurement, load
from nascompile.scoring import Loaded, score_engine
from nascompile.settings import Budgets, Recipe

INTS, FLOATS, FAR = "ints", "floats", "far"
ENGINES = {"baseline", "uniform-int8", *(f"candidate-{n + 1}" for n in range(6))}
THERE = f"{FLOATS}-fake-t1"


@pytest.fixture(autouse=True)
def work(elsewhere: Path) -> None:
    torch.set_num_threads(1)
    write_profiles()


def write_profiles() -> None:
    """Three devices whose products take most of the time; nothing here can time the last one."""
    Path("profiles").mkdir(exist_ok=True)
    for name, speedup in ((INTS, 8), (FLOATS, 0.5), (FAR, 0.25)):
        session = f'[session]\ninteger_speedup = "{speedup}"\nmacs_per_ms = "1e4"\nnode_ms = "0.0005"\n'
        Path(f"profiles/{name}.toml").write_text(f'kind = "fake"\nbackends = ["fake"]\n{session}')


def set_kind(name: str, kind: str) -> None:
    path = Path(f"profiles/{name}.toml")
    path.write_text(re.sub('kind = ".*"', f'kind = "{kind}"', path.read_text()))


@pytest.fixture(scope="module")
def shared(quick: Recipe) -> Recipe:
    """The toy for both devices."""
    search = msgspec.structs.replace(quick.search, evaluations=30, population=10)
    measure = msgspec.structs.replace(quick.measure, top_k=6)
    return msgspec.structs.replace(quick, device=INTS, also=(FLOATS,), search=search, measure=measure)


@pytest.fixture(scope="module")
def finished(shared: Recipe, into: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run, with the profiles and tables beside it."""
    with pytest.MonkeyPatch.context() as patch:
        folder: Path = into(tmp_path_factory.mktemp("shared"), patch)
        write_profiles()
        pipeline.run(shared, Path("run"))
        return folder / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it to work in."""
    shutil.copytree(finished.parent, tmp_path, dirs_exist_ok=True)
    return Path("run")


@pytest.fixture
def performed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stages whose work was done, in order."""
    calls: list[str] = []

    def counted(stage: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def perform(self: pipeline.Context) -> Any:
            calls.append(stage)
            return work(self)

        return perform

    for stage in pipeline.STAGES:
        monkeypatch.setattr(pipeline.Context, f"_{stage}", counted(stage, getattr(pipeline.Context, f"_{stage}")))
    return calls


@pytest.fixture
def scorings(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """(weights, architecture, precisions) of every candidate whose score was computed."""
    calls: list[Any] = []
    score = Evaluator.score

    def counted(self: Evaluator, point: Any) -> Any:
        calls.append((self.weights_digest, point.architecture, dict(point.precision)[self.target]))
        return score(self, point)

    monkeypatch.setattr(Evaluator, "score", counted)
    return calls


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def bounded(recipe: Recipe, **latencies: float) -> Recipe:
    return msgspec.structs.replace(recipe, budgets=Budgets(max_drop=20.0, latency_ms=latencies))


# ---------------------------------------------------------------------------------------------- a whole run


def test_every_device_has_engines_of_one_network_with_its_own_precisions(finished: Path) -> None:
    assert {p.name for p in (finished / "devices").iterdir()} == {THERE}
    differing = 0
    for name in ENGINES:
        here = load(finished / "engines" / name / "manifest.json", EngineManifest)
        there = load(finished / "devices" / THERE / "engines" / name / "manifest.json", EngineManifest)
        assert (here.target.device, there.target.device) == (INTS, FLOATS)
        assert here.candidate == there.candidate
        for manifest in (here, there):
            assert manifest.candidate
            assert manifest.graph
            own = dict(dict(manifest.candidate.precision)[manifest.target.id])
            blocks = {node.name: node.operator.precision.name for node in manifest.graph.nodes}
            assert {b: p for b, p in blocks.items() if f"{b}.precision" in own} == {n.removesuffix(".precision"): p for n, p in own.items()}
            assert manifest.predicted
        differing += here.precision_counts != there.precision_counts
        assert engine.verify(finished / "devices" / THERE / "engines" / name)
        assert load(finished / "devices" / THERE / "measurements" / f"{name}.json", Measurement).latency.kind == "simulated"
    assert differing, "no candidate that was built has other precisions elsewhere: choose another seed"


def test_latencies_there_are_those_of_the_devices_own_table_and_simulator(finished: Path) -> None:
    table = load(finished / "tables" / f"{THERE}.json", LatencyTable)
    assert table.target.device == FLOATS
    for name in ENGINES:
        home = finished / "devices" / THERE
        predicted = load(home / "engines" / name / "manifest.json", EngineManifest).predicted
        measured = load(home / "measurements" / f"{name}.json", Measurement).latency
        assert predicted
        assert predicted.low <= measured.value <= predicted.high
    slow = load(finished / "devices" / THERE / "measurements" / "uniform-int8.json", Measurement).latency.value
    fast = load(finished / "measurements" / "uniform-int8.json", Measurement).latency.value
    assert slow > 8 * fast  # integers run 16 times slower, the rest as fast


def test_the_front_is_the_journals_own_over_three_objectives(finished: Path, shared: Recipe) -> None:
    """By the definition: nobody on it is dominated by anybody scored, and nobody scored is missing."""
    front, scored = load(finished / "front.json", Front), list(read_journal(finished / "journal.jsonl", Evaluation))
    assert front.scored == len(scored) == shared.search.evaluations
    assert [t.device for t in (front.target, *front.also)] == [INTS, FLOATS]
    costs = {
        e.candidate.id: (-min(e.score.value, e.elsewhere[0].score.value), e.latency.value, e.elsewhere[0].latency.value) for e in scored
    }
    best = {
        name for name, a in costs.items()
        if not any(b != a and all(x <= y for x, y in zip(b, a, strict=True)) for b in costs.values())
    }  # fmt: skip
    assert {e.candidate.id for e in front.evaluations} == best
    assert 1 < len(best) < len(scored)


def test_no_network_was_scored_twice(finished: Path) -> None:
    found: dict[Any, set[float]] = {}
    for e in read_journal(finished / "journal.jsonl", Evaluation):
        for score, (_, genes) in zip((e.score, *(t.score for t in e.elsewhere)), e.candidate.precision, strict=True):
            found.setdefault((e.candidate.architecture, genes), set()).add(score.value)
    assert all(len(values) == 1 for values in found.values())


def test_the_choice_is_the_best_over_both_devices(finished: Path) -> None:
    choice = load(finished / "choice.json", Choice)
    here = {n: load(finished / "measurements" / f"{n}.json", Measurement) for n in ENGINES}
    there = {n: load(finished / "devices" / THERE / "measurements" / f"{n}.json", Measurement) for n in ENGINES}
    product = {n: here[n].latency.value * there[n].latency.value for n in choice.ranking}
    assert choice.engine == min(product, key=lambda n: product[n])
    assert f"on {FLOATS}:fake:1" in choice.reason


# ---------------------------------------------------------------------------------------------- the report


def test_the_report_says_how_the_fronts_differ_and_what_sharing_costs(finished: Path) -> None:
    body = json.loads((finished / "report.json").read_text())["devices"]
    scored = list(read_journal(finished / "journal.jsonl", Evaluation))
    seen = {
        f"{INTS}:fake:1": [(e.candidate.id, e.latency.value, e.score.value) for e in scored],
        f"{FLOATS}:fake:1": [(e.candidate.id, e.elsewhere[0].latency.value, e.elsewhere[0].score.value) for e in scored],
    }
    assert [d["label"] for d in body["devices"]] == list(seen)
    own = {}
    for d in body["devices"]:
        rows = seen[d["label"]]
        own[d["label"]] = {i for i, ms, s in rows if not any(a <= ms and b >= s and (a, b) != (ms, s) for _, a, b in rows)}
        assert {p["id"] for p in d["front"]} == own[d["label"]]
        assert {p["id"] for p in d["front"]} | {p["id"] for p in d["scored"]} == {i for i, _, _ in rows}
        _, ms, value = next(row for row in rows if row[0] == body["candidate"])
        fastest = min(a for _, a, b in rows if b >= value)
        assert d["cost"]["ratio"] == pytest.approx(ms / fastest, rel=1e-12)
        assert (d["cost"]["shared"]["latency_ms"], d["cost"]["alone"]["latency_ms"]) == (ms, fastest)
        assert (d["chosen"]["kind"], d["absent"]) == ("simulated", "")
    first, second = own.values()
    assert first != second, "the devices are meant to prefer different networks"
    assert set(body["common"]) == first & second
    a, b = ([ms for _, ms, _ in rows] for rows in seen.values())
    pairs = [(a[i] - a[j]) * (b[i] - b[j]) for i, j in itertools.combinations(range(len(a)), 2) if a[i] != a[j] and b[i] != b[j]]
    ties = [sum(x[i] == x[j] for i, j in itertools.combinations(range(len(a)), 2)) for x in (a, b)]
    total = len(a) * (len(a) - 1) / 2
    tau = sum(1 if p > 0 else -1 for p in pairs) / ((total - ties[0]) * (total - ties[1])) ** 0.5
    assert body["tau"][0]["tau"] == pytest.approx(tau)


def test_people_read_the_same_in_every_form(finished: Path) -> None:
    body = json.loads((finished / "report.json").read_text())["devices"]
    markdown, html = ((finished / f"report.{kind}").read_text() for kind in ("md", "html"))
    lines = report.device_lines(finished)
    for d in body["devices"]:
        ratio = f"{d['cost']['ratio']:.2f}"
        assert any(d["label"] in line and f"predicted {ratio} times" in line for line in lines)
        assert f"| {d['label']} |" in markdown
        assert f"{ratio}×" in markdown
        assert f"<h3>{d['label']}</h3>" in html
        assert all(f"`{p['id']}`" in markdown and f"<code>{p['id']}</code>" in html for p in d["front"])
    assert f"{body['tau'][0]['tau']:.2f}" in lines[-1]
    assert "from the same 30 scored candidates" in markdown
    assert html.count('id="plot-device-') == 2
    assert [d["cost"]["ratio"] for d in report.summary(finished)["devices"]] == [d["cost"]["ratio"] for d in body["devices"]]


def test_a_run_for_one_device_says_nothing_of_others(shared: Recipe, finished: Path) -> None:
    pipeline.run(msgspec.structs.replace(shared, also=()), Path("alone"), until="search")
    assert "devices" not in report.gather(Path("alone"))
    assert report.device_lines(Path("alone")) == []
    assert not (Path("alone") / "tables").exists()
    assert b"elsewhere" not in (Path("alone") / "front.json").read_bytes()
    assert b"also" not in (Path("alone") / "front.json").read_bytes()


# ---------------------------------------------------------------------------------------------- again, and otherwise


def test_a_finished_run_has_nothing_to_do(run: Path, shared: Recipe, performed: list[str]) -> None:
    pipeline.run(shared, run)
    assert performed == []


def test_what_is_gone_of_a_device_is_made_again(finished: Path, shared: Recipe, performed: list[str]) -> None:
    shutil.copytree(finished.parent, ".", dirs_exist_ok=True)
    run = Path("run")
    shutil.rmtree(run / "devices" / THERE / "engines" / "candidate-1")
    before = (run / "choice.json").read_bytes()
    pipeline.run(shared, run)
    assert performed[0] == "build"
    assert engine.verify(run / "devices" / THERE / "engines" / "candidate-1")
    assert (run / "choice.json").read_bytes() == before


def test_a_device_that_is_added_costs_no_training_and_repeats_no_score(shared: Recipe, performed: list[str], scorings: list[Any]) -> None:
    pipeline.run(msgspec.structs.replace(shared, also=()), Path("run"), until="search")
    before = len(scorings)
    assert performed == ["data", "profile", "finetune", "search"]
    pipeline.run(shared, Path("run"), until="search")
    assert performed[4:] == ["profile", "search"]
    weights = scorings[before - 1][0]  # of the super-network, which the search ends with
    searched = [call for call in scorings if call[0] == weights]
    assert len(searched) == len(set(searched)) > before - 5
    front = load(Path("run/front.json"), Front)
    assert all(e.elsewhere for e in front.evaluations)
    pipeline.run(msgspec.structs.replace(shared, also=()), Path("run"), until="search")
    assert [call for call in scorings if call[0] == weights] == searched


def test_budgets_hold_on_the_device_they_are_for(run: Path, shared: Recipe, quick: Recipe) -> None:
    scored = list(read_journal(run / "journal.jsonl", Evaluation))
    here, there = (sorted(x)[len(scored) // 2] for x in ([e.latency.value for e in scored], [e.elsewhere[0].latency.value for e in scored]))
    out = Path("bounded")
    pipeline.run(bounded(shared, ints=here, floats=there), out, until="rerank")
    front = load(out / "front.json", Front)
    assert {(b.metric, b.bound) for b in front.budgets if b.metric != "drop"} == {("latency_ms", here), ("latency_ms", there)}
    for e in read_journal(out / "journal.jsonl", Evaluation):
        assert e.latency.value <= here
        assert e.elsewhere[0].latency.value <= there
    choice = load(out / "choice.json", Choice)
    assert "baseline" not in choice.ranking
    rejected = dict(choice.rejected)["baseline"]
    assert f"latency_ms {load(out / 'measurements' / 'baseline.json', Measurement).latency.value:.3g} > {here:g}" in rejected
    with pytest.raises(BudgetError, match=rf"latency_ms ≤ 0\.001 on {FLOATS}:fake:1"):
        pipeline.run(bounded(shared, ints=here, floats=0.001), Path("tight"), until="search")


def test_a_candidate_is_built_for_the_device_it_is_asked_for(run: Path) -> None:
    front = load(run / "front.json", Front)
    number, e = next(
        (n, e) for n, e in enumerate(front.evaluations, 1) if dict(e.candidate.precision[0][1]) != dict(e.candidate.precision[1][1])
    )
    done = invoke("build", run, "--candidate", number, "--device", FLOATS, "--json")
    assert done.exit_code == 0, done.stderr
    folder = Path(json.loads(done.stdout)["engine"])
    assert folder.name == f"front-{number}-{THERE}"
    manifest = load(folder / "manifest.json", EngineManifest)
    own = dict(e.candidate.precision[1][1])
    assert manifest.graph
    assert {f"{n.name}.precision": n.operator.precision.name for n in manifest.graph.nodes if f"{n.name}.precision" in own} == own
    assert manifest.predicted == e.elsewhere[0].latency
    first = beside.build_candidate(run, number, device=INTS)
    assert first.name == f"front-{number}"
    assert load(first / "manifest.json", EngineManifest).predicted == e.latency
    kept = invoke("build", run, "--candidate", number, "--device", f"{FLOATS}:fake:1", "--keep-intermediate")
    assert kept.exit_code == 0, kept.stderr
    assert (folder.with_name(f"{folder.name}.graphs")).is_dir()


def test_an_engine_is_calibrated_for_the_precisions_of_its_own_device(run: Path, shared: Recipe) -> None:
    """FP32 on the first device needs no ranges, INT8 on the second has to find its own."""
    context = pipeline.Context(shared, run, Silent(), pipeline.Given())
    (f,) = context.further
    genes = {slot: spaces.slot_gene(context.space, slot) for slot in spaces.gene_names(context.space)}
    point = spaces.candidate(context.space, {slot: gene.choices[-1 if "@" in slot else 0] for slot, gene in genes.items()})
    assert {value for _, value in point.precision[0][1]} == {"fp32"}
    assert {value for _, value in point.precision[1][1]} == {"int8"}
    folder = run / "engines" / "front-9"
    context.build_there(f, folder.name, "candidate", "supernet", point, folder)
    emulated = context.sources["supernet"].evaluator.on(f.target.id).score(point)
    validation = context.split("validation", "scores")
    built = score_engine(Loaded.open(folder), validation, context.task, context.metric, run / "scores")
    assert built.n == emulated.n == 400
    assert abs(built.value - emulated.value) <= 1.0  # four samples on an edge of the grid may fall to the other side


def test_the_commands_take_several_devices(finished: Path) -> None:
    shutil.copytree(finished.parent / "latency_tables", "latency_tables")
    flags = ("--model", "toy", "--device", INTS, "--device", f"{FLOATS}:fake", "--max-drop", 20, "--evaluations", 6, "--teacher-epochs", 1)
    budgets = ("--latency-ms", 9, "--latency-ms", f"{FLOATS}=9", "--objective", "worst-ratio")
    done = invoke("search", *flags, "--epochs", 0, *budgets, "--out", "run")
    assert done.exit_code == 0, done.stderr
    assert f"{FLOATS}:fake:1: " in done.stderr
    assert "Kendall" in done.stderr
    front = load(Path("run/front.json"), Front)
    assert front.objectives == ("error", "worst_ratio")
    assert [t.device for t in front.also] == [FLOATS]
    plan = invoke("run", "--out", "run", "--dry-run")
    assert f"the same for `{FLOATS}:fake`" in plan.stdout


# ---------------------------------------------------------------------------------------------- a device that is not here


@pytest.fixture
def far(shared: Recipe) -> Recipe:
    """A recipe for a device whose table was made where it is; from here it cannot be reached."""
    there = msgspec.structs.replace(shared, device=FAR, also=())
    pipeline.run(there, Path("there"), until="profile")
    shutil.rmtree("there")
    set_kind(FAR, "elsewhere")
    return msgspec.structs.replace(shared, also=(FAR,))


def test_predictions_stand_for_a_device_that_is_not_here_and_every_form_says_so(far: Recipe) -> None:
    run = Path("run")
    pipeline.run(far, run)
    front = load(run / "front.json", Front)
    ((target, why),) = front.absent
    assert (target, "nothing here can time" in why) == (front.also[0].id, True)
    assert list((run / "devices").glob("*")) == []
    assert {p.name for p in (run / "engines").iterdir()} == ENGINES
    table = load(run / "tables" / f"{FAR}-fake-t1.json", LatencyTable)
    assert table.target == front.also[0]
    (d,) = [d for d in report.summary(run)["devices"] if d["label"] == f"{FAR}:fake:1"]
    assert (d["chosen"]["kind"], d["absent"]) == ("predicted", why)
    point = load(run / "subnets" / load(run / "choice.json", Choice).engine / "candidate.json", Candidate)
    chosen = next(e for e in front.evaluations if e.candidate == point)
    assert d["chosen"]["latency_ms"] == chosen.elsewhere[0].latency.value
    assert "predicted" in load(run / "choice.json", Choice).reason
    assert any(f"not here: {why}" in line for line in report.device_lines(run))
    for name in ("report.md", "report.html"):
        assert f"not here, so predicted: {why}" in (run / name).read_text()
    with pytest.raises(UnsupportedError, match=f"cannot build for `{FAR}:fake:1`"):
        beside.build_candidate(run, 1, device=FAR)


def test_its_budget_holds_by_prediction(far: Recipe) -> None:
    pipeline.run(far, Path("free"), until="search")
    latencies = sorted(e.elsewhere[0].latency.value for e in read_journal(Path("free/journal.jsonl"), Evaluation))
    bound = latencies[len(latencies) // 2]
    pipeline.run(bounded(far, ints=99.0, far=bound), Path("run"), until="rerank")
    choice = load(Path("run/choice.json"), Choice)
    assert f"on {FAR}:fake:1: latency_ms" in dict(choice.rejected)["uniform-int8"]
    assert "(predicted)" in dict(choice.rejected)["uniform-int8"]
    assert choice.engine.startswith("candidate")


def test_a_table_that_is_taken_again_there_is_priced_again(far: Recipe, performed: list[str], scorings: list[Any]) -> None:
    pipeline.run(far, Path("run"), until="search")
    before = len(scorings)
    (path,) = Path("latency_tables", FAR).glob("*.json")
    body = json.loads(path.read_text())
    body["data"]["scale"] = 2 * body["data"]["scale"]
    path.write_text(json.dumps(body))
    old = {e.candidate: e.elsewhere[0].latency.value for e in load(Path("run/front.json"), Front).evaluations}
    pipeline.run(far, Path("run"), until="search")
    assert performed[4:] == ["profile", "search"]
    new = {e.candidate: e.elsewhere[0].latency.value for e in load(Path("run/front.json"), Front).evaluations}
    both = old.keys() & new.keys()
    assert both
    assert all(new[c] == pytest.approx(2 * old[c]) for c in both)
    weights = scorings[before - 1][0]
    searched = [call for call in scorings if call[0] == weights]
    assert len(searched) == len(set(searched))


def test_without_a_table_the_command_says_what_makes_one(finished: Path) -> None:
    set_kind(FAR, "elsewhere")
    done = invoke("search", "--model", "toy", "--device", INTS, "--device", FAR, "--max-drop", 20, "--out", "run")
    assert (done.exit_code, done.stdout) == (1, "")
    assert f"`{FAR}:fake:1` cannot run here and has no latency table" in done.stderr
    command = f"nascompile kit export --model toy --device {FAR}:fake:1 --device {INTS}:fake:1 --out kit.zip"
    assert f"hint: make one on that device: `{command}`" in done.stderr
    assert not Path("run").exists()


def test_a_table_that_lacks_an_operator_stops_before_training(far: Recipe) -> None:
    (path,) = Path("latency_tables", FAR).glob("*.json")
    body = json.loads(path.read_text())
    removed = body["data"]["rows"].pop()
    path.write_text(json.dumps(body))
    with pytest.raises(TableError, match=r"lacks 1 of the network's operators, and it cannot run here") as caught:
        pipeline.run(far, Path("run"))
    assert removed["operator"]["kind"] in caught.value.detail
    assert not (Path("run") / "supernet").exists()


def test_devices_are_told_apart_by_what_runs_on_them(finished: Path) -> None:
    front = load(finished / "front.json", Front)
    assert targets.find(FLOATS, (front.target, *front.also)) == front.also[0]
    assert dict(front.also[0].session)["integer_speedup"] == "0.5"
