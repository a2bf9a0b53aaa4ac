#!/usr/bin/env python3
"""What SmoothQuant (arXiv:2211.10438) would do for a finished run's baseline in uniform INT8: error of the outputs by calibration method.

Channels of large inputs are made smaller in what produces them and their weights larger: LayerNorm before query, key, value and before the
first MLP product where nothing else reads its output (pre-norm), and value before the attention's output product. The float network's
function stays. Prints one JSON object per run and strength: signal to quantization noise of the logits in dB, and accuracy, emulated.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nascompile import data, finetune, plugins, space as spaces, supernet
from nascompile.records import SearchSpace, load

METHODS = ("minmax", "percentile", "mse", "entropy")
CALIBRATION = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders whose fine-tuning is finished")
    parser.add_argument("--strengths", nargs="+", type=float, default=[0.0, 0.3, 0.5, 0.7], help="SmoothQuant's alpha; 0: not at all")
    parser.add_argument("--samples", type=int, default=512, help="of validation")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for run in given.runs:
        for row in measure(run, given.strengths, given.samples):
            print(json.dumps(row), flush=True)


def measure(run: Path, strengths: list[float], samples: int) -> Any:
    """A row per strength."""
    stored = load(run / "supernet" / "manifest.json", SearchSpace)
    family, target = plugins.get("families", stored.family), stored.targets[0]
    net = supernet.Supernet(family, family.load(str(finetune.baseline_folder(run))))
    splits = [(data.opened_split(run / "data", name), count) for name, count in (("calibration", CALIBRATION), ("validation", samples))]
    calibration, validation = (
        supernet.load_batches(split, supernet.by_length(split, np.arange(min(count, len(split)))), 64) for split, count in splits
    )
    point = spaces.largest(stored, "int8")  # tables stay float: the method does not touch them
    float_logits, labels = supernet.emulate(net, stored, spaces.largest(stored), target, validation, None)
    for strength in strengths:
        changed = smoothed(net, calibration, strength) if strength else net
        moved = supernet.emulate(changed, stored, spaces.largest(stored), target, validation, None)[0]
        row: dict[str, Any] = {"run": str(run), "strength": strength, "float_change": float(np.abs(moved - float_logits).max())}
        for method in METHODS:
            ranges = supernet.calibrate(changed, stored, point, target, calibration, method)
            logits = supernet.emulate(changed, stored, point, target, validation, ranges)[0]
            noise = float(np.square(logits - float_logits).sum())
            row[method] = {
                "sqnr_db": round(10 * float(np.log10(np.square(float_logits).sum() / noise)), 2),
                "accuracy": round(100 * float((logits.argmax(1) == labels).mean()), 2),
            }
        yield row


@torch.no_grad()
def smoothed(net: supernet.Supernet, batches: list[supernet.Batch], strength: float) -> supernet.Supernet:
    """A copy of the network with scales moved from inputs into weights."""
    new = copy.deepcopy(net)
    parameters, family = dict(new.model.named_parameters()), new.family
    layout, largest = family.layout(new.config), new.largest()
    reach: dict[str, torch.Tensor] = {}

    def watching(name: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if x.is_floating_point():
            top = x.abs().flatten(0, -2).amax(0)
            reach[name] = torch.maximum(reach.get(name, top), top)
        return supernet.plain(name, x, weight, bias)

    for inputs, _ in batches:
        net(inputs, largest, watching)
    for i in largest.layers:
        moves = [("value", ("out",))]
        if layout.pre_norm:
            moves += [("attention_norm", ("query", "key", "value")), ("mlp_norm", ("fc1",))]
        for source, readers in moves:
            weights = [parameters[f"{layout.at(i, reader)}.weight"] for reader in readers]
            large = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0).clamp(min=1e-5)
            scale = (reach[f"{layout.at(i, readers[0])}.weight"].clamp(min=1e-5) ** strength / large ** (1 - strength)).clamp(min=1e-5)
            for part in ("weight", "bias"):
                value = parameters[f"{layout.at(i, source)}.{part}"]
                value.div_(scale[:, None] if value.dim() == 2 else scale)
            for weight in weights:
                weight.mul_(scale)
    return new


if __name__ == "__main__":
    main()
