"""A searcher asks for candidates to be scored and is told what came out: ask and tell, all objectives minimized.

What costs nothing to know (latency from a table, size, MACs) is known of any candidate beforehand; what is scarce is scoring.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from nascompile.records import Candidate, SearchSpace


@dataclass(frozen=True)
class Price:
    """What is known of a candidate without scoring it."""

    objectives: tuple[float | None, ...]
    """In the order of the problem's; None where only a score tells."""
    over: float = 0.0
    """Sum of relative excesses over the budgets of costs; a candidate with any is never scored."""


@dataclass(frozen=True)
class Problem:
    """What is searched, and what is known of it for nothing."""

    space: SearchSpace
    objectives: int
    price: Callable[[Candidate], Price]
    bounded: bool = False
    """Whether costs have budgets: without, no price is over."""
    values: Callable[[Candidate], tuple[float | None, ...]] | None = None
    """A price's objectives alone, nearly, where it takes long to tell if it is over; None where it does not."""


class Run(Protocol):
    def ask(self) -> tuple[Candidate, ...]:
        """The next candidates, at most a population of them, different from all earlier ones; none when the search has ended."""

    def tell(self, points: tuple[Candidate, ...], objectives: Any, violations: Any) -> None:
        """Objectives (n, m) and constraint violations (n,), 0 where every budget is met, of the candidates asked for.

        What a candidate over a cost's budget would score is not known: it counts as very bad.
        """


@runtime_checkable
class Informed(Run, Protocol):
    """A run that can make use of candidates it did not ask for."""

    def know(self, points: tuple[Candidate, ...], objectives: Any, violations: Any) -> None:
        """As `tell`, before the first ask: candidates that are known already, which are not to be asked for."""


class Searcher(Protocol):
    name: str
    batch: int
    """Candidates that its runs ask for at a time, after the first; 0: a population of them."""

    def start(self, problem: Problem, population: int, first: tuple[Candidate, ...], seed: int) -> Run:
        """A search that begins with some of the `first` candidates; the same arguments give the same candidates."""
