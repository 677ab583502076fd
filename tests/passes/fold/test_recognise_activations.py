"""Activations in every spelling, and formulas that nearly are one."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
from golden import assert_close, context, expect, parse, random_feeds, reasons, run

from graphopt.registry import pass_class

RECOGNISE = pass_class("recognise-activations")(slow=True)
CONSTANTS = """float half = {0.5}, float one = {1.0}, float two = {2.0}, float three = {3.0}, float six = {6.0},
    float zero = {0.0}, float root = {1.4142135}, float unroot = {0.70710677}, float cubic = {0.044715},
    float slope = {0.7978846}, float sixth = {0.16666667}, float k = {0.1}, float b = {-0.1}, float[1] k1 = {0.1},
    float fifth = {0.2}, float[3] slopes = {0.1, 0.2, 0.3}, float alpha = {1.6732632}, float gamma = {1.0507010},
    float cs = {0.035677407}, float minus = {-1.0}"""


def text(body: str, opset: int = 24) -> str:
    """A model of [N,2,3] from `x` to `y`."""
    return f"""<ir_version: 10, opset_import: ["" : {opset}]>
        g (float[N,2,3] x) => (float[N,2,3] y) <{CONSTANTS}> {{ {body} }}"""


def as_half(model: str) -> str:
    """The model in float16, whose constants the text format takes as integers."""

    def bits(match: re.Match[str]) -> str:
        numbers = np.array([float(number) for number in match[3].split(",")], np.float16).view(np.uint16)
        return f"float16{match[1] or ''} {match[2]} = {{{', '.join(map(str, numbers))}}}"

    return re.sub(r"\bfloat\[N", "float16[N", re.sub(r"\bfloat(\[\d\])? (\w+) = \{([^}]*)\}", bits, model))


GELU = [
    "a = Div (x, root) e = Erf (a) c = Add (e, one) p = Mul (x, c) y = Mul (p, half)",
    "a = Mul (unroot, x) e = Erf (a) c = Add (one, e) p = Mul (half, x) y = Mul (c, p)",
    "a = Mul (x, unroot) e = Erf (a) c = Add (e, one) p = Mul (half, c) y = Mul (x, p)",
    "a = Div (x, root) e = Erf (a) c = Add (e, one) p = Div (c, two) y = Mul (x, p)",
    "a = Div (x, root) e = Erf (a) h = Mul (e, half) c = Add (h, half) y = Mul (x, c)",
    "a = Div (x, root) e = Erf (a) h = Mul (x, half) p = Mul (h, e) y = Add (h, p)",
]
CUBE = ["q = Pow (x, three)", "o = Mul (x, x) q = Mul (o, x)", "o = Pow (x, two) q = Mul (x, o)"]
INNER = ["r = Mul (q, cubic) i = Add (x, r) e = Mul (i, slope)", "r = Mul (cubic, q) i = Add (r, x) e = Mul (slope, i)"]
TANH = [
    f"{INNER[0]} t = Tanh (e) c = Add (t, one) p = Mul (x, c) y = Mul (p, half)",
    f"{INNER[1]} t = Tanh (e) c = Add (one, t) p = Mul (half, x) y = Mul (p, c)",
    f"{INNER[1]} t = Tanh (e) h = Mul (t, half) c = Add (h, half) y = Mul (x, c)",
]
SQUARED = [
    "o = Mul (x, x) r = Mul (o, cubic) i = Add (r, one) s = Mul (x, slope) e = Mul (s, i) t = Tanh (e)",
    "o = Mul (x, x) r = Mul (o, cs) i = Add (r, slope) e = Mul (x, i) t = Tanh (e)",
]
FOUND = {
    "y = Gelu <approximate = \"none\"> (x)": GELU,
    "y = Gelu <approximate = \"tanh\"> (x)": [
        *(f"{cube} {rest}" for cube, rest in itertools.product(CUBE, TANH)),
        *(f"{squared} c = Add (t, one) p = Mul (x, c) y = Mul (p, half)" for squared in SQUARED),
    ],
    "y = Swish <alpha: float = 1.0> (x)": [
        "s = Sigmoid (x) y = Mul (s, x)",
        "n = Neg (x) e = Exp (n) d = Add (e, one) y = Div (x, d)",
        "n = Mul (x, minus) e = Exp (n) d = Add (one, e) r = Reciprocal (d) y = Mul (r, x)",
    ],
    "y = Sigmoid (x)": ["n = Neg (x) e = Exp (n) d = Add (e, one) y = Div (one, d)"],
    "y = HardSwish (x)": [
        "a = Add (x, three) c = Clip (a, zero, six) p = Mul (x, c) y = Div (p, six)",
        "a = Add (three, x) c = Clip (a, zero, six) p = Div (c, six) y = Mul (p, x)",
        "a = Add (x, three) r = Relu (a) c = Min (r, six) p = Mul (x, sixth) y = Mul (p, c)",
        "a = Add (x, three) r = Max (zero, a) c = Min (six, r) p = Mul (c, x) y = Mul (p, sixth)",
        "a = Add (x, three) r = Min (a, six) c = Relu (r) p = Mul (c, x) y = Mul (p, sixth)",
        "h = HardSigmoid <alpha: float = 0.16666667, beta: float = 0.5> (x) y = Mul (h, x)",
        "a = Div (x, six) h = Add (a, half) c = Clip (h, zero, one) y = Mul (x, c)",
    ],
    "y = HardSigmoid <alpha: float = 0.16666667, beta: float = 0.5> (x)": [
        "a = Add (x, three) c = Clip (a, zero, six) y = Div (c, six)",
        "a = Add (three, x) r = Relu (a) c = Min (r, six) y = Mul (sixth, c)",
    ],
    "y = HardSigmoid <alpha: float = 0.2, beta: float = 0.5> (x)": [
        "a = Mul (x, fifth) h = Add (a, half) y = Clip (h, zero, one)",
        "a = Mul (x, fifth) h = Add (a, half) m = Max (h, zero) y = Min (m, one)",
    ],
    "y = Mish (x)": [
        "s = Softplus (x) t = Tanh (s) y = Mul (x, t)",
        "e = Exp (x) o = Add (one, e) s = Log (o) t = Tanh (s) y = Mul (t, x)",
    ],
    "y = LeakyRelu <alpha: float = 0.1> (x)": [
        "a = Mul (x, k) y = Max (x, a)",
        "a = Mul (k1, x) y = Max (a, x)",
        "a = Mul (x, k) c = Greater (x, zero) y = Where (c, x, a)",
        "a = Mul (x, k) c = Less (x, zero) y = Where (c, a, x)",
        "r = Relu (x) n = Neg (x) m = Relu (n) a = Mul (m, k) y = Sub (r, a)",
        "r = Relu (x) n = Neg (x) m = Relu (n) a = Mul (m, b) y = Add (r, a)",
        "r = Relu (x) m = Min (x, zero) a = Mul (m, k) y = Add (a, r)",
    ],
    "y = PRelu (x, slopes)": [
        "a = Mul (x, slopes) c = GreaterOrEqual (x, zero) y = Where (c, x, a)",
        "r = Relu (x) n = Neg (x) m = Relu (n) a = Mul (slopes, m) y = Sub (r, a)",
    ],
    "y = Elu <alpha: float = 1.0> (x)": [
        "e = Exp (x) a = Sub (e, one) c = Greater (x, zero) y = Where (c, x, a)",
        "r = Relu (x) m = Min (x, zero) e = Exp (m) a = Sub (e, one) y = Add (r, a)",
        "r = Relu (x) n = Neg (x) q = Relu (n) m = Neg (q) e = Exp (m) a = Sub (e, one) y = Add (r, a)",
    ],
    "y = Elu <alpha: float = 0.1> (x)": [
        "e = Exp (x) a = Sub (e, one) z = Mul (a, k) c = Greater (x, zero) y = Where (c, x, z)",
    ],
    "y = Selu <alpha: float = 1.6732632, gamma: float = 1.050701> (x)": [
        "e = Elu <alpha: float = 1.6732632> (x) y = Mul (e, gamma)",
    ],
    "y = Clip (x, zero, six)": [
        "m = Max (x, zero) y = Min (m, six)",
        "m = Min (six, x) y = Max (zero, m)",
        "m = Relu (x) y = Min (m, six)",
        "m = Min (x, six) y = Relu (m)",
    ],
    "y = Relu (x)": ["y = Max (zero, x)"],
}  # fmt: skip
SPELLINGS = [(before, after) for after, spellings in FOUND.items() for before in spellings]


@pytest.mark.parametrize(("before", "after"), SPELLINGS)
def test_every_spelling(before: str, after: str) -> None:
    model, wanted = parse(text(before)), parse(text(after))
    feeds = random_feeds(model)
    feeds["x"] = feeds["x"] * 4
    reference = run(model, feeds)
    assert RECOGNISE.run(model, context()).changed
    (got,), (node,) = ([n for n in m.graph if n.op_type != "Constant"] for m in (model, wanted))
    assert got.op_type == node.op_type
    assert got.outputs[0].name == "y"
    assert {name: pytest.approx(a.value) for name, a in node.attributes.items()} == {
        name: a.value for name, a in got.attributes.items()
    }
    assert_close(run(model, feeds), reference, 2e-6)


def test_constants_that_nobody_reads_any_more_go() -> None:
    model = parse(text(GELU[0]))
    before = len(model.graph.initializers)
    RECOGNISE.run(model, context())
    assert len(model.graph.initializers) == before - 3


NEARLY = {
    "another root": GELU[0].replace("root", "two"),
    "no half": "a = Div (x, root) e = Erf (a) c = Add (e, one) y = Mul (x, c)",
    "minus one": GELU[0].replace("Add (e, one)", "Sub (e, one)"),
    "gate of another tensor": "z = Cos (x) " + GELU[0].replace("Div (x,", "Div (z,"),
    "another cubic": f"{CUBE[0]} {TANH[0]}".replace("Mul (q, cubic)", "Mul (q, k)"),
    "a square instead of a cube": f"q = Pow (x, two) {TANH[0]}",
    "five instead of six": "a = Add (x, three) c = Clip (a, zero, three) p = Mul (x, c) y = Div (p, six)",
    "shifted by two": "a = Add (x, two) c = Clip (a, zero, six) p = Mul (x, c) y = Div (p, six)",
    "clipped from one": "a = Add (x, three) c = Clip (a, one, six) p = Mul (x, c) y = Div (p, six)",
    "divisor above": "n = Neg (x) e = Exp (n) d = Add (e, two) y = Div (x, d)",
    "not negated": "e = Exp (x) d = Add (e, one) y = Div (one, d)",
    "quick gelu": "a = Mul (x, k) s = Sigmoid (a) y = Mul (x, s)",
    "a slope above one": "a = Mul (x, two) y = Max (x, a)",
    "the wrong side": "a = Mul (x, k) c = Less (x, zero) y = Where (c, x, a)",
    "compared with one": "a = Mul (x, k) c = Greater (x, one) y = Where (c, x, a)",
    "exp of another": "w = Cos (x) e = Exp (w) a = Sub (e, one) c = Greater (x, zero) y = Where (c, x, a)",
    "crossed bounds": "m = Max (x, six) y = Min (m, zero)",
    "max of two tensors": "m = Cos (x) y = Max (m, x)",
    "minus the upper half": "r = Relu (x) m = Relu (x) a = Mul (m, k) y = Sub (r, a)",
}  # fmt: skip


@pytest.mark.parametrize("name", NEARLY)
def test_nearly(name: str) -> None:
    expect(text(NEARLY[name]), None, RECOGNISE)


@pytest.mark.parametrize("inner", ["a", "e", "c", "p"])
def test_what_is_read_elsewhere_stays(inner: str) -> None:
    body = text(f"{GELU[0]} z = Cos ({inner})").replace("(float[N,2,3] y)", "(float[N,2,3] y, float[N,2,3] z)")
    result = expect(body, None, RECOGNISE)
    assert "Gelu: something else reads what is inside" in reasons(result)


def test_an_output_stays() -> None:
    body = text(GELU[0]).replace("(float[N,2,3] y)", "(float[N,2,3] y, float[N,2,3] e)")
    assert "something else reads" in reasons(expect(body, None, RECOGNISE))


def test_the_opset_is_told() -> None:
    assert "Gelu: opset 17 does not have it (since 20)" in reasons(expect(text(GELU[0], 17), None, RECOGNISE))


def test_what_the_target_runs_slower_stays() -> None:
    body = text("e = Exp (x) a = Sub (e, one) c = Greater (x, zero) y = Where (c, x, a)")
    result = expect(body, None, pass_class("recognise-activations")())
    assert "Elu: cpu runs it slower than its parts" in reasons(result)


def test_overflow_needs_fast_math() -> None:
    body = text("e = Exp (x) o = Add (e, one) y = Log (o)")
    assert "Softplus stays finite" in reasons(expect(body, None, RECOGNISE))
    expect(body, text("y = Softplus (x)"), pass_class("recognise-activations")(slow=True, fast_math=True))


def test_constants_with_more_axes_than_the_input() -> None:
    body = """<ir_version: 8, opset_import: ["" : 17]> g (float[3] x) => (float[1,3] y) <float[1,1] k = {0.1}>
        { a = Mul (x, k) y = Max (x, a) }"""
    assert "more axes" in reasons(expect(body, None, RECOGNISE))


def test_double_keeps_its_digits() -> None:
    body = """<ir_version: 8, opset_import: ["" : 17]> g (double[3] x) => (double[3] y) <double k = {0.1}>
        { a = Mul (x, k) y = Max (x, a) }"""
    assert "digits of float32" in reasons(expect(body, None, RECOGNISE))


def test_types_that_the_operator_lacks() -> None:
    body = """<ir_version: 10, opset_import: ["" : 14]> g (bfloat16[3] x) => (bfloat16[3] y) <bfloat16 k = {15872}>
        { a = Mul (x, k) y = Max (x, a) }"""
    assert "does not have it in bfloat16" in reasons(expect(body, None, RECOGNISE, runnable=False))


@pytest.mark.parametrize("body", [GELU[0], FOUND["y = HardSwish (x)"][0]])
def test_float16(body: str) -> None:
    model = parse(as_half(text(body)))
    feeds = random_feeds(model)
    reference = run(model, feeds)
    assert RECOGNISE.run(model, context()).changed
    assert len(model.graph) == 1
    assert_close(run(model, feeds), reference, 4e-3)


SPECIAL = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e30], np.float32).reshape(1, 2, 3)


@pytest.mark.parametrize(("before", "after"), [s for s in SPELLINGS if "Pow" not in s[0]])
def test_nan_and_infinities_stay(before: str, after: str) -> None:
    model = parse(text(before))
    reference = run(model, {"x": SPECIAL})
    RECOGNISE.run(model, context())
    np.testing.assert_allclose(run(model, {"x": SPECIAL})[0], reference[0], rtol=1e-5)


def test_in_bodies_and_functions() -> None:
    gelu = GELU[0].replace("(x,", "(h,").replace("y =", "z =")
    body = f"""<ir_version: 10, opset_import: ["" : 20]>
        g (float[2] x, bool flag) => (float[2] y) <{CONSTANTS}> {{
            h = Neg (x)
            y = If (flag) <then_branch = t () => (float[2] z) {{ {gelu} }},
                           else_branch = f () => (float[2] z) {{ z = Identity (h) }}> }}"""
    after = body.replace(gelu, 'z = Gelu <approximate = "none"> (h)')
    feeds = {"x": np.array([1, -2], np.float32), "flag": np.array(True)}
    expect(body, after, RECOGNISE, feeds=feeds)


def test_in_functions() -> None:
    hard_swish = """three = Constant <value_float: float = 3.0> () six = Constant <value_float: float = 6.0> ()
        zero = Constant <value_float: float = 0.0> ()
        a = Add (x, three) c = Clip (a, zero, six) p = Mul (x, c) y = Div (p, six)"""
    model = parse(f"""<ir_version: 9, opset_import: ["" : 17, "local" : 1]>
        g (float[2] x) => (float[2] y) {{ y = local.act (x) }}
        <domain: "local", opset_import: ["" : 17]> act (x) => (y) {{ {hard_swish} }}""")
    feeds = random_feeds(model)
    reference = run(model, feeds)
    assert RECOGNISE.run(model, context()).changed
    (function,) = model.functions.values()
    assert [node.op_type for node in function if node.op_type != "Constant"] == ["HardSwish"]
    assert_close(run(model, feeds), reference)
