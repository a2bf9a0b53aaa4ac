"""Progress of long steps: what is being done, how far, and how long it will take, on stderr."""

from __future__ import annotations

import sys
import time
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


class Lines:
    """Plain lines on a stream, at most one every `every` seconds a step; for logs, pipes and terminals alike."""

    def __init__(self, every: float = 2.0, stream: IO[str] | None = None) -> None:
        self.every, self.stream = every, stream or sys.stderr
        self.label, self.began, self.last, self.first = "", 0.0, 0.0, 0

    def stage(self, name: str, number: int, total: int) -> None:
        print(f"[{number}/{total}] {name}", file=self.stream, flush=True)
        self.label = ""

    def step(self, label: str, done: int, total: int) -> None:
        now = time.monotonic()
        if label != self.label:
            self.label, self.began, self.last, self.first = label, now, now, done - 1
        if now - self.last >= self.every:
            self.last = now
            left = (now - self.began) / max(1, done - self.first) * (total - done)
            print(f"      {label}: {done}/{total}, {_duration(left)} left", file=self.stream, flush=True)

    def note(self, text: str) -> None:
        print(f"      {text}", file=self.stream, flush=True)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
