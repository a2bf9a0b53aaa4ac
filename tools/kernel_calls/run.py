"""Kernel calls as data: written for driver.c, run on this machine or in QEMU, read back."""

from __future__ import annotations

import shutil
import struct
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nascompile import mcu
from nascompile.mcu import packing

HERE = Path(__file__).resolve().parent
KERNELS = Path(mcu.__file__).parent / "kernels"
KERNEL_NAMES = (
    "linear", "low_rank", "head", "attention", "matmul", "softmax", "layer_norm", "lookup", "add", "mean", "patch_embed", "conv",
    "depthwise", "average_pool",
)  # fmt: skip
NAMES = (*KERNEL_NAMES, "peer")
"""As driver.c numbers them; `peer` is another compiler's object, see build_target."""
ROWS, KEYS, VALUES = 0, 1, 2
WARNINGS = ("-std=c11", "-Wall", "-Wextra", "-Werror", "-Wconversion")
CORES = {
    "cortex-m7": ("mps2-an500", ("-mcpu=cortex-m7", "-mfpu=fpv5-d16")),
    "cortex-m4": ("mps2-an386", ("-mcpu=cortex-m4", "-mfpu=fpv4-sp-d16")),
}


@dataclass(frozen=True)
class Buffer:
    """Bytes for the driver at `offset` from an aligned address; None for a null pointer."""

    content: npt.NDArray[Any] | None = None
    offset: int = 0


@dataclass(frozen=True)
class Call:
    """One kernel call: `alias` is the buffer that is also the output."""

    kernel: str
    parameters: tuple[int, ...]
    buffers: tuple[Buffer, ...]
    out_bytes: int
    scratch_bytes: int = 0
    alias: int | None = None
    offset: int = 0
    expected: npt.NDArray[Any] = field(default_factory=lambda: np.zeros(0, np.int8))

    def encoded(self) -> bytes:
        parts = [struct.pack("<2I", NAMES.index(self.kernel), len(self.parameters))]
        parts += [struct.pack("<I", p & 0xFFFFFFFF) for p in self.parameters]
        parts.append(struct.pack("<I", len(self.buffers)))
        for buffer in self.buffers:
            data = b"" if buffer.content is None else np.ascontiguousarray(buffer.content).tobytes()
            parts += [struct.pack("<2I", len(data), buffer.offset), data]
        alias = 0xFFFFFFFF if self.alias is None else self.alias
        return b"".join([*parts, struct.pack("<4I", self.out_bytes, alias, self.offset, self.scratch_bytes)])


@dataclass(frozen=True)
class Result:
    """A call's output bytes and its exact instructions (0 on this machine)."""

    output: npt.NDArray[np.int8]
    instructions: int


def linear_parameters(inputs: int, outputs: int, zero_point: int = 0, x_stride: int | None = None, y_stride: int | None = None,
                      layout: int = ROWS, residual_multiplier: int = 0, residual_constant: int = 0) -> tuple[int, ...]:  # fmt: skip
    """nc_linear_t for the driver, 15 words and one that kernels use for their own."""
    return (residual_constant, residual_constant >> 32, residual_multiplier, zero_point, inputs, outputs,
            inputs if x_stride is None else x_stride, outputs if y_stride is None else y_stride, layout) + (0,) * 7  # fmt: skip


