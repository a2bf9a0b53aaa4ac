"""What every precision scheme promises: integers in range, errors of at most half a step, zero exact."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from nascompile import plugins
from nascompile.quantization import dequantize, limits
from nascompile.records import Precision, TensorFormat

SCHEMES = plugins.names("quantization")
ACTIVE = [name for name in SCHEMES if plugins.get("quantization", name).precision.activations.kind == "int"]


@pytest.mark.parametrize("name", SCHEMES)
def test_a_scheme_is_found_by_the_name_of_its_precision(name):
    scheme = plugins.get("quantization", name)
    assert isinstance(scheme.precision, Precision)
    assert scheme.name == scheme.precision.name
    assert name == scheme.name.replace("-", "_")
    assert scheme.precision.weights.kind == "int"


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    spread = rng.standard_normal((6, 33)) * np.array([1e-30, 1e-3, 1.0, 7.0, 1e4, 1e30])[:, None]
    ties = np.array([[127.0, 0.5, 1.5, -0.5, -1.5, 2.5, -127.0]])
    return {
        "spread": spread.astype(np.float32), "ties": ties.astype(np.float32), "zeros": np.zeros((3, 5), np.float32),
        "one": np.array([[-3.0]], np.float32), "zero row": np.array([[0, 0], [1, -2]], np.float32),
    }  # fmt: skip


@pytest.mark.parametrize("case", list(weights()))
@pytest.mark.parametrize("name", SCHEMES)
def test_weights_come_back_within_half_a_step_of_what_shares_a_scale(name, case):
    scheme, weight = plugins.get("quantization", name), weights()[case]
    kept = weight.copy()
    integers, scale = scheme.quantize_weight(weight)
    limit = 2 ** (scheme.precision.weights.bits - 1) - 1
    size = scheme.precision.weights.group_size or weight.shape[1]
    assert integers.shape == weight.shape
    assert scale.shape == ((len(weight), -(-weight.shape[1] // size)) if scheme.precision.weights.group_size else weight.shape[:1])
    assert integers.dtype == np.int8
    assert scale.dtype == np.float32
    assert np.array_equal(weight, kept)
    assert (scale > 0).all()
    assert np.isfinite(scale).all()
    assert np.abs(integers.astype(int)).max() <= limit  # symmetric: -128 is not used
    for r, row in enumerate(weight):
        for start in range(0, len(row), size):
            part, ints = row[start : start + size].astype(np.float64), integers[r, start : start + size].astype(int)
            step = float(scale[r] if scale.ndim == 1 else scale[r, start // size])
            # half a step, and the rounding of the scale and the quotient to float32: 127 · 2⁻²³ of a step
            assert (np.abs(ints * step - part) <= (0.5 + 1e-4) * step).all()
            if np.abs(part).max() > 0:
                assert np.abs(ints).max() == limit  # the whole range is used
            assert (ints[part == 0] == 0).all()
    if scale.ndim == 1:
        np.testing.assert_array_equal(dequantize(integers, scale), integers * scale[:, None])
    else:
        wide = np.concatenate([np.repeat(scale[:, [g]], size, axis=1) for g in range(scale.shape[1])], axis=1)[:, : weight.shape[1]]
        np.testing.assert_array_equal(dequantize(integers, scale, size), integers * wide)
    if case == "ties" and limit == 127:
        assert integers.tolist() == [[127, 0, 2, 0, -2, 2, -127]]


@pytest.mark.parametrize("name", ACTIVE)
@settings(max_examples=200, deadline=None)
@given(low=st.floats(-1e6, 1e6), high=st.floats(-1e6, 1e6), share=st.floats(0, 1))
def test_a_range_is_covered_with_zero_exact(name, low, high, share):
    scheme = plugins.get("quantization", name)
    low, high = min(low, high), max(low, high)
    scale, zero = scheme.activation_parameters(low, high)
    bottom, top = limits(scheme.precision.activations)
    assert scale > 0
    assert isinstance(zero, int)
    assert bottom <= zero <= top
    value = (min(low, 0.0) * (1 - share)) + max(high, 0.0) * share
    stored = np.clip(np.round(value / scale) + zero, bottom, top)
    # half a step, and up to half another at the ends, where the zero point was rounded; 1e-4 steps for the float32 scale
    assert abs((stored - zero) * scale - value) <= (1.0 + 1e-4) * scale
    symmetric = scheme.precision.activations.symmetric
    width = max(abs(low), abs(high)) if symmetric else max(high, 0.0) - min(low, 0.0)
    if width > 1e-9:
        assert scale * top == pytest.approx(width, rel=1e-6)  # no wider than it must be
        if 0.01 < share < 0.99 and zero not in (bottom, top):
            assert abs((stored - zero) * scale - value) <= (0.5 + 1e-4) * scale or stored in (bottom, top)
    if symmetric:
        assert zero == 0


def test_limits_of_integers():
    found = [limits(TensorFormat(kind="int", bits=bits, signed=signed)) for bits in (4, 8) for signed in (False, True)]
    assert found == [(0, 15), (-8, 7), (0, 255), (-128, 127)]


@pytest.mark.parametrize("name", [name for name in ACTIVE if not plugins.get("quantization", name).precision.activations.signed])
@pytest.mark.parametrize(
    ("low", "high", "zero"),
    [(0.0, 5.0, 0), (1.0, 5.0, 0), (-5.0, 0.0, 255), (-5.0, -1.0, 255), (0.0, 0.0, 0), (-1.0, 3.0, 64)],
)
def test_zero_points_of_ranges_on_one_side(name, low, high, zero):
    assert plugins.get("quantization", name).activation_parameters(low, high)[1] == zero  # 63.75 of the last
