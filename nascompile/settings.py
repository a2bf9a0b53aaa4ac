"""A recipe: everything a run depends on, from a TOML file, the command line or the API; each default is stated here, once."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from nascompile import plugins, targets
from nascompile.data import DataSettings
from nascompile.errors import RecipeError
from nascompile.records import Budget, Record

DEMO, TOY, MCU_VIT = "demo", "toy", "mcu_vit"
"""Names of the embedded models: the Fashion-MNIST ViT, the synthetic residual MLP of the fake device, and a vision transformer for
microcontrollers, whose weights are random and whose size is that of the data's images."""


class FinetuneSettings(Record, frozen=True):
    """Teacher and super-network training."""

    recipe: str = "instatune"
    """Which sub-networks a step of the super-network trains, and on what."""
    start: str = "teacher"
    """What the super-network starts from: `teacher` (the fine-tuned model), `pretrained` (the model as given) or `random` weights."""
    teacher_epochs: int = 4
    """Plain fine-tuning before the super-network; not used where the model already has a matching head."""
    epochs: int = 4
    batch_size: int = 32
    learning_rate: float = 0.0
    """Peak of AdamW; 0: 5e-5 · 768 / hidden size."""
    supernet_learning_rate: float = 0.0
    """Peak for the super-network, which starts from fine-tuned weights; 0: half of the above."""
    weight_decay: float = 0.01
    """Of AdamW; biases and norms have none."""
    warmup: float = 0.1
    """Share of the steps."""
    patience: int = 3
    """Epochs without a better validation score before training stops; the best weights are kept."""
    ce_weight: float = 0.3
    """InstaTune's a: labels against distillation."""
    strong_teacher: float = 1.0
    """InstaTune's g: 1 distils from the fine-tuned teacher, 0 from the super-network itself."""
    temperature: float = 1.0
    """InstaTune's ρ."""
    random_subnets: int = 0
    """Random sub-networks per step, InstaTune's M; 0: one, or two of `bignas`."""
    decay_epochs: float = 0.0
    """Of `bignas`: epochs in which the learning rate falls by 3 %; 0: so that the floor is reached after two thirds of the steps."""
    rate_floor: float = 0.05
    """Of `bignas`: share of the peak at which the learning rate stays."""
    candidate_epochs: int = 0
    """Epochs in which each candidate that is to be built is trained on by itself before, from the super-network's weights; 0: none."""
    quantization_aware_epochs: int = 0
    """Last epochs of the super-network that compute with quantized products, as the uniformly quantized engine would."""
    mixed_precision: str = "no"
    """`bf16`: products of a training step in bfloat16 where PyTorch's autocast has them so; scores stay float32."""
    accumulation: int = 1
    """Parts that a batch is cut into, one after the other: the same step with less memory."""
    ema_decay: float = 0.0
    """Of an exponential moving average of the weights, which is then what is validated and kept; 0: none."""
    augmentation: tuple[str, ...] = ()
    """Of training images, at random in every pass over them: crop (moved by up to an eighth of the side), flip (left and right), light
    (contrast and brightness), erase (a box of noise in a quarter of them)."""
    cuda_graphs: bool = False
    """On an NVIDIA GPU, for images: capture the kernels of a pass once and replay them, which small networks gain most by. Random
    sub-networks are those of 32 steps then, 64 times over, and others after that."""
    class_weights: bool = False
    """Weigh the loss by inverse class frequency."""
    importance: bool = True
    """Sort heads, neurons and layers by importance before slicing."""
    control: bool = False
    """Train the baseline on with as many passes as the super-network gets, and keep it where validation is better."""


