"""What is timed: how a contender's files are made once and kept, and how they become a call."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nascompile.records import digest, write_atomic
from speed.networks import Array, Network

Runner = Callable[[Mapping[str, Array]], Array]
"""Inputs ▸ logits, NumPy both."""
MADE = "made.json"
KEY = 12
"""Characters of an artefact's digest in its folder's name; only the newest is kept."""
FP32, REDUCED = "fp32", "reduced"
"""Float32 throughout, or anything with fewer bits."""


class Missing(Exception):
    """A contender that cannot take part, and why."""


@dataclass(frozen=True)
class Artefact:
    """Files that a contender reads, kept under a digest of what they depend on."""

    name: str
    make: Callable[[Network, Path], None]
    """Writes into an empty folder; raises Missing if it cannot be done here."""
    depends: tuple[Any, ...] = ()

    def folder(self, network: Network) -> Path:
        return network.folder / "artefacts" / f"{self.name}-{digest(self.depends)[:KEY]}"


@dataclass(frozen=True)
class Contender:
    """Something that runs a network."""

    name: str
    runtime: str
    """`torch`, `onnxruntime`, `openvino`."""
    form: str
    """FP32 or REDUCED."""
    artefact: Callable[[int, int], Artefact]
    """(batch, threads) ▸ files."""
    load: Callable[[Network, Path, int, int], Runner]
    """(network, files, batch, threads); raises Missing."""
    ours: bool = False


def files(network: Network, artefact: Artefact) -> Path:
    """The artefact's folder, made if it is not there; Missing if that failed, now or earlier."""
    folder = artefact.folder(network)
    if not (folder / MADE).is_file():
        _make(network, artefact, folder)
    if reason := json.loads((folder / MADE).read_text())["missing"]:
        raise Missing(reason)
    return folder


def _make(network: Network, artefact: Artefact, folder: Path) -> None:
    print(f"making {artefact.name} of {network.name}", file=sys.stderr, flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    began, missing = time.monotonic(), ""
    with tempfile.TemporaryDirectory(prefix=".artefact.", dir=folder.parent) as scratch:
        work = Path(scratch) / "files"
        work.mkdir()
        try:
            artefact.make(network, work)
        except Exception as error:  # whatever a rival raises is why it is missing
            missing = f"{type(error).__name__}: {error}"[:800] if not isinstance(error, Missing) else str(error)
            print(f"  missing: {missing}", file=sys.stderr, flush=True)
            shutil.rmtree(work)
            work.mkdir()
        write_atomic(work / MADE, json.dumps({"missing": missing, "seconds": time.monotonic() - began}).encode())
        for old in folder.parent.glob(f"{artefact.name}-{'?' * KEY}"):
            shutil.rmtree(old)
        shutil.move(work, folder)


def version(package: str) -> str:
    """Installed version, or `missing`."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def versions(*packages: str) -> tuple[tuple[str, str], ...]:
    """(package, version) of each."""
    return tuple((package, version(package)) for package in packages)
