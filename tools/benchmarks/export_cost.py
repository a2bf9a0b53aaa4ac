#!/usr/bin/env python3
"""Seconds and memory that export and lowering take for a network of BERT-base size, each step in a process of its own. Prints JSON.

Memory is the process's peak beyond what it held before the step (libraries imported; for lowering, the weights loaded), weights included
where the step itself makes them, as a share of the weights' bytes. Nothing is downloaded: the weights are random.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SECONDS, SHARE = 20.0, 3.0
"""What export and lowering together may take, and the most memory, in sizes of the model, at any time."""
STEPS = ("export", "fp32", "int8")


def main() -> int:
    """Exit status 1 if a bar is not met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.step:
        print(json.dumps(step(given.step, given.layers, given.hidden, given.folder)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        sizes = ["--layers", str(given.layers), "--hidden", str(given.hidden), "--folder", folder]
        rows = [
            json.loads(subprocess.run([sys.executable, __file__, "--step", name, *sizes], check=True, stdout=subprocess.PIPE).stdout)
            for name in STEPS
        ]
    met = {
        "seconds": all(rows[0]["seconds"] + row["seconds"] < SECONDS for row in rows[1:]),
        "memory": all(row["peak_share"] < SHARE for row in rows),
    }
    bars = {"seconds": SECONDS, "share": SHARE}
    print(json.dumps({"layers": given.layers, "hidden": given.hidden, "steps": rows, "bars": bars, "met": met}))
    return 0 if all(met.values()) else 1


def step(name: str, layers: int, hidden: int, folder: Path) -> dict[str, object]:
    """One step, done and measured in this process."""
    import numpy as np
    import torch
    from transformers import BertConfig

    from nascompile import lowering, network, plugins, space as spaces
    from nascompile.quantization import ActivationRanges
    from nascompile.records import Target

    torch.set_num_threads(1)
    sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_attention_heads": hidden // 64}
    config = BertConfig(num_hidden_layers=layers, num_labels=2, **sizes)
    family, backend = plugins.get("families", "bert"), plugins.get("backends", "onnxruntime")
    shapes = family.parameters(config)
    model_bytes = 4 * sum(math.prod(shape) for shape in shapes.values())
    target = Target(device="cpu", backend=backend.name, workload=family.workload(config, 1, 128), session=backend.session())
    if name == "export":
        before, began = resident(), time.perf_counter()
        lowering.export(family, config, folder)
    else:
        path = lowering.export(family, config, folder)
        space = network.search_space(family, config, backend, target, "model")
        point = spaces.largest(space) if name == "fp32" else spaces.uniform(space)
        sites = sorted(p for s in family.segments(config) if s.scheme == "int8" for p in s.quantizable)
        ranges = ActivationRanges(method="minmax", sites=tuple((site, -4.0, 4.0) for site in sites))
        rng = np.random.default_rng(0)
        weights = {key: rng.standard_normal(shape, dtype=np.float32) for key, shape in shapes.items()}
        before, began = resident() - model_bytes, time.perf_counter()  # the weights count
        blueprint = lowering.blueprint(family, config, path, backend)
        form = lowering.lower(blueprint, family, config, space, point, target, weights, ranges, backend)
        backend.build(form, target, folder)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    share = round(peak / model_bytes, 2)
    return {"step": name, "seconds": round(seconds, 2), "model_bytes": model_bytes, "peak_bytes": peak, "peak_share": share}


def resident() -> int:
    """Bytes that the process holds now."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("needs Linux: /proc/self/status")


if __name__ == "__main__":
    sys.exit(main())
