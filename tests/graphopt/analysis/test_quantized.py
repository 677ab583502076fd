"""Quantised graphs: scales and zero points follow their axis."""

from __future__ import annotations

import numpy as np
from text_graph import graph

from graphopt.analysis.certificate import certify
from graphopt.analysis.units import analyse


def qdq(zero_point: int):
    random = np.random.default_rng(0)
    return graph(
        "(float[n,3,8,8] x) => (float[n,2,8,8] y)",
        """dw = DequantizeLinear<axis=0>(w1, s1, z1)  db = DequantizeLinear<axis=0>(b1, sb)
           h = Conv<pads=[1,1,1,1]>(x, dw, db)  r = Relu(h)  q = QuantizeLinear(r, s, z)  d = DequantizeLinear(q, s, z)
           y = Conv(d, w2)""",
        w1=random.integers(-127, 127, (5, 3, 3, 3)).astype(np.int8),
        s1=random.uniform(0.01, 0.02, 5).astype(np.float32),
        z1=np.full(5, zero_point, np.int8),
        b1=random.integers(-500, 500, 5).astype(np.int32),
        sb=np.full(5, 0.001, np.float32),
        s=np.float32(0.05),
        z=np.uint8(0),
        w2=(2, 5, 1, 1),
    )


def test_channels_of_a_quantised_convolution_are_exact_units() -> None:
    model = qdq(0)
    coupling = analyse(model)
    assert len(coupling.units) == 5
    assert {member.parameter for member in coupling.units[0].members} == {"w1", "s1", "z1", "b1", "sb", "w2"}
    assert all(unit.exact for unit in coupling.units)
    assert certify(model, coupling, {2, 4}).holds


def test_a_zero_point_makes_zeroing_inexact() -> None:
    assert not any(unit.exact for unit in analyse(qdq(3)).units)
