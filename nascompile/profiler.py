"""Stage: fill a latency table by timing every operator of a space, in context, through the path that ships.

A block is timed as a stack of itself with about as many bytes of weights as the largest network of its precision has, so that it finds the
caches as a network leaves them: a single block, or a few, whose weights fit into a cache that the network's do not, would be too fast.
What a byte costs more in larger networks is timed by stacks of different depths. What a call of the runtime costs by itself is measured
apart, by a graph that does nothing, and taken off, so that it is counted once and not a part of it with every block. Whole networks, timed
in windows of their own, then fit a correction where that helps (`table_fit.py`) and give the table its interval, each left out in turn.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from nascompile import journal, latency_table, lowering, network, space as spaces, table_fit
from nascompile.backends import Backend
from nascompile.devices import Device, Job
from nascompile.errors import TableError, UnsupportedError
from nascompile.families import Family
from nascompile.latency_table import rescaled
from nascompile.progress import Progress, Silent
from nascompile.quantization import ActivationRanges
from nascompile.records import (
    Candidate,
    LatencyTable,
    Operator,
    OperatorGraph,
    Quantity,
    Residual,
    SearchSpace,
    TableRow,
    Target,
    digest,
)  # fmt: skip

LEAST_REPEAT, MOST_REPEAT = 4, 32
"""Copies of a block in its stack."""
DEEPEST, SMALLEST = 40, 4
"""Copies of the deepest stack of all, and what part of the largest network's weights the smallest may have."""
OCTAVES = 1.2
"""Most that two neighbouring depths may differ in bytes."""
DEPTH_SHARE = 0.75
"""Timing of such a stack, in that of a row."""
STACK_BYTES = 2**26
"""Weights of a stack beyond which more copies change nothing: they are outside the caches anyway."""
NETWORKS = 36
"""Whole networks, for the correction and, each left out in its turn, for the interval; fewer where they take long."""
FEWEST_NETWORKS, NETWORKS_SECONDS = 20, 100.0
"""Of large ones, not more than can be timed in about so many seconds."""
POOL = 100
"""Random candidates from which whole networks are picked evenly over latency; as they come, most would be alike."""
ROW_SECONDS, NETWORK_SECONDS = 0.4, 0.5
"""Timing per row and per whole network."""
NETWORK_SAMPLES = 15
"""Fewest samples of a whole network."""
BATCH_ROWS, BATCH_BYTES = 32, 2**30
"""Most rows, and most bytes of graph files, that are loaded at once."""
LOADED_BYTES = 3 * 2**30
"""Of float32 weights of whole networks that take turns."""
NOISY, DISTURBED = 0.1, 0.25
"""A row is flagged whose median lies further above its tenth percentile than this fraction, and a window timed once more in which more than
this part of the jobs is noisy."""
ANCHORS = 6
"""Operators at most that are timed in every window."""
LEAST_QUIET = 3
"""Fewest undisturbed networks that fit the scale or give the interval; with fewer, the disturbed ones count too and widen it."""
CANARY = 0.1
"""A table is refused when rows timed now differ from it by more than this fraction (median)."""
CANARY_ROWS, CANARY_SECONDS = 5, 2.0
"""How many rows are timed again, and for how long in all."""
CALL = Operator(kind="call", dims=())
"""What a call costs whatever the network; a row of the journal, a field of the table."""


