"""The build stage: a candidate and its weights become an engine folder, checked against the emulation it was chosen by."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from nascompile import __version__, engine, lowering, network
from nascompile.backends import Backend
from nascompile.errors import UnsupportedError
from nascompile.pass_check import PassCheck, PassChecker
from nascompile.preprocess import Preprocessor
from nascompile.program_accuracy import AnyEvaluator, ProgramEvaluator
from nascompile.quantization import ActivationRanges
from nascompile.records import (
    FLOAT16,
    INT8_SYMMETRIC,
    Candidate,
    Differences,
    EngineManifest,
    Interval,
    Precision,
    SearchSpace,
    Target,
    Variant,
)
from nascompile.supernet import Supernet, emulate, load_batches

SAMPLE, CHECKED = 4, 16
"""Calibration samples kept in the engine as its reference, and those that graphs are run on between passes."""
FLOAT_TOLERANCE = 2e-3
"""Largest difference of FP32 logits between the network and its engine: orders of summation differ, nothing else does."""
HALF_SHARE, INTEGER_SHARE = 0.02, 0.3
"""Of the largest logit, what FP16 logits may differ by from the emulated network's, and those of an integer engine that nobody ran or that
another backend built. Those of a 6-layer MiniLM in ONNX Runtime FP16 differed by 0.1 %; integers by 2 % at the median and 18 % at most,
because float16 moves values across the edges of the grid. A wrong graph is further off."""


@dataclass(frozen=True)
class Source:
    """Weights to build from: a trained network and how its candidates are calibrated."""

    net: Supernet
    evaluator: AnyEvaluator


@dataclass(frozen=True)
class Parts:
    """What every engine of a run shares."""

    space: SearchSpace
    target: Target
    backend: Backend
    blueprints: Path
    preprocessor: Preprocessor
    hf_config: Mapping[str, Any]
    labels: tuple[str, ...]
    task: str
    sample: Any
    """A split's first samples, from calibration."""
    table_digest: str
    foreign: Differences = ()
    """What differs where that table is of another environment."""
    unrun: tuple[str, ...] = ()
    """Why the engine cannot be run here, and what follows from that; empty: it can, and its sample is."""


def lower(
    parts: Parts, source: Source, point: Candidate, ranges: ActivationRanges | None = None, watch: lowering.Watch | None = None
) -> Any:
    """The form the backend takes: the candidate's graph with its weights and calibrated ranges, or its integer program."""
    if isinstance(source.evaluator, ProgramEvaluator):
        sample = next(iter(parts.sample.take(np.arange(1)).arrays().values()))[0]
        return source.evaluator.program(point, ranges, sample)
    net, ranges = source.net, ranges or source.evaluator.ranges(point)
    path = lowering.export(net.family, net.config, parts.blueprints)
    blueprint = lowering.blueprint(net.family, net.config, path, parts.backend, watch)
    weights = {name: parameter.detach().numpy() for name, parameter in net.model.named_parameters()}
    return lowering.lower(blueprint, net.family, net.config, parts.space, point, parts.target, weights, ranges, parts.backend, watch)


def check_passes(parts: Parts, source: Source, point: Candidate, folder: Path) -> tuple[PassCheck, ...]:
    """What each pass does to the candidate's graph, and the graph after each in `folder`; ModelError for one that breaks it.

    UnsupportedError for a backend whose form no pass rewrites.
    """
    if parts.backend.accepts != "onnx":
        raise UnsupportedError(f"`{parts.backend.name}` takes no graph that passes could change", hint="leave --keep-intermediate out")
    inputs = load_batches(parts.sample, np.arange(min(CHECKED, len(parts.sample))), CHECKED)[0][0]
    weights = {name: parameter.detach().numpy() for name, parameter in source.net.model.named_parameters()}
    checker = PassChecker(folder, weights | {name: value.numpy() for name, value in inputs.items()})
    lower(parts, source, point, watch=checker)
    return checker.finish()


def aimed(parts: Parts, point: Candidate, target: Target, backend: Backend) -> tuple[Parts, Candidate]:
    """The same candidate with the same precisions, to be built for another target."""
    space, moved = network.moved(parts.space, point, target)
    return replace(parts, space=space, target=target, backend=backend), moved


