"""The fine-tuning stage: a teacher where the model has no fitting head, then the super-network; resumable in mid-epoch."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from safetensors.torch import load_file

from nascompile import plugins, space as spaces
from nascompile.augmentation import vary
from nascompile.checkpoint import Average, State
from nascompile.data import Split, class_weights
from nascompile.errors import RecipeError, RecordError
from nascompile.families import Family
from nascompile.families.encoder import quiet
from nascompile.models import weights_digest
from nascompile.processes import ALONE, Team
from nascompile.progress import Progress, Silent
from nascompile.quantization_aware import Quantized, TrainingQuantizer, first_ranges, quantizer
from nascompile.recipes import Recipe, StepBatch, Terms
from nascompile.recipes.plain import Plain
from nascompile.records import Candidate, Record, SearchSpace, digest, encode, load, save, write_atomic
from nascompile.replay import Replayed, draw
from nascompile.settings import FinetuneSettings
from nascompile.supernet import (
    Batch,
    Supernet,
    by_length,
    importance,
    layer_order,
    load_batch,
    load_batches,
    reorder,
    zero_residuals,
)

CHECKPOINT_SECONDS = 20.0
CANDIDATES = "candidates"
"""Folder of a run with the weights of candidates that were trained on by themselves, a folder each."""
BEGAN = "began.json"
"""With what the training of a candidate by itself began."""
EVALUATION_BATCH = 64
ACCELERATED_BATCH, ACCELERATED_BYTES = 1024, 16 << 20
"""On an accelerator batches of small images may be as large."""
BUCKET = 32
"""Batches whose texts are sorted by length together."""
IMPORTANCE_SAMPLES = 512
ORDER_SAMPLES = 512
EARLY_STOPPING_SAMPLES = 1024
RESIDENT_BYTES = 8 << 30
"""Most that training images take of an accelerator's memory."""
RANGE_SAMPLES = 256
"""Of training, for the ranges that quantization-aware training starts with."""


class TrainingLog(Record, frozen=True):
    """How a training went; written when it has ended."""

    recipe: str
    epochs: float
    steps: int
    samples: int
    """Sample-gradient passes: samples times forward-backward passes."""
    seconds: float
    validation: tuple[tuple[float, float], ...]
    """(epoch, validation score) at each evaluation; for a super-network the mean of its largest, smallest and two random networks."""
    best_epoch: float
    best: float
    stopped: str
    """`finished`, `no improvement` or `time`."""
    losses: tuple[tuple[float, float], ...] = ()
    """(epoch, mean over its steps of the loss that was minimized: the sum over a step's passes)."""
    quantized_from: float | None = None
    """Epoch from which training was quantization-aware: scores from there on are of quantized networks, the best is one of them."""


@dataclass(frozen=True)
class Job:
    """One training: what, on what, and where its files go."""

    net: Supernet
    space: SearchSpace
    recipe: Recipe
    terms: Terms
    settings: FinetuneSettings
    train: Split
    validation: Split
    metric: str
    epochs: int
    folder: Path
    seed: int
    deadline: float = float("inf")
    teacher: np.ndarray[Any, Any] | None = None
    aware_epochs: int = 0
    """Last epochs, which compute with quantized products."""
    keep_best: bool = True
    """Whether the weights of the best validation score are kept; else those of the last step."""


@dataclass(frozen=True)
class Plan:
    """What a run's fine-tuning stage works with; `space_of` gives the space for an order of layers."""

    family: Family
    model: Path
    """Local folder of the pretrained model."""
    head: Mapping[str, Any]
    """Configuration entries for a new head; empty where the model's own is kept."""
    space_of: Callable[[Any, tuple[int, ...]], SearchSpace]
    train: Split
    validation: Split
    task: Any
    metric: str
    settings: FinetuneSettings
    seed: int
    out: Path
    teacher_deadline: float = float("inf")
    deadline: float = float("inf")
    team: Team = ALONE


