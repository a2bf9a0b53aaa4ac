"""Trained networks become integer programs: the same function in float, near it in integers, whatever the fusion."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from transformers import BertConfig, ViTConfig

from nascompile import network, plugins, programs, space as spaces, supernet
from nascompile.errors import ModelError, UnsupportedError
from nascompile.mcu import calibrated, interpreter
from nascompile.records import Target

MEAN, DEVIATION = (0.3, 0.5, 0.4), (0.2, 0.3, 0.25)
SIZES = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 40, "num_labels": 5}
CONFIG = ViTConfig(**SIZES, image_size=12, patch_size=4, num_channels=3)


class Case:
    """A small vision transformer, a candidate of its space, images."""

    def __init__(self, config=CONFIG):
        torch.manual_seed(3)
        self.family, self.config = plugins.get("families", "vit"), config
        model = self.family.create(config)
        with torch.no_grad():
            for parameter in model.parameters():  # as created, tokens are all alike and biases 0
                parameter.add_(0.15 * torch.randn_like(parameter))
        self.net = supernet.Supernet(self.family, model)
        workload = self.family.workload(config, 1, 0)
        self.target = Target(device="cpu", backend="openvino", workload=workload)
        self.space = network.search_space(self.family, config, plugins.get("backends", "openvino"), self.target, "m", precisions=("int8",))
        self.point = spaces.quantized(self.space, spaces.sample(self.space, np.random.default_rng(5)))
        self.weights = {name: p.detach().numpy() for name, p in model.named_parameters()}
        pixels = np.random.default_rng(1).integers(0, 256, (48, 3, 12, 12)) / 255  # bytes of a camera
        self.images = (pixels - np.reshape(MEAN, (3, 1, 1))) / np.reshape(DEVIATION, (3, 1, 1))

    def network(self, point=None) -> calibrated.Network:
        parts = (self.family, self.config, self.space, point or self.point, self.target, self.weights)
        return programs.network_of(*parts, MEAN, DEVIATION)


@pytest.fixture(scope="module")
def case():
    return Case()


def test_the_plain_network_is_the_candidate(case):
    subnet = case.net.subnet(case.space, case.point)
    assert len(subnet.layers) < 3 or any(v < f for v, f in zip(subnet.values.values(), case.net.largest().values.values(), strict=False))
    with torch.no_grad():
        want = case.net({"pixel_values": torch.from_numpy(case.images).float()}, subnet).numpy()
    assert np.allclose(calibrated.forward(case.network(), case.images), want, atol=1e-4)


def signal_to_noise(program, images, want) -> float:
    """dB of the program's scores against float logits."""
    pixels, logits = program.structure.pixels, program.structure.logits
    found = np.stack([interpreter.run(program, image) for image in pixels.quantize(images)]) * logits.scale
    return 10 * np.log10((want**2).sum() / ((found - want) ** 2).sum())


@pytest.mark.parametrize("fusion", ["none", "blocks", "all"])
def test_integers_are_near_the_network(case, fusion):
    net = case.network()
    ranges = calibrated.observe(net, [case.images[:32], case.images[32:]])
    program = programs.lower(net, ranges, fusion, case.images[0])
    assert (program.sample == np.rint(case.images[0].transpose(1, 2, 0) * DEVIATION * 255 + np.multiply(MEAN, 255) - 128)).all()
    assert signal_to_noise(program, case.images[:12], calibrated.forward(net, case.images[:12])) > 20


def test_the_fused_programs_are_one_function(case):
    net = case.network()
    ranges = calibrated.observe(net, [case.images])
    blocks, whole = (programs.lower(net, ranges, fusion) for fusion in ("blocks", "all"))
    for image in blocks.structure.pixels.quantize(case.images[:4]):
        assert (interpreter.run(blocks, image) == interpreter.run(whole, image)).all()


def factored(net: calibrated.Network, ratio: float) -> calibrated.Network:
    """Its maps within layers in two factors, by singular values."""
    parameters = dict(net.parameters)
    for name in [n for n in parameters if n.startswith("layers.") and n.endswith(".weight") and parameters[n].ndim == 2]:
        u, s, v = np.linalg.svd(parameters.pop(name), full_matrices=False)
        rank, part = max(2, int(ratio * len(s))), name.removesuffix(".weight")
        parameters[f"{part}.first"], parameters[f"{part}.second"] = s[:rank, None] * v[:rank], u[:, :rank]
    return dataclasses.replace(net, parameters=parameters)


def test_maps_in_two_factors(case):
    net = case.network()
    full, half = factored(net, 1.0), factored(net, 0.5)
    assert np.allclose(calibrated.forward(full, case.images), calibrated.forward(net, case.images))
    assert not np.allclose(calibrated.forward(half, case.images), calibrated.forward(net, case.images), atol=0.1)
    for low_rank in (full, half):
        program = programs.lower(low_rank, calibrated.observe(low_rank, [case.images]), "blocks")
        assert signal_to_noise(program, case.images[:8], calibrated.forward(low_rank, case.images[:8])) > 20
    stored = {name for name in program.constants if name.startswith("layers.0.key.first")}
    assert stored == {f"layers.0.key.first.{kind}" for kind in ("weights", "bias", "multiplier")}, "once for all heads"


def test_what_was_never_seen_is_saturated_not_wrapped(case):
    net = case.network()
    program = programs.lower(net, calibrated.observe(net, [np.zeros((1, 3, 12, 12))]), "blocks")
    scores = interpreter.run(program, np.full((12, 12, 3), 127, np.int8))
    assert np.isfinite(scores * program.structure.logits.scale).all()


def test_what_has_no_program_is_refused(case):
    with pytest.raises(UnsupportedError, match="the candidate is fp32: microcontroller programs are whole in int8"):
        case.network(spaces.largest(case.space, "fp32"))
    bert = BertConfig(**SIZES, vocab_size=50)
    with pytest.raises(UnsupportedError, match="no microcontroller program for the family bert"):
        programs.network_of(plugins.get("families", "bert"), bert, case.space, case.point, case.target, case.weights, MEAN, DEVIATION)
    with pytest.raises(UnsupportedError, match="no table for the activation quick_gelu"):
        dataclasses.replace(case.network(), activation="quick_gelu")
    with pytest.raises(ModelError, match="no such parameter: vit"):
        programs.network_of(case.family, case.config, case.space, case.point, case.target, {}, MEAN, DEVIATION)
    with pytest.raises(UnsupportedError, match="no calibration samples"):
        calibrated.observe(case.network(), [])
