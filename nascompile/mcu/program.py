"""The integer program of a network: tensors, operators in order of execution, constants. What runs is said here and nowhere else.

An operator is what the planner places: one kernel, or several that hand each other tiles in scratch. Constants are as a person would
write them (weights by output and input, bias, multiplier); `packing` puts them in the order that kernels read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from nascompile.errors import UnsupportedError
from nascompile.mcu import planner
from nascompile.records import Record

Layout = Literal["rows", "keys", "values"]
TILES = (64, 32, 16, 8, 4)
"""Tokens at a time. Even: keys of a tile begin at an even token. Multiples of the four that a kernel works on."""


class Tensor(Record, frozen=True):
    """Activations of the arena: int8 rows, unless the bytes say otherwise."""

    name: str
    shape: tuple[int, ...]
    size_bytes: int
    scale: float = 1.0
    zero_point: int = 0


# ---------------------------------------------------------------------------------------------- parts of operators


class Linear(Record, frozen=True, tag=True):
    """y = requantize(W x + b), as `nc_linear_t`. Names are those of constants."""

    name: str
    weights: str
    """int8, outputs × inputs."""
    bias: str
    """int32, outputs."""
    multiplier: str
    """int32, outputs: ratio of scales times 2^32."""
    inputs: int
    outputs: int
    x_zero: int = 0
    zero_point: int = 0
    table: str = ""
    """int8, 256: looked up by the requantized byte."""
    residual_multiplier: int = 0
    residual_zero: int = 0

    @property
    def macs(self) -> int:
        return self.inputs * self.outputs

    @property
    def residual_constant(self) -> int:
        """See kernels.h; 0 without residual."""
        m = self.residual_multiplier
        return (self.zero_point << 32) - 256 * self.residual_zero * m + 2**31 if m else 0

    @property
    def scratch(self) -> int:
        return 8 * _up(self.inputs, 4)


class LowRank(Record, frozen=True, tag=True):
    """y = second(first(x)), as `nc_low_rank_t`; the intermediate is never whole."""

    name: str
    first: Linear
    second: Linear

    @property
    def inputs(self) -> int:
        return self.first.inputs

    @property
    def outputs(self) -> int:
        return self.second.outputs

    @property
    def macs(self) -> int:
        return self.first.macs + self.second.macs

    @property
    def scratch(self) -> int:
        return self.first.scratch + 8 * _up(self.first.outputs, 2)


Map = Linear | LowRank


class Norm(Record, frozen=True):
    """Layer normalization of rows, as `nc_layer_norm_t`."""

    name: str
    affine: str
    """int32, 2 · width: gain and shift of each channel."""
    epsilon: int
    width: int


class Head(Record, frozen=True):
    """One head of attention: keys and values of its own, and the numbers of `nc_attention_t`."""

    name: str
    keys: Map
    values: Map
    score_multiplier: int
    ratio: int
    value_zero: int
    zero_point: int


class Product(Record, frozen=True):
    """A product of two activations of one head, as `nc_matmul_t`."""

    name: str
    multiplier: int
    w_zero: int
    zero_point: int


# ---------------------------------------------------------------------------------------------- operators


class Read(Record, frozen=True, tag=True):
    """The whole sample, height × width × channels."""

    rows: int
    macs: int = 0


class Embed(Record, frozen=True, tag=True):
    """Patches to tokens, position embedding added, the class token before them. Without inputs the image is read band by band."""

    linear: Linear
    patch: int
    channels: int
    columns: int
    bands: int
    position: str = ""
    """int8, patches × width, in the residual's scale."""
    first: str = ""
    """int8, width: the row before the patches."""
    streamed: bool = True

    @property
    def macs(self) -> int:
        return self.bands * self.columns * self.linear.macs

    @property
    def band_bytes(self) -> int:
        return self.columns * self.patch * self.patch * self.channels

    def scratch(self, tile: int) -> int:
        return self.linear.scratch + _up(self.band_bytes, planner.ALIGN) * self.streamed


class Normalize(Record, frozen=True, tag=True):
    """x ▸ normalized rows."""

    norm: Norm
    rows: int
    macs: int = 0
    overlays: tuple[tuple[int, int], ...] = ((0, 0),)
    """(input, output) that may be the same memory."""


class Dense(Record, frozen=True, tag=True):
    """x ▸ map(x); of (x, residual) ▸ map(x) + residual. With a norm, x is normalized tile by tile on the way."""

    map: Map
    rows: int
    norm: Norm | None = None

    @property
    def macs(self) -> int:
        return self.rows * self.map.macs

    @property
    def overlays(self) -> tuple[tuple[int, int], ...]:
        return ((1, 0),)

    def tiles(self) -> tuple[int, ...]:
        return _tiles(self.rows) if self.norm else (0,)

    def scratch(self, tile: int) -> int:
        return self.map.scratch + (_up(tile * self.map.inputs, planner.ALIGN) if self.norm else 0)


