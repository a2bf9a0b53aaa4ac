"""Static INT8 without zero points (S8S8), the only form that TensorRT's integer products take."""

from __future__ import annotations

import numpy as np

from nascompile.quantization.int8 import StaticInt8
from nascompile.records import INT8_SYMMETRIC


class SymmetricInt8(StaticInt8):
    name = "int8-symmetric"
    precision = INT8_SYMMETRIC

    def activation_parameters(self, low: float, high: float) -> tuple[float, int]:
        """Scale of the signed 8-bit grid in which 127 is the larger end of the range; its zero point is 0."""
        return float(np.float32(max(abs(low), abs(high), 127e-12) / 127)), 0


PLUGIN = SymmetricInt8()
