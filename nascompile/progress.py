"""Progress of long steps: what is being done, how far, and how long it will take, on stderr."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Protocol


@dataclass(frozen=True)
class Standing:
    """What a search has found so far."""

    headline: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    """The front, cheapest first."""


class Progress(Protocol):
    def stage(self, name: str, number: int, total: int) -> None:
        """A stage of the pipeline begins."""

    def step(self, label: str, done: int, total: int, limit: float = math.inf) -> None:
        """`done` of `total` units of a step are finished; it ends in `limit` seconds if not before."""

    def note(self, text: str) -> None:
        """A line worth keeping."""

    def standing(self, found: Standing) -> None:
        """A search goes on and has found this so far."""


STANDING_EVERY = 5
"""A line about what was found, which is a long one, is printed so many times more rarely than one about how far it is."""


class Silent:
    """Says nothing."""

    def stage(self, name: str, number: int, total: int) -> None: ...

    def step(self, label: str, done: int, total: int, limit: float = math.inf) -> None: ...

    def note(self, text: str) -> None: ...

    def standing(self, found: Standing) -> None: ...


class Pace:
    """How long steps still take, from the time they took so far; steps of several labels may take turns."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._starts: dict[str, tuple[float, int]] = {}

    def left(self, label: str, done: int, total: int, limit: float = math.inf) -> float | None:
        """Seconds, at most `limit`; None while no unit has been finished since the step was first heard of."""
        now = self._clock()
        began, first = self._starts.setdefault(label, (now, done))
        if done < first:  # it began again
            began, first = self._starts[label] = (now, done)
        return min((now - began) / (done - first) * (total - done), max(limit, 0.0)) if done > first else None

    def restart(self) -> None:
        """A new stage: nothing is known of its steps."""
        self._starts.clear()


class Lines:
    """Plain lines on a stream, at most one every `every` seconds a step; for logs, pipes and terminals alike."""

    def __init__(self, every: float = 2.0, stream: IO[str] | None = None) -> None:
        self.every, self.stream = every, stream or sys.stderr
        self.label, self.last, self.pace = "", 0.0, Pace()
        self.last_standing = -math.inf

    def stage(self, name: str, number: int, total: int) -> None:
        print(f"[{number}/{total}] {name}", file=self.stream, flush=True)
        self.label = ""
        self.pace.restart()

    def step(self, label: str, done: int, total: int, limit: float = math.inf) -> None:
        now, left = time.monotonic(), self.pace.left(label, done, total, limit)
        if label != self.label:
            self.label, self.last = label, now
        if now - self.last >= self.every:
            self.last = now
            print(f"      {label}: {done}/{total}{time_left(left)}", file=self.stream, flush=True)

    def note(self, text: str) -> None:
        print(f"      {text}", file=self.stream, flush=True)

    def standing(self, found: Standing) -> None:
        now = time.monotonic()
        if now - self.last_standing >= STANDING_EVERY * self.every:
            self.last_standing = now
            shown = (", ".join(map(" ".join, zip(found.columns, row, strict=True))) for row in ends(found.rows))
            self.note(f"{found.headline}: {'; '.join(shown)}")


def ends(rows: tuple[tuple[str, ...], ...]) -> tuple[tuple[str, ...], ...]:
    """The first and the last row."""
    return rows if len(rows) < 2 else (rows[0], rows[-1])


def time_left(seconds: float | None) -> str:
    """`, 3 min 05 s left`; nothing while it is not known."""
    return "" if seconds is None else f", {_duration(seconds)} left"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
