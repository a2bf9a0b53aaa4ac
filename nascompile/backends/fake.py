"""A backend that runs anywhere: onnx's reference evaluator computes, and a formula pretends to take time.

It takes standard ONNX only, so that the whole pipeline is tested without a runtime. Nothing it yields is a measurement.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from nascompile.backends import Runner
from nascompile.backends.onnxruntime import check_inputs
from nascompile.errors import RecordError, UnsupportedError
from nascompile.records import FLOAT32, INT8, INT8_DYNAMIC, WEIGHT_INT8, Precision, Target

NODE_MS = 0.002
MACS_PER_MS = 1e6
INTEGER_SPEEDUP = 3.0
SETTINGS = {"node_ms": NODE_MS, "macs_per_ms": MACS_PER_MS, "integer_speedup": INTEGER_SPEEDUP}
"""Session settings, which a profile may give to simulate another device."""


class Fake:
    name = "fake"
    accepts: Literal["onnx", "torch", "hf_folder"] = "onnx"
    width_multiple = 8
    passes: tuple[str, ...] = ()
    tunable: tuple[tuple[str, tuple[str, ...]], ...] = ()
    rounding: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def unavailable(self) -> str:
        """Always available."""
        return ""

    def supports(self, precision: Precision) -> str:
        """FP32, static and dynamic INT8 and INT8 tables, as QDQ graphs."""
        known = (FLOAT32, INT8, INT8_DYNAMIC, WEIGHT_INT8)
        return "" if precision in known else f"the fake backend knows {', '.join(p.name for p in known)} only"

    def versions(self) -> tuple[tuple[str, str], ...]:
        return (("onnx", importlib.metadata.version("onnx")),)

    def session(self) -> tuple[tuple[str, str], ...]:
        return ()

    def build(self, form: Any, target: Target, folder: Path) -> tuple[str, ...]:
        """Write `model.onnx`."""
        (folder / "model.onnx").write_bytes(form.SerializeToString())
        return ("model.onnx",)

    def load(self, folder: Path, graphs: tuple[str, ...], target: Target) -> Runner:
        return FakeRunner(folder / graphs[0], target)


class FakeRunner:
    """The reference evaluator, and a simulated latency."""

    def __init__(self, path: Path, target: Target) -> None:
        import onnx
        from onnx.reference import ReferenceEvaluator

        if unknown := [name for name, _ in target.session if name not in SETTINGS]:
            raise UnsupportedError(f"unknown session setting of fake: {', '.join(unknown)}", hint=f"known: {', '.join(SETTINGS)}")
        self._settings = SETTINGS | {name: float(value) for name, value in target.session}
        try:
            model = onnx.load(path)
        except Exception as error:  # protobuf's DecodeError is no public type
            raise RecordError(f"onnx cannot read {path}", detail=str(error), hint="build the engine again") from error
        self._evaluator = ReferenceEvaluator(model)
        self._dtypes = {
            value.name: str(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)) for value in model.graph.input
        }
        self._outputs = [value.name for value in model.graph.output]
        self._nodes = len(model.graph.node)
        self._work = _work(model, self._settings["integer_speedup"]) * max(1, target.workload.sequence)

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs by name; DataError for a missing or unknown input or a wrong dtype."""
        check_inputs(inputs, self._dtypes)
        return dict(zip(self._outputs, self._evaluator.run(None, dict(inputs)), strict=True))

    def simulated_ms(self, batch: int) -> float:
        """Simulated latency of one call: a constant per node and a rate for products, integers being faster."""
        return self._nodes * self._settings["node_ms"] + batch * self._work / self._settings["macs_per_ms"]


def _work(model: Any, integer_speedup: float) -> float:
    """Float-equivalent multiply-accumulates per token, from the weights' shapes."""
    shapes = {tensor.name: math.prod(tensor.dims) for tensor in model.graph.initializer}
    integer = {n.output[0]: shapes.get(n.input[0], 0) for n in model.graph.node if n.op_type == "DequantizeLinear"}
    total = 0.0
    for node in model.graph.node:
        if node.op_type in ("MatMul", "Gemm", "Conv"):
            total += shapes.get(node.input[1], 0) + integer.get(node.input[1], 0) / integer_speedup
    return total


PLUGIN = Fake()