@dataclass(frozen=True)
class Resident:
    """Training images kept as bytes on an accelerator, so that no step waits for them."""

    name: str
    pixels: torch.Tensor
    labels: torch.Tensor
    scale: torch.Tensor
    shift: torch.Tensor

    @classmethod
    def of(cls, split: Split, device: torch.device) -> Resident | None:
        """None on a CPU, and for what are no images or too many."""
        if device.type == "cpu" or split.preprocessor.settings.modality != "image":
            return None
        [stored] = split.inputs.values()
        return cls.on(split, device) if stored.nbytes <= RESIDENT_BYTES else None

    @classmethod
    def on(cls, split: Split, device: Any) -> Resident:
        [(name, stored)] = split.inputs.items()
        scale, shift = (torch.from_numpy(values).to(device) for values in split.preprocessor.scaling())
        return cls(name, torch.from_numpy(np.array(stored)).to(device), torch.from_numpy(split.labels).to(device), scale, shift)

    def __call__(self, rows: np.ndarray[Any, Any]) -> Batch:
        """What `load_batch` gives."""
        chosen = torch.from_numpy(np.asarray(rows)).to(self.pixels.device)
        return {self.name: self.pixels[chosen] * self.scale + self.shift}, self.labels[chosen]


class Call(Record, frozen=True):
    """What the first of several processes asks of the others: their part in a training that begins now."""

    training: str
    space: SearchSpace
    point: Candidate | None = None
    """Where it is that of one candidate by itself."""


@dataclass(frozen=True)
class Alone(Plain):
    """The recipe of a candidate that is trained on by itself, on the labels; the super-network's other weights get no gradients."""

    point: Candidate
    name = "alone"
    elastic = True

    def losses(self, net: Any, space: SearchSpace, batch: StepBatch, rng: np.random.Generator, terms: Terms) -> Iterator[Any]:
        yield terms.task.loss(net(batch.inputs, net.subnet(space, self.point)), batch.labels, terms.class_weights)


class Began(Record, frozen=True):
    """What the training of a candidate by itself depends on, besides its sizes."""

    weights: str
    """Digest of the super-network's."""
    settings: str
    seed: int


def finetune(plan: Plan, progress: Progress) -> SearchSpace:
    """Write `teacher/`, `supernet/` (and `control/`) under `plan.out`; the space with its layers in order of importance."""
    folder = plan.out / "teacher"
    if not folder.is_dir():
        torch.manual_seed(plan.seed)  # of a new head
        net = Supernet(plan.family, plan.family.load(str(plan.model), **plan.head))
        logs = {}
        if plan.head:
            logs["training.json"] = _train(plan, "teacher", net, plan.space_of(net.config, ()), progress)
        store_model(net, folder, logs)
    teacher = Supernet(plan.family, plan.family.load(str(folder)))
    folder = plan.out / "supernet"
    if not folder.is_dir():
        if plugins.get("recipes", plan.settings.recipe).distils:
            teacher_logits(teacher.to(training_device()), plan.train, _logits(plan), progress)
        net, space = _untrained(plan, teacher.to(training_device()), progress)
        log = _train(plan, "supernet", net, space, progress)
        store_model(net, folder, {"manifest.json": space, "training.json": log})
    space = load(folder / "manifest.json", SearchSpace)
    if plan.settings.control and not (plan.out / "control").is_dir():
        teacher = Supernet(plan.family, plan.family.load(str(plan.out / "teacher")))
        store_model(teacher, plan.out / "control", {"training.json": _train(plan, "control", teacher, space, progress)})
    return space


def _untrained(plan: Plan, teacher: Supernet, progress: Progress) -> tuple[Supernet, SearchSpace]:
    """What the super-network's training starts from; pretrained weights are put into the order of the teacher's."""
    start, family = plan.settings.start, plan.family
    space = plan.space_of(teacher.config, ())
    if start == "random":
        torch.manual_seed(plan.seed)
        net = Supernet(family, family.create(teacher.config))
        if plugins.get("recipes", plan.settings.recipe).zeroed_residuals:
            zero_residuals(net)
        return net, space
    torch.manual_seed(plan.seed)  # of a new head
    net = Supernet(family, family.load(str(plan.model), **plan.head)) if start == "pretrained" else teacher
    if plan.settings.importance:
        progress.note("ordering heads, neurons and layers by importance")
        also = [net.to(training_device())] if net is not teacher else []
        space = sort_by_importance(teacher, lambda order: plan.space_of(teacher.config, order), plan.train, plan.task, also)
    if settle := getattr(family, "settle", None):  # on what training and sorting have made of the weights
        settle(net.model)
    return net.to("cpu"), space


