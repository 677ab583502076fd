from __future__ import annotations

import numpy as np
import pytest
from golden import HEADER, context, expect, parse, reasons, run

from graphopt.registry import pass_class

REMOVE = pass_class("remove-identities")()

# Inputs of [N,2,3]; y = the last line. Everything between Relu and Sigmoid goes.
REMOVED = [
    "u = Identity(t)",
    "u = Dropout(t)",
    "u = Cast <to: int = 1> (t)",
    "u = Transpose <perm: ints = [0,1,2]> (t)",
    "a = Transpose <perm: ints = [1,2,0]> (t) u = Transpose <perm: ints = [2,0,1]> (a)",
    "k = Constant <value = int64[3] {0, 2, 3}> () u = Reshape(t, k)",
    "k = Constant <value = int64[3] {-1, 2, 3}> () u = Reshape(t, k)",
    "k = Constant <value = int64[3] {1, 1, 1}> () u = Expand(t, k)",
    "k = Constant <value = int64[3] {1, 1, 1}> () u = Tile(t, k)",
    "k = Constant <value = int64[6] {0, 0, 0, 0, 0, 0}> () u = Pad(t, k)",
    "s = Constant <value_ints = [0, 0]> () e = Constant <value_ints = [2, 9223372036854775807]> () "
    "a = Constant <value_ints = [1, -1]> () u = Slice(t, s, e, a)",
    "u = Concat <axis: int = 1> (t)",
    "u = Sum(t)",
    "k = Constant <value = float {1.0}> () u = Mul(k, t)",
    "k = Constant <value = float[1,3] {1.0, 1.0, 1.0}> () u = Div(t, k)",
    "k = Constant <value = float {0.0}> () u = Add(t, k)",
    "k = Constant <value = float {0.0}> () u = Sub(t, k)",
    "k = Constant <value = float {1.0}> () u = Pow(t, k)",
    "u = Clip(t)",
    "u = Relu(t)",
    "a = Neg(t) u = Neg(a)",
    "k = Constant <value = int64[1] {1}> () a = Unsqueeze(t, k) u = Squeeze(a, k)",
    "a = Cast <to: int = 11> (t) u = Cast <to: int = 1> (a)",
    "u = Split <axis: int = 1> (t)",
]
TEXT = "g (float[N,2,3] x) => (float[N,2,3] y) {{ t = Relu(x) {} y = Sigmoid({}) }}"


@pytest.mark.parametrize("middle", REMOVED)
def test_removed(middle: str) -> None:
    model = parse(TEXT.format(middle, "u"))
    x = np.random.default_rng(0).standard_normal((2, 2, 3)).astype(np.float32)
    reference = run(model, {"x": x})
    result = REMOVE.run(model, context())
    assert result.changed
    assert [
        n.op_type for n in model.graph if n.op_type not in ("Constant", "Neg", "Unsqueeze", "Transpose", "Cast")
    ] == [
        "Relu",
        "Sigmoid",
    ]
    sigmoid = model.graph[-1]
    assert sigmoid.inputs[0] is model.graph[0].outputs[0]
    np.testing.assert_array_equal(run(model, {"x": x})[0], reference[0])


KEPT = [
    ("k = Constant <value = float {0.0}> () u = Mul(t, k)", ""),
    ("k = Constant <value = float {1.0}> () u = Div(k, t)", ""),
    ("k = Constant <value = float {0.0}> () u = Sub(k, t)", ""),
    ("k = Constant <value = float[1,2,1,3] {1.0,1.0,1.0,1.0,1.0,1.0}> () v = Mul(t, k) "
     "u = ReduceMean <axes: ints = [1], keepdims: int = 0> (v)", "may broadcast"),
    ("k = Constant <value = int64[3] {2, 1, 1}> () u = Tile(t, k)", ""),
    ("s = Constant <value_ints = [0]> () e = Constant <value_ints = [1]> () a = Constant <value_ints = [1]> () "
     "u = Slice(t, s, e, a)", ""),
    ("a = Cast <to: int = 6> (t) u = Cast <to: int = 1> (a)", ""),
    ("u = Transpose <perm: ints = [0,2,1]> (t)", ""),
]  # fmt: skip


@pytest.mark.parametrize(("middle", "reason"), KEPT)
def test_kept(middle: str, reason: str) -> None:
    text = TEXT.format(middle, "u").replace("=> (float[N,2,3] y)", "=> (float[A,B,C] y)")
    result = REMOVE.run(parse(text), context())
    assert not result.changed
    assert reason in reasons(result)


