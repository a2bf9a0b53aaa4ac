"""TensorRT, 10.12 and later: strongly typed networks, FP16 floats, symmetric Q/DQ, one optimization profile a workload.

TensorRT builds on the GPU it builds for; TensorRT-RTX (`tensorrt_rtx.py`, the same code) builds anywhere for a named compute capability.
What needs a GPU (loading, running, the engine inspector, layer times) was tested with a stand-in for the library, on no GPU so far.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from nascompile import cuda_driver
from nascompile.backends import Runner
from nascompile.backends.onnxruntime import PROTOBUF_LIMIT
from nascompile.errors import UnsupportedError
from nascompile.records import FLOAT16, FLOAT32, INT8, INT8_SYMMETRIC, WEIGHT_INT8, Precision, Target

ENGINE, NETWORK, INSPECTOR = "model.engine", "network.json", "inspector.json"
CAPABILITY, MAX_BATCH = "compute_capability", "max_batch"
"""Session settings: `8.9`, of the device's profile; the largest batch the engine takes."""


class TensorRt:
    name = "tensorrt"
    title = "TensorRT"
    accepts: Literal["onnx", "torch", "hf_folder"] = "onnx"
    width_multiple = 32
    """Tensor cores multiply tiles of 16 (FP16) or 32 (INT8) in the summed dimension."""
    passes: tuple[str, ...] = ("half_floats",)
    tunable: tuple[tuple[str, tuple[str, ...]], ...] = ()
    rounding: tuple[tuple[str, tuple[str, ...]], ...] = ()
    devices = ("cuda",)
    run_script = ""
    """`run.py` is for runtimes that run anywhere: an engine of this one goes through nascompile."""
    modules: tuple[str, ...] = ("tensorrt",)
    """Names the library is imported by, the first that there is."""
    minimum = (10, 12)
    """From here on strong typing and symmetric Q/DQ mean the same in every version."""
    install = "pip install tensorrt"
    counterparts: Mapping[str, Precision] = {FLOAT32.name: FLOAT16, INT8.name: INT8_SYMMETRIC, WEIGHT_INT8.name: FLOAT16}
    unrun_remark = f"{NETWORK} lists the layers given to the builder: the engine's inspector needs the GPU"

    def __init__(self) -> None:
        self._log: list[tuple[int, str]] = []
        self._logger: Any = None

    # ------------------------------------------------------------------------------------------ what it can do

    def unavailable(self) -> str:
        """Needs the library and a GPU."""
        return self._missing() or cuda_driver.unavailable()

    def unbuildable(self, target: Target) -> str:
        """Needs the library, and the GPU it builds for."""
        if reason := self.unavailable():
            return f"{reason}; {self.title} builds on the GPU that it builds for, TensorRT-RTX does without"
        return self.unrunnable(target)

    def unrunnable(self, target: Target) -> str:
        """Needs the library and a GPU of the target's compute capability."""
        if reason := self.unavailable():
            return reason
        here = cuda_driver.gpu()
        wanted = dict(target.session).get(CAPABILITY, here.compute_capability)
        if wanted == here.compute_capability:
            return ""
        return f"it is for compute capability {wanted}, {here.name} has {here.compute_capability}"

    def supports(self, precision: Precision) -> str:
        """FP32, FP16 and symmetric INT8."""
        if precision in (FLOAT32, FLOAT16, INT8_SYMMETRIC):
            return ""
        if precision.weights.kind == "int" and precision.activations.kind == "float":
            return f"{self.title} reads tables and weights of float products as floats"
        if not precision.activations.signed or not precision.activations.symmetric:
            return f"{self.title} quantizes symmetrically: signed integers without zero points"
        return f"{self.title} is lowered to with {FLOAT32.name}, {FLOAT16.name}, {INT8_SYMMETRIC.name} only"

    def versions(self) -> tuple[tuple[str, str], ...]:
        found, _ = self._import()
        return ((self.name, getattr(found, "__version__", "missing")),)

    def session(self) -> tuple[tuple[str, str], ...]:
        return ((MAX_BATCH, "32"),)

    # ------------------------------------------------------------------------------------------ building

    def build(self, form: Any, target: Target, folder: Path) -> tuple[str, ...]:
        """Write `model.engine`, and beside it what the builder was given or, on the GPU itself, what it made of that."""
        if reason := self.unbuildable(target):
            raise UnsupportedError(f"cannot build for `{target.device}`: {reason}")
        trt, settings = self.library(), settings_of(target)
        if form.ByteSize() > PROTOBUF_LIMIT:
            raise UnsupportedError(f"{self.title} cannot be handed a graph of {form.ByteSize():,} bytes: its limit is {PROTOBUF_LIMIT:,}")
        self._log.clear()
        builder = trt.Builder(self.logger())
        network = builder.create_network(_strongly_typed(trt))
        parser = trt.OnnxParser(network, self.logger())
        if not parser.parse(form.SerializeToString()):
            faults = [str(parser.get_error(i).desc()) for i in range(parser.num_errors)]
            raise UnsupportedError(f"{self.title} cannot read the graph", detail="\n".join([*faults, *self._faults()]))
        config = builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the inspector names what each layer came from
        self._aim(trt, config, target)
        profile = builder.create_optimization_profile()
        for value in form.graph.input:
            profile.set_shape(value.name, *_shapes(value, target, int(settings[MAX_BATCH])))
        config.add_optimization_profile(profile)
        engine = builder.build_serialized_network(network, config)
        if engine is None:
            raise UnsupportedError(f"{self.title} cannot build for `{target.device}`", detail="\n".join(self._faults()))
        (folder / ENGINE).write_bytes(engine)
        self._describe(trt, network, folder, target)
        return (ENGINE,)

    def _aim(self, trt: Any, config: Any, target: Target) -> None:
        """Tell the builder which GPU it builds for, where it can be another than the present one."""

    def _describe(self, trt: Any, network: Any, folder: Path, target: Target) -> None:
        if self.unrunnable(target):
            text = json.dumps({"source": "the network given to the builder", "layers": _layers(network)}, indent=1)
            (folder / NETWORK).write_text(text + "\n", encoding="utf-8")
            return
        engine = trt.Runtime(self.logger()).deserialize_cuda_engine((folder / ENGINE).read_bytes())
        text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
        (folder / INSPECTOR).write_text(text, encoding="utf-8")

    # ------------------------------------------------------------------------------------------ running

    def load(self, folder: Path, graphs: tuple[str, ...], target: Target) -> Runner:
        from nascompile.backends.tensorrt_runner import TensorRtRunner

        if reason := self.unrunnable(target):
            raise UnsupportedError(f"cannot load an engine: {reason}")
        settings_of(target)
        return TensorRtRunner(self.library(), self.logger(), folder / graphs[0])

    # ------------------------------------------------------------------------------------------ the library

    def library(self) -> Any:
        """The module; UnsupportedError if it is not installed or too old."""
        if reason := self._missing():
            raise UnsupportedError(reason)
        return self._import()[0]

    def logger(self) -> Any:
        """The process's one logger: the library keeps the first that it is given."""
        if self._logger is None:
            self._logger = _logger(self.library(), self._log)
        return self._logger

    def _import(self) -> tuple[Any, str]:
        """(module, "") or (None, why not)."""
        reason = ""
        for name in self.modules:
            try:
                return importlib.import_module(name), ""
            except ModuleNotFoundError:
                continue
            except (ImportError, OSError) as error:  # there, but its own libraries are not
                reason = f"{name} cannot be loaded: {error}"
        return None, reason or f"{self.title} is not installed: {self.install}"

    def _missing(self) -> str:
        found, reason = self._import()
        if found is None:
            return reason
        version = tuple(int(part) for part in found.__version__.split(".")[:2])
        least = ".".join(map(str, self.minimum))
        return "" if version >= self.minimum else f"{self.title} {found.__version__} is too old: {least} is the first that will do"

    def _faults(self) -> list[str]:
        return [text for severity, text in self._log if severity <= 1]  # internal errors and errors


