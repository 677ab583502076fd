from __future__ import annotations

import numpy as np
from golden import parse

from graphopt.rewriting.constants import array, constant, float64, freeze_overridable

TEXT = """g (float[2] x) => (float[2] y) <float[2] w = {1.0, 2.0}>
{ k = Constant <value = float[2] {3.0, 4.0}> () t = Add(x, w) u = Mul(t, k) y = Mul(u, w) }"""


def test_constants_of_both_kinds() -> None:
    model = parse(TEXT)
    add, multiply = model.graph[1], model.graph[2]
    np.testing.assert_array_equal(array(add.inputs[1]), [1, 2])
    np.testing.assert_array_equal(array(multiply.inputs[1]), [3, 4])
    assert constant(add.inputs[0]) is None
    assert constant(multiply.inputs[0]) is None
    assert constant(None) is None
    values = float64(add.inputs[1])
    assert values is not None
    assert values.dtype == np.float64


def test_an_overridable_initializer_is_no_constant_until_frozen() -> None:
    model = parse("""<ir_version: 3, opset_import: ["" : 9]>
    g (float[2] x, float[2] w) => (float[2] y) <float[2] w = {1.0, 2.0}> { y = Add(x, w) }""")
    value = model.graph[0].inputs[1]
    assert constant(value) is None
    assert freeze_overridable(model) == ["w"]
    assert constant(value) is not None
    assert [v.name for v in model.graph.inputs] == ["x"]
    assert freeze_overridable(model) == []