def train_candidate(plan: Plan, space: SearchSpace, point: Candidate, progress: Progress) -> Path:
    """The folder `candidates/NAME`: the super-network's weights, of which those of one candidate were trained on; made once for them."""
    point = architecture_of(point)
    folder, name = plan.out / CANDIDATES / point.id, f"candidate-{point.id}"
    began = Began(weights=weights_digest(plan.out / "supernet"), settings=digest(plan.settings), seed=plan.seed)
    if folder.is_dir() and load(folder / BEGAN, Began) == began:
        return folder
    work = plan.out / "training" / name
    if not (work / BEGAN).is_file() or load(work / BEGAN, Began) != began:  # what is there began otherwise
        shutil.rmtree(work, ignore_errors=True)
        save(began, _made(work) / BEGAN)
    shutil.rmtree(folder, ignore_errors=True)
    net = Supernet(plan.family, plan.family.load(str(plan.out / "supernet")))
    log = _train(plan, name, net, space, progress, point)
    _made(folder.parent)
    store_model(net, folder, {BEGAN: began, "candidate.json": point, "training.json": log})
    shutil.rmtree(work, ignore_errors=True)
    before = "" if log.quantized_from is not None else f"{abs(log.validation[0][1]):.2f} to "  # which was not quantized
    progress.note(f"candidate {point.id} by itself: {plan.metric} {before}{abs(log.best):.2f} on validation samples")
    return folder


def architecture_of(point: Candidate) -> Candidate:
    """A candidate without precisions: those that differ in them alone share their weights."""
    return msgspec.structs.replace(point, precision=())


def assist(plan: Plan, call: bytes) -> None:
    """Take part in the training that the first process has called for; it writes all files."""
    called = msgspec.json.decode(call, type=Call)
    if called.point:
        model = plan.family.load(str(plan.out / "supernet"))
    elif called.training == "teacher":
        model = plan.family.load(str(plan.model), **plan.head)
    else:
        model = plan.family.load(str(plan.out / "teacher"))
    job = _job(plan, called.training, Supernet(plan.family, model), called.space, called.point)
    with plan.team.together():
        train(job, Silent())


def baseline_folder(out: Path) -> Path:
    """The weights of the baseline: the control where one was trained, else the teacher."""
    return out / "control" if (out / "control").is_dir() else out / "teacher"


