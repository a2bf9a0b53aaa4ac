"""Small convolutional networks: in plain arrays, read from torch, calibrated, and as programs.

Batch normalization is folded into the convolution before it. ReLU costs nothing: a tensor that was never below zero has its zero point at
the lowest byte, where requantization saturates.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from nascompile.errors import UnsupportedError
from nascompile.mcu import constants, program as p
from nascompile.mcu.calibrated import HEADROOM, Grid, Ranges, See, observed, stored, weight_scales
from nascompile.records import Record

Array = npt.NDArray[Any]
KNOWN = "Conv2d, BatchNorm2d, ReLU, AvgPool2d, and at the end AdaptiveAvgPool2d(1), Flatten, Linear"
"""Modules that a network may be made of."""
GREY_LEVELS = 1.0
"""How far the zero of the first convolution's padding may be from that of a channel."""


class Stage(Record, frozen=True):
    """One step from image to image."""

    kind: Literal["conv", "depthwise", "average"]
    channels: int
    """Of its result."""
    kernel: int = 3
    stride: int = 1
    pad: int = 0
    relu: bool = False

    @property
    def pointwise(self) -> bool:
        return self.kind == "conv" and (self.kernel, self.stride, self.pad) == (1, 1, 0)


class Shape(Record, frozen=True):
    """Sizes of a network: stages, the mean over what is left of the image, a linear classifier."""

    image: tuple[int, int, int]
    """Height, width, channels."""
    stages: tuple[Stage, ...]
    classes: int

    def __post_init__(self) -> None:
        if not self.stages or self.stages[0].kind == "average":
            raise UnsupportedError("the first stage is no convolution", hint="normalization of pixels goes into its weights")
        for number, (stage, (_, _, before)) in enumerate(zip(self.stages, self.images, strict=False)):
            name = f"stages.{number}, a {stage.kind} of {stage.kernel} x {stage.kernel},"
            if stage.kind == "depthwise" and stage.kernel != 3:
                raise UnsupportedError(f"{name} has no kernel", hint="depthwise convolutions are 3 x 3")
            if stage.kind != "conv" and stage.channels != before:
                raise UnsupportedError(f"{name} makes {stage.channels} channels of {before}", hint="it keeps as many as there are")
            if stage.kind == "average" and (stage.pad or stage.relu):
                raise UnsupportedError(f"{name} has padding or ReLU", hint="an average of whole windows has neither")
        if smallest := [image for image in self.images if min(image) < 1]:
            height, width, _ = smallest[0]
            raise UnsupportedError(f"nothing is left of the image: {height} x {width}", hint="fewer or smaller strides, or a larger image")

    @property
    def images(self) -> tuple[tuple[int, int, int], ...]:
        """Height, width, channels before every stage, and after the last."""
        found = [self.image]
        for stage in self.stages:
            height, width = ((size + 2 * stage.pad - stage.kernel) // stage.stride + 1 for size in found[-1][:2])
            found.append((height, width, stage.channels))
        return tuple(found)


@dataclass(frozen=True)
class Network:
    """A network in plain arrays, of normalized pixels.

    Parameters: `stages.I.weight`, (outputs, rows, columns, inputs) of a convolution and (channels, rows, columns) of a depthwise one, and
    `head.weight` (classes, channels); each with its `.bias`.
    """

    shape: Shape
    parameters: Mapping[str, Array]
    mean: tuple[float, ...] = (0.0,)
    """Of pixels from 0 to 1, a channel each: what normalization takes off."""
    deviation: tuple[float, ...] = (1.0,)
    pool: int = 1
    """Samples are that much larger than the image of the shape, whose pixels are averages of pool × pool of theirs."""

    def pixels(self) -> p.Pixels:
        """Normalized pixels become a camera's byte less 128."""
        return p.Pixels(scale=tuple(255 * d for d in self.deviation), offset=tuple(255 * m - 128 for m in self.mean), pool=self.pool)


def untrained(shape: Shape, seed: int) -> Network:
    """Weights drawn from a seed that keep what they are given about as large as it is: to know sizes by, not to classify."""
    rng, parameters = np.random.default_rng(seed), dict[str, Array]()
    for number, (stage, (_, _, before)) in enumerate(zip(shape.stages, shape.images, strict=False)):
        if stage.kind == "average":
            continue
        size = (stage.channels, stage.kernel, stage.kernel, *([before] if stage.kind == "conv" else []))
        parameters[f"stages.{number}.weight"] = rng.normal(0, math.sqrt((1 + stage.relu) / math.prod(size[1:])), size)
        parameters[f"stages.{number}.bias"] = rng.normal(0, 0.1, stage.channels)
    channels = shape.images[-1][2]
    parameters["head.weight"] = rng.normal(0, channels**-0.5, (shape.classes, channels))
    return Network(shape, parameters | {"head.bias": rng.normal(0, 0.1, shape.classes)}, (0.5,), (0.5,))


# ---------------------------------------------------------------------------------------------- from torch


def of_torch(module: Any, image: tuple[int, int, int], mean: Iterable[float], deviation: Iterable[float]) -> Network:
    """From a `torch.nn.Sequential`, also of such, in its own order, with the running statistics of its normalization folded in.

    `image`: height, width, channels. UnsupportedError naming a module, or a setting of one, that has no program.
    """
    from torch import nn

    reader = _Reader()
    for name, part in module.named_modules(remove_duplicate=False):
        if type(part) is nn.Sequential:
            continue
        if next(part.children(), None) is not None:
            raise UnsupportedError(f"{name or 'the network'} ({type(part).__name__}) has a forward of its own", hint="use nn.Sequential")
        reader.read(name, part)
    if reader.head is None:
        raise UnsupportedError("the network has no classifier at its end", hint=f"modules that have a program: {KNOWN}")
    shape = Shape(image=image, stages=tuple(reader.stages), classes=len(reader.head["head.weight"]))
    if shape.stages[0].kind == "conv" and (wanted := reader.arrays[0]["weight"].shape[-1]) != image[2]:
        raise UnsupportedError(f"the first convolution takes {wanted} channels, the image has {image[2]}")
    arrays = {f"stages.{number}.{kind}": array for number, own in enumerate(reader.arrays) for kind, array in own.items()}
    return Network(shape, arrays | reader.head, tuple(mean), tuple(deviation))


class _Reader:
    """Reads modules one after the other."""

    def __init__(self) -> None:
        self.stages: list[Stage] = []
        self.arrays: list[dict[str, Array]] = []
        self.head: dict[str, Array] | None = None
        self._pooled = False

    def read(self, name: str, part: Any) -> None:
        from torch import nn

        said = f"{name or 'the network'} ({type(part).__name__})"
        if self.head is not None or (self._pooled and not isinstance(part, nn.Flatten | nn.Linear | nn.Dropout | nn.Identity)):
            raise UnsupportedError(f"{said} comes too late for a program", hint=f"modules and their order: {KNOWN}")
        match part:
            case nn.Conv2d():
                self._conv(said, part)
            case nn.BatchNorm2d():
                self._fold(said, part)
            case nn.ReLU():
                self.stages[-1] = msgspec.structs.replace(self._convolution(said), relu=True)
            case nn.AvgPool2d():
                self._average(said, part)
            case nn.AdaptiveAvgPool2d():
                if part.output_size not in (1, (1, 1)):
                    raise UnsupportedError(f"{said} leaves {part.output_size}", hint="before the classifier the mean of the whole image")
                self._pooled = True
            case nn.Linear():
                self._classifier(said, part)
            case nn.Flatten() | nn.Dropout() | nn.Identity():
                pass
            case _:
                raise UnsupportedError(f"{said} has no program", hint=f"modules that have one: {KNOWN}")

    def _conv(self, said: str, part: Any) -> None:
        depthwise = part.groups > 1
        sizes = ("kernel_size", "stride", "padding")
        wrong = {
            "groups": depthwise and not part.groups == part.in_channels == part.out_channels, "dilation": set(part.dilation) != {1},
            "padding_mode": part.padding_mode != "zeros", **{name: len(set(getattr(part, name))) > 1 for name in sizes},
        }  # fmt: skip
        if faults := [name for name, bad in wrong.items() if bad]:
            raise UnsupportedError(f"{said} has a {faults[0]} without a kernel: {getattr(part, faults[0])}", hint="plain square ones have")
        kernel, stride, pad = (int(getattr(part, name)[0]) for name in sizes)
        kind: Literal["conv", "depthwise"] = "depthwise" if depthwise else "conv"
        self.stages.append(Stage(kind=kind, channels=part.out_channels, kernel=kernel, stride=stride, pad=pad))
        weight = _array(part.weight)  # (outputs, inputs of a group, rows, columns)
        bias = np.zeros(part.out_channels) if part.bias is None else _array(part.bias)
        self.arrays.append({"weight": weight[:, 0] if depthwise else weight.transpose(0, 2, 3, 1), "bias": bias})

    def _fold(self, said: str, part: Any) -> None:
        if self._convolution(said).relu or part.running_var is None:
            raise UnsupportedError(f"{said} cannot be folded into the convolution before it", hint="convolution, normalization, ReLU")
        gain, shift = (np.ones(1), np.zeros(1)) if part.weight is None else (_array(part.weight), _array(part.bias))
        gain = gain / np.sqrt(_array(part.running_var) + part.eps)
        arrays = self.arrays[-1]
        weight = arrays["weight"] * gain.reshape(-1, *[1] * (arrays["weight"].ndim - 1))
        self.arrays[-1] = {"weight": weight, "bias": (arrays["bias"] - _array(part.running_mean)) * gain + shift}

    def _average(self, said: str, part: Any) -> None:
        sizes = {name: {int(size) for size in np.ravel(getattr(part, name))} for name in ("kernel_size", "stride", "padding")}
        if part.ceil_mode or part.divisor_override or sizes["padding"] != {0} or max(map(len, sizes.values())) > 1:
            raise UnsupportedError(f"{said} has a setting that has no kernel", hint="square windows without padding have one")
        if not self.stages:
            raise UnsupportedError(f"{said} comes before any convolution", hint="normalization of pixels goes into the first one's weights")
        [kernel], [stride] = sizes["kernel_size"], sizes["stride"]
        self.stages.append(Stage(kind="average", channels=self.stages[-1].channels, kernel=kernel, stride=stride))
        self.arrays.append({})

    def _classifier(self, said: str, part: Any) -> None:
        if not self._pooled:
            raise UnsupportedError(f"{said} has no mean over the image before it", hint="AdaptiveAvgPool2d(1), then Flatten")
        bias = np.zeros(part.out_features) if part.bias is None else _array(part.bias)
        self.head = {"head.weight": _array(part.weight), "head.bias": bias}

    def _convolution(self, said: str) -> Stage:
        """The last stage, which must be a convolution."""
        if not self.stages or self.stages[-1].kind == "average":
            raise UnsupportedError(f"{said} follows no convolution", hint="convolution, normalization, ReLU")
        return self.stages[-1]


def _array(tensor: Any) -> Array:
    return np.asarray(tensor.detach().cpu().numpy(), np.float64)


# ---------------------------------------------------------------------------------------------- ranges


def observe(network: Network, batches: Iterable[Array]) -> Ranges:
    """Ranges of every tensor of the program over batches of normalized samples (n, channels, height, width)."""
    return observed(lambda images, see: forward(network, images, see), batches)


def forward(network: Network, images: Array, see: See = lambda name, x: None) -> Array:
    """Class scores (n, classes) in float of samples, averaged down to the image; `see` is shown every tensor by its name in the program."""
    parameters, x = network.parameters, p.averaged(images, network.pool).transpose(0, 2, 3, 1)
    for number, stage in enumerate(network.shape.stages):
        pad, kernel, stride = stage.pad, stage.kernel, stage.stride
        padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (kernel, kernel), (1, 2))[:, ::stride, ::stride]
        if stage.kind == "average":
            x = windows.mean((-1, -2))
        else:
            weight, bias = (parameters[f"stages.{number}.{kind}"] for kind in ("weight", "bias"))
            if stage.kind == "depthwise":
                x = np.einsum("nhwcij,cij->nhwc", windows, weight) + bias
            else:
                rows = windows.transpose(0, 1, 2, 4, 5, 3).reshape(*windows.shape[:3], -1)
                x = rows @ weight.reshape(len(weight), -1).T + bias
        x = np.maximum(x, 0.0) if stage.relu else x
        see(f"stages.{number}", x)
    features = x.mean((1, 2))
    see("features", features)
    return np.asarray(features @ parameters["head.weight"].T + parameters["head.bias"])


