"""Every DSP instruction of port.h against NumPy: its plain C on this machine under UBSan, the instruction itself in QEMU on both cores."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
from kernel_calls import run

CALLS = {
    "pack_low": "nc_pack_low(a, b)",
    "pack_high": "nc_pack_high(a, b)",
    "sub16": "nc_sub16(a, b)",
    "max16": "nc_max16(a, b)",
    "max8": "nc_max8(a, b)",
    "even_bytes": "nc_even_bytes(a)",
    "odd_bytes": "nc_odd_bytes(a)",
    "clamp16_1023": "nc_clamp16_1023(a)",
    "dot2": "(uint32_t)nc_dot2(a, b, nc_signed(c))",
    "mul_add": "(uint32_t)nc_mul_add(nc_signed(a), nc_signed(b), nc_signed(c))",
    "mul_high": "(uint32_t)nc_mul_high(nc_signed(a), nc_signed(b))",
    "mul_high_add": "(uint32_t)nc_mul_high_add(nc_signed(a), nc_signed(b), nc_signed(c))",
    "saturate": "(uint32_t)nc_saturate(8, nc_signed(a), 20)",
    "saturate8": "(uint32_t)nc_saturate8(nc_signed(a))",
    "requantize2": "requantized(a, b, c)",
    "requantize_onto": "(uint32_t)nc_requantize_onto(nc_signed(a), nc_signed(b) / 2, nc_low(c), 1 << 20, -77 * (INT64_C(1) << 31))",
    "narrow2": "nc_narrow2(nc_signed(a), nc_signed(b), nc_signed(c), nc_signed(a), 13)",
    "load4": "nc_load4((const uint8_t *)words + 1)",
}
SOURCE = """#include "platform.h"
static uint32_t requantized(uint32_t a, uint32_t b, uint32_t c)
{
    int32_t sums[2] = {nc_signed(a), nc_signed(b)};
    nc_requantize2(sums, nc_signed(b), nc_signed(c), 5);
    return (uint32_t)(sums[0] * 256 + sums[1]);
}
int main(void)
{
    uint32_t count;
    platform_open();
    platform_read(&count, 4);
    for (; count > 0; count--) {
        uint32_t words[3];
        platform_read(words, 12);
        const uint32_t a = words[0], b = words[1], c = words[2];
        const uint32_t found[] = {@CALLS@};
        platform_write(found, sizeof found);
    }
    platform_close();
    return 0;
}
"""
EDGES = (
    0,
    1,
    0x7F,
    0x80,
    0x7FFF,
    0x8000,
    0xFFFF,
    0x10000,
    0x7FFFFFFF,
    0x80000000,
    0x80008000,
    0x80808080,
    0x7FFF8000,
    0x03FF0400,
    0xFFFFFFFF,
)


def cases() -> np.ndarray:
    """Triples of words: all pairs of edges, then random ones."""
    rng = np.random.default_rng(8)
    pairs = [(a, b, int(rng.choice(EDGES))) for a in EDGES for b in EDGES]
    return np.concatenate([np.array(pairs, np.uint32), rng.integers(0, 2**32, (400, 3), dtype=np.uint32)])


def expected(words: np.ndarray) -> dict[str, np.ndarray]:
    """Name ▸ results modulo 2^32, in Python's integers."""

    def signed(x: int, bits: int = 32) -> int:
        x &= (1 << bits) - 1
        return x - (1 << bits) if x >> (bits - 1) else x

    def parts(x: int, bits: int) -> list[int]:
        return [signed(x >> at, bits) for at in range(0, 32, bits)]

    def joined(values: list[int], bits: int = 16) -> int:
        return sum((v & ((1 << bits) - 1)) << (bits * i) for i, v in enumerate(values))

    def clamp(x: int, bits: int) -> int:
        return min((1 << (bits - 1)) - 1, max(-(1 << (bits - 1)), x))

    def high(x: int, y: int) -> int:
        return (signed(x) * signed(y) + 2**31) >> 32

    found: dict[str, list[int]] = {name: [] for name in CALLS}
    for a, b, c in words.tolist():
        (a0, a1), (b0, b1), (c0, _), bytes_a = parts(a, 16), parts(b, 16), parts(c, 16), parts(a, 8)
        row = {
            "pack_low": joined([a0, b0]), "pack_high": joined([a1, b1]), "sub16": joined([a0 - b0, a1 - b1]),
            "max16": joined([max(a0, b0), max(a1, b1)]), "max8": joined([max(p) for p in zip(bytes_a, parts(b, 8), strict=True)], 8),
            "even_bytes": joined(bytes_a[::2]), "odd_bytes": joined(bytes_a[1::2]),
            "clamp16_1023": joined([min(1023, max(0, a0)), min(1023, max(0, a1))]), "dot2": c + a0 * b0 + a1 * b1,
            "mul_add": a * b + c, "mul_high": high(a, b), "mul_high_add": high(a, b) + c, "saturate": clamp(signed(a) >> 20, 8),
            "saturate8": clamp(signed(a), 8),
            "requantize2": clamp(signed(high(a, b) + 5), 8) * 256 + clamp(signed(high(b, c) + 5), 8),
            "requantize_onto": clamp((signed(a) * int(signed(b) / 2) + c0 * 2**20 - 77 * 2**31) >> 32, 8),
            "narrow2": joined([clamp(high(a, c), 13), clamp(high(b, a), 13)]), "load4": (a >> 8 | b << 24) & 0xFFFFFFFF,
        }  # fmt: skip
        for name, value in row.items():
            found[name].append(value & 0xFFFFFFFF)
    return {name: np.array(values, np.uint32) for name, values in found.items()}


