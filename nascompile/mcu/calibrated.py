"""The numbers of a trained vision transformer's program: real weights, and what every tensor was seen to be on calibration samples.

`Network` is the network in plain arrays, whatever it was trained with; `observe` runs it in float and keeps the range of every tensor that
the program has; `CalibratedNumbers` makes integers of both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from nascompile.errors import UnsupportedError
from nascompile.mcu import constants, program as p
from nascompile.mcu.transformer import Shape

Array = npt.NDArray[Any]
MIDDLE = 4095
"""Largest value between the factors of a low-rank map."""
SHARES = 1 / 256
"""Scale of softmax's bytes."""
HEADROOM = 0.45
"""Largest ratio of the class scores' own scale: they keep as many digits as their products have."""
MIDDLE_HEADROOM = 0.49
"""Largest ratio between the factors of a low-rank map; below the 0.5 that a multiplier can be."""
MIXED_HEADROOM = 7.9
"""Largest ratio of values to what attention mixes of them; below the 8 that the kernel takes."""
ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "gelu": constants.gelu,
    "gelu_pytorch_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0.0),
}


@dataclass(frozen=True)
class Network:
    """A vision transformer: linear maps as (outputs, inputs), rows of tokens, norms with gain and bias.

    Parameters: `embedding` (inputs in (row, column, channel) order, of normalized pixels), `position` (tokens, width), `class_token`
    (width,), `layers.I.` `norm1` `norm2` `query` `key` `value` `out` `up` `down`, `norm`, `head`, each with `.weight` and `.bias`. A map
    in two factors has `.first` (rank, inputs) and `.second` (outputs, rank) instead of its weight.
    """

    shape: Shape
    parameters: Mapping[str, Array]
    epsilon: float
    activation: str = "gelu"
    mean: tuple[float, ...] = (0.0,)
    """Of pixels from 0 to 1, a channel each: what normalization takes off."""
    deviation: tuple[float, ...] = (1.0,)
    pool: int = 1
    """Samples are that much larger than the image of the shape, whose pixels are averages of pool × pool of theirs."""

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise UnsupportedError(f"no table for the activation {self.activation}", hint=f"known: {', '.join(ACTIVATIONS)}")

    def pixels(self) -> p.Pixels:
        """Normalized pixels become a camera's byte less 128."""
        return p.Pixels(scale=tuple(255 * d for d in self.deviation), offset=tuple(255 * m - 128 for m in self.mean), pool=self.pool)

    def weight(self, name: str) -> Array:
        """Outputs × inputs of a map, multiplied out where it has factors."""
        if f"{name}.weight" in self.parameters:
            return self.parameters[f"{name}.weight"]
        found: Array = self.parameters[f"{name}.second"] @ self.parameters[f"{name}.first"]
        return found

    def bias(self, name: str, outputs: int) -> Array:
        return np.asarray(self.parameters.get(f"{name}.bias", np.zeros(outputs)), np.float64)


# ---------------------------------------------------------------------------------------------- ranges


Ranges = dict[str, tuple[float, float]]
"""Tensor ▸ lowest and highest value that was seen."""


See = Callable[[str, Array], None]


def observe(network: Network, batches: Iterable[Array]) -> Ranges:
    """Ranges over batches of normalized samples (n, channels, height, width), of the tensors of every fusion."""
    return observed(lambda images, see: forward(network, images, see), batches)


def observed(run: Callable[[Array, See], object], batches: Iterable[Array]) -> Ranges:
    """Ranges of the tensors that `run` shows of each batch; UnsupportedError where there is none."""
    found: Ranges = {}

    def see(name: str, x: Array) -> None:
        low, high = found.get(name, (0.0, 0.0))
        found[name] = (min(low, float(x.min())), max(high, float(x.max())))

    for images in batches:
        run(images, see)
    if not found:
        raise UnsupportedError("no calibration samples", hint="calibrate on one at least")
    return found