# ---------------------------------------------------------------------------------------------- integers


def lower(network: Network, ranges: Ranges, sample: Array | None = None) -> p.Program:
    """The calibrated program; `sample`: (channels, height, width) normalized, that its project shows. UnsupportedError if it has none."""
    shape, pixels = network.shape, network.pixels()
    network, x = _of_bytes(network)
    building = _Building(network)
    building.add("image", p.Read(rows=shape.image[0]), (), shape.image, x)
    name, grid = "image", x
    for number, stage in enumerate(shape.stages):
        before, after = shape.images[number : number + 2]
        # an average has no values that what it averages has not, and keeps its grid
        output = grid if stage.kind == "average" else Grid.covering(*ranges[f"stages.{number}"])
        kernel = building.kernel(f"stages.{number}", stage, before, grid, output)
        building.add(f"stages.{number}", kernel, (name,), after, output)
        name, grid = f"stages.{number}", output
    height, width, channels = shape.images[-1]
    features = Grid.covering(*ranges["features"])
    multiplier = constants.mean(height * width, grid.scale, features.scale)
    pool = p.Mean(multiplier=multiplier, x_zero=grid.zero, zero_point=features.zero, rows=height * width, channels=channels)
    building.add("pool", pool, (name,), (1, channels), features)
    weight = network.parameters["head.weight"]
    scores = Grid(float(weight_scales(weight).max()) * features.scale / HEADROOM)
    head = building.linear("head", weight, network.parameters["head.bias"], features, scores)
    building.add("head", p.Classify(linear=head), ("pool",), (shape.classes,), scores, 4 * shape.classes)
    structure = p.Structure(
        name="network", tensors=tuple(building.tensors), operations=tuple(building.operations), image=shape.image, output="head",
        pixels=pixels, logits=p.Logits(scale=scores.scale),
    )  # fmt: skip
    return p.Program(structure, building.constants, None if sample is None else pixels.quantize(sample[None])[0])