@dataclass(frozen=True)
class Expected:
    """The reference sample's inputs, what the emulated network makes of them, and how near to that any backend must come."""

    inputs: Mapping[str, Any]
    logits: Any
    tolerance: float
    precisions: tuple[Precision, ...]
    """Of the candidate's blocks."""


def expected(parts: Parts, source: Source, point: Candidate, ranges: ActivationRanges) -> Expected:
    """What every backend's engine of the candidate is compared with."""
    net = source.net
    graph = network.graph(net.family, net.config, parts.space, point, parts.target)
    precisions = tuple(dict.fromkeys(node.operator.precision for node in graph.nodes))
    batches = _sample(parts)
    logits = emulate(net, parts.space, point, parts.target.id, batches, ranges)[0]
    tolerance = rounding_tolerance(logits) if has_integers(precisions) else _tolerance(set(precisions), logits)
    return Expected({key: value.numpy() for key, value in batches[0][0].items()}, logits, tolerance, precisions)


def _sample(parts: Parts) -> Any:
    return load_batches(parts.sample, np.arange(min(SAMPLE, len(parts.sample))), SAMPLE)


def build(
    parts: Parts, source: Source, point: Candidate, name: str, role: Any, predicted: Interval | None, folder: Path,
    ranges: ActivationRanges | None = None, variants: tuple[Variant, ...] = (),
) -> EngineManifest:  # fmt: skip
    """The engine folder, whole or not at all. A float engine must give the network's own logits on the sample, else RecordError.

    `ranges`: where the candidate's are known. `variants`: what this was chosen from.
    """
    began = time.monotonic()
    net, ranges = source.net, ranges or source.evaluator.ranges(point)
    form = lower(parts, source, point, ranges)
    graph = network.graph(net.family, net.config, parts.space, point, parts.target)
    batches = _sample(parts)
    precisions = {node.operator.precision for node in graph.nodes}
    quantized = has_integers(precisions)
    # an integer engine may round another way where the emulation sits on an edge; its own outputs are its reference if it can give any
    emulated = None if quantized and not parts.unrun else emulate(net, parts.space, point, parts.target.id, batches, ranges)[0]
    return engine.write(
        folder,
        engine.Parts(
            name=name, role=role, target=parts.target, form=form, inputs=net.family.inputs(net.config), task=parts.task,
            labels=parts.labels, config=parts.hf_config, sample={key: value.numpy() for key, value in batches[0][0].items()},
            expected=None if emulated is None else {"logits": emulated}, tolerance=_tolerance(precisions, emulated),
            preprocessing=parts.preprocessor.files(), candidate=point, executed=not parts.unrun, remarks=parts.unrun,
            space=parts.space, graph=graph, predicted=predicted, table_digest=parts.table_digest, foreign=parts.foreign,
            weights_digest=source.evaluator.weights_digest,
            versions=(*parts.backend.versions(), ("nascompile", __version__)), build_seconds=time.monotonic() - began, variants=variants,
        ),
        parts.backend,
    )  # fmt: skip


def _tolerance(precisions: set[Precision], emulated: Any) -> float:
    """What a sample's logits may differ by. An integer engine without emulated logits is compared with itself."""
    if emulated is None or precisions.isdisjoint((FLOAT16, INT8_SYMMETRIC)):
        return FLOAT_TOLERANCE
    return rounding_tolerance(emulated) if has_integers(precisions) else HALF_SHARE * max(1.0, float(np.abs(emulated).max()))


def has_integers(precisions: Collection[Precision]) -> bool:
    """Whether some weights are integers."""
    return any(precision.weights.kind == "int" for precision in precisions)


def multiplies_integers(precisions: Collection[Precision]) -> bool:
    """Whether some products are of integers."""
    return any(precision.activations.kind == "int" for precision in precisions)


def rounding_tolerance(logits: Any) -> float:
    """What logits of an integer engine may differ by where its floats are rounded another way; a wrong graph differs by more."""
    return INTEGER_SHARE * max(1.0, float(np.abs(logits).max()))