@dataclass(frozen=True)
class Bench:
    """Builds and loads graphs for one target through the shipping path; holds nothing of what it made."""

    family: Family
    config: Any
    space: SearchSpace
    target: Target
    backend: Backend
    folder: Path
    """Where the exported graph is kept."""
    seed: int

    @cached_property
    def blueprint(self) -> Any:
        path = lowering.export(self.family, self.config, self.folder)
        return lowering.blueprint(self.family, self.config, path, self.backend)

    @cached_property
    def weights(self) -> dict[str, Any]:
        """Random, of the largest network: speed does not depend on them."""
        rng = np.random.default_rng(self.seed)
        found = {}
        for name, shape in self.family.parameters(self.config).items():
            gain = 1.0 if len(shape) == 1 and name.endswith(".weight") else 0.0  # of a norm
            found[name] = rng.standard_normal(shape, dtype=np.float32) * np.float32(0.05) + np.float32(gain)
        return found

    @cached_property
    def ranges(self) -> ActivationRanges:
        """About what follows a layer norm, for every quantized product."""
        sites = {p for s in self.family.segments(self.config) for p in s.quantizable}
        return ActivationRanges(method="minmax", sites=tuple((p, -4.0, 4.0) for p in sorted(sites)))

    @cached_property
    def repeated(self) -> frozenset[str]:
        """Kinds of operators that come once per layer, and so can be stacked."""
        return frozenset(s.kind for s in self.family.segments(self.config) if s.layer is not None)

    def copies(self, operator: Operator) -> int:
        """Copies of the operator in its stack; 1 for what a network has once."""
        if operator.kind not in self.repeated:
            return 1
        wanted = min(STACK_BYTES, self.largest_bytes[operator.precision.name]) / max(1, self.operator_bytes[operator])
        return max(LEAST_REPEAT, min(MOST_REPEAT, math.ceil(wanted)))

    def operator(self, operator: Operator, repeat: int, scratch: Path) -> Job:
        """A loaded stack of one operator."""
        return self._job(operator.label, self.lowered(operator, repeat), scratch)

    def lowered(self, operator: Operator, repeat: int) -> Any:
        """The ONNX model of a stack; of `CALL`, one that does next to nothing."""
        if operator == CALL:
            return _idle()
        return lowering.lower_operator(self.blueprint, self.family, self.config, operator, repeat, self.backend, self.seed)

    def network(self, candidate: Candidate, scratch: Path) -> Job:
        """A loaded whole network."""
        arguments = (self.space, candidate, self.target, self.weights, self.ranges, self.backend)
        return self._job(candidate.id, lowering.lower(self.blueprint, self.family, self.config, *arguments), scratch)

    def pick(self, table: LatencyTable, count: int) -> tuple[Candidate, ...]:
        """Whole networks for the scale and the interval."""
        return pick(self, table, count)

    def footprint(self, operator: Operator) -> int:
        """Bytes of weights of the operator's stack; 0 for what a network has once."""
        return self.copies(operator) * self.operator_bytes[operator] if operator.kind in self.repeated else 0

    @cached_property
    def operator_bytes(self) -> dict[Operator, int]:
        """Operator of the space ▸ bytes of its weights."""
        return network.operator_bytes(self.family, self.config, self.space, self.target)

    def bytes_of(self, operator: Operator) -> int:
        """Weights of the graph that times the operator."""
        return self.copies(operator) * self.operator_bytes[operator]

    @cached_property
    def largest_bytes(self) -> dict[str, int]:
        """Precision of layers ▸ bytes of the weights of the largest network's layers."""
        shapes, found = self.family.parameters(self.config), {}
        layers = [s for s in self.family.segments(self.config) if s.layer is not None]
        for precision in dict.fromkeys(o.precision for o in self.operator_bytes if o.kind in self.repeated):
            found[precision.name] = sum(network.block_bytes(s, shapes, precision) for s in layers)
        return found

    def _job(self, name: str, model: Any, scratch: Path) -> Job:
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            graphs = self.backend.build(model, self.target, Path(folder))
            runner = self.backend.load(Path(folder), graphs, self.target)
        return Job(name, runner, self._inputs(model))

    def _inputs(self, model: Any) -> dict[str, Any]:
        """Inputs of an ONNX graph at the target's workload: legal indices, ones in masks, normal numbers elsewhere."""
        rng = np.random.default_rng(self.seed)
        highs = {spec.name: spec.high for spec in self.family.inputs(self.config)}
        return {value.name: _values(value, highs.get(value.name, 0), self.target, rng) for value in model.graph.input}


def profile(
    family: Family, config: Any, space: SearchSpace, target: Target, backend: Backend, device: Device, folder: Path, seed: int,
    progress: Progress | None = None, *, seconds: float = 0.0, networks: int = NETWORKS, existing: LatencyTable | None = None,
) -> LatencyTable:  # fmt: skip
    """A table with a row for every operator of the space, from `existing`'s rows and newly timed ones.

    `seconds`: timing in all, building not included; 0 for what the numbers of rows and networks ask for. Rows go to a journal in
    `folder` as they are finished, so a killed profile times only the others. TableError if `existing` is of another environment.
    """
    bench = Bench(family, config, space, target, backend, folder, seed)
    return fill(bench, device, progress, seconds=seconds, networks=networks, existing=existing)


