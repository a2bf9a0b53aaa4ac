"""Static INT8: per-channel symmetric signed weights, per-tensor unsigned activations (U8S8, fast where VNNI or AVX2 is)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from nascompile.records import INT8


class StaticInt8:
    name = "int8"
    precision = INT8

    def quantize_weight(self, weight: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
        """(out, in) float32 ▸ int8 in ±127 and a scale per row; error at most half a scale."""
        scale = np.maximum(np.abs(weight).max(axis=1) / np.float32(127), np.finfo(np.float32).tiny).astype(np.float32)
        steps = weight / scale[:, None]  # large for a table: one copy is enough
        return np.clip(np.rint(steps, out=steps), -127, 127, out=steps).astype(np.int8), scale

    def activation_parameters(self, low: float, high: float) -> tuple[float, int]:
        """Scale and zero point of the unsigned 8-bit grid that covers [min(low, 0), max(high, 0)], zero exact."""
        low, high = min(low, 0.0), max(high, 0.0)
        scale = float(np.float32(max((high - low) / 255, 1e-12)))
        return scale, int(np.clip(np.rint(-low / scale), 0, 255))


PLUGIN = StaticInt8()
