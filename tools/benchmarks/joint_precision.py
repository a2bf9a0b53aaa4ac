"""Architecture and precision searched at once, against searching them apart, each with the same number of scored candidates.

    python tools/benchmarks/joint_precision.py --json
    python tools/benchmarks/joint_precision.py --tasks fashion --only-search --jobs 2
    python tools/benchmarks/joint_precision.py --stored               # what the last full run found, as it is committed

`fashion`: the embedded vision transformer on Fashion-MNIST. `reviews`: all-MiniLM-L6-v2 on movie-review snippets. Their super-networks and
data are those of the runs that tools/benchmarks/main_job.py makes (--runs); a task that has no run there is trained under --cache.
`toy`: the embedded residual MLP on the simulated device, for the test of the benchmark itself.

Searches (all by the same searcher, for error on validation and the latency that the table predicts on this CPU):
  joint                all genes: depth, heads, widths and the precision of every block
  architecture first   half of the candidates on architectures in FP32, the other half on the precisions of five of that front
  precision only       the whole network, the precision of every block
  uniform INT8         architectures with every block at its cheapest precision
  uniform FP32         architectures in FP32
Cost is the number of candidates scored, each on all of validation, INT8 emulated as the engines compute it. The hypervolume is of error x
latency, below ten points more error than the whole network in FP32 has, and below its latency, as a share of the box down to (0, 0).

Engines: each search's fastest candidate by the table is built that is as accurate on validation as uniform INT8 (the whole network, every
block quantized), one that has no more bytes either, and one within half a point, for the first --engines seeds; of those that the table
has within 2 % of the fastest, the smallest. All engines of a task are timed in turns. Their files are scored on validation and, where the
run's choice is made, on test, which nothing here is chosen by.

Everything is kept under --cache, and what is kept is not done again; a score that is committed is not computed again where weights and
samples are the same. --fresh starts over.
"""

from __future__ import annotations

import argparse
import json
import lzma
import multiprocessing
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from scipy.stats import t as student

from nascompile import data, models, pareto, plugins, searchers, space as spaces
from nascompile.accuracy import Evaluator, best_method
from nascompile.progress import Lines
from nascompile.quantization import ActivationRanges
from nascompile.records import Candidate, LatencyTable, SearchSpace, digest, file_digest, load, save, write_atomic
from nascompile.search import Pricing
from nascompile.searchers import Price, Problem
from nascompile.settings import Budgets, DataSettings, FinetuneSettings, Recipe, check, demo_recipe, toy_recipe
from nascompile.supernet import Supernet

