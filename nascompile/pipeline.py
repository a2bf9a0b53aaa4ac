"""The order of the work, written once: which stage follows which, what each reads, and when it may be skipped."""

from __future__ import annotations

import errno
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import filelock
import msgspec
import numpy as np

from nascompile import (
    build,
    data,
    finetune,
    journal,
    latency_table,
    lowering,
    measure,
    models,
    network,
    places,
    plugins,
    profiler,
    program_costs,
    program_profiler,
    program_runs,
    report,
    rerank,
    scoring,
    several,
    space as spaces,
    targets,
    variants,
    workers,
)
from nascompile.accuracy import Evaluator, best_method
from nascompile.backends import CrossCompiler
from nascompile.errors import DataError, ModelError, NascompileError, RecipeError, RecordError, TableError, UnsupportedError
from nascompile.families import Family
from nascompile.families.encoder import quiet
from nascompile.preprocess import Preprocessor
from nascompile.processes import ALONE, Team, join
from nascompile.program_accuracy import AnyEvaluator, ProgramEvaluator
from nascompile.program_costs import Chip, bounded, is_program
from nascompile.progress import Progress, Silent
from nascompile.quantization import ActivationRanges
from nascompile.records import (
    Budget,
    Candidate,
    Choice,
    Differences,
    EngineManifest,
    Environment,
    Evaluation,
    ForeignUse,
    Front,
    LatencyTable,
    Measurement,
    Operator,
    Record,
    Score,
    SearchSpace,
    StageDone,
    Target,
    Variant,
    Workload,
    digest,
    encode,
    file_digest,
    load,
    save,
    write_atomic,
)
from nascompile.remote_device import RemoteDevice
from nascompile.search import Pricing, search
from nascompile.settings import DEMO, MCU_VIT, TOY, Recipe, SearchSettings
from nascompile.space import largest, uniform
from nascompile.supernet import Supernet, extract
from nascompile.worker import Bench

STAGES = ("data", "profile", "finetune", "search", "build", "measure", "rerank", "report")
DEVICES = "devices"
"""Folder of a run with the engines and measurements of further devices, a folder each."""
FIXED = ("model", "new_head", "data", "task", "metric", "device", "backend", "threads", "seed")
"""Settings that make another run of it: what was measured and scored does not carry over."""
DECIDING = ("budgets", "finetune", "search", "measure", "also")
"""Settings that lead to a choice: fixed once test has been read for one."""
IDLE = ("workers", "ray")
"""Settings of a search that change nothing but how long it takes."""
TEACHER_SHARE, FINETUNE_SHARE, SEARCH_SHARE = 0.25, 0.55, 0.8
"""Parts of `minutes` after which the teacher, the super-network and the search come to an end."""
TableUse = Literal["", "add-missing", "fresh"]
"""Where the profile stage takes its tables from: those stored, with what they lack added, else new ones; only those stored, with what
they lack added; new ones, whatever is stored."""
FRESH = "profiling-fresh"
"""Folder of what a fresh profile has timed so far."""
FOREIGN = "foreign.json"
"""What is foreign about `table.json`; not there where nothing is."""
PREPROCESSOR = "preprocessor_config.json"
EXPLAIN = "explain.json"
"""What `search --explain` found; not there where nobody asked."""


class Method(Record, frozen=True):
    """The calibration method that was chosen on validation, and every method's score for the uniformly quantized baseline."""

    chosen: str
    scores: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Given:
    """Objects in memory that stand in for files: a model (with what prepares its inputs), data by split, a metric."""

    model: Any = None
    processor: Any = None
    data: Mapping[str, Any] = field(default_factory=dict)
    metric: Callable[[Any, Any], float] | None = None
    direction: Literal["maximize", "minimize"] = "maximize"


def run(
    recipe: Recipe, out: Path, *, until: str = STAGES[-1], progress: Progress | None = None, given: Given | None = None,
    table: TableUse = "",
) -> None:  # fmt: skip
    """Run the stages up to `until`, skipping finished ones whose inputs have not changed; everything is in `out` afterwards.

    Of several processes the first does this, the others take part in its trainings; all return when it has ended.
    """
    progress, given, team = progress or Silent(), given or Given(), join()
    if not team.leads:
        return _assist(team, out, given)
    with team.leading():
        _check_target(recipe, until)
        if table == "fresh" and recipe.tables and Path(recipe.tables).is_file():
            raise RecipeError(
                f"--fresh makes a new latency table, and --tables names the one to use: {recipe.tables}",
                hint="name the folder that the new one is to go to, or leave --tables out",
            )
        _lead(team, recipe, out, until, progress, given, table)


def _check_target(recipe: Recipe, until: str) -> None:
    """Refuses, before any work, a device that is unknown, one that nothing can be searched for, and one where no engine can be run."""
    if targets.load_profile(recipe.device).transport and STAGES.index(until) > STAGES.index("search"):
        raise UnsupportedError(
            f"`{recipe.device}` is not here, and its engines cannot be measured from here yet",
            hint=f"`nascompile search --device {recipe.device}` goes as far as that: profiles there, searches here",
        )
    first = targets.make(recipe.device, recipe.backend, Workload(), recipe.threads)
    found = targets.several(first, recipe.also)
    backends = [plugins.get("backends", target.backend) for target in found]
    for target, backend in zip(found, backends, strict=True):
        if isinstance(backend, CrossCompiler):
            raise UnsupportedError(
                f"a search for `{target.device}` is not there yet: its precisions have no genes and no latency table",
                hint=f"search on another device, then `nascompile build RUN --candidate N --device {target.device}`",
            )
    program_runs.check(recipe, found, backends)
    several.check(recipe, first)
    for name in set(recipe.search.precisions) - set(network.SEARCHED):  # those are left out where a backend has no use for them
        reasons = {b.name: b.supports(plugins.get("quantization", name).precision) for b in backends}
        if all(reasons.values()):
            hint = "leave it out of `search.precisions`"
            raise UnsupportedError(f"`{first.backend}` cannot search {name}: {reasons[first.backend]}", hint=hint)


def _lead(team: Team, recipe: Recipe, out: Path, until: str, progress: Progress, given: Given, table: TableUse) -> None:
    with locked(out):
        _sweep(out)
        _keep_recipe(recipe, out)
        if team.remark:
            progress.note(team.remark)
        context = Context(recipe, out, progress, given, team, table)
        for number, stage in enumerate(STAGES[: STAGES.index(until) + 1], 1):
            progress.stage(stage, number, len(STAGES))
            with _room(out):
                context.perform(stage)


def _assist(team: Team, out: Path, given: Given) -> None:
    """Take part in the trainings of the first process, whose recipe and files are those of the run."""
    for call in team.calls():
        context = Context(load(out / "recipe.json", Recipe), out, Silent(), replace(given, model=None, data={}), team)
        finetune.assist(context.training_plan(), call)


