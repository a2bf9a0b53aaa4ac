"""A process that loads one engine, runs one call and prints its peak resident bytes: `python -m nascompile.devices.cpu_memory`."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import msgspec
import numpy as np

from nascompile import plugins, records


class _Request(records.Record, frozen=True):
    backend: str
    folder: str
    target: records.Target
    inputs: str


def peak() -> int:
    """Bytes. Linux's `ru_maxrss` starts from the parent's size at the fork, so its own high-water mark is read where there is one."""
    try:
        line = next(x for x in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if x.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Reads a request from stdin: backend name, engine folder, target, inputs as an .npz path."""
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=_Request)
    folder = Path(request.folder)
    graphs = records.load(folder / "manifest.json", records.EngineManifest).graphs
    runner = plugins.get("backends", request.backend).load(folder, graphs, request.target)
    with np.load(request.inputs, allow_pickle=False) as stored:
        inputs = {name: stored[name] for name in stored.files}
    runner.run(inputs)
    print(json.dumps({"peak_memory_bytes": peak()}))


if __name__ == "__main__":
    main()
