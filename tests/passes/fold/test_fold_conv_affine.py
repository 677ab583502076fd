from __future__ import annotations

import numpy as np
import pytest
from golden import assert_close, context, expect, parse, random_feeds, reasons, run

from graphopt.registry import pass_class

FOLD = pass_class("fold-conv-affine")()

CHAIN = """g (float[N,1,3,3] x) => (float[N,2,3,3] y) <float[2,1,1,1] w = {{1.0, 2.0}}, float[2] b = {{1.0,
    1.0}}, {k}>
{{ t = Conv(x, w, b) {rest} }}"""
FOLDED = """g (float[N,1,3,3] x) => (float[N,2,3,3] y) <float[2,1,1,1] w = {{{w}}}, float[2] b = {{{b}}}>
{{ y = Conv(x, w, b) }}"""


@pytest.mark.parametrize(
    ("k", "rest", "w", "b"),
    [
        ("float[2,1,1] k = {3.0, 5.0}", "y = Mul(t, k)", "3.0, 10.0", "3.0, 5.0"),
        ("float[1,2,1,1] k = {3.0, 5.0}", "y = Mul(k, t)", "3.0, 10.0", "3.0, 5.0"),
        ("float k = {4.0}", "y = Div(t, k)", "0.25, 0.5", "0.25, 0.25"),
        ("float[1] k = {4.0}", "y = Add(k, t)", "1.0, 2.0", "5.0, 5.0"),
        ("float[2,1,1] k = {3.0, 5.0}", "y = Sub(t, k)", "1.0, 2.0", "-2.0, -4.0"),
        ("float[2,1,1] k = {3.0, 5.0}", "y = Sub(k, t)", "-1.0, -2.0", "2.0, 4.0"),
        ("float[2,1,1] k = {3.0, 5.0}", "u = Mul(t, k) y = Add(u, k)", "3.0, 10.0", "6.0, 10.0"),
    ],
)
def test_after_conv(k: str, rest: str, w: str, b: str) -> None:
    expect(CHAIN.format(k=k, rest=rest), FOLDED.format(w=w, b=b), FOLD)


@pytest.mark.parametrize(
    ("k", "rest", "reason"),
    [
        ("float[3] k = {1.0, 2.0, 3.0}", "y = Mul(t, k)", "not one number per output channel"),
        ("float k = {0.0}", "y = Div(t, k)", "divides by zero"),
        ("float k = {2.0}", "y = Div(k, t)", "not affine"),
    ],
)
def test_does_not_fire(k: str, rest: str, reason: str) -> None:
    assert reason in reasons(expect(CHAIN.format(k=k, rest=rest), None, FOLD, runnable="0.0" not in k))


def test_not_when_the_constant_enlarges_the_tensor() -> None:
    expect(
        """g (float[N,1,3,3] x) => (float[N,2,3,3] y) <float[1,1,1,1] w = {2.0}, float[2,1,1] k = {3.0, 5.0}>
        { t = Conv(x, w) y = Mul(t, k) }""",
        None,
        FOLD,
    )
    expect(
        """g (float[N,1,3,3] x) => (float[2,N,1,3,3] y) <float[1,1,1,1] w = {2.0}, float[2,1,1,1,1] k = {3.0, 5.0}>
        { t = Conv(x, w) y = Mul(t, k) }""",
        None,
        FOLD,
    )


def test_not_when_another_reader_sees_the_tensor() -> None:
    text = CHAIN.format(k="float k = {4.0}", rest="y = Mul(t, k) z = Relu(t)").replace(
        " y) <", " y, float[N,2,3,3] z) <"
    )
    assert "the tensor between is read by others" in reasons(expect(text, None, FOLD))


