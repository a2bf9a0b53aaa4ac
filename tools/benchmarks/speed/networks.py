"""The networks that are timed: a Hugging Face folder, samples to calibrate and to judge on, and float PyTorch's own logits."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nascompile import data, models
from nascompile.families import Family
from nascompile.families.encoder import quiet
from nascompile.records import Workload, digest

Array = npt.NDArray[Any]
Arrays = dict[str, Array]

NAMES = ("minilm", "bert_base", "vit_s", "vit_b")
TOY = "toy"
"""For the test of the benchmark itself."""
CALIBRATION, EVALUATION = 64, 32
"""Samples; the first half of calibration gives ranges, the second chooses between ways to take them."""
JUDGED = 1000
"""Samples that accuracy is taken from where a network has a task."""
LONGEST = 48
"""Tokens per text, MiniLM; what the main job's recipe finds for its data."""
TEXT, IMAGE = "bert", "vit"
_SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
SHAPES: dict[str, tuple[str, int, dict[str, Any]]] = {
    TOY: (TEXT, 16, {**_SMALL, "vocab_size": 400, "num_labels": 16}),
    "bert_base": (TEXT, 128, {"num_labels": 16}),
    "vit_s": (IMAGE, 0, {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "num_labels": 1000}),
    "vit_b": (IMAGE, 0, {"num_labels": 1000}),
}
"""Networks with random weights: family, tokens, what differs from the configuration's defaults (BERT-base, ViT-B/16 at 224²)."""


