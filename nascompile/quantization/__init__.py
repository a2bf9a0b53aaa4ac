"""Precision schemes: a declarative `Precision` and the arithmetic that turns numbers into integers, the same for the
search's emulation and for the graphs that are built."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from nascompile.records import Precision, Record, TensorFormat


class ActivationRanges(Record, frozen=True):
    """Observed ranges of the inputs of quantized products on the calibration split."""

    method: str
    """`minmax`, `percentile`, `mse` or `entropy`."""
    sites: tuple[tuple[str, float, float], ...]
    """(weight parameter, low, high), sorted by parameter; low ≤ 0 ≤ high."""


def limits(integers: TensorFormat) -> tuple[int, int]:
    """Smallest and largest integer of a format."""
    half: int = 2 ** (integers.bits - 1)
    return (-half, half - 1) if integers.signed else (0, 2 * half - 1)


def dequantize(integers: Any, scale: Any, group_size: int = 0) -> Any:
    """(out, in) float32 of integers (out, in) and scales (out,), or (out, groups) of `group_size` inputs each, the last maybe fewer."""
    if scale.ndim == 1:
        return integers * scale[:, None]
    return integers * np.repeat(scale, group_size, axis=1)[:, : integers.shape[1]]


class Scheme(Protocol):
    name: str
    """That of its precision, and of its module with underscores for hyphens."""
    precision: Precision

    def quantize_weight(self, weight: Any) -> tuple[Any, Any]:
        """NumPy (out, in) float32 ▸ (int8 (out, in), float32 scales (out,), or (out, groups) where groups have their own)."""


class ActivationScheme(Scheme, Protocol):
    """One whose products have integer inputs."""

    def activation_parameters(self, low: float, high: float) -> tuple[float, int]:
        """(scale, zero point) for a range; error: half a scale inside the range."""
