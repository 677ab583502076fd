"""dedupe-initializers, merge-common-subexpressions, remove-dead-code."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from golden import context, expect, parse, reasons, run

from graphopt.registry import pass_class

DEDUPE = pass_class("dedupe-initializers")()
MERGE = pass_class("merge-common-subexpressions")()
DEAD = pass_class("remove-dead-code")()


def test_equal_initializers_are_stored_once() -> None:
    expect(
        """g (float[2] x) => (float[2] y) <float[2] a = {1.0, 2.0}, float[2] b = {1.0, 2.0}, float[2] c = {1.0, 3.0}>
        { t = Add(x, a) u = Mul(t, b) y = Mul(u, c) }""",
        """g (float[2] x) => (float[2] y) <float[2] a = {1.0, 2.0}, float[2] c = {1.0, 3.0}>
        { t = Add(x, a) u = Mul(t, a) y = Mul(u, c) }""",
        DEDUPE,
    )


def test_initializers_that_differ_in_type_shape_or_sign_of_zero_stay() -> None:
    text = """g (float[1,2] x) => (float[1,2] y) <float[2] a = {0.0, 2.0}, float[1,2] b = {0.0, 2.0},
    float[2] c = {-0.0, 2.0}>
    { t = Add(x, a) u = Mul(t, b) y = Mul(u, c) }"""
    model = parse(text)
    assert not DEDUPE.run(model, context()).changed


def test_uniform_vectors_are_not_shared_between_layers() -> None:
    text = """g (float[2] x) => (float[2] y) <float[2] a = {0.0, 0.0}, float[2] b = {0.0, 0.0}>
    { t = Add(x, a) u = Relu(t) y = Add(u, b) }"""
    expect(text, None, DEDUPE)
    shapes = """g (float[2] x) => (float[2,1] y) <int64[2] a = {1, 1}, int64[2] b = {1, 1}>
    { t = Expand(x, a) y0 = Relu(t) y1 = Expand(y0, b) z = Constant <value = int64[2] {2,
    1}> () y = Reshape(y1, z) }"""
    assert DEDUPE.run(parse(shapes), context()).changed


def test_a_body_uses_the_equal_tensor_around_it_but_not_its_siblings() -> None:
    model = parse(
        """g (bool c, float[2] x) => (float[2] y) <float[2] w = {1.0, 2.0}> { t = Add(x, w) y = If (c) <
             then_branch = a () => (float[2] p) <float[2] v = {1.0, 2.0}, float[2] s = {7.0, 8.0}> { u = Add(t,
             v) p = Mul(u, s) },
             else_branch = d () => (float[2] q) <float[2] r = {7.0, 8.0}> { q = Add(t, r) } > }"""
    )
    feeds = {"c": np.array(True), "x": np.ones(2, np.float32)}
    before = run(model, feeds)
    result = DEDUPE.run(model, context())
    assert result.notes == ["1 duplicate initializers removed (8 bytes)"]
    attributes = model.graph[1].attributes
    assert list(attributes["then_branch"].as_graph().initializers) == ["s"]
    assert list(attributes["else_branch"].as_graph().initializers) == ["r"]
    np.testing.assert_array_equal(run(model, feeds)[0], before[0])


def test_equal_large_tensors_are_told_apart_by_all_their_bytes() -> None:
    data = np.arange(5000, dtype=np.float32)
    other = data.copy()
    other[1234] += 1
    model = parse("g (float[5000] x) => (float[5000] y) { t = Neg(x) u = Abs(t) y = Relu(u) }")
    for name, values, node in (("a", data, 0), ("b", other, 1), ("c", data.copy(), 2)):
        value = ir.Value(name=name, const_value=ir.tensor(values, name=name))
        model.graph.register_initializer(value)
        model.graph[node].op_type = "Add"
        model.graph[node].resize_inputs(2)
        model.graph[node].replace_input_with(1, value)
    DEDUPE.run(model, context())
    assert list(model.graph.initializers) == ["a", "b"]


def test_equal_nodes_become_one() -> None:
    expect(
        """g (float[2] x, float[2] z) => (float[2] y)
        { a = Add(x, z) b = Add(z, x) c = Sub(x, z) d = Sub(z, x) e = Mul(a, b) f = Mul(c, d) y = Add(e, f) }""",
        """g (float[2] x, float[2] z) => (float[2] y)
        { a = Add(x, z) c = Sub(x, z) d = Sub(z, x) e = Mul(a, a) f = Mul(c, d) y = Add(e, f) }""",
        MERGE,
    )


def test_attributes_and_random_operators_keep_nodes_apart() -> None:
    expect(
        """g (float[2,3] x) => (float[2,1] y) { a = ReduceSum(x) b = ReduceSum <keepdims: int = 0> (x)
           c = RandomNormalLike <seed: float = 1.0> (x) d = RandomNormalLike <seed: float = 1.0> (x)
           e = Sub(c, d) f = Mul(e, a) g0 = Mul(f, b) h = ReduceMean <axes: ints = [1]> (g0) y = Relu(h) }""",
        None,
        MERGE,
        runnable=False,
    )


def test_a_body_reuses_what_is_computed_before_it() -> None:
    model = parse(
        """g (bool c, float[2] x) => (float[2] y) { t = Exp(x) z = If (c) <
             then_branch = a () => (float[2] p) { u = Exp(x) p = Neg(u) },
             else_branch = d () => (float[2] q) { q = Exp(x) } > y = Add(z, t) }"""
    )
    result = MERGE.run(model, context())
    attributes = model.graph[1].attributes
    assert [n.op_type for n in attributes["then_branch"].as_graph()] == ["Neg"]
    assert [n.op_type for n in attributes["else_branch"].as_graph()] == ["Exp"]
    assert "computed outside it" in reasons(result)
    x = np.array([1.0, 2.0], np.float32)
    np.testing.assert_allclose(run(model, {"c": np.array(False), "x": x})[0], 2 * np.exp(x), rtol=1e-6)


def test_two_equal_outputs_stay_two() -> None:
    text = "g (float[2] x) => (float[2] y, float[2] z) { y = Relu(x) z = Relu(x) }"
    assert "both graph outputs" in reasons(expect(text, None, MERGE))


def test_dead_nodes_initializers_and_imports_go() -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
        g (float[2] x, float[2] unread) => (float[2] y) <float[2] a = {1.0, 2.0}, float[2] b = {1.0, 2.0}>
        { t = Add(x, a) u = Neg(t) y = Relu(x) }"""
    )
    result = DEAD.run(model, context())
    assert [n.op_type for n in model.graph] == ["Relu"]
    assert not model.graph.initializers
    assert [v.name for v in model.graph.inputs] == ["x", "unread"]
    assert dict(model.graph.opset_imports) == {"": 17}
    assert result.notes == ["2 dead nodes and 2 dead initializers removed", "unused operator-set imports removed"]
    assert not DEAD.run(model, context()).changed