class SearchSettings(Record, frozen=True):
    """What is searched, how long, and how a candidate is scored."""

    searcher: str = "ehvi"
    """What proposes candidates: ehvi needs the fewest scores (docs/method.md), and the error among the objectives; nsga2, and nsga3 for
    three and more objectives, breed; linas breeds on predictions, linas-table on predicted scores and known costs; mip solves for sums of
    single changes' damages."""
    objectives: tuple[str, ...] = ("error", "latency_ms")
    """One to four of error, latency_ms, size_mb, macs_m, memory_mb, worst_ratio; all minimized. Without error `max_drop` must be given, and
    the front is of candidates that keep it; a front of one objective is one candidate, or several that are equal in it. With several
    devices error, size_mb and memory_mb are the worst over them, latency_ms is an objective for each; worst_ratio is the largest latency
    relative to its budget, one for all devices."""
    precisions: tuple[str, ...] = ("int8", "weight-int8")
    """What blocks may take beside FP32, where they can and the backend supports it; the last is the uniform engine's. Products: int8
    (calibrated), int8-dynamic, weight-int8-block128, weight-int8-block32, weight-int4-block128, weight-int4-block32. Text embedding
    tables: weight-int8."""
    space_evolution: bool = False
    """Let the searcher see a part of every gene's choices, which moves to where candidates are good and within the budgets, and widens in
    the end (MCUFormer). With ehvi it was worse or the same, with nsga2 the same or better under very tight budgets (docs/method.md)."""
    evaluations: int = 96
    """Candidates scored at most."""
    patience: int = 0
    """Batches without a better hypervolume (by more than 0.1 %) after which the search ends; 0: it does not end for that."""
    population: int = 16
    """Candidates proposed at a time, at most: ehvi proposes four."""
    workers: int = 0
    """Processes that score, each on one thread: how long the search takes, not what it finds. 1: this one alone. 0: one for every core, at
    most 8 and no more than a batch has work for, once scoring has shown to take longer than starting them."""
    ray: str = ""
    """Address of a Ray cluster (`auto`, `HOST:PORT`, `ray://HOST:PORT`) that scores with so many workers; 0 of them: one for each of its
    processors that a batch has work for."""
    calibration_samples: int = 128
    """Samples that a candidate's activation ranges are taken from."""
    validation_samples: int = 0
    """Samples a candidate is scored on (the first ones of a seeded shuffle); 0: all of validation."""
    calibration_methods: tuple[str, ...] = ("minmax", "percentile", "mse")
    """Of minmax, percentile, mse and entropy: tried on the uniformly quantized teacher; the one with the best validation score is used."""


class MeasureSettings(Record, frozen=True):
    """What is built and measured."""

    top_k: int = 4
    seconds: float = 10.0
    """Wall-clock window of each throughput figure."""
    batches: tuple[int, ...] = (1, 8, 32)
    """Batch sizes whose throughput is measured."""
    agreement: int = 20
    """Random scored candidates whose emulated accuracy is compared with their built engine's; 0: none."""
    safety: float = 0.5
    """Standard errors of the drop: engines with as many to spare inside `max_drop` come before all others."""
    tune_session: bool = False
    """Try the backend's session settings on every engine that is built, keep what is faster by more than 2 %: 2 to 12 seconds an engine."""


class Budgets(Record, frozen=True):
    """What the engine must meet; at least one. `max_drop` is in points of the metric, against the baseline on validation."""

    latency_ms: float | dict[str, float] | None = None
    """Milliseconds per call on the (first) device; for several, a bound by device: `{cpu = 3.0, "pi4:onnxruntime" = 20.0}`, the
    name "" being the first."""
    size_mb: float | None = None
    """Megabytes of the graph file; with several devices, of each one's. Of a microcontroller, flash: what it has is a bound without being
    asked for, and so is its RAM for `memory_mb`."""
    macs_m: float | None = None
    memory_mb: float | None = None
    """Megabytes that a call needs for the network itself, with several devices on each: weights as stored, and activations that are
    alive at once, counted. What interpreter and runtime take beside them is not in it; the report has the peak of the whole process. Of a
    microcontroller, RAM: arena, stack and variables."""
    max_drop: float | None = None
    """Points of the metric an engine may lose against the baseline, on each device."""

    def bounds(self, first: str, also: Sequence[str] = (), latencies: Mapping[str, float] | None = None) -> tuple[Budget, ...]:
        """The given ones as records, for target ids; `latencies`: by target id, where they are given by device."""
        if latencies is None:
            latencies = {} if self.latency_ms is None or isinstance(self.latency_ms, Mapping) else {first: self.latency_ms}
        found = [Budget(metric="latency_ms", bound=latencies[t], target=t) for t in (first, *also) if t in latencies]
        if self.size_mb is not None:
            found += [Budget(metric="size_mb", bound=self.size_mb, target=t) for t in (first, *also)]
        if self.memory_mb is not None:
            found += [Budget(metric="memory_mb", bound=self.memory_mb, target=t) for t in (first, *also)]
        if self.macs_m is not None:
            found.append(Budget(metric="macs_m", bound=self.macs_m, target=first))
        return (*found, *([] if self.max_drop is None else [Budget(metric="drop", bound=self.max_drop)]))


