"""Our own engines: the whole network in FP32 and in uniform static INT8, lowered, built and loaded as the main job does it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import torch

from nascompile import latency_table, lowering, network as networks, plugins, space as spaces, targets
from nascompile.quantization import ActivationRanges
from nascompile.records import Candidate, SearchSpace, Target
from nascompile.supernet import Batch, Supernet, calibrate, emulate
from speed.contenders import FP32, REDUCED, Artefact, Contender, Missing, Runner, versions
from speed.networks import Array, Network, rows, sqnr

BACKENDS = ("onnxruntime", "openvino")
PRECISIONS = ("fp32", "int8")
METHODS = ("minmax", "percentile", "mse")
CHUNK = 8
LOWERING = latency_table.lowering_digest()
"""Of the code this process has imported; somebody may edit the files while it runs."""


def contenders() -> tuple[Contender, ...]:
    """One per backend and precision, and per setting that rounds floats another way."""
    found = []
    for backend, precision in itertools.product(BACKENDS, PRECISIONS):
        rounding = plugins.get("backends", backend).rounding if precision == "int8" else ()
        sessions = [{}, *({name: value} for name, values in rounding for value in values[1:])]
        found += [
            Contender(
                name=" ".join(("ours", backend, precision, *session.values())), runtime=backend, ours=True,
                form=FP32 if precision == "fp32" else REDUCED, artefact=partial(_artefact, backend, precision),
                load=partial(_load, backend, session),
            )
            for session in sessions
        ]  # fmt: skip
    return tuple(found)


def macs(network: Network, batch: int) -> int:
    """Multiply-accumulates that one call of our engines executes."""
    backend = plugins.get("backends", BACKENDS[0])
    target = _target(network, BACKENDS[0], batch, 1)
    space = networks.search_space(network.family, network.config, backend, target, "")
    graph = networks.graph(network.family, network.config, space, spaces.largest(space), target)
    return sum(network.family.macs(node.operator) for node in graph.nodes)


def _artefact(backend: str, precision: str, batch: int, threads: int) -> Artefact:
    return Artefact(
        f"ours-{backend}-{precision}", partial(_make, backend, precision),
        (LOWERING, METHODS, versions(backend, "torch", "transformers")),
    )  # fmt: skip


def _target(network: Network, backend: str, batch: int, threads: int, session: Mapping[str, str] | None = None) -> Target:
    return targets.make(targets.LOCAL, backend, network.workload(batch), threads, session)


def _make(backend_name: str, precision: str, network: Network, folder: Path) -> None:
    backend = plugins.get("backends", backend_name)
    if reason := backend.unavailable():
        raise Missing(reason)
    family, config, target = network.family, network.config, _target(network, backend_name, 1, 1)
    net = Supernet(family, family.load(str(network.folder / "model")))
    space = networks.search_space(family, config, backend, target, network.folder.name)
    point = spaces.uniform(space) if precision == "int8" else spaces.largest(space)
    if precision == "int8" and not any(gene.kind == "precision" for gene in space.genes):
        raise Missing(f"{backend_name} takes no integers on this processor")
    ranges = _ranges(network, net, space, point, target.id) if precision == "int8" else None
    blueprint = lowering.blueprint(family, config, lowering.export(family, config, folder), backend)
    weights = {name: parameter.detach().numpy() for name, parameter in net.model.named_parameters()}
    backend.build(lowering.lower(blueprint, family, config, space, point, target, weights, ranges, backend), target, folder)
    if ranges:
        (folder / "ranges.json").write_bytes(msgspec.json.encode(ranges))


def _ranges(network: Network, net: Supernet, space: SearchSpace, point: Candidate, target: str) -> ActivationRanges:
    """By the method that is best on calibration samples it did not see; a search takes validation for that."""
    batches = _batches(network)
    seen, unseen = batches[: len(batches) // 2], batches[len(batches) // 2 :]
    with torch.no_grad():
        expected = np.concatenate([net(inputs, net.largest()).numpy() for inputs, _ in unseen])
    tried = [calibrate(net, space, point, target, seen, method) for method in METHODS]
    return max(tried, key=lambda ranges: sqnr(expected, emulate(net, space, point, target, unseen, ranges)[0]))


def _batches(network: Network) -> list[Batch]:
    inputs = network.samples("calibration")
    found: list[Batch] = []
    for start in range(0, len(next(iter(inputs.values()))), CHUNK):
        part = {name: torch.from_numpy(values) for name, values in rows(inputs, start, start + CHUNK).items()}
        found.append((part, torch.zeros(CHUNK, dtype=torch.long)))
    return found


def _load(backend_name: str, session: Mapping[str, str], network: Network, folder: Path, batch: int, threads: int) -> Runner:
    backend = plugins.get("backends", backend_name)
    graphs = tuple(name for name in ("model.onnx", "model.xml", "model.bin") if (folder / name).is_file())
    runner = backend.load(folder, graphs, _target(network, backend_name, batch, threads, session))

    def run(inputs: Mapping[str, Array]) -> Array:
        logits: Array = runner.run(inputs)["logits"]
        return logits

    return run
