"""A built project, loaded: floats in and out on this computer, instructions per operator in QEMU."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from nascompile.errors import DataError
from nascompile.mcu import project, toolchain
from nascompile.mcu.board import Board
from nascompile.mcu.program import Logits, Pixels


class McuRunner:
    """Runs the host build, whose bytes are the firmware's; counts by the firmware itself."""

    def __init__(self, folder: Path, board: Board, settings: Mapping[str, str] | None = None) -> None:
        self.folder, self.board, self.settings = folder, board, settings or {}
        self.facts = project.facts(folder)
        self._pixels = msgspec.convert(self.facts["pixels"], Pixels)
        self._logits = msgspec.convert(self.facts["logits"], Logits)
        self._image = tuple(self.facts["image"])
        self._counted: dict[bytes, toolchain.Run] = {}
        # an engine's folder holds what was hashed and nothing else, so this computer's build is made elsewhere
        self._built = tempfile.TemporaryDirectory(prefix="nascompile-mcu-")
        shutil.copytree(folder, self._built.name, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*project.PRODUCTS))
        toolchain.make(Path(self._built.name), "firmware_host")

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Float scores (n, classes); DataError for inputs that are not the program's."""
        found = toolchain.run_host(Path(self._built.name), self.quantized(inputs))
        return {self._logits.name: self.scores(found)}

    def count(self, inputs: Mapping[str, Any]) -> toolchain.Run:
        """Instructions per counter for the first sample, in QEMU; the same sample is run once."""
        sample = self.quantized(inputs)[:1]
        key = sample.tobytes()
        if key not in self._counted:
            self._counted[key] = toolchain.run_emulated(self.folder, self.board.core, sample)
        return self._counted[key]

    def emulate(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """As `run`, by the firmware in QEMU."""
        return {self._logits.name: self.scores(toolchain.run_emulated(self.folder, self.board.core, self.quantized(inputs)))}

    def scores(self, found: toolchain.Run) -> npt.NDArray[np.float32]:
        """What output bytes mean."""
        dtype = np.int32 if self.facts["output_word"] == 4 else np.int8
        raw = np.ascontiguousarray(found.outputs).view(dtype)
        return ((raw.astype(np.float64) - self._logits.zero_point) * self._logits.scale).astype(np.float32)

    def quantized(self, inputs: Mapping[str, Any]) -> npt.NDArray[np.int8]:
        """(n, height, width, channels) int8: of samples as they are before pixels are averaged."""
        height, width, channels = self._image
        height, width = height * self._pixels.pool, width * self._pixels.pool
        if set(inputs) != {self._pixels.name}:
            raise DataError(f"inputs are {', '.join(sorted(inputs)) or 'missing'}, the network takes {self._pixels.name}")
        x = np.asarray(inputs[self._pixels.name])
        if x.dtype != np.float32 or x.shape[1:] != (channels, height, width):
            wanted = f"float32 of shape (n, {channels}, {height}, {width})"
            raise DataError(f"{self._pixels.name} is {x.dtype} of shape {x.shape}, the network takes {wanted}")
        return self._pixels.quantize(x)
