"""What sums of a table's rows leave out: timed with stacks of different depths and with whole networks.

Three things matter on a processor with caches (`tools/benchmarks/table_accuracy.py` prints what they are worth):

- a network that holds many bytes of weights finds fewer of them in the caches: from some size on every byte of a block costs more, as much
  in one block as in another of its kind and precision (`reach`);
- a block that follows one of another precision takes longer than one after its like;
- rows of one kind and precision may be too fast or too slow by a common factor, those of one precision by a common time.

The last two, and what networks say of the first, are fitted to whole networks by Bayesian linear regression: the prior says that the rows
are right, give or take a few percent, and few networks move it little. It is used where it predicts left-out networks better than a scale
does; what it says of each left-out network gives the interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from scipy.optimize import nnls

from nascompile import latency_table
from nascompile.records import LatencyTable, OperatorGraph, TableCorrection

LEAST = 8
"""Fewest calibration networks for more than a scale."""
NOISE = 0.01
"""Relative standard deviation of a network's timing about its prediction."""
SCALE_PRIOR, FACTOR_PRIOR, FEW_PRIOR, CHANGE_PRIOR, BLOCK_PRIOR, BYTE_PRIOR = 0.1, 0.05, 0.15, 0.1, 0.1, 0.02
"""Standard deviations: of the common factor; a group's own; that of a group that computes one token, whose time is that of its bytes; a
change of precision and a block of a precision, in median rows; and a byte's cost per half octave of bytes, in the median time of a byte."""
CLEARLY = 1e-4
"""Mean relative error by which more terms have to predict better than fewer."""
HUBER, TURNS = 2.0, 5
"""Residuals beyond so many standard deviations lose weight, in so many turns: a disturbed network is not to bend the fit."""
@dataclass(frozen=True)
class _Design:
    """Linear model of the networks' latencies: matrix (networks, terms), and the terms' priors."""

    matrix: np.ndarray[Any, Any]
    mean: np.ndarray[Any, Any]
    deviation: np.ndarray[Any, Any]
    groups: tuple[str, ...]
    precisions: tuple[str, ...]
    knots: tuple[float, ...]
    """Logarithms to base 2 of bytes."""


def reach(size: int, stacks: Sequence[tuple[int, float]]) -> tuple[tuple[float, float], ...]:
    """(log2 of bytes, ms a byte), 0 at the first and never falling, from stacks of one operator: (copies, ms without the call).

    `size` are the bytes of a copy. Least squares of relative errors; a stack of n takes n · (a time + size · what a byte costs there).
    """
    stacks = sorted(stacks)
    if len(stacks) < 2 or not size:
        return ()
    lines = np.tri(len(stacks)) * size
    lines[:, 0] = 1.0
    lines *= np.array([copies / ms for copies, ms in stacks])[:, None]
    unit = np.linalg.norm(lines, axis=0)
    found = nnls(lines / unit, np.ones(len(stacks)))[0] / unit
    costs = np.concatenate([[0.0], np.cumsum(found[1:])])
    return tuple((math.log2(copies * size), float(cost)) for (copies, _), cost in zip(stacks, costs, strict=True))


def fit(table: LatencyTable, graphs: Sequence[OperatorGraph], measured: Sequence[float]) -> tuple[LatencyTable, list[float]]:
    """The table with the scale and the correction that predict left-out networks best, as it is where neither helps; and the networks'
    predictions (ms), each by the same terms fitted to all others.

    `graphs` and `measured` (ms) are of the networks; a correction or a scale that the table has is not looked at.
    """
    plain, times = msgspec.structs.replace(table, scale=1.0, correction=None), np.array(measured, dtype=float)
    sums = np.array([latency_table.predict(plain, g).value for g in graphs])
    left_out = {"none": sums}
    if len(times) >= 3:
        ratios = times / sums
        left_out["scale"] = sums * [float(np.median(np.delete(ratios, i))) for i in range(len(ratios))]
    design = _design(plain, graphs) if len(graphs) >= LEAST else None
    if design:
        left_out["correction"] = _left_out(design, times)
    best, errors = "none", {name: float(np.abs(found / times - 1).mean()) for name, found in left_out.items()}
    for name, error in errors.items():
        if error < errors[best] - CLEARLY:
            best = name
    if best == "correction" and design:
        plain = _corrected(plain, design, _solve(design, times, np.full(len(times), True)))
    elif best == "scale":
        plain = msgspec.structs.replace(plain, scale=float(np.median(times / sums)))
    return plain, [float(ms) for ms in left_out[best]]


