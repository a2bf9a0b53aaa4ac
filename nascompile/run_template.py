#!/usr/bin/env python3
"""Runs the engine in this folder: checks the reference sample, times it, predicts for texts or image files given.

Needs NumPy and the runtime that the engine was built for, onnxruntime or openvino; with texts also tokenizers, with images also
Pillow. This file is copied into every engine folder.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
LEVELS = {"disabled": "ORT_DISABLE_ALL", "basic": "ORT_ENABLE_BASIC", "extended": "ORT_ENABLE_EXTENDED", "all": "ORT_ENABLE_ALL"}


def main() -> int:
    """Exit status: 0, or 1 if the sample's outputs are not what they should be."""
    parser = argparse.ArgumentParser(description="Run the engine in this folder.")
    parser.add_argument("items", nargs="*", help="texts, image files, or comma-separated vectors to predict")
    parser.add_argument("--threads", type=int, default=0, help="threads; 0: those the engine was built for")
    parser.add_argument("--seconds", type=float, default=2.0, help="how long to time single calls")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    manifest = data("manifest.json")
    engine = session(manifest, arguments.threads)
    inputs, expected = sample()
    difference = max(float(np.abs(engine.run([name], inputs)[0] - want).max()) for name, want in expected.items())
    result: dict[str, Any] = {
        "engine": manifest["name"],
        "sample": {"largest_difference": difference, "accepted": manifest["tolerance"], "ok": difference <= manifest["tolerance"]},
        "latency_ms": latency(engine, inputs, arguments.seconds),
        "predictions": predictions(engine, manifest, arguments.items) if arguments.items else [],
    }
    print(json.dumps(result) if arguments.json else text(result))
    return 0 if result["sample"]["ok"] else 1


def data(name: str) -> dict[str, Any]:
    """Content of one of the folder's record files."""
    body: dict[str, Any] = json.loads((HERE / name).read_text(encoding="utf-8"))["data"]
    return body


def session(manifest: dict[str, Any], threads: int) -> Any:
    """What runs the engine, with the settings it was measured with: `run(names or None, inputs)` gives a list of outputs."""
    target = {"session": [], "threads": 1} | manifest["target"]
    target |= {"session": dict(target["session"]), "threads": threads or target["threads"]}
    graph = HERE / manifest["graphs"][0]
    return OpenVino(graph, target) if target["backend"] == "openvino" else onnxruntime_session(graph, target)


def onnxruntime_session(graph: Path, target: dict[str, Any]) -> Any:
    """An ONNX Runtime session."""
    import onnxruntime as ort

    settings, options = target["session"], ort.SessionOptions()
    options.intra_op_num_threads = target["threads"]
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, LEVELS[settings.get("graph_optimization_level", "all")])
    options.add_session_config_entry("session.intra_op.allow_spinning", settings.get("allow_spinning", "1"))
    options.enable_cpu_mem_arena = settings.get("enable_cpu_mem_arena", "1") == "1"
    options.enable_mem_pattern = settings.get("enable_mem_pattern", "1") == "1"
    disabled = [name for name in settings.get("disabled_optimizers", "").split(",") if name]
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled)


class OpenVino:
    """Networks compiled by OpenVINO when they are first called: one each for the shapes the session names, one for all others."""

    def __init__(self, graph: Path, target: dict[str, Any]) -> None:
        import openvino as ov

        self.core = ov.Core()
        self.requests: dict[Any, Any] = {}
        self.model = self.core.read_model(graph)
        self.inputs = [entry.any_name for entry in self.model.inputs]
        self.outputs = [output.any_name for output in self.model.outputs]
        settings = {name.upper(): value.upper() for name, value in target["session"].items()}
        workload = {"batch": 1, "sequence": 0} | target.get("workload", {})
        named = settings.pop("STATIC_SHAPE", "WORKLOAD")
        self.free = 3 if named == "SEEN" else 0
        words = {"SEEN": ["WORKLOAD"], "NONE": []}.get(named, named.split(","))
        batches = [workload["batch"] if word == "WORKLOAD" else int(word) for word in words]
        self.fixed = {self.shapes(batch, workload["sequence"]) for batch in batches}
        fixed = {"INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": target["threads"]}
        self.properties = fixed | settings

    def shapes(self, batch: int, sequence: int) -> tuple[tuple[int, ...], ...]:
        """The inputs' shapes in a call."""
        found = []
        for entry in self.model.inputs:
            sizes = [d.get_length() if d.is_static else sequence if i else batch for i, d in enumerate(entry.partial_shape)]
            found.append(tuple(sizes))
        return tuple(found)

    def run(self, names: list[str] | None, inputs: dict[str, Any]) -> list[Any]:
        """The named outputs, or all."""
        shapes = tuple(inputs[name].shape for name in self.inputs)
        if shapes not in self.fixed and self.free:
            self.free -= 1
            self.fixed.add(shapes)
        key = shapes if shapes in self.fixed else None
        if key not in self.requests:
            model = self.model.clone()
            if key:
                model.reshape(dict(zip(self.inputs, key, strict=True)))
            self.requests[key] = self.core.compile_model(model, "CPU", self.properties).create_infer_request()
        found = dict(zip(self.outputs, self.requests[key].infer(inputs, share_inputs=True).values(), strict=True))
        return [found[name] for name in names or self.outputs]


