"""Which genes belong together: a space seen as blocks whose costs and damages add up, once the genes that others depend on are fixed."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from nascompile.searchers import Problem
from nascompile.searchers.encoding import Array, Encoding

TOGETHER = 0.1
"""Two genes are of one block if what their changes cost together differs from the sum by this share of the larger one: tables also have
small costs that no two genes alone decide."""
CHECKED = 64
"""Random candidates on which sums over blocks are compared with prices."""
LARGEST = 256
"""Options of a block; genes that would make more are blocks of their own, whose costs then only about add up."""


@dataclass(frozen=True)
class Block:
    """Positions of the genome that are chosen together, and every combination of their choices."""

    slots: tuple[int, ...]
    options: tuple[tuple[int, ...], ...]

    def shape(self, encoding: Encoding) -> tuple[int, ...]:
        """Choices of each position: options are in the order of an array of this shape."""
        return tuple(int(encoding.sizes[slot]) for slot in self.slots)


class Blocks:
    """A problem's blocks, found from its prices: two genes are of one block if their costs do not about add up.

    Root genes (depth: others require a value of them) are of no block; each combination of theirs is a network of its own.
    """

    def __init__(self, problem: Problem, encoding: Encoding) -> None:
        self.problem, self.encoding = problem, encoding
        self.roots = sorted({root for needed in encoding.requires for root, _ in needed})
        self._prices: dict[bytes, tuple[float, ...]] = {}
        self._values: dict[bytes, tuple[float, ...]] = {}
        self._tables: dict[bytes, tuple[Array, list[Array]]] = {}

    def price(self, row: Array) -> Array:
        """Known costs (m,) of a candidate."""
        if self.problem.values is None:
            return np.array(self._price(row)[1:])
        key = row.astype(np.int16).tobytes()
        if key not in self._values:
            self._values[key] = tuple(value for value in self.problem.values(self.encoding.decode(row)) if value is not None)
        return np.array(self._values[key])

    def over(self, rows: Array) -> Array:
        """(n,) sums of relative excesses over the budgets of costs."""
        return np.array([self._price(row)[0] for row in rows]) if self.problem.bounded else np.zeros(len(rows))

    def _price(self, row: Array) -> tuple[float, ...]:
        """(excess over budgets, known costs, …), remembered."""
        key = row.astype(np.int16).tobytes()
        if key not in self._prices:
            price = self.problem.price(self.encoding.decode(row))
            self._prices[key] = (price.over, *(value for value in price.objectives if value is not None))
        return self._prices[key]

    @cached_property
    def top(self) -> Array:
        """The largest candidate: architecture genes at their last choice, precision genes at their first (float)."""
        return np.array([len(g.choices) - 1 if g.kind == "architecture" else 0 for g in self.encoding.genes], dtype=np.int64)

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """All blocks, by position; a gene with one choice is in none."""
        free = [n for n, size in enumerate(self.encoding.sizes) if size > 1 and n not in self.roots]
        owner = {n: n for n in free}
        base = self.price(self.top)
        alone = {n: self.price(self.changed(self.top, (n,), (self._other(n),))) - base for n in free}
        for a, b in itertools.combinations(free, 2):
            together = self.price(self.changed(self.top, (a, b), (self._other(a), self._other(b)))) - base
            larger = np.maximum(np.abs(alone[a]), np.abs(alone[b]))
            if (np.abs(together - alone[a] - alone[b]) > TOGETHER * larger + 1e-9 * np.abs(base)).any():
                old, new = owner[b], owner[a]
                owner = {n: new if o == old else o for n, o in owner.items()}
        groups: dict[int, list[int]] = {}
        for n in free:
            groups.setdefault(owner[n], []).append(n)
        parts: list[list[int]] = []
        for slots in groups.values():
            parts += [slots] if math.prod(int(self.encoding.sizes[n]) for n in slots) <= LARGEST else [[n] for n in slots]
        return tuple(Block(tuple(slots), tuple(itertools.product(*(range(int(self.encoding.sizes[n])) for n in slots)))) for slots in parts)

    def changed(self, row: Array, slots: tuple[int, ...], values: tuple[int, ...]) -> Array:
        """The candidate with other values at some positions."""
        other = row.copy()
        other[list(slots)] = values
        found: Array = self.encoding.canonical(other[None])[0]
        return found

    def crowns(self) -> list[Array]:
        """The largest candidate of every combination of root genes, the whole network first."""
        combinations = itertools.product(*(reversed(range(int(self.encoding.sizes[root]))) for root in self.roots))
        return [self.changed(self.top, tuple(self.roots), values) for values in combinations]

    def costs(self, crown: Array, block: Block) -> Array:
        """(options, m): known costs of each option of a block beyond those of the crown's own."""
        base = self.price(crown)
        return np.array([self.price(self.changed(crown, block.slots, option)) - base for option in block.options])

    def prices(self, rows: Array) -> Array:
        """(n, m) known costs of many candidates, to one percent: sums over blocks where costs about add up, else one by one."""
        if not self.additive:
            return np.array([self.price(row) for row in rows])
        return self._sums(rows)

    @cached_property
    def additive(self) -> bool:
        """Whether sums over blocks are the costs to one percent, tried on random candidates."""
        tried = self.encoding.sample(np.random.default_rng(0), CHECKED)
        exact = np.array([self.price(row) for row in tried])
        return bool(np.allclose(self._sums(tried), exact, rtol=0.01, atol=1e-12))

    def _sums(self, rows: Array) -> Array:
        """(n, m) sums over blocks."""
        crowns, inverse = np.unique(rows[:, self.roots], axis=0, return_inverse=True)
        found = np.zeros((len(rows), len(self.price(self.top))))
        for number, values in enumerate(crowns):
            key = values.tobytes()
            if key not in self._tables:
                crown = self.changed(self.top, tuple(self.roots), tuple(int(v) for v in values))
                self._tables[key] = crown, [self.costs(crown, block) for block in self.blocks]
            crown, costs = self._tables[key]
            members = np.flatnonzero(inverse.ravel() == number)
            found[members] = self.price(crown)
            for block, table in zip(self.blocks, costs, strict=True):
                found[members] += table[np.ravel_multi_index(tuple(rows[members][:, list(block.slots)].T), block.shape(self.encoding))]
        return found

    def active(self, crown: Array) -> list[Block]:
        """Blocks that have any effect under a combination of root genes."""
        there = self.encoding.active(crown[None])[0]
        return [block for block in self.blocks if there[list(block.slots)].any()]

    def _other(self, slot: int) -> int:
        """A choice of a gene that is not the largest candidate's."""
        return 0 if self.top[slot] else int(self.encoding.sizes[slot]) - 1
