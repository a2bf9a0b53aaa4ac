"""The weight-sharing network: elastic forward, emulated quantization, importance order, extraction; shared by the stages."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from nascompile import network, plugins, space as spaces
from nascompile.data import Split
from nascompile.families import Family, Linear
from nascompile.quantization import ActivationRanges, ActivationScheme, Scheme, dequantize, limits
from nascompile.quantization.blocks import BlockWeights
from nascompile.quantization.int8 import StaticInt8
from nascompile.records import Candidate, SearchSpace

Batch = tuple[Mapping[str, torch.Tensor], torch.Tensor]
MASK = "attention_mask"
HISTOGRAM, LEAST_SHARE = 2048, 1e-9
"""Bins of a histogram of activations; what stands for a share of nothing in a logarithm."""
SAMPLES_PER_SITE = 1 << 16
"""Values kept per activation site for clipping decisions; minimum and maximum are exact."""


@dataclass(frozen=True)
class Subnet:
    """A candidate's architecture, resolved: which layers run and how much of each gene's axis they use."""

    layers: tuple[int, ...]
    values: Mapping[str, int]


def resolve(family: Family, config: Any, space: SearchSpace, point: Candidate) -> Subnet:
    """Layers and gene values of a candidate."""
    return Subnet(spaces.kept_layers(space, point), network.values(family, config, space, point))


def plain(name: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Float arithmetic: a product, or a look-up where x holds indices."""
    return F.linear(x, weight, bias) if x.is_floating_point() else F.embedding(x, weight)


class Supernet(nn.Module):
    """The largest network, run as any of its sub-networks; which one is an argument of every call."""

    model: Any

    def __init__(self, family: Family, model: Any) -> None:
        super().__init__()
        self.family, self.model = family, model

    @property
    def config(self) -> Any:
        return self.model.config

    def forward(self, inputs: Mapping[str, torch.Tensor], subnet: Subnet, linear: Linear = plain) -> torch.Tensor:
        """Logits (batch, labels)."""
        logits: torch.Tensor = self.family.forward(self.model, inputs, subnet.layers, subnet.values, linear)
        return logits.float() if logits.dtype == torch.bfloat16 else logits  # losses are not computed in what autocast left

    def largest(self) -> Subnet:
        """Every layer, every unit."""
        depth = max(self.family.choices(self.config, 1)["depth"])
        full = {group.gene: group.count for group in self.family.groups(self.config)}
        return Subnet(tuple(range(depth)), full | {"depth": depth})

    def subnet(self, space: SearchSpace, point: Candidate) -> Subnet:
        """A candidate of a space, resolved."""
        return resolve(self.family, self.config, space, point)


def load_batch(split: Split, rows: np.ndarray[Any, Any], device: Any = "cpu") -> Batch:
    """The samples of a split at these positions, as tensors; texts without the columns that are padding in all of them."""
    part = split.take(rows)
    labels, arrays = torch.from_numpy(np.ascontiguousarray(part.labels)), part.arrays()
    if MASK in arrays:
        longest = int(np.flatnonzero(arrays[MASK].any(axis=0)).max(initial=0)) + 1
        arrays = {name: values[:, :longest] for name, values in arrays.items()}
    return {name: torch.from_numpy(np.ascontiguousarray(values)).to(device) for name, values in arrays.items()}, labels.to(device)


