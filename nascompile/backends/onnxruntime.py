"""ONNX Runtime on the CPU: ONNX graphs with its own attention and integer products, settings found by measurement."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from nascompile.backends import Runner
from nascompile.errors import DataError, RecordError, UnsupportedError
from nascompile.records import FLOAT32, INT8, INT8_DYNAMIC, WEIGHT_INT8, WEIGHT_ONLY, Precision, Target

PROTOBUF_LIMIT = 2**31 - 2**20
"""Bytes a single ONNX file can have, with room for its header."""
SLOWER = ("BiasGeluFusion", "MatMulAddFusion", "SkipLayerNormFusion")
"""Fusions that gain nothing in graphs as lowering leaves them at batch 1, where turning them off is worth up to 2 % in FP32 (it costs up to
3 % in INT8 at batch 8: docs/benchmarks.md, "Forms"); MatMulAddFusion also makes QDQ products dequantize their weights at every run."""
TWO_OF_SLOWER = tuple(",".join(name for name in SLOWER if name != kept) for kept in SLOWER)
SWITCHES = {"enable_cpu_mem_arena": "1", "enable_mem_pattern": "1"}
"""Attributes of the session's options that are on or off, and what holds where a session does not say."""
LEVELS = {"disabled": "ORT_DISABLE_ALL", "basic": "ORT_ENABLE_BASIC", "extended": "ORT_ENABLE_EXTENDED", "all": "ORT_ENABLE_ALL"}


VNNI = ("avx512_vnni", "avx_vnni")


def integer_passes(machine: str, flags: frozenset[str]) -> tuple[str, ...]:
    """What makes integer products exact on a processor: x86 without VNNI saturates sums of u8·s8 products at 16 bits."""
    exact = machine.lower() not in ("x86_64", "amd64", "i686", "x86") or not flags.isdisjoint(VNNI)
    return () if exact else ("unsigned_weights",)


def cpu_flags() -> frozenset[str]:
    """Instruction sets as Linux names them; empty elsewhere, which gives exact products that may be slower."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), []))


class OnnxRuntime:
    name = "onnxruntime"
    accepts: Literal["onnx", "torch", "hf_folder"] = "onnx"
    width_multiple = 32
    """MLAS multiplies tiles of 16 (AVX2, VNNI) or 32 (AVX-512 float) columns and groups of 4 rows: multiples of 32 leave none partial."""
    passes: tuple[str, ...] = (
        "fuse_attention", "quantize_blocks", *integer_passes(platform.machine(), cpu_flags()), "fuse_integer_matmul",
        "fuse_integer_attention", "fuse_float_attention",
    )  # fmt: skip
    rounding: tuple[tuple[str, tuple[str, ...]], ...] = ()
    tunable: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("graph_optimization_level", ("all", "extended", "basic")),
        ("disabled_optimizers", ("", ",".join(SLOWER), *TWO_OF_SLOWER)),
        ("allow_spinning", ("1", "0")),
        ("enable_cpu_mem_arena", ("1", "0")),
        ("enable_mem_pattern", ("1", "0")),
    )

    def unavailable(self) -> str:
        """Why this backend cannot run here; empty if it can."""
        if importlib.util.find_spec("onnxruntime") is None:
            return "onnxruntime is not installed: pip install 'nascompile[cpu]'"
        return ""

    def supports(self, precision: Precision) -> str:
        """FP32, static and dynamic INT8 (U8S8), INT8 tables, and weight-only integers."""
        known = (FLOAT32, INT8, INT8_DYNAMIC, WEIGHT_INT8, *WEIGHT_ONLY)
        return "" if precision in known else f"onnxruntime is lowered to with {', '.join(p.name for p in known)} only"

    def versions(self) -> tuple[tuple[str, str], ...]:
        return (("onnxruntime", version("onnxruntime")),)

    def session(self) -> tuple[tuple[str, str], ...]:
        return (("allow_spinning", "1"), ("disabled_optimizers", ",".join(SLOWER)), ("graph_optimization_level", "all"))

    def build(self, form: Any, target: Target, folder: Path) -> tuple[str, ...]:
        """Write `model.onnx`; weights go to `model.onnx.data` only where one file cannot hold them."""
        import onnx

        path = folder / "model.onnx"
        if sum(map(_size, form.graph.initializer)) > PROTOBUF_LIMIT:
            onnx.save(form, path, save_as_external_data=True, location=f"{path.name}.data")
            return path.name, f"{path.name}.data"
        with path.open("wb") as stream:
            stream.writelines(serialized(form))
        return (path.name,)

    def load(self, folder: Path, graphs: tuple[str, ...], target: Target) -> Runner:
        if reason := self.unavailable():
            raise UnsupportedError(f"cannot load an engine: {reason}")
        return OrtRunner(folder / graphs[0], target)


def serialized(model: Any) -> Iterator[bytes]:
    """The bytes of `model.SerializeToString()` in pieces, a weight at a time: as a whole they would take its memory once more."""
    import onnx

    graph, initializers = model.graph, onnx.GraphProto.DESCRIPTOR.fields_by_name["initializer"].number
    own = onnx.ModelProto.DESCRIPTOR.fields_by_name["graph"].number
    yield _fields(model, lambda number: number < own)
    before, after = _fields(graph, lambda number: number < initializers), _fields(graph, lambda number: number > initializers)
    heads = [_tag(initializers) + _varint(_size(tensor)) for tensor in graph.initializer]
    yield _tag(own) + _varint(len(before) + len(after) + sum(map(len, heads)) + sum(map(_size, graph.initializer)))
    yield before
    for head, tensor in zip(heads, graph.initializer, strict=True):
        yield head
        yield tensor.SerializeToString()
    yield after
    yield _fields(model, lambda number: number > own)


def _size(message: Any) -> int:
    """Serialized bytes; the library finds them by serializing, so this is for messages of which a copy does no harm."""
    return int(message.ByteSize())


def _fields(message: Any, wanted: Callable[[int], bool]) -> bytes:
    """A message's fields with the wanted numbers, serialized."""
    part = type(message)()
    for field, value in message.ListFields():
        if wanted(field.number):
            part.MergeFrom(type(message)(**{field.name: value}))
    content: bytes = part.SerializeToString()
    return content


