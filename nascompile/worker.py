"""One worker of a search: it loads the super-network and the samples once, then scores what it is sent.

As a process (`python -m nascompile.worker`) it talks in lines of JSON over its pipes; as an actor of Ray it is the class `Remote`.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import msgspec

import nascompile
from nascompile.errors import NascompileError
from nascompile.records import Candidate, Pairs, Record, Score, SearchSpace, Target, encode

SPLITS = ("calibration", "validation")
"""All that a worker reads of the data."""


class Bench(Record, frozen=True):
    """What a worker loads once: weights, and the samples and settings that candidates are scored with."""

    weights: str
    """Folder of the super-network."""
    data: str
    """Folder of the splits."""
    family: str
    space: SearchSpace
    task: str
    metric: str
    method: str
    calibration_samples: int
    validation_samples: int
    seed: int
    batch: int
    program: Target | None = None
    """What is scored are integer programs for this target; None: graphs."""


class Job(Record, frozen=True):
    """One evaluation: a candidate with the precisions it has on one target."""

    candidate: Candidate
    target: str = ""
    """Target id; empty: the space's first."""


class Fault(Record, frozen=True):
    """An error on its way to the process that asked: an expected one by its class, else its traceback."""

    kind: str
    message: str
    hint: str = ""
    detail: str = ""


class Answer(Record, frozen=True):
    """What a job came to; the first one says that the worker is ready, and what it runs on."""

    score: Score | None = None
    seconds: float = 0.0
    fault: Fault | None = None
    versions: Pairs = ()


def versions() -> Pairs:
    """What has to be the same wherever candidates of one search are scored."""
    import numpy as np
    import torch

    return (("nascompile", nascompile.__version__), ("numpy", np.__version__), ("torch", str(torch.__version__)))


def load(bench: Bench) -> Callable[[Job], Answer]:
    """The super-network, ready to score one job after the other on one thread."""
    import torch

    from nascompile import data, plugins
    from nascompile.accuracy import Evaluator
    from nascompile.program_accuracy import ProgramEvaluator
    from nascompile.supernet import Supernet

    torch.set_num_threads(1)
    family = plugins.get("families", bench.family)
    calibration, validation = (data.opened_split(Path(bench.data), name) for name in SPLITS)
    parts = (
        Supernet(family, family.load(bench.weights)), Path(bench.weights), bench.space, plugins.get("tasks", bench.task), bench.metric,
        calibration, validation, bench.method, bench.calibration_samples, bench.validation_samples, bench.seed,
    )  # fmt: skip
    evaluator = Evaluator(*parts, bench.batch) if bench.program is None else ProgramEvaluator(*parts, bench.program)

    def answer(job: Job) -> Answer:
        began = time.monotonic()
        score = (evaluator.on(job.target) if job.target else evaluator).score(job.candidate)
        return Answer(score=score, seconds=time.monotonic() - began)

    return answer


def guarded(call: Callable[..., Answer], *arguments: Any) -> Answer:
    """The call's answer, or the fault it ended in."""
    try:
        return call(*arguments)
    except NascompileError as error:
        return Answer(fault=Fault(kind=type(error).__name__, message=error.message, hint=error.hint, detail=error.detail))
    except Exception:
        return Answer(fault=Fault(kind="", message=traceback.format_exc()))


# ---------------------------------------------------------------------------------------------- a process


def main() -> None:
    """Answer every line of standard input with one on standard output; end with the process that asks, in whatever way that ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # libraries may print
    questions = _questions()
    score: Callable[[Job], Answer]

    def ready(line: bytes) -> Answer:
        nonlocal score
        score = load(msgspec.json.decode(line, type=Bench))
        return Answer(versions=versions())

    first = True
    try:
        for line in questions:
            reply = guarded(ready, line) if first else guarded(lambda asked: score(msgspec.json.decode(asked, type=Job)), line)
            first = False
            answers.write(encode(reply) + b"\n")
            answers.flush()
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # the interpreter's own end would wait for the thread that listens, and abort


def _questions() -> Iterator[bytes]:
    """Lines of standard input. Where it ends the process does too, in the middle of its work: nobody is left to want that."""
    lines: SimpleQueue[bytes] = SimpleQueue()

    def listen() -> None:
        for line in sys.stdin.buffer:
            lines.put(line)
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    while True:
        yield lines.get()


# ---------------------------------------------------------------------------------------------- an actor of Ray


def files_of(bench: Bench) -> list[tuple[str, bytes]]:
    """(relative path, content) of what a worker reads, for machines that do not share a disk; no other split is among them."""
    found = [(f"weights/{path.name}", path.read_bytes()) for path in sorted(Path(bench.weights).iterdir()) if path.is_file()]
    home = Path(bench.data)
    wanted = [home / name for name in ("data.json", "access.jsonl")]
    wanted += [path for folder in ("preprocessor", *SPLITS) for path in sorted((home / folder).rglob("*")) if path.is_file()]
    return found + [(f"data/{path.relative_to(home).as_posix()}", path.read_bytes()) for path in wanted]


class Remote:
    """A worker on any node of a cluster. Everything goes in and out as bytes of JSON, but for the files."""

    def __init__(self, files: Sequence[tuple[str, bytes]], bench: bytes) -> None:
        self.files, self.bench = files, msgspec.json.decode(bench, type=Bench)
        self.work: Callable[[Job], Answer]

    def ready(self) -> bytes:
        """Load everything; an Answer. What was loaded needs no files any more, and none are left behind however the actor ends."""

        def start() -> Answer:
            with tempfile.TemporaryDirectory(prefix="nascompile-") as home:
                for name, content in self.files:
                    path = Path(home) / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content)
                self.work = load(msgspec.structs.replace(self.bench, weights=f"{home}/weights", data=f"{home}/data"))
            self.files = ()
            return Answer(versions=versions())

        return encode(guarded(start))

    def score(self, job: bytes) -> bytes:
        """An Answer to a Job."""
        return encode(guarded(self.work, msgspec.json.decode(job, type=Job)))

    def place(self) -> tuple[str, int]:
        """(host, process id)."""
        return platform.node(), os.getpid()


if __name__ == "__main__":
    main()
