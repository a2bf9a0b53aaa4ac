"""Stage: fill a table for a microcontroller by counting: every operator once, in micro-networks in QEMU; nothing is timed or repeated.

Rows are exact instruction counts, kept as the milliseconds that are modelled from them. What is left to chance is how well rows add up:
whole networks with other numbers, in the plans and tiles that they have on the board, are counted too, and give the table its interval.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from nascompile import journal, latency_table, network, program_costs, space as spaces
from nascompile.devices import Device
from nascompile.devices.qemu_m7 import PLUGIN as COUNTER, quantity
from nascompile.errors import BudgetError, TableError, UnsupportedError
from nascompile.families import Family
from nascompile.mcu import micro
from nascompile.mcu.board import instructions_of
from nascompile.mcu.transformer import Fusion, RandomNumbers, Shape, build
from nascompile.program_costs import REPEATED, Chip, Taken
from nascompile.progress import Progress, Silent
from nascompile.records import (
    Candidate,
    LatencyTable,
    Operator,
    OperatorGraph,
    Residual,
    SearchSpace,
    TableRow,
    Target,
    digest,
)  # fmt: skip

NETWORKS = 12
"""Whole networks that give the interval."""
DRAWN, FITTING = 2000, 60
"""Random candidates drawn at most, and those that fit among which the networks are picked evenly over instructions."""
TOGETHER = 64
"""Most blocks of one project."""
CANARY_ROWS = 3
"""Rows that are counted again: a count that repeats needs no more."""
SLACK, SLACK_SHARE = 16, 1e-3
"""Instructions, or a share of them, by which a count may differ elsewhere: the compiler loads numbers and addresses in one or two
instructions, once or for every tile, and tokens are others where images have other channels, of which some take a few instructions more.
The interval of a prediction is ten times as wide at least."""
NUMBERS = 0
"""Seed of the micro-networks' numbers: the same for all tables, so that any profile of the same sources counts the same."""


@dataclass(frozen=True)
class Project:
    """Operators that one micro-network counts: those of one image, patch and width, in one plan."""

    shape: Shape
    fusion: Fusion
    operators: tuple[Operator, ...]

    def count(self, workshop: micro.Workshop) -> dict[Operator, int]:
        """Instructions of each operator."""
        blocks = {o: _block(o) for o in self.operators if o.kind in ("attention", "mlp")}
        counts = workshop.count(micro.build(self.shape, list(blocks.values()), self.fusion, NUMBERS))
        names = {"embedding": ("embedding",), "head": ("norm", "head")}
        found = {}
        for number, operator in enumerate(blocks):
            at = f"blocks.{number}"
            parts = ("mlp",) if operator.kind == "mlp" else ("norm1", "queries", "attention", "projection")
            found[operator] = sum(counts.get(f"{at}.{part}", 0) for part in parts)
        found |= {o: sum(counts[part] for part in names[o.kind]) for o in self.operators if o not in blocks}
        return found


@dataclass(frozen=True)
class Bench:
    """What is counted for one target."""

    family: Family
    config: Any
    space: SearchSpace
    target: Target
    seed: int

    @cached_property
    def chip(self) -> Chip:
        return Chip(self.target)

    @cached_property
    def wanted(self) -> tuple[Operator, ...]:
        return program_costs.operators(self.family, self.config, self.space, self.target)

    def graph(self, point: Candidate) -> OperatorGraph:
        return network.graph(self.family, self.config, self.space, point, self.target)

    def projects(self, operators: Iterable[Operator]) -> Iterator[Project]:
        """The operators in as few micro-networks as there are images, patches and widths, and plans of attention."""
        groups: dict[tuple[Operator, Fusion], list[Operator]] = {}
        for operator in operators:
            fusion: Fusion = "all" if REPEATED in operator.attributes else "blocks"
            groups.setdefault((self._embedding(operator), fusion), []).append(operator)
        for (embedding, fusion), members in groups.items():
            for start in range(0, len(members), TOGETHER):
                yield Project(self._shape(embedding), fusion, tuple(members[start : start + TOGETHER]))

    def _embedding(self, operator: Operator) -> Operator:
        """The embedding that makes the tokens an operator reads; for one that reads a single token, any of its width."""
        if operator.kind == "embedding":
            return operator
        dims = dict(operator.dims)
        for other in self._embeddings:
            same = other.dim("hidden") == dims["hidden"]
            if same and (dims["sequence"] == other.dim("sequence") or _one_token(operator)):
                return other
        raise TableError(f"nothing makes the tokens that an operator reads: {operator.label}")

    @cached_property
    def _embeddings(self) -> tuple[Operator, ...]:
        """Those with the fewest tokens first."""
        return tuple(sorted((o for o in self.wanted if o.kind == "embedding"), key=lambda o: (o.dim("sequence"), o.label)))

    def _shape(self, embedding: Operator) -> Shape:
        dims = dict(embedding.dims)
        side = dims.get("image", 0)
        image = (*((side, side) if side else self.target.workload.resolution), dims["channels"])
        labels = next(o.dim("labels") for o in self.wanted if o.kind == "head")
        return Shape(image=image, patch=dims["patch"], width=dims["hidden"], layers=(), classes=labels)