STORED = Path(__file__).resolve().parent / "data" / "joint_precision.json.xz"
TASKS = ("fashion", "reviews", "toy")
JOINT, FIRST, PRECISION, INT8, FP32 = "joint", "architecture first", "precision only", "uniform INT8", "uniform FP32"
METHODS = (JOINT, FIRST, PRECISION, INT8, FP32)
SEEDS = {"fashion": 10, "reviews": 4, "toy": 2}
SEARCHER, POPULATION = "ehvi", 50
PICKED = 5
"""Architectures of the FP32 front whose precisions are searched afterwards."""
WORSE = 10.0
"""Points of error between the whole network in FP32 and the reference point."""
CHECKPOINTS = (25, 50, 75, 100)
BARS = {"as accurate": (0.0, False), "as accurate and no larger": (0.0, True), "within half a point": (0.5, False)}
"""What an engine must be beside uniform INT8 ▸ points that it may lose, whether it may have no more bytes."""
EQUAL = 0.02
"""Latencies that count as equal, as a share."""
ROUNDS, SECONDS = 3, 1.0
"""Windows in which all engines take turns, and timing of an engine in each."""
EMBEDDING = "embedding.precision"
PUBLISHED = {
    "paper": "SimQ-NAS (arXiv 2312.13301)", "latency_speed_up": 4.80, "size_reduction": 3.44,
    "said": "up to, on its own devices and models, against fully INT8 baselines without loss of accuracy",
}  # fmt: skip
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def recipe_of(task: str, runs: Path) -> Recipe:
    """How a super-network is trained for a task that has no run."""
    if task == "toy":
        return toy_recipe()
    if task == "fashion":
        return demo_recipe()
    return check(
        Recipe(
            model=str(runs / "minilm"), data=DataSettings(data=str(runs / "movie_reviews.csv"), test_size=2000, validation_size=1500),
            budgets=Budgets(max_drop=1.0), finetune=FinetuneSettings(teacher_epochs=2, epochs=2), profile_seconds=60.0,
        )
    )  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where a task's run is, and where what this benchmark finds is kept."""

    task: str
    run: Path
    folder: Path

    @classmethod
    def of(cls, task: str, runs: Path, cache: Path) -> Place:
        """The run of main_job.py where there is one with a trained super-network, else one under the cache."""
        there = (runs / task / "supernet" / "manifest.json").is_file()
        return cls(task, runs / task if there else cache / task / "run", cache / task)

    def prepare(self, runs: Path) -> None:
        """The run's super-network and data, the method of calibration and the latency table, if they are not there."""
        if not (self.run / "supernet" / "manifest.json").is_file():
            from nascompile import pipeline

            recipe = recipe_of(self.task, runs)
            if recipe.data.data and not Path(recipe.data.data).is_file():
                raise SystemExit(f"error: {recipe.data.data} is not there\n\nhint: python tools/benchmarks/main_job.py --tasks {self.task}")
            pipeline.run(recipe, self.run, until="finetune", progress=Lines(5.0))
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "table.json").is_file():
            self._profile()
        world = World(self, "cpu", leads=True)
        for name in ("calibration", "validation"):
            world.split(name)  # other processes then may
        if not (self.folder / "method").is_file():
            write_atomic(self.folder / "method", world.chosen_method().encode())

    def _profile(self) -> None:
        """The run's own table if it still holds here, else a new one."""
        from nascompile import latency_table, network, profiler, targets

        recipe, space = load(self.run / "recipe.json", Recipe), load(self.run / "supernet" / "manifest.json", SearchSpace)
        config = models.read_config(self.run / "supernet")
        family, length = models.family_of(config.model_type), data.load_manifest(self.run / "data").max_length
        target = targets.make(recipe.device, recipe.backend, family.workload(config, 1, length), recipe.threads)
        backend, device, work = plugins.get("backends", target.backend), targets.device(recipe.device), self.folder / "profiling"
        environment, operators = device.environment(target, backend.versions()), network.operators(family, config, space, target)
        own = self.run / "table.json"
        table = load(own, LatencyTable) if own.is_file() else None
        holds = table is not None and not latency_table.differences(table.environment, environment)
        if table is None or not holds or not set(operators) <= {row.operator for row in table.rows}:
            table = profiler.profile(
                family, config, space, target, backend, device, work, recipe.seed, Lines(5.0), seconds=recipe.profile_seconds
            )
        save(table, self.folder / "table.json")


