"""What the option `rounding` stands for, through the pass."""

from __future__ import annotations

import numpy as np
import pytest
from text_graph import graph

import graphopt
from graphopt.errors import DataError
from graphopt.executor import Session

RNG = np.random.default_rng(0)
X = (RNG.standard_normal((96, 64)) @ RNG.standard_normal((64, 64)) / 8).astype(np.float32)


def error(passes: str, data: bool = True) -> float:
    """Relative squared error of the outputs of a quantised model."""
    model = graph(
        "(float[N, 64] x) => (float[N, 32] y)",
        "a = MatMul(x, w1)  r = Relu(a)  b = MatMul(r, w2)  c = Relu(b)  y = MatMul(c, w3)",
        w1=(64, 96), w2=(96, 64), w3=(64, 32),
    )  # fmt: skip
    reference = Session(model).run({"x": X})["y"]
    calib = {"x": X[:64]} if data else None
    found = graphopt.optimize(model, passes=passes, target="cpu", calib=calib).model
    gap = Session(found, optimize=True).run({"x": X})["y"] - reference
    return float((gap**2).mean() / (reference**2).mean())


def test_four_bits_are_solved_for_where_there_is_data() -> None:
    spec = "quantize{scheme=int4-weights,block=32,rounding=%s}"
    plain, chosen = error(spec % "nearest"), error(spec % "auto")
    assert chosen < 0.6 * plain
    assert chosen <= error(spec % "gptq") * 1.05
    assert error(spec % "auto", data=False) < plain * 1.1


def test_static_weights_may_be_solved_for_too() -> None:
    spec = "quantize{rounding=%s,correct_bias=%s}"
    assert error(spec % ("descent", "true")) < error(spec % ("nearest", "false")) * 1.05


def test_methods_that_need_data_say_so() -> None:
    with pytest.raises(DataError, match="rounding=gptq needs calibration data"):
        error("quantize{scheme=int4-weights,rounding=gptq}", data=False)
