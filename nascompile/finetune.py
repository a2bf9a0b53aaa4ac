"""The fine-tuning stage: a teacher where the model has no fitting head, then the super-network; resumable in mid-epoch."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from nascompile import plugins, space as spaces
from nascompile.data import Split, class_weights
from nascompile.errors import RecipeError, RecordError
from nascompile.families import Family
from nascompile.families.encoder import quiet
from nascompile.processes import ALONE, Team
from nascompile.progress import Progress, Silent
from nascompile.recipes import Recipe, StepBatch, Terms
from nascompile.records import Record, SearchSpace, digest, encode, load, save, write_atomic
from nascompile.settings import FinetuneSettings
from nascompile.supernet import Supernet, by_length, importance, layer_order, load_batch, load_batches, reorder

CHECKPOINT_SECONDS = 20.0
EVALUATION_BATCH = 64
BUCKET = 32
"""Batches whose texts are sorted by length together."""
IMPORTANCE_SAMPLES = 512
ORDER_SAMPLES = 512
EARLY_STOPPING_SAMPLES = 1024


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


class Call(Record, frozen=True):
    """What the first of several processes asks of the others: their part in a training that begins now."""

    training: str
    space: SearchSpace


def finetune(plan: Plan, progress: Progress) -> SearchSpace:
    """Write `teacher/`, `supernet/` (and `control/`) under `plan.out`; the space with its layers in order of importance."""
    folder = plan.out / "teacher"
    if not folder.is_dir():
        net = Supernet(plan.family, plan.family.load(str(plan.model), **plan.head))
        logs = {}
        if plan.head:
            logs["training.json"] = _train(plan, "teacher", net, plan.space_of(net.config, ()), progress)
        store_model(net, folder, logs)
    teacher = Supernet(plan.family, plan.family.load(str(folder)))
    teacher_logits(teacher, plan.train, _logits(plan), progress)
    folder = plan.out / "supernet"
    if not folder.is_dir():
        net = Supernet(plan.family, plan.family.load(str(plan.out / "teacher")))
        space = plan.space_of(net.config, ())
        if plan.settings.importance:
            progress.note("ordering heads, neurons and layers by importance")
            space = sort_by_importance(net, lambda order: plan.space_of(net.config, order), plan.train, plan.task)
        log = _train(plan, "supernet", net, space, progress)
        store_model(net, folder, {"manifest.json": space, "training.json": log})
    space = load(folder / "manifest.json", SearchSpace)
    if plan.settings.control and not (plan.out / "control").is_dir():
        store_model(teacher, plan.out / "control", {"training.json": _train(plan, "control", teacher, space, progress)})
    return space


def assist(plan: Plan, call: bytes) -> None:
    """Take part in the training that the first process has called for; it writes all files."""
    called = msgspec.json.decode(call, type=Call)
    model = plan.family.load(str(plan.model), **plan.head) if called.training == "teacher" else plan.family.load(str(plan.out / "teacher"))
    job = _job(plan, called.training, Supernet(plan.family, model), called.space)
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


def _train(plan: Plan, name: str, net: Supernet, space: SearchSpace, progress: Progress) -> TrainingLog:
    plan.team.call(encode(Call(training=name, space=space)))
    with plan.team.together():
        return train(_job(plan, name, net, space), progress)


def _logits(plan: Plan) -> Path:
    """Where the teacher's outputs are."""
    return _made(plan.out / "training") / "teacher_logits.npy"


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _job(plan: Plan, name: str, net: Supernet, space: SearchSpace) -> Job:
    """The training `teacher`, `supernet` or `control`."""
    s, weights, logits = plan.settings, None, None
    if s.class_weights:
        weights = torch.from_numpy(class_weights(plan.train.labels, net.config.num_labels))
    if name == "supernet":
        recipe, epochs, deadline, logits = s.recipe, s.epochs, plan.deadline, np.load(_logits(plan), allow_pickle=False)
    elif name == "teacher":
        recipe, epochs, deadline = "plain", s.teacher_epochs, plan.teacher_deadline
    else:  # as many passes as the super-network got
        passes = load(plan.out / "supernet" / "training.json", TrainingLog).samples
        recipe, epochs, deadline = "plain", max(1, round(passes / len(plan.train))), float("inf")
    terms = Terms(plan.task, weights, s.ce_weight, s.strong_teacher, s.temperature, s.random_subnets)
    return Job(
        net=net, space=space, recipe=plugins.get("recipes", recipe), terms=terms, settings=s, train=plan.train, validation=plan.validation,
        metric=plan.metric, epochs=epochs, folder=_made(plan.out / "training" / name), seed=plan.seed, deadline=deadline, teacher=logits,
    )  # fmt: skip


