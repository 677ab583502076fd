"""Grids and rounding: equal to ONNX Runtime's QuantizeLinear and DequantizeLinear bit for bit."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from graphopt.executor import Session
from graphopt.numerics.rounding import (
    BIAS_REACH,
    Affine,
    Grid,
    affine,
    dequantise,
    least_weight_scale,
    quantise,
    quantise_bias,
    sqnr_db,
    symmetric_weight,
)

FINITE = st.floats(-1e6, 1e6, width=32)


@pytest.fixture(scope="module")
def per_tensor() -> dict[str, Session]:
    return {kind: Session(_pair(kind, "", "")) for kind in ("uint8", "int8")}


def _pair(kind: str, channels: str, axis: str) -> ir.Model:
    return ir.from_onnx_text(f"""<ir_version: 8, opset_import: ["": 13]>
        g (float[N, 4] x, float{channels} s, {kind}{channels} z) => ({kind}[N, 4] q, float[N, 4] y) {{
            q = QuantizeLinear{axis}(x, s, z)
            y = DequantizeLinear{axis}(q, s, z)
        }}""")


@settings(max_examples=80, deadline=None)
@given(
    x=hnp.arrays(np.float32, (3, 4), elements=FINITE),
    low=FINITE,
    width=st.floats(0, 1e6, width=32),
    kind=st.sampled_from(["uint8", "int8"]),
    symmetric=st.booleans(),
)
def test_equals_the_runtime(per_tensor, x, low, width, kind, symmetric):
    params = affine(low, low + width, Grid.of(kind, symmetric=symmetric))
    expected = per_tensor[kind].run({"x": x, "s": params.scale, "z": params.zero_point})
    q = quantise(x, params)
    np.testing.assert_array_equal(q, expected["q"])
    np.testing.assert_array_equal(dequantise(q, params), expected["y"])


def test_halves_go_to_even_as_in_the_runtime(per_tensor):
    x = np.array([[0.5, 1.5, 2.5, -0.5], [253.5, 254.5, 255.5, 1e9], [-1.5, -2.5, -1e9, 3.5]], np.float32)
    params = Affine(np.array(1, np.float32), np.array(0, np.uint8))
    q = quantise(x, params)
    np.testing.assert_array_equal(q, [[0, 2, 2, 0], [254, 254, 255, 255], [0, 0, 0, 4]])
    np.testing.assert_array_equal(q, per_tensor["uint8"].run({"x": x, "s": params.scale, "z": params.zero_point})["q"])


def test_per_channel_equals_the_runtime():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((7, 4)).astype(np.float32) * [0.01, 1, 100, 0]
    params = symmetric_weight(x.astype(np.float32), Grid.of("int8", symmetric=True), axis=1)
    session = Session(_pair("int8", "[4]", "<axis = 1>"))
    expected = session.run({"x": x.astype(np.float32), "s": params.scale, "z": params.zero_point})
    q = quantise(x.astype(np.float32), params)
    np.testing.assert_array_equal(q, expected["q"])
    np.testing.assert_array_equal(dequantise(q, params), expected["y"])
    assert params.scale[3] == 1
    assert np.abs(q[:, :3]).max(axis=0).tolist() == [127, 127, 127]


@settings(max_examples=80, deadline=None)
@given(low=FINITE, width=st.floats(0, 1e6, width=32), kind=st.sampled_from(["uint8", "int8"]), symmetric=st.booleans())
def test_zero_is_exact_and_the_range_is_covered(low, width, kind, symmetric):
    high = low + width
    params = affine(low, high, Grid.of(kind, symmetric=symmetric))
    zero, ends = np.zeros(1, np.float32), np.array([min(low, 0), max(high, 0)], np.float32)
    assert dequantise(quantise(zero, params), params)[0] == 0
    # Rounding the zero point shifts the grid by half a step, rounding the value costs another half.
    error = np.abs(dequantise(quantise(ends, params), params) - ends)
    assert (error <= params.scale * (1 + 1e-3)).all()
    if symmetric:
        assert int(params.zero_point) == (0 if kind == "int8" else 128)


def test_extreme_ranges_give_usable_scales():
    biggest = float(np.finfo(np.float32).max)
    for low, high in ((0.0, 0.0), (-biggest, biggest), (0.0, 1e-45), (-1e-40, 0.0)):
        for kind in ("uint8", "int8"):
            params = affine(low, high, Grid.of(kind))
            assert np.isfinite(params.scale) and params.scale >= np.finfo(np.float32).tiny


@pytest.mark.parametrize(("low", "high"), [(1.0, 0.0), (float("nan"), 1.0), (0.0, float("inf"))])
def test_what_is_no_range_is_refused(low, high):
    with pytest.raises(ValueError, match="not a range"):
        affine(low, high, Grid.of("uint8"))


def test_wide_integers_have_no_grid():
    with pytest.raises(ValueError, match="8- and 16-bit"):
        Grid.of("int32")


def test_a_dead_channel_keeps_its_bias():
    """Weights near zero beside an ordinary bias: the scale grows until the int32 bias holds it."""
    weight = np.array([[1e-12, -1e-12], [0.5, -0.25]], np.float32)
    bias = np.array([3.0, -2.0])
    input_scale = np.array(0.02, np.float32)
    grid = Grid.of("int8", symmetric=True)
    naive = symmetric_weight(weight, grid, axis=0)
    lost, scale = quantise_bias(bias, input_scale, naive.scale)
    assert abs(lost[0] * float(scale[0]) - 3.0) > 1
    params = symmetric_weight(weight, grid, axis=0, least_scale=least_weight_scale(bias, input_scale))
    steps, scale = quantise_bias(bias, input_scale, params.scale)
    np.testing.assert_allclose(steps * scale.astype(np.float64), bias, rtol=1e-6)
    assert np.abs(steps).max() <= BIAS_REACH * (1 + 1e-6)
    assert params.scale[1] == naive.scale[1]


def test_sqnr():
    assert sqnr_db(np.array([1.0, 1.0]), np.array([1.1, 0.9])) == pytest.approx(20)
    assert sqnr_db(np.ones(3), np.ones(3)) == float("inf")
