"""From real numbers to the integers the kernels take: multipliers, tables, layer-normalization and residual constants."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nascompile.errors import UnsupportedError

Reals = npt.NDArray[np.float64]
Words = npt.NDArray[np.int32]


OUTPUT_TOO_NARROW = "widen the output's calibrated range, its scale is too small"
INPUTS_TOO_WIDE = "the calibrated ranges of queries and keys are too wide: calibrate on samples without such outliers"


def fixed(ratio: npt.ArrayLike, bits: int, limit: float, what: str, hint: str = OUTPUT_TOO_NARROW) -> Words:
    """round(ratio * 2^bits) as int32; UnsupportedError where a ratio is negative, not finite, or not below limit."""
    values = np.asarray(ratio, np.float64)
    bad = ~(np.isfinite(values) & (values >= 0) & (values < limit))
    if bad.any():
        worst = values[bad].ravel()[0]
        raise UnsupportedError(f"{what} does not fit the kernels' fixed point: {worst:g}, must be in [0, {limit:g})", hint=hint)
    return np.minimum(np.rint(values * 2.0**bits), 2**31 - 1).astype(np.int32)


def requantizer(ratio: npt.ArrayLike) -> Words:
    """Multipliers of sums: input scale * weight scale / output scale, in [0, 0.5), to int32 in units of 2^-32."""
    return fixed(ratio, 32, 0.5, "a requantization ratio")


def bias_words(bias: npt.ArrayLike, x_scale: float, weight_scale: npt.ArrayLike) -> Words:
    """Biases in units of x_scale * weight_scale; UnsupportedError past 2^30 (a channel whose weights are all but zero)."""
    steps = np.rint(np.asarray(bias, np.float64) / (x_scale * np.asarray(weight_scale, np.float64)))
    if (np.abs(steps) > 2**30).any():
        raise UnsupportedError(f"a bias does not fit 32 bits: {np.abs(steps).max():g} steps", hint="give its channel a larger weight scale")
    return steps.astype(np.int32)


@dataclass(frozen=True)
class Residual:
    """Constants of nc_linear_t for a fused residual."""

    multiplier: int
    constant: int


def residual(residual_scale: float, residual_zero: int, y_scale: float, y_zero: int) -> Residual:
    multiplier = int(fixed(residual_scale / y_scale, 24, 128, "residual scale / output scale"))
    return Residual(multiplier, (y_zero << 32) - 256 * residual_zero * multiplier + (1 << 31))


@dataclass(frozen=True)
class Add:
    """Fields of nc_add_t."""

    a_multiplier: int
    b_multiplier: int
    constant: int


def add(a_scale: float, a_zero: int, b_scale: float, b_zero: int, y_scale: float, y_zero: int) -> Add:
    a, b = (int(fixed(scale / y_scale, 20, 3.7, "an addend's scale / output scale")) for scale in (a_scale, b_scale))
    return Add(a, b, (y_zero << 20) - a_zero * a - b_zero * b + (1 << 19))


def _counts(values: Reals) -> npt.NDArray[np.uint16]:
    found: npt.NDArray[np.uint16] = np.rint(values).astype(np.uint16)
    return found


def exp_table() -> npt.NDArray[np.uint16]:
    """nc_attention's 1024 weights exp(-i / 64), 1.0 = 16384: the same for every network."""
    return _counts(16384 * np.exp(-np.arange(1024) / 64))


def softmax_table(x_scale: float) -> npt.NDArray[np.uint16]:
    """nc_softmax's 256 weights exp((i - 255) * x_scale), 1.0 = 32768."""
    return _counts(32768 * np.exp((np.arange(256) - 255) * x_scale))


@dataclass(frozen=True)
class Attention:
    """Fields of nc_attention_t that come from scales."""

    score_multiplier: int
    ratio: int


def attention(q_scale: float, k_scale: float, v_scale: float, y_scale: float, width: int) -> Attention:
    ratio = 64 * q_scale * k_scale / math.sqrt(width)
    score = fixed(ratio, 32, 0.5, "64 * query scale * key scale / sqrt(width)", INPUTS_TOO_WIDE)
    return Attention(int(score), int(fixed(v_scale / y_scale, 28, 8, "value scale / output scale")))


@dataclass(frozen=True)
class LayerNorm:
    """affine (gain, shift, gain, shift, …) and epsilon of nc_layer_norm_t."""

    affine: Words
    epsilon: int


def layer_norm(gamma: Reals, beta: Reals, eps: float, x_scale: float, y_scale: float, y_zero: int) -> LayerNorm:
    """Constants for rows of len(gamma) channels; gamma may be negative."""
    if not 2 <= len(gamma) <= 1024:
        raise UnsupportedError(f"layer normalization of {len(gamma)} channels: the kernel takes 2 to 1024", hint="choose another width")
    gain = np.sign(gamma) * fixed(np.abs(gamma) / y_scale, 17, 2**14, "layer normalization gain / output scale")
    shift = np.rint((np.asarray(beta, np.float64) / y_scale + y_zero) * 256) + 128
    epsilon = round(len(gamma) ** 2 * eps / x_scale**2)
    if (np.abs(shift) >= 2**30).any() or epsilon > 2**40:
        raise UnsupportedError(
            f"layer normalization does not fit the kernel's fixed point: shift {np.abs(shift).max():g}, epsilon {epsilon:g}",
            hint="the input's or the output's calibrated range is all but zero: calibrate on other samples",
        )
    return LayerNorm(np.stack([gain, shift], 1).ravel().astype(np.int32), epsilon)


def lookup(function: Callable[[Reals], Reals], x_scale: float, x_zero: int, y_scale: float, y_zero: int) -> npt.NDArray[np.int8]:
    """256 outputs of a function of one value, indexed by the input's byte."""
    x = (np.arange(256).astype(np.uint8).view(np.int8).astype(np.float64) - x_zero) * x_scale
    y: npt.NDArray[np.int8] = np.clip(np.rint(function(x) / y_scale) + y_zero, -128, 127).astype(np.int8)
    return y


def gelu(x: Reals) -> Reals:
    """The exact one, by the error function."""
    erf: Reals = np.vectorize(math.erf, otypes=[np.float64])(x / math.sqrt(2))
    return 0.5 * x * (1 + erf)


def mean(rows: int, x_scale: float, y_scale: float) -> int:
    """Multiplier of nc_mean over rows, and of nc_average_pool over kernel^2 pixels."""
    return int(fixed(x_scale / (rows * y_scale), 24, 128, "input scale / (rows * output scale)"))
