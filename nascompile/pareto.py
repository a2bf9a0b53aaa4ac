"""Which points are worth having, and how much of the objective space they win; every objective is minimized."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether `a` is nowhere worse than `b` and somewhere better; equal points do not dominate each other."""
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))


def front(points: Any) -> tuple[int, ...]:
    """Points (n, objectives) ▸ indices, ascending, of those that no other dominates.

    Copies of such a point are all kept; a point with a NaN is never on a front.
    """
    values = np.asarray(points, dtype=np.float64)
    if values.size == 0:
        return ()
    left = np.flatnonzero(~np.isnan(values).any(axis=1))
    left = left[np.lexsort(values[left].T[::-1])]
    columns, kept = values[left].T, []
    while len(left):  # the first in lexicographic order is dominated by none of the others
        first = columns[:, :1]
        kept.append(left[(columns == first).all(axis=0)])
        better = (columns < first).any(axis=0)
        left, columns = left[better], columns[:, better]
    return tuple(np.sort(np.concatenate(kept)).tolist()) if kept else ()


def hypervolume(points: Any, reference: Any) -> float:
    """Volume that the points dominate below `reference`; 0 for none. Points beyond it in any objective win nothing."""
    corner = np.asarray(reference, dtype=np.float64)
    values = np.asarray(points, dtype=np.float64).reshape(-1, len(corner))
    inside: Any = values[(values < corner).all(axis=1)]
    return _volume(inside[list(front(inside))], corner) if len(inside) else 0.0


def _volume(points: Any, corner: Any) -> float:
    """Slices along the last objective: between two consecutive values, the volume of the points already passed in one dimension less."""
    if len(corner) == 1:
        return float(corner[0] - points.min())
    points = points[np.argsort(points[:, -1], kind="stable")]
    edges = np.append(points[:, -1], corner[-1])
    if len(corner) == 2:  # a slice is a line: all at once, because more dimensions come here for each of theirs
        return float(sum((np.diff(edges) * (corner[0] - np.minimum.accumulate(points[:, 0]))).tolist()))
    total = 0.0
    for i in range(len(points)):
        if edges[i + 1] > edges[i]:
            passed = points[: i + 1, :-1]
            total += float(edges[i + 1] - edges[i]) * _volume(passed[list(front(passed))], corner[:-1])
    return total