def train(job: Job, progress: Progress) -> TrainingLog:
    """Train `job.net` in place and leave it with its best weights; continues from `job.folder` after a kill.

    Every random draw comes from (seed, epoch) or (seed, step), so a resumed run takes the steps an uninterrupted one would.
    Several processes share each batch, and the first one writes. RecipeError if a batch has fewer samples than there are processes.
    """
    from accelerate import Accelerator

    accelerator = Accelerator()
    if (least := min(job.settings.batch_size, len(job.train))) < accelerator.num_processes:
        raise RecipeError(
            f"a batch of {least} cannot be shared by {accelerator.num_processes} processes", hint="raise --batch-size, or start fewer"
        )
    net = _shared(job.net.to(accelerator.device), accelerator)
    steps_per_epoch = max(1, len(job.train) // job.settings.batch_size)
    total = steps_per_epoch * job.epochs
    optimizer = _optimizer(net, job.settings)
    schedule = _Schedule(peak_rate(job), total, job.settings.warmup)
    state = _State.resume(job.folder, net, optimizer)
    if state is None:
        state = _State()
        state.note(0.0, _validate(job, net, accelerator), net, job.folder, accelerator.is_main_process)
    started, saved = time.monotonic() - state.seconds, time.monotonic()
    stopped = "finished"
    while state.step < total:
        epoch, offset = divmod(state.step, steps_per_epoch)
        batch = _epoch(job.train, job.settings.batch_size, job.seed, epoch)[offset]
        torch.manual_seed(int(np.random.default_rng([job.seed, state.step, accelerator.process_index]).integers(2**62)))
        _step(job, net, optimizer, batch, schedule(state.step), state.step, accelerator)
        state.step += 1
        progress.step(f"{job.folder.name}: epoch {epoch + 1} of {job.epochs}", state.step, total)
        late = bool(_agreed(accelerator, time.monotonic() > job.deadline))
        if state.step % steps_per_epoch == 0 or late:
            state.note(state.step / steps_per_epoch, _validate(job, net, accelerator), net, job.folder, accelerator.is_main_process)
            if late and state.step < total:
                stopped = "time"
                break
            if state.since_best(steps_per_epoch) >= job.settings.patience:
                stopped = "no improvement"
                break
        if time.monotonic() - saved > CHECKPOINT_SECONDS and accelerator.is_main_process:
            state.seconds = time.monotonic() - started
            state.store(job.folder, net, optimizer)
            saved = time.monotonic()
    accelerator.wait_for_everyone()  # the main process may still be writing what the others read
    net.load_state_dict(load_file(job.folder / "best.safetensors"))
    net.to("cpu").eval()
    passes = job.recipe.passes(job.terms)
    return TrainingLog(
        recipe=job.recipe.name, epochs=state.step / steps_per_epoch, steps=state.step,
        samples=state.step * job.settings.batch_size * passes, seconds=time.monotonic() - started,
        validation=tuple(state.history), best_epoch=state.best_epoch, best=state.best, stopped=stopped,
    )  # fmt: skip


def peak_rate(job: Job) -> float:
    """Highest learning rate of a training: for a super-network half of a teacher's unless the settings say otherwise."""
    rate = job.settings.learning_rate or 5e-5 * 768 / _hidden_size(job.net.config)
    return (job.settings.supernet_learning_rate or rate / 2) if job.recipe.distils else rate


def _epoch(split: Split, size: int, seed: int, epoch: int) -> list[np.ndarray[Any, Any]]:
    """The epoch's batches: a shuffle, texts of similar length put together within every few batches, the batches shuffled again."""
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(split))
    order = order[: len(order) // size * size or len(order)]  # what is left over is left to chance, not to length
    order = np.concatenate([by_length(split, order[i : i + BUCKET * size]) for i in range(0, len(order), BUCKET * size)])
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def sort_by_importance(net: Supernet, space_of: Callable[[tuple[int, ...]], SearchSpace], train_split: Split, task: Any) -> SearchSpace:
    """Sort heads and neurons in place and return the space with its layers ordered by importance."""
    batches = load_batches(train_split, by_length(train_split, np.arange(min(len(train_split), IMPORTANCE_SAMPLES))), 32)
    reorder(net, importance(net, batches, task.loss))
    plain = space_of(())
    depth = next(gene for gene in plain.genes if gene.name == "depth")
    few = load_batches(train_split, by_length(train_split, np.arange(min(len(train_split), ORDER_SAMPLES))), EVALUATION_BATCH)
    with torch.no_grad():  # against its own outputs: on samples it was trained on, labels say little about what a layer does
        own = [(inputs, net(inputs, net.largest())) for inputs, _ in few]
    return space_of(layer_order(net, own, lambda logits, whole: task.distillation(logits, whole, 1.0), int(depth.choices[0])))


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
            inputs, _ = load_batch(split, order[start : start + EVALUATION_BATCH])
            found.append(net(inputs, net.largest()).numpy())
            progress.step("teacher outputs", min(start + EVALUATION_BATCH, len(split)), len(split))
    logits = np.concatenate(found)[np.argsort(order)]
    temporary = path.with_name(f".{path.name}.part.npy")
    np.save(temporary, logits, allow_pickle=False)
    temporary.replace(path)
    write_atomic(key, encode(identity))
    return logits


# ---------------------------------------------------------------------------------------------- one step


def _step(job: Job, net: Supernet, optimizer: Any, whole: Any, rate: float, step: int, accelerator: Any) -> None:
    rows = whole[accelerator.process_index :: accelerator.num_processes]
    teacher = None if job.teacher is None else torch.from_numpy(job.teacher[rows]).to(accelerator.device)
    batch = StepBatch(*load_batch(job.train, rows, accelerator.device), teacher)
    net.train()
    optimizer.zero_grad(set_to_none=True)
    for loss in job.recipe.losses(net, job.space, batch, np.random.default_rng([job.seed, step]), job.terms):
        loss.backward()  # not accelerate's, which scales it where a launcher was told of mixed precision
    parameters = [p for p in net.parameters() if p.grad is not None]
    if accelerator.num_processes > 1:
        # one reduction after all passes: DistributedDataParallel expects a single forward per backward
        share = len(rows) / len(whole)
        flat = accelerator.reduce(share * torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]), reduction="sum")
        for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter)
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()


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
    return torch.optim.AdamW([{"params": decayed, "weight_decay": settings.weight_decay}, {"params": free, "weight_decay": 0.0}], lr=1e-5)