class Mlp(Record, frozen=True, tag=True):
    """x ▸ x + down(up(norm(x))), tile by tile, in place."""

    norm: Norm
    up: Map
    down: Map
    rows: int
    overlays: tuple[tuple[int, int], ...] = ((0, 0),)

    @property
    def macs(self) -> int:
        return self.rows * (self.up.macs + self.down.macs)

    def tiles(self) -> tuple[int, ...]:
        return _tiles(self.rows)

    def parts(self, tile: int) -> tuple[int, int]:
        """Where in scratch a tile's hidden rows and the maps' own scratch begin; its normalized rows are first."""
        hidden = _up(tile * self.up.inputs, planner.ALIGN)
        return hidden, hidden + _up(tile * self.up.outputs, planner.ALIGN)

    def scratch(self, tile: int) -> int:
        return self.parts(tile)[1] + max(self.up.scratch, self.down.scratch)


class Attend(Record, frozen=True, tag=True):
    """(x, queries) ▸ attention of all heads, one head's keys and values at a time. With a norm, x is normalized tile by tile."""

    heads: tuple[Head, ...]
    width: int
    """Channels of a head."""
    tokens: int
    rows: int
    """Queries."""
    norm: Norm | None = None
    overlays: tuple[tuple[int, int], ...] = ((1, 0),)

    @property
    def macs(self) -> int:
        return len(self.heads) * 2 * self.rows * self.tokens * self.width + self.tokens * sum(
            h.keys.macs + h.values.macs for h in self.heads
        )

    def tiles(self) -> tuple[int, ...]:
        return _tiles(self.tokens) if self.norm else (0,)

    def parts(self, tile: int) -> tuple[int, int, int]:
        """Where in scratch values, normalized rows and the kernels' own scratch begin; keys are first."""
        values = _up(keys_bytes(self.tokens, self.width), planner.ALIGN)
        normalized = values + _up(values_bytes(self.tokens, self.width), planner.ALIGN)
        return values, normalized, normalized + (_up(tile * self.heads[0].keys.inputs, planner.ALIGN) if self.norm else 0)

    @property
    def attention_scratch(self) -> int:
        """Of the kernel itself."""
        return 8 * _up(self.width, 4) + 8 * _up(self.tokens, 2)

    def scratch(self, tile: int) -> int:
        _, normalized, rest = self.parts(tile)
        # attention itself needs no normalized rows: its scratch may lie over them
        return max(normalized + self.attention_scratch, rest + max(max(h.keys.scratch, h.values.scratch) for h in self.heads))


class Split(Record, frozen=True, tag=True):
    """x ▸ keys, or values, of all heads, each laid out for attention."""

    maps: tuple[Map, ...]
    rows: int
    layout: Layout

    @property
    def macs(self) -> int:
        return self.rows * sum(m.macs for m in self.maps)

    @property
    def head_bytes(self) -> int:
        count = keys_bytes if self.layout == "keys" else values_bytes
        return _up(count(self.rows, self.maps[0].outputs), planner.ALIGN)

    def scratch(self, tile: int) -> int:
        return max(m.scratch for m in self.maps)


class Scores(Record, frozen=True, tag=True):
    """(queries, keys) ▸ scores of all heads, heads × rows × tokens."""

    products: tuple[Product, ...]
    rows: int
    tokens: int
    width: int

    @property
    def macs(self) -> int:
        return len(self.products) * self.rows * self.tokens * self.width

    def scratch(self, tile: int) -> int:
        return 8 * _up(self.width, 4)


class Softmax(Record, frozen=True, tag=True):
    """Scores ▸ shares of 256."""

    table: str
    """uint16, 256."""
    rows: int
    width: int
    macs: int = 0
    overlays: tuple[tuple[int, int], ...] = ((0, 0),)


class Mix(Record, frozen=True, tag=True):
    """(shares, values) ▸ rows × (heads · width)."""

    products: tuple[Product, ...]
    rows: int
    tokens: int
    width: int

    @property
    def macs(self) -> int:
        return len(self.products) * self.rows * self.tokens * self.width

    def scratch(self, tile: int) -> int:
        return 8 * _up(self.tokens, 4)


class Lookup(Record, frozen=True, tag=True):
    """y = table[x]."""

    table: str
    count: int
    macs: int = 0
    overlays: tuple[tuple[int, int], ...] = ((0, 0),)