class Recipe(Record, frozen=True):
    """One run of the main job."""

    model: str = DEMO
    """A local folder (safetensors), a Hugging Face id, or the name of an embedded model."""
    new_head: bool = False
    """Train a new classification head although the model has one."""
    data: DataSettings = DataSettings()
    task: str = "classification"
    """What the labels are."""
    metric: str = ""
    """Empty: the task's default."""
    device: str = "cpu"
    also: tuple[str, ...] = ()
    """Further devices that one architecture is searched for, each with precisions of its own: NAME, NAME:BACKEND or NAME:BACKEND:THREADS,
    as `["pi4", "cpu:openvino", "cpu::2"]`; what is left out is the device's default. Data, training, building and measuring are as for the
    first device alone; one of these that runs here has its engines built and measured too, one that does not needs a stored latency table
    (`nascompile kit export` makes one there)."""
    backend: str = ""
    """Empty: the device's default. `auto`: the search and its latency table are for the default, then every engine is built with each
    backend that runs here and has its precisions, and the fastest is kept."""
    threads: int = 1
    budgets: Budgets = Budgets()
    finetune: FinetuneSettings = FinetuneSettings()
    search: SearchSettings = SearchSettings()
    measure: MeasureSettings = MeasureSettings()
    seed: int = 0
    """Of training, search, samples drawn and the order of timing; the splits have their own, `data.seed`."""
    minutes: float = 0.0
    """Wall-clock limit shared out over the stages; 0: none."""
    profile_seconds: float = 20.0
    """Timing for a new latency table; building the graphs comes on top."""
    allow_foreign: bool = False
    """Use the table that `tables` names although it was taken in another environment."""
    tables: str = ""
    """Folder of latency tables looked into first, or the one table to use."""


def from_toml(path: Path, given: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe in a TOML file, `given` settings (`finetune.epochs` ▸ 3) taking precedence.

    RecipeError listing every unknown key and wrong value together.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RecipeError(f"no such recipe: {path}", hint="`nascompile run --help` lists the flags that do without one") from error
    except OSError as error:
        raise RecipeError(f"cannot read the recipe: {path}", detail=str(error.strerror)) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"not a TOML file: {path}", detail=str(error), hint="strings are quoted, sections are [named]") from error
    return from_mapping(_merged(content, given or {}), str(path))


def replace(recipe: Recipe, given: Mapping[str, Any]) -> Recipe:
    """The recipe with `given` settings (`finetune.epochs` ▸ 3) in place of its own, checked."""
    return from_mapping(_merged(msgspec.to_builtins(recipe), given), "the settings given")


def demo_recipe() -> Recipe:
    """The embedded vision transformer on its Fashion-MNIST subset: some minutes on two cores."""
    return Recipe(
        model=DEMO,
        budgets=Budgets(max_drop=0.5),
        finetune=FinetuneSettings(epochs=2, batch_size=64, supernet_learning_rate=2e-5),
        search=SearchSettings(evaluations=44),
        measure=MeasureSettings(top_k=3, seconds=2.0, batches=(1, 8)),
        profile_seconds=20.0,
    )


def mcu_vit_recipe() -> Recipe:
    """A vision transformer for microcontrollers, trained from random weights: many more epochs than what starts from a trained one."""
    return Recipe(
        model=MCU_VIT,
        device="stm32f746",
        finetune=FinetuneSettings(
            recipe="bignas", teacher_epochs=20, epochs=30, batch_size=128, learning_rate=1e-3, weight_decay=0.05,
            patience=10, augmentation=("crop", "flip"), candidate_epochs=10,
        ),
    )  # fmt: skip


def toy_recipe() -> Recipe:
    """The embedded toy network on the simulated device: the whole pipeline in seconds, nothing measured."""
    return Recipe(
        model=TOY,
        device="fake",
        budgets=Budgets(max_drop=2.0),
        finetune=FinetuneSettings(teacher_epochs=3, epochs=2),
        search=SearchSettings(evaluations=16, population=8),
        measure=MeasureSettings(top_k=2, seconds=0.1, batches=(1, 8), agreement=4),
        profile_seconds=1.0,
    )


def from_mapping(content: Mapping[str, Any], origin: str) -> Recipe:
    """A recipe from nested plain values, checked."""
    unknown, mistyped = _unknown(Recipe, content, ""), _mistyped(content)
    if unknown or mistyped:
        raise RecipeError(
            f"unknown settings in {origin}: {len(unknown)}" if unknown else f"wrong value in {origin}",
            detail="\n".join((*unknown, *mistyped)), hint="`nascompile run --help` explains every setting",
        )  # fmt: skip
    return check(msgspec.convert(content, Recipe, strict=True))


