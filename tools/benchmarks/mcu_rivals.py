"""Trains what searched networks are compared with: vision transformers of sizes that a person would pick, and small depthwise CNNs.

    python tools/benchmarks/mcu_rivals.py --data RUN/data --out FOLDER --device cuda --epochs 100
    python tools/benchmarks/mcu_rivals.py --data RUN/data --out FOLDER --only cnn-64k --epochs 2

Each is trained alone, on the train split of a run (`nascompile run --until data` makes one), with the same augmentation, label smoothing,
optimizer, schedule and epochs; only the learning rate differs between the two kinds. The last weights are kept, as FOLDER/NAME.safetensors
with the settings in its metadata; test is never read. A network that is there already, of the same settings, is not trained again. Nothing
of the latency side is imported, so that a machine with PyTorch and little else can do it; `--jobs` trains several at a time.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from nascompile import data
from nascompile.mcu import calibrated, convolutional, torch_forward
from nascompile.mcu.transformer import Shape

EPSILON = 1e-5


@dataclass(frozen=True)
class Settings:
    """Of every training; what else it depends on are data and network."""

    epochs: int = 100
    seed: int = 0
    batch: int = 256
    weight_decay: float = 0.05
    warmup: float = 0.05
    """Share of the steps."""
    label_smoothing: float = 0.1
    crop: int = 2
    """Pixels that an image is moved by at most, each way; besides it is mirrored half of the time."""
    ema: float = 0.999
    """Kept weights are moving averages, of about a thousand steps."""


@dataclass(frozen=True)
class Rival:
    """A network that nobody searched for."""

    kind: str
    """`vit` or `cnn`."""
    learning_rate: float
    sizes: Mapping[str, Any]

    @property
    def text(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.sizes.items())


def _vit(**sizes: int) -> Rival:
    return Rival("vit", 1e-3, sizes)


def _cnn(stem: int, blocks: Sequence[tuple[int, int]]) -> Rival:
    return Rival("cnn", 3e-3, {"stem": stem, "blocks": [list(block) for block in blocks]})


RIVALS = {
    "hand-320k": _vit(patch=4, width=96, depth=9, heads=3, hidden=192),
    "hand-64k": _vit(patch=4, width=64, depth=5, heads=2, hidden=128),
    "cnn-320k": _cnn(32, ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (256, 1))),
    "cnn-64k": _cnn(16, ((32, 2), (64, 1), (64, 1), (128, 2), (128, 1))),
}
"""Uniform transformers that fill most of the flash of their budget; CNNs of a stem and (channels, stride) of depthwise blocks."""


# ---------------------------------------------------------------------------------------------- networks


class Vit(nn.Module):
    """The transformer whose program it becomes, its parameters by their names there."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        for name, value in initial(shape).items():
            self.register_parameter(name.replace(".", "/"), nn.Parameter(value))

    def named(self) -> dict[str, Tensor]:
        return {name.replace("/", "."): value for name, value in self.named_parameters()}

    def forward(self, images: Tensor) -> Tensor:
        return torch_forward.forward(self.shape, self.named(), images, EPSILON)


def initial(shape: Shape) -> dict[str, Tensor]:
    """Maps of Glorot's range, positions and class token small, norms one and zero."""
    found: dict[str, Tensor] = {}
    sizes = {"embedding": (shape.patch**2 * shape.image[2], shape.width), "head": (shape.width, shape.classes)}
    for i, layer in enumerate(shape.layers):
        inner, hidden = (shape.width, layer.inner), (shape.width, layer.hidden)
        parts = {"query": inner, "key": inner, "value": inner, "out": inner[::-1], "up": hidden, "down": hidden[::-1]}
        sizes |= {f"layers.{i}.{part}": size for part, size in parts.items()}
        for norm in ("norm1", "norm2"):
            found |= {f"layers.{i}.{norm}.weight": torch.ones(shape.width), f"layers.{i}.{norm}.bias": torch.zeros(shape.width)}
    for name, (inputs, outputs) in sizes.items():
        weight = nn.init.xavier_uniform_(torch.empty(outputs, inputs))
        found |= {f"{name}.weight": weight, f"{name}.bias": torch.zeros(outputs)}
    found |= {"norm.weight": torch.ones(shape.width), "norm.bias": torch.zeros(shape.width)}
    return found | {"position": 0.02 * torch.randn(shape.tokens, shape.width), "class_token": 0.02 * torch.randn(shape.width)}