class Context:
    """One run: what the stages need, opened when first asked for."""

    def __init__(
        self, recipe: Recipe, out: Path, progress: Progress, given: Given, team: Team = ALONE, table_use: TableUse = ""
    ) -> None:  # fmt: skip
        self.recipe, self.out, self.progress, self.given, self.team, self.table_use = recipe, out, progress, given, team, table_use
        self.began = time.monotonic()
        self.done: dict[str, StageDone] = {}

    def perform(self, stage: str) -> None:
        """Run one stage, or find that it was finished on the same inputs."""
        path = self.out / "stages" / f"{stage}.json"
        inputs = digest(stage, self._inputs(stage))
        unseen = stage == "data" and self.given.data  # objects in memory may have changed: read, compared by what they hold
        anew = stage == "profile" and self.table_use == "fresh"
        if path.is_file() and not unseen and not anew:
            before = load(path, StageDone)
            if before.inputs == inputs and all(_unchanged(self.out / name, sha) for name, sha in before.files):
                self.done[stage] = before
                self.progress.note("done before, nothing to do")
                return
        began = time.monotonic()
        written = getattr(self, f"_{stage}")()
        files = tuple(sorted((str(p.relative_to(self.out)), file_digest(p)) for p in written))
        self.done[stage] = StageDone(stage=stage, inputs=inputs, files=files, seconds=time.monotonic() - began)
        save(self.done[stage], path)

    def _inputs(self, stage: str) -> Any:
        """Everything a stage's result depends on."""
        r, after = self.recipe, {name: done.files for name, done in self.done.items()}
        read: dict[str, Callable[[], Any]] = {
            "data": lambda: (r.model, r.new_head, r.task, r.data, _source_digests(r)),
            "profile": lambda: (
                self.target, self.family.name, self.config.to_json_string(use_diff=False), r.profile_seconds, self.environment,
                r.tables, r.allow_foreign, r.search.precisions, *self._further_inputs(),
            ),
            "finetune": lambda: self._training_inputs(),
            "search": lambda: (after["finetune"], after["profile"], _without(r.search, *IDLE), r.budgets, r.seed),
            "build": lambda: (after["search"], r.measure.top_k, r.measure.safety, *self._rivalry(), *self._own_training()),
            "measure": lambda: (after["build"], _without(r.measure, "tune_session"), r.seed),
            "rerank": lambda: (after["measure"], r.budgets, r.measure.safety, *(after["profile"] if self.further else ())),
            "report": lambda: (after, r, *(file_digest(path) for path in [self.out / EXPLAIN] if path.is_file())),
        }
        return read[stage]()

    def _further_inputs(self) -> tuple[Any, ...]:
        """What the latencies of further devices depend on; nothing where there are none."""
        explicit = several.tables_folder(self.recipe)
        return tuple(
            (f.target, f.transport or (digest(f.table(self._operators(n), explicit).table) if f.absent else f.environment.must_match))
            for n, f in enumerate(self.further, 1)
        )

    def _rivalry(self) -> tuple[Any, ...]:
        """What else engines depend on where variants of them are compared; nothing where they are not."""
        names = self.rivals if self.recipe.backend == targets.AUTO else ()
        versions = tuple(plugins.get("backends", name).versions() for name in names)
        return (names, versions, self.recipe.measure.tune_session) if self.compares else ()

    def _own_training(self) -> tuple[Any, ...]:
        """What the weights of candidates depend on that are trained on; nothing where none are."""
        return (self.recipe.finetune,) if self.recipe.finetune.candidate_epochs else ()

    def _training_inputs(self) -> tuple[Any, ...]:
        """What trained weights depend on; if it changes they are trained again from the start."""
        r, own = self.recipe, self.backend.width_multiple
        shared = math.lcm(own, *(f.backend.width_multiple for f in self.further))
        widths = () if shared == own else (shared,)
        extra = (*widths, *((r.search.precisions,) if r.finetune.quantization_aware_epochs else ()))
        shared_settings = _without(r.finetune, "candidate_epochs")  # which come after the search
        return self.done["data"].files, models.weights_digest(self.model_folder), shared_settings, r.seed, self.metric, self.target, *extra

    # ------------------------------------------------------------------------------------------ what stages share

    @cached_property
    def model_folder(self) -> Path:
        if self.given.model is not None:
            return _stored_model(self.given, self.out / "model")
        if (self.out / "model").is_dir():  # kept by an earlier call
            return self.out / "model"
        if self.recipe.model == DEMO:
            return Path(__file__).parent / "demo" / "model"
        if self.recipe.model == TOY:
            return _toy_model(self.out / "model", self.recipe.seed)
        if self.untrained:
            return _mcu_model(self.out / "model", self.recipe, self.given)
        return models.locate(self.recipe.model)

    @property
    def untrained(self) -> bool:
        """Whether the model is a configuration of a network for microcontrollers, whose weights are random."""
        return self.given.model is None and (self.recipe.model == MCU_VIT or models.is_description(self.recipe.model))

    @cached_property
    def config(self) -> Any:
        """Configuration of the largest network, with the labels of this run once they are known."""
        config = models.read_config(self.model_folder)
        if (self.out / "data" / data.MANIFEST).is_file():
            for name, value in self.head.items():
                setattr(config, name, value)
        return config

    @cached_property
    def head(self) -> dict[str, Any]:
        """Configuration entries of a new head; none where the model's own is kept."""
        if self.manifest.head == "kept":
            return {}
        names = self.manifest.label_names
        if not names:
            return {"num_labels": 1, "problem_type": "regression"}
        return {"num_labels": len(names), "id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}

    @cached_property
    def family(self) -> Family:
        return models.family_of(models.read_config(self.model_folder).model_type)

    @cached_property
    def task(self) -> Any:
        task = plugins.get("tasks", self.recipe.task)
        if self.given.metric is None:
            return task
        from nascompile.tasks.metrics import CustomMetric

        return CustomMetric(task, "custom", self.given.metric, self.given.direction)

    @cached_property
    def metric(self) -> str:
        return self.recipe.metric or self.task.metrics[0]

    @cached_property
    def manifest(self) -> data.DataManifest:
        return data.load_manifest(self.out / "data")

    @cached_property
    def target(self) -> Target:
        workload = self.family.workload(models.read_config(self.model_folder), 1, self.manifest.max_length)
        found = targets.make(self.recipe.device, self.recipe.backend, workload, self.recipe.threads)
        models.check_lowering(self.family, found)
        return found

    @cached_property
    def further(self) -> tuple[several.Further, ...]:
        """Devices after the first that the same network is searched for."""
        return several.further(self.recipe, self.target, self.out)

    @property
    def bounds(self) -> tuple[Budget, ...]:
        """All budgets, each with its target."""
        also = [f.target for f in self.further]
        asked = self.recipe.budgets.bounds(
            self.target.id, [target.id for target in also], several.latencies(self.recipe, (self.target, *also))
        )
        return bounded(asked, self.chip) if self.chip else asked

    @cached_property
    def rivals(self) -> tuple[str, ...]:
        """Backends that every engine is built with, the search's own first."""
        return targets.runnable(self.recipe.device) if self.recipe.backend == targets.AUTO else (self.target.backend,)

    @property
    def compares(self) -> bool:
        """Whether engines are chosen among variants."""
        return self.recipe.backend == targets.AUTO or self.recipe.measure.tune_session

    @cached_property
    def device(self) -> Any:
        return targets.device(self.recipe.device)

    @cached_property
    def backend(self) -> Any:
        return plugins.get("backends", self.target.backend)

    @cached_property
    def chip(self) -> Chip | None:
        """The microcontroller that the run is for; None for anything else."""
        return Chip(self.target) if is_program(self.backend) else None

    @property
    def profiler(self) -> Any:
        """What fills a table of the run's (first) device."""
        return program_profiler if self.chip else profiler

    @cached_property
    def transport(self) -> str:
        """How a device is reached that is not here; empty for one that is."""
        return targets.load_profile(self.recipe.device).transport

    @cached_property
    def environment(self) -> Any:
        if self.transport:  # it is asked what it is when there is something to time: a finished profile needs no connection
            return self.transport
        return self.device.environment(self.target, self.backend.versions()).must_match

    @cached_property
    def table(self) -> LatencyTable:
        return load(self.out / "table.json", LatencyTable)

    @cached_property
    def foreign(self) -> Differences:
        """What differs where the table is of another environment; every result says so."""
        path = self.out / FOREIGN
        return load(path, ForeignUse).differences if path.is_file() else ()

    def space_of(self, config: Any, order: tuple[int, ...]) -> SearchSpace:
        """The search space with its layers in a given order of importance."""
        of_each = ((self.backend, self.target), *((f.backend, f.target) for f in self.further))
        return network.shared_space(
            self.family, config, of_each, models.weights_digest(self.model_folder), order, self.recipe.search.precisions
        )

    def _operators(self, number: int) -> tuple[Operator, ...]:
        """What a complete table of target number `number` has rows for."""
        own = spaces.of_targets(self.space_of(self.config, ()), (number,))
        target = self.further[number - 1].target if number else self.target
        return network.operators(self.family, self.config, own, target)

    @cached_property
    def space(self) -> SearchSpace:
        """What the super-network was trained for, with the precisions that are searched now: training does not depend on them."""
        trained = load(self.out / "supernet" / "manifest.json", SearchSpace)
        now = self.space_of(self.config, trained.layer_order)
        same = (trained.precisions, trained.targets) == (now.precisions, now.targets)
        return now if self.further or not same else trained

    def split(self, name: str, purpose: str) -> data.Split:
        return data.open_split(self.out / "data", name, purpose) if self.team.leads else data.opened_split(self.out / "data", name)

    def evaluator(self, folder: Path, method: str) -> AnyEvaluator:
        """Scores the candidates of the weights in a folder."""
        s = self.recipe.search
        parts = (
            Supernet(self.family, self.family.load(str(folder))), folder, self.space, self.task, self.metric,
            self.split("calibration", "ranges"), self.split("validation", "scores"),
            method, s.calibration_samples, s.validation_samples, self.recipe.seed,
        )  # fmt: skip
        return ProgramEvaluator(*parts, self.target) if self.chip else Evaluator(*parts, self.target.workload.batch)

    def _bench(self, method: str) -> Bench | None:
        """What other processes need to score the super-network's candidates; None where the metric is only known here."""
        s = self.recipe.search
        return None if self.given.metric else Bench(
            weights=str((self.out / "supernet").resolve()), data=str((self.out / "data").resolve()), family=self.family.name,
            space=self.space, task=self.recipe.task, metric=self.metric, method=method, calibration_samples=s.calibration_samples,
            validation_samples=s.validation_samples, seed=self.recipe.seed, batch=self.target.workload.batch,
            program=self.target if self.chip else None,
        )  # fmt: skip

    @cached_property
    def method(self) -> str:
        return load(self.out / "calibration.json", Method).chosen

    @cached_property
    def sources(self) -> dict[str, build.Source]:
        """Weights to build from: the baseline's and the super-network's."""
        return {name: self._opened(name) for name in ("baseline", "supernet")}

    def _opened(self, source: str) -> build.Source:
        evaluator = self.evaluator(self.folder_of(source), self.method)
        return build.Source(evaluator.net, evaluator)

    def weights(self, source: str) -> build.Source:
        """Those of `sources`, or a candidate's own by their name."""
        if source not in self.sources:
            self.sources[source] = self._opened(source)
        return self.sources[source]

    def weights_of(self, point: Candidate) -> str:
        """Name of the weights that a candidate is built with."""
        return finetune.architecture_of(point).id if self.recipe.finetune.candidate_epochs else "supernet"

    def trained(self, point: Candidate) -> str:
        """Name of the weights that a candidate of the run's space is built with, which are there afterwards."""
        if self.recipe.finetune.candidate_epochs:
            finetune.train_candidate(self.training_plan(), spaces.of_targets(self.space, (0,)), point, self.progress)
        return self.weights_of(point)

    def folder_of(self, source: str) -> Path:
        """Of weights by their name."""
        known = {"baseline": finetune.baseline_folder(self.out), "supernet": self.out / "supernet"}
        return known.get(source) or self.out / finetune.CANDIDATES / source

    def built_from(self, manifest: EngineManifest) -> str:
        """Name of the weights that an engine was built from; RecordError if they are gone."""
        own = sorted(folder.name for folder in (self.out / finetune.CANDIDATES).glob("[!.]*"))
        for name in ("supernet", *own) if manifest.role == "candidate" else ("baseline",):
            if models.weights_digest(self.folder_of(name)) == manifest.weights_digest:
                return name
        raise RecordError(f"the weights of {manifest.name} are no longer in {self.out}", hint="build it again")

    def source_of(self, manifest: EngineManifest) -> build.Source:
        """The weights that an engine was built from."""
        return self.weights(self.built_from(manifest))

    @cached_property
    def pricing(self) -> Pricing:
        return self._priced(self.target, self.table)

    @cached_property
    def further_pricing(self) -> tuple[Pricing, ...]:
        """Prices on the further devices."""
        return tuple(self._priced(f.target, load(self.out / "tables" / f"{f.file}.json", LatencyTable)) for f in self.further)

    def _priced(self, target: Target, table: LatencyTable) -> Pricing:
        if self.chip:
            return Pricing(self.family, self.config, self.space, target, table, foreign=self.foreign, chip=self.chip)
        structure = lowering.export(self.family, self.config, self.out / "blueprints").stat().st_size
        return Pricing(self.family, self.config, self.space, target, table, structure, self.foreign if target == self.target else ())

    @cached_property
    def parts(self) -> build.Parts:
        return build.Parts(
            space=self.space, target=self.target, backend=self.backend, blueprints=self.out / "blueprints",
            preprocessor=Preprocessor.from_folder(self.out / "data" / "preprocessor"), hf_config=_shareable(self.config),
            labels=self.manifest.label_names, task=self.recipe.task, sample=self.split("calibration", "reference sample"),
            table_digest=digest(self.table), foreign=self.foreign,
        )  # fmt: skip

    def deadline(self, share: float) -> float:
        """Monotonic time at which a share of `minutes` has passed."""
        return self.began + share * 60 * self.recipe.minutes if self.recipe.minutes else float("inf")

    # ------------------------------------------------------------------------------------------ stages

    def _data(self) -> list[Path]:
        r, folder = self.recipe, self.model_folder
        config = models.read_config(folder)
        program_runs.check_family(self.family, plugins.get("backends", targets.make(r.device, r.backend, Workload()).backend))
        preprocessor = Preprocessor.from_model_folder(
            folder, config.to_dict(), r.data.max_length, [spec.name for spec in self.family.inputs(config)]
        )
        own = None if r.new_head or r.model == TOY or self.untrained or not models.has_head(folder) else config.id2label
        embedded = r.model in (DEMO, TOY, MCU_VIT) and not r.data.data and not self.given.data
        settings, objects = _embedded_data(r) if embedded else (r.data, dict(self.given.data))
        manifest = data.prepare(
            settings, preprocessor, self.task, self.out / "data", id2label=own, sources=objects, progress=self.progress.step
        )
        if own and manifest.head == "new":
            raise ModelError(
                f"the model's head has other labels than the data: {', '.join(models.head_labels(config))}",
                detail=f"labels of the data: {', '.join(manifest.label_names)}",
                hint="rename the data's labels to the head's, or give --new-head to train another head",
            )
        counts = ", ".join(f"{info.name} {info.samples:,}" for info in manifest.splits)
        removed = sum(info.duplicates + info.conflicts for info in manifest.splits)
        self.progress.note(f"{counts}; {removed} duplicates and contradictions left out")
        return [self.out / "data" / data.MANIFEST]

    def _profile(self) -> list[Path]:
        shared = self.space_of(self.config, ())
        explicit = Path(self.recipe.tables) if self.recipe.tables else None
        own = spaces.of_targets(shared, (0,))
        if self.transport:
            table, environment = self._profile_there(own, self.target, explicit)
        else:
            table = self._table(own, self.target, self.backend, self.device, explicit)
            environment = self.device.environment(self.target, self.backend.versions())
        save(table, self.out / "table.json")
        self.progress.note(f"{len(table.rows)} operators, 90 % interval {latency_table.error_text(table)}")
        written, folder = [self.out / "table.json", *self._note_foreign(table, environment)], several.tables_folder(self.recipe)
        for number, f in enumerate(self.further, 1):
            if f.absent:
                self.progress.note(f"{f.label} cannot run here, predictions of its table stand for measurements: {f.absent}")
            if f.transport:
                table, _ = self._profile_there(spaces.of_targets(shared, (number,)), f.target, folder)
            elif f.absent:
                found = f.table(self._operators(number), folder)
                self.progress.note(f"using the latency table {found.path}")
                table = found.table
            else:
                self.progress.note(f"the table of {f.label}")
                device = targets.device(f.target.device)
                table = self._table(spaces.of_targets(shared, (number,)), f.target, f.backend, device, folder)
            save(table, self.out / "tables" / f"{f.file}.json")
            written.append(self.out / "tables" / f"{f.file}.json")
            self.progress.note(f"{f.label}: {len(table.rows)} operators, 90 % interval {latency_table.error_text(table)}")
        _discard(self.out, (FRESH,))
        return written

    def _table(self, space: SearchSpace, target: Target, backend: Any, device: Any, explicit: Path | None) -> LatencyTable:
        """The latency table of a target that runs here: a stored one that still holds, or a new one."""
        environment = device.environment(target, backend.versions())
        operators = (program_costs if self.chip else network).operators(self.family, self.config, space, target)
        found = None
        if self.table_use != "fresh":
            found = latency_table.find(target, environment, operators, explicit, self.recipe.allow_foreign)
        foreign, pace = latency_table.differences(found.table.environment, environment) if found else (), 1.0
        if found and not foreign:
            pace = self._pace(found, operators, space, backend, device)
            found = found if pace else None
        if self.table_use == "add-missing" and found is None:
            raise latency_table.nothing_to_add_to(target, environment, explicit)
        work = self._profiling_folder
        if found and foreign:
            if found.missing:
                raise TableError(
                    f"{found.path} was made elsewhere and lacks {len(found.missing)} of the network's operators",
                    detail="\n".join(operator.label for operator in found.missing),
                    hint="what is timed here cannot be added to it: leave --tables out, and a table of this environment is made",
                )
            self.progress.note(f"using a foreign latency table, with other {', '.join(name for name, _, _ in foreign)}: {found.path}")
            return found.table
        if found and not found.missing:
            self.progress.note(f"using the latency table {found.path}")
            return latency_table.at_pace(found.table, pace)
        if found:
            self.progress.note(f"adding {len(found.missing)} of {len(operators)} operators to the rows of {found.path}")
        table: LatencyTable = self.profiler.profile(
            self.family, self.config, space, target, backend, device, work, self.recipe.seed, self.progress,
            seconds=self.recipe.profile_seconds, existing=found.table if found else None,
        )  # fmt: skip
        self.progress.note(f"new latency table: {latency_table.store(table, explicit)}")
        return latency_table.at_pace(table, pace) if found else table

    @property
    def _profiling_folder(self) -> Path:
        """Where a profile keeps what it has timed until it is finished: a fresh one goes on with nothing that was timed before it."""
        return self.out / (FRESH if self.table_use == "fresh" else "profiling")

    def _pace(
        self, found: latency_table.Found, operators: Sequence[Operator], space: SearchSpace, backend: Any, device: Any
    ) -> float:  # fmt: skip
        """What rows take now over what the table says, 1 where no layer of this space is among them.

        TableError if they do not fit: whoever made the table decides what to do. One that came with the package was made by nobody here,
        and is passed over with a note: 0.
        """
        layers = {segment.kind for segment in self.family.segments(self.config) if segment.layer is not None}
        if not any(operator.kind in layers for operator in operators if operator not in found.missing):
            return 1.0
        try:
            work = self.out / "profiling"
            ratio: float = self.profiler.canary(found.table, self.family, self.config, space, backend, device, work, self.recipe.seed)
        except TableError as error:
            if not places.is_packaged(places.TABLES, found.path):
                raise
            self.progress.note(f"a packaged latency table is passed over: {error.message}: {found.path}")
            return 0.0
        self._say_pace(found, ratio)
        return ratio

    def _say_pace(self, found: latency_table.Found, ratio: float) -> None:
        follows = ", so its times are multiplied by that" * latency_table.is_another_pace(ratio)
        self.progress.note(f"operators take {ratio:.3f} times what {found.path} says{follows}")

    def _note_foreign(self, table: LatencyTable, environment: Environment) -> list[Path]:
        """Keeps what is foreign about the run's table, where something is."""
        path = self.out / FOREIGN
        path.unlink(missing_ok=True)
        foreign = latency_table.differences(table.environment, environment)
        if foreign:
            save(ForeignUse(table_digest=digest(table), differences=foreign), path)
        return [path] if foreign else []

    def _profile_there(self, space: SearchSpace, target: Target, explicit: Path | None) -> tuple[LatencyTable, Environment]:
        """A table of a device over ssh, a stored one that still holds or a new one; and what the device is now."""
        there, fresh, seed = RemoteDevice(target, self.progress), self.table_use == "fresh", self.recipe.seed
        operators = network.operators(self.family, self.config, space, target)
        found = None if fresh else latency_table.find(target, there.environment, operators, explicit, self.recipe.allow_foreign)
        if found and not found.missing:
            if not latency_table.differences(found.table.environment, there.environment):
                pace = there.canary(found.table, self.family, self.config, space, self.out / "profiling", seed)
                self._say_pace(found, pace)
                found = replace(found, table=latency_table.at_pace(found.table, pace))
            self.progress.note(f"using the latency table {found.path}")
            return found.table, there.environment
        if self.table_use == "add-missing":
            if found is None:
                raise latency_table.nothing_to_add_to(target, there.environment, explicit)
            raise UnsupportedError(
                f"operators cannot be added over ssh: {found.path} lacks {len(found.missing)}",
                detail="\n".join(operator.label for operator in found.missing), hint="leave --add-missing out, and all are timed",
            )  # fmt: skip
        work, seconds = self._profiling_folder, self.recipe.profile_seconds
        table = there.profile(self.family, self.config, space, work, seed, seconds, fresh)
        self.progress.note(f"new latency table: {latency_table.store(table, explicit)}")
        return table, there.environment

    def training_plan(self) -> finetune.Plan:
        """What the fine-tuning stage works with, in every process: the first device's space, so that others change no draw."""

        def space_of(config: Any, order: tuple[int, ...]) -> SearchSpace:
            return spaces.of_targets(self.space_of(config, order), (0,))

        return finetune.Plan(
            family=self.family, model=self.model_folder, head=self.head, space_of=space_of, train=self.split("train", "fine-tuning"),
            validation=self.split("validation", "early stopping"), task=self.task, metric=self.metric, settings=self.recipe.finetune,
            seed=self.recipe.seed, out=self.out, teacher_deadline=self.deadline(TEACHER_SHARE), deadline=self.deadline(FINETUNE_SHARE),
            team=self.team,
        )  # fmt: skip

    def _finetune(self) -> list[Path]:
        plan = self.training_plan()
        key = self.out / "training" / "inputs.json"
        wanted = encode(digest(*self._training_inputs()))
        if key.is_file() and key.read_bytes() != wanted:
            _discard(self.out, ("teacher", "supernet", "control", "training", finetune.CANDIDATES))
        write_atomic(key, wanted)
        finetune.finetune(plan, self.progress)
        folders = [self.out / "supernet", finetune.baseline_folder(self.out)]
        return [path for folder in folders for path in sorted(folder.iterdir())]

    def _search(self) -> list[Path]:
        baseline = finetune.baseline_folder(self.out)
        tried = [self.evaluator(baseline, method) for method in self.recipe.search.calibration_methods]
        self.progress.note("choosing the calibration method on the uniformly quantized baseline")
        best, scores = best_method(tried, uniform(self.space))
        save(Method(chosen=best.method, scores=scores), self.out / "calibration.json")
        reference = best.reference()
        save(reference, self.out / "baseline.json")
        self.progress.note(f"baseline {self.metric} {reference.value:.2f} on validation; calibration by {best.method}")
        evaluator, s = self.evaluator(self.out / "supernet", best.method), self.recipe.search
        batch = min(plugins.get("searchers", s.searcher).batch or s.population, s.population) * (1 + len(self.further))
        with workers.opened(
            evaluator, self._bench(best.method), s.workers, s.ray, s.evaluations, self.progress.note, batch
        ) as executor:  # fmt: skip
            front = search(
                evaluator, self.pricing, reference, self.bounds, s, self.recipe.seed, self.out / "journal.jsonl", self.progress,
                self.deadline(SEARCH_SHARE), self.further_pricing, executor,
            )  # fmt: skip
        # every worker is gone by now: engines are never timed while candidates are scored
        front = msgspec.structs.replace(front, absent=tuple((f.target.id, f.absent) for f in self.further if f.absent))
        save(front, self.out / "front.json")
        self.progress.note(f"{front.scored} candidates scored, {len(front.evaluations)} on the front")
        if front.stopped:
            more = " and `--patience 0`" * ("hypervolume" in front.stopped)
            self.progress.note(f"the search was stopped early: {front.stopped}; until test is read, larger `--evaluations`{more} go on")
        return [self.out / name for name in ("calibration.json", "baseline.json", "front.json")]

    def _build(self) -> list[Path]:
        jobs = self._jobs()
        for _, role, _, point in jobs:
            if role == "candidate":
                self.trained(point)
        written, here = [], [f for f in self.further if not f.absent]
        total = len(jobs) * (1 + len(here))
        for number, (name, role, source, point) in enumerate(jobs, 1):
            folder = self.out / "engines" / name
            predicted = self.pricing(point)[1]
            if not (built := self.is_built_here(folder, source, point)):
                self.make(self.parts, self.weights(source), point, name, role, predicted, folder)
            if role == "candidate":
                self._store_subnet(name, source, point, not built)
            written.append(folder / "manifest.json")
            self.progress.step("engines built", number, total)
        for place, f in enumerate(here, 1):
            for number, (name, role, source, point) in enumerate(jobs, 1):
                folder = self.out / DEVICES / f.file / "engines" / name
                self.build_there(f, name, role, source, point, folder)
                written.append(folder / "manifest.json")
                self.progress.step("engines built", place * len(jobs) + number, total)
        wanted = {name for name, *_ in jobs}
        for engines in (self.out / "engines", *(self.out / DEVICES / f.file / "engines" for f in here)):
            for folder in engines.iterdir():
                if folder.name.startswith("candidate-") and folder.name not in wanted:
                    _discard(engines, (folder.name,))
        _discard(self.out / DEVICES, tuple({p.name for p in (self.out / DEVICES).glob("*")} - {f.file for f in here}))
        return written

    def _jobs(self) -> list[tuple[str, str, str, Candidate]]:
        """(name, role, weights, candidate) of every engine of the run, whatever the device."""
        front, reference = load(self.out / "front.json", Front), load(self.out / "baseline.json", Score)
        chosen = rerank.select(front, reference, self.recipe.measure.top_k, self.recipe.measure.safety)
        plain = [
            (rerank.BASELINE, "baseline", "baseline", largest(self.space)), (rerank.UNIFORM, "uniform", "baseline", uniform(self.space)),
        ]  # fmt: skip
        return [
            *(plain if self.chip is None else self._fitting(plain[1:])),
            *((f"candidate-{n}", "candidate", self.weights_of(e.candidate), e.candidate) for n, e in enumerate(chosen, 1)),
        ]

    def _fitting(self, jobs: list[tuple[str, str, str, Candidate]]) -> list[tuple[str, str, str, Candidate]]:
        """Those whose engines the microcontroller holds; a note says why another is not built."""
        assert self.chip is not None
        found = []
        for job in jobs:
            graph = network.graph(self.family, self.config, self.space, job[3], self.target)
            if too_large := program_runs.too_large(self.chip.takes(graph), self.chip):
                self.progress.note(f"{job[0]} is not built: {too_large}")
            else:
                found.append(job)
        return found

    def build_there(self, f: several.Further, name: str, role: str, source: str, point: Candidate, folder: Path) -> None:
        """The engine of a candidate for a further device, with the precisions it has there, unless the folder holds it."""
        pricing = next(p for p in self.further_pricing if p.target == f.target)
        parts = replace(self.parts, target=f.target, backend=f.backend, table_digest=digest(pricing.table))
        weights = self.weights(source)
        if (folder / "manifest.json").is_file():
            m = load(folder / "manifest.json", EngineManifest)
            same = (f.target, point, weights.evaluator.weights_digest, parts.table_digest)
            if (m.target, m.candidate, m.weights_digest, m.table_digest) == same:
                return
        own = build.Source(weights.net, weights.evaluator.on(f.target.id))
        build.build(parts, own, point, name, role, pricing(point)[1], folder)

    def _store_subnet(self, name: str, source: str, point: Any, anew: bool) -> None:
        """The candidate's float weights as a Hugging Face folder of its own, beside the engines."""
        folder = self.out / "subnets" / name
        if not anew and (folder / "candidate.json").is_file() and load(folder / "candidate.json", Candidate) == point:
            return
        _discard(folder.parent, (name,))
        small = extract(self.weights(source).net.model, self.family, self.config, self.space, point)
        folder.parent.mkdir(exist_ok=True)
        finetune.store_model(Supernet(self.family, small), folder, {"candidate.json": point})

    def make(
        self, parts: build.Parts, source: build.Source, point: Candidate, name: str, role: str, predicted: Any, folder: Path
    ) -> EngineManifest:
        """The engine of a candidate: as it comes, or the best of its variants where the recipe asks for a comparison."""
        if not self.compares:
            return build.build(parts, source, point, name, role, predicted, folder)
        if self.chip:
            program_runs.check_variants(self.recipe, self.target)
        ranges = source.evaluator.ranges(point)
        target, tried = self._compare(parts, source, point, ranges, predicted)
        self.progress.note(f"{name}: {variants.describe(tried)}")
        predicted = predicted if target == parts.target else None
        parts, point = build.aimed(parts, point, target, plugins.get("backends", target.backend))
        return build.build(parts, source, point, name, role, predicted, folder, ranges, tried)

    def _compare(
        self, parts: build.Parts, source: build.Source, point: Candidate, ranges: ActivationRanges, predicted: Any
    ) -> tuple[Target, tuple[Variant, ...]]:
        """The target that the candidate runs best on, and what was tried."""
        want = build.expected(parts, source, point, ranges)
        inputs = parts.sample.take(np.arange(parts.target.workload.batch) % len(parts.sample)).arrays()
        check = variants.Check(want.inputs, want.logits, want.tolerance)
        with tempfile.TemporaryDirectory(prefix=".variants.", suffix=".part", dir=self.out) as scratch:
            contenders = [self._contender(name, parts, source, point, ranges, predicted) for name in self.rivals]
            seed, folder = self.recipe.seed, Path(scratch)
            kept, tried = variants.choose(contenders, want.precisions, check, inputs, self.device, folder, seed)
            target = kept.contender.target
            if self.recipe.measure.tune_session:
                logits = next(iter(kept.runner.run(want.inputs).values()))
                own = variants.Check(want.inputs, logits, build.FLOAT_TOLERANCE)
                rounded = replace(own, tolerance=build.rounding_tolerance(logits)) if build.multiplies_integers(want.precisions) else None
                target, settings = variants.tune(kept, own, inputs, self.device, seed, rounded)
                tried += settings
        return target, tried

    def _contender(
        self, name: str, parts: build.Parts, source: build.Source, point: Candidate, ranges: ActivationRanges, predicted: Any
    ) -> variants.Contender:
        if name == parts.target.backend:
            return variants.Contender(parts.target, parts.backend, lambda: build.lower(parts, source, point, ranges), predicted)
        backend = plugins.get("backends", name)
        target = targets.make(self.recipe.device, name, parts.target.workload, parts.target.threads)
        other, moved = build.aimed(parts, point, target, backend)
        return variants.Contender(target, backend, lambda: build.lower(other, source, moved, ranges))

    def is_built_here(self, folder: Path, source: str, point: Any) -> bool:
        return self.is_built(folder, self.space, point, self.weights(source).evaluator.weights_digest, digest(self.table), self.foreign)

    def is_built(
        self, folder: Path, space: SearchSpace, point: Candidate, weights_digest: str, table_digest: str, foreign: Differences = ()
    ) -> bool:
        """Whether a folder holds the candidate's engine, made from these weights and compared as the recipe asks for."""
        if not (folder / "manifest.json").is_file():
            return False
        m = load(folder / "manifest.json", EngineManifest)
        there = point if m.target.id in space.targets else network.moved(space, point, m.target)[1]
        same = (there, weights_digest, table_digest, foreign)
        return (m.candidate, m.weights_digest, m.table_digest, m.foreign) == same and self._compared(m)

    def _compared(self, m: EngineManifest) -> bool:
        """Whether an engine's target is the run's own or was found as the recipe asks for."""
        if not self.compares:
            return m.target == self.target
        plain = msgspec.structs.replace(m.target, backend=self.target.backend, session=self.target.session)
        tuned = any(v.setting for v in m.variants)
        could = bool(plugins.get("backends", m.target.backend).tunable) and self.recipe.measure.tune_session
        return plain == self.target and {v.backend for v in m.variants} == set(self.rivals) and tuned == could

    def _measure(self) -> list[Path]:
        folders = [self.out / Path(name).parent for name, _ in self.done["build"].files]
        out, validation = self.out / "measurements", self.split("validation", "scores of engine files")
        arguments = (validation, self.task, self.metric, self.recipe.measure, self.recipe.seed)
        own = [folder for folder in folders if folder.parent.parent == self.out]
        measured = measure.measure(own, self.device, *arguments, out, self.progress)
        written = [out / f"{m.engine}.json" for m in measured]
        for f in self.further:
            if not f.absent:
                self.progress.note(f"engines on {f.label}")
                home = self.out / DEVICES / f.file
                there = [folder for folder in folders if folder.parent.parent == home]
                found = measure.measure(there, targets.device(f.target.device), *arguments, home / "measurements", self.progress)
                written += [home / "measurements" / f"{m.engine}.json" for m in found]
        pairs = self._agreement(validation, out / "agreement")
        write_atomic(self.out / "agreement.json", msgspec.json.format(encode(measure.agreement(pairs)), indent=1))
        return [*written, self.out / "agreement.json"]

    def _agreement(self, validation: data.Split, folder: Path) -> dict[str, tuple[float, float]]:
        """Candidate ▸ (emulated, engine) validation score for scored candidates drawn at random."""
        source = self.sources["supernet"]
        scored = [
            e for e in journal.read(self.out / "journal.jsonl", Evaluation)
            if (e.score.evaluator_digest, e.score.weights_digest) == (source.evaluator.digest, source.evaluator.weights_digest)
            and e.candidate.space == self.space.id
        ]  # fmt: skip
        scored.sort(key=lambda e: e.candidate.id)  # lines are in the order in which workers were done
        drawn = np.random.default_rng(self.recipe.seed).permutation(len(scored))[: self.recipe.measure.agreement]
        evaluator = source.evaluator
        part = validation.take(evaluator.rows[: program_runs.AGREEMENT_SAMPLES] if self.chip else evaluator.rows)
        pairs = {}
        for number, index in enumerate(drawn, 1):
            e = scored[index]
            path = folder / f"{e.candidate.id}-{source.evaluator.weights_digest[:8]}.json"
            if not path.is_file():
                save(self._engine_score(source, e, part), path)
            emulated = evaluator.score(e.candidate, part) if isinstance(evaluator, ProgramEvaluator) else e.score
            pairs[e.candidate.id] = (emulated.value, load(path, Score).value)
            self.progress.step("emulated against built engines", number, len(drawn))
        return pairs

    def _engine_score(self, source: build.Source, e: Evaluation, part: data.Split) -> Score:
        with tempfile.TemporaryDirectory(prefix=".engine.", suffix=".part", dir=self.out) as scratch:
            graphs = self.backend.build(build.lower(self.parts, source, e.candidate), self.target, Path(scratch))
            runner = self.backend.load(Path(scratch), graphs, self.target)
            digests = (e.score.split_digest, e.score.weights_digest, e.score.evaluator_digest)
            graph = network.graph(self.family, self.config, self.space, e.candidate, self.target)
            batch = scoring.batch_of((node.operator.precision for node in graph.nodes), self.target)
            return scoring.score_runner(runner, part, self.task, self.metric, *digests, batch)

    def _rerank(self) -> list[Path]:
        measured = [load(self.out / name, Measurement) for name, _ in self.done["measure"].files if name.startswith("measurements/")]
        manifests = {m.engine: load(self.out / "engines" / m.engine / "manifest.json", EngineManifest) for m in measured}
        save(rerank.correct(manifests, measured, digest(self.table)), self.out / "correction.json")
        baseline = self._float_score(self.split("validation", "the float network's score")) if self.chip else None
        choice = rerank.choose(manifests, measured, self.bounds, self.recipe.measure.safety, self._there(), baseline)
        path = self.out / "choice.json"
        if path.is_file() and was_tested(self.out) and load(path, Choice) != choice:
            raise DataError(
                f"test was already read for another choice: {load(path, Choice).engine} in {path}", detail=f"this choice: {choice.engine}",
                hint="a test result chosen between is no test result: start a new run with another --out",
            )  # fmt: skip
        save(choice, path)
        self.progress.note(f"chosen: {choice.engine}, {choice.reason}")
        result = rerank.examine(
            choice, self.out / "engines", lambda: self.split("test", "final scores"), self.task, self.metric,
            self.out / "measurements" / "scores", self.recipe.seed, self._float_score if self.chip else None,
        )  # fmt: skip
        save(result, self.out / "test.json")
        return [self.out / name for name in ("correction.json", "choice.json", "test.json")]

    def _float_score(self, split: data.Split) -> Score:
        """The baseline's score of a split where no engine can be made of it."""
        evaluator = self.sources["baseline"].evaluator
        assert isinstance(evaluator, ProgramEvaluator)
        return evaluator.reference(split)

    def _there(self) -> dict[str, list[rerank.There]]:
        """Engine ▸ what its network is on every further device: measured where that runs here, else predicted and emulated."""
        found: dict[str, list[rerank.There]] = {}
        for f, pricing in zip(self.further, self.further_pricing, strict=True):
            for name, _, source, point in self._jobs():
                there = self._predicted(f, pricing, source, point) if f.absent else self._measured(f, name)
                found.setdefault(name, []).append(there)
        return found

    def _predicted(self, f: several.Further, pricing: Pricing, source: str, point: Candidate) -> rerank.There:
        costs, latency, size, *_ = pricing(point)
        reference, front = load(self.out / "baseline.json", Score), load(self.out / "front.json", Front)
        known = {(e.candidate, there.target): there.score for e in front.evaluations for there in e.elsewhere if source == "supernet"}
        if point == largest(self.space) and source == "baseline":  # FP32 everywhere
            known[(point, f.target.id)] = reference
        score = known.get((point, f.target.id)) or self.weights(source).evaluator.on(f.target.id).score(point)
        return rerank.There(f.target.id, f.label, "predicted", latency.value, size, score, reference, costs["memory_mb"])

    def _measured(self, f: several.Further, name: str) -> rerank.There:
        home = self.out / DEVICES / f.file
        m, baseline = (load(home / "measurements" / f"{n}.json", Measurement) for n in (name, rerank.BASELINE))
        if m.score is None or baseline.score is None:
            raise RecordError(f"no validation score in {home / 'measurements'}: {name}", hint="remove the folder and run again")
        manifest = load(home / "engines" / name / "manifest.json", EngineManifest)
        memory = manifest.graph.memory_bytes / 1e6 if manifest.graph else 0.0
        return rerank.There(f.target.id, f.label, m.latency.kind, m.latency.value, manifest.size_bytes, m.score, baseline.score, memory)

    def _report(self) -> list[Path]:
        return list(report.report(self.out))


def plan(recipe: Recipe, out: Path) -> list[dict[str, Any]]:
    """What `run` would do: per stage what, whether it was finished before, and rough minutes and megabytes where they can be told."""
    finished = {path.stem: load(path, StageDone) for path in (out / "stages").glob("*.json")} if out.is_dir() else {}
    s, m, f = recipe.search, recipe.measure, recipe.finetune
    devices = 1 + len(recipe.also)
    shared, each = (f", on {devices} devices", ", for each device that is here") if recipe.also else ("", "")
    engines = m.top_k + 2
    what = {
        "data": "read, check, deduplicate and split the labelled data",
        "profile": f"time every operator of the space on `{recipe.device}`, unless a table of this machine is known"
        + "".join(f"; the same for `{text}`, or its stored table if it is not here" for text in recipe.also),
        "finetune": f"{f.recipe}: {f.epochs} epochs of the super-network after up to {f.teacher_epochs} of a teacher",
        "search": f"{s.searcher}{', space evolution' * s.space_evolution}: up to {s.evaluations} candidates scored on validation{shared}",
        "build": f"{engines} engines: baseline, uniform INT8, {m.top_k} candidates{each}"
        + _compared_as(recipe),
        "measure": f"{engines} engines side by side: latency, throughput at batch {', '.join(map(str, m.batches))}, memory, accuracy",
        "rerank": "choose by what was measured, then read test once",
        "report": "HTML, Markdown and JSON",
    }
    what |= (chip := program_runs.planned(recipe))
    what["build"] += f"; each candidate is trained on by itself for {f.candidate_epochs} epochs before" * bool(f.candidate_epochs)
    size = _weights_megabytes(recipe)
    minutes = {
        "profile": devices * recipe.profile_seconds / 60,
        "measure": devices * engines * (len(m.batches) * m.seconds + measure.LATENCY_SECONDS) / 60,
        "finetune": FINETUNE_SHARE * recipe.minutes or None, "search": (SEARCH_SHARE - FINETUNE_SHARE) * recipe.minutes or None,
    }  # fmt: skip
    minutes |= dict.fromkeys(chip, None)  # nothing of it is timed
    disk = {"finetune": size and 6 * size, "build": size and devices * engines * size}
    return [
        {"stage": stage, "what": what[stage], "done": stage in finished, "minutes": minutes.get(stage), "disk_mb": disk.get(stage)}
        for stage in STAGES
    ]


def tuned(recipe: Recipe, yes: bool) -> Recipe:
    return msgspec.structs.replace(recipe, measure=msgspec.structs.replace(recipe.measure, tune_session=yes))


def _compared_as(recipe: Recipe) -> str:
    """What a plan says of the variants."""
    said = ["by every backend that runs here"] * (recipe.backend == targets.AUTO)
    said += ["with its session settings tried"] * recipe.measure.tune_session
    return f"; each {', '.join(said)}" if said else ""


def _without(settings: Record, *names: str) -> dict[str, Any]:
    """A record's fields but some, which are written down with another stage or decide nothing."""
    return {key: value for key, value in msgspec.structs.asdict(settings).items() if key not in names}


def _shareable(config: Any) -> dict[str, Any]:
    """The configuration as an engine carries it: without the local path it came from, and float32 whatever the checkpoint was."""
    return {key: value for key, value in config.to_dict().items() if key != "_name_or_path"} | {"dtype": "float32"}


def _weights_megabytes(recipe: Recipe) -> float | None:
    folder = Path(__file__).parent / "demo" / "model" if recipe.model == DEMO else Path(recipe.model).expanduser()
    files = list(folder.glob("*.safetensors")) if folder.is_dir() else []
    return sum(path.stat().st_size for path in files) / 1e6 if files else None


@contextmanager
def locked(out: Path) -> Iterator[None]:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise RecipeError(f"the run folder is a file: {out}", hint="give another folder with --out") from error
    lock = filelock.FileLock(out / "lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise RecordError(f"another process is working in this run folder: {out}", hint="wait for it, or give another --out") from error
    try:
        yield
    finally:
        lock.release()


def _sweep(out: Path) -> None:
    """Remove what a killed process was writing; nobody else writes here."""
    for path in (*out.glob("**/.*.part"), *out.glob("**/.*.old"), *out.glob("profiling*/tmp*")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def _room(out: Path) -> Iterator[None]:
    """RecordError for a full disk, whichever library was writing."""
    try:
        yield
    except NascompileError:
        raise
    except Exception as error:  # each library has its own: OSError, SafetensorError, RuntimeError
        if getattr(error, "errno", 0) not in (errno.ENOSPC, errno.EDQUOT) and os.strerror(errno.ENOSPC) not in str(error):
            raise
        raise RecordError(
            f"no space left on the disk: {out}", detail=str(error),
            hint="free some space and run the same command again; everything finished so far is kept",
        ) from error  # fmt: skip


def _keep_recipe(recipe: Recipe, out: Path) -> None:
    """Store the recipe; RecipeError if the folder holds a run of something else, or one that test has been read of for other settings."""
    path = out / "recipe.json"
    if path.is_file():
        before = load(path, Recipe)
        if faults := _differences(before, recipe, FIXED):
            if (out / "stages" / "data.json").is_file():
                raise RecipeError(f"{out} holds another run", detail=faults, hint="give another --out, or the same settings")
            _discard(out, ("model",))  # nothing was done yet, but a model may have been stored
        if (faults := _differences(before, recipe, DECIDING)) and was_tested(out):
            raise RecipeError(
                f"test was read for the choice in {out}: the settings that led to it cannot change any more", detail=faults,
                hint="a test result chosen between is no test result: start a new run with another --out",
            )  # fmt: skip
    save(recipe, path)


def _differences(before: Recipe, now: Recipe, names: tuple[str, ...]) -> str:
    """One line per setting that is not what it was."""
    found = []
    for name in names:
        old, new = (_deciding(recipe, name) for recipe in (before, now))
        fields = getattr(old, "__struct_fields__", ())
        pairs = [(f"{name}.{field}", getattr(old, field), getattr(new, field)) for field in fields] or [(name, old, new)]
        found += [
            f"{what}: {there or repr(there)} there, {asked or repr(asked)} asked for" for what, there, asked in pairs if there != asked
        ]
    return "\n".join(found)


def _deciding(recipe: Recipe, name: str) -> Any:
    """A setting, without what has no influence on any result."""
    if name != "search":
        return getattr(recipe, name)
    return msgspec.structs.replace(recipe.search, **{idle: getattr(SearchSettings(), idle) for idle in IDLE})


def was_tested(out: Path) -> bool:
    """Whether a choice was made in a run folder and its test scores were read: what led to it cannot change any more."""
    return any(entry["split"] == "test" for entry in data.accesses(out / "data"))


def _unchanged(path: Path, sha: str) -> bool:
    return path.is_file() and file_digest(path) == sha


def _discard(folder: Path, names: tuple[str, ...]) -> None:
    for name in names:
        shutil.rmtree(folder / name, ignore_errors=True)


def _source_digests(recipe: Recipe) -> list[tuple[str, str]]:
    """What the data's files hold, so that an edited file is read again."""
    found = []
    for source in (recipe.data.data, recipe.data.calibration, recipe.data.validation, recipe.data.test):
        path = Path(source).expanduser()
        if source and path.is_file():
            found.append((source, file_digest(path)))
        elif source and path.is_dir():
            found.append((source, digest([(str(p.relative_to(path)), p.stat().st_size) for p in sorted(path.rglob("*"))])))
    return found


def _embedded_data(recipe: Recipe) -> tuple[data.DataSettings, dict[str, Any]]:
    if recipe.model == TOY:
        from nascompile.families.toy import demo_data

        return recipe.data, {"train": demo_data(2000, recipe.seed)}
    folder = Path(__file__).parent / "demo"
    names = {"data": "train", "calibration": "calibration", "validation": "validation", "test": "test"}
    return msgspec.structs.replace(recipe.data, **{key: str(folder / f"{name}.parquet") for key, name in names.items()}), {}


def _toy_model(folder: Path, seed: int) -> Path:
    """A freshly initialized toy network, stored once."""
    if not folder.is_dir():
        import torch

        from nascompile.families.toy import ToyConfig

        torch.manual_seed(seed)
        family = plugins.get("families", "toy")
        finetune.store_model(Supernet(family, family.create(ToyConfig(num_labels=3))), folder, {})
    return folder


def _mcu_model(folder: Path, recipe: Recipe, given: Given) -> Path:
    """A vision transformer for microcontrollers with random weights, as its config.json says or for the data's images, stored once."""
    if not folder.is_dir():
        import torch

        from nascompile.families import mcu_vit

        described = Path(recipe.model).expanduser()
        if recipe.model == MCU_VIT:
            settings = recipe.data if recipe.data.data or given.data else _embedded_data(recipe)[0]
            config: Any = mcu_vit.made_for(*data.image_shape(settings, given.data))
        else:
            config = models.read_config(described)
        torch.manual_seed(recipe.seed)
        finetune.store_model(Supernet(mcu_vit.PLUGIN, mcu_vit.PLUGIN.create(config)), folder, {})
        if (described / PREPROCESSOR).is_file():
            shutil.copy(described / PREPROCESSOR, folder / PREPROCESSOR)
    return folder


def _stored_model(given: Given, folder: Path) -> Path:
    """A model in memory, saved with its tokenizer or image processor so that the run can be resumed without it."""
    temporary = folder.with_name(f".{folder.name}.part")
    _discard(folder.parent, (temporary.name,))
    with quiet():
        given.model.save_pretrained(temporary)
    if given.processor is not None:
        given.processor.save_pretrained(temporary)
    if not folder.is_dir():
        temporary.rename(folder)
    elif models.weights_digest(temporary) != models.weights_digest(folder):
        raise RecipeError(f"{folder.parent} holds a run of another model: the weights differ", hint="give another `out`")
    _discard(folder.parent, (temporary.name,))
    return folder
