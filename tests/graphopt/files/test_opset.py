"""Raising the opset keeps names, weights and what the model computes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.errors import ModelError
from graphopt.executor import Session
from graphopt.files.opset import opset_of, raise_opset

RNG = np.random.default_rng(0)


def _model() -> ir.Model:
    """Opset 9: Squeeze and Clip have attributes that are inputs later, Softmax flattens; a weight above 1 kB."""
    m = ir.from_onnx_text("""<ir_version: 4, opset_import: ["": 9]>
        g (float[N, 3, 8, 8] x) => (float[N, 8, 8] y) {
            [front] c = Conv <pads = [1, 1, 1, 1]> (x, w)
            [mean] r = ReduceMean <axes = [1], keepdims = 1> (c)
            [clip] k = Clip <min = 0.0, max = 1.0> (r)
            [squeeze] s = Squeeze <axes = [1]> (k)
            [soft] y = Softmax <axis = 1> (s)
        }""")
    value = next(v for node in m.graph for v in node.inputs if v is not None and v.name == "w")
    value.const_value = ir.Tensor(RNG.standard_normal((16, 3, 3, 3)).astype(np.float32), name="w")
    m.graph.register_initializer(value)
    return m


def test_the_model_computes_the_same():
    m, x = _model(), RNG.standard_normal((2, 3, 8, 8)).astype(np.float32)
    weight = m.graph.initializers["w"].const_value
    before = Session(m).run({"x": x})["y"]
    note = raise_opset(m, 13, "a test")
    assert note == "opset 9 -> 13: a test needs it"
    assert opset_of(m) == 13 and m.ir_version >= 7
    assert m.graph.initializers["w"].const_value is weight  # not copied
    assert [v.name for v in m.graph.inputs] == ["x"] and [v.name for v in m.graph.outputs] == ["y"]
    assert {"front", "mean", "clip", "squeeze", "soft"} <= {n.name for n in m.graph}
    named = [n.name for n in m.graph if n.name]
    assert len(named) == len(set(named))
    np.testing.assert_allclose(Session(m).run({"x": x})["y"], before, rtol=1e-6)


def test_nothing_happens_where_it_is_high_enough():
    m = _model()
    assert raise_opset(m, 9, "a test") is None and opset_of(m) == 9


def test_what_cannot_be_converted_is_refused_with_the_reason():
    m = _model()
    m.graph.node("clip").op_type = "NoSuchOperator"
    with pytest.raises(ModelError, match=r"a test needs opset 13.*from 9 failed.*export the model again"):
        raise_opset(m, 13, "a test")
    assert opset_of(m) == 9