def store_model(net: Supernet, folder: Path, beside: Mapping[str, Record]) -> None:
    """Save as Hugging Face safetensors with records beside, whole or not at all."""
    temporary = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with quiet():
            net.model.save_pretrained(temporary)
        for name, record in beside.items():
            save(record, temporary / name)
        temporary.rename(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise RecordError(f"cannot write {folder}: {error}", hint="free some space and run the same command again") from error


def _train(
    plan: Plan, name: str, net: Supernet, space: SearchSpace, progress: Progress, point: Candidate | None = None
) -> TrainingLog:  # fmt: skip
    plan.team.call(encode(Call(training=name, space=space, point=point)))
    with plan.team.together():
        return train(_job(plan, name, net, space, point), progress)


def training_device() -> torch.device:
    """The accelerator of this process, else the CPU."""
    from accelerate import Accelerator

    found: torch.device = Accelerator().device
    return found


def _logits(plan: Plan) -> Path:
    """Where the teacher's outputs are."""
    return _made(plan.out / "training") / "teacher_logits.npy"


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _job(plan: Plan, name: str, net: Supernet, space: SearchSpace, point: Candidate | None = None) -> Job:
    """The training `teacher`, `supernet` or `control`, or that of a candidate by itself."""
    s, weights, logits, aware = plan.settings, None, None, 0
    if s.class_weights:
        weights = torch.from_numpy(class_weights(plan.train.labels, net.config.num_labels))
    chosen: Recipe | None = None
    if point:
        chosen, epochs, deadline = Alone(point), s.candidate_epochs, float("inf")
        aware = min(s.quantization_aware_epochs, epochs)
    elif name == "supernet":
        recipe, epochs, deadline, aware = s.recipe, s.epochs, plan.deadline, s.quantization_aware_epochs
        logits = np.load(_logits(plan), allow_pickle=False) if plugins.get("recipes", recipe).distils else None
    elif name == "teacher":
        recipe, epochs, deadline = "plain", s.teacher_epochs, plan.teacher_deadline
    else:  # as many passes as the super-network got
        passes = load(plan.out / "supernet" / "training.json", TrainingLog).samples
        recipe, epochs, deadline = "plain", max(1, round(passes / len(plan.train))), float("inf")
    chosen = chosen or plugins.get("recipes", recipe)
    return Job(
        net=net, space=space, recipe=chosen, terms=terms_of(plan.task, chosen, s, weights), settings=s, train=plan.train,
        validation=plan.validation, metric=plan.metric, epochs=epochs, folder=_made(plan.out / "training" / name), seed=plan.seed,
        deadline=deadline, teacher=logits, aware_epochs=aware,
    )  # fmt: skip


def terms_of(task: Any, recipe: Recipe, settings: FinetuneSettings, class_weights: Any = None) -> Terms:
    """The settings as recipes know them."""
    s = settings
    subnets = s.random_subnets or recipe.random_subnets
    return Terms(task, class_weights, s.ce_weight, s.strong_teacher, s.temperature, subnets, s.decay_epochs, s.rate_floor)


def train(job: Job, progress: Progress) -> TrainingLog:
    """Train `job.net` in place and leave it with its best weights; continues from `job.folder` after a kill.

    Every random draw comes from (seed, epoch) or (seed, step), so a resumed run takes the steps an uninterrupted one would.
    Several processes share each batch, and the first one writes. RecipeError if a batch has fewer samples than there are processes, or what
    is no image is to be augmented.
    """
    from accelerate import Accelerator

    accelerator = Accelerator()
    if (least := min(job.settings.batch_size, len(job.train))) < accelerator.num_processes:
        raise RecipeError(
            f"a batch of {least} cannot be shared by {accelerator.num_processes} processes", hint="raise --batch-size, or start fewer"
        )
    if job.settings.augmentation and (found := job.train.preprocessor.settings.modality) != "image":
        raise RecipeError(f"finetune.augmentation is for images, and this is {found}", hint="leave it out")
    net = _shared(job.net.to(accelerator.device), accelerator)
    steps_per_epoch = max(1, len(job.train) // job.settings.batch_size)
    total = steps_per_epoch * job.epochs
    aware_from = total - steps_per_epoch * min(job.aware_epochs, job.epochs)
    optimizer = _optimizer(net, job.settings)
    schedule = _Schedule(job, total, steps_per_epoch)
    average = Average(net, job.settings.ema_decay) if job.settings.ema_decay else None
    resumed = State.resume(job.folder, net, optimizer, average)
    state = resumed or State()
    images = Resident.of(job.train, accelerator.device)
    graphs = _graphs(job, net, images)
    aware = quantizer(net, job.space, state.ranges) if state.quantized else None

    def validate(epoch: float) -> None:
        state.note_loss(epoch)
        with average.shown(net) if average else nullcontext():
            score, main = _validate(job, net, accelerator, aware), accelerator.is_main_process
            state.note(epoch, score, net, job.folder, main, anyway=not job.keep_best)

    if resumed is None and (aware_from or not total or isinstance(job.recipe, Alone)):
        validate(0.0)
    started, saved = time.monotonic() - state.seconds, time.monotonic()
    stopped, shuffled, batches = "finished", -1, []
    while state.step < total:
        epoch, offset = divmod(state.step, steps_per_epoch)
        if epoch != shuffled:
            shuffled, batches = epoch, _epoch(job.train, job.settings.batch_size, job.seed, epoch)
        if state.step >= aware_from and aware is None:
            aware = quantizer(net, job.space, first_ranges(net, job.space, _for_ranges(job, accelerator.device)))
            state.turn_quantized()
            graphs = None
            validate(float(epoch))
        torch.manual_seed(int(np.random.default_rng([job.seed, state.step, accelerator.process_index]).integers(2**62)))
        rate = schedule(state.step)
        state.loss = state.loss + _step(job, net, optimizer, batches[offset], rate, state.step, accelerator, aware, images, graphs)
        state.step, state.taken, state.summed = state.step + 1, state.taken + 1, state.summed + 1
        if average:
            average.follow(net, state.taken)
        progress.step(f"{job.folder.name}: epoch {epoch + 1} of {job.epochs}", state.step, total)
        late = bool(_agreed(accelerator, time.monotonic() > job.deadline))
        if state.step % steps_per_epoch == 0 or late:
            validate(state.step / steps_per_epoch)
            if late and state.step < total:
                stopped = "time"
                break
            if state.since_best(steps_per_epoch) >= job.settings.patience:
                if aware or aware_from == total:
                    stopped = "no improvement"
                    break
                if state.step < aware_from:  # on to the quantization-aware epochs, from the best weights so far
                    state.step = aware_from
                    _take_best(job, state, net, accelerator)
                    if average:
                        average.restart(net)
        if time.monotonic() - saved > CHECKPOINT_SECONDS and accelerator.is_main_process:
            state.seconds = time.monotonic() - started
            state.ranges = aware.ranges if aware else {}
            state.store(job.folder, net, optimizer, average)
            saved = time.monotonic()
    _take_best(job, state, net, accelerator)
    net.to("cpu").eval()
    passes = job.recipe.passes(job.terms)
    return TrainingLog(
        recipe=job.recipe.name, epochs=state.step / steps_per_epoch, steps=state.taken,
        samples=state.taken * job.settings.batch_size * passes, seconds=time.monotonic() - started,
        validation=tuple(state.history), best_epoch=state.best_epoch, best=state.best, stopped=stopped,
        losses=tuple(state.losses), quantized_from=aware_from / steps_per_epoch if aware else None,
    )  # fmt: skip


def _graphs(job: Job, net: Supernet, images: Resident | None) -> Replayed | None:
    """RecipeError where the settings ask for graphs and there can be none."""
    if not job.settings.cuda_graphs:
        return None
    if (device := _where(net).type) != "cuda" or images is None:
        what = f"trains on {device}" if device != "cuda" else "trains on no images, or too many to keep on the GPU"
        raise RecipeError(f"finetune.cuda_graphs needs an NVIDIA GPU and images kept there, and this {what}", hint="leave it out")
    return Replayed(net)


def _take_best(job: Job, state: State, net: Supernet, accelerator: Any) -> None:
    accelerator.wait_for_everyone()  # the main process may still be writing what the others read
    net.load_state_dict(load_file(job.folder / state.kept))


def _for_ranges(job: Job, device: Any) -> Any:
    rows = by_length(job.train, np.arange(min(len(job.train), RANGE_SAMPLES)))
    return load_batches(job.train, rows, EVALUATION_BATCH, device)


def peak_rate(recipe: Recipe, settings: FinetuneSettings, config: Any) -> float:
    """Highest learning rate of a training: half of a teacher's for what starts as one, unless the settings say otherwise."""
    rate = settings.learning_rate or 5e-5 * 768 / _hidden_size(config)
    if not recipe.elastic:
        return rate
    return settings.supernet_learning_rate or (rate / 2 if settings.start == "teacher" else rate)


def _epoch(split: Split, size: int, seed: int, epoch: int) -> list[np.ndarray[Any, Any]]:
    """The epoch's batches: a shuffle, texts of similar length put together within every few batches, the batches shuffled again."""
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(split))
    order = order[: len(order) // size * size or len(order)]  # what is left over is left to chance, not to length
    order = np.concatenate([by_length(split, order[i : i + BUCKET * size]) for i in range(0, len(order), BUCKET * size)])
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def sort_by_importance(
    net: Supernet, space_of: Callable[[tuple[int, ...]], SearchSpace], train_split: Split, task: Any, also: Sequence[Supernet] = ()
) -> SearchSpace:
    """Sort heads and neurons in place, those of `also` alike, and return the space with its layers ordered by importance."""
    device = _where(net)
    rows = by_length(train_split, np.arange(min(len(train_split), IMPORTANCE_SAMPLES)))
    scores = importance(net, load_batches(train_split, rows, 32, device), task.loss)
    for other in (net, *also):
        reorder(other, scores)
    plain = space_of(())
    depth = next(gene for gene in plain.genes if gene.name == "depth")
    rows = by_length(train_split, np.arange(min(len(train_split), ORDER_SAMPLES)))
    few = load_batches(train_split, rows, EVALUATION_BATCH, device)
    with torch.no_grad():  # against its own outputs: on samples it was trained on, labels say little about what a layer does
        own = [(inputs, net(inputs, net.largest())) for inputs, _ in few]
    return space_of(layer_order(net, own, lambda logits, whole: task.distillation(logits, whole, 1.0), int(depth.choices[0])))


def _where(net: Supernet) -> torch.device:
    return next(net.parameters()).device


def teacher_logits(net: Supernet, split: Split, path: Path, progress: Progress) -> np.ndarray[Any, Any]:
    """Logits (n, labels) of the largest network on a split, kept in a file so that no step runs the teacher again."""
    key = path.with_suffix(".json")
    identity = {"split": split.digest, "weights": _weights_digest(net)}
    if path.is_file() and key.is_file() and json.loads(key.read_text()) == identity:
        return np.load(path, allow_pickle=False)  # type: ignore[no-any-return]
    order, found = by_length(split, np.arange(len(split))), []
    net.eval()
    with torch.no_grad():
        for start in range(0, len(split), EVALUATION_BATCH):
            inputs, _ = load_batch(split, order[start : start + EVALUATION_BATCH], _where(net))
            found.append(net(inputs, net.largest()).cpu().numpy())
            progress.step("teacher outputs", min(start + EVALUATION_BATCH, len(split)), len(split))
    logits = np.concatenate(found)[np.argsort(order)]
    temporary = path.with_name(f".{path.name}.part.npy")
    np.save(temporary, logits, allow_pickle=False)
    temporary.replace(path)
    write_atomic(key, encode(identity))
    return logits


# ---------------------------------------------------------------------------------------------- one step


def _step(
    job: Job, net: Supernet, optimizer: Any, whole: Any, rate: float, step: int, accelerator: Any, aware: TrainingQuantizer | None = None,
    images: Resident | None = None, graphs: Replayed | None = None,
) -> torch.Tensor:  # fmt: skip
    """One update of the weights; the loss of the whole batch, over all processes."""
    processes = accelerator.num_processes
    rows = whole[accelerator.process_index :: processes]
    optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=accelerator.device)
    for part in np.array_split(rows, min(job.settings.accumulation, len(rows))):
        total += _passes(job, net, part, len(part) / len(whole), step, accelerator.device, aware, images, graphs)
    parameters = [p for p in net.parameters() if p.grad is not None]
    if processes > 1:
        # one reduction after all passes: DistributedDataParallel expects a single forward per backward
        flat = accelerator.reduce(torch.cat([*(p.grad.flatten() for p in parameters if p.grad is not None), total[None]]), reduction="sum")
        *parts, total = flat.split([*(p.numel() for p in parameters), 1])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)
    if aware:
        aware.follow(processes)
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    return total.reshape(())