class Add(Record, frozen=True, tag=True):
    """y = a + b, each in its scale, as `nc_add_t`."""

    a_multiplier: int
    b_multiplier: int
    constant: int
    count: int
    macs: int = 0
    overlays: tuple[tuple[int, int], ...] = ((0, 0), (1, 0))


class Mean(Record, frozen=True, tag=True):
    """Mean over rows."""

    multiplier: int
    x_zero: int
    zero_point: int
    rows: int
    channels: int
    macs: int = 0


class Classify(Record, frozen=True, tag=True):
    """First row of x ▸ int32 class scores of one scale."""

    linear: Linear

    @property
    def macs(self) -> int:
        return self.linear.macs

    def scratch(self, tile: int) -> int:
        return self.linear.scratch


class Conv(Record, frozen=True, tag=True):
    """(x) or (x, residual) ▸ convolution, the image's edge padded."""

    linear: Linear
    height: int
    width: int
    channels: int
    kernel: int
    stride: int
    pad: int
    overlays: tuple[tuple[int, int], ...] = ((1, 0),)

    @property
    def macs(self) -> int:
        return out_size(self.height, self) * out_size(self.width, self) * self.linear.macs

    def scratch(self, tile: int) -> int:
        return self.linear.scratch + _up(self.linear.inputs, 8)


class Depthwise(Record, frozen=True, tag=True):
    """Depthwise convolution 3 × 3."""

    name: str
    weights: str
    """int8, channels × 9."""
    bias: str
    multiplier: str
    height: int
    width: int
    channels: int
    stride: int
    pad: int
    x_zero: int = 0
    zero_point: int = 0
    table: str = ""
    kernel: int = 3

    @property
    def macs(self) -> int:
        return out_size(self.height, self) * out_size(self.width, self) * self.channels * 9

    def scratch(self, tile: int) -> int:
        return 24 * (self.width + 2 * self.pad)


class AveragePool(Record, frozen=True, tag=True):
    """Averages of kernel × kernel windows."""

    multiplier: int
    x_zero: int
    zero_point: int
    height: int
    width: int
    channels: int
    kernel: int
    stride: int
    pad: int = 0
    macs: int = 0


Whole = Read | Embed | Normalize | Dense | Mlp | Attend | Classify
Single = Split | Scores | Softmax | Mix | Lookup | Add | Mean | Conv | Depthwise | AveragePool
Kernel = Whole | Single