def settings_of(target: Target) -> dict[str, str]:
    """Session settings of a target; UnsupportedError naming one that is unknown or no number."""
    settings = {MAX_BATCH: "1"} | dict(target.session)
    if unknown := sorted(settings.keys() - {CAPABILITY, MAX_BATCH}):
        raise UnsupportedError(f"unknown session setting of TensorRT: {', '.join(unknown)}", hint=f"known: {CAPABILITY}, {MAX_BATCH}")
    if not settings[MAX_BATCH].isdecimal() or int(settings[MAX_BATCH]) < 1:
        raise UnsupportedError(f"not a batch size: {MAX_BATCH} = {settings[MAX_BATCH]}")
    return settings


def _shapes(value: Any, target: Target, max_batch: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Smallest, best and largest shape of an input: the workload is the best, it and `max_batch` bound the rest."""
    w = target.workload
    ranges = {"batch": (1, w.batch, max(w.batch, max_batch)), "sequence": (1, max(w.sequence, 1), max(w.sequence, 1))}
    found = []
    for dim in value.type.tensor_type.shape.dim:
        if dim.dim_param and dim.dim_param not in ranges:
            raise UnsupportedError(f"input {value.name} has a dimension of unknown range: {dim.dim_param}")
        found.append(ranges[dim.dim_param] if dim.dim_param else (dim.dim_value,) * 3)
    smallest, best, largest = zip(*found, strict=True)
    return smallest, best, largest


def _strongly_typed(trt: Any) -> int:
    """Network flags: the graph's own types hold. It is the only kind there is from TensorRT 11 on."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _layers(network: Any) -> list[dict[str, Any]]:
    """Name, kind, inputs and outputs of every layer of a network that was not built yet."""
    found = []
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        inputs = [layer.get_input(j) for j in range(layer.num_inputs)]
        outputs = [layer.get_output(j) for j in range(layer.num_outputs)]
        described = {side: [_tensor(t) for t in each if t is not None] for side, each in (("inputs", inputs), ("outputs", outputs))}
        found.append({"name": layer.name, "kind": layer.type.name, **described})
    return found


def _tensor(tensor: Any) -> dict[str, Any]:
    try:
        shape = list(tensor.shape)
    except ValueError:  # a rank that is known only once it runs
        shape = None
    return {"name": tensor.name, "type": tensor.dtype.name, "shape": shape}


def _logger(trt: Any, log: list[tuple[int, str]]) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        """Keeps what the library says, by severity, instead of printing it."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            if int(severity) <= 2:  # warnings and worse
                log.append((int(severity), text))

    return Logger()


PLUGIN = TensorRt()