def _passes(
    job: Job, net: Supernet, rows: Any, share: float, step: int, device: Any, aware: TrainingQuantizer | None, images: Resident | None,
    graphs: Replayed | None,
) -> torch.Tensor:  # fmt: skip
    """Back-propagate the recipe's losses on some samples, which are this share of a batch; their sum by that share."""
    net.train()
    teacher = None if job.teacher is None else torch.from_numpy(job.teacher[rows]).to(device)
    inputs, labels = images(rows) if images else load_batch(job.train, rows, device)
    if job.settings.augmentation:
        inputs = {name: vary(values, job.settings.augmentation) for name, values in inputs.items()}
    batch = StepBatch(inputs, labels, teacher)
    rng = np.random.default_rng([job.seed, draw(step) if job.settings.cuda_graphs else step])
    total = torch.zeros((), device=device)
    if graphs:
        graphs.begin(step)
    losses = iter(job.recipe.losses(Quantized(net, aware) if aware else graphs or net, job.space, batch, rng, job.terms))
    while True:
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=job.settings.mixed_precision == "bf16"):
            loss = next(losses, None)
        if loss is None:
            return total
        (share * loss).backward()  # not accelerate's, which scales it where a launcher was told of mixed precision
        total += share * loss.detach()


def _agreed(accelerator: Any, value: float) -> float:
    """What the first process found: clocks and sums differ, and a process that stopped alone would leave the others waiting."""
    if accelerator.num_processes == 1:
        return value
    from accelerate.utils import broadcast

    return float(broadcast(torch.tensor([value], dtype=torch.float64, device=accelerator.device))[0])


