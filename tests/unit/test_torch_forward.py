"""The network in torch is the network in NumPy: logits, tensors by name, gradients; larger images are averaged."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from nascompile.errors import UnsupportedError
from nascompile.mcu import calibrated, torch_forward, transformer

EPSILON = 1e-5


def network(rank: int = 0, activation: str = "gelu", pool: int = 1) -> calibrated.Network:
    """Two layers of different sizes with random parameters; maps within the second in two factors where there is a rank."""
    rng = np.random.default_rng(4)
    layers = (
        transformer.Layer(heads=2, head_width=6, hidden=20), transformer.Layer(heads=3, head_width=6, hidden=12, rank=rank),
    )  # fmt: skip
    shape = transformer.Shape(image=(8, 8, 3), patch=4, width=16, layers=layers, classes=5)
    found: dict[str, np.ndarray] = {}

    def put(name: str, outputs: int, inputs: int, factored: int = 0) -> None:
        if factored:
            found[f"{name}.first"] = rng.normal(0, inputs**-0.5, (factored, inputs))
            found[f"{name}.second"] = rng.normal(0, factored**-0.5, (outputs, factored))
        else:
            found[f"{name}.weight"] = rng.normal(0, inputs**-0.5, (outputs, inputs))
        found[f"{name}.bias"] = rng.normal(0, 0.3, outputs)

    put("embedding", 16, 48)
    put("head", 5, 16)
    found |= {"class_token": rng.normal(0, 1, 16), "position": rng.normal(0, 0.5, (5, 16))}
    found |= {"norm.weight": rng.uniform(0.5, 2, 16), "norm.bias": rng.normal(0, 0.3, 16)}
    for i, layer in enumerate(layers):
        for part in ("query", "key", "value"):
            put(f"layers.{i}.{part}", layer.inner, 16, layer.rank)
        put(f"layers.{i}.out", 16, layer.inner, layer.rank)
        put(f"layers.{i}.up", layer.hidden, 16, layer.rank)
        put(f"layers.{i}.down", 16, layer.hidden, layer.rank)
        for norm in ("norm1", "norm2"):
            found |= {f"layers.{i}.{norm}.weight": rng.uniform(0.5, 2, 16), f"layers.{i}.{norm}.bias": rng.normal(0, 0.3, 16)}
    return calibrated.Network(shape=shape, parameters=found, epsilon=EPSILON, activation=activation, pool=pool)


def run(net: calibrated.Network, images: np.ndarray, **options) -> torch.Tensor:
    parameters = {name: torch.from_numpy(value) for name, value in net.parameters.items()}
    return torch_forward.forward(net.shape, parameters, torch.from_numpy(images), EPSILON, net.activation, **options)


def images(n: int = 6, side: int = 8) -> np.ndarray:
    return np.random.default_rng(8).normal(0, 1, (n, 3, side, side))


@pytest.mark.parametrize(("rank", "activation"), [(0, "gelu"), (3, "relu"), (0, "gelu_pytorch_tanh")])
def test_logits_and_every_tensor_are_those_of_numpy(rank, activation):
    net, x = network(rank, activation), images()
    want: dict[str, np.ndarray] = {}
    logits = calibrated.forward(net, x, lambda name, value: want.setdefault(name, value))
    seen: dict[str, torch.Tensor] = {}
    found = run(net, x, see=lambda name, value: seen.setdefault(name, value))
    np.testing.assert_allclose(found, logits, atol=1e-9)
    np.testing.assert_allclose(run(net, x), logits, atol=1e-9, err_msg="where nobody looks")
    assert set(seen) == set(want) - {"scores"}
    assert any(name.endswith(".middle") for name in seen) == bool(rank)
    for name, value in seen.items():
        np.testing.assert_allclose(value, want[name], atol=1e-9, err_msg=name)


def test_products_are_called_by_name_and_what_is_seen_goes_on():
    net, x, called = network(3), images(), []

    def product(name, value, weight, bias):
        called.append(name)
        return F.linear(value, weight, bias)

    plain = run(net, x, product=product)
    assert {"embedding", "head", "layers.0.query", "layers.0.down", "layers.1.up.first", "layers.1.up.second"} <= set(called)
    assert len(called) == len(set(called)) == 2 + 6 + 12
    for name in ("tokens", "layers.0.k1", "layers.0.v0", "layers.0.s", "layers.0.o", "layers.1.g", "layers.1.m", "layers.1.query.middle"):
        other = run(net, x, see=lambda seen, value, name=name: value * 1.5 if seen == name else value)
        assert not torch.allclose(other, plain, atol=1e-3), name


def test_gradients_reach_every_parameter():
    net = network(3)
    parameters = {name: torch.from_numpy(value).requires_grad_() for name, value in net.parameters.items()}
    torch_forward.forward(net.shape, parameters, torch.from_numpy(images()), EPSILON).square().sum().backward()
    none = {name for name, value in parameters.items() if value.grad is None or not value.grad.abs().sum() > 1e-9}
    assert none == {"layers.0.key.bias", "layers.1.key.bias"}, "which softmax takes off again"


def test_larger_images_are_averaged():
    net, x = network(), images(side=24)
    small = x.reshape(6, 3, 8, 3, 8, 3).mean((3, 5))
    np.testing.assert_allclose(run(net, x), run(net, small), atol=1e-9)
    np.testing.assert_allclose(calibrated.forward(network(pool=3), x), calibrated.forward(net, small), atol=1e-9)
    pixels = network(pool=3).pixels()
    assert pixels.pool == 3
    assert (pixels.quantize(x) == net.pixels().quantize(small)).all()
    with pytest.raises(UnsupportedError, match="images of 20 x 20 are no whole multiple of 8 x 8"):
        run(net, images(side=20))


def test_an_activation_without_table_is_refused():
    net = network()
    parameters = {name: torch.from_numpy(value) for name, value in net.parameters.items()}
    with pytest.raises(UnsupportedError, match="no table for the activation quick_gelu"):
        torch_forward.forward(net.shape, parameters, torch.from_numpy(images()), EPSILON, "quick_gelu")
