"""OpenVINO on the CPU: standard ONNX becomes its IR, compiled for a few shapes that are expected and, where another comes, for any.

A network that takes any shape is slower than one of fixed shape: at batch 1 by 12 to 25 % in INT8 and up to 13 % in FP32, at batch 8 by
3 to 20 % (docs/benchmarks.md, "Forms").
"""

from __future__ import annotations

import errno
import functools
import importlib.util
import os
import platform
import shutil
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from nascompile.backends import Runner
from nascompile.backends.onnxruntime import PROTOBUF_LIMIT, check_inputs, cpu_flags, integer_passes, version
from nascompile.errors import RecordError, UnsupportedError
from nascompile.records import FLOAT32, INT8, WEIGHT_INT8, Precision, Target

Shapes = tuple[tuple[int, ...], ...]
"""Of the inputs, in their order."""

GRAPHS = ("model.xml", "model.bin")
YES_NO = ("no", "yes")
PROPERTIES = {
    "enable_cpu_pinning": YES_NO,
    "enable_hyper_threading": YES_NO,
    "inference_precision_hint": ("f32", "bf16"),
    "performance_hint": ("latency", "throughput"),
    "scheduling_core_type": ("any_core", "pcore_only", "ecore_only"),
}
"""OpenVINO's own properties that a session may set, in lower case, and their values."""
STATIC_SHAPE, WORKLOAD, SEEN, NONE = "static_shape", "workload", "seen", "none"
SHAPES = "workload,8,32"
"""Which shapes have a network of their own, compiled when it is first called: the workload's, and the same with batches of 8 and of 32,
which are faster in one. `seen`: the first shapes that come; `none`: one network for any shape."""
LIMIT = 4
"""Networks of fixed shape that one engine may have: each holds a copy of the weights as its kernels want them."""
FIXED = {"INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": 1}
"""FP32 is float32 also where the processor multiplies bfloat16 faster, unless a session says so; one call at a time gets all threads."""
BFLOAT16 = frozenset(("amx_bf16", "avx512_bf16"))


