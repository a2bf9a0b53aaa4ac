"""Train the demo vision transformer and pack its four data splits.

The data is Fashion-MNIST as the Debian package `dataset-fashion-mnist` ships it (MIT licence, Copyright 2017 Zalando SE):
four `*-ubyte.gz` files. calibration and validation are held out of the official training images and never trained on; the
epoch that ships is chosen on a third holdout, `selection`, which is not shipped; test comes from the official test images.
nascompile/demo is the output, LICENSE-DATA there excepted, which is written by hand. The command that made it:

    python tools/train_demo_vit.py --data FOLDER --out FOLDER --device cuda --compile
"""

import argparse
import copy
import gzip
import hashlib
import io
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import ViTConfig, ViTForImageClassification

CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
FILES = {part: (f"{part}-images-idx3-ubyte.gz", f"{part}-labels-idx1-ubyte.gz") for part in ("train", "t10k")}
SHIPPED = ("train", "calibration", "validation", "test")


@dataclass(frozen=True)
class Settings:
    epochs: int
    mix_probability: float
    seed: int
    batch: int = 512
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup_epochs: int = 10
    label_smoothing: float = 0.1
    drop_path: float = 0.2
    erase_probability: float = 0.25
    ema_decay: float = 0.999


def read_part(data: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 28, 28) and labels (n,), both uint8, of one official part."""
    images, labels = (gzip.decompress((data / name).read_bytes()) for name in FILES[part])
    return np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28), np.frombuffer(labels, np.uint8, offset=8)


def part_of(split_name: str) -> str:
    """The official part that a split is drawn from."""
    return "t10k" if split_name == "test" else "train"


def first_occurrences(images: np.ndarray, seen: set[bytes]) -> np.ndarray:
    """Indices of the images whose pixels (sha256) are not in `seen`, which grows by them."""
    kept = []
    for index, image in enumerate(images):
        digest = hashlib.sha256(image.tobytes()).digest()
        if digest not in seen:
            seen.add(digest)
            kept.append(index)
    return np.array(kept)


def draw(pool: np.ndarray, labels: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` shuffled indices of `pool`, as many of each class as of any other, give or take one."""
    quotas = np.full(len(CLASSES), count // len(CLASSES))
    quotas[rng.permutation(len(CLASSES))[: count % len(CLASSES)]] += 1
    chosen = [rng.choice(pool[labels[pool] == c], quota, replace=False) for c, quota in enumerate(quotas)]
    return rng.permutation(np.concatenate(chosen))


def split(parts: dict[str, tuple[np.ndarray, np.ndarray]], seed: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Indices of each split into its official file, and the indices trained on (`train` is a part of these)."""
    rng, seen = np.random.default_rng(seed), set()
    test_pool = first_occurrences(parts["t10k"][0], seen)
    pool = first_occurrences(parts["train"][0], seen)
    splits = {"test": draw(test_pool, parts["t10k"][1], 2500, rng)}
    for name, count in (("calibration", 256), ("validation", 2000), ("selection", 2000)):
        splits[name] = draw(pool, parts["train"][1], count, rng)
        pool = np.setdiff1d(pool, splits[name])
    splits["train"] = draw(pool, parts["train"][1], 5000, rng)
    return splits, pool


def drop_path_hook(rate: float):
    """A forward hook that skips a whole residual block for a random share `rate` of the batch (arXiv:1603.09382)."""

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not module.training:
            return output
        keep = torch.rand(len(output), 1, 1, device=output.device) >= rate
        return inputs[0] + (output - inputs[0]) * keep / (1 - rate)

    return hook


def build_model() -> ViTForImageClassification:
    """A ViT of 1.8 million parameters on 49 patches of 4x4 pixels, randomly initialised."""
    return ViTForImageClassification(ViTConfig(
        hidden_size=192, num_hidden_layers=4, num_attention_heads=6, intermediate_size=768, image_size=28, patch_size=4, num_channels=1,
        id2label=dict(enumerate(CLASSES)), label2id={name: index for index, name in enumerate(CLASSES)}))


def random_box(height: int, width: int, share: Tensor, ratio: Tensor) -> Tensor:
    """Masks (n, 1, height, width), true inside a random box of that share of the area and that aspect ratio."""
    n, device = len(share), share.device
    sides = ((share * ratio).sqrt() * height, (share / ratio).sqrt() * width)
    centre_y, centre_x = torch.rand(2, n, device=device)
    y = (torch.arange(height, device=device) + 0.5 - (centre_y * height)[:, None]).abs() <= sides[0][:, None] / 2
    x = (torch.arange(width, device=device) + 0.5 - (centre_x * width)[:, None]).abs() <= sides[1][:, None] / 2
    return (y[:, :, None] & x[:, None, :])[:, None]


def augment(images: Tensor, erase_probability: float, pad: int = 2) -> Tensor:
    """The batch (n, 1, 28, 28), values in [0, 1], flipped, cropped after padding, and erased by noise, all per image."""
    (n, _, height, width), device = images.shape, images.device
    rows = torch.randint(2 * pad + 1, (n, 1), device=device) + torch.arange(height, device=device)
    columns = torch.randint(2 * pad + 1, (n, 1), device=device) + torch.arange(width, device=device)
    columns = torch.where(torch.rand(n, 1, device=device) < 0.5, columns.flip(1), columns)
    padded = F.pad(images[:, 0], (pad,) * 4)
    images = padded[torch.arange(n, device=device)[:, None, None], rows[:, :, None], columns[:, None, :]][:, None]
    ratio = torch.exp((torch.rand(n, device=device) * 2 - 1) * math.log(3))
    erased = random_box(height, width, 0.02 + 0.28 * torch.rand(n, device=device), ratio)
    erased &= (torch.rand(n, device=device) < erase_probability)[:, None, None, None]
    return torch.where(erased, torch.rand_like(images), images)


def mix(images: Tensor, targets: Tensor, probability: float) -> tuple[Tensor, Tensor]:
    """Images and one-hot targets where a share `probability` is blended with its neighbour: half mixup, half CutMix."""
    n, device = len(images), images.device
    draws = torch.rand(n, device=device)
    own = torch.rand(n, device=device)
    box = random_box(*images.shape[2:], 1 - own, torch.ones(n, device=device))
    blend = torch.where((draws < probability / 2)[:, None, None, None], box.float(), (1 - own)[:, None, None, None])
    blend = torch.where((draws < probability)[:, None, None, None], blend, 0.0)
    share = blend.expand_as(images).mean((1, 2, 3))[:, None]
    return torch.lerp(images, images.roll(1, 0), blend), torch.lerp(targets, targets.roll(1, 0), share)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of normalised images (n, 1, 28, 28) classified as labelled, in per cent, computed in float32."""
    model.eval()
    hits = sum((model(x).logits.argmax(1) == y).sum().item() for x, y in zip(images.split(1000), labels.split(1000), strict=True))
    return round(100 * hits / len(labels), 3)


def train(model: nn.Module, data: dict[str, tuple[Tensor, Tensor]], normalise, settings: Settings, compiled: bool):
    """The averaged weights of the epoch best on `selection`, and a log row per epoch."""
    images, labels = data["trained_on"]
    device, batches = images.device, len(images) // settings.batch
    for layer, rate in zip(model.vit.layers, np.linspace(0, settings.drop_path, len(model.vit.layers)), strict=True):
        layer.register_forward_hook(drop_path_hook(float(rate)))
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(settings.ema_decay))
    warmup = min(settings.warmup_epochs, max(settings.epochs // 10, 1)) * batches
    optimizer = torch.optim.AdamW(model.parameters(), settings.learning_rate, weight_decay=settings.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / (settings.epochs * batches))))

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        x = augment(x.float() / 255, settings.erase_probability)
        x, y = mix(x, F.one_hot(y, len(CLASSES)).float(), settings.mix_probability)
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(normalise(x)).logits
        return F.cross_entropy(logits.float(), y, label_smoothing=settings.label_smoothing)

    step = torch.compile(loss_of, mode="reduce-overhead") if compiled else loss_of
    log, best, best_accuracy = [], None, -1.0
    for epoch in range(1, settings.epochs + 1):
        model.train()
        total, start = torch.zeros((), device=device), time.perf_counter()
        for indices in torch.randperm(len(images), device=device)[: batches * settings.batch].split(settings.batch):
            loss = step(images[indices], labels[indices])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            averaged.update_parameters(model)
            total += loss.detach()
        found = accuracy(averaged.module, normalise(data["selection"][0].float() / 255), data["selection"][1])
        loss, seconds = round(total.item() / batches, 5), round(time.perf_counter() - start, 2)
        log.append({"epoch": epoch, "loss": loss, "selection_accuracy_percent": found, "seconds": seconds})
        print(log[-1], file=sys.stderr, flush=True)
        if found >= best_accuracy:
            best, best_accuracy = copy.deepcopy(averaged.module.state_dict()), found
    return best, log


def write_parquet(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """One row an image: image = {bytes: PNG, path: null}, label = class name."""
    rows = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG", optimize=True)
        rows.append({"bytes": buffer.getvalue(), "path": None})
    image_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(rows, image_type), "label": pa.array([CLASSES[label] for label in labels], pa.string())})
    features = {"image": {"_type": "Image"}, "label": {"dtype": "string", "_type": "Value"}}
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})}), path)