class Operation(Record, frozen=True):
    """A kernel at its place."""

    name: str
    kernel: Kernel
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class Pixels(Record, frozen=True):
    """How a float sample (channels, height, width) becomes bytes: q = round(x · scale + offset), a channel each."""

    name: str = "pixel_values"
    scale: tuple[float, ...] = (255.0,)
    offset: tuple[float, ...] = (-128.0,)
    pool: int = 1
    """Averaged over pool × pool before: on a device the camera delivers the smaller image."""

    def quantize(self, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """(n, channels, height, width) floats to (n, height / pool, width / pool, channels) int8."""
        steps = averaged(x, self.pool).transpose(0, 2, 3, 1) * np.asarray(self.scale) + np.asarray(self.offset)
        found: np.ndarray[Any, Any] = np.clip(np.rint(steps), -128, 127).astype(np.int8)
        return found


def averaged(x: np.ndarray[Any, Any], pool: int) -> np.ndarray[Any, Any]:
    """Means over pool × pool of images (n, channels, height, width), which pool divides."""
    if pool == 1:
        return x
    n, channels, height, width = x.shape
    found: np.ndarray[Any, Any] = x.reshape(n, channels, height // pool, pool, width // pool, pool).mean((3, 5))
    return found


class Logits(Record, frozen=True):
    """What the output means as floats."""

    name: str = "logits"
    scale: float = 1.0
    zero_point: int = 0


class Structure(Record, frozen=True):
    """A program without its constants: what a memory plan and a size follow from."""

    name: str
    tensors: tuple[Tensor, ...]
    operations: tuple[Operation, ...]
    image: tuple[int, int, int]
    """Height, width, channels of a sample, int8."""
    output: str
    pixels: Pixels = Pixels()
    logits: Logits = Logits()

    def tensor(self, name: str) -> Tensor:
        return next(t for t in self.tensors if t.name == name)

    @property
    def input_bytes(self) -> int:
        return math.prod(self.image)

    @property
    def macs(self) -> int:
        return sum(op.kernel.macs for op in self.operations)


@dataclass(frozen=True)
class Program:
    """Structure and constants (name ▸ array)."""

    structure: Structure
    constants: Mapping[str, np.ndarray[Any, Any]]
    sample: np.ndarray[Any, Any] | None = None
    """int8, the image that a project's harness shows; None: zeros."""


def demand(structure: Structure) -> planner.Demand:
    """What the planner has to place."""
    steps = []
    for op in structure.operations:
        kernel = op.kernel
        tiles = kernel.tiles() if hasattr(kernel, "tiles") else (0,)
        pairs = tuple((tile, kernel.scratch(tile) if hasattr(kernel, "scratch") else 0) for tile in tiles)
        overlays = tuple(
            (op.inputs[i], op.outputs[j]) for i, j in getattr(kernel, "overlays", ()) if i < len(op.inputs) and j < len(op.outputs)
        )
        steps.append(planner.Step(op.name, op.inputs, op.outputs, overlays, pairs))
    sizes = {t.name: t.size_bytes for t in structure.tensors}
    return planner.Demand(sizes, tuple(steps), (), (structure.output,))


MOST_INPUTS, MOST_RANK, MOST_TOKENS, MOST_ROWS = 32768, 2048, 512, 16384
"""Of sums that fit 32 bits whatever the bytes are, a bias of 2^30 included; see kernels.h."""


def check(structure: Structure) -> None:
    """UnsupportedError naming the operator, and which of its sizes the kernel does not take: nothing in C looks at them."""
    for op in structure.operations:
        for what, value, least, most in _limited(op.kernel):
            if not least <= value <= most:
                allowed = f"{least:,} to {most:,}" if most < math.inf else f"at least {least:,}"
                raise UnsupportedError(
                    f"operator {op.name} has {value:,} {what}, its kernel takes {allowed}",
                    hint="another size of the network, or of its image",
                )


def _limited(kernel: Kernel) -> Iterator[tuple[str, int, int, float]]:
    """(what a size counts, in the words of an error; its value; the least and the most that it may be)."""
    for map_ in maps(kernel):
        yield f"inputs of {map_.name}", map_.inputs, 1, MOST_INPUTS
        if isinstance(map_, LowRank):
            yield f"values between the factors of {map_.name}", map_.first.outputs, 1, MOST_RANK
    if norm := norm_of(kernel):
        yield "normalized channels", norm.width, 2, 1024
    match kernel:
        case Attend():
            yield "tokens", kernel.tokens, 1, MOST_TOKENS
            yield "channels of a head", kernel.width, 1, MOST_INPUTS
        case Scores():
            yield "channels of a head", kernel.width, 1, MOST_INPUTS
        case Mix():
            yield "tokens", kernel.tokens, 1, MOST_INPUTS
        case Softmax():
            yield "scores in a row", kernel.width, 1, 65535
        case Mean():
            yield "rows", kernel.rows, 1, MOST_ROWS
        case Conv() | Depthwise() | AveragePool():
            pooled = isinstance(kernel, AveragePool)
            yield "pixels in a window", kernel.kernel**2, 1, MOST_ROWS if pooled else math.inf
            yield "pixels from window to window", kernel.stride, 1, math.inf
            yield "pixels of padding", kernel.pad, 0, 0 if pooled else kernel.kernel - 1
            yield "rows of output", out_size(kernel.height, kernel), 1, math.inf
            yield "columns of output", out_size(kernel.width, kernel), 1, math.inf


def maps(kernel: Kernel) -> tuple[Map, ...]:
    """Linear and low-rank maps of an operator, in the order of their use."""
    match kernel:
        case Embed() | Classify() | Conv():
            return (kernel.linear,)
        case Dense():
            return (kernel.map,)
        case Mlp():
            return (kernel.up, kernel.down)
        case Attend():
            return tuple(m for head in kernel.heads for m in (head.keys, head.values))
        case Split():
            return kernel.maps
    return ()


def norm_of(kernel: Kernel) -> Norm | None:
    """The layer normalization within an operator."""
    found: Norm | None = getattr(kernel, "norm", None)
    return found


def keys_bytes(tokens: int, width: int) -> int:
    """NC_KEYS_BYTES."""
    return (tokens + 1) // 2 * 2 * _up(width, 4)


def values_bytes(tokens: int, width: int) -> int:
    """NC_VALUES_BYTES."""
    return (width + 1) // 2 * 2 * _up(tokens, 2)


def out_size(size: int, kernel: Conv | Depthwise | AveragePool) -> int:
    """Rows or columns of a convolution's result."""
    return (size + 2 * kernel.pad - kernel.kernel) // kernel.stride + 1


def _tiles(rows: int) -> tuple[int, ...]:
    """Tokens at a time, most first: all of them where they are few."""
    return tuple(dict.fromkeys(min(tile, rows + rows % 2) for tile in TILES)) if rows > 1 else (1,)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
