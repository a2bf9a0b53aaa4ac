"""This machine's processor: what it is, and timing on it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import nascompile
from nascompile import latency_table
from nascompile.devices import Job
from nascompile.devices.interleave import interleave, quantity
from nascompile.errors import UnsupportedError
from nascompile.records import Environment, Quantity, Target, encode

ISA = {
    "sse4_2": "sse4_2", "avx": "avx", "avx2": "avx2", "fma": "fma", "f16c": "f16c", "avx512f": "avx512f", "avx512bw": "avx512bw",
    "avx512vl": "avx512vl", "avx512_vnni": "avx512_vnni", "avx512vnni": "avx512_vnni", "avx_vnni": "avx_vnni", "avxvnni": "avx_vnni",
    "avx512_bf16": "avx512_bf16", "avx512_fp16": "avx512_fp16", "amx_tile": "amx_tile", "amx_int8": "amx_int8", "amx_bf16": "amx_bf16",
    "asimd": "neon", "neon": "neon", "asimddp": "dotprod", "i8mm": "i8mm", "bf16": "bf16", "sve": "sve", "sve2": "sve2",
}  # fmt: skip
"""Flags that choose kernels, as operating systems spell them ▸ one spelling."""


class Cpu:
    name = "cpu"
    deterministic = False

    def unavailable(self) -> str:
        """Always here."""
        return ""

    def describe(self) -> str:
        """Model, cores, instruction sets."""
        return f"{_model()}, {os.cpu_count()} cores, {' '.join(_isa()) or 'no known instruction sets'}"

    def environment(self, target: Target, versions: tuple[tuple[str, Any], ...]) -> Environment:
        """Processor, instruction sets, threads, session, versions and lowering must match; the rest is recorded."""
        return Environment(
            must_match=(
                ("cpu", _model()), ("isa", " ".join(_isa())), ("threads", target.threads),
                *((f"session.{name}", value) for name, value in target.session), *versions, ("lowering", latency_table.lowering_digest()),
            ),
            recorded=(
                ("os", platform.system()), ("kernel", platform.release()), ("machine", platform.machine()), ("cores", os.cpu_count()),
                ("memory_bytes", _memory()), ("clock_mhz", _clock()), ("python", platform.python_version()),
                ("nascompile", nascompile.__version__), ("load_average", _load()),
            ),
        )  # fmt: skip

    def reference(self) -> Job:
        """A NumPy product that no change of ours can make faster: its time moves only with the machine."""
        return Job("reference", _Reference(), {})

    def time(self, jobs: Sequence[Job], *, seconds: float, seed: int, min_samples: int = 30) -> tuple[Quantity, ...]:
        """Interleaved latencies in ms; the value is the lower quartile (see `interleave.STATISTIC`)."""
        calls = [partial(job.runner.run, job.inputs) for job in jobs]
        return tuple(quantity(s, "measured") for s in interleave(calls, seconds=seconds, seed=seed, min_samples=min_samples))

    def throughput(self, job: Job, batch: int, seconds: float) -> Quantity:
        """Samples per second over the calls completed in a window of at least `seconds`; n is the number of calls."""
        job.runner.run(job.inputs)
        start, calls = time.perf_counter(), 0
        while not calls or time.perf_counter() - start < seconds:
            job.runner.run(job.inputs)
            calls += 1
        return Quantity(value=calls * batch / (time.perf_counter() - start), unit="samples/s", kind="measured", n=calls)

    def peak_memory(self, backend: str, folder: str, target: Target, inputs: Mapping[str, Any]) -> int:
        """Bytes, interpreter and runtime included; UnsupportedError if the process fails."""
        with tempfile.TemporaryDirectory() as scratch:
            stored = Path(scratch) / "inputs.npz"
            np.savez(stored, allow_pickle=False, **dict(inputs))
            request = encode({"backend": backend, "folder": str(folder), "target": target, "inputs": str(stored)})
            command = [sys.executable, "-m", "nascompile.devices.cpu_memory"]
            done = subprocess.run(command, input=request, capture_output=True, check=False)
        if done.returncode:
            raise UnsupportedError(
                f"the engine in {folder} could not be run in a process of its own: exit status {done.returncode}",
                detail=done.stderr.decode(errors="replace")[-2000:],
            )
        return int(json.loads(done.stdout.splitlines()[-1])["peak_memory_bytes"])


class _Reference:
    """Twenty products of 64 × 64: long enough for the clock, small enough that BLAS keeps to one thread."""

    def __init__(self) -> None:
        self.a = np.random.default_rng(0).standard_normal((64, 64), dtype=np.float32)
        self.out = np.empty_like(self.a)

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        for _ in range(20):
            np.matmul(self.a, self.a, out=self.out)
        return {}


def _cpuinfo() -> dict[str, str]:
    """First processor's fields in lower case; empty where there is no /proc."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip().lower(): value.strip() for key, _, value in pairs}


def _model() -> str:
    """Name with family, model and stepping: virtual machines give different processors one name."""
    info = _cpuinfo()
    if "model name" in info:
        numbers = "-".join(info.get(key, "?") for key in ("cpu family", "model", "stepping"))
        return f"{info['model name']} ({numbers})"
    if "cpu part" in info:
        return f"ARM implementer {info.get('cpu implementer')} part {info['cpu part']} variant {info.get('cpu variant')}"
    return _sysctl("machdep.cpu.brand_string") or platform.processor() or platform.machine()


def _isa() -> tuple[str, ...]:
    info = _cpuinfo()
    flags = (info.get("flags") or info.get("features") or "").split()
    if not flags and platform.machine() == "arm64":
        features = (("asimddp", "DotProd"), ("i8mm", "I8MM"), ("bf16", "BF16"))
        flags = ["neon", *(flag for flag, key in features if _sysctl(f"hw.optional.arm.FEAT_{key}") == "1")]
    return tuple(sorted({ISA[flag.lower()] for flag in flags if flag.lower() in ISA}))


def _sysctl(name: str) -> str:
    if platform.system() != "Darwin":
        return ""
    return subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, check=False).stdout.strip()


def _memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def _clock() -> float:
    """MHz as the system reports it now; 0 if it does not."""
    try:
        return float(_cpuinfo().get("cpu mhz", 0))
    except ValueError:
        return 0.0


def _load() -> float:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else 0.0


PLUGIN = Cpu()