class OpenVino:
    name = "openvino"
    accepts: Literal["onnx", "torch", "hf_folder"] = "onnx"
    width_multiple = 64
    """AMX multiplies integers in blocks of 64 rows and columns: an MLP of 608 neurons takes longer than one of 640, 576 a tenth less."""
    passes: tuple[str, ...] = ("fuse_attention", "expand_attention")
    tunable: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("enable_hyper_threading", ("yes", "no")),
        ("performance_hint", ("latency", "throughput")),
        (STATIC_SHAPE, (SHAPES, NONE)),
    )
    """Not pinning: alone on the machine it can only win, and two processes that are pinned to one core share it."""

    @property
    def rounding(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """What is no integer in bfloat16, where the processor multiplies that: attention, softmax, norms, sums."""
        return (("inference_precision_hint", ("f32", "bf16")),) if cpu_flags() & BFLOAT16 else ()

    def unavailable(self) -> str:
        """Why this backend cannot run here; empty if it can."""
        if importlib.util.find_spec("openvino") is None:
            return "openvino is not installed: pip install 'nascompile[openvino]'"
        return ""

    def supports(self, precision: Precision) -> str:
        """FP32, INT8 tables, and static INT8 (U8S8) where the processor multiplies it exactly."""
        known = (FLOAT32, INT8, WEIGHT_INT8)
        if precision not in known:
            return f"openvino is lowered to with {', '.join(p.name for p in known)} only"
        if precision == INT8 and integer_passes(platform.machine(), cpu_flags()):
            return "without VNNI this processor adds products of integers in 16 bits, and openvino lets the sums saturate"
        return ""

    def versions(self) -> tuple[tuple[str, str], ...]:
        return (("openvino", version("openvino")),)

    def session(self) -> tuple[tuple[str, str], ...]:
        return (("enable_cpu_pinning", "no"), ("performance_hint", "latency"), (STATIC_SHAPE, SHAPES))

    def build(self, form: Any, target: Target, folder: Path) -> tuple[str, ...]:
        """Write `model.xml` and `model.bin`, weights as they are in the form. UnsupportedError if OpenVINO does not know an operator."""
        import openvino as ov

        try:
            model = _read(form)
        except RuntimeError as error:
            raise UnsupportedError("openvino cannot read the graph", detail=str(error)) from error
        for number, node in enumerate(model.get_ordered_ops()):
            if node.get_friendly_name() == node.get_name():  # made up, with a count of all nodes this process ever made
                node.set_friendly_name(f"{node.get_type_name()}.{number}")
        for name in GRAPHS:
            (folder / name).unlink(missing_ok=True)  # a loaded engine goes on reading the file it has mapped
        try:
            ov.save_model(model, folder / GRAPHS[0], compress_to_fp16=False)
        except RuntimeError as error:
            if shutil.disk_usage(folder).free < form.ByteSize():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error
            raise RecordError(f"openvino cannot write {folder / GRAPHS[0]}", detail=str(error)) from error
        return GRAPHS

    def load(self, folder: Path, graphs: tuple[str, ...], target: Target) -> Runner:
        if reason := self.unavailable():
            raise UnsupportedError(f"cannot load an engine: {reason}")
        return OvRunner(folder / graphs[0], target)


@functools.cache
def _core() -> Any:
    """The only one of the process: each core's CPU plugin gives signal handlers a stack of its own and, when it goes, leaves them the one
    before, which may have gone as well. Ctrl-C then ends the process by a segmentation fault (openvino 2026.4, processors with AMX)."""
    import openvino as ov

    return ov.Core()


def _read(form: Any) -> Any:
    """OpenVINO's model of an ONNX model; one that protobuf cannot hold in a single message goes through files."""
    import onnx

    if form.ByteSize() <= PROTOBUF_LIMIT:
        return _core().read_model(form.SerializeToString())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(form, path, save_as_external_data=True, location="model.data")
        onnx.load_external_data_for_model(form, folder)  # saving took the weights out of the model
        return _core().read_model(path, config={"ENABLE_MMAP": "NO"})  # the files are gone when the model is used


class OvRunner:
    """Compiled networks behind one call: that of the workload's shape, made at once, and others, made when they are first needed."""

    def __init__(self, path: Path, target: Target) -> None:
        settings = dict(target.session)
        batches, self._free = _buckets(settings.pop(STATIC_SHAPE, SHAPES), target.workload.batch)
        if unknown := sorted(settings.keys() - PROPERTIES.keys()):
            raise UnsupportedError(
                f"unknown session setting of openvino: {', '.join(unknown)}", hint=f"known: {', '.join((*PROPERTIES, STATIC_SHAPE))}"
            )
        own = {name.upper(): _checked(name, value, PROPERTIES[name]).upper() for name, value in settings.items()}
        self._properties = FIXED | {"INFERENCE_NUM_THREADS": target.threads} | own
        self._lock = threading.Lock()
        self._any: Any = None
        self._fixed: dict[Shapes, Any] = {}
        try:
            self._model = _core().read_model(path)
            self._dtypes = {i.any_name: i.element_type.to_dtype().name for i in self._model.inputs}
            self._outputs = [o.any_name for o in self._model.outputs]
            self._planned = {s for batch in batches if (s := _shapes(self._model, batch, target.workload.sequence))}
            first = _shapes(self._model, target.workload.batch, target.workload.sequence)
            if first in self._planned:
                self._fixed[first] = self._compiled(first)
            elif not self._free:
                self._any = self._compiled()
        except RuntimeError as error:
            raise RecordError(f"openvino cannot load {path}", detail=str(error), hint="build the engine again") from error

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs by name; DataError for a missing or unknown input or a wrong dtype."""
        check_inputs(inputs, self._dtypes)
        with self._lock:  # a request serves one call at a time
            found = self._request(inputs).infer(dict(inputs), share_inputs=True)
        return dict(zip(self._outputs, found.values(), strict=True))

    def _request(self, inputs: Mapping[str, Any]) -> Any:
        shapes = tuple(tuple(inputs[name].shape) for name in self._dtypes)
        if shapes in self._fixed:
            return self._fixed[shapes]
        if shapes in self._planned or self._free:
            self._fixed[shapes] = self._compiled(shapes)
            self._free -= shapes not in self._planned
            return self._fixed[shapes]
        if self._any is None:
            self._any = self._compiled()
        return self._any

    def _compiled(self, shapes: Shapes = ()) -> Any:
        """A request to a network for these input shapes; none: for any."""
        model = self._model
        if shapes:
            model = model.clone()
            model.reshape(dict(zip(self._dtypes, shapes, strict=True)))
        return _core().compile_model(model, "CPU", self._properties).create_infer_request()


def _shapes(model: Any, batch: int, sequence: int) -> Shapes:
    """The inputs' shapes in a call, the first open dimension being the batch; empty if that leaves one open."""
    found = []
    for entry in model.inputs:
        sizes = [d.get_length() if d.is_static else sequence if i else batch for i, d in enumerate(entry.partial_shape)]
        found.append(tuple(sizes))
    return tuple(found) if all(all(shape) for shape in found) else ()


def _buckets(value: str, batch: int) -> tuple[tuple[int, ...], int]:
    """(batch sizes that have networks of their own at the workload's other dimensions, how many other shapes may get one)."""
    if value == NONE:
        return (), 0
    if value == SEEN:
        return (batch,), LIMIT - 1
    parts = value.split(",")
    if not all(part == WORKLOAD or (part.isdecimal() and int(part)) for part in parts) or len(set(parts)) > LIMIT:
        known = f"{NONE}, {SEEN}, or up to {LIMIT} of {WORKLOAD} and batch sizes, such as {SHAPES}"
        raise UnsupportedError(f"unknown value of {STATIC_SHAPE}: {value}", hint=f"values: {known}")
    return tuple(batch if part == WORKLOAD else int(part) for part in parts), 0


def _checked(name: str, value: str, values: tuple[str, ...]) -> str:
    if value not in values:
        raise UnsupportedError(f"unknown value of {name}: {value}", hint=f"values: {', '.join(values)}")
    return value


PLUGIN = OpenVino()
