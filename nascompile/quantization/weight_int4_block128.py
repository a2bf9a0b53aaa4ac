"""Weight-only INT4 with a scale per 128 inputs of an output."""

from __future__ import annotations

from nascompile.quantization.blocks import BlockWeights
from nascompile.records import weight_only

PLUGIN = BlockWeights(weight_only(4, 128))
