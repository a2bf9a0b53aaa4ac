"""Trains what searched networks are compared with: vision transformers of sizes that a person would pick, and small depthwise CNNs.

    python tools/benchmarks/mcu_rivals.py --data WORK/fashion-32/data --out OUT/rivals --epochs 228 --device cuda --jobs 4
    python tools/benchmarks/mcu_rivals.py --data RUN/data --out FOLDER --only cnn-64k --epochs 2

Each is trained alone on the train split of a prepared data folder (mcu_train.py leaves one for each of its tasks, `nascompile run` in its
run), by the settings of mcu_train.py: its augmentation, batch, decay, moving average and quantization-aware share of the epochs. The
learning rate is the teacher's, three times that for CNNs, which are not trained quantization-aware. Cosine schedule, cross-entropy of the
labels. Images larger than 32 pixels are averaged down to that. The last weights are kept, as OUT/NAME.safetensors with the settings in its
metadata; test is never read. A network that is there already, of the same settings, is not trained again.

Nothing of the latency side is imported, so that a machine with PyTorch and little else can do it; `--jobs` trains several at a time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from nascompile import data
from nascompile.augmentation import vary
from nascompile.mcu import calibrated, convolutional, torch_forward
from nascompile.mcu.transformer import Shape
from nascompile.quantization_aware import ProgramQuantizer

EPSILON = 1e-5
CNN_RATE = 3.0
"""Times the learning rate of transformers."""
SIDE = 32
"""Of the images that rivals see, where the data's are a multiple of it."""
TEST_BATCH = 500


@dataclass(frozen=True)
class Settings:
    """Of every training; what else it depends on are data and network. The defaults are mcu_train.py's."""

    epochs: int = 100
    aware_epochs: int = 10
    seed: int = 0
    batch: int = 512
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    warmup: float = 0.1
    """Share of the steps."""
    augmentation: tuple[str, ...] = ("crop", "flip", "erase")
    ema: float = 0.998
    half: bool = False
    """Whether products are of bfloat16."""


@dataclass(frozen=True)
class Rival:
    """A network that nobody searched for."""

    kind: str
    """`vit` or `cnn`."""
    sizes: Mapping[str, Any]

    @property
    def text(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.sizes.items())