def fill(
    bench: Bench, device: Device, progress: Progress | None = None, *, seconds: float = 0.0, networks: int = NETWORKS,
    existing: LatencyTable | None = None,
) -> LatencyTable:  # fmt: skip
    """The table of `profile`, from what a bench builds and a device times: here and now, or beforehand on a device elsewhere."""
    backend, target, folder, seed = bench.backend, bench.target, bench.folder, bench.seed
    if backend.accepts != "onnx":
        raise UnsupportedError(f"operators cannot be timed yet for a backend that takes {backend.accepts}: {backend.name}")
    began, progress = time.perf_counter(), progress or Silent()
    environment = device.environment(target, backend.versions())
    if existing is not None:
        latency_table.check_environment(existing, environment)
    folder.mkdir(parents=True, exist_ok=True)
    wanted = network.operators(bench.family, bench.config, bench.space, target)
    part = folder / f"rows-{digest(target, environment.must_match, seed)[:8]}.part"
    known = {row.operator: row for row in (*_rows_of(existing), *journal.read(part, TableRow))}
    count = len([o for o in wanted if o not in known])
    share = seconds / max(1e-9, ROW_SECONDS * count + NETWORK_SECONDS * networks) if seconds else 1.0
    timing = share * (ROW_SECONDS * count + NETWORK_SECONDS * networks)
    progress.note(f"{count} of {len(wanted)} operators to time, then {networks} whole networks: {timing:.0f} s of timing, and building")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        anchors = Anchors(bench, wanted, known, Path(scratch))
        references = _time_rows(bench, device, wanted, known, anchors, part, Path(scratch), ROW_SECONDS * share, progress)
        rows = tuple(known[o] for o in dict.fromkeys((*(r.operator for r in _rows_of(existing) if r.operator != CALL), *wanted)))
        rows = _reaching(bench, device, rows, known[CALL].latency.value, Path(scratch), ROW_SECONDS * share, progress)
        table = LatencyTable(target=target, environment=environment, rows=rows, call=known[CALL].latency)
        table, beside = _validate(bench, device, table, networks, anchors, Path(scratch), NETWORK_SECONDS * share, progress)
    spent = time.perf_counter() - began + (existing.seconds if existing else 0.0)
    part.unlink(missing_ok=True)
    return msgspec.structs.replace(table, drift=_drift([*references, *beside]), seconds=spent)


def canary(
    table: LatencyTable, family: Family, config: Any, space: SearchSpace, backend: Backend, device: Device, folder: Path, seed: int,
    *, count: int = CANARY_ROWS, seconds: float = CANARY_SECONDS,
) -> float:  # fmt: skip
    """Median of now / table over a few rows of the space; TableError if the machine is not as fast as it was."""
    target = table.target
    latency_table.check_environment(table, device.environment(target, backend.versions()))
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(family, config, space, target, backend, folder, seed)
    picked = to_repeat(bench, table, count)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        jobs = [bench.operator(o, bench.copies(o), Path(scratch)) for o in picked]
        found = device.time(jobs, seconds=seconds, seed=seed)
    return compare(bench, table, picked, found)


def to_repeat(bench: Bench, table: LatencyTable, count: int = CANARY_ROWS) -> tuple[Operator, ...]:
    """A few operators of the space's layers that the table has, drawn at random, the quiet ones first; TableError if it has none."""
    known = {row.operator: row.noisy for row in table.rows}
    wanted = network.operators(bench.family, bench.config, bench.space, bench.target)
    choices = [o for o in wanted if o in known and o.kind in bench.repeated]
    shuffled = [choices[i] for i in np.random.default_rng(bench.seed).permutation(len(choices))]
    if not shuffled:
        raise TableError(
            f"the latency table of {table.target.id} has no operator of this space's layers", hint="make one with `nascompile profile`"
        )
    return tuple(sorted(shuffled, key=known.__getitem__)[:count])


