"""Instructions of every integer kernel, counted in QEMU from call to return. Exact instructions, not cycles: no time is measured.

    python tools/benchmarks/mcu_kernels.py --json --tvm python

Needs gcc-arm-none-eabi and qemu-system-arm. Each call's bytes are checked against the kernel's NumPy definition before its count is
printed. `bar` is what the kernels were asked for: a count of other kernels for the same work in the same emulator. --tvm takes a Python
that has apache-tvm (`python -m pip install apache-tvm`): its 32x192x192 product, int32 sums without bias or requantization, is compiled
for a Cortex-M7, checked and counted in the same emulator.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from kernel_calls import calls, run

LABEL = "exact instructions in QEMU"
Row = tuple[str, run.Call, str, int, float | None]
"""Name, call, unit, how many of them, bar per unit."""


def rows() -> list[Row]:
    rng = np.random.default_rng(0)
    return [
        ("linear_32x192x192", calls.linear(rng, 32, 192, 192), "mac", 32 * 192 * 192, 1.33),
        ("linear_32x96x96", calls.linear(rng, 32, 96, 96), "mac", 32 * 96 * 96, None),
        ("linear_1x192x192", calls.linear(rng, 1, 192, 192), "mac", 192 * 192, None),
        ("linear_gelu_32x96x384", calls.linear(rng, 32, 96, 384, kind="table"), "mac", 32 * 96 * 384, None),
        ("linear_residual_32x384x96", calls.linear(rng, 32, 384, 96, kind="residual"), "mac", 32 * 384 * 96, None),
        ("low_rank_32x192x48x192", calls.low_rank(rng, 32, 192, 48, 192), "mac", 32 * 48 * 384, None),
        ("head_192x1000", calls.head(rng, 192, 1000), "mac", 192 * 1000, None),
        ("attention_197x32", calls.attention(rng, 197, 197, 32), "mac", 2 * 197 * 197 * 32, 2.07),
        ("attention_65x32", calls.attention(rng, 65, 65, 32), "mac", 2 * 65 * 65 * 32, None),
        ("softmax_32x192", calls.softmax(rng, 32, 192, 0.05), "element", 32 * 192, 24),
        ("layer_norm_32x192", calls.layer_norm(rng, 32, 192), "element", 32 * 192, 24),
        ("gelu_32x192", calls.lookup(rng, 32 * 192), "element", 32 * 192, 4),
        ("residual_add_32x192", calls.add(rng, 32 * 192), "element", 32 * 192, 9),
        ("patch_embed_224_16_96", calls.patch_embed(rng, 16, 3, 14, 14, 96, residual=True), "mac", 196 * 768 * 96, 1.35),
        ("mean_64x96", calls.mean(rng, 64, 96), "element", 64 * 96, None),
        ("conv3x3_16x16x32x32", calls.conv(rng, 16, 16, 32, 32), "mac", 256 * 288 * 32, None),
        ("conv3x3_32x32x3x16", calls.conv(rng, 32, 32, 3, 16), "mac", 1024 * 27 * 16, None),
        ("depthwise3x3_16x16x32", calls.depthwise(rng, 16, 16, 32), "mac", 256 * 9 * 32, None),
        ("pointwise_16x16x32x64", calls.linear(rng, 256, 32, 64), "mac", 256 * 32 * 64, None),
        ("average_pool_16x16x32", calls.average_pool(rng, 16, 16, 32, 2, 2), "element", 16 * 16 * 32, None),
    ]


def measure(core: str, wanted: list[Row]) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        results = run.in_qemu(run.build_target(Path(folder), core), [row[1] for row in wanted], core)
    found = []
    for (name, call, unit, count, bar), result in zip(wanted, results, strict=True):
        if not np.array_equal(np.ascontiguousarray(call.expected).reshape(-1).view(np.int8), result.output):
            raise SystemExit(f"{name} on {core}: other bytes than its definition")
        found.append({"kernel": name, "core": core, "instructions": result.instructions, "unit": unit, "count": count,
                      "instructions_per_unit": result.instructions / count, "bar": bar})  # fmt: skip
    return found


def measure_tvm(python: str) -> dict[str, Any]:
    tokens, inputs, outputs = 32, 192, 192
    rng = np.random.default_rng(0)
    x, weight = (rng.integers(-127, 128, shape, dtype=np.int8) for shape in ((tokens, inputs), (outputs, inputs)))
    call = run.Call("peer", (), (run.Buffer(x), run.Buffer(weight)), 4 * tokens * outputs)
    with tempfile.TemporaryDirectory() as folder:
        peer = Path(folder) / "linear.o"
        command = [python, str(run.HERE / "tvm_linear.py"), str(tokens), str(inputs), str(outputs), str(peer)]
        tvm = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        subprocess.run(["arm-none-eabi-objcopy", "--globalize-symbol=linear_compute_", str(peer)], check=True)
        [result] = run.in_qemu(run.build_target(Path(folder), peer=peer), [call])
    if not np.array_equal(result.output.view(np.int32).reshape(tokens, outputs), x.astype(np.int32) @ weight.T.astype(np.int32)):
        raise SystemExit("TVM's product is another one")
    count = tokens * inputs * outputs
    return {"kernel": "tvm_linear_32x192x192", "core": "cortex-m7", "instructions": result.instructions, "unit": "mac", "count": count,
            "instructions_per_unit": result.instructions / count, "bar": None, "tvm": tvm}  # fmt: skip


def version(program: str) -> str:
    return subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--cores", nargs="+", choices=sorted(run.CORES), default=["cortex-m7"])
    parser.add_argument("--tvm", metavar="PYTHON", help="a Python with apache-tvm")
    given = parser.parse_args()
    found = [row for core in given.cores for row in measure(core, rows())]
    if given.tvm:
        found.append(measure_tvm(given.tvm))
    if given.json:
        environment = {"compiler": version("arm-none-eabi-gcc"), "emulator": version("qemu-system-arm"), "flags": "-O3 -mthumb"}
        print(json.dumps({"label": LABEL, "environment": environment, "rows": found}, indent=1))
        return
    print(f"{LABEL}, call to return")
    for row in found:
        bar = "" if row["bar"] is None else f"  bar {row['bar']:g}"
        print(f"{row['kernel']:28} {row['core']:9} {row['instructions']:12,}  {row['instructions_per_unit']:7.3f} a {row['unit']}{bar}")


if __name__ == "__main__":
    main()