def profile(
    family: Family, config: Any, space: SearchSpace, target: Target, backend: Any, device: Device, folder: Path, seed: int,
    progress: Progress | None = None, *, seconds: float = 0.0, networks: int = NETWORKS, existing: LatencyTable | None = None,
) -> LatencyTable:  # fmt: skip
    """A table with a row for every operator of the space, from `existing`'s rows and newly counted ones; `seconds` is of no use here.

    Rows go to a journal in `folder`, so a killed profile counts only the others. BudgetError if no network fits the device, TableError if
    `existing` is of another environment.
    """
    began, progress, bench = time.perf_counter(), progress or Silent(), Bench(family, config, space, target, seed)
    _check(device)
    environment = device.environment(target, backend.versions())
    if existing is not None:
        latency_table.check_environment(existing, environment)
    folder.mkdir(parents=True, exist_ok=True)
    fitting = _fitting(bench)
    part = folder / f"rows-{digest(target, environment.must_match, seed)[:8]}.part"
    known = {row.operator: row for row in (*(existing.rows if existing else ()), *journal.read(part, TableRow))}
    lacking = [operator for operator in bench.wanted if operator not in known]
    projects = list(bench.projects(lacking))
    progress.note(f"{len(lacking)} of {len(bench.wanted)} operators to count in {len(projects)} micro-networks, then whole networks")
    clock, done = bench.chip.board.clock_mhz, 0
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        workshop = micro.Workshop(micro.roomy(bench.chip.board), Path(scratch))
        for project in projects:
            progress.step("counting operators", done, len(lacking))
            for operator, instructions in project.count(workshop).items():
                known[operator] = TableRow(operator=operator, latency=quantity(instructions, clock))
                journal.append(part, known[operator])
            done += len(project.operators)
        if lacking:
            progress.step("counting operators", done, len(lacking))
        rows = tuple(known[o] for o in dict.fromkeys((*(r.operator for r in (existing.rows if existing else ())), *bench.wanted)))
        table = LatencyTable(target=target, environment=environment, rows=rows)
        residuals = _networks(bench, table, fitting, networks, Path(scratch), progress)
    relative, ms = latency_table.interval_half_width(residuals)
    spent = time.perf_counter() - began + (existing.seconds if existing else 0.0)
    part.unlink(missing_ok=True)
    return msgspec.structs.replace(table, validation=residuals, relative_error=relative, absolute_error_ms=ms, seconds=spent)


def canary(
    table: LatencyTable, family: Family, config: Any, space: SearchSpace, backend: Any, device: Device, folder: Path, seed: int,
) -> float:  # fmt: skip
    """1: a few of the space's operators count what the table says, within the slack; TableError naming the first that does not."""
    _check(device)
    latency_table.check_environment(table, device.environment(table.target, backend.versions()))
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(family, config, space, table.target, seed)
    known = {row.operator: row.latency.value for row in table.rows}
    choices = [operator for operator in bench.wanted if operator in known]
    drawn = [choices[i] for i in np.random.default_rng(seed).permutation(len(choices))[:CANARY_ROWS]]
    if not drawn:
        raise TableError(f"the latency table of {table.target.id} has no operator of this space", hint="make one with `nascompile profile`")
    clock = bench.chip.board.clock_mhz
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        workshop = micro.Workshop(micro.roomy(bench.chip.board), Path(scratch))
        for project in bench.projects(drawn):
            for operator, instructions in project.count(workshop).items():
                then = instructions_of(known[operator], clock)
                if abs(instructions - then) > max(SLACK, SLACK_SHARE * then):
                    raise TableError(
                        f"a count does not repeat: {operator.label} takes {instructions:,} instructions, {then:,} in the latency table",
                        hint="make a new table: `nascompile profile --fresh` with the same settings",
                    )
    return 1.0


