"""Beside a run: one more engine of its front, what its passes do, a kit for its model, whether a table still holds."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

import nascompile
from nascompile import (
    build,
    engine,
    explain,
    fronts,
    kit,
    kit_import,
    latency_table,
    models,
    network,
    plugins,
    profiler,
    space as spaces,
    targets,
)  # fmt: skip
from nascompile.backends import CrossCompiler
from nascompile.devices import Job
from nascompile.errors import BudgetError, RecipeError, RecordError, UnsupportedError
from nascompile.pass_check import PassCheck
from nascompile.pipeline import DEVICES, EXPLAIN, Context, Given, locked, tuned, was_tested
from nascompile.program_costs import Chip
from nascompile.progress import Progress, Silent
from nascompile.records import EngineManifest, Environment, Evaluation, Explanation, Front, LatencyTable, Target, digest, load, save
from nascompile.remote_device import RemoteDevice
from nascompile.settings import Recipe


def build_candidate(
    out: Path, number: int, progress: Progress | None = None, device: str = "", backend: str = "", precision: str = network.AS_SEARCHED,
    tune_session: bool | None = None,
) -> Path:  # fmt: skip
    """Build candidate `number` (from 1, cheapest first) of a finished front into `engines/front-<number>`; its folder.

    `device` (NAME[:BACKEND[:THREADS]]), `backend`, `precision`: for another target than the run's, into `engines/front-<number>-<device>`,
    say; for a further device of the search with the precisions that the candidate has there. Its device need not be here if the backend
    can do without it; the manifest then says that the engine was not run. `tune_session`: None: as in the run.
    """
    wanted = targets.Named.parse(device) if device else targets.Named("")
    device, backend = wanted.device, backend or wanted.backend
    recipe = _of_searched(out)
    if tune_session is not None:
        recipe = tuned(recipe, tune_session)
    with locked(out):
        front, e = _of_front(out, number)
        name = f"front-{number}"
        if (device or backend) and front.also and precision == network.AS_SEARCHED:
            text = f"{device or recipe.device}:{backend}:{wanted.threads or ''}"
            if target := targets.find(text, (front.target, *front.also)):
                return _build_searched(Context(recipe, out, progress or Silent(), Given()), e, target, number)
        if device or backend or precision != network.AS_SEARCHED:
            profile = targets.load_profile(device or recipe.device)
            other = msgspec.structs.replace(
                recipe, device=device or recipe.device, backend=backend or ("" if device else recipe.backend), also=(),
                threads=wanted.threads or (0 if profile.core else recipe.threads),
            )  # fmt: skip
            threads = f"t{wanted.threads}" if wanted.threads else ""
            named = [name, other.device, backend, threads, "" if precision == network.AS_SEARCHED else precision]
            context = Context(other, out, progress or Silent(), Given())
            context.space = front.space
            folder = out / "engines" / "-".join(filter(None, named))
            try:
                folder = _build_elsewhere(context, e, folder, precision)
            except BudgetError as error:
                hint = _that_fit(context, front, precision)
                raise BudgetError(error.message, detail=error.detail, hint=hint) from error
            if profile.kind == "serial_m7":
                context.progress.note(_on_board(context, folder))
            return folder
        context = Context(recipe, out, progress or Silent(), Given())
        return _build_searched(context, e, context.target, number)


def train_candidate(out: Path, number: int, progress: Progress | None = None) -> Path:
    """Train candidate `number` of a finished front on by itself, as it is before it is built; the folder of its weights, `candidates/NAME`.

    Neither the device nor the model need be here: a copy of the run folder can be trained in where there is a GPU, and go back.
    """
    recipe = _of_searched(out)
    with locked(out):
        front, e = _of_front(out, number)
        if not recipe.finetune.candidate_epochs:
            again = "say in its recipe for how many epochs, and search again with that: what is trained and scored stays"
            anew = "begin a run with that in its recipe: of this one test was read, so the settings that led to its choice stay"
            raise RecipeError(
                f"candidates of {out} are not trained by themselves: finetune.candidate_epochs is 0",
                hint=anew if was_tested(out) else again,
            )
        context = Context(recipe, out, progress or Silent(), Given())
        context.space, context.model_folder = front.space, out / "supernet"  # nothing outside a copied run folder is looked for
        return context.folder_of(context.trained(e.candidate))


def _of_searched(out: Path) -> Recipe:
    """The recipe of a run; before the lock, which would make the folder."""
    return load(_needed(out, "recipe.json"), Recipe)


def _of_front(out: Path, number: int) -> tuple[Front, Evaluation]:
    """The front of a finished search, and one of its candidates by number."""
    front = load(_needed(out, "front.json"), Front)
    if not 1 <= number <= len(front.evaluations):
        raise RecipeError(f"no such candidate: {number}", hint=f"the front of {out} has 1 to {len(front.evaluations)}")
    return front, front.evaluations[number - 1]


def _needed(out: Path, name: str) -> Path:
    """A file that a run whose search has ended has."""
    if not (out / name).is_file():
        raise RecordError(f"no front in {out}: its search has not ended, or there is none", hint=f"nascompile search RECIPE --out {out}")
    return out / name


def explain_search(out: Path, progress: Progress | None = None) -> Explanation:
    """What the scored candidates of a finished search say of its genes and layers; kept in `explain.json`, where the report finds it."""
    recipe = load(out / "recipe.json", Recipe)
    with locked(out):
        front = load(out / "front.json", Front)
        path = out / EXPLAIN
        if path.is_file() and (found := load(path, Explanation)).front_digest == digest(front):
            return found
        context = Context(recipe, out, progress or Silent(), Given())
        pricings = (context.pricing, *context.further_pricing)
        scored = fronts.scored(out / "journal.jsonl", front)
        found = explain.explain(
            front.space, front, scored, lambda point: tuple(pricing.costs(point)["latency_ms"] for pricing in pricings), recipe.seed,
            context.progress,
        )  # fmt: skip
        save(found, path)
        return found


def _that_fit(context: Context, front: Front, precision: str) -> str:
    """The hint where a candidate does not fit a microcontroller: which of the front do."""
    chip, fit = Chip(context.target), []
    for number, e in enumerate(front.evaluations, 1):
        where = (context.backend, context.target)
        space, point = network.retarget(context.family, context.config, front.space, e.candidate, *where, precision)
        if chip.takes(network.graph(context.family, context.config, space, point, context.target)).fits:
            fit.append(str(number))
    if not fit:
        return f"none of this front fits: search with --device {context.target.device}"
    return f"of this front {', '.join(fit)} would fit: --candidate {fit[-1]}"


def _build_searched(context: Context, e: Evaluation, target: Target, number: int) -> Path:
    """The engine of a front's candidate for one of the devices it was searched for, with its own precisions there."""
    if targets.label(target) == targets.label(context.target):
        folder = context.out / "engines" / f"front-{number}"
        source = context.trained(e.candidate)
        if not context.is_built_here(folder, source, e.candidate):
            context.make(context.parts, context.weights(source), e.candidate, folder.name, "candidate", e.latency, folder)
        return folder
    f = next(f for f in context.further if f.label == targets.label(target))
    if f.absent:
        raise UnsupportedError(f"cannot build for `{f.label}`: {f.absent}", hint="build on that device, from a copy of the run folder")
    folder = context.out / "engines" / f"front-{number}-{f.file}"
    context.build_there(f, folder.name, "candidate", context.trained(e.candidate), e.candidate, folder)
    return folder