def sample() -> tuple[dict[str, Any], dict[str, Any]]:
    """(inputs, expected outputs) of the reference sample."""
    with np.load(HERE / "sample.npz", allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    inputs, outputs = ({n.partition(".")[2]: a for n, a in arrays.items() if n.startswith(side)} for side in ("input.", "output."))
    return inputs, outputs


def latency(engine: Any, inputs: dict[str, Any], seconds: float) -> dict[str, float]:
    """n calls with the first row of the sample, p50, p90 and p99 in ms."""
    single = {name: array[:1] for name, array in inputs.items()}
    for _ in range(5):
        engine.run(None, single)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 10:
        start = time.perf_counter()
        engine.run(None, single)
        times.append((time.perf_counter() - start) * 1e3)
    return {"n": len(times)} | {f"p{q}": float(np.percentile(times, q)) for q in (50, 90, 99)}


def predictions(engine: Any, manifest: dict[str, Any], items: list[str]) -> list[dict[str, Any]]:
    """One {item, label, probability} per item; {item, value} for regression."""
    settings = data("preprocessing.json")
    prepare = {"text": texts, "image": images, "vector": vectors}[settings["modality"]]
    labels, found = manifest["labels"], []
    for item in items:
        logits = engine.run([manifest["outputs"][0]], prepare(settings, item))[0][0].astype(np.float64)
        if not labels:
            found.append({"item": item, "value": float(logits[0])})
            continue
        odds = np.exp(logits - logits.max())
        best = int(odds.argmax())
        found.append({"item": item, "label": labels[best], "probability": float(odds[best] / odds.sum())})
    return found


def texts(settings: dict[str, Any], item: str) -> dict[str, Any]:
    """Inputs (1, tokens) of a text."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(HERE / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if settings.get("max_length"):
        tokenizer.enable_truncation(settings["max_length"])
    encoding = tokenizer.encode(item.strip())
    values = {"input_ids": encoding.ids, "attention_mask": encoding.attention_mask, "token_type_ids": encoding.type_ids}
    return {name: np.asarray([values[name]], np.int64) for name in settings["inputs"]}


def images(settings: dict[str, Any], item: str) -> dict[str, Any]:
    """Inputs (1, channels, height, width) of an image file."""
    from PIL import Image, ImageOps

    with Image.open(item) as opened:
        opened.load()
        image: Any = ImageOps.exif_transpose(opened).convert("L" if settings.get("channels", 3) == 1 else "RGB")
    height, width = settings.get("resize", (0, 0))
    if height and not width:
        short = min(image.size)
        width, height = (height if edge == short else int(height * edge / short) for edge in image.size)
    if height and image.size != (width, height):
        image = image.resize((width, height), resample=settings.get("resample", 2))
    crop_height, crop_width = settings.get("crop", (0, 0))
    if crop_height:
        left, top = (image.size[0] - crop_width) // 2, (image.size[1] - crop_height) // 2
        image = image.crop((left, top, left + crop_width, top + crop_height))
    pixels = np.asarray(image, np.uint8)
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    mean, std = (np.asarray(settings.get(name, [0.5]), np.float64).reshape(-1, 1, 1) for name in ("mean", "std"))
    scale, shift = (settings.get("rescale", 1 / 255) / std).astype(np.float32), (-mean / std).astype(np.float32)
    return {settings["inputs"][0]: (pixels.astype(np.float32) * scale + shift)[None]}


def vectors(settings: dict[str, Any], item: str) -> dict[str, Any]:
    """Inputs (1, features) of comma-separated numbers."""
    return {settings["inputs"][0]: np.asarray([[float(part) for part in item.split(",")]], np.float32)}


def text(result: dict[str, Any]) -> str:
    """The result for a person."""
    times, check = result["latency_ms"], result["sample"]
    verdict = "ok" if check["ok"] else "WRONG"
    lines = [
        f"engine   {result['engine']}",
        f"sample   {verdict}: largest difference {check['largest_difference']:.2g}, accepted {check['accepted']:.2g}",
        f"latency  p50 {times['p50']:.3f} ms, p90 {times['p90']:.3f}, p99 {times['p99']:.3f}  (n = {times['n']}, batch 1)",
    ]
    for row in result["predictions"]:
        answer = f"{row['label']} ({row['probability']:.1%})" if "label" in row else f"{row['value']:.4g}"
        lines.append(f"{answer:<24} {row['item']}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
