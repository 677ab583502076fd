"""What goes before quantisation is chosen by the noise that integers leave with it."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import onnx_ir as ir
import pytest
from golden import assert_same, context, run
from text_graph import graph

from graphopt import calibration
from graphopt.base import Context
from graphopt.errors import DataError
from graphopt.quantization.scales.conditioning import condition
from graphopt.quantization.static.scheme import StaticOptions, quantise_static

X = np.clip(np.random.default_rng(0).normal(size=(64, 16)), -2, 2).astype(np.float32)


def layers(spread: np.ndarray) -> ir.Model:
    """Two layers; the channels between them have unlike ranges."""
    random = np.random.default_rng(1)
    first = random.normal(size=(16, 24)) * spread
    second = random.normal(size=(24, 8)) / spread[:, None]
    return graph(
        "(float[N,16] x) => (float[N,8] y)", "a = Gemm(x, w)  r = Relu(a)  y = Gemm(r, v)",
        w=first.astype(np.float32), v=second.astype(np.float32),
    )  # fmt: skip


def conditioned(model: ir.Model) -> list[str]:
    ctx = dataclasses.replace(context(), calibration=calibration.load({"x": X}, model))
    quick = StaticOptions(ranges="minmax", sensitive="none")
    return condition(model, ctx, lambda copy: quantise_static(copy, ctx, quick))


def test_unlike_channels_are_made_alike_and_the_model_computes_the_same() -> None:
    model = layers(np.exp2(np.arange(24) % 8 * 1.0))
    before = run(model, {"x": X})[0]
    (note,) = conditioned(model)
    without, with_it = (float(number) for number in re.findall(r"([\d.]+) dB", note))
    assert with_it > without + 20
    np.testing.assert_array_equal(run(model, {"x": X})[0], before)


def test_like_channels_are_left_alone() -> None:
    model, same = layers(np.ones(24)), layers(np.ones(24))
    notes = conditioned(model)
    assert not notes or "left out" in notes[0]
    assert_same(model, same)


def test_without_data_it_asks_for_some() -> None:
    def never(copy: ir.Model) -> None:
        raise AssertionError

    ctx: Context = context()
    with pytest.raises(DataError, match="calibration"):
        condition(layers(np.ones(24)), ctx, never)
