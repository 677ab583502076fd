"""Exact rewrites before quantisation."""

from __future__ import annotations

import numpy as np
from text_graph import graph

from graphopt.quantization.static.prepare import spatial_means_to_pools


def test_means_over_positions_become_pools() -> None:
    model = graph("(float[n,4,6] x) => (float[n,4] y)", "y = ReduceMean<axes=[2],keepdims=0>(x)", opset=17)
    assert spatial_means_to_pools(model)
    assert [node.op_type for node in model.graph] == ["GlobalAveragePool", "Flatten"]


def test_means_of_written_out_norms_stay() -> None:
    model = graph(
        "(float[n,4,6] x) => (float[n,4,6] y)",
        """m = ReduceMean<axes=[-1]>(x)  d = Sub(x, m)  p = Pow(d, two)  v = ReduceMean<axes=[-1]>(p)  e = Add(v, eps)
        r = Sqrt(e)  y = Div(d, r)""",
        opset=17, two=np.float32(2), eps=np.float32(0.1),
    )  # fmt: skip
    assert not spatial_means_to_pools(model)
