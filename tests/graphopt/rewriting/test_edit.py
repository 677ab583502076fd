from __future__ import annotations

import numpy as np
import pytest
from golden import parse

from graphopt.errors import ModelError
from graphopt.rewriting.constants import array
from graphopt.rewriting.edit import bypass, cannot_replace, set_constant, sole_use
from graphopt.rewriting.names import Names
from graphopt.rewriting.nodes import FOLDED_FROM

TEXT = """g (float[2] x) => (float[2] y) <float[2] w = {1.0, 2.0}>
{ k = Constant <value = float[2] {3.0, 4.0}> () t = Add(x, w) u = Mul(t, k) y = Mul(u, w) }"""


def test_a_shared_constant_is_left_to_its_other_readers() -> None:
    model = parse(TEXT)
    add, last = model.graph[1], model.graph[3]
    assert sole_use(model.graph.initializers["w"]) is None
    set_constant(add, 1, np.array([7.0, 8.0]), Names(model), ["why"])
    np.testing.assert_array_equal(array(add.inputs[1]), [7, 8])
    np.testing.assert_array_equal(array(last.inputs[1]), [1, 2])
    assert list(model.graph.initializers) == ["w", "w_1"]
    assert model.graph.initializers["w_1"].metadata_props[FOLDED_FROM] == "w,why"


def test_an_own_constant_is_changed_under_its_name() -> None:
    model = parse("g (float[2] x) => (float[2] y) <float[2] w = {1.0, 2.0}> { y = Add(x, w) }")
    set_constant(model.graph[0], 1, np.array([7.0, 8.0]), Names(model), ["why"])
    assert list(model.graph.initializers) == ["w"]
    np.testing.assert_array_equal(array(model.graph.initializers["w"]), np.float32([7, 8]))


def test_only_constants_can_be_set() -> None:
    model = parse(TEXT)
    with pytest.raises(ModelError, match="input 0 is not a constant"):
        set_constant(model.graph[1], 0, np.zeros(2), Names(model), [])


def test_what_cannot_be_replaced() -> None:
    model = parse("g (float[2] x) => (float[2] y, float[2] z) { t = Neg(x) y = Identity(t) z = Identity(y) }")
    first, second, third = model.graph
    assert cannot_replace(second.outputs[0], first.outputs[0]) is None
    assert "both graph outputs" in str(cannot_replace(third.outputs[0], second.outputs[0]))
    assert "graph input or a constant" in str(cannot_replace(second.outputs[0], model.graph.inputs[0]))
    assert bypass(second, first.outputs[0]) is None
    assert [v.name for v in model.graph.outputs] == ["y", "z"]
    assert model.graph.outputs[0] is first.outputs[0]
