"""Dynamic INT8: weights as in static INT8, inputs on the grid of the range that the whole tensor has in that call."""

from __future__ import annotations

import numpy as np

from nascompile.quantization.int8 import StaticInt8
from nascompile.records import INT8_DYNAMIC


class DynamicInt8(StaticInt8):
    name = "int8-dynamic"
    precision = INT8_DYNAMIC

    def activation_parameters(self, low: float, high: float) -> tuple[float, int]:
        """Scale and zero point of ONNX's DynamicQuantizeLinear, in its float32: the range holds 0; a tensor of zeros has scale 1."""
        bottom, top = np.float32(min(low, 0.0)), np.float32(max(high, 0.0))
        scale = (top - bottom) / np.float32(255)
        scale = scale if scale > 0 else np.float32(1)
        return float(scale), int(np.clip(np.rint(-bottom / scale), 0, 255))


PLUGIN = DynamicInt8()
