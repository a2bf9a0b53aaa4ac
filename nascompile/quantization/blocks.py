"""Arithmetic of weight-only integers: each group of inputs of an output has a scale of its own."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from nascompile.quantization import limits
from nascompile.records import Precision


class BlockWeights:
    """A scheme whose activations are floats."""

    def __init__(self, precision: Precision) -> None:
        self.name, self.precision = precision.name, precision

    def quantize_weight(self, weight: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
        """(out, in) float32 ▸ int8 in ± the largest integer, and scales (out, groups); error at most half a scale."""
        (rows, columns), size = weight.shape, self.precision.weights.group_size
        blocks = np.zeros((rows, -(-columns // size) * size), np.float32)
        blocks[:, :columns] = weight
        blocks = blocks.reshape(rows, -1, size)
        top = limits(self.precision.weights)[1]
        scale = np.maximum(np.abs(blocks).max(axis=2) / np.float32(top), np.finfo(np.float32).tiny).astype(np.float32)
        integers = np.clip(np.rint(blocks / scale[..., None]), -top, top).astype(np.int8)
        return np.ascontiguousarray(integers.reshape(rows, -1)[:, :columns]), scale
