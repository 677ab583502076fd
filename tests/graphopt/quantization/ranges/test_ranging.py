"""What calibration saw of a tensor, and what of it is worth a warning or a refusal."""

from __future__ import annotations

import numpy as np
import pytest
from text_graph import graph

from graphopt import calibration
from graphopt.numerics.histogram import Histogram
from graphopt.numerics.rounding import Grid
from graphopt.progress import Silent
from graphopt.quantization.ranges.ranging import FEW, affines, doubts, histograms, unfit

RNG = np.random.default_rng(0)
NETWORK = graph("(float[N, 3] x) => (float[N, 3] y)", "y = Relu(x)")


def of(*values: float) -> Histogram:
    histogram = Histogram()
    histogram.update(np.array(values, np.float32))
    return histogram


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ((1, float("nan")), "inf or nan"),
        ((1, -3.4e38), "spans"),
        ((), "empty"),
        ((0, 0), "is 0 everywhere"),
        ((2.5, 2.5), "is 2.5 everywhere"),
        ((1e-7, -1e-7), None),
    ],
)
def test_what_no_scale_fits(values: tuple[float, ...], reason: str | None) -> None:
    found = unfit(of(*values))
    assert found is None if reason is None else reason in str(found)
    assert bool(affines({"t": of(*values)}, "minmax", Grid.of("uint8"))) == (reason is None)


@pytest.mark.parametrize("batch", [1, 4, 32])
def test_doubts(batch: int) -> None:
    def told(x: np.ndarray, limit: int = 512) -> list[str]:
        return doubts(calibration.load({"x": x}, NETWORK, batch_size=batch), limit, {})

    varied = RNG.standard_normal((20, 3)).astype(np.float32)
    assert told(varied) == []
    assert "one sample" in told(varied[:1])[0]
    assert "one sample" in told(varied, limit=1)[0]
    same = np.repeat(varied[:1], 20, axis=0)
    assert "all 20 calibration samples are the same" in told(same)[0]
    same[19, 2] += 1
    assert told(same) == []


def test_doubts_of_feeds_of_different_lengths() -> None:
    network = graph("(float[N, S] x) => (float[N, S] y)", "y = Relu(x)")
    feeds = [{"x": np.ones((1, n), np.float32)} for n in (3, 5)]
    assert doubts(calibration.load(feeds, network), 512, {}) == []
    assert "same" in doubts(calibration.load([feeds[0]] * 3, network), 512, {})[0]


def test_tensors_of_few_values_are_doubted() -> None:
    x = RNG.standard_normal((20, 3)).astype(np.float32)
    data = calibration.load({"x": x}, NETWORK)
    seen = {"many": of(*range(FEW)), "few": of(1, 2, 3), "empty": of()}
    (told,) = doubts(data, 512, seen)
    assert "1 of 3 ranges" in told and "few: 3" in told
    assert doubts(data, 512, {"many": seen["many"]}) == []


def test_histograms_hold_all_samples() -> None:
    x = RNG.standard_normal((50, 3)).astype(np.float32)
    data = calibration.load({"x": x}, NETWORK)
    found = histograms(NETWORK, ["x", "y"], data, samples=40, threads=1, progress=Silent())
    assert found["x"].total == found["y"].total == 120
    assert (found["y"].low, found["y"].high) == (0, x[:40].max())