class World:
    """A task opened: its space, prices and scores."""

    def __init__(self, place: Place, device: str, leads: bool = False) -> None:
        self.place, self.device, self.leads = place, device, leads
        self.recipe = load(place.run / "recipe.json", Recipe)
        self.space = load(place.run / "supernet" / "manifest.json", SearchSpace)
        self.config = models.read_config(place.run / "supernet")
        self.family = models.family_of(self.config.model_type)
        self.table = load(place.folder / "table.json", LatencyTable)
        self.target = self.table.target
        if self.space.targets != (self.target.id,):
            raise SystemExit(f"error: {place.folder / 'table.json'} is for {self.target.id}, the run for {', '.join(self.space.targets)}")
        self.pricing = Pricing(self.family, self.config, self.space, self.target, self.table)
        self.manifest = data.load_manifest(place.run / "data")

    def split(self, name: str) -> data.Split:
        folder = self.place.run / "data"
        return data.open_split(folder, name, "joint precision") if self.leads or name == "test" else data.opened_split(folder, name)

    @cached_property
    def method(self) -> str:
        """How ranges of activations are found."""
        return (self.place.folder / "method").read_text()

    @cached_property
    def scoring(self) -> str:
        """Digest of what decides a candidate's score."""
        weights = digest([file_digest(p) for p in sorted((self.place.run / "supernet").glob("*.safetensors"))])
        samples = [info.digest for info in self.manifest.splits if info.name in ("calibration", "validation")]
        return digest(weights, self.space.id, self.method, self.recipe.search.calibration_samples, samples)

    def evaluator(self, method: str) -> Evaluator:
        """Scores on all of validation."""
        task, seed = plugins.get("tasks", self.recipe.task), self.recipe.seed
        return Evaluator(
            Supernet(self.family, self.family.load(str(self.place.run / "supernet"))), self.place.run / "supernet", self.space, task,
            self.recipe.metric or task.metrics[0], self.split("calibration"), self.split("validation"), method,
            self.recipe.search.calibration_samples, 0, seed, self.target.workload.batch,
        )  # fmt: skip

    def chosen_method(self) -> str:
        """As the pipeline chooses it: what is best for the whole quantized network on validation."""
        kept = self.place.run / "calibration.json"
        if kept.is_file():
            return str(json.loads(kept.read_text())["data"]["chosen"])
        return best_method([self.evaluator(m) for m in self.recipe.search.calibration_methods], spaces.uniform(self.space))[0].method

    @cached_property
    def scorer(self) -> Evaluator:
        """The evaluator of the searches, on this process's device, with products in full precision."""
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        found = self.evaluator(self.method)
        found.net.to(self.device)
        for name in ("calibration", "validation"):
            moved = [({k: v.to(self.device) for k, v in inputs.items()}, labels.to(self.device)) for inputs, labels in getattr(found, name)]
            setattr(found, name, moved)
        return found

    def error(self, point: Candidate, known: dict[str, float]) -> float:
        """Percent of validation; `known`: genome ▸ error, added to."""
        key = self.genome(point)
        if key not in known:
            known[key] = round(100 - self.scorer.score(point).value, 6)
        return known[key]

    def latency(self, point: Candidate) -> float:
        """Predicted, in ms."""
        return self.pricing.costs(point)["latency_ms"]

    def size_mb(self, genome: str) -> float:
        """Of the weights."""
        return self.pricing.costs(self.candidate(genome))["size_mb"]

    def genome(self, point: Candidate) -> str:
        """Indices of the candidate's choices, a character each; inactive genes 0."""
        return "".join(DIGITS[index] for index in spaces.encode(self.space, point))

    def candidate(self, genome: str) -> Candidate:
        return spaces.decode(self.space, tuple(DIGITS.index(c) for c in genome))

    @cached_property
    def reference(self) -> tuple[float, float]:
        """(error in percent, latency in ms) that the hypervolume is counted from, given what the whole network in FP32 has."""
        return self.error(spaces.largest(self.space), self.known) + WORSE, self.latency(spaces.largest(self.space))

    @cached_property
    def known(self) -> dict[str, float]:
        """Scores of all finished searches of the same weights and samples, those that are committed too."""
        kept = [msgspec.json.decode(path.read_bytes(), type=Search) for path in sorted((self.place.folder / "searches").glob("*.json"))]
        searches = [*msgspec.convert(stored().get("searches", []), type=list[Search]), *kept]
        found: dict[str, float] = {}
        for one in searches:
            if one.scoring == self.scoring:
                found.update(zip(one.genomes, one.errors, strict=True))
        return found


# ------------------------------------------------------------------------------------------------ one search


@dataclass(frozen=True)
class Search:
    """Candidates in the order they were scored."""

    task: str
    method: str
    seed: int
    scoring: str
    code: str
    """Digest of the searcher's source."""
    genomes: tuple[str, ...]
    errors: tuple[float, ...]
    latencies: tuple[float, ...]
    seconds: float


def held(space: SearchSpace, values: Mapping[str, Any]) -> SearchSpace:
    """The space with some genes at one choice; its points are points of the space."""
    genes = tuple(msgspec.structs.replace(g, choices=(values[g.name],)) if g.name in values else g for g in space.genes)
    return msgspec.structs.replace(space, genes=genes)


def kind(space: SearchSpace, name: str, choice: int) -> dict[str, Any]:
    """Every gene of a kind ▸ its first or last choice."""
    return {gene.name: gene.choices[choice] for gene in space.genes if gene.kind == name}


def follow(world: World, part: SearchSpace, seed: int, budget: int, known: dict[str, float]) -> list[tuple[str, float, float]]:
    """(genome, error, latency) of what a search in a part of the space scores, at most `budget`."""

    def whole(point: Candidate) -> Candidate:
        return spaces.candidate(world.space, spaces.genome(part, point))

    run = plugins.get("searchers", SEARCHER).start(
        Problem(part, 2, lambda point: Price((None, world.latency(whole(point))))), POPULATION, (), seed
    )
    found: list[tuple[str, float, float]] = []
    while len(found) < budget:
        asked = run.ask()
        if not asked:
            break
        points = [whole(point) for point in asked[: budget - len(found)]]
        rows = [(world.genome(point), world.error(point, known), world.latency(point)) for point in points]
        found += rows
        if len(points) == len(asked):
            run.tell(asked, np.array([row[1:] for row in rows]), np.zeros(len(rows)))
    return found


