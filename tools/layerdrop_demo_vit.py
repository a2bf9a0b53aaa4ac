"""Second phase of the demo checkpoint: a few epochs in which whole layers are left out at random (LayerDrop, arXiv:1909.11556).

Layers that a network has learned to do without are what a smaller network can drop. Starts from the checkpoint of
`train_demo_vit.py`, trains on the same images (calibration, validation and test stay unseen), replaces the checkpoint in --out and
adds its own log to `training_log.json` there. The command that made the shipped checkpoint:

    python tools/layerdrop_demo_vit.py --data FOLDER --out nascompile/demo --epochs 3
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import train_demo_vit as first
import transformers
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Settings:
    epochs: int
    seed: int
    batch: int = 256
    learning_rate: float = 4e-4
    weight_decay: float = 0.05
    label_smoothing: float = 0.05
    erase_probability: float = 0.1
    layer_drop: float = 0.3
    """Probability that a layer after the first is left out of a step."""


def drop_layers(model: nn.Module, rate: float, generator: np.random.Generator) -> None:
    """Make every layer but the first skip itself, for a whole batch, with probability `rate` while training."""
    for layer in model.vit.layers[1:]:
        def forward(x: torch.Tensor, *rest, run=layer.forward, layer=layer, **named) -> torch.Tensor:
            return x if layer.training and generator.random() < rate else run(x, *rest, **named)

        layer.forward = forward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the four official files")
    parser.add_argument("--out", type=Path, required=True, help="folder that `train_demo_vit.py` wrote")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    settings, start = Settings(arguments.epochs, arguments.seed), time.perf_counter()
    log = json.loads((arguments.out / "training_log.json").read_text())
    config = json.loads((arguments.out / "model" / "preprocessor_config.json").read_text())
    mean, std = config["image_mean"][0], config["image_std"][0]

    parts = {part: first.read_part(arguments.data, part) for part in first.FILES}
    splits, trained_on = first.split(parts, log["settings"]["seed"])
    arrays = {name: tuple(a[indices] for a in parts[first.part_of(name)]) for name, indices in splits.items()}
    arrays |= {"trained_on": tuple(a[trained_on] for a in parts["train"]), "official_test": parts["t10k"]}
    data = {n: (torch.tensor(x)[:, None], torch.tensor(y).long()) for n, (x, y) in arrays.items()}

    def accuracies(model: nn.Module, names: tuple[str, ...]) -> dict[str, float]:
        return {n: first.accuracy(model, (data[n][0].float() / 255 - mean) / std, data[n][1]) for n in names}

    torch.manual_seed(settings.seed)
    model = first.ViTForImageClassification.from_pretrained(arguments.out / "model", dtype=torch.float32)
    drop_layers(model, settings.layer_drop, np.random.default_rng(settings.seed))
    optimizer = torch.optim.AdamW(model.parameters(), settings.learning_rate, weight_decay=settings.weight_decay, fused=True)
    images, labels = data["trained_on"]
    batches = len(images) // settings.batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, total_steps=batches * settings.epochs, pct_start=0.1)
    rows = []
    for epoch in range(1, settings.epochs + 1):
        model.train()
        total, began = 0.0, time.perf_counter()
        for indices in torch.randperm(len(images))[: batches * settings.batch].split(settings.batch):
            x = first.augment(images[indices].float() / 255, settings.erase_probability)
            loss = F.cross_entropy(model((x - mean) / std).logits, labels[indices], label_smoothing=settings.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item()
        found = accuracies(model, ("selection",))["selection"]
        rows.append({"epoch": epoch, "loss": round(total / batches, 5), "selection_accuracy_percent": found,
                     "seconds": round(time.perf_counter() - began, 1)})
        print(rows[-1], file=sys.stderr, flush=True)

    for layer in model.vit.layers[1:]:
        del layer.forward
    first.save_model(model, arguments.out / "model", mean, std)
    shipped = first.ViTForImageClassification.from_pretrained(arguments.out / "model", dtype=torch.float32)
    final = accuracies(shipped, ("selection", "validation", "test", "official_test"))
    log["layerdrop_phase"] = {
        "settings": asdict(settings), "accuracy_percent": final, "device": "cpu", "torch": torch.__version__,
        "transformers": transformers.__version__, "seconds": round(time.perf_counter() - start, 1), "epochs": rows}
    (arguments.out / "training_log.json").write_text(json.dumps(log, indent=1) + "\n")
    print(json.dumps(final))


if __name__ == "__main__":
    main()
