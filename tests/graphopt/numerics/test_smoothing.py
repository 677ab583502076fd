"""Scales between activations and weights, and the estimate of what integers lose."""

from __future__ import annotations

import numpy as np
import pytest

from graphopt.numerics.rounding import Grid, affine, dequantise, quantise, symmetric_weight
from graphopt.numerics.smoothing import ALPHAS, ChannelRange, SmoothedLayer, Smoothing, smoothed

ACTIVATION, WEIGHT = Grid.of("uint8"), Grid.of("int8", symmetric=True)


def layer(outliers: bool, seed: int = 0) -> tuple[SmoothedLayer, np.ndarray]:
    random = np.random.default_rng(seed)
    x = random.normal(size=(400, 32)).astype(np.float32)
    if outliers:
        x[:, [3, 17]] *= 80
    read = ChannelRange(32)
    for part in np.split(x, 4):
        read.update(part, 1)
    return SmoothedLayer(random.normal(size=(32, 24)), read, np.arange(1, 33)), x


def search(*layers: SmoothedLayer, whole: bool = False) -> Smoothing:
    return smoothed(layers, 33, ACTIVATION, WEIGHT, per_channel=True, limit=20, whole=whole)


def measured(of: SmoothedLayer, x: np.ndarray, logs: np.ndarray) -> float:
    """Squared error of the quantised layer relative to its squared outputs."""
    s = np.exp2(logs[of.scale])
    scaled, weight = (x / s).astype(np.float32), (of.weight * s[:, None]).astype(np.float32)
    a, b = affine(float(scaled.min()), float(scaled.max()), ACTIVATION), symmetric_weight(weight, WEIGHT, axis=1)
    got = dequantise(quantise(scaled, a), a).astype(float) @ dequantise(quantise(weight, b), b)
    wanted = x.astype(float) @ of.weight
    return float(np.square(got - wanted).sum() / np.square(wanted).sum())


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_outliers_go_and_the_estimate_is_right(seed: int, whole: bool) -> None:
    one, x = layer(outliers=True, seed=seed)
    found = search(one, whole=whole)
    assert found.alpha in ALPHAS
    assert measured(one, x, found.logs) < 0.2 * measured(one, x, np.zeros(33))
    assert measured(one, x, np.zeros(33)) == pytest.approx(found.before, rel=0.35)
    assert measured(one, x, found.logs) == pytest.approx(found.after, rel=0.35)
    assert not whole or (found.logs == np.rint(found.logs)).all()


def test_even_channels_stay() -> None:
    one, _ = layer(outliers=False)
    found = search(one)
    assert found.alpha is None
    assert not found.logs.any()
    assert found.after == found.before


def test_layers_that_read_the_same_share_scales() -> None:
    one, _ = layer(outliers=True)
    other = SmoothedLayer(one.weight[:, ::-1] * np.linspace(1, 9, 24), one.read, one.scale)
    found = search(one, other)
    np.testing.assert_array_less(found.logs[[1, 2, 3]], found.logs[[4, 4, 4]])
    assert found.after < 0.2 * found.before


def test_dead_channels_and_no_data() -> None:
    read = ChannelRange(2)
    read.update(np.array([[0.0, np.inf], [0.0, 3.0]], np.float32), 1)
    assert read.nonfinite == 1
    np.testing.assert_array_equal(read.magnitude, [0, 3])
    np.testing.assert_array_equal(read.square, [0, 4.5])
    dead = SmoothedLayer(np.zeros((2, 3)), read, np.array([1, 2]))
    assert smoothed([dead], 3, ACTIVATION, WEIGHT, per_channel=True, limit=20, whole=False).alpha is None