def front(rows: Sequence[tuple[str, float, float]]) -> list[tuple[str, float, float]]:
    """What no other dominates, the fastest first."""
    chosen = [rows[i] for i in pareto.front([row[1:] for row in rows])]
    return sorted(chosen, key=lambda row: (row[2], row[1], row[0]))


def architecture_first(world: World, seed: int, budget: int, known: dict[str, float]) -> list[tuple[str, float, float]]:
    """Half on FP32 architectures, then as much on the precisions of a few of that front, evenly over its latencies."""
    space = world.space
    found = follow(world, held(space, kind(space, "precision", 0)), seed, budget // 2, known)
    edge = front(found)
    picked = [edge[i] for i in sorted({round(i) for i in np.linspace(0, len(edge) - 1, PICKED)})]
    for number, (genome, _, _) in enumerate(picked):
        fixed = kind(space, "architecture", 0) | dict(world.candidate(genome).architecture)
        share = (budget - len(found)) // (len(picked) - number)
        seen = {row[0] for row in found}
        rows = follow(world, held(space, fixed), seed, share + 1, known)
        found += [row for row in rows if row[0] not in seen][:share]  # in FP32 it was scored before
    return found


def search(world: World, method: str, seed: int, budget: int, known: dict[str, float]) -> Search:
    """One search of a method."""
    began, space = time.monotonic(), world.space
    fixed = {
        JOINT: {}, PRECISION: kind(space, "architecture", -1), INT8: kind(space, "precision", -1), FP32: kind(space, "precision", 0),
    }  # fmt: skip
    if method == FIRST:
        rows = architecture_first(world, seed, budget, known)
    else:
        rows = follow(world, held(space, fixed[method]), seed, budget, known)
    genomes, errors, latencies = zip(*rows, strict=True)
    return Search(world.place.task, method, seed, world.scoring, code_digest(), genomes, errors, latencies, time.monotonic() - began)


def code_digest() -> str:
    """Of what decides which candidates a search asks for."""
    folder = Path(searchers.__file__).parent
    return digest([file_digest(folder / f"{name}.py") for name in ("__init__", SEARCHER, "encoding", "blocks", "gaussian")])


def curve(found: Search, reference: tuple[float, float]) -> dict[int, float]:
    """Hypervolume at each checkpoint and at the end, as a share of the box."""
    points = np.column_stack([found.errors, found.latencies])
    counts = [c for c in CHECKPOINTS if c < len(points)] + [len(points)]
    return {c: _volume(points[:c], reference) for c in counts}


def _volume(points: Any, reference: tuple[float, float]) -> float:
    """As a share of the box between the reference and zero."""
    return pareto.hypervolume(np.array(points), reference) / (reference[0] * reference[1])


# ------------------------------------------------------------------------------------------------ all of them


@dataclass(frozen=True)
class Bench:
    runs: Path
    cache: Path
    budget: int

    def place(self, task: str) -> Place:
        return Place.of(task, self.runs, self.cache)

    def key(self, world: World) -> str:
        """What a search depends on beside its method, its seed and the searcher's code, of which a changed one is told of."""
        return digest(world.scoring, file_digest(world.place.folder / "table.json"), self.budget, SEARCHER, POPULATION, PICKED)[:12]

    def path(self, world: World, method: str, seed: int) -> Path:
        return world.place.folder / "searches" / f"{method.replace(' ', '_')}-{seed}-{self.key(world)}.json"


_OPEN: dict[str, World] = {}
_WHERE = "cpu"
"""Of a worker process: what it has opened, and the device that it scores on."""


def _begin(device: str, counter: Any) -> None:
    """In a worker process: one thread, and one of the GPUs."""
    global _WHERE
    torch.set_num_threads(1)
    with counter.get_lock():
        number, counter.value = counter.value, counter.value + 1
    _WHERE = f"cuda:{number % torch.cuda.device_count()}" if device == "cuda" else "cpu"


def _perform(bench: Bench, task: str, method: str, seed: int) -> float:
    if task not in _OPEN:
        _OPEN[task] = World(bench.place(task), _WHERE)
    world = _OPEN[task]
    found = search(world, method, seed, bench.budget, world.known)
    write_atomic(bench.path(world, method, seed), msgspec.json.encode(found))
    return found.seconds


def perform(
    bench: Bench, worlds: Mapping[str, World], seeds: Mapping[str, int], device: str, jobs: int
) -> dict[str, dict[str, list[Search]]]:
    """Every search, from the cache where it is there."""
    began, paths = time.monotonic(), {}
    for task, world in worlds.items():
        (world.place.folder / "searches").mkdir(exist_ok=True)
        paths |= {(task, method, seed): bench.path(world, method, seed) for seed in range(seeds[task]) for method in METHODS}
    todo = [key for key, path in paths.items() if not path.is_file()]
    if jobs == 1:
        for done, (task, method, seed) in enumerate(todo, 1):
            one = search(worlds[task], method, seed, bench.budget, worlds[task].known)
            write_atomic(paths[task, method, seed], msgspec.json.encode(one))
            said = f"{task}, {method}, seed {seed}: {one.seconds:.0f} s, {done} of {len(todo)} searches"
            print(f"{time.monotonic() - began:6.0f} s  {said}", file=sys.stderr, flush=True)
    elif todo:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(jobs, len(todo)), context, _begin, (device, context.Value("i", 0))) as pool:
            running = {pool.submit(_perform, bench, *key): key for key in todo}
            for done, future in enumerate(as_completed(running), 1):
                task, method, seed = running[future]
                said = f"{task}, {method}, seed {seed}: {future.result():.0f} s, {done} of {len(todo)} searches"
                print(f"{time.monotonic() - began:6.0f} s  {said}", file=sys.stderr, flush=True)
    found: dict[str, dict[str, list[Search]]] = {}
    for (task, method, _), path in paths.items():
        found.setdefault(task, {}).setdefault(method, []).append(msgspec.json.decode(path.read_bytes(), type=Search))
    return found