def compare(bench: Bench, table: LatencyTable, operators: Sequence[Operator], found: Sequence[Quantity]) -> float:
    """Median of now / table over stacks of operators that were timed again; TableError if the machine is not as fast as it was."""
    stored, call = {row.operator: row.latency.value for row in table.rows}, table.call.value if table.call else 0.0
    ratio = float(np.median([q.value / (bench.copies(o) * stored[o] + call) for o, q in zip(operators, found, strict=True)]))
    if abs(ratio - 1) > CANARY:
        raise TableError(
            f"{table.target.device} is not as fast as when its latency table was made: {ratio:.2f} times the latency",
            detail=f"median of {len(operators)} operators; accepted: {1 - CANARY:.2f} to {1 + CANARY:.2f}",
            hint="wait until the machine is idle and try again, or make a new table: `nascompile profile --fresh` with the same settings",
        )
    return ratio


# ---------------------------------------------------------------------------------------------- rows


def _time_rows(
    bench: Bench, device: Device, wanted: Sequence[Operator], known: dict[Operator, TableRow], anchors: Anchors, part: Path, scratch: Path,
    seconds: float, progress: Progress,
) -> list[float]:  # fmt: skip
    """Adds a row to `known` and the journal for every operator that has none; the reference kernel's time in each window."""
    if CALL not in known:
        _record(TableRow(operator=CALL, latency=_time_call(bench, device, scratch, seconds)), known, part)
    lacking = [o for o in wanted if o not in known]
    batches: list[list[Operator]] = list(_batches(bench, [o for o in lacking if o not in anchors.operators]))
    if lacking and not batches:
        batches = [[]]  # of the anchors alone
    references: list[float] = []
    label, done = "timing operators", 0
    for batch in batches:
        progress.step("building operators", done, len(lacking))
        operators, jobs = (*anchors.operators, *batch), [*anchors.jobs]
        for number, operator in enumerate(batch, done + sum(o not in known for o in anchors.operators)):
            progress.step("building operators", number, len(lacking))
            jobs.append(bench.operator(operator, bench.copies(operator), scratch))
        progress.step(label, done, len(lacking))
        every, length = [device.reference(), *jobs], seconds * len(jobs)
        found = device.time(every, seconds=length, seed=bench.seed)
        found = quieter(device, every, found, seconds=length, seed=bench.seed)
        references.append(found[0].value)
        pace = anchors.pace(found[1:], references[0] / references[-1])
        for operator, latency in [(o, q) for o, q in zip(operators, found[1:], strict=True) if o not in known]:
            row = rescaled(latency, pace / bench.copies(operator), less=known[CALL].latency.value / pace)
            noisy = latency_table.noise(latency) > NOISY
            _record(TableRow(operator=operator, latency=row, noisy=noisy, footprint=bench.footprint(operator)), known, part)
            done += 1
        progress.step(label, done, len(lacking))
    return references


@dataclass(frozen=True)
class Anchors:
    """Stacks that are timed in every window, which brings all windows to the speed that the machine had when the stacks' rows were timed.

    A shared machine's speed wanders within minutes (`tools/benchmarks/table_accuracy.py` prints it as `pace`), and what the network itself
    executes follows that as the network does.
    """

    bench: Bench
    wanted: Sequence[Operator]
    known: Mapping[Operator, TableRow]
    scratch: Path

    @cached_property
    def operators(self) -> tuple[Operator, ...]:
        """The largest of each kind and precision that comes once per layer, the largest first."""
        repeated = [o for o in self.wanted if o.kind in self.bench.repeated]
        largest: dict[Any, Operator] = {}
        for operator in sorted(repeated, key=lambda o: (-self.bench.family.macs(o), o.label)):
            largest.setdefault((operator.kind, operator.precision.name), operator)
        return tuple(largest.values())[:ANCHORS]

    @cached_property
    def jobs(self) -> tuple[Job, ...]:
        return tuple(self.bench.operator(o, self.bench.copies(o), self.scratch) for o in self.operators)

    def pace(self, found: Sequence[Quantity], otherwise: float = 1.0) -> float:
        """Rows' time over time now, the geometric mean; `found` begins with the anchors' quantities. `otherwise`: there are no anchors.

        1 where none has a row yet: the pace is then that of this window.
        """
        call = self.known[CALL].latency.value
        pairs = [(o, q.value) for o, q in zip(self.operators, found, strict=False) if o in self.known]
        logs = [math.log((self.bench.copies(o) * self.known[o].latency.value + call) / now) for o, now in pairs]
        if not self.operators:
            return otherwise
        return math.exp(sum(logs) / max(1, len(logs)))