def check(recipe: Recipe) -> Recipe:
    """The same recipe; RecipeError with all faults of value at once."""
    f, s, m = recipe.finetune, recipe.search, recipe.measure
    objectives = 1 <= len(set(s.objectives)) == len(s.objectives) <= 4 and set(s.objectives) <= set(OBJECTIVES)
    methods = bool(s.calibration_methods) and set(s.calibration_methods) <= set(METHODS)
    integers = [name.replace("_", "-") for name in plugins.names("quantization")]
    rules = [
        ("threads", recipe.threads, recipe.threads >= 1, "at least 1"),
        ("minutes", recipe.minutes, recipe.minutes >= 0, "0 (no limit) or more"),
        ("profile_seconds", recipe.profile_seconds, recipe.profile_seconds > 0, "more than 0"),
        ("finetune.epochs", f.epochs, f.epochs >= 0, "0 or more"),
        ("finetune.candidate_epochs", f.candidate_epochs, f.candidate_epochs >= 0, "0 or more"),
        ("finetune.teacher_epochs", f.teacher_epochs, f.teacher_epochs >= 1, "at least 1"),
        ("finetune.batch_size", f.batch_size, f.batch_size >= 1, "at least 1"),
        ("finetune.learning_rate", f.learning_rate, 0 <= f.learning_rate < 1, "0 (automatic) or a rate below 1"),
        ("finetune.supernet_learning_rate", f.supernet_learning_rate, 0 <= f.supernet_learning_rate < 1, "0 (automatic) or a rate below 1"),
        ("finetune.weight_decay", f.weight_decay, f.weight_decay >= 0, "0 or more"),
        ("finetune.warmup", f.warmup, 0 <= f.warmup <= 1, "a part of the steps, between 0 and 1"),
        ("finetune.patience", f.patience, f.patience >= 1, "at least 1"),
        ("finetune.ce_weight", f.ce_weight, 0 <= f.ce_weight <= 1, "between 0 and 1"),
        ("finetune.strong_teacher", f.strong_teacher, 0 <= f.strong_teacher <= 1, "between 0 and 1"),
        ("finetune.temperature", f.temperature, f.temperature > 0, "more than 0"),
        ("finetune.start", f.start, f.start in STARTS, f"one of {', '.join(STARTS)}"),
        ("finetune.random_subnets", f.random_subnets, f.random_subnets >= 0, "0 (the recipe's own number) or more"),
        ("finetune.decay_epochs", f.decay_epochs, f.decay_epochs >= 0, "0 (by the steps) or more"),
        ("finetune.rate_floor", f.rate_floor, 0 < f.rate_floor <= 1, "more than 0, at most 1"),
        (
            "finetune.quantization_aware_epochs", f.quantization_aware_epochs, 0 <= f.quantization_aware_epochs <= f.epochs,
            "0 or more, at most `epochs`",
        ),
        ("finetune.mixed_precision", f.mixed_precision, f.mixed_precision in MIXED, f"one of {', '.join(MIXED)}"),
        ("finetune.accumulation", f.accumulation, f.accumulation >= 1, "at least 1"),
        ("finetune.augmentation", f.augmentation, set(f.augmentation) <= set(AUGMENTATIONS), f"some of {', '.join(AUGMENTATIONS)}"),
        ("finetune.ema_decay", f.ema_decay, 0 <= f.ema_decay < 1, "0 (none) or more, below 1"),
        ("search.evaluations", s.evaluations, s.evaluations >= 1, "at least 1"),
        ("search.patience", s.patience, s.patience >= 0, "0 (never) or more"),
        ("search.workers", s.workers, s.workers >= 0, "0 (as many as are of use) or more"),
        ("search.validation_samples", s.validation_samples, s.validation_samples >= 0, "0 (all) or more"),
        ("search.population", s.population, s.population >= 2, "at least 2"),
        ("search.calibration_samples", s.calibration_samples, s.calibration_samples >= 1, "at least 1"),
        ("search.objectives", s.objectives, objectives, f"one to four of {', '.join(OBJECTIVES)}"),
        ("search.precisions", s.precisions, set(s.precisions) <= set(integers), f"some of {', '.join(integers)}"),
        ("search.calibration_methods", s.calibration_methods, methods, f"some of {', '.join(METHODS)}"),
        ("measure.top_k", m.top_k, m.top_k >= 1, "at least 1"),
        ("measure.agreement", m.agreement, m.agreement >= 0, "0 (none) or more"),
        ("measure.safety", m.safety, m.safety >= 0, "0 or more"),
        ("measure.seconds", m.seconds, m.seconds > 0, "more than 0"),
        ("measure.batches", m.batches, bool(m.batches) and min(m.batches) >= 1, "batch sizes of at least 1"),
    ]
    bounds = msgspec.structs.asdict(recipe.budgets)
    latencies = bounds.pop("latency_ms")
    each = latencies if isinstance(latencies, Mapping) else {"": latencies}
    rules += [(f"budgets.latency_ms{n and '.'}{n}", b, b is None or b > 0, "more than 0") for n, b in each.items()]
    rules += [(f"budgets.{n}", b, b is None or b > 0, "more than 0") for n, b in bounds.items() if n != "max_drop"]
    rules.append(("budgets.max_drop", bounds["max_drop"], (bounds["max_drop"] or 0) >= 0, "0 or more"))
    faults = [f"{name} = {value}: {need}" for name, value, fine, need in rules if not fine]
    named = (*recipe.also, *(filter(None, latencies) if isinstance(latencies, Mapping) else ()))
    faults += [f"{text!r} is no device: NAME[:BACKEND[:THREADS]]" for text in named if not targets.Named.is_one(text)]
    if "worst_ratio" in s.objectives and not latencies:
        faults.append("search.objectives = worst_ratio: needs a latency budget for every device, --latency-ms DEVICE=MS")
    if "error" not in s.objectives and recipe.budgets.max_drop is None:
        faults.append("search.objectives: without error nothing keeps a network from being useless; add it, or a budget --max-drop")
    if "error" not in s.objectives and s.searcher.replace("_", "-") in LEARNING:
        faults.append(f"search.searcher = {s.searcher}: predicts the error, which is not among search.objectives; nsga2 does without")
    if (count := len(s.objectives) + len(recipe.also) * ("latency_ms" in s.objectives)) > 4:
        devices = 1 + len(recipe.also)
        faults.append(f"search.objectives: {count}, a latency for each of {devices} devices; at most four (worst_ratio is one for all)")
    if recipe.also and recipe.backend == targets.AUTO:
        faults.append("backend = auto: variants are compared for one device, `also` names more; name the backend")
    if recipe.budgets in (Budgets(), Budgets(latency_ms={})) and not _limited(recipe.device):
        faults.append("no budget: give at least one of --max-drop, --latency-ms, --size-mb, --macs-m, --memory-mb")
    for folder, name in (("tasks", recipe.task), ("recipes", f.recipe), ("searchers", s.searcher)):
        if name.replace("-", "_") not in plugins.names(folder):
            faults.append(f"{folder.rstrip('s')} = {name}: one of {', '.join(plugins.names(folder))}")
    if not faults and recipe.metric and recipe.metric not in (known := plugins.get("tasks", recipe.task).metrics):
        faults.append(f"metric = {recipe.metric}: one of {', '.join(known)}")
    if faults:
        raise RecipeError("the recipe cannot be run", detail="\n".join(faults), hint="`nascompile run --help` explains every setting")
    return recipe


