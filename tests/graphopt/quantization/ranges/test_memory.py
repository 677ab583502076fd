"""Calibration takes the same memory for any number of samples, and holds none of a stream."""

from __future__ import annotations

import gc
import tracemalloc
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
from text_graph import graph

from graphopt import calibration
from graphopt.data import sources
from graphopt.progress import Silent
from graphopt.quantization.ranges.ranging import histograms

SAMPLE = (1, 3, 16, 16)
BLOCK = 20
"""Samples in each feed."""


def network() -> ir.Model:
    body = "c = Conv<pads = [1, 1, 1, 1]>(x, w)  r = Relu(c)  d = Conv(r, v)  y = GlobalAveragePool(d)"
    return graph("(float[N, 3, 16, 16] x) => (float[N, 4, 1, 1] y)", body, w=(8, 3, 3, 3), v=(4, 8, 1, 1))


class Watched(np.ndarray[Any, np.dtype[Any]]):
    """An array that can be seen to die."""


class Stream:
    """A function that yields feeds, made one at a time; knows how many are alive."""

    def __init__(self, samples: int) -> None:
        self.samples, self.given, self.alive, self.most = samples, 0, 0, 0

    def __call__(self) -> Iterator[dict[str, np.ndarray]]:
        for start in range(0, self.samples, BLOCK):
            made = np.random.default_rng(start).standard_normal((BLOCK, *SAMPLE[1:]), np.float32).view(Watched)
            self.given += BLOCK
            self.alive += 1
            self.most = max(self.most, self.alive)
            weakref.finalize(made, self._died)
            yield {"x": made}
            del made

    def _died(self) -> None:
        self.alive -= 1


def calibrated(stream: Stream) -> tuple[int, float]:
    """Peak bytes of Python memory while ranges are measured, and how many values were counted."""
    model = network()
    data = calibration.Calibration(
        sources.Feeds("stream", stream, calibration.input_specs(model), cache_bytes=2 * BLOCK * 3 * 16 * 16 * 4),
        calibration.input_specs(model), batch_size=BLOCK,
    )  # fmt: skip
    gc.collect()
    tracemalloc.start()
    try:
        found = histograms(model, ["x", "r", "d"], data, samples=stream.samples, threads=1, progress=Silent())
        return tracemalloc.get_traced_memory()[1], found["x"].total
    finally:
        tracemalloc.stop()


def test_ten_thousand_samples_take_the_memory_of_a_hundred() -> None:
    few, counted = calibrated(Stream(100))
    many, all_counted = calibrated(Stream(10_000))
    assert (counted, all_counted) == (100 * 768, 10_000 * 768)
    assert many < 1.2 * few + (1 << 20)
    assert many < 10_000 * 768 * 4 / 2, "far less than the samples themselves take"


def test_samples_of_a_stream_are_not_held() -> None:
    stream = Stream(2000)
    calibrated(stream)
    assert stream.given >= 2000
    # one in the making, one at work, and what a cache of two feeds may keep
    assert stream.most <= 5