def stored() -> dict[str, Any]:
    """The committed result of a full run; empty where there is none."""
    return json.loads(lzma.decompress(STORED.read_bytes())) if STORED.is_file() else {}  # type: ignore[no-any-return]


# ------------------------------------------------------------------------------------------------ engines


def chosen(world: World, found: Mapping[str, Sequence[Search]], seeds: int, name: str) -> dict[str, list[str | None]]:
    """Method ▸ per seed the genome of its fastest candidate that keeps a bar; None where there is none."""
    (loss, no_larger), uniform = BARS[name], spaces.uniform(world.space)
    bar, most = world.error(uniform, world.known) + loss + 1e-9, world.size_mb(world.genome(uniform)) if no_larger else float("inf")
    best: dict[str, list[str | None]] = {}
    for method, searches in found.items():
        for one in searches[:seeds]:
            rows = [(ms, genome) for ms, error, genome in zip(one.latencies, one.errors, one.genomes, strict=True) if error <= bar]
            rows = [(ms, genome) for ms, genome in rows if world.size_mb(genome) <= most]
            least = min((ms for ms, _ in rows), default=0.0)
            equal = [(world.size_mb(genome), ms, genome) for ms, genome in rows if ms <= (1 + EQUAL) * least]
            best.setdefault(method, []).append(min(equal)[2] if equal else None)
    return best