def linear_scratch(inputs: int) -> int:
    return 8 * (-(-inputs // 4) * 4)


def keys(k: npt.NDArray[np.int8], fill: int = 77) -> npt.NDArray[np.int8]:
    """(tokens, width) in the NC_KEYS layout, its pad filled."""
    tokens, width = k.shape
    stride = 2 * (-(-width // 4) * 4)
    out = np.full(-(-tokens // 2) * stride, fill, np.int8)
    for t in range(tokens):
        for c in range(width):
            out[t // 2 * stride + t % 2 + c // 4 * 8 + (0, 4, 2, 6)[c % 4]] = k[t, c]
    return out


def values(v: npt.NDArray[np.int8], fill: int = 77) -> npt.NDArray[np.int8]:
    """(tokens, width) in the NC_VALUES layout, its pad filled."""
    tokens, width = v.shape
    stride = 2 * (-(-tokens // 2) * 2)
    out = np.full(-(-width // 2) * stride, fill, np.int8)
    for t in range(tokens):
        for c in range(width):
            out[c // 2 * stride + c % 2 + t * 2] = v[t, c]
    return out


def packed(weight: npt.NDArray[np.int8], bias: npt.NDArray[np.int32], multiplier: npt.NDArray[np.int32], x_zero: int) -> Buffer:
    return Buffer(packing.linear(weight, bias, multiplier, x_zero))


def _sources() -> list[str]:
    return [str(path) for path in sorted(KERNELS.glob("*.c"))]


def build_host(folder: Path, *, sanitize: bool = True) -> Path:
    """The driver for this machine, under AddressSanitizer and UBSan; its path."""
    out = folder / "driver-host"
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"] if sanitize else []
    sources = [*_sources(), str(HERE / "driver.c"), str(HERE / "platform_host.c")]
    _compile(["gcc", *WARNINGS, "-O1", "-g", *flags, f"-I{KERNELS}", *sources], out)
    return out


def build_target(folder: Path, core: str = "cortex-m7", peer: Path | None = None) -> Path:
    """The driver for a core, linked with another compiler's object where one is given; its path."""
    out = folder / f"driver-{core}.elf"
    sources = [*_sources(), str(HERE / "driver.c"), str(HERE / "platform_qemu.c")]
    if peer is not None:
        sources += [str(peer), "-Wl,--unresolved-symbols=ignore-all", "-Wl,--no-warn-mismatch"]  # its error reporting; it passes no floats
    flags = ["-mfloat-abi=hard", "-mthumb", "-O3", "-ffreestanding", "-nostdlib", "-fno-tree-loop-distribute-patterns"]
    link = ["-T", str(HERE / "qemu.ld"), "-Wl,--no-warn-rwx-segments", "-lgcc"]
    _compile(["arm-none-eabi-gcc", *WARNINGS, *CORES[core][1], *flags, f"-I{KERNELS}", *sources, *link], out)
    return out


def _compile(command: list[str], out: Path) -> None:
    done = subprocess.run([*command, "-o", str(out)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{done.stderr}")


def on_host(driver: Path, calls: list[Call]) -> list[Result]:
    done = subprocess.run([driver], input=_file(calls), capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the driver ended with {done.returncode}:\n{done.stderr.decode(errors='replace')}")
    return _results(done.stdout, calls)


def in_qemu(driver: Path, calls: list[Call], core: str = "cortex-m7") -> list[Result]:
    """Exact instructions from call to return, to within the one that its 1.6 ticks round to; 3 to 7 of them read the timer."""
    folder = driver.parent / core
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "cases.bin").write_bytes(_file(calls))
    command = ["qemu-system-arm", "-M", CORES[core][0], "-display", "none", "-serial", "none", "-monitor", "none", "-icount", "shift=6",
               "-semihosting-config", "enable=on,target=native", "-kernel", str(driver)]  # fmt: skip
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise RuntimeError(f"the driver in QEMU ended with {done.returncode} (99: fault, 6: memory): {done.stderr}")
    return _results((folder / "results.bin").read_bytes(), calls)


def _file(calls: list[Call]) -> bytes:
    return struct.pack("<I", len(calls)) + b"".join(call.encoded() for call in calls)


def _results(data: bytes, calls: list[Call]) -> list[Result]:
    found, at = [], 0
    for call in calls:
        instructions = struct.unpack_from("<I", data, at)[0]
        found.append(Result(np.frombuffer(data, np.int8, call.out_bytes, at + 4), instructions))
        at += 4 + call.out_bytes
    assert at == len(data), "results of another length than the calls ask for"
    return found