def _corrected(table: LatencyTable, design: _Design, terms: np.ndarray[Any, Any]) -> LatencyTable:
    scale, change, *rest = (float(term) for term in terms)
    groups, precisions = len(design.groups), len(design.precisions)
    costs = np.concatenate([[0.0], np.cumsum(rest[groups + precisions :])]) / scale
    correction = TableCorrection(
        factors=tuple((name, 1 + term / scale) for name, term in zip(design.groups, rest[:groups], strict=True)),
        change_ms=change / scale,
        block_ms=tuple((name, term / scale) for name, term in zip(design.precisions, rest[groups : groups + precisions], strict=True)),
        reach=tuple((knot, float(cost)) for knot, cost in zip(design.knots, costs, strict=True)) if design.knots else (),
    )  # fmt: skip
    return msgspec.structs.replace(table, scale=scale, correction=correction)


def _design(table: LatencyTable, graphs: Sequence[OperatorGraph]) -> _Design:
    """Terms: everything that the table counts; a change of precision; rows of each group of layers; blocks of each precision; bytes by half
    octaves."""
    rows = {row.operator: row for row in table.rows}
    layers = [row for row in table.rows if row.footprint]
    groups = tuple(sorted({latency_table.group(row.operator) for row in layers}))
    precisions = tuple(sorted({row.operator.precision.name for row in layers}))
    sizes = [latency_table.footprint(rows, g) for g in graphs]
    ends = [math.log2(f) for f in (*sizes, *(row.footprint for row in layers)) if f]
    knots = tuple(k / 2 for k in range(math.floor(2 * min(ends)), math.ceil(2 * max(ends)) + 1)) if ends else ()
    lines, densities = [], []
    for g, size in zip(graphs, sizes, strict=True):
        of, blocks, octaves = dict.fromkeys(groups, 0.0), dict.fromkeys(precisions, 0), np.zeros(max(0, len(knots) - 1))
        for node in g.nodes:
            row = rows[node.operator]
            if row.footprint:
                of[latency_table.group(node.operator)] += latency_table.counted(table, row, size)
                blocks[node.operator.precision.name] += 1
                octaves += node.size_bytes * (_ramps(size, knots) - _ramps(row.footprint, knots))
                densities.append(row.latency.value / max(1, node.size_bytes))
        lines.append([latency_table.predict(table, g).value, latency_table.changes(g), *of.values(), *blocks.values(), *octaves])
    many = len(precisions) > 1
    typical = float(np.median([row.latency.value for row in layers])) if layers else 0.0
    own = [FEW_PRIOR if name.endswith("one token") else FACTOR_PRIOR for name in groups]
    byte = BYTE_PRIOR * float(np.median(densities)) if densities else 0.0
    changes, each = CHANGE_PRIOR * typical * many, [BLOCK_PRIOR * typical] * len(precisions)
    deviation = np.array([SCALE_PRIOR, changes, *own, *each, *[byte] * max(0, len(knots) - 1)])
    mean = np.zeros(len(deviation))
    mean[0] = 1.0
    return _Design(np.array(lines), mean, deviation, groups, precisions, knots)


def _ramps(size: float, knots: tuple[float, ...]) -> np.ndarray[Any, Any]:
    """How much of every half octave lies below so many bytes, 0 to 1."""
    found: np.ndarray[Any, Any] = np.clip(2 * (math.log2(max(1.0, size)) - np.array(knots[:-1])), 0.0, 1.0)
    return found


def _left_out(design: _Design, times: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """What the others predict of each network."""
    return np.array([design.matrix[i] @ _solve(design, times, np.arange(len(times)) != i) for i in range(len(times))])


def _solve(design: _Design, times: np.ndarray[Any, Any], used: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The terms' posterior mean by the networks that are used: iteratively reweighted least squares of relative errors."""
    free = design.deviation > 0
    matrix, times = design.matrix[used], times[used]
    scaled = matrix[:, free] * design.deviation[free] / times[:, None] / NOISE
    target, weight = (times - matrix @ design.mean) / times / NOISE, np.ones(len(times))
    unit = np.eye(int(free.sum()))
    step = np.zeros(int(free.sum()))
    for _ in range(TURNS):
        stacked = np.concatenate([scaled * weight[:, None], unit])
        step = np.linalg.lstsq(stacked, np.concatenate([target * weight, np.zeros(len(unit))]), rcond=None)[0]
        weight = np.sqrt(np.minimum(1.0, HUBER / np.maximum(np.abs(scaled @ step - target), 1e-12)))
    terms = design.mean.copy()
    terms[free] += step * design.deviation[free]
    return terms