def _limited(device: str) -> bool:
    """Whether a device has limits of its own, which bound a search without being asked for; one that nobody knows has its own error."""
    return device not in targets.names() or targets.load_profile(device).flash_bytes > 0


LEARNING = ("ehvi", "linas-table", "mip")
"""Searchers that take the error from models of it, and cost from tables."""
OBJECTIVES = ("error", "latency_ms", "size_mb", "macs_m", "memory_mb", "worst_ratio")
METHODS = ("minmax", "percentile", "mse", "entropy")
STARTS, MIXED = ("teacher", "pretrained", "random"), ("no", "bf16")
AUGMENTATIONS = ("crop", "flip", "light", "erase")


def _merged(content: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(content)
    for name, value in given.items():
        section, _, key = name.rpartition(".")
        if not section:
            merged[key] = value
        elif isinstance(merged.setdefault(section, {}), Mapping):
            merged[section] = {**merged[section], key: value}
    return merged


def _unknown(kind: Any, content: Mapping[str, Any], prefix: str) -> list[str]:
    fields = {field.name: field.type for field in msgspec.structs.fields(kind)}
    faults = []
    for key, value in content.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            faults.append(f"{prefix}{key}" + (f": did you mean {prefix}{near[0]}?" if near else f": known are {', '.join(fields)}"))
        elif isinstance(value, Mapping) and isinstance(fields[key], type) and issubclass(fields[key], Record):
            faults += _unknown(fields[key], value, f"{prefix}{key}.")
    return faults


def _mistyped(content: Mapping[str, Any]) -> list[str]:
    """One line per value of the wrong type; each is tried alone, because a conversion stops at its first fault."""
    faults = []
    for name, value in content.items():
        section = isinstance(value, Mapping) and value
        for part in [{name: {key: entry}} for key, entry in value.items()] if section else [{name: value}]:
            try:
                msgspec.convert(part, Recipe, strict=True)
            except msgspec.ValidationError as error:
                faults.append(str(error))
    return faults