@torch.no_grad()
def _shared(net: Supernet, accelerator: Any) -> Supernet:
    """The network with the first process's weights: a new head and an order of units are in no file yet."""
    if accelerator.num_processes > 1:
        from accelerate.utils import broadcast

        for value in net.state_dict().values():
            value.copy_(broadcast(value.contiguous()))
    return net


def _optimizer(net: Supernet, settings: FinetuneSettings) -> torch.optim.AdamW:
    decayed = [p for p in net.parameters() if p.ndim > 1]
    free = [p for p in net.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-5, fused=_where(net).type == "cuda")


@dataclass(frozen=True)
class _Schedule:
    """Linear warm-up, then what the recipe says."""

    job: Job
    total: int
    steps_per_epoch: int

    def __call__(self, step: int) -> float:
        ramp = max(1, int(self.total * self.job.settings.warmup))
        left = (self.total - step) / max(1, self.total - ramp)
        share = min((step + 1) / ramp, self.job.recipe.rate(min(1.0, left), step / self.steps_per_epoch, self.job.terms))
        return peak_rate(self.job.recipe, self.job.settings, self.job.net.config) * share


@torch.no_grad()
def _validate(job: Job, net: Supernet, accelerator: Any, aware: TrainingQuantizer | None = None) -> float:
    """Validation score of the largest network, or of the candidate that is trained alone; of a super-network the mean over largest,
    smallest and two fixed random ones."""
    task, subnets, run = job.terms.task, [net.largest()], Quantized(net, aware) if aware else net
    if isinstance(job.recipe, Alone):
        subnets = [net.subnet(job.space, job.recipe.point)]
    elif job.recipe.elastic:
        rng = np.random.default_rng([job.seed, 1])
        points = [spaces.smallest(job.space), spaces.sample(job.space, rng), spaces.sample(job.space, rng)]
        subnets += [net.subnet(job.space, point) for point in points]
    outputs: list[list[np.ndarray[Any, Any]]] = [[] for _ in subnets]
    net.eval()
    order = by_length(job.validation, np.arange(min(len(job.validation), EARLY_STOPPING_SAMPLES)))
    size = _evaluation_batch(job.validation, accelerator.device)
    for start in range(0, len(order), size):
        inputs, _ = load_batch(job.validation, order[start : start + size], accelerator.device)
        for row, subnet in zip(outputs, subnets, strict=True):
            row.append(run(inputs, subnet).cpu().numpy())
    truth = job.validation.labels[order]
    sign = 1 if task.direction(job.metric) == "maximize" else -1
    return _agreed(accelerator, float(np.mean([sign * task.score(job.metric, np.concatenate(row), truth)[0] for row in outputs])))


def _evaluation_batch(split: Split, device: Any) -> int:
    if device.type == "cpu" or split.preprocessor.settings.modality != "image":
        return EVALUATION_BATCH
    [images] = split.inputs.values()
    return max(EVALUATION_BATCH, min(ACCELERATED_BATCH, ACCELERATED_BYTES // (4 * int(np.prod(images.shape[1:])))))


def _weights_digest(net: Supernet) -> str:
    found = ((name, p.detach().cpu().double()) for name, p in net.named_parameters())
    return digest([(name, float(p.sum()), float(p.abs().sum())) for name, p in found])


def _hidden_size(config: Any) -> int:
    return int(next(getattr(config, name) for name in ("hidden_size", "dim", "hidden") if hasattr(config, name)))
