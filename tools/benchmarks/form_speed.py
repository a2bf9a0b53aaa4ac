"""What the forms of one network cost: graph passes against leaving them out, precisions, session settings. Random weights: speed only.

    python tools/benchmarks/form_speed.py --json

A ratio is the time without something over the time with it, above 1 where it pays: the median over interleaved blocks and its 95 %
bootstrap interval. Limits of width inside the passes are lifted, so that a pass is seen where it loses as well. One thread.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from speed import turns
from transformers import BertConfig, ViTConfig

from nascompile import lowering, network, plugins, space as spaces, targets
from nascompile.passes import fuse_float_attention, fuse_integer_attention
from nascompile.quantization import ActivationRanges

NETWORKS: dict[str, tuple[str, int, int, int, int]] = {
    "vit 160": ("vit", 160, 640, 6, 50), "vit 192": ("vit", 192, 768, 4, 50), "vit 256": ("vit", 256, 768, 3, 50),
    "bert 384": ("bert", 384, 1536, 6, 40), "bert 768": ("bert", 768, 3072, 2, 128),
}  # fmt: skip
"""Family, width, MLP width, layers, tokens; heads of 32, of 64 at width 768. `vit 192` is the demo's shape, `bert 384` MiniLM's."""
Form = tuple[str, str, str, str]
"""Backend, precision, pass that is left out, session setting (`name=value`)."""
PAIRS: dict[str, tuple[Form, Form]] = {
    "fuse_float_attention": (("onnxruntime", "fp32", "fuse_float_attention", ""), ("onnxruntime", "fp32", "", "")),
    "fuse_integer_attention": (("onnxruntime", "int8", "fuse_integer_attention", ""), ("onnxruntime", "int8", "", "")),
    "drop_unread_tokens, fp32": (("onnxruntime", "fp32", "drop_unread_tokens", ""), ("onnxruntime", "fp32", "", "")),
    "drop_unread_tokens, int8": (("onnxruntime", "int8", "drop_unread_tokens", ""), ("onnxruntime", "int8", "", "")),
    "disabled_optimizers, fp32": (("onnxruntime", "fp32", "", "disabled_optimizers="), ("onnxruntime", "fp32", "", "")),
    "disabled_optimizers, int8": (("onnxruntime", "int8", "", "disabled_optimizers="), ("onnxruntime", "int8", "", "")),
    "int8": (("onnxruntime", "fp32", "", ""), ("onnxruntime", "int8", "", "")),
    "int8-dynamic": (("onnxruntime", "fp32", "", ""), ("onnxruntime", "int8-dynamic", "", "")),
    "weight-int8-block128": (("onnxruntime", "fp32", "", ""), ("onnxruntime", "weight-int8-block128", "", "")),
    "weight-int4-block32": (("onnxruntime", "fp32", "", ""), ("onnxruntime", "weight-int4-block32", "", "")),
    "openvino expand_attention, int8": (("openvino", "int8", "expand_attention", ""), ("openvino", "int8", "", "")),
    "openvino static_shape, fp32": (("openvino", "fp32", "", "static_shape=none"), ("openvino", "fp32", "", "")),
    "openvino static_shape, int8": (("openvino", "int8", "", "static_shape=none"), ("openvino", "int8", "", "")),
}  # fmt: skip
"""What pays ▸ (without it, with it)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--networks", nargs="+", choices=tuple(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing per network and batch size")
    given = parser.parse_args()
    rows = []
    for name in given.networks:
        for batch in given.batches:
            row = measure(name, batch, given.seconds)
            rows.append(row)
            if not given.json:
                print(f"{name}, batch {batch}: " + ", ".join(f"{k} × {r['value']:.3f}" for k, r in row["ratios"].items()), flush=True)
    versions = dict(v for b in ("onnxruntime", "openvino") for v in plugins.get("backends", b).versions())
    device = plugins.get("devices", targets.LOCAL).describe()
    if given.json:
        print(json.dumps({"rows": rows, "versions": versions, "device": device}, indent=1))