def _check(device: Device) -> None:
    if device.name != COUNTER.name:
        raise UnsupportedError(
            f"operators are counted in QEMU, not on a device of kind {device.name}", hint=f'a profile with kind = "{COUNTER.name}"'
        )


def _block(operator: Operator) -> micro.Block:
    dims, rank = dict(operator.dims), dict(operator.dims).get("rank", 0)
    if operator.kind == "mlp":
        return micro.mlp(dims["width"], rank, _one_token(operator))
    return micro.attention(dims["heads"], dims["head_dim"], rank, "out" in dict(operator.attributes))


def _one_token(operator: Operator) -> bool:
    """Whether what an operator reads is one token, whatever the network's sequence."""
    return operator.kind == "head" or (operator.kind == "mlp" and operator.dim("sequence") == 1)


# ---------------------------------------------------------------------------------------------- whole networks


def _fitting(bench: Bench) -> dict[Candidate, Taken]:
    """Candidates that fit the device, drawn at random, the smallest and the largest among them; BudgetError if none does."""
    rng, found = np.random.default_rng((bench.seed, 1)), dict[Candidate, Taken]()
    nearest: tuple[float, Candidate, Taken] | None = None
    for number in range(DRAWN):
        point = (spaces.smallest, spaces.largest)[number](bench.space) if number < 2 else spaces.sample(bench.space, rng)
        taken = bench.chip.takes(bench.graph(point))
        if taken.fits:
            found[point] = taken
        elif nearest is None or _excess(bench, taken) < nearest[0]:
            nearest = _excess(bench, taken), point, taken
        if len(found) == FITTING:
            break
    if not found and nearest:
        raise _too_small(bench, nearest[2])
    return found


def _excess(bench: Bench, taken: Taken) -> float:
    board = bench.chip.board
    return max(taken.ram / board.ram_bytes, taken.flash / board.flash.size)


def _too_small(bench: Bench, taken: Taken) -> BudgetError:
    board = bench.chip.board
    if taken.refused:
        return BudgetError(f"no network of the space can run on `{board.device}`: {taken.refused}", hint="another model")
    needs = f"{taken.ram:,} bytes of RAM ({board.ram_bytes:,} there) and {taken.flash:,} of flash ({board.flash.size:,} there)"
    lacks = [what for what, more in (("RAM", taken.ram > board.ram_bytes), ("flash", taken.flash > board.flash.size)) if more]
    return BudgetError(
        f"no network of the space fits `{board.device}`: of {DRAWN:,} the nearest needs {needs}",
        hint=f"a device with more {' and '.join(lacks) or 'RAM'}, or a model with smaller networks in its space",
    )


def _networks(
    bench: Bench, table: LatencyTable, fitting: dict[Candidate, Taken], count: int, folder: Path, progress: Progress
) -> tuple[Residual, ...]:
    """Whole networks with random numbers, counted on the board: what the table predicts of them, and what they are."""
    predicted = {point: latency_table.predict(table, taken.graph).value for point, taken in fitting.items()}
    workshop, clock, found = micro.Workshop(bench.chip.board, folder), bench.chip.board.clock_mhz, []
    picked = _evenly(predicted, count)
    for number, point in enumerate(picked):
        progress.step("counting whole networks", number, len(picked))
        shape = Shape.of_graph(bench.graph(point), bench.target.workload.resolution)
        fusion = bench.chip.footprints.of(shape).fusion
        instructions = sum(workshop.count(build("network", shape, RandomNumbers(bench.seed + number), fusion)).values())
        found.append(Residual(candidate=point, predicted_ms=predicted[point], measured=quantity(instructions, clock)))
    progress.step("counting whole networks", len(picked), len(picked))
    return tuple(found)


def _evenly(predicted: dict[Candidate, float], count: int) -> Sequence[Candidate]:
    """So many, spread over what is predicted."""
    order = sorted(predicted, key=lambda point: (predicted[point], point.id))
    places = np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int)
    return [order[place] for place in dict.fromkeys(places)]
