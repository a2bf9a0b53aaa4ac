"""The kernels' integers against real arithmetic: how far each definition may lie from the function it stands for."""

from __future__ import annotations

import numpy as np
import pytest

from nascompile.errors import UnsupportedError
from nascompile.mcu import constants, packing, reference


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def int8(rng, *shape):
    return rng.integers(-128, 128, shape, dtype=np.int8)


def real(q, scale, zero):
    return (q.astype(np.float64) - zero) * scale


def assert_within(got, wanted, scale, zero, steps):
    """got is int8; wanted is real, and within what int8 can hold."""
    exact = np.clip(wanted / scale + zero, -128, 127)
    assert np.abs(got - exact).max() <= steps


def test_a_linear_map_is_its_real_one_to_half_a_step(rng):
    x, weight = int8(rng, 9, 50), rng.integers(-127, 128, (12, 50), dtype=np.int8)
    x_scale, scales, y_scale = 0.04, rng.uniform(0.001, 0.01, 12), 0.05
    bias = rng.normal(size=12)
    words = constants.bias_words(bias, x_scale, scales)
    multiplier = constants.requantizer(x_scale * scales / y_scale)
    wanted = real(x, x_scale, -7) @ (weight * scales[:, None]).T + bias
    # the bias itself is rounded: half a step of x_scale * scale, at most 0.004 of y's
    assert_within(reference.linear(x, -7, weight, words, multiplier, 5), wanted, y_scale, 5, 0.505)
    rest = int8(rng, 9, 12)
    sums = constants.residual(0.06, 3, y_scale, 5)
    got = reference.linear_onto(x, -7, weight, words, multiplier, rest, 3, sums.multiplier, 5)
    assert_within(got, wanted + real(rest, 0.06, 3), y_scale, 5, 0.505)


def test_a_low_rank_map_loses_no_more_than_its_13_bits(rng):
    x, first = int8(rng, 9, 40), rng.integers(-127, 128, (6, 40), dtype=np.int8)
    second = rng.integers(-127, 128, (11, 6), dtype=np.int8)
    exact_middle = x.astype(np.float64) @ first.T * 0.03 * 0.004
    mid_scale = np.abs(exact_middle).max() / 4095
    middle = reference.low_rank_middle(x, 0, first, np.zeros(6), constants.requantizer(np.full(6, 0.03 * 0.004 / mid_scale)))
    assert np.abs(middle * mid_scale - exact_middle).max() <= mid_scale * 0.501
    wanted = exact_middle @ second.T * 0.01
    y_scale = np.abs(wanted).max() / 127
    got = reference.linear(middle, 0, second, np.zeros(11), constants.requantizer(np.full(11, mid_scale * 0.01 / y_scale)), 0)
    off = 0.5 + 6 * 127 * 0.01 * mid_scale / 2 / y_scale  # every middle value half a step off, all the same way
    assert_within(got, wanted, y_scale, 0, off)
    assert off < 0.62


@pytest.mark.parametrize("tokens", [2, 17, 197, 512])
def test_attention_is_softmax_attention(rng, tokens):
    width = 32
    q, k, v = int8(rng, 6, width), int8(rng, tokens, width), int8(rng, tokens, width)
    q_scale, k_scale, v_scale = 0.02, 0.02, 0.03
    scores = real(q, q_scale, 0) @ real(k, k_scale, 9).T / np.sqrt(width)
    weights = np.exp(scores - scores.max(1, keepdims=True))
    wanted = weights / weights.sum(1, keepdims=True) @ real(v, v_scale, -4)
    y_scale = max(np.abs(wanted).max() / 127, v_scale / 7.9)
    sums = constants.attention(q_scale, k_scale, v_scale, y_scale, width)
    got = reference.attention(q, k, v, sums.score_multiplier, constants.exp_table(), sums.ratio, -4, 2)
    # a weight is off by half a 64th of itself at most, at random: 1 % of the deviations that are summed
    assert_within(got, wanted, y_scale, 2, 0.5 + 0.01 * 255 * v_scale / y_scale)
    assert np.abs(got - np.clip(wanted / y_scale + 2, -128, 127)).mean() < 0.3  # 0.25: rounding alone


def test_key_zero_points_cancel(rng):
    q, k, v = int8(rng, 5, 8), rng.integers(-100, 100, (9, 8), dtype=np.int8), int8(rng, 9, 8)
    sums = constants.attention(0.02, 0.02, 0.03, 0.03, 8)
    one, other = (reference.attention(q, k + np.int8(shift), v, sums.score_multiplier, constants.exp_table(), sums.ratio, 0, 0)
                  for shift in (0, 20))  # fmt: skip
    # scores move together, but each is rounded for itself
    assert np.abs(one.astype(int) - other).max() <= 1


def test_softmax_is_softmax_to_a_256th(rng):
    for width, scale in ((2, 0.1), (30, 0.05), (197, 0.02)):
        x = int8(rng, 20, width)
        got = reference.softmax(constants.softmax_table(scale), x)
        weights = np.exp(x * scale)
        wanted = np.minimum(255, 256 * weights / weights.sum(1, keepdims=True))
        assert np.abs(got - wanted).max() <= 0.52


