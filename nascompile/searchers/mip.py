"""Puzzle's way (Bercovich et al. 2024): every block's alternatives scored one at a time in the largest network, then integer programs.

The damage of a candidate is taken to be the sum of its blocks' damages, and its costs are the sum of theirs; for every combination of the
genes that others depend on (depth), a ladder of cost bounds each gives a mixed-integer program, whose solutions are scored, cheapest
damage first. Ladders get finer until nothing new comes out; then, to be complete, random candidates.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from nascompile.records import Candidate
from nascompile.searchers import Problem
from nascompile.searchers.blocks import Block, Blocks
from nascompile.searchers.encoding import Array, Encoding

RUNGS = (16, 31, 61)
"""Cost bounds of the first ladder and of the finer ones, from the cheapest network to the largest."""
TRIES = 200
GAP, SECONDS = 1e-4, 2.0
"""Of each program."""


class MipRun:
    def __init__(self, problem: Problem, population: int, first: tuple[Candidate, ...], seed: int) -> None:
        self.problem, self.population = problem, population
        self.encoding, self.rng = Encoding(problem.space), np.random.default_rng(seed)
        self.blocks = Blocks(problem, self.encoding)
        self.first = self.encoding.encode(first)
        self.errors: dict[bytes, float] = {}
        self.asked: dict[bytes, None] = {}
        self.waiting = [*self.first[:2], *self._ablations()]
        self.left = list(RUNGS)

    def _ablations(self) -> list[Array]:
        """The largest network of every combination of root genes, and the whole network with one block changed."""
        found = self.blocks.crowns()
        for block in self.blocks.blocks:
            found += [self.blocks.changed(self.blocks.top, block.slots, option) for option in block.options]
        return found

    def ask(self) -> tuple[Candidate, ...]:
        chosen: list[Array] = []
        while len(chosen) < self.population:
            if not self.waiting and self.left and not chosen:
                self.waiting = self._solutions(self.left.pop(0))
            if not self.waiting:
                if self.left or chosen:
                    break
                self.waiting = [row for row in self.encoding.sample(self.rng, TRIES * self.population) if row.tobytes() not in self.asked]
                if not self.waiting:
                    break
            row = self.waiting.pop(0)
            if row.tobytes() not in self.asked:
                self.asked[row.tobytes()] = None
                chosen.append(row)
        if not chosen and self.left:
            return self.ask()
        return tuple(self.encoding.decode(row) for row in chosen)

    def know(self, points: tuple[Candidate, ...], objectives: Any, violations: Any) -> None:
        self.asked.update(dict.fromkeys(row.tobytes() for row in self.encoding.encode(points)))
        self.tell(points, objectives, violations)

    def tell(self, points: tuple[Candidate, ...], objectives: Any, violations: Any) -> None:
        rows = self.encoding.encode(points)
        for point, row, values in zip(points, rows, np.asarray(objectives, dtype=float), strict=True):
            price = self.problem.price(point)
            if price.over == 0 and None in price.objectives:
                self.errors[row.tobytes()] = float(values[price.objectives.index(None)])

    # ------------------------------------------------------------------------------------------ programs

    def _damage(self, row: Array, reference: float) -> float:
        """Error of an ablation beyond the whole network's; 0 where it could not be scored (over budget)."""
        return self.errors.get(row.tobytes(), reference) - reference

    def _solutions(self, rungs: int) -> list[Array]:
        """Best candidates under every bound of a ladder in each known cost, by predicted damage where they are many."""
        blocks, reference = self.blocks, self.errors.get(self.blocks.top.tobytes())
        if reference is None:
            reference = min(self.errors.values(), default=0.0)
        found: dict[bytes, Array] = {}
        for metric in range(len(blocks.price(blocks.top))):
            plans = [self._plan(crown, metric, reference) for crown in blocks.crowns()]
            low = min(plan.least for plan in plans)
            high = float(blocks.price(blocks.top)[metric])
            for bound in np.linspace(low, high, rungs):
                solved = [(plan.crown_damage + damage, row) for plan in plans if plan.least <= bound for damage, row in plan.solve(bound)]
                if solved:
                    row = min(solved, key=lambda pair: pair[0])[1]
                    found[row.tobytes()] = row
        return [row for key, row in found.items() if key not in self.asked]

    def _plan(self, crown: Array, metric: int, reference: float) -> _Plan:
        active = self.blocks.active(crown)
        costs = [self.blocks.costs(crown, block)[:, metric] for block in active]
        damages = [
            np.array([self._damage(self.blocks.changed(self.blocks.top, block.slots, option), reference) for option in block.options])
            for block in active
        ]
        base = float(self.blocks.price(crown)[metric])
        return _Plan(self.blocks, crown, active, costs, damages, base, self._damage(crown, reference))


class _Plan:
    """The choice of one option for each block of one crown."""

    def __init__(
        self, blocks: Blocks, crown: Array, active: list[Block], costs: list[Array], damages: list[Array], base: float, crown_damage: float
    ) -> None:  # fmt: skip
        self.blocks, self.crown, self.active, self.costs, self.damages, self.base = blocks, crown, active, costs, damages, base
        self.crown_damage = crown_damage
        self.least = base + sum(float(c.min()) for c in costs)

    def solve(self, bound: float) -> list[tuple[float, Array]]:
        """[(damage, candidate)] of least damage within a cost bound; none where the solver finds none in time."""
        if not self.active:
            return [(0.0, self.crown)]
        cost, damage = np.concatenate(self.costs), np.concatenate(self.damages)
        one = np.zeros((len(self.active), len(cost)))
        ends = np.cumsum([len(c) for c in self.costs])
        for number, (start, end) in enumerate(zip((0, *ends[:-1]), ends, strict=True)):
            one[number, start:end] = 1
        slack = max(0.0, bound - self.base - sum(float(c.min()) for c in self.costs))
        least = np.concatenate([c - c.min() for c in self.costs])
        solved = milp(
            damage + 1e-6 * cost / (np.abs(cost).max() or 1.0),
            constraints=[LinearConstraint(one, 1, 1), LinearConstraint(least[None], -np.inf, slack * (1 + 1e-9) + 1e-12)],
            integrality=np.ones(len(cost)), bounds=Bounds(0, 1), options={"time_limit": SECONDS, "mip_rel_gap": GAP},
        )  # fmt: skip
        if solved.x is None:
            return []
        picked = np.round(solved.x)
        row, total = self.crown, 0.0
        for block, part, own in zip(self.active, np.split(picked, ends[:-1]), self.damages, strict=True):
            option = int(part.argmax())
            row, total = self.blocks.changed(row, block.slots, block.options[option]), total + float(own[option])
        return [(total, row)]


class Mip:
    name = "mip"
    batch = 0

    def start(self, problem: Problem, population: int, first: tuple[Candidate, ...], seed: int) -> MipRun:
        return MipRun(problem, population, first, seed)


PLUGIN = Mip()