def depthwise_cnn(channels: int, stem: int, blocks: Sequence[Sequence[int]], classes: int) -> nn.Sequential:
    """A stem, then blocks of a depthwise and a pointwise convolution, each normalized and through ReLU; mean; classifier."""

    def normalized(convolution: nn.Conv2d) -> tuple[nn.Module, ...]:
        return convolution, nn.BatchNorm2d(convolution.out_channels), nn.ReLU()

    parts = [*normalized(nn.Conv2d(channels, stem, 3, padding=1, bias=False))]
    before = stem
    for width, stride in blocks:
        parts += normalized(nn.Conv2d(before, before, 3, stride=stride, padding=1, groups=before, bias=False))
        parts += normalized(nn.Conv2d(before, width, 1, bias=False))
        before = width
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))


def shape_of(rival: Rival, image: tuple[int, int, int], classes: int) -> Shape:
    """Sizes of a `vit` rival; `image`: height, width, channels."""
    return Shape.uniform(image, classes=classes, **rival.sizes)


def untrained(rival: Rival, image: tuple[int, int, int], classes: int) -> nn.Module:
    """The module that is trained."""
    return Vit(shape_of(rival, image, classes)) if rival.kind == "vit" else depthwise_cnn(image[2], classes=classes, **rival.sizes)


def network(
    rival: Rival, path: Path, image: tuple[int, int, int], classes: int, mean: Sequence[float], deviation: Sequence[float]
) -> tuple[calibrated.Network | convolutional.Network, nn.Module]:
    """What a stored rival's program is made of, and the float module."""
    module = untrained(rival, image, classes)
    with safe_open(path, "pt") as stored:
        module.load_state_dict({name: stored.get_tensor(name) for name in stored.keys()})  # noqa: SIM118: no dictionary
    module.eval()
    if not isinstance(module, Vit):
        return convolutional.of_torch(module, image, mean, deviation), module
    parameters = {name: value.detach().double().numpy() for name, value in module.named().items()}
    return calibrated.Network(module.shape, parameters, EPSILON, mean=tuple(mean), deviation=tuple(deviation)), module


def facts(path: Path) -> dict[str, Any]:
    """The settings and figures that a stored rival came of."""
    with safe_open(path, "pt") as stored:
        return dict(json.loads(stored.metadata()["training"]))


# ---------------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Samples:
    """Stored pixels (n, channels, height, width) in bytes and labels of two splits, and how pixels are normalized."""

    train: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]
    validation: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    classes: int
    digest: str

    @classmethod
    def of_run(cls, folder: Path) -> Samples:
        """Of RUN/data."""
        manifest = data.load_manifest(folder)
        found = {name: data.open_split(folder, name, "rivals of a searched network") for name in ("train", "validation")}
        settings = found["train"].preprocessor.settings
        pixels = {name: np.ascontiguousarray(split.inputs["pixel_values"]) for name, split in found.items()}
        labels = {name: np.array(split.labels) for name, split in found.items()}
        return cls(
            (pixels["train"], labels["train"]), (pixels["validation"], labels["validation"]), settings.mean, settings.std,
            len(manifest.label_names), manifest.digest,
        )  # fmt: skip


def augment(images: Tensor, most: int) -> Tensor:
    """The batch mirrored and moved by up to `most` pixels, each image by itself; what comes in is black."""
    (n, _, height, width), device = images.shape, images.device
    rows = torch.randint(2 * most + 1, (n, 1), device=device) + torch.arange(height, device=device)
    columns = torch.randint(2 * most + 1, (n, 1), device=device) + torch.arange(width, device=device)
    columns = torch.where(torch.rand(n, 1, device=device) < 0.5, columns.flip(1), columns)
    padded = F.pad(images, (most,) * 4)
    return padded[torch.arange(n, device=device)[:, None, None, None], torch.arange(images.shape[1], device=device)[:, None, None],
                  rows[:, None, :, None], columns[:, None, None, :]]  # fmt: skip


