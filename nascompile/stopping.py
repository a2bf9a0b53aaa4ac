"""When a search ends before its evaluations are used up: out of time, no better for a while, or Ctrl-C."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

import numpy as np

from nascompile import pareto

INTERRUPTED, OUT_OF_TIME = "interrupted", "out of time"
IMPROVEMENT = 1e-3
"""Relative growth of the hypervolume from which on a batch counts as better."""


class Stopping:
    """Asked before every candidate whether to go on. In its context the first Ctrl-C is a reason to stop, the second quits at once."""

    def __init__(self, deadline: float = math.inf, patience: int = 0, note: Callable[[str], None] = lambda text: None) -> None:
        self.deadline, self.patience, self.note = deadline, patience, note
        self.interrupted = False
        self.scored = 0
        """Candidates, as whoever searches counts them."""
        self.ends: list[int] = []
        """Candidates scored after each batch that had any."""
        self._before: Any = None

    def __enter__(self) -> Stopping:
        # a handler of somebody else's, or SIGINT ignored as in a shell's background, stays as it is; only the main thread may ask
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._before = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        try:
            self.note("Ctrl-C: the search ends with the candidates it is scoring now; once more quits at once")
        except RuntimeError:  # it came while a line was being printed, and a stream is not written to within itself
            return

    def go_on(self) -> bool:
        """Whether another candidate may be scored; time alone ends no search that has nothing yet."""
        return not self.interrupted and not (self.scored and time.monotonic() > self.deadline)

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def after(self, matrix: Any) -> str:
        """Why to stop after a batch; empty: no reason. `matrix`: objectives (n, m) of all scored candidates in their order.

        A batch in which none was scored says nothing and does not count.
        """
        if len(matrix) > (self.ends[-1] if self.ends else 0):
            self.ends.append(len(matrix))
        if self.interrupted:
            return INTERRUPTED
        if len(matrix) and time.monotonic() > self.deadline:
            return OUT_OF_TIME
        if 0 < self.patience < len(self.ends) and gain(matrix, self.ends[-1 - self.patience]) <= IMPROVEMENT:
            return f"no better hypervolume in {self.patience} {'batch' if self.patience == 1 else 'batches'}"
        return ""


def reference(matrix: Any) -> np.ndarray[Any, Any]:
    """The worst value of each objective (m,) and a little more, so that the worst ones win something too."""
    worst: np.ndarray[Any, Any] = np.asarray(matrix).max(axis=0)
    corner: np.ndarray[Any, Any] = worst + np.maximum(np.abs(worst), 1e-9) * 0.01
    return corner


def gain(matrix: Any, before: int) -> float:
    """By what part the hypervolume has grown since the first `before` of the candidates, both against the same reference."""
    corner = reference(matrix)
    then, now = (pareto.hypervolume(part, corner) for part in (matrix[:before], matrix))
    return now / then - 1  # the reference lies beyond every point, so one of them covers something