RIVALS = {
    "hand-320k": Rival("vit", {"patch": 4, "width": 96, "depth": 9, "heads": 3, "hidden": 192}),
    "hand-64k": Rival("vit", {"patch": 4, "width": 64, "depth": 6, "heads": 2, "hidden": 128}),
    "cnn-320k": Rival("cnn", {"stem": 32, "blocks": [[64, 1], [128, 2], [128, 1], [256, 2], [256, 1], [256, 1]]}),
    "cnn-64k": Rival("cnn", {"stem": 16, "blocks": [[32, 2], [64, 1], [64, 1], [128, 2], [128, 1]]}),
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
        self.aware: ProgramQuantizer | None = None
        """What quantizes its products and tensors, in the last epochs."""

    def named(self) -> dict[str, Tensor]:
        return {name.replace("/", "."): value for name, value in self.named_parameters()}

    def forward(self, images: Tensor) -> Tensor:
        hooks = {} if self.aware is None else {"product": self.aware, "see": self.aware.see}
        return torch_forward.forward(self.shape, self.named(), images, EPSILON, **hooks)

    def turn_aware(self) -> None:
        """From now on with the numbers of the program; ranges are found on the way."""
        self.aware = ProgramQuantizer({})
        self.aware.layers = tuple(range(len(self.shape.layers)))


def initial(shape: Shape) -> dict[str, Tensor]:
    """Maps of Glorot's range, positions and class token small, norms one and zero."""
    found: dict[str, Tensor] = {}
    sizes = {"embedding": (shape.patch**2 * shape.image[2], shape.width), "head": (shape.width, shape.classes)}
    ranks: dict[str, int] = {}
    for i, layer in enumerate(shape.layers):
        inner, hidden = (shape.width, layer.inner), (shape.width, layer.hidden)
        parts = {"query": inner, "key": inner, "value": inner, "out": inner[::-1], "up": hidden, "down": hidden[::-1]}
        sizes |= {f"layers.{i}.{part}": size for part, size in parts.items()}
        ranks |= {f"layers.{i}.{part}": layer.factors(*size) for part, size in parts.items()}
        for norm in ("norm1", "norm2"):
            found |= {f"layers.{i}.{norm}.weight": torch.ones(shape.width), f"layers.{i}.{norm}.bias": torch.zeros(shape.width)}
    for name, (inputs, outputs) in sizes.items():
        rank = ranks.get(name, 0)
        maps = {"first": (rank, inputs), "second": (outputs, rank)} if rank else {"weight": (outputs, inputs)}
        found |= {f"{name}.{part}": nn.init.xavier_uniform_(torch.empty(size)) for part, size in maps.items()}
        found[f"{name}.bias"] = torch.zeros(outputs)
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


def untrained(rival: Rival, image: tuple[int, int, int], classes: int) -> nn.Module:
    """The module that is trained; `image`: height, width, channels."""
    if rival.kind == "vit":
        return Vit(Shape.uniform(image, classes=classes, **rival.sizes))
    return depthwise_cnn(image[2], classes=classes, **rival.sizes)


def network(
    rival: Rival, path: Path, samples: Samples, mean: Sequence[float], deviation: Sequence[float]
) -> tuple[calibrated.Network | convolutional.Network, nn.Module]:
    """What a stored rival's program is made of, and the float module; `mean` and `deviation` of pixels from 0 to 1."""
    module = untrained(rival, samples.image, samples.classes)
    module.load_state_dict(load_file(path))
    module.eval()
    image = module.shape.image if isinstance(module, Vit) else samples.image
    pool = samples.train[0].shape[2] // image[0]
    if not isinstance(module, Vit):
        return replace(convolutional.of_torch(module, samples.image, mean, deviation), pool=pool), module
    parameters = {name: value.detach().double().numpy() for name, value in module.named().items()}
    return calibrated.Network(module.shape, parameters, EPSILON, mean=tuple(mean), deviation=tuple(deviation), pool=pool), module


def facts(path: Path) -> dict[str, Any]:
    """The settings and figures that a stored rival came of."""
    with safe_open(path, "pt") as stored:
        return dict(json.loads(stored.metadata()["training"]))


# ---------------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Samples:
    """Stored pixels (n, channels, height, width) in bytes and labels of two splits, and what makes normalized pixels of bytes."""

    train: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]
    validation: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]
    scaling: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]
    """Factor and summand (channels, 1, 1)."""
    classes: int

    @classmethod
    def of_folder(cls, folder: Path) -> Samples:
        """Of a prepared data folder."""
        classes = len(data.load_manifest(folder).label_names)
        found = {name: data.open_split(folder, name, "rivals of a searched network") for name in ("train", "validation")}
        train, validation = ((np.array(split.inputs["pixel_values"]), np.array(split.labels)) for split in found.values())
        return cls(train, validation, found["train"].preprocessor.scaling(), classes)

    @property
    def image(self) -> tuple[int, int, int]:
        """Height, width, channels that rivals see."""
        channels, height, width = self.train[0].shape[1:]
        return (SIDE, SIDE, channels) if height == width and height % SIDE == 0 else (height, width, channels)

    @property
    def digest(self) -> str:
        """Of what is trained on."""
        parts = (*self.train, *self.scaling)
        return hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in parts)).hexdigest()[:16]


