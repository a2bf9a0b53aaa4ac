"""NSGA-II on a function of whole generations (Deb et al. 2002), for predictors, where the bookkeeping would cost more than they do.

Operators are pymoo's for whole numbers: simulated binary crossover and polynomial mutation, rounded after each; a child that the
population or its own generation already has is bred anew, up to a hundred times.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from pymoo.operators.survival.rank_and_crowding.metrics import calc_crowding_distance
from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting

from nascompile.searchers.encoding import Array, Encoding

CROSSED = 0.5
"""Positions that a crossover changes."""
TRIES = 100

Judge = Callable[[Array], tuple[Array, Array]]
"""Rows (n, positions) ▸ objectives (n, m), violations (n,)."""


def breed(
    encoding: Encoding, judge: Judge, population: int, generations: int, crossover: float, crossover_eta: float, mutation: float,
    mutation_eta: float, rng: np.random.Generator,
) -> Array:  # fmt: skip
    """The last generation (population, positions); `judge` sees every child once. `crossover`: of pairs, `mutation`: of children."""
    rows = _fresh(encoding.sample(rng, population), set())
    objectives, violations = judge(rows)
    kept, crowding = _survivors(objectives, violations, population)
    rows, objectives, violations = rows[kept], objectives[kept], violations[kept]
    for _ in range(generations - 1):
        children = np.empty((0, rows.shape[1]), dtype=np.int64)
        seen = {row.tobytes() for row in rows}
        for _ in range(TRIES):
            pairs = -(-(population - len(children)) // 2)
            parents = rows[_tournament(objectives, violations, crowding, 2 * pairs, rng)].reshape(2, pairs, -1)
            crossed = encoding.canonical(_crossed(parents, encoding.sizes - 1, crossover, crossover_eta, rng))
            mutated = encoding.canonical(_mutated(crossed, encoding.sizes - 1, mutation, mutation_eta, rng))
            fresh = _fresh(mutated, seen)[: population - len(children)]
            seen |= {row.tobytes() for row in fresh}
            children = np.concatenate([children, fresh])
            if len(children) == population:
                break
        if not len(children):
            break
        found, over = judge(children)
        rows, objectives = np.concatenate([rows, children]), np.concatenate([objectives, found])
        violations = np.concatenate([violations, over])
        kept, crowding = _survivors(objectives, violations, population)
        rows, objectives, violations = rows[kept], objectives[kept], violations[kept]
    return rows


def _fresh(rows: Array, seen: set[bytes]) -> Array:
    """The rows that are not `seen`, each once."""
    found = {row.tobytes(): row for row in rows}
    return np.array([row for key, row in found.items() if key not in seen], dtype=np.int64).reshape(-1, rows.shape[1])


def _survivors(objectives: Array, violations: Array, count: int) -> tuple[Array, Array]:
    """(indices of the best, their crowding distances): by rank, the last rank by crowding; what violates follows, by how much."""
    fine = np.flatnonzero(violations <= 0)
    kept: list[Array] = []
    crowding: list[Array] = []
    if len(fine):
        for layer in NonDominatedSorting().do(objectives[fine], n_stop_if_ranked=count):
            distance = calc_crowding_distance(objectives[fine[layer]])
            room = count - sum(len(found) for found in kept)
            order = np.argsort(-distance, kind="stable")[:room] if len(layer) > room else np.arange(len(layer))
            kept.append(fine[layer][order])
            crowding.append(distance[order])
    rest = np.flatnonzero(violations > 0)
    rest = rest[np.argsort(violations[rest], kind="stable")][: count - sum(len(found) for found in kept)]
    return np.concatenate([*kept, rest]).astype(np.int64), np.concatenate([*crowding, np.zeros(len(rest))])


def _tournament(objectives: Array, violations: Array, crowding: Array, count: int, rng: np.random.Generator) -> Array:
    """Winners (count,) of pairs: less violation, else dominance, else more room around them, else chance."""
    rounds = -(-2 * count // len(objectives))
    drawn = np.concatenate([rng.permutation(len(objectives)) for _ in range(rounds)])[: 2 * count]
    a, b = drawn.reshape(count, 2).T
    better, worse = (objectives[a] < objectives[b]).any(axis=1), (objectives[a] > objectives[b]).any(axis=1)
    chance = np.where(rng.random(count) < 0.5, 1, -1)
    roomier = np.where(crowding[a] == crowding[b], chance, np.where(crowding[a] > crowding[b], 1, -1))
    fine = np.where(better & ~worse, 1, np.where(worse & ~better, -1, roomier))
    less = np.where(violations[a] == violations[b], chance, np.where(violations[a] < violations[b], 1, -1))
    return np.where(np.where((violations[a] > 0) | (violations[b] > 0), less, fine) > 0, a, b)


def _crossed(parents: Array, top: Array, share: float, eta: float, rng: np.random.Generator) -> Array:
    """Two children (2 · pairs, positions) of each pair of parents (2, pairs, positions)."""
    low, high = parents.min(axis=0), parents.max(axis=0)
    shape = low.shape
    hit = (rng.random((shape[0], 1)) < share) & (rng.random(shape) < CROSSED) & (high > low)
    gap, chance = np.where(hit, high - low, 1).astype(float), rng.random(shape)

    def spread(room: Array) -> Array:
        alpha = 2.0 - (1.0 + 2.0 * room / gap) ** -(eta + 1.0)
        inner, outer = chance * alpha, 1.0 / (2.0 - chance * alpha)
        return np.asarray(np.where(chance <= 1.0 / alpha, inner, outer) ** (1.0 / (eta + 1.0)))

    first = 0.5 * (low + high - spread(low) * gap)
    second = 0.5 * (low + high + spread(top - high) * gap)
    swapped = rng.random(shape) < 0.5
    one = np.where(hit, np.where(swapped, second, first), parents[0])
    other = np.where(hit, np.where(swapped, first, second), parents[1])
    return np.asarray(np.clip(np.rint(np.concatenate([one, other])), 0, top), dtype=np.int64)


def _mutated(rows: Array, top: Array, share: float, eta: float, rng: np.random.Generator) -> Array:
    """The rows (n, positions), a share of them changed in one position on average."""
    hit = (rng.random((len(rows), 1)) < share) & (rng.random(rows.shape) < min(0.5, 1.0 / rows.shape[1])) & (top > 0)
    place, chance = rows / np.maximum(top, 1), rng.random(rows.shape)
    down = (2 * chance + (1 - 2 * chance) * (1 - place) ** (eta + 1)) ** (1 / (eta + 1)) - 1
    up = 1 - (2 * (1 - chance) + 2 * (chance - 0.5) * place ** (eta + 1)) ** (1 / (eta + 1))
    with np.errstate(invalid="ignore"):
        moved = rows + np.where(chance < 0.5, down, up) * top
    return np.asarray(np.clip(np.rint(np.where(hit, moved, rows)), 0, top), dtype=np.int64)
