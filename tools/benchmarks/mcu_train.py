"""Train vision transformers for microcontrollers from random weights, on a GPU: a teacher and a super-network for each task.

    python tools/benchmarks/mcu_train.py --out OUT --minutes 8 --gpus 2 --tasks fashion:32 fashion:32:small --data fashion=FOLDER

A task is a data set of tools/make_image_data.py (a folder with train.parquet, validation.parquet and test.parquet), the largest side of
the images that the network sees, and where it is not the family's own network the name of some of `--sizes`: fashion:32:small. test.parquet
may stay at home, a few training images are sealed in its place then. All tasks train at the same time, each in a process of its own and on
one of `--gpus`, with the package's own stage of fine-tuning: as many epochs as fit the minutes by a first few steps. The seeds are those of
`--seed`; test is sealed and not read.

OUT has then, for each task, TASK.teacher.tar and TASK.supernet.tar (safetensors and records), and results.json with the validation
accuracies in float of the largest, the smallest and some random networks. What goes on from there:

    tar xf OUT/TASK.teacher.tar -C there; mkdir -p RUN; tar xf OUT/TASK.supernet.tar -C RUN
    nascompile run --model there/teacher --data FOLDER/train.parquet --validation … --test … --device stm32f746 --out RUN

which finds the super-network in RUN and trains nothing. Beside torch and transformers this needs msgspec, pyarrow and Pillow.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SIZES = Path(__file__).parent / "microcontroller" / "sizes.json"
SPLITS = ("train", "validation", "test")
TEACHER_SHARE = 0.25
"""Of the time for training."""
RESERVE = 20.0
"""Seconds at the end for scores and files."""
WARM, TIMED = 6, 12
"""Steps before the timed ones, in which graphs are captured, and those."""
SLOWER, AWARE_FACTOR = 1.05, 2.5
"""A step with its update is so much slower than its passes, and one that is quantization-aware than another."""
EPOCH_SECONDS = {False: 0.3, True: 0.8}
"""Of an epoch besides its steps, above all validation; of a teacher, and of a super-network, which validates four networks."""
MOST_EPOCHS = 600
FEWEST_SEALED = 20
"""Training images set apart where there is no test."""
RANDOM = 6
"""Random networks whose accuracies are printed."""
AUGMENTATION = {"fashion": ("crop", "flip", "erase"), "tiles": ("crop", "flip", "light", "erase")}


@dataclass(frozen=True)
class Task:
    name: str
    data: str
    side: int
    sizes: str

    @classmethod
    def parse(cls, text: str) -> Task:
        data, side, *sizes = text.split(":")
        return cls("-".join((data, side, *sizes)), data, int(side), *(sizes or [""]))


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--tasks", nargs="+", default=["fashion:32", "fashion:32:small", "tiles:32:tiles", "fashion:64:mid"], metavar="DATA:SIDE[:SIZES]"
    )
    parser.add_argument("--data", nargs="+", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything, reading data included")
    parser.add_argument("--work", type=Path, help="where data and checkpoints are kept; default: a folder beside OUT")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recipe", default="bignas")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--rate", type=float, default=1.5e-3, help="peak learning rate of the teacher; half of it for the super-network")
    parser.add_argument("--aware", type=float, default=0.1, help="share of the super-network's epochs that are quantization-aware")
    parser.add_argument("--epochs", type=int, nargs=2, metavar=("TEACHER", "SUPERNET"), help="instead of what fits the minutes")
    parser.add_argument("--sizes", type=Path, default=SIZES, help="JSON file: name of sizes, or none ▸ entries of the configuration")
    parser.add_argument("--pace", action="store_true", help="print what steps take with CUDA graphs and without, and stop")
    parser.add_argument("--gpus", type=int, default=1, help="tasks take turns at them")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    asked = options().parse_args(given)
    asked.sizes = json.loads(asked.sizes.read_text())
    folders = dict(pair.split("=", 1) for pair in asked.data)
    if unknown := {task.sizes for task in map(Task.parse, [asked.one] if asked.one else asked.tasks)} - {"", *asked.sizes}:
        raise SystemExit(f"error: no sizes {', '.join(sorted(unknown))}; --sizes has {', '.join(asked.sizes) or 'none'}")
    asked.out.mkdir(parents=True, exist_ok=True)
    work = asked.work or asked.out.with_name(f"{asked.out.name}-work")
    if asked.one:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # several of these run at a time, and a GPU does the work
        if asked.device == "cpu":
            os.environ["ACCELERATE_USE_CPU"] = "true"
        Training(Task.parse(asked.one), Path(folders[Task.parse(asked.one).data]), work, asked).run()
        return 0
    until = time.time() + 60 * asked.minutes - RESERVE
    running = {
        task: subprocess.Popen([sys.executable, __file__, *given, "--one", task, "--until", str(until)], env=_environment(i, asked.gpus))
        for i, task in enumerate(asked.tasks)
    }
    failed = [task for task, process in running.items() if process.wait()]
    if asked.pace:
        return 1 if failed else 0
    found = [json.loads(path.read_text()) for path in sorted(asked.out.glob("*.result.json"))]
    (asked.out / "results.json").write_text(json.dumps({"tasks": found, "failed": failed}, indent=1) + "\n")
    for path in asked.out.glob("*.result.json"):
        path.unlink()
    print(f"{asked.out / 'results.json'}: {len(found)} of {len(asked.tasks)} tasks")
    return 1 if failed else 0


def _environment(task: int, gpus: int) -> dict[str, str]:
    """Of the process of a task; with one GPU that is the caller's choice."""
    path = os.pathsep.join([str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")])
    shown = {"CUDA_VISIBLE_DEVICES": str(task % gpus)} if gpus > 1 else {}
    return os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"} | shown


class Training:
    """One task: its data, its teacher, its super-network, and what they are worth."""

    def __init__(self, task: Task, source: Path, work: Path, asked: argparse.Namespace) -> None:
        self.task, self.source, self.asked = task, source, asked
        self.folder = work / task.name
        self.began = time.time()

    def run(self) -> None:
        from nascompile import data, finetune, network, plugins, targets
        from nascompile.data import DataSettings
        from nascompile.families import mcu_vit
        from nascompile.models import weights_digest
        from nascompile.preprocess import Preprocessor
        from nascompile.settings import FinetuneSettings
        from nascompile.supernet import Supernet

        asked, family, labels = self.asked, mcu_vit.PLUGIN, plugins.get("tasks", "classification")
        files = {split: str(self.source / f"{split}.parquet") for split in SPLITS}
        sealed = {"test": files["test"]} if Path(files["test"]).is_file() else {"test_size": float(FEWEST_SEALED)}
        settings = DataSettings(data=files["train"], validation=files["validation"], **sealed)
        _, _, channels = data.image_shape(settings)
        config = mcu_vit.McuVitConfig(**{"image_size": self.task.side, "num_channels": channels} | asked.sizes.get(self.task.sizes, {}))
        if reason := family.unsupported(config):
            raise SystemExit(f"{self.task.name}: {reason}")
        if not (self.folder / "model").is_dir():
            self.folder.mkdir(parents=True, exist_ok=True)
            _seed(asked.seed)
            finetune.store_model(Supernet(family, family.create(config)), self.folder / "model", {})
        if not (self.folder / "data" / data.MANIFEST).is_file():
            preprocessor = Preprocessor.from_model_folder(self.folder / "model", config.to_dict(), 0, ["pixel_values"])
            data.prepare(settings, preprocessor, labels, self.folder / "data")
        names = data.load_manifest(self.folder / "data").label_names
        head = {"num_labels": len(names), "id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
        target = targets.make("stm32f746", "", family.workload(config, 1, 0))

        def space_of(config: Any, order: tuple[int, ...]) -> Any:
            trained = self.folder / "teacher"  # what a search goes on from, and so what its space is of
            digest = weights_digest(trained if trained.is_dir() else self.folder / "model")
            backend = plugins.get("backends", target.backend)
            return network.shared_space(family, config, ((backend, target),), digest, order)

        plan = finetune.Plan(
            family=family, model=self.folder / "model", head=head, space_of=space_of, train=data.open_split(self.folder / "data", "train"),
            validation=data.open_split(self.folder / "data", "validation"), task=labels, metric="accuracy",
            settings=FinetuneSettings(
                recipe=asked.recipe, batch_size=asked.batch, learning_rate=asked.rate, weight_decay=0.05, patience=10**6,
                ema_decay=0.998, augmentation=AUGMENTATION[self.task.data],
                mixed_precision="bf16" if asked.device == "cuda" else "no", cuda_graphs=asked.device == "cuda",
            ),
            seed=asked.seed, out=self.folder,
        )  # fmt: skip
        if asked.pace:
            self._compare(plan)
            return
        plan = self._timed(plan)
        print(f"{self.task.name}: {plan.settings.teacher_epochs} and {plan.settings.epochs} epochs", flush=True)
        space = finetune.finetune(plan, _Lines(self.task.name))
        self._store(self._scored(plan, space))

    def _timed(self, plan: Any) -> Any:
        """The plan with the epochs that fit the time, and deadlines should the steps have been slower than at first."""
        import dataclasses

        import msgspec

        left = self.asked.until - time.time()
        if self.asked.epochs:
            teacher, supernet = self.asked.epochs
        else:
            steps = max(1, len(plan.train) // plan.settings.batch_size)
            plain, elastic = (steps * SLOWER * self._pace(plan, name) for name in ("plain", self.asked.recipe))
            left = self.asked.until - time.time()
            teacher = _epochs(TEACHER_SHARE * left / (plain + EPOCH_SECONDS[False]))
            elastic *= 1 + self.asked.aware * (AWARE_FACTOR - 1)
            supernet = _epochs((1 - TEACHER_SHARE) * left / (elastic + EPOCH_SECONDS[True]))
        aware = round(self.asked.aware * supernet)
        settings = msgspec.structs.replace(plan.settings, teacher_epochs=teacher, epochs=supernet, quantization_aware_epochs=aware)
        now = time.monotonic()
        return dataclasses.replace(
            plan, settings=settings, teacher_deadline=now + 1.2 * TEACHER_SHARE * left, deadline=now + self.asked.until - time.time()
        )

    def _compare(self, plan: Any) -> None:
        """Steps with captured passes and with launched ones."""
        import dataclasses

        import msgspec

        for graphs in (True, False, True, False):
            settings = msgspec.structs.replace(plan.settings, cuda_graphs=graphs and self.asked.device == "cuda")
            print(f"{self.task.name}: passes {'captured' if settings.cuda_graphs else 'launched'}:", flush=True)
            for name in ("plain", self.asked.recipe):
                self._pace(dataclasses.replace(plan, settings=settings), name)

    def _pace(self, plan: Any, recipe_name: str) -> float:
        """Seconds of a training step, its update apart."""
        import torch

        from nascompile import finetune, plugins
        from nascompile.augmentation import vary
        from nascompile.recipes import StepBatch
        from nascompile.replay import Replayed
        from nascompile.supernet import Supernet, load_batch

        recipe = plugins.get("recipes", recipe_name)
        device = finetune.training_device()
        net = Supernet(plan.family, plan.family.load(str(plan.model), **plan.head)).to(device)
        runs = Replayed(net) if plan.settings.cuda_graphs else net
        space, terms = plan.space_of(net.config, ()), finetune.terms_of(plan.task, recipe, plan.settings)
        inputs, labels = load_batch(plan.train, np.arange(min(plan.settings.batch_size, len(plan.train))), device)
        teacher = torch.zeros(len(labels), len(plan.head["id2label"]), device=device)
        began = 0.0
        for step in range(WARM + TIMED):
            if step == WARM:
                _wait(device)
                began = time.perf_counter()
            net.train()
            varied = {name: vary(values, plan.settings.augmentation) for name, values in inputs.items()}
            losses = iter(recipe.losses(runs, space, StepBatch(varied, labels, teacher), np.random.default_rng(step % 2), terms))
            while True:
                with torch.autocast(device.type, torch.bfloat16, enabled=plan.settings.mixed_precision == "bf16"):
                    loss = next(losses, None)
                if loss is None:
                    break
                loss.backward()
        _wait(device)
        seconds = (time.perf_counter() - began) / TIMED
        print(f"{self.task.name}: {1e3 * seconds:.1f} ms a step of {recipe_name}", flush=True)
        return seconds

    def _scored(self, plan: Any, space: Any) -> dict[str, Any]:
        """Float accuracies on validation of some networks, and how the trainings went."""
        import torch

        from nascompile import finetune, space as spaces
        from nascompile.records import load
        from nascompile.supernet import Supernet, load_batches

        device = finetune.training_device()
        rng = np.random.default_rng([self.asked.seed, 9])
        points = {"largest": spaces.largest(space), "smallest": spaces.smallest(space)}
        points |= {f"random {i}": spaces.sample(space, rng) for i in range(RANDOM)}
        batches = load_batches(plan.validation, np.arange(len(plan.validation)), 500, device)
        rows = []
        for folder in ("teacher", "supernet"):
            net = Supernet(plan.family, plan.family.load(str(self.folder / folder))).to(device)
            for name, point in points.items():
                if folder == "supernet" or name == "largest":
                    with torch.no_grad():
                        right = [int((net(x, net.subnet(space, point)).argmax(1) == y).sum()) for x, y in batches]
                    accuracy = 100 * sum(right) / len(plan.validation)
                    rows.append({"weights": folder, "network": name, "accuracy": accuracy, "genes": dict(point.architecture)})
        logs = {name: load(self.folder / name / "training.json", finetune.TrainingLog) for name in ("teacher", "supernet")}
        return {
            "task": self.task.name, "recipe": self.asked.recipe, "seed": self.asked.seed, "seconds": time.time() - self.began,
            "train": len(plan.train), "validation": len(plan.validation), "networks": rows,
            "trainings": {
                name: {
                    "epochs": log.epochs, "steps": log.steps, "seconds": log.seconds, "best": log.best, "best_epoch": log.best_epoch,
                    "stopped": log.stopped, "quantized_from": log.quantized_from,
                }
                for name, log in logs.items()
            },
        }  # fmt: skip

    def _store(self, found: Mapping[str, Any]) -> None:
        for name in ("teacher", "supernet"):
            with tarfile.open(self.asked.out / f"{self.task.name}.{name}.tar", "w") as tar:
                tar.add(self.folder / name, name)
        (self.asked.out / f"{self.task.name}.result.json").write_text(json.dumps(found))
        shutil.rmtree(self.folder / "training", ignore_errors=True)
        for row in found["networks"]:
            print(f"{self.task.name}: {row['accuracy']:6.2f} % of validation, {row['weights']} {row['network']}", flush=True)


class _Lines:
    """Progress as a line every 20 seconds."""

    def __init__(self, name: str) -> None:
        self.name, self.next = name, 0.0

    def stage(self, name: str, number: int, total: int) -> None: ...

    def step(self, label: str, done: int, total: int, limit: float = float("inf")) -> None:
        if time.monotonic() > self.next:
            self.next = time.monotonic() + 20
            print(f"{self.name}: {label}, step {done:,} of {total:,}", flush=True)

    def note(self, text: str) -> None:
        print(f"{self.name}: {text}", flush=True)

    def standing(self, found: Any) -> None: ...


def _epochs(count: float) -> int:
    return int(min(max(count, 1), MOST_EPOCHS))


def _seed(seed: int) -> None:
    import torch

    torch.manual_seed(seed)


def _wait(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    sys.exit(main())