@dataclass(frozen=True)
class _Schedule:
    """Linear warm-up, then linear decay to zero."""

    peak: float
    total: int
    warmup: float

    def __call__(self, step: int) -> float:
        ramp = max(1, int(self.total * self.warmup))
        return self.peak * min((step + 1) / ramp, (self.total - step) / max(1, self.total - ramp))


@torch.no_grad()
def _validate(job: Job, net: Supernet, accelerator: Any) -> float:
    """Validation score of the largest network; of a super-network the mean over largest, smallest and two fixed random ones."""
    task, subnets = job.terms.task, [net.largest()]
    if job.recipe.distils:
        rng = np.random.default_rng([job.seed, 1])
        points = [spaces.smallest(job.space), spaces.sample(job.space, rng), spaces.sample(job.space, rng)]
        subnets += [net.subnet(job.space, point) for point in points]
    outputs: list[list[np.ndarray[Any, Any]]] = [[] for _ in subnets]
    net.eval()
    order = by_length(job.validation, np.arange(min(len(job.validation), EARLY_STOPPING_SAMPLES)))
    for start in range(0, len(order), EVALUATION_BATCH):
        inputs, _ = load_batch(job.validation, order[start : start + EVALUATION_BATCH], accelerator.device)
        for row, subnet in zip(outputs, subnets, strict=True):
            row.append(net(inputs, subnet).cpu().numpy())
    truth = job.validation.labels[order]
    sign = 1 if task.direction(job.metric) == "maximize" else -1
    return _agreed(accelerator, float(np.mean([sign * task.score(job.metric, np.concatenate(row), truth)[0] for row in outputs])))