@dataclass(frozen=True)
class Network:
    """One network in the cache."""

    name: str
    folder: Path
    """`model/` (Hugging Face), `samples.npz`, `reference.npy`, `network.json`, and artefacts."""

    @cached_property
    def about(self) -> dict[str, Any]:
        """`sequence`, `weights` (what they are)."""
        return dict(json.loads((self.folder / "network.json").read_text()))

    @cached_property
    def config(self) -> Any:
        return models.read_config(self.folder / "model")

    @cached_property
    def family(self) -> Family:
        return models.family_of(self.config.model_type)

    def workload(self, batch: int) -> Workload:
        return self.family.workload(self.config, batch, self.about["sequence"])

    def module(self, attention: str = "sdpa") -> Any:
        """The torch module, in evaluation mode; its forward returns the logits."""
        import torch

        model = self.family.load(str(self.folder / "model"))
        model.set_attn_implementation(attention)

        class Logits(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def forward(self, *tensors: Any, **named: Any) -> Any:
                return self.model(**dict(zip(names, tensors, strict=False)), **named, return_dict=False)[0]

        names = self.names
        return Logits().eval()

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Inputs in the order of export."""
        return tuple(spec.name for spec in self.family.inputs(self.config))

    @cached_property
    def _stored(self) -> Arrays:
        with np.load(self.folder / "samples.npz", allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}

    def samples(self, part: str) -> Arrays:
        """Inputs of `calibration` or `evaluation`."""
        return {name: self._stored[f"{part}.{name}"] for name in self.names}

    @property
    def labels(self) -> Array | None:
        """Of evaluation, where the network has a task."""
        return self._stored.get("evaluation.labels")

    @cached_property
    def reference(self) -> Array:
        """Float PyTorch's logits of evaluation."""
        return np.asarray(np.load(self.folder / "reference.npy", allow_pickle=False))


def rows(arrays: Arrays, start: int, stop: int) -> Arrays:
    """Some samples, contiguous."""
    return {name: np.ascontiguousarray(values[start:stop]) for name, values in arrays.items()}


def sqnr(expected: Array, found: Array) -> float:
    """Signal to error in dB; 150 stands for no error that float32 could show."""
    wanted = np.asarray(expected, np.float64)
    error = float(np.square(wanted - found).sum())
    signal = float(np.square(wanted).sum())
    return 150.0 if error <= signal * 1e-15 else float(10 * math.log10(signal / error)) if math.isfinite(error) else -math.inf


def prepare(name: str, cache: Path, reviews: Path) -> Network:
    """The network in the cache, made if it is not there."""
    return _minilm(cache, reviews) if name == "minilm" else _random(name, cache)


def _random(name: str, cache: Path) -> Network:
    import torch
    import transformers

    kind, sequence, settings = SHAPES[name]
    key = digest(name, kind, sequence, settings, CALIBRATION, EVALUATION, str(torch.__version__), transformers.__version__)
    folder = cache / f"{name}-{key[:12]}"
    if not folder.is_dir():
        config = {TEXT: transformers.BertConfig, IMAGE: transformers.ViTConfig}[kind](**settings)
        model = models.family_of(config.model_type).create(config)
        _fill(model, torch.Generator().manual_seed(0))
        count = CALIBRATION + EVALUATION
        rng = np.random.default_rng(0)
        inputs = _images(rng, count, config) if kind == IMAGE else _texts(rng, count, sequence, config.vocab_size)
        samples = {f"calibration.{k}": v[:CALIBRATION] for k, v in inputs.items()}
        samples |= {f"evaluation.{k}": v[CALIBRATION:] for k, v in inputs.items()}
        _store(folder, model, samples, {"sequence": sequence, "weights": "random"})
    return Network(name, folder)


def _minilm(cache: Path, reviews: Path) -> Network:
    """all-MiniLM-L6-v2: fine-tuned and with its data where the main job has been run, else with a random head and random tokens."""
    if (reviews / "teacher" / "model.safetensors").is_file() and (reviews / "data" / data.MANIFEST).is_file():
        folder = cache / f"minilm-{models.weights_digest(reviews / 'teacher')[:12]}"
        if not folder.is_dir():
            source = reviews / "teacher"
            model = models.family_of("bert").load(str(source))
            calibration, validation = (data.opened_split(reviews / "data", part) for part in ("calibration", "validation"))
            samples = {f"calibration.{k}": v[:CALIBRATION] for k, v in calibration.arrays().items()}
            samples |= {f"evaluation.{k}": v[:JUDGED] for k, v in validation.arrays().items()}
            samples["evaluation.labels"] = validation.labels[:JUDGED]
            length = samples["evaluation.input_ids"].shape[1]
            _store(folder, model, samples, {"sequence": length, "weights": "fine-tuned on movie reviews by the main job"})
        return Network("minilm", folder)
    import torch

    pretrained = cache.parent / "main_job" / "minilm"
    if not (pretrained / "model.safetensors").is_file():
        tool = Path(__file__).resolve().parents[2] / "fetch_minilm.py"
        subprocess.run([sys.executable, str(tool), "--out", str(pretrained)], check=True, stdout=sys.stderr)
    folder = cache / f"minilm-{digest(models.weights_digest(pretrained), 'random head', LONGEST)[:12]}"
    if not folder.is_dir():
        torch.manual_seed(0)
        model = models.family_of("bert").load(str(pretrained), num_labels=2)
        inputs = _texts(np.random.default_rng(0), CALIBRATION + EVALUATION, LONGEST, model.config.vocab_size)
        samples = {f"calibration.{k}": v[:CALIBRATION] for k, v in inputs.items()}
        samples |= {f"evaluation.{k}": v[CALIBRATION:] for k, v in inputs.items()}
        _store(folder, model, samples, {"sequence": LONGEST, "weights": "all-MiniLM-L6-v2, random head"})
    return Network("minilm", folder)


def _store(folder: Path, model: Any, samples: Arrays, about: dict[str, Any]) -> None:
    """Everything, whole or not at all."""
    import torch

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".network.", dir=folder.parent) as scratch:
        work = Path(scratch) / "network"
        with quiet():
            model.save_pretrained(work / "model")
        np.savez(work / "samples.npz", allow_pickle=False, **samples)
        (work / "network.json").write_text(json.dumps(about))
        network = Network(folder.name, work)
        inputs, module = network.samples("evaluation"), network.module()
        count = len(next(iter(inputs.values())))
        with torch.no_grad():
            parts = [
                module(*(torch.from_numpy(values) for values in rows(inputs, start, start + 8).values())).numpy()
                for start in range(0, count, 8)
            ]
        np.save(work / "reference.npy", np.concatenate(parts))
        shutil.move(work, folder)


def _fill(model: Any, generator: Any) -> None:
    """Random weights that keep activations near 1 and attention neither flat nor a single peak: variance 1 / inputs."""
    import torch

    with torch.no_grad():
        for path, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in path.lower():
                parameter.copy_(0.1 * noise + (1.0 if path.endswith("weight") else 0.0))
            elif path.endswith("bias"):
                parameter.copy_(0.05 * noise)
            elif "embeddings" in path and "projection" not in path:  # tables, positions and the class token
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(noise * math.prod(parameter.shape[1:]) ** -0.5)


def _texts(rng: np.random.Generator, count: int, length: int, vocabulary: int) -> Arrays:
    """Random tokens, all of them real: the longest texts that fit."""
    ids = rng.integers(0, vocabulary, (count, length))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def _images(rng: np.random.Generator, count: int, config: Any) -> Arrays:
    """Smooth random fields with noise on top, near zero mean and unit variance as preprocessed photographs have."""
    import torch

    coarse = torch.from_numpy(rng.standard_normal((count, config.num_channels, 14, 14), dtype=np.float32))
    smooth = torch.nn.functional.interpolate(coarse, size=(config.image_size, config.image_size), mode="bicubic")
    noise = rng.standard_normal(tuple(smooth.shape), dtype=np.float32)
    return {"pixel_values": (1.1 * smooth.numpy() + 0.3 * noise).astype(np.float32)}