def measured(world: World, genomes: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Genome ▸ what its engine shows: ms in each window, bytes, error on validation and on test."""
    from nascompile import scoring, targets
    from nascompile.devices import Job
    from nascompile.errors import DataError

    folders = {genome: _engine(world, genome) for genome in genomes}
    device = targets.device(world.recipe.device)
    environment = device.environment(world.target, plugins.get("backends", world.target.backend).versions())
    engines = {genome: scoring.Loaded.open(folder) for genome, folder in folders.items()}
    kept = world.place.folder / f"measured-{digest([e.manifest.files for e in engines.values()], environment.must_match, ROUNDS)[:12]}.json"
    if kept.is_file():
        return json.loads(kept.read_text())  # type: ignore[no-any-return]
    splits, task = {"validation": world.split("validation")}, plugins.get("tasks", world.recipe.task)
    try:
        splits["test"] = world.split("test")
    except DataError as error:
        print(f"{world.place.task}: no scores on test: {error.message}", file=sys.stderr)
    metric, one = world.recipe.metric or task.metrics[0], splits["validation"].take(np.arange(1)).arrays()
    rows: dict[str, dict[str, Any]] = {}
    for genome, engine in engines.items():
        scores = world.place.folder / "scores"
        errors = {name: 100 - scoring.score_engine(engine, split, task, metric, scores).value for name, split in splits.items()}
        rows[genome] = {"size_bytes": engine.manifest.size_bytes, "error": errors, "ms": []}
    jobs = [Job(genome, engine.runner, one) for genome, engine in engines.items()]
    for number in range(ROUNDS):
        for genome, quantity in zip(engines, device.time(jobs, seconds=SECONDS * len(jobs), seed=number), strict=True):
            rows[genome]["ms"].append(quantity.value)
    write_atomic(kept, json.dumps(rows).encode())
    return rows


def _engine(world: World, genome: str) -> Path:
    """The candidate's engine folder, built if it is not there."""
    from nascompile import build
    from nascompile.preprocess import Preprocessor
    from nascompile.records import EngineManifest

    point = world.candidate(genome)
    folder = world.place.folder / "engines" / f"{point.id}-{digest(world.scoring, digest(world.table))[:8]}"
    versions = plugins.get("backends", world.target.backend).versions()
    if (folder / "manifest.json").is_file():
        if set(versions) <= set(load(folder / "manifest.json", EngineManifest).versions):
            return folder
        shutil.rmtree(folder)
    evaluator = world.scorer
    config = {key: value for key, value in world.config.to_dict().items() if key != "_name_or_path"} | {"dtype": "float32"}
    parts = build.Parts(
        space=world.space, target=world.target, backend=plugins.get("backends", world.target.backend),
        blueprints=world.place.folder / "blueprints", preprocessor=Preprocessor.from_folder(world.place.run / "data" / "preprocessor"),
        hf_config=config, labels=world.manifest.label_names, task=world.recipe.task, sample=world.split("calibration"),
        table_digest=digest(world.table),
    )  # fmt: skip
    ranges: ActivationRanges = evaluator.ranges(point)
    build.build(parts, build.Source(evaluator.net, evaluator), point, folder.name, "candidate", world.pricing(point)[1], folder, ranges)
    return folder


# ------------------------------------------------------------------------------------------------ what came out


def spread(values: Sequence[float]) -> list[float]:
    """[median, lowest, highest]."""
    return [float(np.median(values)), float(min(values)), float(max(values))]


def difference(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """[mean of a - b, and its 95 % interval over seeds]; the same seeds in both."""
    gaps = np.subtract(a, b)
    half = float(student.ppf(0.975, len(gaps) - 1) * gaps.std(ddof=1) / np.sqrt(len(gaps))) if len(gaps) > 1 else float("inf")
    return [float(gaps.mean()), float(gaps.mean()) - half, float(gaps.mean()) + half]


def summary(world: World, found: Mapping[str, Sequence[Search]], budget: int) -> dict[str, Any]:
    """Hypervolumes per method over seeds, and what joint fronts are made of."""
    reference = world.reference
    curves = {method: [curve(one, reference) for one in searches] for method, searches in found.items()}
    last = {method: [max(c.items())[1] for c in all_] for method, all_ in curves.items()}
    rows = {}
    for method, all_ in curves.items():
        rows[method] = {
            "scored": spread([len(one.genomes) for one in found[method]]),
            "hypervolume": [float(np.mean(last[method])), float(np.std(last[method], ddof=1)) if len(all_) > 1 else None],
            "all_seeds_together": _volume([row for one in found[method] for row in zip(one.errors, one.latencies, strict=True)], reference),
            "at": {str(c): float(np.mean([each[c] for each in all_])) for c in sorted(set.intersection(*(set(each) for each in all_)))},
            "joint_is_ahead_by": difference(last[JOINT], last[method]) if method != JOINT else None,
        }
    environment = {**dict(world.table.environment.must_match), **dict(world.table.environment.recorded)}
    return {
        "task": world.place.task, "candidates": spaces.size(world.space), "budget": budget, "seeds": len(found[JOINT]),
        "reference": {"error": reference[0], "latency_ms": reference[1]}, "methods": rows, "front": fronts(world, found[JOINT], reference),
        "table_interval": world.table.relative_error,
        "searcher_unchanged": all(one.code == code_digest() for searches in found.values() for one in searches),
        "environment": {name: environment[name] for name in ("cpu", "threads", "onnxruntime", "os") if name in environment},
    }  # fmt: skip


def made_of(world: World, genome: str) -> str:
    """What precisions a candidate has: all FP32, all quantized, so but for the embedding, or mixed otherwise."""
    point = world.candidate(genome)
    own, cheap = dict(point.precision[0][1]), dict(spaces.quantized(world.space, point).precision[0][1])
    if set(own.values()) == {"fp32"}:
        return "fp32"
    left = {name for name, value in own.items() if value != cheap[name]}
    return "mixed" if left - {EMBEDDING} else "embedding in FP32" if left else "quantized"


def fronts(world: World, searches: Sequence[Search], reference: tuple[float, float]) -> dict[str, Any]:
    """Shares of what candidates on fronts of joint searches are made of, and the hypervolume without the mixed ones, mean over seeds."""
    counts, without = {"fp32": 0, "quantized": 0, "embedding in FP32": 0, "mixed": 0}, []
    for one in searches:
        rows = list(zip(one.genomes, one.errors, one.latencies, strict=True))
        for genome, _, _ in front(rows):
            counts[made_of(world, genome)] += 1
        without.append(_volume([row[1:] for row in rows if made_of(world, row[0]) != "mixed"], reference))
    shares = {name: count / sum(counts.values()) for name, count in counts.items()}
    return {"shares": shares, "hypervolume_without_mixed": float(np.mean(without)), "embedding": embedding(world)}


def embedding(world: World) -> dict[str, float] | None:
    """Of scored candidates that differ in the embedding's precision alone: points of error that FP32 adds, mean and deviation."""
    slots = spaces.gene_names(world.space)
    if EMBEDDING not in slots:
        return None
    place, known = slots.index(EMBEDDING), world.known
    pairs = [(g, g[:place] + "1" + g[place + 1 :]) for g in known if g[place] == "0"]
    gaps = [known[a] - known[b] for a, b in pairs if b in known]
    return {"pairs": len(gaps), "mean": float(np.mean(gaps)), "deviation": float(np.std(gaps))} if gaps else None


def engines(world: World, found: Mapping[str, Sequence[Search]], seeds: int) -> dict[str, Any]:
    """Engines at the accuracy of uniform INT8, against that engine and the whole network in FP32."""
    whole = {"FP32": world.genome(spaces.largest(world.space)), "INT8": world.genome(spaces.uniform(world.space))}
    best = {name: chosen(world, found, seeds, name) for name in BARS}
    picked = [genome for methods in best.values() for genomes in methods.values() for genome in genomes if genome]
    shown = measured(world, dict.fromkeys([*whole.values(), *picked]))
    predicted = {genome: world.latency(world.candidate(genome)) for genome in shown}
    entry: dict[str, Any] = {
        "whole_networks": {name: _engine_row(world, shown, genome, whole["INT8"]) for name, genome in whole.items()}, "bars": {},
        "prediction_error_percent": spread([100 * (predicted[g] / float(np.median(row["ms"])) - 1) for g, row in shown.items()]),
        "published": PUBLISHED,
    }  # fmt: skip
    for bar, methods in best.items():
        part = entry["bars"][bar] = {}
        for method, genomes in methods.items():
            rows = [_engine_row(world, shown, genome, whole["INT8"]) for genome in genomes if genome]
            part[method] = {"seeds": len(genomes), "found": len(rows), "engines": rows}
            for name in ("speed_up", "size_reduction", "points_on_validation", "points_on_test"):
                if rows and all(row.get(name) is not None for row in rows):
                    part[method][name] = spread([row[name] for row in rows])
    return entry


def _engine_row(world: World, shown: Mapping[str, Mapping[str, Any]], genome: str, base: str) -> dict[str, Any]:
    """An engine beside that of uniform INT8: ratios are of the same windows."""
    own, other = shown[genome], shown[base]
    ratios = [b / a for a, b in zip(own["ms"], other["ms"], strict=True)]
    points = {name: other["error"][name] - own["error"][name] for name in own["error"]}
    return {
        "genome": genome, "candidate": world.candidate(genome).id, "latency_ms": spread(own["ms"]), "size_mb": own["size_bytes"] / 1e6,
        "predicted_ms": world.latency(world.candidate(genome)), "accuracy": {name: 100 - value for name, value in own["error"].items()},
        "speed_up": float(np.median(ratios)), "speed_up_windows": spread(ratios),
        "size_reduction": other["size_bytes"] / own["size_bytes"], "points_on_validation": points["validation"],
        "points_on_test": points.get("test"),
    }  # fmt: skip


def show(rows: Iterable[Mapping[str, Any]]) -> None:
    for row in rows:
        where = ", ".join(f"{name} {value}" for name, value in row["environment"].items())
        print(f"\n{row['task']}: {row['candidates']:.2g} candidates, {row['budget']} scored in each search, {row['seeds']} seeds; {where}")
        error, ms = row["reference"]["error"], row["reference"]["latency_ms"]
        print(f"  hypervolume below {error:.2f} % error and {ms:.3f} ms (table ±{row['table_interval']:.1%})")
        if not row["searcher_unchanged"]:
            print(f"  searched by an earlier state of `{SEARCHER}`: --fresh searches again")
        for method, found in row["methods"].items():
            mean, deviation = found["hypervolume"]
            text = f"  {method:20} {mean:.4f}" + ("" if deviation is None else f" ± {deviation:.4f}")
            text += f" (all seeds together {found['all_seeds_together']:.4f})"
            if found["joint_is_ahead_by"]:
                text += "  joint is ahead by {:+.4f} [{:+.4f}, {:+.4f}]".format(*found["joint_is_ahead_by"])
            print(text)
        made, text = row["front"], ", ".join(f"{name} {share:.0%}" for name, share in row["front"]["shares"].items())
        print(f"  joint fronts: {text}; without the mixed ones {made['hypervolume_without_mixed']:.4f}")
        if pairs := made["embedding"]:
            print(f"  an embedding in FP32: {pairs['mean']:+.2f} ± {pairs['deviation']:.2f} points of error in {pairs['pairs']} pairs")
        if not row.get("engines"):
            continue
        found = row["engines"]
        for name, one in found["whole_networks"].items():
            accuracy = ", ".join(f"{split} {value:.2f} %" for split, value in one["accuracy"].items())
            print(f"  whole network in {name}: {one['latency_ms'][0]:.3f} ms, {one['size_mb']:.2f} MB, {accuracy}")
        for bar, methods in found["bars"].items():
            print(f"  the fastest {bar}; against uniform INT8's engine, median (lowest, highest) over seeds:")
            for method, one in methods.items():
                text = f"    {method:20} {one['found']} of {one['seeds']} seeds"
                for name, unit in (("speed_up", "x faster"), ("size_reduction", "x smaller"), ("points_on_test", "points on test")):
                    if name in one:
                        text += "; {:.2f} ({:.2f}, {:.2f}) {}".format(*one[name], unit)
                print(text)
        said = found["published"]
        print(f"  {said['paper']}: {said['latency_speed_up']:.2f}x faster, {said['size_reduction']:.2f}x smaller: {said['said']}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS[:2]))
    parser.add_argument("--seeds", type=int, default=0, help=", ".join(f"{name}: {count}" for name, count in SEEDS.items()))
    parser.add_argument("--budget", type=int, default=100, help="candidates scored in each search")
    parser.add_argument("--engines", type=int, default=5, help="seeds whose choices are built and timed")
    parser.add_argument("--only-search", action="store_true", help="build and time nothing")
    parser.add_argument("--runs", type=Path, default=Path(".cache/main_job"), help="where main_job.py keeps its runs")
    parser.add_argument("--cache", type=Path, default=Path(".cache/joint_precision"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="that scores candidates")
    parser.add_argument("--jobs", type=int, default=1, help="searches at a time")
    parser.add_argument("--resume", action="store_true", help="the default: go on with what is cached")
    parser.add_argument("--fresh", action="store_true", help="forget the cached tables, searches and engines of these tasks first")
    parser.add_argument("--stored", action="store_true", help="do nothing: print the committed result of a full run")
    parser.add_argument("--store", action="store_true", help=f"write the result and the searches to {STORED.name}")
    given = parser.parse_args(arguments)
    if given.stored:
        if not stored():
            raise SystemExit(f"error: no result is stored: {STORED}\n\nhint: run without --stored")
        _print(stored()["rows"], given.json)
        return
    bench = Bench(given.runs, given.cache, given.budget)
    torch.set_num_threads(1)
    worlds = {}
    for task in given.tasks:
        place = bench.place(task)
        if given.fresh:
            shutil.rmtree(place.folder, ignore_errors=True)
            place = bench.place(task)
        place.prepare(given.runs)
        worlds[task] = World(place, given.device, leads=True)
    seeds = {task: given.seeds or SEEDS[task] for task in given.tasks}
    found = perform(bench, worlds, seeds, given.device, given.jobs)
    rows = [summary(worlds[task], searches, given.budget) for task, searches in found.items()]
    if not given.only_search:
        for row in rows:
            row["engines"] = engines(worlds[row["task"]], found[row["task"]], given.engines)
    if given.store:
        every = [asdict(one) for kinds in found.values() for all_ in kinds.values() for one in all_]
        write_atomic(STORED, lzma.compress(json.dumps({"rows": rows, "searches": every}, separators=(",", ":")).encode()))
    _print(rows, given.json)


def _print(rows: Sequence[Mapping[str, Any]], as_json: bool) -> None:
    if as_json:
        print(json.dumps({"rows": rows, "methods": METHODS, "published": PUBLISHED}, indent=1))
    else:
        show(rows)


if __name__ == "__main__":
    main()