def save_model(model: nn.Module, folder: Path, mean: float, std: float) -> None:
    """The weights in float16 and the two configurations that `from_pretrained` reads."""
    model.half().save_pretrained(folder)
    processor = {"image_processor_type": "ViTImageProcessor", "do_convert_rgb": False, "do_resize": True, "resample": 2,
                 "size": {"height": 28, "width": 28}, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
                 "image_mean": [mean], "image_std": [std]}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the four official files")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=500)
    parser.add_argument("--mix-probability", type=float, default=0.6, help="share of the images under mixup or CutMix")
    parser.add_argument("--seed", type=int, default=0, help="of the splits and of the training")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="train through torch.compile and CUDA graphs")
    arguments = parser.parse_args()
    settings = Settings(arguments.epochs, arguments.mix_probability, arguments.seed)
    device, start = torch.device(arguments.device), time.perf_counter()

    parts = {part: read_part(arguments.data, part) for part in FILES}
    splits, trained_on = split(parts, settings.seed)
    arrays = {name: tuple(a[indices] for a in parts[part_of(name)]) for name, indices in splits.items()}
    arrays |= {"trained_on": tuple(a[trained_on] for a in parts["train"]), "official_test": parts["t10k"]}
    data = {n: (torch.tensor(x, device=device)[:, None], torch.tensor(y, device=device).long()) for n, (x, y) in arrays.items()}
    pixels = arrays["trained_on"][0] / np.float32(255)
    mean, std = round(float(pixels.mean()), 4), round(float(pixels.std()), 4)

    def normalise(x: Tensor) -> Tensor:
        return (x - mean) / std

    torch.manual_seed(settings.seed)
    model = build_model().to(device)
    best, epochs = train(model, data, normalise, settings, arguments.compile)
    model.load_state_dict(best)
    save_model(model, arguments.out / "model", mean, std)
    shipped = ViTForImageClassification.from_pretrained(arguments.out / "model", dtype=torch.float32).to(device)
    final = {name: accuracy(shipped, normalise(data[name][0].float() / 255), data[name][1])
             for name in ("selection", "validation", "test", "official_test")}
    for name in SHIPPED:
        write_parquet(arguments.out / f"{name}.parquet", *arrays[name])
    sources = {name: hashlib.sha256((arguments.data / name).read_bytes()).hexdigest() for pair in FILES.values() for name in pair}
    indices = {name: {"file": FILES[part_of(name)][0], "indices": chosen.tolist()} for name, chosen in splits.items()}
    record = {"seed": settings.seed, "sources_sha256": sources, "splits": indices}
    (arguments.out / "indices.json").write_text(json.dumps(record) + "\n")
    log = {"settings": asdict(settings), "compile": arguments.compile, "trained_on": len(trained_on),
           "parameters": sum(p.numel() for p in model.parameters()), "accuracy_percent": final,
           "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu", "torch": torch.__version__,
           "transformers": transformers.__version__, "seconds": round(time.perf_counter() - start, 1), "epochs": epochs}
    (arguments.out / "training_log.json").write_text(json.dumps(log, indent=1) + "\n")
    print(json.dumps(final))


if __name__ == "__main__":
    main()
