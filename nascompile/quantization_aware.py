"""Training with the arithmetic of the built engine: what scoring emulates, with gradients, on input ranges that follow the training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from nascompile import network, space as spaces
from nascompile.errors import RecipeError
from nascompile.quantization import ActivationRanges
from nascompile.records import Candidate, SearchSpace
from nascompile.supernet import MASK, Batch, FakeQuantizer, Subnet, Supernet, calibrate, on_grid, plain

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
            low, high = self.ranges[name]
            self.ranges[name] = (
                MOMENTUM * low + (1 - MOMENTUM) * min(-below, 0.0), MOMENTUM * high + (1 - MOMENTUM) * max(above, 0.0)
            )  # fmt: skip
        self._seen.clear()


@dataclass(frozen=True)
class Quantized:
    """A super-network whose products are quantized: it stands where a recipe expects a network."""

    net: Supernet
    quantizer: FakeQuantizer

    def __call__(self, inputs: Mapping[str, torch.Tensor], subnet: Subnet) -> torch.Tensor:
        self.quantizer.mask = inputs.get(MASK)
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
    return TrainingQuantizer(schemes, ranges)


def first_ranges(net: Supernet, space: SearchSpace, batches: list[Batch]) -> dict[str, tuple[float, float]]:
    """Weight ▸ smallest and largest input of the largest network's quantized products on some batches."""
    found: ActivationRanges = calibrate(net, space, spaces.uniform(space), space.targets[0], batches, "minmax")
    return {name: (low, high) for name, low, high in found.sites}


def _straight(source: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = _Straight.apply(source, shown)  # type: ignore[no-untyped-call]
    return result
