"""What each kernel must return, from its definition in kernels.h: NumPy integers, whole tensors, no packing, no blocks."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.int8]
Longs = npt.NDArray[np.int64]


def long(x: npt.ArrayLike) -> Longs:
    return np.asarray(x).astype(np.int64)


def high(a: npt.ArrayLike, b: npt.ArrayLike) -> Longs:
    """hi(a, b) of kernels.h."""
    return (long(a) * long(b) + 2**31) >> 32


def saturate(x: Longs) -> Bytes:
    return np.clip(x, -128, 127).astype(np.int8)


def sums(x: npt.ArrayLike, x_zero: int, weight: npt.ArrayLike, bias: npt.ArrayLike) -> Longs:
    """(tokens, outputs) exact sums of (tokens, inputs) x and (outputs, inputs) weights."""
    return (long(x) - x_zero) @ long(weight).T + long(bias)


def linear(x: Bytes, x_zero: int, weight: Bytes, bias: npt.ArrayLike, multiplier: npt.ArrayLike, zero_point: int,
           table: Bytes | None = None) -> Bytes:  # fmt: skip
    y = saturate(zero_point + high(sums(x, x_zero, weight, bias), multiplier))
    return y if table is None else lookup(table, y)


def linear_onto(x: Bytes, x_zero: int, weight: Bytes, bias: npt.ArrayLike, multiplier: npt.ArrayLike, residual: Bytes,
                residual_zero: int, residual_multiplier: int, zero_point: int) -> Bytes:  # fmt: skip
    """A linear map added to a residual, rounded once."""
    terms = sums(x, x_zero, weight, bias) * long(multiplier) + (long(residual) - residual_zero) * residual_multiplier * 256
    return saturate((terms + (zero_point << 32) + 2**31) >> 32)


def low_rank_middle(x: Bytes, x_zero: int, first: Bytes, bias: npt.ArrayLike, multiplier: npt.ArrayLike) -> Longs:
    """(tokens, rank) in 13 bits: the input of the second factor, which is linear() of it with x_zero 0."""
    return np.clip(high(sums(x, x_zero, first, bias), multiplier), -4096, 4095)


def head(x: Bytes, x_zero: int, weight: Bytes, bias: npt.ArrayLike, multiplier: npt.ArrayLike) -> npt.NDArray[np.int32]:
    """(tokens, classes) scores."""
    return high(sums(x, x_zero, weight, bias), multiplier).astype(np.int32)


def attention(q: Bytes, k: Bytes, v: Bytes, score_multiplier: int, exp_table: npt.NDArray[np.uint16], ratio: int, value_zero: int,
              zero_point: int) -> Bytes:  # fmt: skip
    """One head: (rows, width) queries over (tokens, width) keys and values."""
    scores = np.clip(high(long(q) @ long(k).T, score_multiplier), -16384, 16383)
    weights = long(exp_table)[np.minimum(1023, scores.max(1, keepdims=True) - scores)]
    total = weights.sum(1, keepdims=True)
    weighted = weights @ (long(v) - value_zero)
    shift = np.array([[int(t).bit_length() - 15] for t in total[:, 0]])
    divisor = total >> shift
    return saturate(zero_point + high(weighted >> shift, (ratio + divisor // 2) // divisor * 16))


def matmul(x: npt.NDArray[np.int8] | npt.NDArray[np.uint8], w: Bytes, w_zero: int, multiplier: int, zero_point: int) -> Bytes:
    """(rows, inputs) by (outputs, inputs)."""
    return saturate(zero_point + high(long(x) @ (long(w) - w_zero).T, multiplier))


def softmax(table: npt.NDArray[np.uint16], x: Bytes) -> npt.NDArray[np.uint8]:
    weights = long(table)[255 - long(x).max(1, keepdims=True) + long(x)]
    total = weights.sum(1, keepdims=True)
    inverse = (2**31 + total // 2) // total
    y: npt.NDArray[np.uint8] = np.minimum(255, (weights * inverse + 2**22) >> 23).astype(np.uint8)
    return y


def layer_norm(x: Bytes, affine: npt.NDArray[np.int32], epsilon: int) -> Bytes:
    n = x.shape[1]
    gain, shift = long(affine[::2]), long(affine[1::2])
    out = []
    for row in long(x):
        total = int(row.sum())
        variance = max(1, n * int((row * row).sum()) - total * total + epsilon)
        q = (variance.bit_length() - 31) // 2  # 2^30 <= variance / 4^q < 2^32
        m = variance >> (2 * q) if q >= 0 else variance << (-2 * q)
        inverse = ((2**32 - 1) // math.isqrt(m)) << 14
        v = high((n * row - total) * 2 ** (9 - q), inverse)
        out.append(saturate((shift + high(v, gain)) >> 8))
    return np.stack(out)


def lookup(table: Bytes, x: Bytes) -> Bytes:
    return table[x.view(np.uint8)]


def add(a: Bytes, b: Bytes, a_multiplier: int, b_multiplier: int, constant: int) -> Bytes:
    return saturate((long(a) * a_multiplier + long(b) * b_multiplier + constant) >> 20)


def mean(x: Bytes, x_zero: int, multiplier: int, zero_point: int) -> Bytes:
    """(rows, channels) to (channels,)."""
    return saturate(zero_point + high((long(x) - x_zero).sum(0) * 256, multiplier))


def patches(image: Bytes, patch: int) -> Bytes:
    """(height, width, channels) to (patches, patch * patch * channels), row by row."""
    height, width, channels = image.shape
    grid = image.reshape(height // patch, patch, width // patch, patch, channels).swapaxes(1, 2)
    return np.ascontiguousarray(grid.reshape(-1, patch * patch * channels))


def windows(image: Bytes, kernel: int, stride: int, pad: int, fill: int) -> Bytes:
    """(height, width, channels) to (out_height, out_width, kernel, kernel, channels), padded with fill."""
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), constant_values=fill)
    view = np.lib.stride_tricks.sliding_window_view(padded, (kernel, kernel), (0, 1))[::stride, ::stride]
    return np.ascontiguousarray(view.transpose(0, 1, 3, 4, 2))


def depthwise(image: Bytes, x_zero: int, weight: Bytes, bias: npt.ArrayLike, multiplier: npt.ArrayLike, zero_point: int, stride: int,
              pad: int) -> Bytes:  # fmt: skip
    """(height, width, channels) by (channels, 3, 3)."""
    seen = long(windows(image, 3, stride, pad, x_zero)) - x_zero
    return saturate(zero_point + high(np.einsum("hwijc,cij->hwc", seen, long(weight)) + long(bias), multiplier))


def average_pool(image: Bytes, kernel: int, stride: int, x_zero: int, multiplier: int, zero_point: int) -> Bytes:
    seen = long(windows(image, kernel, stride, 0, 0)) - x_zero
    return saturate(zero_point + high(seen.sum((2, 3)) * 256, multiplier))