def test_dead_code_in_bodies_and_values_only_a_body_reads() -> None:
    model = parse(
        """g (bool c, float[2] x) => (float[2] y) <float[2] a = {1.0, 2.0}, float[2] b = {3.0, 2.0}> {
           t = Neg(x) y = If (c) <
             then_branch = p () => (float[2] p0) { dead = Add(t, b) p0 = Add(t, a) },
             else_branch = q () => (float[2] q0) { q0 = Relu(t) } > }"""
    )
    DEAD.run(model, context())
    assert [n.op_type for n in model.graph] == ["Neg", "If"]
    assert list(model.graph.initializers) == ["a"]
    assert [n.op_type for n in model.graph[1].attributes["then_branch"].as_graph()] == ["Add"]


def test_a_dead_if_frees_what_its_bodies_captured() -> None:
    model = parse(
        """g (bool c, float[2] x) => (float[2] y) { t = Neg(x) z = If (c) <
             then_branch = p () => (float[2] p0) { p0 = Abs(t) },
             else_branch = q () => (float[2] q0) { q0 = Relu(t) } > y = Exp(x) }"""
    )
    DEAD.run(model, context())
    assert [n.op_type for n in model.graph] == ["Exp"]
    assert len(tuple(model.graph.inputs[1].uses())) == 1
