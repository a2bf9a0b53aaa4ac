"""The cross-compiler, QEMU and the host's compiler: what is missing, building a project, running it."""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from nascompile.errors import UnsupportedError
from nascompile.mcu.board import Board, Core, Region, linker_script

HERE = Path(__file__).parent
COMPILER, EMULATOR, HOST_COMPILER = "arm-none-eabi-gcc", "qemu-system-arm", "cc"
INSTALL = "apt-get install -y --no-install-recommends gcc-arm-none-eabi qemu-system-arm gcc libc6-dev make"
EACH = 4
"""Samples at least that are worth a process of this computer's."""
MAGIC = 0x314D434E
UNITS: tuple[Literal["", "instructions", "cycles"], ...] = ("", "instructions", "cycles")
EXITS = {
    95: "the samples end in the middle of one", 96: "results could not be written", 97: "no command line", 98: "a file cannot be opened",
    99: "a fault: memory outside the device's RAM, or a stack that grew too deep",
}  # fmt: skip


@dataclass(frozen=True)
class Base:
    """What every project with the same kernels takes: harness, start-up and kernels."""

    text: int
    """Bytes of flash."""
    bss: int
    """Bytes of RAM, without stack, arena and counters."""


@dataclass(frozen=True)
class Run:
    """What a firmware said about a number of samples."""

    outputs: npt.NDArray[np.uint8]
    """Samples × bytes."""
    counts: npt.NDArray[np.uint32]
    """Samples × counters; zeros on the host."""
    stack_bytes: int
    """Deepest stack; 0 on the host."""
    ram_bytes: int
    flash_bytes: int
    unit: Literal["", "instructions", "cycles"] = ""
    """What `counts` are."""


def missing(*programs: str) -> str:
    """Which programs are not installed and how to get them; empty if all are."""
    absent = [name for name in programs if shutil.which(name) is None]
    return f"{' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} not installed: {INSTALL}" if absent else ""


@cache
def version(program: str) -> str:
    """First line of `--version`, or `missing`."""
    if shutil.which(program) is None:
        return "missing"
    return subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout.split("\n")[0].strip()