def export_kit(
    recipe: Recipe, run: Path | None, out: Path, progress: Progress | None = None, *, provider: kit.Provider = "cpu", processor: str = "",
    threads: int = 0, max_length: int = 0, labels: int = 0, seconds: float = 0.0, networks: int = profiler.NETWORKS,
) -> kit.KitManifest:  # fmt: skip
    """Write a kit for the recipe's model and device to `out`; `run`: a folder whose data stage says how long texts are and what labels.

    Where the recipe names further devices, the kit has the operators that a search for all of them needs a table of the first for.
    `max_length` and `labels` say so where there is no run. `threads`: 0: the device's default. `processor`: see `kit.PROCESSORS`; empty:
    this one for the local device.
    """
    with tempfile.TemporaryDirectory() as scratch:
        context = Context(recipe, run or Path(scratch), progress or Silent(), Given())
        family, config = context.family, context.config
        if run is not None:
            max_length = context.manifest.max_length
        elif not max_length and any("sequence" in spec.shape for spec in family.inputs(config)):
            raise RecipeError(f"{recipe.model} does not say how many tokens a text has", hint="--max-length N, or name a run with its data")
        if labels:
            config.num_labels = labels
        target = targets.make(recipe.device, recipe.backend, family.workload(config, 1, max_length), threads)
        form = kit.form_for(target.backend, provider, processor or ("here" if recipe.device == targets.LOCAL else "any"))
        target = msgspec.structs.replace(target, session=kit.session(target.session, provider))
        precisions = recipe.search.precisions if provider == "cpu" else kit.GPU_PRECISIONS
        of_each = [(form, target), *((plugins.get("backends", t.backend), t) for t in targets.several(target, recipe.also)[1:])]
        weights = models.weights_digest(context.model_folder)
        space = spaces.of_targets(network.shared_space(family, config, of_each, weights, (), precisions), (0,))
        if provider != "cpu":
            space = network.half_space(family, config, space)
        return kit.export(
            family, config, space, target, form, provider, recipe.seed, out, context.progress, seconds=seconds, networks=networks
        )


def import_kit(results: Path, kit_place: Path | None, tables: Path | None, progress: Progress | None = None) -> tuple[Path, LatencyTable]:
    """The table of a kit that was run, and where it is now."""
    table = kit_import.table_of(results, kit_place, progress or Silent())
    return latency_table.store(table, tables), table