def forward(network: Network, images: Array, see: See = lambda name, x: None) -> Array:
    """Logits (n, classes) in float; `see` is shown every tensor by its name in the programs.

    Samples are averaged down to the image first. Queries, and what follows the last layer's attention, are of the class token only there,
    as in the program.
    """
    s, parameters = network.shape, network.parameters
    images = p.averaged(images, network.pool)

    def product(name: str, x: Array) -> Array:
        bias = network.bias(name, 1)
        if f"{name}.first" in parameters:
            middle = x @ parameters[f"{name}.first"].T
            see(f"{name}.middle", middle)
            return np.asarray(middle @ parameters[f"{name}.second"].T + bias)
        return np.asarray(x @ parameters[f"{name}.weight"].T + bias)

    def norm(name: str, x: Array) -> Array:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + network.epsilon)
        return np.asarray(scaled * parameters[f"{name}.weight"] + parameters[f"{name}.bias"])

    n = len(images)
    grid = images.reshape(n, s.image[2], s.image[0] // s.patch, s.patch, s.image[1] // s.patch, s.patch)
    patches = grid.transpose(0, 2, 4, 3, 5, 1).reshape(n, s.patches, -1).astype(np.float64)
    first = np.broadcast_to(parameters["class_token"], (n, 1, s.width))
    x = np.concatenate([first, product("embedding", patches)], axis=1) + parameters["position"]
    see("tokens", x)
    for i, layer in enumerate(s.layers):
        at = f"layers.{i}"
        rows = 1 if i == len(s.layers) - 1 else s.tokens
        normalized = norm(f"{at}.norm1", x)
        see(f"{at}.normalized", normalized)
        heads = (n, -1, layer.heads, layer.head_width)
        q = product(f"{at}.query", normalized[:, :rows]).reshape(heads).swapaxes(1, 2)
        k, v = (product(f"{at}.{part}", normalized).reshape(heads).swapaxes(1, 2) for part in ("key", "value"))
        see(f"{at}.q", q)
        for h in range(layer.heads):
            see(f"{at}.k{h}", k[:, h])
            see(f"{at}.v{h}", v[:, h])
        scores = q @ k.swapaxes(2, 3) / math.sqrt(layer.head_width)
        see(f"{at}.s", scores)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (shares / shares.sum(-1, keepdims=True) @ v).swapaxes(1, 2).reshape(n, rows, layer.inner)
        see(f"{at}.mixed", mixed)
        projected = product(f"{at}.out", mixed)
        see(f"{at}.o", projected)
        x = projected + x[:, :rows]
        see(f"{at}.attended", x)
        normalized = norm(f"{at}.norm2", x)
        see(f"{at}.normalized2", normalized)
        hidden = product(f"{at}.up", normalized)
        see(f"{at}.h", hidden)
        active = ACTIVATIONS[network.activation](hidden)
        see(f"{at}.g", active)
        down = product(f"{at}.down", active)
        see(f"{at}.m", down)
        x = down + x
        see(f"{at}.out", x)
    features = norm("norm", x[:, 0])
    see("features", features)
    logits = product("head", features)
    see("scores", logits)
    return logits


# ---------------------------------------------------------------------------------------------- integers


_READS = {"out": "mixed", "up": "normalized2", "down": "g"}
"""Map of a layer ▸ the tensor that it reads; queries, keys and values read the normalized one."""


@dataclass(frozen=True)
class Grid:
    """Real value = scale · (byte − zero point)."""

    scale: float
    zero: int = 0

    @classmethod
    def covering(cls, low: float, high: float, symmetric: bool = False, least: float = 1e-9 / 255) -> Grid:
        """The int8 grid that covers the range and 0, of a scale of at least `least`."""
        low, high = min(low, 0.0), max(high, 0.0)
        if symmetric:
            return cls(max(-low, high, 1e-9) / 127)
        scale = max((high - low) / 255, least)
        return cls(scale, int(np.clip(round(-128 - low / scale), -128, 127)))

    def bytes(self, x: Array) -> npt.NDArray[np.int8]:
        found: npt.NDArray[np.int8] = np.clip(np.rint(x / self.scale) + self.zero, -128, 127).astype(np.int8)
        return found


def weight_scales(weight: Array) -> Array:
    """One an output; an output whose weights are all but zero gets that of a thousandth of the largest, so that its bias fits."""
    largest = np.abs(weight).max(axis=1)
    return np.asarray(np.maximum(largest, max(1e-3 * float(largest.max()), 1e-9)) / 127, np.float64)


def stored(weight: Array) -> tuple[npt.NDArray[np.int8], Array]:
    """(outputs × inputs bytes, scale of each output) of a map."""
    scales = weight_scales(weight)
    found: npt.NDArray[np.int8] = np.clip(np.rint(weight / scales[:, None]), -127, 127).astype(np.int8)
    return found, scales


@dataclass
class CalibratedNumbers:
    """Constants of parts from a network and its tensors' ranges; the `Numbers` of `transformer.build`."""

    network: Network
    ranges: Ranges
    constants: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)

    def grid(self, name: str) -> Grid:
        """Of a tensor; attention takes queries symmetric, and mixes values to no step much smaller than theirs."""
        if not name.endswith(".mixed"):
            return Grid.covering(*self.ranges[name], symmetric=name.endswith(".q"))
        at = name.removesuffix(".mixed")
        heads = self.network.shape.layers[int(at.rpartition(".")[2])].heads
        least = max(self.grid(f"{at}.v{h}").scale for h in range(heads)) / MIXED_HEADROOM
        return Grid.covering(*self.ranges[name], least=least)

    def scale(self, name: str) -> tuple[float, int]:
        """Scale and zero point of a program's tensor, for people; keys and values have one a head, shares are counts of 256."""
        if name in self.ranges and name != "scores":
            grid = self.grid(name)
            return grid.scale, grid.zero
        return (self.score_scale, 0) if name == "scores" else (SHARES, 0) if name.endswith(".e") else (1.0, 0)

    @property
    def score_scale(self) -> float:
        """Of the class scores."""
        scales = weight_scales(self.network.weight("head"))
        return float(scales.max()) * self.grid("features").scale / HEADROOM

    # ------------------------------------------------------------------------------------------ maps

    def map(self, name: str, inputs: int, outputs: int, *, gelu: bool = False, residual: bool = False, rank: int = 0) -> p.Map:
        """Parameters say whether it is two factors, whatever the rank of the shape's layer."""
        if name == "embedding":
            return self._embedding()
        if name == "head":
            weight, bias = self.network.weight(name), self.network.bias(name, outputs)
            return self._linear(name, weight, bias, self.grid("features"), Grid(self.score_scale))
        at, _, part = name.rpartition(".")
        x, y, onto = {
            "queries": ("normalized", "q", ""),
            "projection": ("mixed", "attended" if residual else "o", self._before(at)),
            "up": ("normalized2", "h", ""),
            "down": ("g", "out" if residual else "m", f"{at}.attended"),
        }[part]
        source = {"queries": "query", "projection": "out"}.get(part, part)
        table = self._table(f"{name}.gelu", f"{at}.h", f"{at}.g") if gelu else ""
        grids = self.grid(f"{at}.{x}"), self.grid(f"{at}.{y}")
        return self._map(name, f"{at}.{source}", slice(None), *grids, table, self.grid(onto) if residual else None)

    def _before(self, at: str) -> str:
        """The tensor that a layer reads."""
        number = int(at.rpartition(".")[2])
        return f"layers.{number - 1}.out" if number else "tokens"

    def _map(self, name: str, source: str, rows: slice, x: Grid, y: Grid, table: str = "", onto: Grid | None = None) -> p.Map:
        """The outputs `rows` of a map of the network."""
        parameters = self.network.parameters
        bias = self.network.bias(source, self.network.weight(source).shape[0])[rows]
        if f"{source}.first" not in parameters:
            return self._linear(name, parameters[f"{source}.weight"][rows], bias, x, y, table, onto)
        factor, middle = parameters[f"{source}.first"], self.middle(source)
        first = self._linear(f"{source}.first", factor, np.zeros(len(factor)), x, middle)  # its constants are there once for all heads
        second = self._linear(f"{name}.second", parameters[f"{source}.second"][rows], bias, middle, y, table, onto)
        return p.LowRank(name=name, first=first, second=second)

    def middle(self, source: str) -> Grid:
        """Between the factors of a map of the network."""
        at, _, part = source.rpartition(".")
        x = self.grid(f"{at}.{_READS.get(part, 'normalized')}")
        low, high = self.ranges[f"{source}.middle"]
        finest = x.scale * float(weight_scales(self.network.parameters[f"{source}.first"]).max()) / MIDDLE_HEADROOM
        return Grid(max(max(-low, high, 1e-9) / MIDDLE, finest))

    def _linear(
        self, name: str, weight: Array, bias: Array, x: Grid, y: Grid, table: str = "", onto: Grid | None = None
    ) -> p.Linear:  # fmt: skip
        self.constants[f"{name}.weights"], scales = stored(weight)
        self.constants[f"{name}.bias"] = constants.bias_words(bias, x.scale, scales)
        self.constants[f"{name}.multiplier"] = constants.requantizer(x.scale * scales / y.scale)
        onto_multiplier = constants.residual(onto.scale, onto.zero, y.scale, y.zero).multiplier if onto else 0
        return p.Linear(
            name=name, weights=f"{name}.weights", bias=f"{name}.bias", multiplier=f"{name}.multiplier", inputs=weight.shape[1],
            outputs=weight.shape[0], x_zero=x.zero, zero_point=y.zero, table=table, residual_multiplier=onto_multiplier,
            residual_zero=onto.zero if onto else 0,
        )  # fmt: skip

    def _embedding(self) -> p.Linear:
        """Pixels are bytes less 128, normalization is in weights and bias."""
        network, pixels = self.network, self.network.pixels()
        repeats = network.shape.patch**2
        scale = np.tile(1 / np.broadcast_to(pixels.scale, network.shape.image[2]), repeats)
        offset = np.tile(np.broadcast_to(pixels.offset, network.shape.image[2]), repeats)
        weight = network.parameters["embedding.weight"] * scale
        bias = network.bias("embedding", network.shape.width) - weight @ offset
        return self._linear("embedding", weight, bias, Grid(1.0), self.grid("tokens"), onto=self.positions)

    @property
    def positions(self) -> Grid:
        rows = self.network.parameters["position"][1:]
        return Grid.covering(float(rows.min()), float(rows.max()))

    def rows(self, name: str, rows: int, width: int) -> str:
        parameters = self.network.parameters
        if name == "position":
            self.constants[name] = self.positions.bytes(parameters[name][1:])
        else:
            self.constants[name] = self.grid("tokens").bytes(parameters["class_token"].reshape(1, width) + parameters["position"][:1])
        return name

    # ------------------------------------------------------------------------------------------ attention

    def head(self, name: str, inputs: int, width: int, rank: int = 0) -> p.Head:
        at, number = self._head(name)
        rows = slice(number * width, (number + 1) * width)
        x, q, mixed = (self.grid(f"{at}.{part}") for part in ("normalized", "q", "mixed"))
        k, v = self.grid(f"{at}.k{number}"), self.grid(f"{at}.v{number}")
        found = constants.attention(q.scale, k.scale, v.scale, mixed.scale, width)
        keys, values = self._map(f"{name}.keys", f"{at}.key", rows, x, k), self._map(f"{name}.values", f"{at}.value", rows, x, v)
        return p.Head(
            name=name, keys=keys, values=values, score_multiplier=found.score_multiplier, ratio=found.ratio, value_zero=v.zero,
            zero_point=mixed.zero,
        )  # fmt: skip

    @staticmethod
    def _head(name: str) -> tuple[str, int]:
        """layers.2.head1 ▸ (layers.2, 1)."""
        at, _, part = name.rpartition(".")
        return at, int(part.removeprefix("head"))

    def products(self, name: str, heads: int, *, scores: bool) -> tuple[p.Product, ...]:
        at = name.rpartition(".")[0]
        width = self.network.shape.layers[int(at.rpartition(".")[2])].head_width
        found = []
        for h in range(heads):
            w, y = self.grid(f"{at}.{'k' if scores else 'v'}{h}"), self.grid(f"{at}.{'s' if scores else 'mixed'}")
            x = self.grid(f"{at}.q").scale / math.sqrt(width) if scores else SHARES
            multiplier = int(constants.requantizer(x * w.scale / y.scale))
            found.append(p.Product(name=f"{name}.{h}", multiplier=multiplier, w_zero=w.zero, zero_point=y.zero))
        return tuple(found)

    # ------------------------------------------------------------------------------------------ others

    def norm(self, name: str, width: int) -> p.Norm:
        at, _, part = name.rpartition(".")
        x, y = {"norm1": (self._before(at) if at else "", f"{at}.normalized"), "norm2": (f"{at}.attended", f"{at}.normalized2")}.get(
            part, (f"layers.{len(self.network.shape.layers) - 1}.out", "features")
        )
        gain, bias = (np.asarray(self.network.parameters[f"{name}.{kind}"], np.float64) for kind in ("weight", "bias"))
        output = self.grid(y)
        found = constants.layer_norm(gain, bias, self.network.epsilon, self.grid(x).scale, output.scale, output.zero)
        self.constants[f"{name}.affine"] = found.affine
        return p.Norm(name=name, affine=f"{name}.affine", epsilon=found.epsilon, width=width)

    def table(self, name: str, kind: Literal["gelu", "softmax"]) -> str:
        at = name.rpartition(".")[0]
        if kind == "gelu":
            return self._table(name, f"{at}.h", f"{at}.g")
        self.constants[name] = constants.softmax_table(self.grid(f"{at}.s").scale)
        return name

    def _table(self, name: str, x: str, y: str) -> str:
        a, b = self.grid(x), self.grid(y)
        self.constants[name] = constants.lookup(ACTIVATIONS[self.network.activation], a.scale, a.zero, b.scale, b.zero)
        return name

    def add(self, name: str, count: int) -> p.Add:
        at, _, part = name.rpartition(".")
        names = (f"{at}.o", self._before(at), f"{at}.attended") if part == "add1" else (f"{at}.m", f"{at}.attended", f"{at}.out")
        a, b, y = map(self.grid, names)
        found = constants.add(a.scale, a.zero, b.scale, b.zero, y.scale, y.zero)
        return p.Add(a_multiplier=found.a_multiplier, b_multiplier=found.b_multiplier, constant=found.constant, count=count)
