"""Graphs run before and after each pass: one that must not change the function is held to it, what the others round is reported."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import onnx

from nascompile.errors import ModelError, UnsupportedError
from nascompile.lowering import Array
from nascompile.passes import Pass
from nascompile.records import Record, encode, write_atomic

TABLE = "passes.json"
FLOAT_SHARE = 1e-4
"""Of the largest output, what an exact pass may move outputs by: float32 sums in another order, through a whole network."""
ROUNDED_SHARE = 0.1
"""The same in a graph that rounds already: an input that float noise moves across the edge between two steps moves on by a whole step.
Outputs of five 6-layer MiniLMs with INT8 blocks moved by up to 4.5 %."""


class PassCheck(Record, frozen=True):
    """One pass on one network, seen by running the graph before and after it."""

    name: str
    part: Literal["structure", "candidate"]
    """Structure passes see the largest network, the others the candidate."""
    exact: bool
    """What the pass says of itself: it only reorders, or it rounds."""
    nodes: tuple[int, int]
    """Before and after."""
    max_abs: float
    """Largest change of an output."""
    sqnr_db: float | None
    """Power of the outputs before it over the power of their change; None where nothing changed."""
    accepted: float | None
    """Largest change an exact pass may make; None for one that rounds."""
    file: str
    """The graph after it; that of an earlier pass where it changed nothing."""


class PassChecker:
    """A `lowering.Watch`: writes each graph into a folder, runs it by ONNX Runtime without optimizations, compares it with the last."""

    def __init__(self, folder: Path, feed: Mapping[str, Array]) -> None:
        """`feed`: inputs of the network, and its weights, which are inputs of a graph without weights."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.folder, self.feed = folder, feed
        self.checks: list[PassCheck] = []
        self._part: Literal["structure", "candidate"] = "structure"
        self._count, self._rounded, self._started, self._file = 0, False, False, ""
        self._before: tuple[bytes, int, Array] = (b"", 0, np.zeros(0))

    def __call__(self, step: Pass | None, model: onnx.ModelProto) -> None:
        """ModelError naming an exact pass that moved an output further than reordering does."""
        if step is None:
            self._part = "candidate" if self._started else "structure"
            self._started = True
        name = {"structure": "exported", "candidate": "sliced"}[self._part] if step is None else step.name
        file = f"{self._count:02d}-{name}.onnx"
        self._count += 1
        content = model.SerializeToString(deterministic=True)
        last, nodes, before = self._before
        if content == last:
            file, after = self._file, before
        else:
            write_atomic(self.folder / file, content)
            after = run(self.folder / file, self.feed)
        self._before = (content, len(model.graph.node), after)
        if step is not None:
            check = self._compare(step, (nodes, len(model.graph.node)), before, after, file)
            self.checks.append(check)
            self._rounded |= not step.exact and check.max_abs > 0
            if check.accepted is not None and not check.max_abs <= check.accepted:  # NaN fails too
                raise ModelError(
                    f"pass {step.name} changed what the network computes: an output moved by {check.max_abs:.3g}, "
                    f"accepted is {check.accepted:.3g}",
                    detail=f"it ensures: {step.ensures}",
                    hint=f"compare {self._file} with {file} in {self.folder}",
                )
        self._file = file

    def _compare(self, step: Pass, nodes: tuple[int, int], before: Array, after: Array, file: str) -> PassCheck:
        difference = np.abs(after - before)
        share = ROUNDED_SHARE if self._rounded else FLOAT_SHARE
        power, noise = float(np.square(before).sum()), float(np.square(difference).sum())
        return PassCheck(
            name=step.name, part=self._part, exact=step.exact, nodes=nodes, max_abs=float(difference.max(initial=0.0)),
            sqnr_db=None if noise == 0 else float(10 * np.log10(max(power, 1e-30) / noise)),
            accepted=share * max(1.0, float(np.abs(before).max(initial=0.0))) if step.exact else None, file=file,
        )  # fmt: skip

    def finish(self) -> tuple[PassCheck, ...]:
        """All checks, after writing them beside the graphs."""
        write_atomic(self.folder / TABLE, msgspec.json.format(encode(self.checks), indent=1))
        return tuple(self.checks)


def run(path: Path, feed: Mapping[str, Array]) -> Array:
    """The first output of a graph, float64, from those of the arrays that it has inputs for."""
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise UnsupportedError("graphs between passes are run by onnxruntime", hint="pip install 'nascompile[cpu]'") from error
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    try:
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        found: Any = session.run(None, {value.name: feed[value.name] for value in session.get_inputs()})[0]
    except Exception as error:  # onnxruntime raises one class per status code, without a common base of its own
        raise ModelError(f"a graph between two passes does not run: {path}", detail=str(error)) from error
    return np.asarray(found, np.float64)