# ---------------------------------------------------------------------------------------------- checkpoints


class _State:
    """Where a training stands; tensors in safetensors, the rest in JSON, replaced as a whole."""

    def __init__(self) -> None:
        self.step, self.seconds = 0, 0.0
        self.history: list[tuple[float, float]] = []
        self.best, self.best_epoch = float("-inf"), 0.0

    def note(self, epoch: float, score: float, net: Supernet, folder: Path, write: bool) -> None:
        """Remember a validation score; keep the weights if it is the best so far."""
        self.history.append((epoch, score))
        if score > self.best:
            self.best, self.best_epoch = score, epoch
            if write:
                _store_tensors(net.state_dict(), folder / "best.safetensors")

    def since_best(self, steps_per_epoch: int) -> float:
        return self.step / steps_per_epoch - self.best_epoch

    def store(self, folder: Path, net: Supernet, optimizer: torch.optim.Optimizer) -> None:
        """A checkpoint folder of its own, then the pointer to it, then the old ones go."""
        name = f"checkpoint-{self.step}"
        target = folder / name
        target.mkdir(parents=True, exist_ok=True)
        _store_tensors(net.state_dict(), target / "model.safetensors")
        moments = {
            f"{index}.{key}": value if isinstance(value, torch.Tensor) else torch.tensor(value)
            for index, entry in optimizer.state_dict()["state"].items()
            for key, value in entry.items()
        }
        _store_tensors(moments, target / "optimizer.safetensors")
        state = {"folder": name, "step": self.step, "seconds": self.seconds, "history": self.history, "best": [self.best, self.best_epoch]}
        write_atomic(folder / "checkpoint.json", json.dumps(state).encode())
        for old in folder.glob("checkpoint-*"):
            if old.name != name:
                shutil.rmtree(old)

    @classmethod
    def resume(cls, folder: Path, net: Supernet, optimizer: torch.optim.Optimizer) -> _State | None:
        """The last whole checkpoint, with weights and optimizer restored; None if there is none."""
        pointer = folder / "checkpoint.json"
        if not pointer.is_file() or not (folder / "best.safetensors").is_file():
            return None
        state, stored = cls(), json.loads(pointer.read_text())
        state.step, state.seconds = stored["step"], stored["seconds"]
        state.history = [(float(e), float(s)) for e, s in stored["history"]]
        state.best, state.best_epoch = stored["best"]
        net.load_state_dict(load_file(folder / stored["folder"] / "model.safetensors"))
        entries: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in load_file(folder / stored["folder"] / "optimizer.safetensors").items():
            index, _, key = name.partition(".")
            entries.setdefault(int(index), {})[key] = value
        optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})
        return state


def _store_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    try:
        save_file({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, temporary)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RecordError(
            f"cannot write {path.name}: {error}",
            hint="free some space and run the same command again; it continues from the last checkpoint",
        ) from error


def _weights_digest(net: Supernet) -> str:
    return digest([(name, float(p.detach().double().sum()), float(p.detach().double().abs().sum())) for name, p in net.named_parameters()])


def _hidden_size(config: Any) -> int:
    return int(next(getattr(config, name) for name in ("hidden_size", "dim", "hidden") if hasattr(config, name)))