def train(
    module: nn.Module, samples: Samples, settings: Settings, learning_rate: float, device: str, say: Callable[[str], None] = lambda text: None
) -> float:
    """Trains in place; accuracy of the averaged weights, which the module has afterwards, on validation in per cent."""
    torch.manual_seed(settings.seed)
    module.to(device).train()
    images, labels = (torch.from_numpy(array).to(device) for array in samples.train)
    mean, deviation = (torch.tensor(values, device=device).reshape(-1, 1, 1) for values in (samples.mean, samples.deviation))
    averaged = {name: value.detach().clone() for name, value in module.state_dict().items()}
    matrices = [value for value in module.parameters() if value.ndim > 1]
    others = [value for value in module.parameters() if value.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, learning_rate, fused=device == "cuda")
    batches = max(1, len(images) // settings.batch)
    steps = batches * settings.epochs
    warm = max(1, round(settings.warmup * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    done, began = 0, time.monotonic()
    for epoch in range(1, settings.epochs + 1):
        total = torch.zeros((), device=device)
        for chosen in torch.randperm(len(images), device=device)[: batches * settings.batch].split(settings.batch):
            x = (augment(images[chosen].float() / 255, settings.crop) - mean) / deviation
            with torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda"):
                logits = module(x)
            loss = F.cross_entropy(logits.float(), labels[chosen].long(), label_smoothing=settings.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            done += 1
            share = min(settings.ema, (1 + done) / (10 + done))  # follows closely at first
            for name, value in module.state_dict().items():
                if value.is_floating_point():
                    averaged[name].lerp_(value.detach(), 1 - share)
            total += loss.detach()
        say(f"epoch {epoch} of {settings.epochs}, loss {total.item() / batches:.4f}, {time.monotonic() - began:.0f} s")
    module.load_state_dict(averaged)
    pixels, wanted = samples.validation
    return 100 * float((predicted(module.eval(), pixels, samples.mean, samples.deviation, device) == wanted).mean())


@torch.no_grad()
def predicted(
    module: nn.Module, pixels: np.ndarray[Any, Any], mean: Sequence[float], deviation: Sequence[float], device: str = "cpu"
) -> np.ndarray[Any, Any]:
    """Classes of stored pixels (n, channels, height, width), in float32."""
    scales = [np.reshape(values, (-1, 1, 1)).astype(np.float32) for values in (mean, deviation)]
    found = []
    for part in np.array_split(pixels, max(1, len(pixels) // 500)):
        x = torch.from_numpy((part.astype(np.float32) / 255 - scales[0]) / scales[1]).to(device)
        found.append(module(x).argmax(1).cpu().numpy())
    return np.concatenate(found)


def make(name: str, folder: Path, out: Path, settings: Settings, device: str) -> str:
    """Trains one rival and stores it, unless it is there; what was done."""
    torch.set_num_threads(1)
    rival, samples, path = RIVALS[name], Samples.of_run(folder), out / f"{name}.safetensors"
    image = (*samples.train[0].shape[2:], samples.train[0].shape[1])
    key = {"settings": asdict(settings), "sizes": dict(rival.sizes), "learning_rate": rival.learning_rate, "data": samples.digest}
    if path.is_file() and {part: facts(path).get(part) for part in key} == key:
        return f"{name}: there already"
    torch.manual_seed(settings.seed)
    module = untrained(rival, image, samples.classes)

    def say(text: str) -> None:
        print(f"{name}: {text}", file=sys.stderr, flush=True)

    began = time.monotonic()
    accuracy = train(module, samples, settings, rival.learning_rate, device, say)
    named = torch.cuda.get_device_name() if device == "cuda" else device
    found = key | {"validation_accuracy": accuracy, "seconds": time.monotonic() - began, "device": named, "torch": torch.__version__}
    out.mkdir(parents=True, exist_ok=True)
    tensors = {part: value.detach().cpu().contiguous() for part, value in module.state_dict().items()}
    save_file(tensors, out / f".{name}.part", {"training": json.dumps(found)})
    (out / f".{name}.part").replace(path)
    return f"{name}: {accuracy:.2f} % on validation after {found['seconds']:.0f} s ({rival.text})"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the `data` folder of a run")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=tuple(RIVALS), default=list(RIVALS), metavar="NAME", help=", ".join(RIVALS))
    parser.add_argument("--epochs", type=int, default=Settings.epochs)
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    given = parser.parse_args(arguments)
    settings = Settings(epochs=given.epochs, seed=given.seed)
    work = [(name, given.data, given.out, settings, given.device) for name in given.only]
    if given.jobs == 1:
        for one in work:
            print(make(*one), flush=True)
        return
    with multiprocessing.get_context("spawn").Pool(given.jobs) as pool:
        for said in pool.starmap(make, work, chunksize=1):
            print(said, flush=True)


if __name__ == "__main__":
    main()
