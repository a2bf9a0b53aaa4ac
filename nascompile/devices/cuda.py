"""An NVIDIA GPU of this machine: what it is, and timing on it as on the processor. Not executed on a GPU so far.

A runner's call returns when its outputs are on the host, so the wall clock around it is a latency: copies in and out are part of it.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import nascompile
from nascompile import cuda_driver, latency_table, plugins, records
from nascompile.devices import Job
from nascompile.devices.cpu import Cpu
from nascompile.records import EngineManifest, Environment, Target

REFERENCE_BYTES = 1 << 20


class Cuda(Cpu):
    """Times and counts as `Cpu` does."""

    name = "cuda"
    deterministic = False

    def unavailable(self) -> str:
        """Needs a driver that shows a GPU."""
        return cuda_driver.unavailable()

    def describe(self) -> str:
        """Name, compute capability, memory, driver."""
        gpu = cuda_driver.gpu()
        return f"{gpu.name}, compute capability {gpu.compute_capability}, {gpu.memory_bytes / 2**30:.0f} GiB, CUDA {gpu.driver}"

    def environment(self, target: Target, versions: tuple[tuple[str, Any], ...]) -> Environment:
        """GPU, driver, threads, session, versions and lowering must match; the rest is recorded."""
        gpu = cuda_driver.gpu()
        return Environment(
            must_match=(
                ("gpu", gpu.name), ("compute_capability", gpu.compute_capability), ("driver", gpu.driver), ("threads", target.threads),
                *((f"session.{name}", value) for name, value in target.session), *versions, ("lowering", latency_table.lowering_digest()),
            ),
            recorded=(
                ("memory_bytes", gpu.memory_bytes), ("os", platform.system()), ("kernel", platform.release()),
                ("machine", platform.machine()), ("python", platform.python_version()), ("nascompile", nascompile.__version__),
            ),
        )  # fmt: skip

    def reference(self) -> Job:
        """A megabyte to the GPU and back: its time moves only with the machine."""
        return Job("reference", _Reference(), {})

    def peak_memory(self, backend: str, folder: str, target: Target, inputs: Mapping[str, Any]) -> int:
        """Bytes of the GPU's memory that loading the engine and one call take; what the host holds is not counted."""
        before = cuda_driver.free_bytes()
        graphs = records.load(Path(folder) / "manifest.json", EngineManifest).graphs
        runner = plugins.get("backends", backend).load(Path(folder), graphs, target)
        runner.run(inputs)
        return max(0, before - cuda_driver.free_bytes())


class _Reference:
    def __init__(self) -> None:
        self.stream = cuda_driver.Stream()
        self.array = np.zeros(REFERENCE_BYTES, np.uint8)
        self.address = self.stream.allocate(REFERENCE_BYTES)

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        self.stream.enter()
        self.stream.upload(self.address, self.array)
        self.stream.download(self.array, self.address)
        self.stream.synchronize()
        return {}


PLUGIN = Cuda()
