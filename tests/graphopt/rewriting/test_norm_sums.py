"""Sums in front of layer norms that ONNX Runtime shall not fuse."""

from __future__ import annotations

import numpy as np
import pytest
from fusions import fused
from text_graph import graph

from graphopt.executor import Session
from graphopt.rewriting.norm_sums import keep_sums_apart

RNG = np.random.default_rng(0)
NORM = "y = LayerNormalization(s, g, c)"
WRITTEN_OUT = """m = ReduceMean<axes=[-1]>(s)  d = Sub(s, m)  p = Pow(d, two)  v = ReduceMean<axes=[-1]>(p)
    e = Add(v, eps)  r = Sqrt(e)  q = Div(d, r)  h = Mul(q, g)  y = Add(h, c)"""
CONSTANTS = {"two": np.float32(2), "eps": np.float32(1e-5)}


@pytest.mark.parametrize("norm", [NORM, WRITTEN_OUT])
def test_the_runtime_keeps_them_apart_and_no_bit_changes(norm: str) -> None:
    model = graph(
        "(float[n,t,8] a, float[n,t,8] b) => (float[n,t,8] y)", "s = Add(a, b)  " + norm,
        g=(8,), c=(8,), **(CONSTANTS if norm is WRITTEN_OUT else {}),
    )  # fmt: skip
    feeds = {name: RNG.normal(size=(2, 3, 8)).astype(np.float32) for name in "ab"}
    before = Session(model).run(feeds)["y"]
    assert fused(model) == {"SkipLayerNormalization": 1}
    assert len(keep_sums_apart(model)) == 1
    assert fused(model) == {"LayerNormalization": 1}
    np.testing.assert_array_equal(Session(model).run(feeds)["y"], before)


def test_other_sums_stay() -> None:
    model = graph(
        "(float[n,8] a, float[n,8] b) => (float[n,8] y)",
        "t = Add(a, b)  r = Relu(t)  s = Add(r, bias)  y = LayerNormalization(s, g)",
        bias=(8,), g=(8,),
    )  # fmt: skip
    assert keep_sums_apart(model) == []
    assert [n.op_type for n in model.graph] == ["Add", "Relu", "Add", "LayerNormalization"]