def test_dropout_that_trains_or_whose_mask_is_read() -> None:
    text = """g (float[N,2] x) => (float[N,2] y) {
      r = Constant <value = float {0.5}> () m = Constant <value = bool {1}> () y = Dropout(x, r, m) }"""
    assert "training mode is on" in reasons(REMOVE.run(parse(text), context()))
    masked = "g (float[N,2] x) => (float[N,2] y, bool[N,2] z) { u = Relu(x) t, z = Dropout(u) y = Relu(t) }"
    result = REMOVE.run(parse(masked), context())
    assert "another output of it is in use" in reasons(result)


def test_between_input_and_output() -> None:
    text = "g (float[N,2] x) => (float[N,2] y) { y = Identity(x) }"
    assert "graph input or a constant" in reasons(expect(text, None, REMOVE))


def test_graph_output_keeps_its_name() -> None:
    expect(
        "g (float[N,2] x) => (float[N,2] y) { t = Relu(x) y = Identity(t) }",
        "g (float[N,2] x) => (float[N,2] y) { y = Relu(x) }",
        REMOVE,
    )


def test_one_value_given_out_twice() -> None:
    text = "g (float[N,2] x) => (float[N,2] t, float[N,2] y) { t = Relu(x) y = Identity(t) }"
    assert "both graph outputs" in reasons(expect(text, None, REMOVE))


def test_transposes_become_one() -> None:
    expect(
        """g (float[2,3,4] x) => (float[4,3,2] y)
        { t = Transpose <perm: ints = [1,0,2]> (x) u = Transpose <perm: ints = [2,0,1]> (t) y = Relu(u) }""",
        "g (float[2,3,4] x) => (float[4,3,2] y) { t = Transpose <perm: ints = [2,1,0]> (x) y = Relu(t) }",
        REMOVE,
    )


def test_reshapes_become_one() -> None:
    expect(
        """g (float[N,3,4] x) => (float[A,6] y) <int64[2] p = {-1, 12}, int64[2] q = {-1, 6}>
        { t = Reshape(x, p) u = Reshape(t, q) y = Relu(u) }""",
        "g (float[N,3,4] x) => (float[A,6] y) <int64[2] q = {-1, 6}> { t = Reshape(x, q) y = Relu(t) }",
        REMOVE,
    )
    expect(
        """g (float[N,12] x) => (float[N,1,3,4] y) <int64[3] p = {-1, 3, 4}, int64[1] q = {1}>
        { t = Reshape(x, p) u = Unsqueeze(t, q) y = Relu(u) }""",
        "g (float[N,12] x) => (float[N,1,3,4] y) <int64[4] q = {-1, 1, 3, 4}> { t = Reshape(x, q) y = Relu(t) }",
        REMOVE,
    )


def test_a_reshape_that_copies_a_dimension_needs_the_one_before() -> None:
    expect(
        """g (float[N,3,4] x) => (float[A,B] y) <int64[2] p = {-1, 6}, int64[3] q = {0, 2, 3}>
        { t = Reshape(x, p) u = Reshape(t, q) y = Relu(u) }""".replace("[A,B] y", "[A,B,C] y"),
        None,
        REMOVE,
    )


def test_signed_zero() -> None:
    text = "g (float[N,2] x) => (float[N,2] y) <float k = {%s}> { t = Add(x, k) y = Relu(t) }"
    keeping = pass_class("remove-identities")(keep_signed_zero=True)
    assert not keeping.run(parse(text % "0.0"), context()).changed
    assert keeping.run(parse(text % "-0.0"), context()).changed
    assert REMOVE.run(parse(text % "0.0"), context()).changed


def test_nan_survives_the_neutral_factor() -> None:
    model = parse("g (float[2] x) => (float[2] y) <float k = {1.0}> { t = Mul(x, k) y = Neg(t) }")
    REMOVE.run(model, context())
    out = run(model, {"x": np.array([np.nan, np.inf], np.float32)})[0]
    assert np.isnan(out[0])
    assert out[1] == -np.inf


def test_resize_at_scale_one() -> None:
    text = """g (float[1,1,4,4] x) => (float[1,1,4,4] y) <float[4] k = {1.0,1.0,1.0,1.0}>
    { t = Resize <mode: string = "nearest", coordinate_transformation_mode: string = "%s"> (x, , k) y = Relu(t) }"""
    assert "even at scale 1" in reasons(REMOVE.run(parse(text % "tf_half_pixel_for_nn"), context()))
    assert REMOVE.run(parse(text % "asymmetric"), context()).changed


