"""What a user would get otherwise: PyTorch, ONNX Runtime with its own and with optimum's quantizers, OpenVINO with NNCF's.

Each as its documentation has it, but for two settings of OpenVINO: threads are not pinned, because several runtimes share this
process, and shapes are those of the cell, which its documentation asks for where they are known.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nascompile.backends.onnxruntime import cpu_flags
from speed.contenders import FP32, REDUCED, Artefact, Contender, Missing, Runner, files, versions
from speed.networks import CALIBRATION, Array, Arrays, Network, rows

CHECKOUT = Path(__file__).resolve().parents[3]
OPSET = 17
BF16 = ("amx_bf16", "avx512_bf16")
STATIC_FORMS = {"all operators": None, "products": ["MatMul", "Gemm"]}
"""Operators that onnxruntime's static quantizer takes: its default, and those that hold weights."""


def contenders() -> tuple[Contender, ...]:
    """All of them, whether they can run here or not."""
    export, ir, nncf = (partial(_always, a) for a in (EXPORT, OPENVINO, NNCF))
    static = [
        _ort(f"onnxruntime static, {form}", REDUCED, partial(_always, _static(form)), "model.onnx") for form in STATIC_FORMS
    ]
    return (
        Contender("torch eager", "torch", FP32, partial(_always, NOTHING), _eager),
        Contender("torch.compile", "torch", FP32, partial(_inductor, "fp32"), partial(_compiled, "fp32")),
        Contender("torch.compile bf16", "torch", REDUCED, partial(_inductor, "bf16"), partial(_compiled, "bf16")),
        _ort("onnxruntime, torch.onnx.export", FP32, _dynamo, "model.onnx"),
        _ort("onnxruntime, TorchScript export", FP32, export, "model.onnx"),
        _ort("onnxruntime dynamic", REDUCED, partial(_always, DYNAMIC), "model.onnx"),
        *static,
        *(_ort(f"optimum {form}", FP32 if form == "O3" else REDUCED, partial(_always, OPTIMUM), f"{form}.onnx")
          for form in ("O3", "dynamic", "static")),
        Contender("openvino fp32", "openvino", FP32, ir, partial(_openvino, "f32")),
        Contender("openvino bf16", "openvino", REDUCED, ir, partial(_openvino, "bf16")),
        Contender("openvino nncf", "openvino", REDUCED, nncf, partial(_openvino, "f32")),
        Contender("openvino nncf bf16", "openvino", REDUCED, nncf, partial(_openvino, "bf16")),
    )  # fmt: skip


def _always(artefact: Artefact, batch: int, threads: int) -> Artefact:
    return artefact


def _ort(name: str, form: str, artefact: Any, file: str) -> Contender:
    return Contender(name, "onnxruntime", form, artefact, partial(_session, file))