def quieter(
    device: Device, jobs: Sequence[Job], found: tuple[Quantity, ...], *, seconds: float, seed: int, min_samples: int = 30
) -> tuple[Quantity, ...]:
    """A window's quantities or, where it was disturbed, those of a second one with the same jobs if that was quieter.

    Whole windows, since what else is timed in one says how fast the machine was then.
    """
    if not disturbed(found):
        return found
    second = device.time(jobs, seconds=seconds, seed=seed + 1, min_samples=min_samples)
    return min(found, second, key=lambda window: float(np.median([latency_table.noise(q) for q in window])))


def disturbed(found: Sequence[Quantity]) -> bool:
    """Whether so many jobs of a window are noisy that other users of the machine must be the reason."""
    return sum(latency_table.noise(q) > NOISY for q in found) > DISTURBED * len(found)


def _time_call(bench: Bench, device: Device, scratch: Path, seconds: float) -> Quantity:
    """Latency of a call of the runtime whose graph does next to nothing."""
    return device.time([bench.operator(CALL, 1, scratch)], seconds=seconds, seed=bench.seed)[0]


def _reaching(
    bench: Bench, device: Device, rows: tuple[TableRow, ...], call: float, scratch: Path, seconds: float, progress: Progress
) -> tuple[TableRow, ...]:
    """The rows with what they cost in networks of other sizes, by stacks of many depths of the lightest operator of each group."""
    sizes, lightest = bench.operator_bytes, dict[Any, Operator]()
    lacking = [row.operator for row in rows if row.operator in sizes and row.footprint and not row.reach]
    for operator in sorted(lacking, key=lambda o: (sizes[o], o.label)):
        lightest.setdefault(_group(operator), operator)
    stacks = [(group, o, copies) for group, o in lightest.items() for copies in _depths(bench, o)]
    if not stacks:
        return rows
    jobs = []
    for done, (_, operator, copies) in enumerate(stacks):
        progress.step("building stacks of different depths", done, len(stacks))
        jobs.append(bench.operator(operator, copies, scratch))
    progress.step("timing stacks of different depths", 0, len(stacks))
    found = device.time(jobs, seconds=seconds * DEPTH_SHARE * len(jobs), seed=bench.seed)
    progress.step("timing stacks of different depths", len(stacks), len(stacks))
    timed: dict[Any, list[tuple[int, float]]] = {}
    for (group, _, copies), latency in zip(stacks, found, strict=True):
        timed.setdefault(group, []).append((copies, max(1e-9, latency.value - call)))
    lines = {group: table_fit.reach(sizes[lightest[group]], of) for group, of in timed.items()}
    wanted = set(lacking)
    return tuple(_with_reach(r, sizes[r.operator], lines.get(_group(r.operator), ())) if r.operator in wanted else r for r in rows)


def _group(operator: Operator) -> Any:
    """What operators share whose bytes cost alike."""
    return (operator.kind, operator.precision.name, dict(operator.dims).get("sequence"))


def _with_reach(row: TableRow, size: int, line: Sequence[tuple[float, float]]) -> TableRow:
    own = latency_table.at(line, row.footprint)
    return msgspec.structs.replace(row, reach=tuple((place, size * (cost - own)) for place, cost in line))


def _depths(bench: Bench, operator: Operator) -> list[int]:
    """Copies for stacks from about the smallest network's bytes of weights to the largest's; none where they are all alike."""
    size, sizes = bench.operator_bytes[operator], bench.largest_bytes.values()
    top = min(STACK_BYTES, max(sizes), DEEPEST * size)
    low = max(size, min(sizes) // SMALLEST)
    if not 0 < size <= low < top:
        return []
    steps = math.ceil(math.log2(top / low) / OCTAVES)
    return sorted({round(low * (top / low) ** (i / steps) / size) for i in range(steps + 1)})


def _idle() -> Any:
    """One number through one operator."""
    import onnx
    from onnx import helper

    value = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 1]) for name in ("hidden", "output")]
    graph = helper.make_graph([helper.make_node("Relu", ["hidden"], ["output"])], "call", value[:1], value[1:])
    opsets = [helper.make_opsetid("", lowering.OPSET)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=helper.find_min_ir_version_for(opsets))


