"""A candidate cut and sliced from the one export is the network that an export of its extracted module gives, and its INT8
graph computes what the search's emulation computed."""

from __future__ import annotations

import warnings

import numpy as np
import onnxruntime as ort
import pytest
import torch
from transformers import BertConfig, ViTConfig

from nascompile import lowering, network, plugins, space as spaces, supernet
from nascompile.families.toy import ToyConfig
from nascompile.records import Target

SIZES = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
CASES = {
    "vit": lambda: ViTConfig(**SIZES, image_size=8, patch_size=4, num_channels=1, num_labels=5),
    "bert": lambda: BertConfig(**SIZES, vocab_size=50, num_labels=3, max_position_embeddings=24),
    "toy": ToyConfig,
}
BACKENDS = ("onnxruntime", "openvino")
CANDIDATES = 10


@pytest.fixture(params=[(name, backend) for name in CASES for backend in BACKENDS], ids="-".join)
def case(request, tmp_path):
    torch.set_num_threads(1)
    torch.manual_seed(1)
    name, backend = request.param
    backend = plugins.get("backends", backend)
    if reason := backend.unavailable():
        pytest.skip(reason)
    family, config = plugins.get("families", name), CASES[name]()
    model = family.create(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    target = Target(device="cpu", backend=backend.name, workload=family.workload(config, 1, 8), session=backend.session())
    space = network.search_space(family, config, backend, target, "model", layer_order=(2, 0, 3, 1))
    blueprint = lowering.blueprint(family, config, lowering.export(family, config, tmp_path), backend)
    weights = {name: p.detach().numpy() for name, p in model.named_parameters()}

    def lower(point, ranges=None):
        return lowering.lower(blueprint, family, config, space, point, target, weights, ranges, backend)

    def run(form, feed):
        return backend.load(tmp_path, backend.build(form, target, tmp_path), target).run(feed)["logits"]

    return family, config, model, space, target, lower, run


def float_point(space, rng):
    """A random architecture in FP32."""
    genome = spaces.genome(space, spaces.sample(space, rng))
    return spaces.candidate(space, {s: "fp32" if spaces.slot_gene(space, s).kind == "precision" else v for s, v in genome.items()})


def example(family, config, rng, batch):
    feed = {}
    for spec in family.inputs(config):
        shape = [{"batch": batch, "sequence": 9}.get(d, d) for d in spec.shape]
        feed[spec.name] = rng.integers(0, spec.high, shape) if spec.high else rng.standard_normal(shape).astype(np.float32)
    if "attention_mask" in feed:
        feed["attention_mask"][:] = np.arange(9) < np.linspace(3, 9, batch).astype(int)[:, None]
    return feed


def exported(module, feed, path):
    """Logits of a fresh export of the module, in ONNX Runtime with its own settings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module, tuple(torch.from_numpy(v) for v in feed.values()), str(path), input_names=list(feed), output_names=["logits"],
            opset_version=20, dynamo=False,
        )  # fmt: skip
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(["logits"], feed)[0]


def test_sliced_graph_equals_a_fresh_export_of_the_extracted_module(case, tmp_path):
    family, config, model, space, _, lower, run = case
    rng = np.random.default_rng(0)
    points = {float_point(space, rng) for _ in range(4 * CANDIDATES)}
    assert len({dict(p.architecture)["depth"] for p in points}) > 1
    for point in sorted(points, key=lambda p: p.id)[:CANDIDATES]:
        feed = example(family, config, rng, 3)
        small = supernet.extract(model, family, config, space, point)
        # float32 sums in another order through at most 4 layers, values near 1
        np.testing.assert_allclose(run(lower(point), feed), exported(small, feed, tmp_path / "fresh.onnx"), atol=1e-5)


def test_int8_graph_computes_what_the_search_emulated(case):
    family, config, model, space, target, lower, run = case
    rng = np.random.default_rng(0)
    net = supernet.Supernet(family, model)
    for point in [spaces.uniform(space), *(spaces.sample(space, rng) for _ in range(4))]:
        feed = example(family, config, rng, 16)
        batches = [({name: torch.from_numpy(v) for name, v in feed.items()}, torch.zeros(16, dtype=torch.long))]
        ranges = supernet.calibrate(net, space, point, target.id, batches, "minmax")
        emulated, _ = supernet.emulate(net, space, point, target.id, batches, ranges)
        built = run(lower(point, ranges), feed)
        plain, _ = supernet.emulate(net, space, point, target.id, batches, None) if not ranges.sites else (None, None)
        # The same grids; a value on the edge of two steps may fall to either side and moves on through later layers.
        assert np.abs(built - emulated).max() < 0.02 * np.abs(emulated).max()
        assert plain is None or np.abs(built - plain).max() < 1e-5