def test_old_opset_attributes() -> None:
    old = HEADER.replace("17", "9")
    text = (
        old
        + """g (float[N,2,3] x) => (float[N,2,3] y)
    { a = Pad <pads: ints = [0,0,0,0,0,0]> (x) b = Slice <starts: ints = [0], ends: ints = [2], axes: ints = [1]> (a)
      c = Dropout <ratio: float = 0.5> (b) y = Relu(c) }"""
    )
    expect(text, old + "g (float[N,2,3] x) => (float[N,2,3] y) { y = Relu(x) }", REMOVE)


LOGIC = "g (float[N,3] x, float[N,3] z) => (float[A,B] y) <bool t = {1}, bool f = {0}, bool[1,3] all = {1, 1, 1}> "


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("a = Neg(x) b = Where(t, a, z) y = Relu(b)", "a = Neg(x) y = Relu(a)"),
        ("a = Neg(x) b = Where(f, z, a) y = Relu(b)", "a = Neg(x) y = Relu(a)"),
        ("c = Less(x, z) a = Neg(x) b = Where(c, a, a) y = Relu(b)", "c = Less(x, z) a = Neg(x) y = Relu(a)"),
        ("c = Less(x, z) d = And(c, t) e = Or(f, d) y = Where(e, x, z)", "c = Less(x, z) y = Where(c, x, z)"),
        ("c = Less(x, z) d = Xor(c, f) e = Equal(all, d) y = Where(e, x, z)", "c = Less(x, z) y = Where(c, x, z)"),
    ],
)
def test_choices(before: str, after: str) -> None:
    # What is dead afterwards is another pass's business: the golden graph keeps it.
    model = parse(LOGIC + "{" + before + "}")
    feeds = {name: np.random.default_rng(k).standard_normal((2, 3)).astype(np.float32) for k, name in enumerate("xz")}
    reference = run(model, feeds)[0]
    assert REMOVE.run(model, context()).changed
    assert [n.op_type for n in model.graph] == [n.op_type for n in parse(LOGIC + "{" + after + "}").graph]
    np.testing.assert_array_equal(run(model, feeds)[0], reference)


def test_a_choice_that_broadcasts() -> None:
    text = LOGIC.replace("float[N,3] x", "float[1,3] x") + "{ b = Where(t, x, z) y = Relu(b) }"
    assert "larger shape" in reasons(expect(text, None, REMOVE))


def test_in_a_function() -> None:
    text = """<ir_version: 9, opset_import: ["" : 17, "local" : 1]>
    g (float[2,3] x) => (float[A,B] y) { y = local.f <way = [1, 0]> (x) }
    <domain: "local", opset_import: ["" : 17]> f <way> (v) => (w)
    { a = Neg(v) b = Neg(a) c = Identity(b) d = Transpose <perm: ints = @way> (c) e = Transpose <perm: ints = @way> (d)
      w = Relu(e) }"""
    model = parse(text)
    x = np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)
    reference = run(model, {"x": x})[0]
    assert REMOVE.run(model, context()).changed
    function = next(iter(model.functions.values()))
    assert "Identity" not in [node.op_type for node in function]
    assert [node.op_type for node in function].count("Transpose") == 2
    np.testing.assert_array_equal(run(model, {"x": x})[0], reference)


def test_dead_nodes_of_a_function() -> None:
    text = """<ir_version: 9, opset_import: ["" : 17, "local" : 1]>
    g (float[2,3] x) => (float[A,B] y) { y = local.f(x) }
    <domain: "local", opset_import: ["" : 17]> f (v) => (w) { a = Exp(v) b = Neg(a) w = Abs(v) }"""
    model = parse(text)
    assert pass_class("remove-dead-code")().run(model, context()).changed
    assert [node.op_type for node in next(iter(model.functions.values()))] == ["Abs"]


def test_equal_nodes_of_a_function() -> None:
    text = """<ir_version: 9, opset_import: ["" : 17, "local" : 1]>
    g (float[2,3] x) => (float[A,B] y) { y = local.f(x) }
    <domain: "local", opset_import: ["" : 17]> f (v) => (w) { a = Exp(v) b = Exp(v) w = Add(a, b) }"""
    model = parse(text)
    assert pass_class("merge-common-subexpressions")().run(model, context()).changed
    assert [node.op_type for node in next(iter(model.functions.values()))] == ["Exp", "Add"]