def _batches(bench: Bench, operators: Sequence[Operator]) -> Iterator[list[Operator]]:
    """Random batches that fit into memory together."""
    order = np.random.default_rng(bench.seed).permutation(len(operators))
    batch: list[Operator] = []
    for i in order:
        full = sum(map(bench.bytes_of, batch)) + bench.bytes_of(operators[i]) > BATCH_BYTES
        if batch and (full or len(batch) == BATCH_ROWS):
            yield batch
            batch = []
        batch.append(operators[i])
    if batch:
        yield batch


def _record(row: TableRow, known: dict[Operator, TableRow], part: Path) -> None:
    journal.append(part, row)
    known[row.operator] = row


def _rows_of(table: LatencyTable | None) -> tuple[TableRow, ...]:
    """Rows and the call of a table as they were timed: what is added is brought to their pace, and all get a new scale."""
    if table is None:
        return ()
    return table.rows if table.call is None else (*table.rows, TableRow(operator=CALL, latency=table.call))


# ---------------------------------------------------------------------------------------------- whole networks


def _validate(
    bench: Bench, device: Device, table: LatencyTable, count: int, anchors: Anchors, scratch: Path, seconds: float, progress: Progress
) -> tuple[LatencyTable, list[float]]:
    """The table with correction, interval and residuals; and the reference kernel's time beside the networks, in each of their windows."""
    picked = bench.pick(table, count)
    progress.note(f"timing {len(picked)} whole networks side by side for about {_network_seconds(bench, table, picked, seconds):.0f} s")
    found: list[Quantity] = []
    references: list[float] = []
    size = _at_once(bench)
    for start in range(0, len(picked), size):
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            jobs = []
            for done, candidate in enumerate(picked[start : start + size], start):
                progress.step("building whole networks", done, len(picked))
                jobs.append(bench.network(candidate, Path(folder)))
            progress.step("timing whole networks", start, len(picked))
            every, length = [device.reference(), *anchors.jobs, *jobs], seconds * (len(anchors.jobs) + len(jobs))
            timed = device.time(every, seconds=length, seed=bench.seed, min_samples=NETWORK_SAMPLES)
            timed = quieter(device, every, timed, seconds=length, seed=bench.seed, min_samples=NETWORK_SAMPLES)
            references.append(timed[0].value)
            pace = anchors.pace(timed[1:], references[0] / references[-1])
            found += [rescaled(latency, pace) for latency in timed[1 + len(anchors.jobs) :]]
    progress.step("timing whole networks", len(picked), len(picked))
    calibration = _residuals(bench, table, picked, found)
    undisturbed = _quiet(calibration)
    graphs = [_graph(bench, r.candidate) for r in undisturbed]
    fitted, left_out = table_fit.fit(table, graphs, [r.measured.value for r in undisturbed])
    validation = tuple(msgspec.structs.replace(r, predicted_ms=ms) for r, ms in zip(undisturbed, left_out, strict=True))
    relative, ms = latency_table.interval_half_width(validation)
    fitted = msgspec.structs.replace(
        fitted, calibration=calibration, validation=validation, relative_error=relative, absolute_error_ms=ms
    )
    return fitted, references


