"""From a candidate to the integer program that a microcontroller's backend takes: weights sliced, tensors calibrated on samples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
import numpy as np

from nascompile import network, space as spaces
from nascompile.errors import ModelError, UnsupportedError
from nascompile.families import Family
from nascompile.mcu import calibrated, transformer
from nascompile.mcu.program import Logits, Program
from nascompile.records import INT8, Candidate, SearchSpace, Target

FAMILIES = ("vit", "mcu_vit")
"""Families whose networks have a program."""
_PARTS = {
    "norm1": "attention_norm", "query": "query", "key": "key", "value": "value", "out": "out",
    "norm2": "mlp_norm", "up": "fc1", "down": "fc2",
}  # fmt: skip
"""Part of a program's layer ▸ field of the family's layout."""


def lower(
    net: calibrated.Network, ranges: calibrated.Ranges, fusion: transformer.Fusion, sample: np.ndarray[Any, Any] | None = None
) -> Program:
    """The calibrated program of a network; `sample`: (channels, height, width) normalized, that its project shows."""
    numbers = calibrated.CalibratedNumbers(net, ranges)
    program = transformer.build("network", net.shape, numbers, fusion)
    pixels = net.pixels()
    structure = msgspec.structs.replace(program.structure, pixels=pixels, logits=Logits(scale=numbers.score_scale))
    return Program(structure, program.constants, None if sample is None else pixels.quantize(sample[None])[0])


def network_of(
    family: Family, config: Any, space: SearchSpace, candidate: Candidate, target: Target, weights: Mapping[str, Any],
    mean: Iterable[float], deviation: Iterable[float],
) -> calibrated.Network:  # fmt: skip
    """The candidate in plain float64 arrays; `weights`: the largest network's state dict, `mean` and `deviation` of pixels from 0 to 1.

    UnsupportedError for what has no program: another family, another precision than INT8.
    """
    if family.name not in FAMILIES:
        raise UnsupportedError(f"no microcontroller program for the family {family.name}", hint=f"families with one: {', '.join(FAMILIES)}")
    for segment in network.kept(family, config, space, candidate):
        precision = network.block_precision(space, candidate, segment, target.id)
        if segment.quantizable and segment.layer is not None and precision != INT8:
            raise UnsupportedError(
                f"{segment.name} of the candidate is {precision.name}: microcontroller programs are whole in {INT8.name}",
                hint=f'search.precisions = ["{INT8.name}"]',
            )
    graph = network.graph(family, config, space, candidate, target)
    shape, chosen = transformer.Shape.of_graph(graph, target.workload.resolution), network.values(family, config, space, candidate)
    layers = spaces.kept_layers(space, candidate)
    parameters = (_described if hasattr(family, "described") else _sliced)(family, config, weights, layers, chosen)
    return calibrated.Network(
        shape=shape, parameters=parameters, epsilon=config.layer_norm_eps, activation=getattr(config, "hidden_act", "gelu"),
        mean=tuple(mean), deviation=tuple(deviation), pool=target.workload.resolution[0] // shape.image[0],
    )  # fmt: skip


def _described(
    family: Any, config: Any, weights: Mapping[str, Any], layers: tuple[int, ...], chosen: Mapping[str, int]
) -> dict[str, np.ndarray[Any, Any]]:
    """Parameters by the names of a program, as the family describes them."""
    if missing := sorted(set(family.parameters(config)) - set(weights)):
        raise _lacks(missing[0])
    own = {name: np.asarray(weights[name], np.float64) for name in family.parameters(config)}
    found: dict[str, np.ndarray[Any, Any]] = family.described(config, own, layers, chosen).parameters
    return found


def _sliced(
    family: Any, config: Any, weights: Mapping[str, Any], layers: tuple[int, ...], chosen: Mapping[str, int]
) -> dict[str, np.ndarray[Any, Any]]:
    """Parameters by the names of a program, of an encoder with a layout."""
    shapes, layout = network.sliced_shapes(family, config, chosen), family.layout(config)
    parameters: dict[str, np.ndarray[Any, Any]] = {}

    def found(name: str) -> np.ndarray[Any, Any]:
        if name not in weights:
            raise _lacks(name)
        value = np.asarray(weights[name], np.float64)
        return value[tuple(slice(count) for count in shapes[name])]

    def put(name: str, module: str) -> None:
        for kind in ("weight", "bias"):
            if f"{module}.{kind}" in shapes:
                parameters[f"{name}.{kind}"] = found(f"{module}.{kind}")

    for number, layer in enumerate(layers):
        for part, field in _PARTS.items():
            put(f"layers.{number}.{part}", layout.at(layer, field))
    put("norm", layout.final_norm)
    put("head", layout.head[-1])
    put("embedding", f"{layout.embedding}.patch_embeddings.projection")
    kernel = parameters["embedding.weight"]  # (width, channels, rows, columns)
    parameters["embedding.weight"] = kernel.transpose(0, 2, 3, 1).reshape(len(kernel), -1)
    parameters["class_token"] = found(f"{layout.embedding}.cls_token").reshape(-1)
    parameters["position"] = found(f"{layout.embedding}.position_embeddings")[0]
    return parameters


def _lacks(name: str) -> ModelError:
    return ModelError(f"the weights have no such parameter: {name}", hint="is this the state dict of the largest network?")
