"""prune on models with If, Loop and Scan: units in bodies go too, with and without data."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from text_graph import graph

from graphopt import model as models
from graphopt.base import Context
from graphopt.calibration import load
from graphopt.executor import Session
from graphopt.passes.prune import Prune
from graphopt.progress import Silent
from graphopt.target import Target

TARGET = Target("test", "ort", channel_multiple=1)
FEEDS = {"x": np.random.default_rng(1).normal(size=(5, 8, 3)).astype(np.float32), "c": np.array(True)}


def duplicated(array: np.ndarray, axis: int) -> np.ndarray:
    """Every position twice; the copies are not needed."""
    return np.repeat(array, 2, axis=axis)


def network() -> ir.Model:
    """A projection, an If with weights in both branches, a recurrent cell as a Scan, a classifier; all twice as wide
    as they need be."""
    random = np.random.default_rng(0)

    def weight(*shape: int) -> np.ndarray:
        return (random.normal(size=shape) / np.sqrt(shape[0])).astype(np.float32)

    p, g, s = weight(3, 4), weight(4, 4), weight(4, 4)
    wi, wh, wo = weight(4, 5), weight(5, 5), weight(5, 2)

    def both(array: np.ndarray) -> np.ndarray:
        return duplicated(duplicated(array, 0) / 2, 1)

    return graph(
        "(float[5,n,3] x, bool c) => (float[5,n,2] y)",
        """a = MatMul(x, p)  b = Relu(a)
           k = If (c) <then_branch = t () => (float[5,n,8] u) { u0 = MatMul(b, g)  u = Tanh(u0) },\
                       else_branch = e () => (float[5,n,8] v) { v0 = MatMul(b, s)  v = Tanh(v0) }>
           f = Gather<axis=0>(k, first)  z = MatMul(f, wz)
           last, r = Scan <num_scan_inputs = 1, body = b (float[n,10] h, float[n,8] i)\
              => (float[n,10] h1, float[n,10] o)\
              { m = MatMul(i, wi)  q = MatMul(h, wh)  d = Add(m, q)  h1 = Tanh(d)  o = Identity(h1) }> (z, k)
           y = MatMul(r, wo)""",
        p=duplicated(p, 1),
        g=both(g),
        s=both(s),
        wz=both(weight(4, 5)),
        wi=both(wi),
        wh=both(wh),
        wo=duplicated(wo, 0) / 2,
        first=np.array(0),
    )


@pytest.mark.parametrize("data", [True, False])
def test_bodies_become_narrower(data: bool) -> None:
    model = network()
    calibration: Any = load(lambda: iter([FEEDS]), model) if data else None
    small = model.clone()
    result = Prune(params=0.6).run(small, Context(TARGET, calibration, None, 0, 1, Silent()))
    models.infer_shapes(small)
    models.check(small)
    assert result.changed
    sizes = [
        sum(v.const_value.size for v in m.graph.initializers.values() if v.dtype == ir.DataType.FLOAT)
        for m in (model, small)
    ]
    assert sizes[1] <= 0.6 * sizes[0]
    wh = small.graph.initializers["wh"].const_value
    assert wh is not None and wh.shape.numpy()[0] == wh.shape.numpy()[1]
    for taken in (True, False):
        out = Session(small).run(FEEDS | {"c": np.array(taken)})["y"]
        assert out.shape == (5, 8, 2)
        assert np.isfinite(out).all()


def test_a_branch_that_the_data_never_takes_is_not_free_to_go() -> None:
    """Two branches with layers of their own: what is removed follows from weights where no data speaks for them."""
    random = np.random.default_rng(0)
    model = graph(
        "(float[n,6] x, bool c) => (float[n,2] y)",
        """y = If (c) <then_branch = t () => (float[n,2] u) { u0 = MatMul(x, a)  u1 = Tanh(u0)  u = MatMul(u1, b) },\
                       else_branch = e () => (float[n,2] v) { v0 = MatMul(x, d)  v1 = Tanh(v0)  v = MatMul(v1, e) }>""",
        a=random.normal(size=(6, 16)).astype(np.float32),
        b=random.normal(size=(16, 2)).astype(np.float32),
        d=random.normal(size=(6, 16)).astype(np.float32),
        e=random.normal(size=(16, 2)).astype(np.float32),
    )
    feeds = {"x": random.normal(size=(32, 6)).astype(np.float32), "c": np.array(True)}
    small = model.clone()
    calibration = load(lambda: iter([feeds]), model)
    result = Prune(params=0.75).run(small, Context(TARGET, calibration, None, 0, 1, Silent()))
    assert any("never runs" in note and "d[axis 1]" in note for note in result.notes)
    left = {n: v.const_value.shape.numpy() for n, v in small.graph.initializers.items() if v.const_value is not None}
    assert left["d"][1] > 8  # not the whole budget is taken from there
