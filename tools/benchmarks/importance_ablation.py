"""What sorting heads, neurons and layers by importance is worth: the demo's super-network trained with and without it.

    python tools/benchmarks/importance_ablation.py --json

Both start from the demo checkpoint, see the same batches in the same order, and are asked for the same kinds of sub-networks:
validation accuracy of FP32 sub-networks at each depth and at three relative widths.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from nascompile import finetune, pipeline, space as spaces
from nascompile.progress import Lines
from nascompile.settings import demo_recipe
from nascompile.supernet import Supernet, load_batches

SHARES = (1.0, 0.75, 0.5)


def subnetworks(space: Any) -> dict[str, Any]:
    """Label ▸ candidate: each depth with heads and widths at the same relative size, FP32."""
    found = {}
    for depth in next(g for g in space.genes if g.name == "depth").choices:
        for share in SHARES:
            genome: dict[str, Any] = {}
            for slot in spaces.gene_names(space):
                gene = spaces.slot_gene(space, slot)
                if gene.name == "depth":
                    genome[slot] = depth
                elif gene.kind == "precision":
                    genome[slot] = gene.choices[0]
                else:
                    fits = [c for c in gene.choices if c <= share * gene.choices[-1] + 1e-9]
                    genome[slot] = fits[-1] if fits else gene.choices[0]
            found[f"depth {depth}, size {share:g}"] = spaces.candidate(space, genome)
    return found


@torch.no_grad()
def accuracy(net: Supernet, space: Any, point: Any, batches: Any) -> float:
    """Validation accuracy in percent of an FP32 sub-network."""
    subnet = net.subnet(space, point)
    right = sum(int((net(inputs, subnet).argmax(1) == labels).sum()) for inputs, labels in batches)
    return 100 * right / sum(len(labels) for _, labels in batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--cache", type=Path, default=Path(".cache/importance_ablation"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    arguments = parser.parse_args()
    rows: dict[str, dict[str, list[float]]] = {}
    for seed in arguments.seeds:
        for ordered in (True, False):
            recipe = demo_recipe()
            settings = msgspec.structs.replace(recipe.finetune, importance=ordered)
            run = arguments.cache / f"{'ordered' if ordered else 'unordered'}-{seed}"
            recipe = msgspec.structs.replace(recipe, finetune=settings, seed=seed)
            pipeline.run(recipe, run, until="finetune", progress=Lines(5.0))
            context = pipeline.Context(recipe, run, Lines(5.0), pipeline.Given())
            net = Supernet(context.family, context.family.load(str(run / "supernet"))).eval()
            validation = context.split("validation", "ablation")
            batches = load_batches(validation, np.arange(len(validation)), finetune.EVALUATION_BATCH)
            for label, point in subnetworks(context.space).items():
                rows.setdefault(label, {}).setdefault(str(ordered), []).append(accuracy(net, context.space, point, batches))
    body = [{"subnetwork": label, "ordered": found["True"], "unordered": found["False"]} for label, found in rows.items()]
    if arguments.json:
        print(json.dumps(body, indent=1))
        return
    for row in body:
        print(f"{row['subnetwork']:22} ordered {np.mean(row['ordered']):.2f} %   unordered {np.mean(row['unordered']):.2f} %")


if __name__ == "__main__":
    main()
