"""Uniformly random candidates: the control every other searcher is measured against."""

from __future__ import annotations

from typing import Any

import numpy as np

from nascompile import space as spaces
from nascompile.records import Candidate, SearchSpace
from nascompile.searchers import Problem

TRIES = 200


class RandomRun:
    def __init__(self, space: SearchSpace, population: int, first: tuple[Candidate, ...], seed: int) -> None:
        self.space, self.population, self.rng = space, population, np.random.default_rng(seed)
        self.waiting, self.seen = list(first), set(first)

    def ask(self) -> tuple[Candidate, ...]:
        for _ in range(TRIES * self.population):
            if len(self.waiting) >= self.population:
                break
            point = spaces.sample(self.space, self.rng)
            if point not in self.seen:
                self.seen.add(point)
                self.waiting.append(point)
        asked, self.waiting = self.waiting[: self.population], self.waiting[self.population :]
        return tuple(asked)

    def tell(self, points: tuple[Candidate, ...], objectives: Any, violations: Any) -> None: ...


class Random:
    name = "random"
    batch = 0

    def start(self, problem: Problem, population: int, first: tuple[Candidate, ...], seed: int) -> RandomRun:
        return RandomRun(problem.space, population, first[:2], seed)


PLUGIN = Random()