def train(
    module: nn.Module, samples: Samples, settings: Settings, device: str, say: Callable[[str], None] = lambda text: None
) -> float:  # fmt: skip
    """Trains in place; accuracy on validation in per cent of the weights it has afterwards, in float."""
    torch.manual_seed(settings.seed)
    module.to(device).train()
    images, labels = (torch.from_numpy(array).to(device) for array in samples.train)
    normalized = _normalized(samples, device)
    live = {name: value.detach() for name, value in module.state_dict().items() if value.is_floating_point()}
    averaged = {name: value.clone() for name, value in live.items()}
    groups = [
        {"params": [value for value in module.parameters() if value.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [value for value in module.parameters() if value.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, settings.learning_rate, fused=device == "cuda")
    batches = max(1, len(images) // settings.batch)
    steps = batches * settings.epochs
    warm = max(1, round(settings.warmup * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min((n + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * n / steps)))
    run: Callable[[Tensor], Tensor] = module
    if settings.half and device == "cuda" and not settings.aware_epochs:  # kernels captured once: these networks are bound by launches
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            run = torch.cuda.make_graphed_callables(module, (normalized(images[: settings.batch]),))
    done, began = 0, time.monotonic()
    for epoch in range(1, settings.epochs + 1):
        if isinstance(module, Vit) and epoch == settings.epochs - settings.aware_epochs + 1:
            module.turn_aware()
        total = torch.zeros((), device=device)
        for chosen in torch.randperm(len(images), device=device)[: batches * settings.batch].split(settings.batch):
            x = vary(normalized(images[chosen]), settings.augmentation)
            with torch.autocast("cuda", torch.bfloat16, enabled=settings.half and device == "cuda"):
                logits = run(x)
            loss = F.cross_entropy(logits.float(), labels[chosen].long())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            done += 1
            if isinstance(module, Vit) and module.aware:
                module.aware.follow()
            share = min(settings.ema, (1 + done) / (10 + done))  # follows closely at first
            torch._foreach_lerp_(list(averaged.values()), list(live.values()), 1 - share)
            total += loss.detach()
        say(f"epoch {epoch} of {settings.epochs}, loss {total.item() / batches:.4f}, {time.monotonic() - began:.0f} s")
    module.load_state_dict(module.state_dict() | averaged)
    if isinstance(module, Vit):
        module.aware = None
    pixels, wanted = samples.validation
    return 100 * float((predicted(module.eval(), samples, pixels, device) == wanted).mean())


def _normalized(samples: Samples, device: str) -> Callable[[Tensor], Tensor]:
    """Bytes (n, channels, height, width) to normalized images of the rivals' size."""
    factor, summand = (torch.from_numpy(values).to(device) for values in samples.scaling)
    pool = samples.train[0].shape[2] // samples.image[0]
    return lambda pixels: F.avg_pool2d(pixels * factor + summand, pool)


@torch.no_grad()
def predicted(module: nn.Module, samples: Samples, pixels: np.ndarray[Any, Any], device: str = "cpu") -> np.ndarray[Any, Any]:
    """Classes of stored pixels (n, channels, height, width), in float32."""
    normalized, parts = _normalized(samples, device), torch.from_numpy(np.ascontiguousarray(pixels)).split(TEST_BATCH)
    return np.concatenate([module(normalized(part.to(device))).argmax(1).cpu().numpy() for part in parts])


def make(name: str, folder: Path, out: Path, settings: Settings, device: str) -> str:
    """Trains one rival and stores it, unless it is there; what was done."""
    torch.set_num_threads(1)
    rival, samples, path = RIVALS[name], Samples.of_folder(folder), out / f"{name}.safetensors"
    if rival.kind == "cnn":
        settings = replace(settings, learning_rate=CNN_RATE * settings.learning_rate, aware_epochs=0)
    key = json.loads(json.dumps({"settings": asdict(settings), "sizes": dict(rival.sizes), "data": samples.digest}))
    if path.is_file() and {part: facts(path).get(part) for part in key} == key:
        return f"{name}: there already"
    torch.manual_seed(settings.seed)
    module = untrained(rival, samples.image, samples.classes)
    began = time.monotonic()
    accuracy = train(module, samples, settings, device, lambda text: print(f"{name}: {text}", file=sys.stderr, flush=True))
    named = torch.cuda.get_device_name() if device == "cuda" else device
    found = key | {"validation_accuracy": accuracy, "seconds": time.monotonic() - began, "device": named, "torch": torch.__version__}
    out.mkdir(parents=True, exist_ok=True)
    tensors = {part: value.detach().cpu().contiguous() for part, value in module.state_dict().items()}
    save_file(tensors, out / f".{name}.part", {"training": json.dumps(found)})
    (out / f".{name}.part").replace(path)
    return f"{name}: {accuracy:.2f} % on validation after {found['seconds']:.0f} s ({rival.text})"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a prepared data folder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=RIVALS, default=list(RIVALS), metavar="NAME", help=", ".join(RIVALS))
    parser.add_argument("--epochs", type=int, default=Settings.epochs)
    parser.add_argument("--aware-epochs", type=int, default=-1, help="of these, the last, quantization-aware; default: a tenth")
    parser.add_argument("--batch", type=int, default=Settings.batch)
    parser.add_argument("--rate", type=float, default=Settings.learning_rate, help="peak learning rate of transformers")
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    given = parser.parse_args(arguments)
    aware = round(0.1 * given.epochs) if given.aware_epochs < 0 else given.aware_epochs
    settings = Settings(
        epochs=given.epochs, aware_epochs=aware, seed=given.seed, batch=given.batch, learning_rate=given.rate, half=given.device == "cuda"
    )
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
