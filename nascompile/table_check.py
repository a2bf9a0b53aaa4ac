"""Whether a latency table is sound: what no profile writes, but an edited, merged or foreign file may hold."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from nascompile import latency_table
from nascompile.errors import TableError
from nascompile.records import LatencyTable, Quantity, Residual

CLOSE = 1e-6
"""Relative difference that is rounding."""


def check(table: LatencyTable, hint: str = "") -> None:
    """TableError naming every fault of the table; `hint`: what to do where profiling here is not it."""
    if found := faults(table):
        again = f"make a new one: `nascompile profile --fresh --device {table.target.device} --backend {table.target.backend}`"
        raise TableError(
            f"the latency table is not sound: {len(found)} {'fault' if len(found) == 1 else 'faults'}", detail="\n".join(found),
            hint=hint or again,
        )  # fmt: skip


def faults(table: LatencyTable) -> tuple[str, ...]:
    """What is wrong, a line each; empty for a sound table."""
    return (*_of_rows(table), *_of_numbers(table), *_of_networks(table), *_of_interval(table))


def _of_rows(table: LatencyTable) -> Iterator[str]:
    if not table.rows:
        yield "no rows"
    for operator, count in Counter(row.operator for row in table.rows).items():
        if count > 1:
            yield f"{count} rows of one operator: {operator.label}"
    for row in table.rows:
        yield from (f"{row.operator.label}: {fault}" for fault in _of_quantity(row.latency))
        places = [place for place, _ in row.reach]
        if not all(map(math.isfinite, itertools.chain(*row.reach))) or not _ascending(places, strictly=True) or row.footprint < 0:
            yield f"{row.operator.label}: its stack of {row.footprint} bytes or its line over {_listed(places)} cannot be"
    if table.call is not None:
        yield from (f"call: {fault}" for fault in _of_quantity(table.call))


def _of_quantity(q: Quantity) -> Iterator[str]:
    """Faults of a latency. 0 ms is none: what a call costs is taken off, and of a small block nothing may be left."""
    if q.unit != "ms":
        yield f"its unit is {q.unit}, not ms"
    if not math.isfinite(q.value) or q.value < 0:
        yield f"not a latency: {q.value} ms"
    if q.n < 1:
        yield f"rests on {q.n} samples"
    levels, values = [level for level, _ in q.quantiles], [value for _, value in q.quantiles]
    if not all(0 < level < 1 for level in levels) or not _ascending(levels, strictly=True):
        yield f"quantile levels are not ascending between 0 and 1: {_listed(levels)}"
    if not all(map(math.isfinite, values)) or not _ascending(values):
        yield f"quantiles are not ascending: {_listed(values)} ms"
    elif values and not values[0] * (1 - CLOSE) <= q.value <= values[-1] * (1 + CLOSE):
        yield f"{q.value:g} ms lies outside its quantiles, {values[0]:g} to {values[-1]:g} ms"


def _of_numbers(table: LatencyTable) -> Iterator[str]:
    if not math.isfinite(table.scale) or table.scale <= 0:
        yield f"scale is {table.scale}"
    if table.correction:
        c = table.correction
        numbers = (*(v for _, v in (*c.factors, *c.block_ms)), c.change_ms, *itertools.chain(*c.reach))
        if not all(map(math.isfinite, numbers)) or any(f <= 0 for _, f in c.factors):
            yield f"its correction is not a number or takes a group of rows for free: {c}"
        if not _ascending([place for place, _ in c.reach], strictly=True):
            yield f"the points of its correction do not ascend: {_listed([place for place, _ in c.reach])}"
    for name in ("relative_error", "absolute_error_ms", "drift", "seconds"):
        value = getattr(table, name)
        if not math.isfinite(value) or value < 0:
            yield f"{name} is {value}"


def _of_networks(table: LatencyTable) -> Iterator[str]:
    for part, residuals in (("calibration", table.calibration), ("validation", table.validation)):
        for r in residuals:
            if not math.isfinite(r.predicted_ms) or r.predicted_ms <= 0:
                yield f"{part} network {r.candidate.id}: predicted {r.predicted_ms} ms"
            if r.measured.value == 0:
                yield f"{part} network {r.candidate.id}: took no time"
            yield from (f"{part} network {r.candidate.id}: {fault}" for fault in _of_quantity(r.measured))


def _of_interval(table: LatencyTable) -> Iterator[str]:
    if not table.validation:
        yield "its interval rests on nothing: no whole network was timed"
        return
    if any(r.predicted_ms <= 0 for r in table.validation):
        return  # said before
    if not any(_holds(table, *implied) for implied in _implied(table.validation)):
        yield f"its interval, {latency_table.error_text(table)}, is narrower than its validation networks allow"


def _holds(table: LatencyTable, relative: float, ms: float) -> bool:
    """Whether the table's interval is as wide, at each of its networks, as one of these two parts."""
    widths = [(latency_table.half_width(table, r.predicted_ms), math.hypot(relative * r.predicted_ms, ms)) for r in table.validation]
    return all(own >= implied * (1 - CLOSE) for own, implied in widths)


def _implied(residuals: Sequence[Residual]) -> Iterator[tuple[float, float]]:
    """The intervals that the networks give by all of them, and by the quietest few: disturbed ones may have been left out."""
    quietest = sorted(residuals, key=lambda r: latency_table.noise(r.measured))
    for count in (len(quietest), *range(min(3, len(quietest)), len(quietest))):
        yield latency_table.interval_half_width(quietest[:count])


def _ascending(values: Sequence[float], strictly: bool = False) -> bool:
    return all(a < b if strictly else a <= b for a, b in itertools.pairwise(values))


def _listed(values: Iterable[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
