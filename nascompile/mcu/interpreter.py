"""A program run by the NumPy oracles of its kernels: what every build of it must give, byte for byte."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from nascompile.mcu import constants, program as p, reference

Array = npt.NDArray[Any]


def run(program: p.Program, image: npt.NDArray[np.int8]) -> Array:
    """The output tensor for one sample (height, width, channels)."""
    return trace(program, image)[program.structure.output]


def trace(program: p.Program, image: npt.NDArray[np.int8]) -> dict[str, Array]:
    """Every tensor by name. Keys and values are (heads, tokens, width), whatever their order in memory."""
    found: dict[str, Array] = {}
    for op in program.structure.operations:
        inputs = [found[name] for name in op.inputs]
        shape = program.structure.tensor(op.outputs[0]).shape
        found[op.outputs[0]] = _Run(program.constants).operator(op.kernel, inputs, image).reshape(shape)
    return found


class _Run:
    def __init__(self, arrays: Any) -> None:
        self.arrays = arrays

    def operator(self, kernel: p.Kernel, x: list[Array], image: Array) -> Array:
        match kernel:
            case p.Read():
                return image
            case p.Embed():
                return self._embed(kernel, image)
            case p.Normalize():
                return self._norm(kernel.norm, x[0][: kernel.rows])
            case p.Dense():
                widths = (kernel.map.inputs, kernel.map.outputs)
                rows, *residual = (part.reshape(-1, width)[: kernel.rows] for part, width in zip(x, widths, strict=False))
                return self._map(kernel.map, self._norm(kernel.norm, rows), *residual)
            case p.Mlp():
                rows = x[0][: kernel.rows]
                return self._map(kernel.down, self._map(kernel.up, self._norm(kernel.norm, rows)), rows)
            case p.Attend():
                return self._attend(kernel, self._norm(kernel.norm, x[0]), x[1])
            case p.Classify():
                linear = kernel.linear
                return reference.head(x[0][:1], linear.x_zero, *self._weights(linear))
            case _:
                return self._single(kernel, x)

    def _single(self, kernel: p.Single, x: list[Array]) -> Array:
        match kernel:
            case p.Split():
                return np.stack([self._map(m, x[0]) for m in kernel.maps])
            case p.Scores():
                heads = np.split(x[0][: kernel.rows], len(kernel.products), axis=1)
                parts = zip(kernel.products, heads, x[1], strict=True)
                return np.stack([reference.matmul(q, k, s.w_zero, s.multiplier, s.zero_point) for s, q, k in parts])
            case p.Softmax():
                return reference.softmax(self.arrays[kernel.table], x[0].reshape(kernel.rows, kernel.width))
            case p.Mix():
                parts = zip(kernel.products, x[0], x[1], strict=True)
                return np.concatenate([reference.matmul(e, v.T, s.w_zero, s.multiplier, s.zero_point) for s, e, v in parts], axis=1)
            case p.Lookup():
                return reference.lookup(self.arrays[kernel.table], x[0])
            case p.Add():
                a, b = (part.ravel()[: kernel.count] for part in x)
                return reference.add(a, b, kernel.a_multiplier, kernel.b_multiplier, kernel.constant)
            case p.Mean():
                return reference.mean(x[0].reshape(kernel.rows, kernel.channels), kernel.x_zero, kernel.multiplier, kernel.zero_point)
            case p.Conv():
                return self._conv(kernel, x)
            case p.Depthwise():
                weights = self.arrays[kernel.weights].reshape(-1, 3, 3)
                bias, multiplier = self.arrays[kernel.bias], self.arrays[kernel.multiplier]
                numbers = (kernel.x_zero, weights, bias, multiplier, kernel.zero_point)
                y = reference.depthwise(_image(kernel, x[0]), *numbers, kernel.stride, kernel.pad)
                return reference.lookup(self.arrays[kernel.table], y) if kernel.table else y
            case p.AveragePool():
                window = (kernel.kernel, kernel.stride)
                return reference.average_pool(_image(kernel, x[0]), *window, kernel.x_zero, kernel.multiplier, kernel.zero_point)

    def _weights(self, linear: p.Linear) -> tuple[Array, Array, Array]:
        return self.arrays[linear.weights], self.arrays[linear.bias], self.arrays[linear.multiplier]

    def _norm(self, norm: p.Norm | None, x: Array) -> Array:
        return x if norm is None else reference.layer_norm(x, self.arrays[norm.affine], norm.epsilon)

    def _map(self, map_: p.Map, x: Array, residual: Array | None = None) -> Array:
        if isinstance(map_, p.LowRank):
            middle = reference.low_rank_middle(x, map_.first.x_zero, *self._weights(map_.first))
            return self._linear(map_.second, middle, residual)
        return self._linear(map_, x, residual)

    def _linear(self, linear: p.Linear, x: Array, residual: Array | None) -> Array:
        weights, bias, multiplier = self._weights(linear)
        if residual is None:
            table = self.arrays[linear.table] if linear.table else None
            return reference.linear(x, linear.x_zero, weights, bias, multiplier, linear.zero_point, table)
        return reference.linear_onto(
            x, linear.x_zero, weights, bias, multiplier, residual, linear.residual_zero, linear.residual_multiplier, linear.zero_point
        )

    def _embed(self, kernel: p.Embed, image: Array) -> Array:
        position = self.arrays[kernel.position] if kernel.position else None
        tokens = self._linear(kernel.linear, reference.patches(image, kernel.patch), position)
        return np.concatenate([self.arrays[kernel.first], tokens]) if kernel.first else tokens

    def _attend(self, kernel: p.Attend, x: Array, q: Array) -> Array:
        table, found = constants.exp_table(), []
        for h, part in zip(kernel.heads, np.split(q[: kernel.rows], len(kernel.heads), axis=1), strict=True):
            k, v = self._map(h.keys, x), self._map(h.values, x)
            found.append(reference.attention(part, k, v, h.score_multiplier, table, h.ratio, h.value_zero, h.zero_point))
        return np.concatenate(found, axis=1)

    def _conv(self, kernel: p.Conv, x: list[Array]) -> Array:
        windows = reference.windows(_image(kernel, x[0]), kernel.kernel, kernel.stride, kernel.pad, kernel.linear.x_zero)
        height, width = windows.shape[:2]
        residual = x[1].reshape(height * width, -1) if len(x) > 1 else None
        return self._linear(kernel.linear, windows.reshape(height * width, -1), residual).reshape(height, width, -1)


def _image(kernel: p.Conv | p.Depthwise | p.AveragePool, x: Array) -> Array:
    return x.reshape(kernel.height, kernel.width, kernel.channels)
