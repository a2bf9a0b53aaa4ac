"""Weights in the order the kernels read them (kernels.h has the layouts)."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from nascompile.errors import UnsupportedError

Weights = npt.NDArray[np.int8]
Words = npt.NDArray[np.int32]


def linear(
    weight: Weights, bias: Words, multiplier: Words, x_zero: int, order: Literal["quads", "plain"] = "quads"
) -> npt.NDArray[np.uint32]:
    """The stream of nc_linear_t.weights from (outputs, inputs) int8, the layer's own int32 bias, multipliers and the input's zero point."""
    outputs, inputs = weight.shape
    group = 4 if order == "quads" else 2
    folded = bias.astype(np.int64) - x_zero * weight.astype(np.int64).sum(1)
    if np.abs(folded).max(initial=0) >= 2**31:
        raise UnsupportedError(f"a bias does not fit 32 bits: {np.abs(folded).max()}", hint="give its channel a larger weight scale")
    rows = outputs + outputs % 2
    padded = np.zeros((rows, -(-inputs // group) * group), np.int8)
    padded[:outputs, :inputs] = weight
    if order == "quads":
        padded = padded.reshape(rows, -1, 2, 2).swapaxes(2, 3).reshape(rows, -1)  # k, k+2, k+1, k+3
    # (output pair, output of it, input pair, input of it) to bytes (input pair; input of it, output of it)
    body = np.ascontiguousarray(padded.reshape(rows // 2, 2, -1, 2).transpose(0, 2, 3, 1)).ravel().view(np.uint32).reshape(rows // 2, -1)

    def pairs(values: npt.NDArray[np.int64]) -> npt.NDArray[np.uint32]:
        column = np.zeros(rows, np.int32)
        column[:outputs] = values
        return column.view(np.uint32).reshape(-1, 2)

    return np.concatenate([pairs(folded), body, pairs(multiplier.astype(np.int64))], 1).ravel()


def linear_words(outputs: int, inputs: int, order: Literal["quads", "plain"] = "quads") -> int:
    """Length of linear()'s stream, without packing."""
    return -(-outputs // 2) * (4 + (2 * -(-inputs // 4) if order == "quads" else -(-inputs // 2)))


def depthwise(weight: Weights, bias: Words, multiplier: Words) -> npt.NDArray[np.uint32]:
    """The stream of nc_depthwise_t.weights from (channels, 3, 3) int8, bias and multipliers."""
    channels = len(weight)
    groups = -(-channels // 4)
    taps, start, scale = np.zeros((groups * 4, 9), np.int8), np.zeros(groups * 4, np.int32), np.zeros(groups * 4, np.int32)
    taps[:channels], start[:channels], scale[:channels] = weight.reshape(channels, 9), bias, multiplier
    body = np.ascontiguousarray(taps.reshape(groups, 4, 9).transpose(0, 2, 1)).ravel().view(np.uint32).reshape(groups, 9)
    return np.concatenate([start.view(np.uint32).reshape(groups, 4), body, scale.view(np.uint32).reshape(groups, 4)], 1).ravel()


def depthwise_words(channels: int) -> int:
    return -(-channels // 4) * 17
