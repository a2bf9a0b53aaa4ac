"""The network of `calibrated.forward` in torch, with gradients: what trains, scores and calibrates, tensor for tensor by the same names."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from nascompile.errors import UnsupportedError
from nascompile.mcu.transformer import Shape

Product = Callable[[str, Tensor, Tensor, Tensor | None], Tensor]
"""product(name, x, weight (outputs, inputs), bias or None) ▸ y. A map in two factors is `NAME.first`, without bias, and `NAME.second`."""
See = Callable[[str, Tensor], Tensor]
"""see(name of a tensor in programs, its values) ▸ the values that go on."""
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu, "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu,
}  # fmt: skip


def plain(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Float arithmetic."""
    return F.linear(x, weight, bias)


def same(name: str, x: Tensor) -> Tensor:
    """The tensor itself."""
    return x


def forward(
    shape: Shape, parameters: Mapping[str, Tensor], images: Tensor, epsilon: float, activation: str = "gelu", product: Product = plain,
    see: See = same,
) -> Tensor:  # fmt: skip
    """Logits (n, classes) of normalized images (n, channels, height, width), which are averaged down to the shape's own size.

    Parameters are those of `calibrated.Network`. `see` gets every tensor that some fusion quantizes; queries, and what follows the last
    layer's attention, are those of the class token only, as in the program.
    """
    if activation not in ACTIVATIONS:
        raise UnsupportedError(f"no table for the activation {activation}", hint=f"known: {', '.join(ACTIVATIONS)}")
    n = len(images)

    def map_(name: str, x: Tensor) -> Tensor:
        bias = parameters.get(f"{name}.bias")
        if f"{name}.first" not in parameters:
            return product(name, x, parameters[f"{name}.weight"], bias)
        middle = see(f"{name}.middle", product(f"{name}.first", x, parameters[f"{name}.first"], None))
        return product(f"{name}.second", middle, parameters[f"{name}.second"], bias)

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], parameters[f"{name}.weight"], parameters[f"{name}.bias"], epsilon)

    first = parameters["class_token"].expand(n, 1, shape.width)
    x = see("tokens", torch.cat([first, map_("embedding", patches(shape, pooled(shape, images)))], 1) + parameters["position"])
    for i, layer in enumerate(shape.layers):
        at, rows = f"layers.{i}", 1 if i == len(shape.layers) - 1 else shape.tokens
        normalized = see(f"{at}.normalized", norm(f"{at}.norm1", x))
        heads = (n, -1, layer.heads, layer.head_width)
        q = see(f"{at}.q", map_(f"{at}.query", normalized[:, :rows]).reshape(heads).transpose(1, 2))
        k, v = (map_(f"{at}.{part}", normalized).reshape(heads).transpose(1, 2) for part in ("key", "value"))
        mixed = see(f"{at}.mixed", _attention(at, q, k, v, see).transpose(1, 2).reshape(n, rows, layer.inner))
        x = see(f"{at}.attended", see(f"{at}.o", map_(f"{at}.out", mixed)) + x[:, :rows])
        normalized = see(f"{at}.normalized2", norm(f"{at}.norm2", x))
        hidden = see(f"{at}.h", map_(f"{at}.up", normalized))
        active = see(f"{at}.g", ACTIVATIONS[activation](hidden))
        x = see(f"{at}.out", see(f"{at}.m", map_(f"{at}.down", active)) + x)
    return map_("head", see("features", norm("norm", x[:, 0])))


def pooled(shape: Shape, images: Tensor) -> Tensor:
    """Images of the shape's size, averages of larger ones. UnsupportedError where the sizes do not divide."""
    side = (images.shape[2], images.shape[3])
    if side == shape.image[:2]:
        return images
    pool = side[0] // shape.image[0]
    if (shape.image[0] * pool, shape.image[1] * pool) != side:
        raise UnsupportedError(f"images of {side[0]} x {side[1]} are no whole multiple of {shape.image[0]} x {shape.image[1]}")
    return F.avg_pool2d(images, pool)


def patches(shape: Shape, images: Tensor) -> Tensor:
    """(n, patches, row · column · channel)."""
    n, side = len(images), shape.patch
    grid = images.reshape(n, shape.image[2], shape.image[0] // side, side, shape.image[1] // side, side)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(n, shape.patches, -1)


def _attention(at: str, q: Tensor, k: Tensor, v: Tensor, see: See) -> Tensor:
    """(n, heads, rows, width) of queries over keys and values; in one kernel where nobody looks."""
    if see is same:
        return F.scaled_dot_product_attention(q, k, v)
    k, v = (torch.stack([see(f"{at}.{name}{h}", x[:, h]) for h in range(x.shape[1])], 1) for name, x in (("k", k), ("v", v)))
    scores = see(f"{at}.s", q @ k.transpose(2, 3) / math.sqrt(q.shape[-1]))
    return scores.softmax(-1) @ v
