"""Training with the arithmetic of the built engine: what scoring emulates, with gradients, on input ranges that follow the training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from nascompile import network, plugins, space as spaces
from nascompile.errors import RecipeError
from nascompile.mcu.calibrated import MIDDLE, MIXED_HEADROOM, Grid
from nascompile.quantization import ActivationRanges
from nascompile.records import INT8, Candidate, SearchSpace
from nascompile.supernet import MASK, Batch, FakeQuantizer, Subnet, Supernet, calibrate, on_grid, plain

IN_SUMS = ("s", "o", "m")
"""Tensors that only the plan of single operators keeps as bytes: scores of attention, and what is added to the residual."""
MOMENTUM = 0.9
"""Of a range's ends: what stays of them when a step has been seen."""


class _Straight(torch.autograd.Function):
    """The second of two tensors; its gradient is the first one's."""

    @staticmethod
    def forward(ctx: Any, source: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
        return shown.view_as(shown)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return gradients[0], None


class TrainingQuantizer(FakeQuantizer):
    """The numbers of a `FakeQuantizer`, with gradients: straight through for weights, and for inputs inside their range.

    Under autocast quantized products stay float32: bfloat16 does not hold the grids.
    """

    def __init__(self, schemes: Mapping[str, str], ranges: Mapping[str, tuple[float, float]]) -> None:
        super().__init__(schemes, None)
        self.ranges = dict(ranges)
        self._seen: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def __call__(self, name: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if name not in self.schemes:
            return plain(name, x, weight, bias)
        scheme = self.schemes[name]
        with torch.autocast(x.device.type, enabled=False):
            if not x.is_floating_point():  # the rows that are looked up: each has a grid of its own
                rows = F.embedding(x, weight)
                flat = rows.reshape(-1, rows.shape[-1])
                return _straight(flat, on_grid(scheme, flat)).view_as(rows)
            x = x.float()
            if scheme.precision.calibrated and torch.is_grad_enabled():
                self._seen.setdefault(name, []).append(torch.aminmax(x.detach()))
            if scheme.precision.activations.kind == "int":
                x = self._activation(name, x)
            return F.linear(x, _straight(weight, on_grid(scheme, weight)), bias)

    def follow(self, processes: int = 1) -> None:
        """Move the ranges towards what the passes since the last call have seen, in all processes alike."""
        self._last = None
        if not self._seen:
            return
        names = sorted(self._seen)
        seen = torch.stack([
            torch.stack([-torch.stack([low for low, _ in found]).min(), torch.stack([high for _, high in found]).max()])
            for found in (self._seen[name] for name in names)
        ])  # fmt: skip
        if processes > 1:
            torch.distributed.all_reduce(seen, op=torch.distributed.ReduceOp.MAX)
        for name, (below, above) in zip(names, seen.tolist(), strict=True):
            lowest, highest = min(-below, 0.0), max(above, 0.0)
            low, high = self.ranges.get(name, (lowest, highest))
            self.ranges[name] = MOMENTUM * low + (1 - MOMENTUM) * lowest, MOMENTUM * high + (1 - MOMENTUM) * highest
        self._seen.clear()


class ProgramQuantizer(TrainingQuantizer):
    """The numbers of a program for microcontrollers: the weights of all maps, and every tensor that its fused plans keep as bytes.

    Tensors are those of the layers of the largest network, whatever sub-network they are seen in: `layers` are those that it has. One
    that was never seen has the range that it has then.
    """

    def __init__(self, ranges: Mapping[str, tuple[float, float]]) -> None:
        super().__init__({}, ranges)
        self.layers: tuple[int, ...] = ()
        self._weight = plugins.get("quantization", INT8.name)
        self._values: dict[str, float] = {}
        """Layer ▸ coarsest scale of its heads' values, in the pass that is under way."""

    def __call__(self, name: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            weight = weight.float()
            return F.linear(x.float(), _straight(weight, on_grid(self._weight, weight)), None if bias is None else bias.float())

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """Rows that are stored as bytes, on the grid of their own range."""
        low, high = (float(end) for end in torch.aminmax(x.detach()))
        grid = Grid.covering(low, high)
        return _straight(x, torch.fake_quantize_per_tensor_affine(x.detach().float(), grid.scale, grid.zero, -128, 127))

    def see(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """The tensor on its grid; as it is where the fused plans add it up before it is rounded."""
        at, _, part = name.rpartition(".")
        if part in IN_SUMS:
            return x
        own = f"layers.{self.layers[int(at.split('.')[1])]}.{name.split('.', 2)[2]}" if at.startswith("layers.") else name
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            low, high = torch.aminmax(x.detach())
            if torch.is_grad_enabled():
                self._seen.setdefault(own, []).append((low, high))
            range_ = self.ranges.get(own) or (float(low), float(high))
            if part == "middle":
                scale = max(-range_[0], range_[1], 1e-9) / MIDDLE
                return torch.fake_quantize_per_tensor_affine(x, scale, 0, -MIDDLE - 1, MIDDLE)
            least = self._values[at] / MIXED_HEADROOM if part == "mixed" else 0.0
            grid = Grid.covering(*range_, symmetric=part == "q", least=max(least, 1e-9 / 255))
            if part[0] == "v":
                self._values[at] = grid.scale if part == "v0" else max(grid.scale, self._values[at])
            return torch.fake_quantize_per_tensor_affine(x, grid.scale, grid.zero, -128, 127)


class _Watch:
    """A `Linear` that computes in float and keeps the ranges of the tensors that it sees."""

    def __init__(self) -> None:
        self.ranges: dict[str, tuple[float, float]] = {}

    def __call__(self, name: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x, weight, bias)

    def see(self, name: str, x: torch.Tensor) -> torch.Tensor:
        low, high = self.ranges.get(name, (0.0, 0.0))
        self.ranges[name] = min(low, float(x.min())), max(high, float(x.max()))
        return x


@dataclass(frozen=True)
class Quantized:
    """A super-network whose products are quantized: it stands where a recipe expects a network."""

    net: Supernet
    quantizer: FakeQuantizer

    def __call__(self, inputs: Mapping[str, torch.Tensor], subnet: Subnet) -> torch.Tensor:
        self.quantizer.mask = inputs.get(MASK)
        if isinstance(self.quantizer, ProgramQuantizer):
            self.quantizer.layers = subnet.layers
        logits: torch.Tensor = self.net(inputs, subnet, self.quantizer)
        return logits

    def largest(self) -> Subnet:
        return self.net.largest()

    def subnet(self, space: SearchSpace, point: Candidate) -> Subnet:
        return self.net.subnet(space, point)

    def eval(self) -> None:
        """No dropout from here on."""
        self.net.eval()


def quantizer(net: Supernet, space: SearchSpace, ranges: Mapping[str, tuple[float, float]]) -> TrainingQuantizer:
    """For all that the uniformly quantized network of the space's first target quantizes. RecipeError if that is nothing."""
    schemes = network.quantized_weights(net.family, net.config, space, spaces.uniform(space), space.targets[0])
    if not schemes:
        raise RecipeError(
            f"nothing for quantization-aware training to quantize: {space.targets[0]} offers no integer precision",
            hint="set finetune.quantization_aware_epochs = 0, or another search.precisions",
        )
    return ProgramQuantizer(ranges) if _is_program(net) else TrainingQuantizer(schemes, ranges)


def first_ranges(net: Supernet, space: SearchSpace, batches: list[Batch]) -> dict[str, tuple[float, float]]:
    """Weight ▸ smallest and largest input of the largest network's quantized products on some batches; of a program, tensor ▸ its own."""
    if _is_program(net):
        return _watched(net, batches)
    found: ActivationRanges = calibrate(net, space, spaces.uniform(space), space.targets[0], batches, "minmax")
    return {name: (low, high) for name, low, high in found.sites}


def _is_program(net: Supernet) -> bool:
    """Whether the network runs as a program for microcontrollers, and as nothing else."""
    return "program" in getattr(net.family, "accepts", ())


@torch.no_grad()
def _watched(net: Supernet, batches: list[Batch]) -> dict[str, tuple[float, float]]:
    watch = _Watch()
    net.eval()
    for inputs, _ in batches:
        net(inputs, net.largest(), watch)
    return watch.ranges


def _straight(source: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = _Straight.apply(source, shown)  # type: ignore[no-untyped-call]
    return result