def check(data: bytes) -> None:
    words = cases()
    found = np.frombuffer(data, np.uint32).reshape(len(words), len(CALLS))
    for i, (name, want) in enumerate(expected(words).items()):
        wrong = np.flatnonzero(found[:, i] != want)
        assert not wrong.size, (name, [hex(w) for w in words[wrong[0]]], hex(found[wrong[0], i]), hex(want[wrong[0]]))


@pytest.fixture
def source(tmp_path: Path, mcu_tools: None) -> Path:
    (tmp_path / "port.c").write_text(SOURCE.replace("@CALLS@", ", ".join(CALLS.values())))
    (tmp_path / "cases.bin").write_bytes(np.uint32(len(cases())).tobytes() + cases().tobytes())
    return tmp_path / "port.c"


def test_plain_c_gives_what_the_instructions_are_defined_to_give(source):
    flags = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    command = ["gcc", *flags, f"-I{run.KERNELS}", f"-I{run.HERE}", source, run.HERE / "platform_host.c", "-o", source.parent / "host"]
    subprocess.run(command, check=True)
    done = subprocess.run([source.parent / "host"], input=(source.parent / "cases.bin").read_bytes(), capture_output=True, check=True)
    check(done.stdout)


@pytest.mark.parametrize("core", sorted(run.CORES))
def test_so_do_the_instructions(core, source):
    machine, flags = run.CORES[core]
    options = [
        *flags,
        "-mfloat-abi=hard",
        "-mthumb",
        "-std=c11",
        "-O3",
        "-ffreestanding",
        "-nostdlib",
        "-fno-tree-loop-distribute-patterns",
    ]
    sources = [source, run.HERE / "platform_qemu.c", f"-I{run.KERNELS}", f"-I{run.HERE}"]
    link = ["-T", run.HERE / "qemu.ld", "-Wl,--no-warn-rwx-segments", "-lgcc", "-o", source.parent / "port.elf"]
    subprocess.run(["arm-none-eabi-gcc", *options, *sources, *link], check=True)
    command = ["qemu-system-arm", "-M", machine, "-display", "none", "-serial", "none", "-monitor", "none", "-icount", "shift=6",
               "-semihosting-config", "enable=on,target=native", "-kernel", "port.elf"]  # fmt: skip
    subprocess.run(command, cwd=source.parent, check=True, timeout=60)
    check((source.parent / "results.bin").read_bytes())