def measure(name: str, batch: int, seconds: float) -> dict[str, Any]:
    """Milliseconds of every form that can run here (tenth percentile of a block, median over blocks), and the ratios of the pairs."""
    forms = list(dict.fromkeys(form for pair in PAIRS.values() for form in pair))
    with tempfile.TemporaryDirectory() as folder:
        made = {form: runner for form in forms if (runner := _runner(name, batch, form, Path(folder)))}
        inputs = _inputs(name, batch)
        calls = [partial(runner.run, inputs) for runner in made.values()]
        times = turns.blocks(calls, [turns.plan(call) for call in calls], at_least=7, seconds=seconds, seed=0)
    taken = dict(zip(made, times, strict=True))
    counts = np.ones((1, 1), bool)
    ratios = {
        label: turns.advantage(taken[after][None], taken[before][None], counts, seed=0)
        for label, (before, after) in PAIRS.items() if before in taken and after in taken
    }  # fmt: skip
    ms = {" ".join(filter(None, (b, p, without and f"without {without}", setting))): 1e3 * float(np.median(taken[b, p, without, setting]))
          for b, p, without, setting in taken}  # fmt: skip
    return {"network": name, "batch": batch, "blocks": times.shape[1], "ms": ms, "ratios": ratios}


def _config(name: str) -> tuple[Any, Any, int]:
    family, width, inner, layers, tokens = NETWORKS[name]
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers, "num_labels": 10}
    sizes["num_attention_heads"] = width // (64 if width == 768 else 32)
    image = {"image_size": 28, "patch_size": 4, "num_channels": 1}
    return plugins.get("families", family), ViTConfig(**sizes, **image) if family == "vit" else BertConfig(**sizes), tokens


def _inputs(name: str, batch: int) -> dict[str, Any]:
    family, config, tokens = _config(name)
    shape = {"batch": batch, "sequence": tokens}
    return {
        spec.name: np.ones([shape[d] if isinstance(d, str) else d for d in spec.shape], spec.dtype) * (spec.name != "token_type_ids")
        for spec in family.inputs(config)
    }  # fmt: skip


def _runner(name: str, batch: int, form: Form, folder: Path) -> Any:
    """The loaded engine of a form; None, and a line that says why, where it cannot run here."""
    backend_name, precision, without, setting = form
    (family, config, tokens), backend = _config(name), plugins.get("backends", backend_name)
    session = dict([setting.split("=")]) if setting else None
    if reason := backend.unavailable():
        print(f"left out: {reason}", flush=True)
        return None
    target = targets.make(targets.LOCAL, backend_name, family.workload(config, batch, tokens), 1, session)
    wanted = () if precision == "fp32" else (precision,)
    space = network.search_space(family, config, backend, target, "random", precisions=wanted)
    if wanted and not space.precisions[1:]:
        print(f"left out: {backend_name} has no {precision} here", flush=True)
        return None
    point = spaces.uniform(space) if wanted else spaces.largest(space)
    rng = np.random.default_rng(0)
    weights = {k: rng.standard_normal(s, dtype=np.float32) * 0.02 for k, s in family.parameters(config).items()}
    ranges = ActivationRanges("minmax", tuple((k, -4.0, 4.0) for k in sorted(weights) if k.endswith("weight")))
    with _passes(without):
        blueprint = lowering.blueprint(family, config, lowering.export(family, config, folder), backend)
        graph = lowering.lower(blueprint, family, config, space, point, target, weights, ranges, backend)
    place = folder / f"{abs(hash(form))}"
    place.mkdir()
    return backend.load(place, backend.build(graph, target, place), target)


@contextmanager
def _passes(without: str) -> Iterator[None]:
    """Lowering without one pass, and with no limit of width in those that have one."""
    lists = {name: getattr(lowering, name) for name in ("STRUCTURE_PASSES", "PASSES")}
    limits = {module: module.WIDEST for module in (fuse_float_attention, fuse_integer_attention)}
    try:
        for name, passes in lists.items():
            setattr(lowering, name, tuple(p for p in passes if p != without))
        for module in limits:
            module.WIDEST = 1 << 30
        yield
    finally:
        for name, passes in lists.items():
            setattr(lowering, name, passes)
        for module, widest in limits.items():
            module.WIDEST = widest


if __name__ == "__main__":
    main()
