"""The machine's own limits: the fastest that any installed library multiplies square matrices, and reads and copies memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

SIZE = 2048
SECONDS = 0.7
BYTES = 1 << 30
METHOD = (
    f"{SIZE}³ products of each type in every library named, least time of {SECONDS} s of calls, the best library's; weights are constants"
    f" where a library packs them. Memory: {BYTES >> 20} MiB of float32, summed (read) and copied (2 bytes moved per byte) by PyTorch;"
    " a large shared cache may hold part of it."
)


def measure(threads: int) -> dict[str, Any]:
    """GMAC/s of FP32, BF16 and INT8 by library with the best, GB/s of memory."""
    import torch

    torch.set_num_threads(threads)
    found: dict[str, Any] = {"threads": threads, "method": METHOD}
    for precision, calls in {"fp32": _fp32(threads), "bf16": _bf16(), "int8": _int8(threads)}.items():
        rates: dict[str, float | str] = {}
        for name, make in calls.items():
            try:
                rates[name] = SIZE**3 / _least(make()) / 1e9
            except Exception as error:  # a library without this product takes no part
                rates[name] = f"{type(error).__name__}: {error}"[:200]
        best = max((rate for rate in rates.values() if isinstance(rate, float)), default=0.0)
        found[f"{precision}_gmacs"] = best
        found[f"{precision}_by_library"] = rates
    big = torch.ones(BYTES // 4)
    target = torch.empty_like(big)
    found["read_gb_s"] = BYTES / _least(lambda: big.sum()) / 1e9
    found["copy_gb_s"] = 2 * BYTES / _least(lambda: target.copy_(big)) / 1e9
    return found


def _least(call: Callable[[], Any]) -> float:
    call()
    least, end = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        least = min(least, time.perf_counter() - start)
    return least


def _normal() -> Any:
    return np.random.default_rng(0).standard_normal((SIZE, SIZE), dtype=np.float32)


def _fp32(threads: int) -> dict[str, Callable[[], Callable[[], Any]]]:
    import torch

    def pytorch() -> Callable[[], Any]:
        a = torch.from_numpy(_normal())
        return lambda: torch.mm(a, a)

    return {
        "torch": pytorch,
        "onnxruntime": lambda: _onnxruntime(_float_product(), threads),
        "openvino": lambda: _openvino(_float_product(), threads),
    }


def _bf16() -> dict[str, Callable[[], Callable[[], Any]]]:
    import torch

    def pytorch() -> Callable[[], Any]:
        a = torch.from_numpy(_normal()).bfloat16()
        return lambda: torch.mm(a, a)

    return {"torch": pytorch}


def _int8(threads: int) -> dict[str, Callable[[], Callable[[], Any]]]:
    import torch

    def pytorch() -> Callable[[], Any]:
        a = torch.ones(SIZE, SIZE, dtype=torch.int8)
        return lambda: torch._int_mm(a, a)

    return {
        "torch": pytorch,
        "onnxruntime": lambda: _onnxruntime(_integer_product(), threads),
        "openvino": lambda: _openvino(_quantized_product(), threads),
    }


def _model(nodes: list[Any], kind: int, output: int, constants: dict[str, Any]) -> bytes:
    import onnx
    from onnx import helper, numpy_helper

    graph = helper.make_graph(
        nodes, "product", [helper.make_tensor_value_info("a", kind, [SIZE, SIZE])],
        [helper.make_tensor_value_info("c", output, [SIZE, SIZE])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def _float_product() -> bytes:
    from onnx import TensorProto, helper

    return _model([helper.make_node("MatMul", ["a", "b"], ["c"])], TensorProto.FLOAT, TensorProto.FLOAT, {"b": _normal()})


def _integers() -> Any:
    return np.random.default_rng(0).integers(-127, 128, (SIZE, SIZE)).astype(np.int8)


def _integer_product() -> bytes:
    from onnx import TensorProto, helper

    node = helper.make_node("MatMulInteger", ["a", "b", "zero"], ["c"])
    return _model([node], TensorProto.UINT8, TensorProto.INT32, {"b": _integers(), "zero": np.uint8(128)})


def _quantized_product() -> bytes:
    """QDQ; the integers in between are what OpenVINO multiplies. Quantizing the input and scaling the output are in the time."""
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("QuantizeLinear", ["a", "s", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "zero"], ["x"]),
        helper.make_node("DequantizeLinear", ["b", "s", "none"], ["w"]),
        helper.make_node("MatMul", ["x", "w"], ["c"]),
    ]
    constants = {"s": np.float32(0.05), "zero": np.uint8(128), "none": np.int8(0), "b": _integers()}
    return _model(nodes, TensorProto.FLOAT, TensorProto.FLOAT, constants)


def _onnxruntime(model: bytes, threads: int) -> Callable[[], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    a = _normal() if "float" in session.get_inputs()[0].type else _integers().view(np.uint8)
    return lambda: session.run(None, {"a": a})


def _openvino(model: bytes, threads: int) -> Callable[[], Any]:
    import openvino

    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": threads, "ENABLE_CPU_PINNING": False, "INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(core.read_model(model), "CPU", settings).create_infer_request()
    a = _normal()
    return lambda: request.infer({"a": a}, share_inputs=True)
