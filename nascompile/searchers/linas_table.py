"""LINAS that predicts only what a score tells: latency from the table, size and MACs are exact. The control of a fair comparison."""

from __future__ import annotations

from nascompile.records import Candidate
from nascompile.searchers import Problem
from nascompile.searchers.linas import LinasRun


class ExactRun(LinasRun):
    exact = True


class LinasTable:
    name = "linas-table"
    batch = 0

    def start(self, problem: Problem, population: int, first: tuple[Candidate, ...], seed: int) -> ExactRun:
        return ExactRun(problem, population, first, seed)


PLUGIN = LinasTable()
