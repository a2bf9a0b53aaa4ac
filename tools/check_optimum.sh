#!/usr/bin/env bash
# Opens engine folders with optimum's ORTModel classes, runs each engine's own sample and compares with the stored outputs.
set -euo pipefail
[ $# -gt 0 ] || { echo "usage: tools/check_optimum.sh ENGINE_FOLDER..." >&2; exit 2; }
python=$("$(dirname "$0")/optimum_environment.sh")

HF_HUB_OFFLINE=1 "$python" - "$@" <<'PY'
import json
import sys
from pathlib import Path

import numpy as np
from optimum.onnxruntime import ORTModelForImageClassification, ORTModelForSequenceClassification

CLASSES = {"pixel_values": ORTModelForImageClassification, "input_ids": ORTModelForSequenceClassification}


def check(folder: Path) -> float:
    """Largest absolute difference between optimum's logits for the sample and the stored ones."""
    manifest = json.loads((folder / "manifest.json").read_text())["data"]
    kinds = [CLASSES[name] for name, *_ in manifest["inputs"] if name in CLASSES]
    if not kinds:
        raise ValueError(f"optimum has no class for inputs {', '.join(name for name, *_ in manifest['inputs'])}")
    model = kinds[0].from_pretrained(folder)
    with np.load(folder / "sample.npz", allow_pickle=False) as stored:
        inputs = {n.removeprefix("input."): stored[n] for n in stored.files if n.startswith("input.")}
        expected = stored["output.logits"]
    # a regression head has no names of its own, and transformers makes some up
    labels = tuple(model.config.id2label[i] for i in range(model.config.num_labels))
    if manifest["labels"] and labels != tuple(manifest["labels"]):
        raise ValueError(f"its labels are {labels}, the manifest's {tuple(manifest['labels'])}")
    difference = float(np.abs(model(**inputs).logits - expected).max())
    accepted = manifest.get("tolerance", 1e-2)
    if not difference <= accepted:  # NaN fails too
        raise ValueError(f"logits differ by {difference:.3g}, accepted is {accepted:.3g}")
    return difference


failed = 0
for folder in map(Path, sys.argv[1:]):
    try:
        print(f"OK      {folder}: largest difference {check(folder):.2g}")
    except Exception as error:  # whatever optimum raises is the finding
        failed += 1
        print(f"FAILED  {folder}: {type(error).__name__}: {error}")
sys.exit(1 if failed else 0)
PY
