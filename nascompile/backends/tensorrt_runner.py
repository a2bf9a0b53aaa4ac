"""A loaded TensorRT engine: NumPy in, NumPy out, and how long its layers take. Not executed on a GPU so far (see tensorrt.py)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nascompile import cuda_driver
from nascompile.backends.onnxruntime import check_inputs
from nascompile.errors import DataError, RecordError, UnsupportedError


class TensorRtRunner:
    """An execution context and a stream. A call returns when its outputs are on the host, so wall-clock time is latency."""

    def __init__(self, trt: Any, logger: Any, path: Path) -> None:
        self.stream = cuda_driver.Stream()
        self._trt = trt
        self._runtime = trt.Runtime(logger)  # must outlive its engines
        self.engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self.engine is None:
            raise RecordError(f"{trt.__name__} cannot load {path}", hint="build the engine again, with this version and for this GPU")
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        inputs = {name for name in names if self.engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT}
        types = {name: np.dtype(trt.nptype(self.engine.get_tensor_dtype(name))) for name in names}
        self._dtypes = {name: str(types[name]) for name in names if name in inputs}
        self._outputs = {name: types[name] for name in names if name not in inputs}
        self._context = self.engine.create_execution_context()
        self._buffers: dict[str, tuple[int, int]] = {}

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs by name; DataError for a missing or unknown input, a wrong dtype, or a shape outside the engine's profile."""
        check_inputs(inputs, self._dtypes)
        return self._run(self._context, inputs)

    def layer_times(self, inputs: Mapping[str, Any], repeats: int = 10) -> tuple[tuple[str, float], ...]:
        """(layer, mean ms of a call) in execution order. Layers are the builder's: fused, named after what they came from."""
        check_inputs(inputs, self._dtypes)
        context, profiler = self.engine.create_execution_context(), _profiler(self._trt)
        self._run(context, inputs)  # the first call prepares
        context.profiler = profiler
        for _ in range(repeats):
            self._run(context, inputs)
        return tuple((name, total / repeats) for name, total in profiler.totals.items())

    def _run(self, context: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
        self.stream.enter()
        arrays = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
        for name, array in arrays.items():
            self._set_shape(context, name, array.shape)
            context.set_tensor_address(name, self._buffer(name, array.nbytes))
            self.stream.upload(self._buffers[name][0], array)
        found = {name: np.empty(tuple(context.get_tensor_shape(name)), dtype) for name, dtype in self._outputs.items()}
        for name, array in found.items():
            context.set_tensor_address(name, self._buffer(name, array.nbytes))
        if not context.execute_async_v3(self.stream.handle):
            raise UnsupportedError(f"{self._trt.__name__} could not run the engine")
        for name, array in found.items():
            self.stream.download(array, self._buffers[name][0])
        self.stream.synchronize()
        return found

    def _set_shape(self, context: Any, name: str, shape: tuple[int, ...]) -> None:
        smallest, _, largest = (tuple(s) for s in self.engine.get_tensor_profile_shape(name, 0))
        fits = len(shape) == len(smallest) and all(a <= n <= b for a, n, b in zip(smallest, shape, largest, strict=True))
        if not fits or not context.set_input_shape(name, shape):
            raise DataError(f"input {name} has shape {shape}, the engine takes {smallest} to {largest}")

    def _buffer(self, name: str, size: int) -> int:
        """Address of device memory of at least `size` bytes, kept for the next call."""
        address, held = self._buffers.get(name, (0, 0))
        if held < size:
            if held:
                self.stream.free(address)
            self._buffers[name] = (self.stream.allocate(size), size)
        return self._buffers[name][0]


def _profiler(trt: Any) -> Any:
    class Profiler(trt.IProfiler):  # type: ignore[misc]
        """Adds up what the runtime reports after each call."""

        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.totals: dict[str, float] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.totals[layer_name] = self.totals.get(layer_name, 0.0) + ms

    return Profiler()
