"""Apache TVM's own INT8 product, compiled for a Cortex-M7 and counted in the same emulator as the kernels."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from kernel_calls import run

from nascompile.mcu import reference

PACKAGE = "apache-tvm==0.27.0.post1"
TOKENS, INPUTS, OUTPUTS = 32, 192, 192
SCRIPT = run.HERE / "tvm_linear.py"


class Absent(Exception):
    """TVM is not here, and why."""


def python_of(folder: Path) -> str:
    """A Python with TVM, in an environment under `folder` that is made once; Absent if it cannot be."""
    python = folder / "bin" / "python"
    if not (folder / "ready").is_file():
        for command in ([sys.executable, "-m", "venv", str(folder)], [str(python), "-m", "pip", "install", "-q", PACKAGE]):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise Absent(f"{PACKAGE} does not install: {(done.stderr or done.stdout).strip()[-300:]}")
        (folder / "ready").write_text(PACKAGE)
    return str(python)


def measure(python: str) -> list[dict[str, Any]]:
    """A row for each schedule and form; SystemExit for one with other results. Absent if nothing compiles.

    `sums`: int32 sums, without bias or requantization. `int8`: with both, the same bytes as nc_linear.
    """
    rng = np.random.default_rng(0)
    x, weight = (rng.integers(-127, 128, shape, dtype=np.int8) for shape in ((TOKENS, INPUTS), (OUTPUTS, INPUTS)))
    bias = rng.integers(-20000, 20000, OUTPUTS, dtype=np.int32)
    multiplier = (2**32 / (rng.uniform(40, 200, OUTPUTS) * np.sqrt(INPUTS))).astype(np.int32)
    wanted = {
        "sums": (x.astype(np.int32) @ weight.T.astype(np.int32)).tobytes(),
        "int8": reference.linear(x, 0, weight, bias, multiplier, 0).tobytes(),
    }  # fmt: skip
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        done = subprocess.run(
            [python, str(SCRIPT), *map(str, (TOKENS, INPUTS, OUTPUTS)), scratch], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise Absent(f"TVM compiles nothing: {done.stderr.strip()[-300:]}")
        said = json.loads(done.stdout.splitlines()[-1])
        for name in said["objects"]:
            form, _, schedule = name.partition("-")
            peer = Path(scratch) / f"{name}.o"
            subprocess.run(["arm-none-eabi-objcopy", "--globalize-symbol=linear_compute_", str(peer)], check=True)
            more = [np.stack([bias, multiplier]), np.zeros((TOKENS, OUTPUTS), np.int32)] if form == "int8" else []
            halves = schedule.startswith("halves")
            more += [np.zeros((TOKENS, INPUTS), np.int16)] if halves else []
            stored = weight.astype(np.int16) if halves else weight
            call = run.Call("peer", (), tuple(map(run.Buffer, (x, stored, *more))), len(wanted[form]))
            [result] = run.in_qemu(run.build_target(Path(scratch), peer=peer), [call])
            if result.output.tobytes() != wanted[form]:
                raise SystemExit(f"error: TVM's schedule {schedule} gives other {form}")
            each = result.instructions / (TOKENS * INPUTS * OUTPUTS)
            found.append({"form": form, "schedule": schedule, "instructions": result.instructions, "instructions_per_mac": each,
                          "tvm": said["tvm"]})  # fmt: skip
    return sorted(found, key=lambda row: (row["form"], row["instructions"]))


def figures(found: list[dict[str, Any]]) -> dict[str, float]:
    """TVM's best schedule of each form."""
    names = {"sums": "tvm_linear_32x192x192_insn_per_mac", "int8": "tvm_linear_32x192x192_int8_insn_per_mac"}
    best: dict[str, float] = {}
    for row in found:
        best.setdefault(names[row["form"]], row["instructions_per_mac"])
    return best