def by_length(split: Split, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The positions with short texts first, so that batches need little padding; as they are where samples have no length."""
    if MASK not in split.inputs:
        return rows
    return rows[np.argsort(np.asarray(split.inputs[MASK])[rows].sum(axis=1), kind="stable")]


def load_batches(split: Split, rows: np.ndarray[Any, Any], size: int, device: Any = "cpu") -> list[Batch]:
    """The samples of a split at these positions, cut into batches."""
    return [load_batch(split, rows[start : start + size], device) for start in range(0, len(rows), size)]


# ---------------------------------------------------------------------------------------------- emulated quantization


class Observer:
    """A `Linear` that computes in float and remembers the inputs of the given products (weight ▸ name of their precision)."""

    def __init__(self, sites: Mapping[str, str]) -> None:
        self.sites = {name: plugins.get("quantization", precision) for name, precision in sites.items()}
        self.low: dict[str, float] = {}
        self.high: dict[str, float] = {}
        self.samples: dict[str, list[torch.Tensor]] = {}

    def __call__(self, name: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if name in self.sites:
            low, high = (float(v) for v in torch.aminmax(x))
            self.low[name] = min(low, self.low.get(name, 0.0))
            self.high[name] = max(high, self.high.get(name, 0.0))
            flat = x.detach().flatten()
            self.samples.setdefault(name, []).append(flat[:: max(1, flat.numel() // 4096)].clone())
        return plain(name, x, weight, bias)

    def ranges(self, method: str) -> ActivationRanges:
        """Ranges by `minmax`, `percentile` (99.99 % kept on each side), `mse` (least squared error) or `entropy` (least divergence)."""
        found = []
        for name in sorted(self.low):
            values = torch.cat(self.samples[name])[:SAMPLES_PER_SITE].cpu().numpy()
            found.append((name, *_clip(method, values, self.low[name], self.high[name], self.sites[name])))
        return ActivationRanges(method=method, sites=tuple(found))


def _clip(method: str, values: np.ndarray[Any, Any], low: float, high: float, scheme: ActivationScheme) -> tuple[float, float]:
    if method == "minmax":
        return low, high
    if method == "percentile":
        return min(0.0, float(np.quantile(values, 1e-4))), max(0.0, float(np.quantile(values, 1 - 1e-4)))
    bottom, top = limits(scheme.precision.activations)
    counts = np.histogram(values, HISTOGRAM, (low, high))[0] if method == "entropy" and high > low else np.zeros(0)
    best, least = (low, high), np.inf
    for share in np.linspace(1.0, 0.3, 29):
        if len(counts):
            cut = (np.array([low, high]) * share - low) / (high - low) * HISTOGRAM
            error = divergence(counts, round(cut[0]), round(cut[1]), top - bottom + 1)
        else:
            scale, zero = scheme.activation_parameters(low * share, high * share)
            steps = np.clip(np.rint(values / scale) + zero, bottom, top) - zero
            error = float(np.square(steps * scale - values).mean())
        if error < least:
            best, least = (low * float(share), high * float(share)), error
    return best


def divergence(counts: np.ndarray[Any, Any], first: int, last: int, levels: int) -> float:
    """Kullback-Leibler divergence of a histogram clipped to bins first … last - 1 from what it is on a grid of so many levels.

    As TensorRT and ONNX Runtime calibrate (Migacz 2017): clipped values count in the end bins of the histogram, not of the grid; a level's
    count is shared by those of its bins that are not empty.
    """
    inside = counts[first:last].astype(np.float64)
    clipped = inside.copy()
    clipped[0] += counts[:first].sum()
    clipped[-1] += counts[last:].sum()
    edges = np.arange(levels) * len(inside) // levels
    filled = clipped > 0
    shared = np.add.reduceat(inside, edges) / np.maximum(np.add.reduceat(filled.astype(np.float64), edges), 1)
    grid = np.repeat(shared, np.diff([*edges, len(inside)])) * filled
    p, q = clipped[filled] / clipped.sum(), np.maximum(grid[filled] / max(grid.sum(), 1), LEAST_SHARE)
    return float((p * np.log(p / q)).sum())


def on_grid(scheme: Scheme, weight: torch.Tensor) -> torch.Tensor:
    """The weight (out, in) as its scheme stores it, read back: NumPy's numbers, on the device that the weight is on.

    A scheme of another package is asked itself, on the CPU.
    """
    if type(scheme).quantize_weight not in (StaticInt8.quantize_weight, BlockWeights.quantize_weight):
        integers, scale = scheme.quantize_weight(weight.detach().cpu().numpy())
        return torch.from_numpy(dequantize(integers, scale, scheme.precision.weights.group_size)).to(weight.device)
    (rows, columns), top = weight.shape, limits(scheme.precision.weights)[1]
    size = scheme.precision.weights.group_size or columns
    blocks = F.pad(weight.detach(), (0, -columns % size)).reshape(rows, -1, size)
    largest = blocks.abs().amax(dim=2, keepdim=True)
    scale = (largest / torch.full_like(largest, top)).clamp_min(torch.finfo(torch.float32).tiny)  # by a number, CUDA would multiply
    return ((blocks / scale).round_().clamp_(-top, top) * scale).reshape(rows, -1)[:, :columns]


class FakeQuantizer:
    """A `Linear` with the arithmetic of the built engine: inputs on their grid, weights on theirs, float sums.

    A grid that is found in each call is that of `batch` samples of the inputs, one after the other: what the engine gets at a time.
    """

    def __init__(self, schemes: Mapping[str, str], ranges: ActivationRanges | None, batch: int = 1) -> None:
        self.schemes = {name: plugins.get("quantization", scheme) for name, scheme in schemes.items()}
        self.ranges = {name: (low, high) for name, low, high in ranges.sites} if ranges else {}
        self.batch = batch
        self.mask: torch.Tensor | None = None
        """(samples, sequence) of the inputs: 0 where a position is there only because another sample is longer."""
        self._weights: dict[str, torch.Tensor] = {}
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, name: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if name not in self.schemes:
            return plain(name, x, weight, bias)
        rounded = self.weight(name, weight)
        if x.is_floating_point() and self.schemes[name].precision.activations.kind == "int":
            x = self._activation(name, x)
        return plain(name, x, rounded, bias)

    def weight(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """What the engine multiplies by, as floats: computed at a product's first call."""
        if name not in self._weights:
            self._weights[name] = on_grid(self.schemes[name], weight)
        return self._weights[name]

    def _activation(self, name: str, x: torch.Tensor) -> torch.Tensor:
        if self._last is None or self._last[0] is not x:  # query, key and value read one tensor
            scheme = self.schemes[name]
            if scheme.precision.dynamic:
                self._last = (x, self._by_call(scheme, x))
            else:
                scale, zero = scheme.activation_parameters(*self.ranges[name])
                self._last = (x, torch.fake_quantize_per_tensor_affine(x, scale, zero, *limits(scheme.precision.activations)))
        return self._last[1]

    def _by_call(self, scheme: ActivationScheme, x: torch.Tensor) -> torch.Tensor:
        """x (samples, …), each `batch` samples on the grid of their own range."""
        seen = x
        if self.mask is not None and x.dim() == 3:
            # positions that no sample of a call reaches are not there; every grid holds 0, so they may be 0 here
            present = torch.cat([part.any(0, keepdim=True).expand_as(part) for part in torch.split(self.mask.bool(), self.batch)])
            seen = x * present[..., None]
        grids = []
        for part in torch.split(seen, self.batch):
            low, high = (float(v) for v in torch.aminmax(part))
            grids += [scheme.activation_parameters(low, high)] * len(part)
        scales = torch.tensor([s for s, _ in grids], device=x.device)
        zeros = torch.tensor([z for _, z in grids], dtype=torch.int32, device=x.device)
        return torch.fake_quantize_per_channel_affine(x, scales, zeros, 0, *limits(scheme.precision.activations))


@torch.no_grad()
def calibrate(net: Supernet, space: SearchSpace, point: Candidate, target: str, batches: Iterable[Batch], method: str) -> ActivationRanges:
    """Input ranges of the candidate's quantized products over calibration batches, from its float sub-network."""
    quantized = network.quantized_weights(net.family, net.config, space, point, target)
    observer = Observer({name: scheme for name, scheme in quantized.items() if space.precision(scheme).calibrated})
    subnet = net.subnet(space, point)
    net.eval()
    if observer.sites:
        for inputs, _ in batches:
            net(inputs, subnet, observer)
    return observer.ranges(method)


@torch.no_grad()
def emulate(
    net: Supernet, space: SearchSpace, point: Candidate, target: str, batches: Iterable[Batch], ranges: ActivationRanges | None,
    batch: int = 1,
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:  # fmt: skip
    """Logits (n, labels) and labels (n,) of the candidate as its engine would compute them, called with `batch` samples at a time."""
    linear = FakeQuantizer(network.quantized_weights(net.family, net.config, space, point, target), ranges, batch)
    subnet = net.subnet(space, point)
    net.eval()
    rows = []
    for inputs, labels in batches:
        linear.mask = inputs.get(MASK)
        rows.append((net(inputs, subnet, linear).cpu().numpy(), labels.cpu().numpy()))
    return np.concatenate([r[0] for r in rows]), np.concatenate([r[1] for r in rows])


# ---------------------------------------------------------------------------------------------- importance


def importance(net: Supernet, batches: Iterable[Batch], loss: Any) -> dict[str, np.ndarray[Any, Any]]:
    """Group gene ▸ score per unit: |Σ weight · gradient| of the unit, summed over batches (first-order Taylor, Molchanov et al. 2019)."""
    family, full = net.family, net.largest()
    parameters = dict(net.model.named_parameters())
    scores = {group.gene: np.zeros(group.count) for group in family.groups(net.config)}
    net.eval()
    for inputs, labels in batches:
        net.zero_grad(set_to_none=True)
        loss(net(inputs, full), labels).backward()
        for group in family.groups(net.config):
            total = torch.zeros(group.count, device=labels.device)
            for name, axis in group.members:
                parameter = parameters[name]
                if parameter.grad is not None:
                    change = (parameter.detach() * parameter.grad).movedim(axis, 0).reshape(group.count, -1)
                    total += change.sum(dim=1)
            scores[group.gene] += total.abs().cpu().numpy()
    net.zero_grad(set_to_none=True)
    return scores


@torch.no_grad()
def reorder(net: Supernet, scores: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Sort every group's units by falling score, in place; the network's function does not change."""
    parameters = dict(net.model.named_parameters())
    for group in net.family.groups(net.config):
        order = torch.from_numpy(np.argsort(-scores[group.gene], kind="stable"))
        index = (order[:, None] * group.unit + torch.arange(group.unit)).flatten()
        for name, axis in group.members:
            parameters[name].copy_(parameters[name].index_select(axis, index.to(parameters[name].device)))


@torch.no_grad()
def layer_order(net: Supernet, batches: list[Batch], loss: Any, keep: int) -> tuple[int, ...]:
    """Layers by importance: from the full network, the layer whose removal costs least loss goes last, down to `keep`."""
    full = net.largest()
    left, removed = list(full.layers), []
    net.eval()
    while len(left) > max(keep, 1):
        costs = []
        for layer in left:
            subnet = Subnet(tuple(i for i in left if i != layer), full.values)
            costs.append((sum(float(loss(net(inputs, subnet), labels)) for inputs, labels in batches), layer))
        removed.append(min(costs)[1])
        left.remove(removed[-1])
    return (*left, *reversed(removed))


@torch.no_grad()
def zero_residuals(net: Supernet) -> None:
    """The last product of every residual block at zero, in place: each block is the identity until it learns something else."""
    parameters = dict(net.model.named_parameters())
    for segment in net.family.segments(net.config):
        if segment.layer is not None and segment.quantizable:
            last = segment.quantizable[-1]
            for name in (last, f"{last.removesuffix('.weight')}.bias"):
                if name in parameters:
                    parameters[name].zero_()


# ---------------------------------------------------------------------------------------------- extraction


@torch.no_grad()
def extract(model: Any, family: Family, config: Any, space: SearchSpace, point: Candidate) -> Any:
    """The candidate as a Hugging Face module of its own: sliced linears, dropped layers; equal to the masked super-network."""
    subnet = resolve(family, config, space, point)
    small = copy.deepcopy(model)
    for name, axes in network.slices(family, config, subnet.values).items():
        path, _, kind = name.rpartition(".")
        module = small.get_submodule(path)
        weight = getattr(module, kind).detach()
        for axis, count in axes:
            weight = weight.narrow(axis, 0, count)
        setattr(module, kind, nn.Parameter(weight.clone()))
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
    family.shrink(small, subnet.layers, subnet.values)
    small.eval()
    return small