def _of_bytes(network: Network) -> tuple[Network, Grid]:
    """The same network of a camera's bytes less 128, and their grid: normalization is in the first convolution's weights and bias."""
    stage, pixels = network.shape.stages[0], network.pixels()
    channels = network.shape.image[2]
    scale, offset = np.broadcast_to(pixels.scale, channels), np.broadcast_to(pixels.offset, channels)
    zero = int(np.clip(round(float(offset.mean())), -128, 127))
    if stage.pad and np.abs(offset - zero).max() > GREY_LEVELS:
        levels = ", ".join(f"{level + 128:.1f}" for level in offset)
        raise UnsupportedError(
            f"the first convolution pads with zero, which is another grey level in each channel: {levels}",
            hint="normalize all channels by one mean, or do not pad the first convolution",
        )
    weight = network.parameters["stages.0.weight"]
    along = (-1, 1, 1) if stage.kind == "depthwise" else (-1,)  # of channels
    weight = weight / scale.reshape(along)
    left = (weight * (zero - offset).reshape(along)).reshape(len(weight), -1).sum(1)  # what rounding zero left over
    parameters = {"stages.0.weight": weight, "stages.0.bias": network.parameters["stages.0.bias"] + left}
    return replace(network, parameters=dict(network.parameters) | parameters), Grid(1.0, zero)


