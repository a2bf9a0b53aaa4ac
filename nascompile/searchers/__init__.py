"""A searcher proposes candidates and is told what they cost: ask and tell, all objectives minimized."""

from __future__ import annotations

from typing import Any, Protocol

from nascompile.records import Candidate, SearchSpace


class Run(Protocol):
    def ask(self) -> tuple[Candidate, ...]:
        """The next candidates, different from all earlier ones; none when the space is exhausted."""

    def tell(self, points: tuple[Candidate, ...], objectives: Any, violations: Any) -> None:
        """Objectives (n, m) and constraint violations (n,), 0 where every budget is met, of the candidates asked for."""


class Searcher(Protocol):
    name: str

    def start(self, space: SearchSpace, objectives: int, population: int, first: tuple[Candidate, ...], seed: int) -> Run:
        """A search that begins with some of the `first` candidates; the same arguments give the same candidates."""