def test_input_scaling_folds_into_a_padded_convolution_but_a_shift_does_not() -> None:
    text = """g (float[N,2,4,4] x) => (float[N,1,4,4] y) <float[1,2,3,3] w = {%s}, float[2,1,1] k = {3.0, 5.0}>
    { t = %s(x, k) y = Conv <pads: ints = [1,1,1,1]> (t, w) }"""
    weights = ", ".join(f"{i}.0" for i in range(18))
    model = parse(text % (weights, "Mul"))
    feeds = random_feeds(model)
    reference = run(model, feeds)
    assert FOLD.run(model, context()).changed
    assert [n.op_type for n in model.graph] == ["Conv"]
    assert_close(run(model, feeds), reference)
    assert "zero-padded" in reasons(expect(text % (weights, "Sub"), None, FOLD))


def test_a_gray_image_broadcast_to_colours_is_left() -> None:
    text = """g (float[N,1,4,4] x) => (float[N,1,4,4] y) <float[1,3,1,1] w = {1.0, 2.0, 3.0},
    float[3,1,1] k = {3.0, 5.0, 7.0}>
    { t = Mul(x, k) y = Conv(t, w) }"""
    assert "may broadcast it" in reasons(expect(text, None, FOLD))


def test_scale_of_a_projection() -> None:
    expect(
        """g (float[N,3,2] x) => (float[N,3,2] y) <float[2,2] w = {1.0,2.0,3.0,4.0}, float[2] b = {1.0,2.0},
        float k = {2.0}>
        { t = MatMul(x, w) u = Add(t, b) y = Mul(u, k) }""",
        """g (float[N,3,2] x) => (float[N,3,2] y) <float[2,2] w = {2.0,4.0,6.0,8.0}, float[2] b = {2.0,4.0}>
        { t = MatMul(x, w) y = Add(t, b) }""",
        FOLD,
    )


def test_the_bias_of_a_projection_is_no_near_miss() -> None:
    result = expect(
        """g (float[N,3,2] x) => (float[N,3,2] y) <float[2,2] w = {1.0,2.0,3.0,4.0}, float[2] b = {1.0,2.0}>
        { t = MatMul(x, w) y = Add(t, b) }""",
        None,
        FOLD,
    )
    assert not result.skipped


def test_attention_scale_is_no_near_miss() -> None:
    result = expect(
        """g (float[N,3,2] x, float[N,2,3] z) => (float[N,3,3] y) <float k = {2.0}> { t = MatMul(x,
        z) y = Mul(t, k) }""",
        None,
        FOLD,
    )
    assert not result.skipped


def test_float64_rounds_once() -> None:
    # 0.1 * 3 * 7 in float32, factor by factor, is another number than the rounded product.
    text = CHAIN.format(
        k="float k = {0.1}, float l = {3.0}, float m = {7.0}", rest="p = Mul(t, k) q = Mul(p, l) y = Mul(q, m)"
    )
    model = parse(text)
    FOLD.run(model, context())
    w = model.graph.initializers["w"].const_value
    assert w is not None
    np.testing.assert_allclose(w.numpy().ravel(), np.float32([2.1, 4.2]), rtol=3e-7)


def test_in_a_model_local_function_whose_weights_are_constant_nodes() -> None:
    model = parse("""<ir_version: 10, opset_import: ["" : 17, "l": 1]>
    g (float[N,2] x) => (float[N,2] y) { y = l.f(x) }
    <domain: "l", opset_import: ["": 17]> f (a) => (b) { w = Constant <value = float[2,2] {1.0,2.0,3.0,4.0}> ()
      c = Constant <value = float[2] {1.0,2.0}> () t = Gemm(a, w)
      k = Constant <value = float {2.0}> () u = Mul(t, k) b = Add(u, c) }""")
    feeds = random_feeds(model)
    reference = run(model, feeds)
    assert FOLD.run(model, context()).changed
    (function,) = model.functions.values()
    assert sorted(node.op_type for node in function) == ["Constant", "Constant", "Gemm"]
    assert not function.graph.initializers
    assert_close(run(model, feeds), reference)
