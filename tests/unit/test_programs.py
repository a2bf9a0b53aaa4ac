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


PARTS = ("normalized", "s", "mixed", "o", "attended", "normalized2", "h", "g", "m", "out")


@pytest.mark.parametrize("name", ["tokens", *(f"layers.0.{part}" for part in PARTS), "features"])
def test_what_was_never_seen_is_saturated_not_wrapped(case, name):
    """A tensor that was calibrated on half of its range, what comes before it on all."""
    net, image = case.network(), case.images[:1]
    seen, want = calibrated.observe(net, [image]), {}
    calibrated.forward(net, image, lambda name, x: want.setdefault(name, x[0]))
    low, high = seen[name]
    ranges = seen | {name: (low / 2, high / 2)}
    program = programs.lower(net, ranges, "none")
    grid = calibrated.CalibratedNumbers(net, ranges).grid(name)
    steps = want[name] / grid.scale + grid.zero
    beyond = (steps > 127 + 20) | (steps < -128 - 20)  # by more than what integers before it may be off
    assert beyond.any()
    found = interpreter.trace(program, program.structure.pixels.quantize(image)[0])[name].reshape(steps.shape)
    assert (found[beyond] == np.where(steps > 0, 127, -128)[beyond]).all()


def test_tensors_that_hardly_vary_have_a_grid_that_the_kernels_take(case):
    """Values that cancel where attention mixes them, and maps of low rank whose middle is next to nothing."""
    net = factored(case.network(), 0.5)
    ranges = calibrated.observe(net, [case.images])
    narrow = {name: (-1e-7, 1e-7) for name in ranges if name.endswith((".mixed", ".middle"))}
    assert len(narrow) > 2 * len(net.shape.layers)
    for fusion in ("none", "blocks"):
        program = programs.lower(net, ranges | narrow, fusion)
        numbers = calibrated.CalibratedNumbers(net, ranges | narrow)
        values = max(numbers.grid(f"layers.0.v{h}").scale for h in range(net.shape.layers[0].heads))
        assert program.structure.tensor("layers.0.mixed").scale == pytest.approx(values / 7.9)
        interpreter.run(program, np.zeros((12, 12, 3), np.int8))
    whole = calibrated.CalibratedNumbers(net, ranges)
    low, high = ranges["layers.0.mixed"]
    assert whole.grid("layers.0.mixed").scale == pytest.approx((max(high, 0) - min(low, 0)) / 255), "as seen, where that can be"


@pytest.mark.parametrize(("activation", "epsilon"), [("gelu", 0.05), ("relu", 1e-12), ("gelu_pytorch_tanh", 1e-6)])
def test_every_activation_and_epsilon_reach_the_integers(activation, epsilon):
    own = Case(ViTConfig(**SIZES, image_size=12, patch_size=4, num_channels=3, hidden_act=activation, layer_norm_eps=epsilon))
    net = own.network()
    subnet = own.net.subnet(own.space, own.point)
    with torch.no_grad():
        logits = own.net({"pixel_values": torch.from_numpy(own.images).float()}, subnet).numpy()
    assert np.allclose(calibrated.forward(net, own.images), logits, atol=1e-4)
    if epsilon > 1e-3:  # next to variances that are no larger
        parts = ("embedding.weight", "embedding.bias", "position", "class_token")
        small = {name: 0.1 * net.parameters[name] for name in parts}
        net = dataclasses.replace(net, parameters=dict(net.parameters) | small)
    want, ranges = calibrated.forward(net, own.images[:8]), calibrated.observe(net, [own.images])
    assert signal_to_noise(programs.lower(net, ranges, "blocks"), own.images[:8], want) > 20
    if epsilon > 1e-3:
        without = programs.lower(dataclasses.replace(net, epsilon=1e-12), ranges, "blocks")
        assert signal_to_noise(without, own.images[:8], want) < 15


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