def _at_once(bench: Bench) -> int:
    """Whole networks that may be loaded together."""
    per = 4 * sum(math.prod(shape) for shape in bench.family.parameters(bench.config).values())
    return max(4, LOADED_BYTES // per)


def _network_seconds(bench: Bench, table: LatencyTable, picked: Iterable[Candidate], seconds: float) -> float:
    """About how long it takes to time networks: a call that warms up and one that counts, at least `NETWORK_SAMPLES` times."""
    return sum(max(seconds, 2e-3 * NETWORK_SAMPLES * _predicted(bench, table, c)) for c in picked)


def _quiet(residuals: Sequence[Residual]) -> tuple[Residual, ...]:
    """Networks whose timing was not disturbed, the others say more of the machine than of the table; all if too few are left."""
    quiet = tuple(r for r in residuals if latency_table.noise(r.measured) <= NOISY)
    return quiet if len(quiet) >= LEAST_QUIET else tuple(residuals)


def pick(bench: Bench, table: LatencyTable, count: int) -> tuple[Candidate, ...]:
    """Different candidates spread evenly over predicted latency, as many of each uniform precision as of mixed ones.

    In random order, since they may not all be timed at once. Fewer than `count` where the networks take long.
    """
    rng = np.random.default_rng((bench.seed, 1))
    pools = []
    for space in (*uniform(bench.space), bench.space):
        own = {spaces.largest(space), spaces.smallest(space, space.precisions[-1].name), *(spaces.sample(space, rng) for _ in range(POOL))}
        found = [spaces.candidate(bench.space, spaces.genome(space, c)) for c in own]
        pools.append({c: _predicted(bench, table, c) for c in sorted(set(found), key=lambda c: c.id)})
    typical = [c for pool in pools for c in _evenly(pool, 3, ())]
    most = NETWORKS_SECONDS / max(1e-9, _network_seconds(bench, table, typical, NETWORK_SECONDS) / len(typical))
    count = min(count, max(FEWEST_NETWORKS, int(most)))
    chosen: dict[Candidate, None] = {}
    for number, pool in enumerate(pools):
        share = (count - len(chosen)) // (len(pools) - number)
        even = _evenly(pool, share, chosen)
        chosen |= dict.fromkeys(even)
    order = sorted(chosen, key=lambda c: c.id)
    return tuple(order[i] for i in rng.permutation(len(order)))


def uniform(space: SearchSpace) -> tuple[SearchSpace, ...]:
    """The space with each precision in all blocks that may have it; none if no block has a choice."""
    names = dict.fromkeys(name for gene in space.genes if gene.kind == "precision" and len(gene.choices) > 1 for name in gene.choices)
    found = []
    for name in names:
        held = {g.name: name if name in g.choices else g.choices[0] for g in space.genes if g.kind == "precision"}
        genes = [msgspec.structs.replace(g, choices=(held[g.name],)) if g.name in held else g for g in space.genes]
        found.append(msgspec.structs.replace(space, genes=tuple(genes)))
    return tuple(found)


def _evenly(latency: Mapping[Candidate, float], count: int, taken: Iterable[Candidate]) -> list[Candidate]:
    """Candidates nearest to evenly spaced latencies, each once, none of those taken."""
    left = {c: ms for c, ms in latency.items() if c not in set(taken)}
    low, high, chosen = min(left.values(), default=0.0), max(left.values(), default=0.0), list[Candidate]()
    for i in range(min(count, len(left))):
        place = low + (high - low) * (i + 0.5) / count
        chosen.append(min(left, key=lambda c: abs(left[c] - place)))
        del left[chosen[-1]]
    return chosen


def _predicted(bench: Bench, table: LatencyTable, candidate: Candidate) -> float:
    return latency_table.predict(table, _graph(bench, candidate)).value


def _graph(bench: Bench, candidate: Candidate) -> OperatorGraph:
    return network.graph(bench.family, bench.config, bench.space, candidate, bench.target)


def _residuals(bench: Bench, table: LatencyTable, picked: Sequence[Candidate], found: Sequence[Quantity]) -> tuple[Residual, ...]:
    pairs = zip(picked, found, strict=True)
    return tuple(Residual(candidate=c, predicted_ms=_predicted(bench, table, c), measured=q) for c, q in pairs)


# ---------------------------------------------------------------------------------------------- small things


def _values(value: Any, high: int, target: Target, rng: np.random.Generator) -> Any:
    """An array for an ONNX graph input; named dimensions are those of the workload."""
    import onnx

    tensor = value.type.tensor_type
    sizes = {"batch": target.workload.batch, "sequence": target.workload.sequence}
    shape = [sizes.get(d.dim_param, 1) if d.HasField("dim_param") else int(d.dim_value) for d in tensor.shape.dim]
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    if np.issubdtype(dtype, np.floating):
        return rng.standard_normal(shape).astype(dtype)
    return rng.integers(0, high, shape).astype(dtype) if high > 2 else np.ones(shape, dtype)


def _drift(references: Sequence[float]) -> float:
    """Largest relative change of the reference kernel between windows."""
    return max(references) / min(references) - 1 if references else 0.0