class _Building:
    """Tensors, operators and constants, in order."""

    def __init__(self, network: Network) -> None:
        self.parameters = network.parameters
        self.tensors: list[p.Tensor] = []
        self.operations: list[p.Operation] = []
        self.constants: dict[str, Array] = {}

    def add(self, name: str, kernel: p.Kernel, inputs: tuple[str, ...], shape: tuple[int, ...], grid: Grid, size: int = 0) -> None:
        size = size or math.prod(shape)
        self.tensors.append(p.Tensor(name=name, shape=shape, size_bytes=size, scale=grid.scale, zero_point=grid.zero))
        self.operations.append(p.Operation(name=name, kernel=kernel, inputs=inputs, outputs=(name,)))

    def kernel(self, name: str, stage: Stage, image: tuple[int, int, int], x: Grid, y: Grid) -> p.Kernel:
        height, width, channels = image
        window: dict[str, Any] = {
            "height": height, "width": width, "channels": channels, "kernel": stage.kernel, "stride": stage.stride, "pad": stage.pad,
        }  # fmt: skip
        if stage.kind == "average":
            multiplier = constants.mean(stage.kernel**2, x.scale, y.scale)
            return p.AveragePool(multiplier=multiplier, x_zero=x.zero, zero_point=y.zero, **window)
        weight, bias = (self.parameters[f"{name}.{kind}"] for kind in ("weight", "bias"))
        weight = weight.reshape(len(weight), -1)
        if stage.kind == "depthwise":
            window |= self.put(name, weight, bias, x, y)
            return p.Depthwise(name=name, x_zero=x.zero, zero_point=y.zero, **window)
        linear = self.linear(name, weight, bias, x, y)
        return p.Dense(map=linear, rows=height * width) if stage.pointwise else p.Conv(linear=linear, **window)

    def linear(self, name: str, weight: Array, bias: Array, x: Grid, y: Grid) -> p.Linear:
        names: dict[str, Any] = dict(self.put(name, weight, bias, x, y))
        outputs, inputs = weight.shape
        return p.Linear(name=name, inputs=inputs, outputs=outputs, x_zero=x.zero, zero_point=y.zero, **names)

    def put(self, name: str, weight: Array, bias: Array, x: Grid, y: Grid) -> dict[str, str]:
        """Puts the integers of (outputs, inputs) weights into the constants; the fields that name them."""
        names = {field: f"{name}.{field}" for field in ("weights", "bias", "multiplier")}
        self.constants[names["weights"]], scales = stored(weight)
        self.constants[names["bias"]] = constants.bias_words(bias, x.scale, scales)
        self.constants[names["multiplier"]] = constants.requantizer(x.scale * scales / y.scale)
        return names
