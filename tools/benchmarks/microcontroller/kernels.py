"""Instructions of every integer kernel, counted in QEMU from call to return, its bytes checked against the kernel's NumPy definition.

Packing happens before, as in a project. Everything else is counted: expansion of tokens, bias, requantization, INT8 output.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from kernel_calls import calls, run

Row = tuple[str, run.Call, str, int, float | None]
"""Name, call, unit, how many of them, bar per unit: what other kernels took for the same work in the same emulator."""


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
    """A row a kernel; SystemExit where one gives other bytes than its definition."""
    with tempfile.TemporaryDirectory() as folder:
        results = run.in_qemu(run.build_target(Path(folder), core), [row[1] for row in wanted], core)
    found = []
    for (name, call, unit, count, bar), result in zip(wanted, results, strict=True):
        if not np.array_equal(np.ascontiguousarray(call.expected).reshape(-1).view(np.int8), result.output):
            raise SystemExit(f"error: {name} on {core} gives other bytes than its definition")
        each = result.instructions / count
        found.append({"kernel": name, "core": core, "instructions": result.instructions, "unit": unit, "count": count,
                      f"instructions_per_{unit}": each, "bar": bar, "reached": None if bar is None else each <= bar})  # fmt: skip
    return found


def figures(found: list[dict[str, Any]]) -> dict[str, float]:
    """Cortex-M7: kernel_insn_per_unit ▸ instructions."""
    own = [row for row in found if row["core"] == "cortex-m7"]
    return {f"{row['kernel']}_insn_per_{row['unit']}": row[f"instructions_per_{row['unit']}"] for row in own}
