from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from golden import parse

from graphopt.errors import ModelError
from graphopt.rewriting.edit import (
    FOLDED_FROM,
    Names,
    array,
    bypass,
    cannot_replace,
    constant,
    float64,
    freeze_overridable,
    mark_origin,
    set_constant,
    size,
    sole_use,
)

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


def test_fresh_names_are_free_and_repeatable() -> None:
    model = parse(TEXT)
    first, second = Names(model), Names(model)
    wanted = ["w", "w", "new", "new", "y"]
    assert [first.fresh(n) for n in wanted] == ["w_1", "w_2", "new", "new_1", "y_1"]
    assert [second.fresh(n) for n in wanted] == ["w_1", "w_2", "new", "new_1", "y_1"]


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


def test_origins_are_kept_in_order_and_once() -> None:
    value = ir.Value(name="v")
    mark_origin(value, ["b", "a"])
    mark_origin(value, ["a", "c"])
    assert value.metadata_props[FOLDED_FROM] == "b,a,c"


def test_size_counts_bodies_but_no_constant_nodes() -> None:
    flat = size(parse(TEXT))
    assert flat.nodes == 3
    nested = parse("""g (bool c, float[2] x) => (float[2] y) { y = If (c) <
        then_branch = a () => (float[2] p) { k = Constant <value = float[2] {1.0, 2.0}> () p = Add(x, k) },
        else_branch = d () => (float[2] q) { q = Neg(x) } > }""")
    assert size(nested).nodes == 3
    assert flat.bytes > 16