def check_passes(engine: Path, progress: Progress | None = None) -> tuple[PassCheck, ...]:
    """What each pass does to a built engine's graph; the graph after each is in `engines/NAME.graphs`, beside the engine's folder."""
    out, manifest = engine.parent.parent, load(engine / "manifest.json", EngineManifest)
    out = out.parent.parent if out.parent.name == DEVICES else out
    recipe = load(out / "recipe.json", Recipe)
    with locked(out):
        other = msgspec.structs.replace(recipe, device=manifest.target.device, backend=manifest.target.backend, also=())
        context = Context(other, out, progress or Silent(), Given())
        if manifest.space is None or manifest.candidate is None:
            raise RecordError(f"the engine does not say what it was built from: {engine}", hint="build it again")
        context.target, context.space = manifest.target, manifest.space
        source = context.source_of(manifest)
        source = replace(source, evaluator=source.evaluator.on(manifest.target.id))
        return build.check_passes(context.parts, source, manifest.candidate, engine.with_name(f"{engine.name}.graphs"))


def environment_there(target: Target) -> Environment:
    """What the device of a target is now that is reached over ssh."""
    return RemoteDevice(target).environment


def canary(table: LatencyTable, model: str = "", run: Path | None = None, progress: Progress | None = None) -> float:
    """Median of now / table over a few operators of a model, or of a run's; TableError if the device is not as fast as it was.

    Nothing is written into the run folder.
    """
    with tempfile.TemporaryDirectory() as scratch:
        recipe = load(run / "recipe.json", Recipe) if run else Recipe(model=model)
        recipe = msgspec.structs.replace(recipe, device=table.target.device, also=())
        context = Context(recipe, run or Path(scratch), Silent(), Given())
        context.target = table.target
        space, work = context.space_of(context.config, ()), Path(scratch) / "canary"
        if context.transport:
            return RemoteDevice(table.target, progress).canary(table, context.family, context.config, space, work, recipe.seed)
        parts = (context.family, context.config, space, context.backend, context.device)
        return float(context.profiler.canary(table, *parts, work, recipe.seed))


def _build_elsewhere(context: Context, searched: Evaluation, folder: Path, precision: str) -> Path:
    """The engine of a candidate for the context's target, which is not the one it was searched for; nothing predicts its latency."""
    unrun = _unrun(context.target, context.backend)
    if unrun and context.recipe.backend == targets.AUTO:
        raise UnsupportedError(f"what cannot run here cannot be chosen by measuring: {unrun}", hint="name a --backend")
    if unrun:  # nor can its session be tuned
        context.recipe = tuned(context.recipe, False)
    weights = context.folder_of(context.trained(searched.candidate))
    context.space, point = network.retarget(
        context.family, context.config, context.space, searched.candidate, context.backend, context.target, precision
    )
    evaluator = context.evaluator(weights, context.method)
    score = evaluator.score(point)
    context.progress.note(
        f"{context.metric} of the emulated network on validation: {score.value:.2f}, {searched.score.value:.2f} as it was searched"
    )
    if context.is_built(folder, context.space, point, evaluator.weights_digest, ""):
        m = load(folder / "manifest.json", EngineManifest)
        versions = (*plugins.get("backends", m.target.backend).versions(), ("nascompile", nascompile.__version__))
        if (m.versions, m.executed) == (versions, not unrun):
            return folder
    remarks = (f"built, not run: {unrun}", context.backend.unrun_remark) if unrun else ()
    parts = replace(context.parts, table_digest="", foreign=(), unrun=remarks)
    context.make(parts, build.Source(evaluator.net, evaluator), point, folder.name, "candidate", None, folder)
    for remark in remarks:
        context.progress.note(remark)
    return folder


def _on_board(context: Context, folder: Path) -> str:
    """What a board on a serial line says of an engine that is flashed to it."""
    manifest = load(folder / "manifest.json", EngineManifest)
    runner = context.backend.load(folder, manifest.graphs, context.target)
    [latency] = context.device.time([Job(folder.name, runner, engine.read_sample(folder)[0])], seconds=0.0, seed=0)
    return f"{context.target.device}: {latency.value:.4g} ms {latency.kind}, {latency.n} calls; outputs as on this computer"


def _unrun(target: Target, backend: Any) -> str:
    """Why an engine for the target can be built here but not run; empty if it can be run. UnsupportedError if it cannot be built."""
    reason, unrun = "", ""
    if isinstance(backend, CrossCompiler):
        reason, unrun = backend.unbuildable(target), backend.unrunnable(target)
    else:
        targets.device(target.device)
        reason = backend.unavailable()
    if reason:
        raise UnsupportedError(f"cannot build for `{target.device}` with {target.backend}: {reason}")
    return unrun
