"""Progress on a terminal: one line per stage, a bar with time left for the step at work."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from nascompile.progress import Pace, Standing, time_left

ROWS = 10
"""Of a front, shown while it is searched."""


class _Live(Progress):
    """Bars, and above them what a search has found so far."""

    found: Standing | None = None

    def get_renderables(self) -> Iterable[RenderableType]:
        if self.found is not None:
            yield Padding(Group(Text(self.found.headline), _table(self.found)), (0, 0, 0, 6))
        yield from super().get_renderables()


def _table(found: Standing) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in found.columns:
        table.add_column(Text(name), justify="right")
    for row in spread(found.rows, ROWS):
        table.add_row(*map(Text, row))
    return table


def spread(rows: tuple[tuple[str, ...], ...], most: int) -> tuple[tuple[str, ...], ...]:
    """At most so many of the rows, evenly apart, the first and the last among them."""
    if len(rows) <= most:
        return rows
    return tuple(rows[round(i * (len(rows) - 1) / (most - 1))] for i in range(most))


class Bars:
    """`progress.Progress` on stderr; a context, so that the cursor is shown again whatever happens."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        label = TextColumn("      {task.description}", markup=False)
        columns = (label, BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}", markup=False))
        self._bars = _Live(*columns, console=self._console, transient=True)
        self._task: TaskID | None = None
        self._label = self._stage = ""
        self._began, self._pace = time.monotonic(), Pace()

    def __enter__(self) -> Bars:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end_step()
        if kind is None:
            self._end_stage()
        self._bars.stop()

    def stage(self, name: str, number: int, total: int) -> None:
        self._end_step()
        self._end_stage()
        self._pace.restart()
        self._bars.found = None
        self._stage, self._began = f"[{number}/{total}] {name}", time.monotonic()
        self._console.print(self._stage, markup=False, highlight=False, style="bold")

    def step(self, label: str, done: int, total: int, limit: float = math.inf) -> None:
        left = time_left(self._pace.left(label, done, total, limit)).lstrip(", ")
        if label != self._label or self._task is None:
            self._end_step()
            self._label, self._task = label, self._bars.add_task(label, total=total, left="")
        self._bars.update(self._task, completed=done, total=total, left=left)

    def note(self, text: str) -> None:
        self._bars.refresh()  # what is printed is drawn above the bar as it was drawn last
        self._console.print(f"      {text}", markup=False, highlight=False)

    def standing(self, found: Standing) -> None:
        self._bars.found = found

    def _end_step(self) -> None:
        if self._task is not None:
            self._bars.remove_task(self._task)
        self._task, self._label = None, ""

    def _end_stage(self) -> None:
        seconds = time.monotonic() - self._began
        if self._stage and seconds >= 1:
            self.note(f"{seconds:.0f} s")
        self._stage = ""