@pytest.mark.parametrize("width", [2, 48, 192, 1024])
@pytest.mark.parametrize("spread", [1, 3, 30, 128])
def test_layer_normalization_is_the_real_one_to_a_step(rng, width, spread):
    x = rng.integers(-spread, spread, (30, width)).astype(np.int8)
    gamma, beta, eps, x_scale = rng.normal(1, 0.3, width), rng.normal(0, 0.3, width), 1e-6, 0.05
    rows = real(x, x_scale, 17)
    mean, variance = rows.mean(1, keepdims=True), rows.var(1, keepdims=True)
    wanted = (rows - mean) / np.sqrt(variance + eps) * gamma + beta
    y_scale = np.abs(wanted).max() / 126
    sums = constants.layer_norm(gamma, beta, eps, x_scale, y_scale, 1)
    assert_within(reference.layer_norm(x, sums.affine, sums.epsilon), wanted, y_scale, 1, 0.51)


def test_addition_means_and_tables_are_within_half_a_step(rng):
    a, b = int8(rng, 500), int8(rng, 500)
    sums = constants.add(0.04, -3, 0.07, 9, 0.06, 4)
    got = reference.add(a, b, sums.a_multiplier, sums.b_multiplier, sums.constant)
    assert_within(got, real(a, 0.04, -3) + real(b, 0.07, 9), 0.06, 4, 0.501)
    x = int8(rng, 65, 7)
    got = reference.mean(x, 5, constants.mean(65, 0.04, 0.01), -2)
    assert_within(got, real(x, 0.04, 5).mean(0), 0.01, -2, 0.501)
    table, every = constants.lookup(constants.gelu, 0.05, -20, 0.03, -100), np.arange(-128, 128).astype(np.int8)
    z = real(every, 0.05, -20)
    tanh = 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))
    assert_within(reference.lookup(table, every), tanh, 0.03, -100, 0.53)  # the tanh form is 0.0005 off the exact one


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: constants.requantizer([0.1, 0.5]), "0.5, must be in"),
        (lambda: constants.requantizer(float("nan")), "nan"),
        (lambda: constants.requantizer(-0.1), "-0.1"),
        (lambda: constants.attention(0.1, 0.1, 1.0, 0.1, 32), "value scale / output scale"),
        (lambda: constants.attention(1.0, 1.0, 1.0, 1.0, 4), "query scale"),
        (lambda: constants.add(3.7, 0, 1.0, 0, 1.0, 0), "addend"),
        (lambda: constants.bias_words([1.0], 1e-6, [1e-6]), "bias"),
        (lambda: constants.layer_norm(np.ones(1), np.ones(1), 1e-6, 1.0, 1.0, 0), "1 channels"),
        (lambda: constants.layer_norm(np.ones(4), np.ones(4), 1e-6, 1e-12, 1.0, 0), "epsilon"),
        (lambda: packing.linear(np.ones((1, 1), np.int8), np.full(1, 2**31 - 1, np.int32), np.ones(1, np.int32), -128), "bias"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(make, says):
    with pytest.raises(UnsupportedError, match=says):
        make()


def test_whose_range_is_at_fault_is_said():
    with pytest.raises(UnsupportedError) as caught:
        constants.attention(1.0, 1.0, 1.0, 1.0, 4)
    assert "queries and keys are too wide" in caught.value.hint
    with pytest.raises(UnsupportedError) as caught:
        constants.attention(0.1, 0.1, 1.0, 0.1, 32)
    assert "widen the output's" in caught.value.hint


@pytest.mark.parametrize("zeros", [(-128, -128, 127), (127, 127, -128)])
def test_the_largest_sum_of_an_addition_fits_32_bits(zeros):
    a, b, y = zeros
    sums = constants.add(3.6999, a, 3.6999, b, 1.0, y)
    farthest = 127 if a < 0 else -128
    total = farthest * (sums.a_multiplier + sums.b_multiplier) + sums.constant
    assert 0.97 * 2**31 < abs(total) < 2**31, "near the end, not past it"


def test_a_multiplier_just_below_one_half_fits():
    assert constants.requantizer(np.nextafter(0.5, 0)) == 2**31 - 1


@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (2, 4), (7, 27), (10, 192)])
@pytest.mark.parametrize("order", ["quads", "plain"])
def test_packed_sizes_are_known_without_packing(rng, outputs, inputs, order):
    zeros = np.zeros(outputs, np.int32)
    words = packing.linear(rng.integers(-127, 128, (outputs, inputs), dtype=np.int8), zeros, zeros, 0, order)
    assert len(words) == packing.linear_words(outputs, inputs, order)
    words = packing.depthwise(rng.integers(-127, 128, (outputs, 3, 3), dtype=np.int8), zeros, zeros)
    assert len(words) == packing.depthwise_words(outputs)
