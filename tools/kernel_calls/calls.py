"""Kernel calls with random content and what they must return."""

from __future__ import annotations

import numpy as np
from kernel_calls import run
from kernel_calls.run import Buffer, Call

from nascompile.mcu import constants, packing, reference

LIMITS = (-128, 127)
NONE = Buffer()


def _int8(rng, *shape):
    return rng.integers(-128, 128, shape, dtype=np.int8)


def _weights(rng, *shape):
    return rng.integers(-127, 128, shape, dtype=np.int8)


def _requantizers(rng, inputs, outputs):
    """Multipliers that spread sums of `inputs` products over int8 and a little past it."""
    return (2**32 / (rng.uniform(40, 200, outputs) * np.sqrt(inputs))).astype(np.int32)


def _linear_weights(rng, inputs, outputs):
    return _weights(rng, outputs, inputs), rng.integers(-20000, 20000, outputs, dtype=np.int32), _requantizers(rng, inputs, outputs)


def linear(rng, tokens, inputs, outputs, *, kind="rows", gap=0, offset=0, extreme=False):
    x, x_zero, zero = _int8(rng, tokens, inputs + gap), int(rng.integers(-128, 128)), int(rng.integers(-128, 128))
    weight, bias, multiplier = _linear_weights(rng, inputs, outputs)
    if extreme:
        x = rng.choice(np.array(LIMITS, np.int8), x.shape)
        weight = rng.choice(np.array((-127, 127), np.int8), weight.shape)
        x[0], weight[0], multiplier[-1] = -128, -127, 2**31 - 1
    seen, stride, layout = x[:, :inputs], outputs + gap, run.ROWS
    table, residual, extra, alias = NONE, NONE, {}, None
    if kind == "residual":
        rest, rest_zero = _int8(rng, tokens, stride), int(rng.integers(-128, 128))
        sums = constants.residual(0.05, rest_zero, 0.06, zero)
        out = reference.linear_onto(seen, x_zero, weight, bias, multiplier, rest[:, :outputs], rest_zero, sums.multiplier, zero)
        expected = rest.copy()
        expected[:, :outputs] = out
        residual, alias = Buffer(rest, offset), 3
        extra = {"residual_multiplier": sums.multiplier, "residual_constant": sums.constant}
    else:
        values = _int8(rng, 256) if kind == "table" else None
        table = NONE if values is None else Buffer(values)
        out = reference.linear(seen, x_zero, weight, bias, multiplier, zero, values)
        expected = np.full((tokens, stride), 0x55, np.int8)
        expected[:, :outputs] = out
    if kind == "keys":
        layout, expected = run.KEYS, run.keys(out, 0x55)
        stride = 2 * (-(-outputs // 4) * 4)
    elif kind == "values":
        layout, expected = run.VALUES, run.values(out, 0x55)
        stride = 2 * (-(-tokens // 2) * 2)
    if kind not in ("keys", "values"):
        expected = expected.ravel()[: (tokens - 1) * stride + outputs]  # nothing behind the last row's last channel is touched
        if kind == "residual":
            residual = Buffer(rest.ravel()[: len(expected)], offset)
    x = x.ravel()[: (tokens - 1) * (inputs + gap) + inputs]
    return Call("linear", (*run.linear_parameters(inputs, outputs, zero, inputs + gap, stride, layout, **extra), tokens),
                (run.packed(weight, bias, multiplier, x_zero), table, Buffer(x, offset), residual), expected.size,
                run.linear_scratch(inputs), alias, offset, expected)  # fmt: skip


def low_rank(rng, tokens, inputs, rank, outputs, kind="rows"):
    x, x_zero, zero = _int8(rng, tokens, inputs), int(rng.integers(-128, 128)), int(rng.integers(-128, 128))
    weight, bias, _ = _linear_weights(rng, inputs, rank)
    multiplier = _requantizers(rng, inputs, rank) * 24  # to 13 bits and a little past them
    second, second_bias, _ = _linear_weights(rng, rank, outputs)
    second_multiplier = _requantizers(rng, rank, outputs) // 24
    middle = reference.low_rank_middle(x, x_zero, weight, bias, multiplier)
    values = _int8(rng, 256) if kind == "table" else None
    expected = reference.linear(middle, 0, second, second_bias, second_multiplier, zero, values)
    table, residual, extra = NONE if values is None else Buffer(values), NONE, {}
    if kind == "residual":
        rest = _int8(rng, tokens, outputs)
        sums = constants.residual(0.05, 7, 0.04, zero)
        expected = reference.linear_onto(middle, 0, second, second_bias, second_multiplier, rest, 7, sums.multiplier, zero)
        residual, extra = Buffer(rest), {"residual_multiplier": sums.multiplier, "residual_constant": sums.constant}
    first = (*run.linear_parameters(inputs, rank)[:15], tokens)
    return Call("low_rank", (*first, *run.linear_parameters(rank, outputs, zero, **extra)),
                (run.packed(weight, bias, multiplier, x_zero), table, Buffer(x), residual,
                 Buffer(packing.linear(second, second_bias, second_multiplier, 0, "plain"))),
                expected.size, run.linear_scratch(inputs) + 8 * (rank + rank % 2), expected=expected)  # fmt: skip


def head(rng, inputs, outputs):
    x, (weight, bias, multiplier) = _int8(rng, 1, inputs), _linear_weights(rng, inputs, outputs)
    multiplier = multiplier * 20
    expected = reference.head(x, -5, weight, bias, multiplier)
    return Call("head", run.linear_parameters(inputs, outputs), (run.packed(weight, bias, multiplier, -5), NONE, Buffer(x)),
                expected.nbytes, run.linear_scratch(inputs), expected=expected)  # fmt: skip


def attention(rng, rows, tokens, width, *, over_q=False, spread=0.02, extreme=False):
    q, k, v = _int8(rng, rows, width), _int8(rng, tokens, width), _int8(rng, tokens, width)
    value_zero, zero = int(rng.integers(-128, 128)), int(rng.integers(-128, 128))
    if extreme:
        q, k = (rng.choice(np.array(LIMITS, np.int8), part.shape) for part in (q, k))
        v[:], value_zero = 127, -128
    sums = constants.attention(spread, spread, 0.02, 0.012, width)
    table = constants.exp_table()
    expected = reference.attention(q, k, v, sums.score_multiplier, table, sums.ratio, value_zero, zero)
    return Call("attention", (sums.score_multiplier, sums.ratio, value_zero, zero, tokens, width, width, width, rows),
                (Buffer(table), Buffer(q), Buffer(run.keys(k)), Buffer(run.values(v))), rows * width,
                8 * (-(-width // 4) * 4) + 8 * (tokens + tokens % 2), 1 if over_q else None, expected=expected)  # fmt: skip


def scores(rng, rows, tokens, width):
    q, k = _int8(rng, rows, width), _int8(rng, tokens, width)
    multiplier = int(_requantizers(rng, width, 1)[0])
    return Call("matmul", (multiplier, 9, -3, width, tokens, width, tokens, 0, rows), (Buffer(q), Buffer(run.keys(k))), rows * tokens,
                run.linear_scratch(width), expected=reference.matmul(q, k, 9, multiplier, -3))  # fmt: skip


def weighted(rng, rows, tokens, width):
    p, v = rng.integers(0, 256, (rows, tokens), dtype=np.uint8), _int8(rng, tokens, width)
    multiplier = int(_requantizers(rng, tokens, 1)[0])
    return Call("matmul", (multiplier, -4, 11, tokens, width, tokens, width, 1, rows), (Buffer(p), Buffer(run.values(v))), rows * width,
                run.linear_scratch(tokens), expected=reference.matmul(p, v.T, -4, multiplier, 11))  # fmt: skip


def softmax(rng, rows, width, scale, *, in_place=False, fill=None):
    x = _int8(rng, rows, width) if fill is None else np.full((rows, width), fill, np.int8)
    table = constants.softmax_table(scale)
    return Call("softmax", (rows, width), (Buffer(table), Buffer(x)), x.size, alias=1 if in_place else None,
                expected=reference.softmax(table, x))  # fmt: skip


def layer_norm(rng, rows, width, *, spread=128, eps=1e-6, in_place=False, offset=0):
    x = rng.integers(-spread, spread, (rows, width)).clip(*LIMITS).astype(np.int8)
    if rows > 2:
        x[0], x[1] = -128, 5
        x[1, 0] = 6  # one step off a constant row
    sums = constants.layer_norm(rng.normal(1, 0.5, width), rng.normal(0, 0.5, width), eps, 0.03, 0.025, int(rng.integers(-20, 20)))
    expected = reference.layer_norm(x, sums.affine, sums.epsilon)
    return Call("layer_norm", (sums.epsilon, sums.epsilon >> 32, width, width, width, rows), (Buffer(sums.affine), Buffer(x, offset)),
                x.size, alias=1 if in_place else None, offset=offset, expected=expected)  # fmt: skip


def lookup(rng, count, *, in_place=False, offset=0):
    x, table = _int8(rng, count), _int8(rng, 256)
    return Call("lookup", (count,), (Buffer(table), Buffer(x, offset)), count, alias=1 if in_place else None, offset=offset,
                expected=reference.lookup(table, x))  # fmt: skip


def add(rng, count, *, alias=None, scales=(0.04, 0.05, 0.06), zeros=(-7, 100, 3), offset=0, extreme=False):
    a, b = _int8(rng, count), _int8(rng, count)
    if extreme:
        a, b = (rng.choice(np.array(LIMITS, np.int8), part.shape) for part in (a, b))
    sums = constants.add(scales[0], zeros[0], scales[1], zeros[1], scales[2], zeros[2])
    parameters = (sums.a_multiplier, sums.b_multiplier, sums.constant)
    return Call("add", (*parameters, count), (Buffer(a, offset), Buffer(b)), count, alias=alias, offset=offset,
                expected=reference.add(a, b, *parameters))  # fmt: skip


def mean(rng, rows, channels, gap=0):
    x = _int8(rng, rows, channels + gap)
    multiplier = constants.mean(rows, 0.05, 0.02)
    return Call("mean", (multiplier, -6, 8, rows, channels, channels + gap), (Buffer(x.ravel()[: x.size - gap]),), channels,
                expected=reference.mean(x[:, :channels], -6, multiplier, 8))  # fmt: skip


def patch_embed(rng, patch, channels, columns, bands, outputs, *, residual=False):
    image, inputs = _int8(rng, bands * patch, columns * patch, channels), patch * patch * channels
    weight, bias, multiplier = _linear_weights(rng, inputs, outputs)
    tokens, rest, extra = reference.patches(image, patch), NONE, {}
    expected = reference.linear(tokens, -128, weight, bias, multiplier, 4)
    if residual:
        position = _int8(rng, bands * columns, outputs)
        sums = constants.residual(0.01, 0, 0.03, 4)
        expected = reference.linear_onto(tokens, -128, weight, bias, multiplier, position, 0, sums.multiplier, 4)
        rest, extra = Buffer(position), {"residual_multiplier": sums.multiplier, "residual_constant": sums.constant}
    return Call("patch_embed", (*run.linear_parameters(inputs, outputs, 4, 0, **extra), patch, channels, columns, bands),
                (run.packed(weight, bias, multiplier, -128), NONE, Buffer(image), rest, Buffer(image[:patch])), expected.size,
                run.linear_scratch(inputs), expected=expected)  # fmt: skip


def conv(rng, height, width, channels, outputs, kernel=3, stride=1, pad=1, *, table=False, residual=False):
    image, x_zero, inputs = _int8(rng, height, width, channels), int(rng.integers(-128, 128)), kernel * kernel * channels
    weight, bias, multiplier = _linear_weights(rng, inputs, outputs)
    seen = reference.windows(image, kernel, stride, pad, x_zero).reshape(-1, inputs)
    values = _int8(rng, 256) if table else None
    expected, rest, extra = reference.linear(seen, x_zero, weight, bias, multiplier, -9, values), NONE, {}
    if residual:
        other = _int8(rng, *expected.shape)
        sums = constants.residual(0.02, 5, 0.03, -9)
        expected = reference.linear_onto(seen, x_zero, weight, bias, multiplier, other, 5, sums.multiplier, -9)
        rest, extra = Buffer(other), {"residual_multiplier": sums.multiplier, "residual_constant": sums.constant}
    return Call("conv", (*run.linear_parameters(inputs, outputs, -9, 0, **extra), x_zero, height, width, channels, kernel, stride, pad),
                (run.packed(weight, bias, multiplier, x_zero), NONE if values is None else Buffer(values), Buffer(image), rest),
                expected.size, run.linear_scratch(inputs) + -(-inputs // 8) * 8, expected=expected)  # fmt: skip


def depthwise(rng, height, width, channels, stride=1, pad=1, *, table=False):
    image, x_zero = _int8(rng, height, width, channels), int(rng.integers(-128, 128))
    weight, bias, multiplier = _weights(rng, channels, 3, 3), rng.integers(-9999, 9999, channels, np.int32), _requantizers(rng, 9, channels)
    expected = reference.depthwise(image, x_zero, weight, bias, multiplier, 6, stride, pad)
    values = _int8(rng, 256) if table else None
    if values is not None:
        expected = reference.lookup(values, expected)
    return Call("depthwise", (x_zero, 6, height, width, channels, stride, pad),
                (Buffer(packing.depthwise(weight, bias, multiplier)), NONE if values is None else Buffer(values), Buffer(image)),
                expected.size, 24 * (width + 2 * pad), expected=expected)  # fmt: skip


def average_pool(rng, height, width, channels, kernel, stride):
    image, multiplier = _int8(rng, height, width, channels), constants.mean(kernel * kernel, 0.05, 0.04)
    expected = reference.average_pool(image, kernel, stride, 3, multiplier, -2)
    return Call("average_pool", (multiplier, 3, -2, height, width, channels, kernel, stride), (Buffer(image),), expected.size,
                expected=expected)  # fmt: skip
