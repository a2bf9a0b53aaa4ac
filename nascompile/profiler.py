"""Stage: fill a latency table by timing every operator of a space, in context, through the path that ships.

A block is timed as a stack of itself as deep as the largest network has blocks, so that it finds the caches as a network leaves
them: a single block, or a few, whose weights fit into a cache that the network's do not, would be too fast. What a call of the
runtime costs by itself is measured apart and taken off, so that it is counted once and not a part of it with every block. Whole
networks, timed in a window of their own, then fit a scale (where that helps) and give the table its interval.
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

from nascompile import journal, latency_table, lowering, network, space as spaces
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
    Quantity,
    Residual,
    SearchSpace,
    TableRow,
    Target,
    digest,
)  # fmt: skip

LEAST_REPEAT = 4
"""Fewest copies of a block in its stack."""
STACK_BYTES = 2**25
"""Weights of a stack beyond which more copies change nothing: they are outside the caches anyway."""
NETWORKS = 10
"""Whole networks, half for the scale and half for the interval."""
POOL = 200
"""Random candidates from which whole networks are picked evenly over latency; as they come, most would be alike."""
ROW_SECONDS, NETWORK_SECONDS = 0.4, 0.75
"""Timing per row and per whole network."""
BATCH_ROWS, BATCH_BYTES = 32, 2**30
"""Most rows, and most bytes of graph files, that are loaded at once."""
NOISY = 0.1
"""A row whose median lies further above its tenth percentile than this fraction is timed once more, and flagged if it stays so."""
ANCHORS = 4
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
        return max(LEAST_REPEAT, min(self._deepest, STACK_BYTES // self._block_bytes(operator)))

    def operator(self, operator: Operator, repeat: int, scratch: Path) -> Job:
        """A loaded stack of one operator."""
        model = lowering.lower_operator(self.blueprint, self.family, self.config, operator, repeat, self.backend, self.seed)
        return self._job(operator.label, model, scratch)

    def network(self, candidate: Candidate, scratch: Path) -> Job:
        """A loaded whole network."""
        arguments = (self.space, candidate, self.target, self.weights, self.ranges, self.backend)
        return self._job(candidate.id, lowering.lower(self.blueprint, self.family, self.config, *arguments), scratch)

    def pick(self, table: LatencyTable, count: int) -> tuple[Candidate, ...]:
        """Whole networks for the scale and the interval."""
        return pick(self, table, count)

    def bytes_of(self, operator: Operator) -> int:
        """Weights of the operator's stack, at most."""
        return self.copies(operator) * self._block_bytes(operator)

    def _block_bytes(self, operator: Operator) -> int:
        return max(1, self._parameters[operator.kind] * operator.precision.weights.bits // 8)

    @cached_property
    def _deepest(self) -> int:
        """Blocks of the largest network."""
        return sum(s.layer is not None for s in self.family.segments(self.config))

    @cached_property
    def _parameters(self) -> dict[str, int]:
        """Kind ▸ weights of its largest block."""
        shapes = self.family.parameters(self.config)
        return {s.kind: sum(math.prod(shapes[p]) for p in s.parameters) for s in self.family.segments(self.config)}

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
        table = LatencyTable(target=target, environment=environment, rows=rows, call=known[CALL].latency)
        table, reference = _validate(bench, device, table, networks, anchors, Path(scratch), NETWORK_SECONDS * share, progress)
    spent = time.perf_counter() - began + (existing.seconds if existing else 0.0)
    part.unlink(missing_ok=True)
    return msgspec.structs.replace(table, drift=_drift([*references, reference]), seconds=spent)


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
        _record(TableRow(operator=CALL, latency=_time_call(bench, device, wanted, scratch, seconds)), known, part)
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
        found = device.time([device.reference(), *jobs], seconds=seconds * len(jobs), seed=bench.seed)
        references.append(found[0].value)
        pace = anchors.pace(found[1:], references[0] / references[-1])
        latencies = _quieter(device, jobs, found[1:], seconds, bench.seed)
        for operator, latency in [(o, q) for o, q in zip(operators, latencies, strict=True) if o not in known]:
            row = rescaled(latency, pace / bench.copies(operator), less=known[CALL].latency.value / pace)
            _record(TableRow(operator=operator, latency=row, noisy=latency_table.noise(latency) > NOISY), known, part)
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


def _quieter(device: Device, jobs: Sequence[Job], found: Sequence[Quantity], seconds: float, seed: int) -> list[Quantity]:
    """Noisy latencies replaced by a second timing where that was lower: other users of the machine only ever add time."""
    latencies = list(found)
    again = [i for i, latency in enumerate(latencies) if latency_table.noise(latency) > NOISY]
    if again:
        second = device.time([jobs[i] for i in again], seconds=seconds * len(again), seed=seed + 1)
        for i, latency in zip(again, second, strict=True):
            latencies[i] = min(latencies[i], latency, key=lambda q: (q.value, latency_table.noise(q)))
    return latencies


def _time_call(bench: Bench, device: Device, wanted: Iterable[Operator], scratch: Path, seconds: float) -> Quantity:
    """Latency of a call without its blocks: where the line through a short and a shorter stack of the cheapest blocks starts.

    The cheapest block, because its caches and its noise are the smallest part of the difference.
    """
    blocks = [o for o in wanted if o.kind in bench.repeated and o.precision.weights.kind == "float"]
    if not blocks:
        return Quantity(value=0.0, unit="ms", kind="modelled")
    cheapest = sorted(blocks, key=lambda o: (bench.family.macs(o), o.label))[:2]
    jobs = [bench.operator(o, repeat, scratch) for o in cheapest for repeat in (1, LEAST_REPEAT)]
    found = device.time(jobs, seconds=seconds * len(jobs), seed=bench.seed)
    pairs = zip(found[::2], found[1::2], strict=True)
    starts = [(LEAST_REPEAT * one.value - stack.value) / (LEAST_REPEAT - 1) for one, stack in pairs]
    value = max(0.0, float(np.median(starts)))
    return Quantity(value=value, unit="ms", kind=found[0].kind, n=found[0].n, quantiles=((0.1, value), (0.5, value)))


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
) -> tuple[LatencyTable, float]:
    """The table with scale, interval and residuals; and the reference kernel's time beside the networks."""
    picked = bench.pick(table, count)
    jobs = []
    for done, candidate in enumerate(picked):
        progress.step("building whole networks", done, len(picked))
        jobs.append(bench.network(candidate, scratch))
    label = "timing whole networks"
    progress.note(f"timing {len(picked)} whole networks side by side for about {seconds * len(picked):.0f} s")
    progress.step(label, 0, len(picked))
    all_jobs = [device.reference(), *anchors.jobs, *jobs]
    reference, *beside = device.time(all_jobs, seconds=seconds * (len(all_jobs) - 1), seed=bench.seed)
    pace = anchors.pace(beside)
    first = beside[len(anchors.operators) :]
    found = [rescaled(latency, pace) for latency in _quieter(device, jobs, first, seconds, bench.seed)]
    progress.step(label, len(picked), len(picked))
    calibration = _residuals(bench, table, picked[::2], found[::2])
    scaled = msgspec.structs.replace(table, calibration=calibration, scale=latency_table.fit_scale(_quiet(calibration)))
    # a space of one or two networks has none to spare: what fitted nothing may then give the interval
    held_out = slice(1, None, 2) if len(picked) > 1 else slice(None)
    validation = _residuals(bench, scaled, picked[held_out], found[held_out])
    half = latency_table.interval_half_width(_quiet(validation))
    return msgspec.structs.replace(scaled, validation=validation, relative_error=half), reference.value


