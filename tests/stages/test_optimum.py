"""optimum's ORTModel classes open an engine folder as it is and compute what the engine's sample says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, DistilBertConfig, RobertaConfig, ViTConfig

from nascompile import engine, lowering, network, plugins, space as spaces, supernet
from nascompile.records import Target

pytestmark = pytest.mark.slow  # the first run makes an environment with transformers 4

CHECK = Path(__file__).parents[2] / "tools" / "check_optimum.sh"
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
LABELS = ("red", "green", "blue")
NAMES = {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}
CASES = {
    "vit": ("vit", ViTConfig(**SIZES, **NAMES, image_size=8, patch_size=4, num_channels=1)),
    "bert": ("bert", BertConfig(**SIZES, **NAMES, vocab_size=50, max_position_embeddings=24)),
    "roberta": ("bert", RobertaConfig(**SIZES, **NAMES, vocab_size=50, max_position_embeddings=24)),
    "distilbert": ("bert", DistilBertConfig(dim=64, n_layers=2, n_heads=2, hidden_dim=128, vocab_size=50, **NAMES)),
    "regression": ("bert", BertConfig(**SIZES, vocab_size=50, num_labels=1, problem_type="regression")),
}


def example(family, config):
    rng, feed = np.random.default_rng(0), {}
    for spec in family.inputs(config):
        shape = [{"batch": 3, "sequence": 9}.get(d, d) for d in spec.shape]
        feed[spec.name] = rng.integers(0, spec.high, shape) if spec.high else rng.standard_normal(shape).astype(np.float32)
    if "attention_mask" in feed:
        feed["attention_mask"][:] = np.arange(9) < np.array([[4], [7], [9]])
    return feed


def write_engines(name, folder):
    """A FP32 engine and a uniformly quantized one of a random network."""
    torch.manual_seed(0)
    kind, config = CASES[name]
    family, backend = plugins.get("families", kind), plugins.get("backends", "onnxruntime")
    net = supernet.Supernet(family, family.create(config))
    target = Target(device="cpu", backend=backend.name, workload=family.workload(config, 1, 9), session=backend.session())
    space = network.search_space(family, config, backend, target, "model")
    blueprint = lowering.blueprint(family, config, lowering.export(family, config, folder), backend)
    weights = {name: p.detach().numpy() for name, p in net.model.named_parameters()}
    feed = example(family, config)
    batch = ({key: torch.from_numpy(values) for key, values in feed.items()}, torch.zeros(3, dtype=torch.long))
    written = []
    for role, point in (("baseline", spaces.largest(space)), ("uniform", spaces.uniform(space))):
        ranges = supernet.calibrate(net, space, point, target.id, [batch], "minmax")
        expected = {"logits": net.model(**batch[0]).logits.detach().numpy()} if role == "baseline" else None
        parts = engine.Parts(
            name=role, role=role, target=target, task=config.problem_type or "classification",
            labels=LABELS if config.num_labels > 1 else (),
            form=lowering.lower(blueprint, family, config, space, point, target, weights, ranges, backend),
            config=config.to_dict(), inputs=family.inputs(config), sample=feed, expected=expected, tolerance=1e-4,
            candidate=point, space=space, graph=network.graph(family, config, space, point, target), versions=backend.versions(),
        )  # fmt: skip
        engine.write(folder / role, parts, backend)
        written.append(folder / role)
    return written


def check(*folders):
    command = ["nice", str(CHECK), *map(str, folders)]
    return subprocess.run(command, capture_output=True, text=True, timeout=580, env=os.environ | {"PYTHON": sys.executable})


def test_ort_models_open_engines_of_every_architecture(tmp_path):
    folders = [folder for name in CASES for folder in write_engines(name, tmp_path / name)]
    done = check(*folders)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["OK"] * len(folders)


def test_an_engine_that_computes_something_else_is_told(tmp_path):
    good, bad = write_engines("vit", tmp_path / "vit")
    inputs, expected = engine.read_sample(bad)
    (bad / engine.SAMPLE).write_bytes(engine._npz(inputs, {"logits": expected["logits"] + 1e-2}))
    done = check(good, bad)
    assert done.returncode == 1, done.stdout + done.stderr
    ok, failed = done.stdout.splitlines()
    assert ok.startswith("OK")
    assert failed.startswith(f"FAILED  {bad}: ValueError: logits differ by 0.01")
