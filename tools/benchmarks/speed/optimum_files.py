"""Writes O3.onnx, dynamic.onnx and static.onnx with optimum; runs in optimum's environment, not in ours.

python optimum_files.py HUGGING_FACE_FOLDER OUT, with calibration inputs in OUT/samples.npz; why a file is missing goes to missing.json.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def main() -> None:
    source, out = Path(sys.argv[1]), Path(sys.argv[2])
    from optimum.onnxruntime import ORTModelForImageClassification, ORTModelForSequenceClassification

    text = json.loads((source / "config.json").read_text())["model_type"] != "vit"
    model = (ORTModelForSequenceClassification if text else ORTModelForImageClassification).from_pretrained(source, export=True)
    missing = {}
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        exported = Path(scratch) / "exported"
        model.save_pretrained(exported)
        steps: dict[str, Callable[[Path, Path], Any]] = {"O3": optimize, "dynamic": quantize_dynamic, "static": quantize_static}
        for name, step in steps.items():
            folder = Path(scratch) / name
            try:
                step(exported, folder)
                shutil.move(next(folder.glob("*.onnx")), out / f"{name}.onnx")
            except Exception as error:  # what it raises is why the file is missing
                missing[f"{name}.onnx"] = f"{type(error).__name__}: {error}"[:500]
    (out / "missing.json").write_text(json.dumps(missing))


def optimize(exported: Path, folder: Path) -> None:
    from optimum.onnxruntime import ORTOptimizer
    from optimum.onnxruntime.configuration import AutoOptimizationConfig

    ORTOptimizer.from_pretrained(exported).optimize(save_dir=folder, optimization_config=AutoOptimizationConfig.O3())


def quantize_dynamic(exported: Path, folder: Path) -> None:
    from optimum.onnxruntime import ORTQuantizer
    from optimum.onnxruntime.configuration import AutoQuantizationConfig

    ORTQuantizer.from_pretrained(exported).quantize(AutoQuantizationConfig.avx512_vnni(is_static=False), folder)


def quantize_static(exported: Path, folder: Path) -> None:
    from onnxruntime.quantization import CalibrationMethod
    from optimum.onnxruntime import ORTQuantizer
    from optimum.onnxruntime.configuration import AutoQuantizationConfig, CalibrationConfig

    with np.load(exported.parents[1] / "samples.npz", allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    count = len(next(iter(arrays.values())))
    dataset = [{name: values[i] for name, values in arrays.items()} for i in range(count)]
    calibration = CalibrationConfig(
        dataset_name="", dataset_config_name="", dataset_split="", dataset_num_samples=count, method=CalibrationMethod.MinMax
    )
    settings = AutoQuantizationConfig.avx512_vnni(is_static=True)
    quantizer = ORTQuantizer.from_pretrained(exported)
    ranges = quantizer.fit(
        dataset, calibration, onnx_augmented_model_name=exported.parent / "augmented.onnx",
        operators_to_quantize=settings.operators_to_quantize,
    )  # fmt: skip
    quantizer.quantize(settings, folder, calibration_tensors_range=ranges)


if __name__ == "__main__":
    main()