def make(folder: Path, *arguments: str) -> str:
    """Run make in a project, its standard output; UnsupportedError with what the compiler said."""
    done = subprocess.run(["make", "-s", "-j2", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        said = "\n".join([line for line in done.stderr.splitlines() if not line.startswith("make")][:20])
        raise UnsupportedError(f"make {' '.join(arguments)} failed in {folder}", detail=said)
    return done.stdout


def run_emulated(folder: Path, core: Core, samples: npt.NDArray[np.int8], timeout: float = 600.0) -> Run:
    """Samples (n, …) through `firmware.elf` in one process of QEMU."""
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "in").write_bytes(np.ascontiguousarray(samples, dtype=np.int8).tobytes())
        arguments = ",".join(f"arg={word}" for word in ("firmware", "in", "out"))
        command = [
            EMULATOR, "-M", core.machine, "-display", "none", "-serial", "none", "-monitor", "none", "-chardev", "null,id=s",
            "-semihosting-config", f"enable=on,target=native,chardev=s,{arguments}", "-icount", "shift=6",
            "-kernel", str((folder / "firmware.elf").resolve()),
        ]  # fmt: skip
        return _finished(command, scratch, len(samples), timeout)


def run_host(folder: Path, samples: npt.NDArray[np.int8], timeout: float = 600.0) -> Run:
    """The same through `firmware_host`, on all processor cores where there are samples for them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = max(1, min(cores, len(samples) // EACH))
    with ThreadPoolExecutor(count) as pool:
        found = list(pool.map(lambda part: _on_host(folder, part, timeout), np.array_split(samples, count)))
    outputs, counts = (np.concatenate([getattr(run, name) for run in found]) for name in ("outputs", "counts"))
    return replace(found[0], outputs=outputs, counts=counts)


def _on_host(folder: Path, samples: npt.NDArray[np.int8], timeout: float) -> Run:
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "in").write_bytes(np.ascontiguousarray(samples, dtype=np.int8).tobytes())
        return _finished([str((folder / "firmware_host").resolve()), "in", "out"], scratch, len(samples), timeout)


def parse(data: bytes, samples: int) -> Run:
    """Records of the harness; UnsupportedError for what is none."""
    if len(data) < 32 or struct.unpack_from("<I", data)[0] != MAGIC:
        raise UnsupportedError(f"the firmware wrote no results: {data[:40]!r}")
    _, counters, _, output_bytes, ram, flash, _, unit = struct.unpack_from("<8I", data)
    record = output_bytes + 4 * counters + 4
    if len(data) != 32 + samples * record:
        raise UnsupportedError(f"the firmware wrote {len(data):,} bytes for {samples} samples, not {32 + samples * record:,}")
    rows = np.frombuffer(data, np.uint8, offset=32).reshape(samples, record)
    words = np.ascontiguousarray(rows[:, output_bytes:]).view(np.uint32)
    return Run(rows[:, :output_bytes].copy(), words[:, :-1].copy(), int(words[:, -1].max(initial=0)), ram, flash, UNITS[unit])


@cache
def base(core: Core, functions: tuple[str, ...]) -> Base:
    """Sizes of harness and kernels, from linking them once with nothing else; UnsupportedError without a compiler."""
    if reason := missing(COMPILER):
        raise UnsupportedError(f"what kernels take of flash cannot be known: {reason}")
    with tempfile.TemporaryDirectory() as scratch:
        elf = _probe(Path(scratch), core, functions)
        symbols = _symbols(elf)
    return Base(symbols["_flash_used"] - symbols["_model_size"], symbols["_ram_used"] - 512)


def _probe(folder: Path, core: Core, functions: Sequence[str]) -> Path:
    """A firmware whose model is a table of kernels."""
    addresses = ", ".join(f"(const void *){name}" for name in ("nc_mark", *functions))
    text = f'#include "model.h"\nstatic const void *const table[] = {{{addresses}}};\n'
    text += "const nc_model_t model;\nconst void *model_run(nc_row_source image, void *context)\n"
    text += "{\n    (void)image, (void)context;\n    return table;\n}\n"
    (folder / "model.c").write_text(text)
    (folder / "memory_map.c").write_text('#include "memory_map.h"\nconst nc_region_t guard_regions[8] = {{0x20000000u, 22, 3}};\n')
    board = Board(
        device="probe", core=core, ram=(Region(origin=0x20000000, size=1 << 20),), flash=Region(origin=0, size=1 << 22), clock_mhz=1,
        stack_bytes=512,
    )  # fmt: skip
    script = linker_script((HERE / "firmware" / "link.ld").read_text("utf-8"), board, "probe", 8192)
    (folder / "link.ld").write_text(script + "_model_size = SIZEOF(.model);\n")
    firmware = ("harness", "startup", "memory", "io_semihosting")
    sources = [HERE / "firmware" / f"{name}.c" for name in firmware] + sorted((HERE / "kernels").glob("*.c"))
    objects, includes = [], (folder, HERE / "kernels", HERE / "firmware")
    for path in (folder / "model.c", folder / "memory_map.c", *sources):
        objects.append(folder / f"{path.stem}.o")
        _compile([*core.flags.split(), *CFLAGS, *(f"-I{place}" for place in includes), "-c", str(path)], objects[-1])
    link = ["-nostdlib", "-nostartfiles", "-Wl,--gc-sections", "-Wl,--no-warn-rwx-segments", "-T", str(folder / "link.ld")]
    _compile([*core.flags.split(), "-mthumb", *link, *map(str, objects), "-lgcc"], folder / "probe.elf")
    return folder / "probe.elf"


CFLAGS = ("-mthumb", "-std=c11", "-O3", "-ffreestanding", "-fbuiltin", "-fno-tree-loop-distribute-patterns", "-ffunction-sections",
          "-fdata-sections", "-DNC_PROFILE")  # fmt: skip
"""As in firmware/Makefile."""


def _compile(arguments: Sequence[str], output: Path) -> None:
    done = subprocess.run([COMPILER, *arguments, "-o", str(output)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UnsupportedError(f"{COMPILER} cannot compile the kernels", detail=done.stderr[:2000])


def _symbols(elf: Path) -> dict[str, int]:
    """Symbol ▸ value."""
    text = subprocess.run([COMPILER.replace("gcc", "nm"), str(elf)], capture_output=True, text=True, check=True).stdout
    return {parts[2]: int(parts[0], 16) for line in text.splitlines() if len(parts := line.split()) == 3}


def _finished(command: Sequence[str], scratch: str, samples: int, timeout: float) -> Run:
    try:
        done: Any = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False, timeout=timeout)
    except subprocess.TimeoutExpired as error:
        raise UnsupportedError(f"the firmware did not end within {timeout:g} s") from error
    if done.returncode:
        why = EXITS.get(done.returncode, done.stderr[-500:] or "it said nothing")
        raise UnsupportedError(f"the firmware ended with status {done.returncode}: {why}")
    return parse((Path(scratch) / "out").read_bytes(), samples)


def sources() -> list[Path]:
    """Kernels, firmware, what writes C, and what makes programs of networks."""
    own = (path for path in HERE.rglob("*") if path.suffix in (".c", ".h", ".ld", ".py") or path.name == "Makefile")
    return [*sorted(own), HERE.parent / "programs.py"]


def sources_digest() -> str:
    """Hash of `sources`: projects of different hashes are different programs."""
    sha = hashlib.sha256()
    for path in sources():
        sha.update(path.relative_to(HERE.parent).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return sha.hexdigest()[:16]
