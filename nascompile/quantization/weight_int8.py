"""Weight-only INT8 for look-up tables: a scale per row, read back as float32 when a row is fetched."""

from __future__ import annotations

from nascompile.quantization.int8 import StaticInt8
from nascompile.records import WEIGHT_INT8


class WeightInt8(StaticInt8):
    name = "weight-int8"
    precision = WEIGHT_INT8


PLUGIN = WeightInt8()