def _tag(number: int) -> bytes:
    """Of a field that has a length."""
    return _varint(number << 3 | 2)


def _varint(number: int) -> bytes:
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


class OrtRunner:
    """A session; checks names and dtypes, because the runtime's own messages name neither the engine nor what it expects."""

    def __init__(self, path: Path, target: Target) -> None:
        import onnxruntime as ort

        settings = dict(target.session)
        options = ort.SessionOptions()
        options.intra_op_num_threads = target.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        level = settings.pop("graph_optimization_level", "all")
        if level not in LEVELS:
            raise UnsupportedError(f"unknown graph_optimization_level: {level}", hint=f"levels: {', '.join(LEVELS)}")
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, LEVELS[level])
        options.add_session_config_entry("session.intra_op.allow_spinning", settings.pop("allow_spinning", "1"))
        disabled = [name for name in settings.pop("disabled_optimizers", "").split(",") if name]
        for name, default in SWITCHES.items():
            if (value := settings.pop(name, default)) not in ("0", "1"):
                raise UnsupportedError(f"unknown {name}: {value}", hint="values: 0, 1")
            setattr(options, name, value == "1")
        if settings:
            known = ", ".join(name for name, _ in OnnxRuntime.tunable)
            raise UnsupportedError(f"unknown session setting of onnxruntime: {', '.join(sorted(settings))}", hint=f"known: {known}")
        try:
            self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled)
        except Exception as error:  # onnxruntime raises one class per status code, without a common base of its own
            raise RecordError(f"onnxruntime cannot load {path}", detail=str(error), hint="build the engine again") from error
        self._dtypes = {i.name: _DTYPES[i.type] for i in self.session.get_inputs()}
        self._outputs = [o.name for o in self.session.get_outputs()]

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs by name; DataError for a missing or unknown input or a wrong dtype."""
        check_inputs(inputs, self._dtypes)
        return dict(zip(self._outputs, self.session.run(self._outputs, dict(inputs)), strict=True))


def check_inputs(inputs: Mapping[str, Any], dtypes: Mapping[str, str]) -> None:
    """DataError naming the first input that is missing, unknown, or of the wrong dtype."""
    if inputs.keys() != dtypes.keys():
        missing, unknown = sorted(dtypes.keys() - inputs.keys()), sorted(inputs.keys() - dtypes.keys())
        what = f"missing input: {', '.join(missing)}" if missing else f"unknown input: {', '.join(unknown)}"
        raise DataError(what, hint=f"inputs of this engine: {', '.join(f'{n} ({d})' for n, d in dtypes.items())}")
    for name, dtype in dtypes.items():
        if (found := str(getattr(inputs[name], "dtype", type(inputs[name]).__name__))) != dtype:
            raise DataError(f"input {name} has dtype {found}, expected {dtype}", hint=f"convert it with .astype('{dtype}')")


_DTYPES = {
    "tensor(float)": "float32", "tensor(double)": "float64", "tensor(float16)": "float16", "tensor(int64)": "int64",
    "tensor(int32)": "int32", "tensor(int8)": "int8", "tensor(uint8)": "uint8", "tensor(bool)": "bool",
}  # fmt: skip


def version(package: str) -> str:
    """Of an installed package; `missing` if it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


PLUGIN = OnnxRuntime()