def _no_bf16() -> str:
    return "" if cpu_flags().intersection(BF16) else "this processor has no bfloat16 instructions"


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _seen(network: Network) -> Iterator[Arrays]:
    """The calibration samples that ranges are taken from, one by one; the same as ours."""
    inputs = network.samples("calibration")
    for i in range(CALIBRATION // 2):
        yield rows(inputs, i, i + 1)


# ------------------------------------------------------------------------------------------------ PyTorch

NOTHING = Artefact("nothing", lambda network, folder: None)


def _eager(network: Network, folder: Path, batch: int, threads: int) -> Runner:
    import torch

    torch.set_num_threads(threads)
    return _torch_runner(network.module(), network.names, "fp32")


def _torch_runner(module: Any, names: tuple[str, ...], precision: str) -> Runner:
    import torch

    def run(inputs: Mapping[str, Array]) -> Array:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits: Array = module(*(torch.from_numpy(inputs[name]) for name in names)).float().numpy()
            return logits

    return run


def _compiled(precision: str, network: Network, folder: Path, batch: int, threads: int) -> Runner:
    import torch
    import torch._inductor.config as inductor

    if not shutil.which(os.environ.get("CXX", "g++")):
        raise Missing("torch.compile needs a C++ compiler, and there is no g++")
    if precision == "bf16" and (reason := _no_bf16()):
        raise Missing(reason)
    torch.set_num_threads(threads)
    inductor.freezing = True  # weights become constants and are packed: what the CPU inference guides ask for
    return _torch_runner(torch.compile(network.module(), dynamic=False), network.names, precision)


def _inductor(precision: str, batch: int, threads: int) -> Artefact:
    """Nothing but inductor's cache, filled."""

    def make(network: Network, folder: Path) -> None:
        import torch

        torch._dynamo.reset()  # type: ignore[no-untyped-call]  # it counts how often the forward was compiled, and gives up
        _compiled(precision, network, folder, batch, threads)(rows(network.samples("evaluation"), 0, batch))

    return Artefact(f"compile-{precision}-{batch}-{threads}", make, versions("torch", "transformers"))


# ------------------------------------------------------------------------------------------------ ONNX Runtime


def _session(file: str, network: Network, folder: Path, batch: int, threads: int) -> Runner:
    """Default settings, but for the number of threads and the log."""
    import onnxruntime

    if not (folder / file).is_file():
        reasons = folder / "missing.json"
        raise Missing(json.loads(reasons.read_text()).get(file, "not made") if reasons.is_file() else f"no {file} was made")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(str(folder / file), options, providers=["CPUExecutionProvider"])
    wanted = [entry.name for entry in session.get_inputs()]

    def run(inputs: Mapping[str, Array]) -> Array:
        logits: Array = session.run(None, {name: inputs[name] for name in wanted})[0]
        return logits

    return run


def _export(network: Network, folder: Path) -> None:
    import torch

    dynamic = {spec.name: {i: d for i, d in enumerate(spec.shape) if isinstance(d, str)} for spec in network.family.inputs(network.config)}
    arguments = tuple(torch.from_numpy(values) for values in rows(network.samples("calibration"), 0, 2).values())
    with _quiet():
        torch.onnx.export(
            network.module("eager"), arguments, str(folder / "model.onnx"), input_names=list(network.names), output_names=["logits"],
            dynamic_axes=dynamic, opset_version=OPSET, dynamo=False,
        )  # fmt: skip


EXPORT = Artefact("torchscript", _export, (OPSET, versions("torch", "transformers")))


def _dynamo(batch: int, threads: int) -> Artefact:
    """`torch.onnx.export(model, arguments)` with no further settings: the shapes are those of the arguments."""

    def make(network: Network, folder: Path) -> None:
        import torch

        arguments = tuple(torch.from_numpy(values) for values in rows(network.samples("calibration"), 0, batch).values())
        with _quiet():
            torch.onnx.export(network.module(), arguments, str(folder / "model.onnx"), input_names=list(network.names), verbose=False)

    return Artefact(f"dynamo-{batch}", make, versions("torch", "transformers", "onnxscript"))


def _preprocessed(network: Network, folder: Path) -> Path:
    from onnxruntime.quantization.shape_inference import quant_pre_process

    path = folder / "prepared.onnx"
    # its symbolic shape inference does not know these graphs' shape arithmetic ("Incomplete symbolic shape inference"): its own way out
    quant_pre_process(str(files(network, EXPORT) / "model.onnx"), str(path), skip_symbolic_shape=True)
    return path


def _make_dynamic(network: Network, folder: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    prepared = _preprocessed(network, folder)
    # its default would also turn the patch convolution into ConvInteger, which is slower than float
    out = str(folder / "model.onnx")
    quantize_dynamic(str(prepared), out, op_types_to_quantize=["MatMul"], per_channel=True, weight_type=QuantType.QInt8)
    prepared.unlink()


DYNAMIC = Artefact("dynamic", _make_dynamic, (EXPORT.depends, versions("onnxruntime")))


def _static(form: str) -> Artefact:
    """QDQ, unsigned activations, signed weights per channel: what its guide names for x86 with VNNI."""

    def make(network: Network, folder: Path) -> None:
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

        class Reader(CalibrationDataReader):  # type: ignore[misc]
            def __init__(self) -> None:
                self.left = _seen(network)

            def get_next(self) -> Any:
                return next(self.left, None)

        prepared = _preprocessed(network, folder)
        quantize_static(
            str(prepared), str(folder / "model.onnx"), Reader(), quant_format=QuantFormat.QDQ, op_types_to_quantize=STATIC_FORMS[form],
            per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip
        prepared.unlink()

    return Artefact(f"static-{form.replace(' ', '-')}", make, (EXPORT.depends, CALIBRATION, versions("onnxruntime")))


def _make_optimum(network: Network, folder: Path) -> None:
    """In an environment of its own: optimum-onnx wants transformers 4."""
    made = subprocess.run([str(CHECKOUT / "tools" / "optimum_environment.sh")], capture_output=True, text=True, check=False)
    if made.returncode:
        raise Missing(f"no environment for optimum could be made: {made.stderr.strip()[-500:]}")
    np.savez(folder / "samples.npz", allow_pickle=False, **rows(network.samples("calibration"), 0, CALIBRATION // 2))
    python, script = made.stdout.split()[-1], Path(__file__).with_name("optimum_files.py")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [python, str(script), str(network.folder / "model"), str(folder)], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise Missing(f"optimum failed: {done.stderr.strip()[-700:]}")
    (folder / "samples.npz").unlink()


OPTIMUM = Artefact("optimum", _make_optimum, ("optimum-onnx 0.1.0", CALIBRATION))


# ------------------------------------------------------------------------------------------------ OpenVINO


def _make_openvino(network: Network, folder: Path) -> None:
    import openvino
    import torch

    example = {name: torch.from_numpy(values) for name, values in rows(network.samples("calibration"), 0, 2).items()}
    with _quiet(), torch.no_grad():
        model = openvino.convert_model(network.module(), example_input=tuple(example.values()))
    for entry, name in zip(model.inputs, network.names, strict=True):
        entry.get_tensor().set_names({name})
    openvino.save_model(model, folder / "model.xml", compress_to_fp16=False)


OPENVINO = Artefact("openvino", _make_openvino, versions("openvino", "torch", "transformers"))


def _make_nncf(network: Network, folder: Path) -> None:
    import openvino

    try:
        import nncf  # type: ignore[import-untyped]
    except ImportError as error:
        raise Missing(f"nncf is not installed: {error}") from error
    model = openvino.Core().read_model(files(network, OPENVINO) / "model.xml")
    dataset = nncf.Dataset(list(_seen(network)))
    quantized = nncf.quantize(model, dataset, model_type=nncf.ModelType.TRANSFORMER, subset_size=CALIBRATION // 2)
    openvino.save_model(quantized, folder / "model.xml", compress_to_fp16=False)


NNCF = Artefact("nncf", _make_nncf, (OPENVINO.depends, CALIBRATION, versions("nncf")))


def _openvino(precision: str, network: Network, folder: Path, batch: int, threads: int) -> Runner:
    import openvino

    if precision == "bf16" and (reason := _no_bf16()):
        raise Missing(reason)
    core = openvino.Core()
    model = core.read_model(folder / "model.xml")
    shapes = {name: values.shape for name, values in rows(network.samples("evaluation"), 0, batch).items()}
    model.reshape({name: list(shape) for name, shape in shapes.items()})
    settings = {
        "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "ENABLE_CPU_PINNING": False, "INFERENCE_PRECISION_HINT": precision,
    }  # fmt: skip
    request = core.compile_model(model, "CPU", settings).create_infer_request()

    def run(inputs: Mapping[str, Array]) -> Array:
        logits: Array = request.infer(dict(inputs), share_inputs=True)[0]
        return logits

    return run


def environment() -> dict[str, str]:
    """Versions of everything that takes part; the compiler that torch.compile uses."""
    packages = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "openvino", "nncf", "numpy")
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    found = dict(versions(*packages)) | {"python": sys.version.split()[0], "optimum": OPTIMUM.depends[0], "compiler": compiler or "missing"}
    return {key: str(value) for key, value in found.items()}