def _quiet(residuals: Sequence[Residual]) -> tuple[Residual, ...]:
    """Networks whose timing was not disturbed, the others say more of the machine than of the table; all if too few are left."""
    quiet = tuple(r for r in residuals if latency_table.noise(r.measured) <= NOISY)
    return quiet if len(quiet) >= LEAST_QUIET else tuple(residuals)


def pick(bench: Bench, table: LatencyTable, count: int) -> tuple[Candidate, ...]:
    """Different candidates, fastest first: those nearest to evenly spaced predictions, from a random pool with both extremes in it."""
    rng, space = np.random.default_rng((bench.seed, 1)), bench.space
    pool = {spaces.largest(space), spaces.smallest(space, space.precisions[-1].name), *(spaces.sample(space, rng) for _ in range(POOL))}
    latency = {c: _predicted(bench, table, c) for c in sorted(pool, key=lambda c: c.id)}
    low, high = min(latency.values()), max(latency.values())
    chosen: list[Candidate] = []
    for i in range(min(count, len(latency))):
        place = low + (high - low) * (i + 0.5) / count
        chosen.append(min((c for c in latency if c not in chosen), key=lambda c: abs(latency[c] - place)))
    return tuple(chosen)


def _predicted(bench: Bench, table: LatencyTable, candidate: Candidate) -> float:
    graph = network.graph(bench.family, bench.config, bench.space, candidate, bench.target)
    return latency_table.predict(table, graph).value


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
