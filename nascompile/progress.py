"""Progress of long steps: what is being done, how far, and how long it will take, on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import IO, Protocol


class Progress(Protocol):
    def stage(self, name: str, number: int, total: int) -> None:
        """A stage of the pipeline begins."""

    def step(self, label: str, done: int, total: int) -> None:
        """`done` of `total` units of a step are finished."""

    def note(self, text: str) -> None:
        """A line worth keeping."""


class Silent:
    """Says nothing."""

    def stage(self, name: str, number: int, total: int) -> None: ...

    def step(self, label: str, done: int, total: int) -> None: ...

    def note(self, text: str) -> None: ...


class Pace:
    """How long steps still take, from the time they took so far; steps of several labels may take turns."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._starts: dict[str, tuple[float, int]] = {}

    def left(self, label: str, done: int, total: int) -> float | None:
        """Seconds; None while no unit has been finished since the step was first heard of."""
        now = self._clock()
        began, first = self._starts.setdefault(label, (now, done))
        if done < first:  # it began again
            began, first = self._starts[label] = (now, done)
        return (now - began) / (done - first) * (total - done) if done > first else None

    def restart(self) -> None:
        """A new stage: nothing is known of its steps."""
        self._starts.clear()


class Lines:
    """Plain lines on a stream, at most one every `every` seconds a step; for logs, pipes and terminals alike."""

    def __init__(self, every: float = 2.0, stream: IO[str] | None = None) -> None:
        self.every, self.stream = every, stream or sys.stderr
        self.label, self.last, self.pace = "", 0.0, Pace()

    def stage(self, name: str, number: int, total: int) -> None:
        print(f"[{number}/{total}] {name}", file=self.stream, flush=True)
        self.label = ""
        self.pace.restart()

    def step(self, label: str, done: int, total: int) -> None:
        now, left = time.monotonic(), self.pace.left(label, done, total)
        if label != self.label:
            self.label, self.last = label, now
        if now - self.last >= self.every:
            self.last = now
            print(f"      {label}: {done}/{total}{time_left(left)}", file=self.stream, flush=True)

    def note(self, text: str) -> None:
        print(f"      {text}", file=self.stream, flush=True)


def time_left(seconds: float | None) -> str:
    """`, 3 min 05 s left`; nothing while it is not known."""
    return "" if seconds is None else f", {_duration(seconds)} left"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
