"""Progress on a terminal: one line per stage, a bar with time left for the step at work."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from nascompile.progress import Pace, time_left


class Bars:
    """`progress.Progress` on stderr; a context, so that the cursor is shown again whatever happens."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        label = TextColumn("      {task.description}", markup=False)
        columns = (label, BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}", markup=False))
        self._bars = Progress(*columns, console=self._console, transient=True)
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
        self._stage, self._began = f"[{number}/{total}] {name}", time.monotonic()
        self._console.print(self._stage, markup=False, highlight=False, style="bold")

    def step(self, label: str, done: int, total: int) -> None:
        left = time_left(self._pace.left(label, done, total)).lstrip(", ")
        if label != self._label or self._task is None:
            self._end_step()
            self._label, self._task = label, self._bars.add_task(label, total=total, left="")
        self._bars.update(self._task, completed=done, total=total, left=left)

    def note(self, text: str) -> None:
        self._bars.refresh()  # what is printed is drawn above the bar as it was drawn last
        self._console.print(f"      {text}", markup=False, highlight=False)

    def _end_step(self) -> None:
        if self._task is not None:
            self._bars.remove_task(self._task)
        self._task, self._label = None, ""

    def _end_stage(self) -> None:
        seconds = time.monotonic() - self._began
        if self._stage and seconds >= 1:
            self.note(f"{seconds:.0f} s")
        self._stage = ""
