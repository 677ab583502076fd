"""Softmax in every spelling, and formulas that nearly are one."""

from __future__ import annotations

import numpy as np
import pytest
from golden import context, expect, parse, random_feeds, reasons, run

from graphopt.registry import pass_class

RECOGNISE = pass_class("recognise-softmax")()
FAST = pass_class("recognise-softmax")(fast_math=True)


def text(body: str, opset: int = 18) -> str:
    return f"""<ir_version: 8, opset_import: ["" : {opset}]>
        g (float[N,3,4] x) => (float[N,3,4] y) <int64[1] last = {{-1}}, int64[1] middle = {{1}}> {{ {body} }}"""


EXP = "m = ReduceMax (x, last) d = Sub (x, m) e = Exp (d) s = ReduceSum (e, last)"
SPELLINGS = [
    (f"{EXP} y = Div (e, s)", "y = Softmax <axis: int = -1> (x)"),
    (f"{EXP} r = Reciprocal (s) y = Mul (r, e)", "y = Softmax <axis: int = -1> (x)"),
    (f"{EXP} y = Div (e, s)".replace("last", "middle"), "y = Softmax <axis: int = 1> (x)"),
    (f"{EXP} l = Log (s) y = Sub (d, l)", "y = LogSoftmax <axis: int = -1> (x)"),
    (f"{EXP} l = Log (s) o = Add (m, l) y = Sub (x, o)", "y = LogSoftmax <axis: int = -1> (x)"),
]
UNSHIFTED = [
    ("e = Exp (x) s = ReduceSum (e, last) y = Div (e, s)", "y = Softmax <axis: int = -1> (x)"),
    ("e = Exp (x) s = ReduceSum (e, last) l = Log (s) y = Sub (x, l)", "y = LogSoftmax <axis: int = -1> (x)"),
    ("p = Softmax <axis: int = 1> (x) y = Log (p)", "y = LogSoftmax <axis: int = 1> (x)"),
    ("p = Softmax (x) y = Log (p)", "y = LogSoftmax (x)"),
]


@pytest.mark.parametrize(("before", "after"), SPELLINGS)
def test_every_spelling(before: str, after: str) -> None:
    expect(text(before), text(after), RECOGNISE)


@pytest.mark.parametrize(("before", "after"), UNSHIFTED)
def test_what_overflows_needs_fast_math(before: str, after: str) -> None:
    assert "fast_math=true allows it" in reasons(expect(text(before), None, RECOGNISE))
    expect(text(before), text(after), FAST)


def test_before_opset_13() -> None:
    body = "m = ReduceMax <axes: ints = [AXIS]> (x) d = Sub (x, m) e = Exp (d) s = ReduceSum <axes: ints = [AXIS]> (e)"
    body += " y = Div (e, s)"
    expect(text(body.replace("AXIS", "2"), 11), text("y = Softmax <axis: int = -1> (x)", 11), RECOGNISE)
    expect(text(body.replace("AXIS", "1"), 11), None, RECOGNISE)


NEARLY = {
    "maximum over another axis": f"{EXP} y = Div (e, s)".replace("ReduceMax (x, last)", "ReduceMax (x, middle)"),
    "minimum": f"{EXP} y = Div (e, s)".replace("ReduceMax", "ReduceMin"),
    "mean": f"{EXP} y = Div (e, s)".replace("ReduceSum", "ReduceMean"),
    "sum over another tensor": f"{EXP} o = Abs (e) t = ReduceSum (o, last) y = Div (e, t)",
    "upside down": f"{EXP} y = Div (s, e)",
}


@pytest.mark.parametrize("name", NEARLY)
def test_nearly(name: str) -> None:
    body = text(NEARLY[name])
    expect(body.replace("float[N,3,4] y", "float[N,A,B] y"), None, RECOGNISE)


def test_masked_rows_stay_what_they_were() -> None:
    model = parse(text(SPELLINGS[0][0]))
    feeds = random_feeds(model)
    feeds["x"][0, 0] = -np.inf
    feeds["x"][0, 1, 2:] = -np.inf
    feeds["x"][1, 0, 0] = np.inf
    reference = run(model, feeds)
    assert RECOGNISE.run(model, context()).changed
    np.testing.assert_allclose(run(model, feeds)[0], reference[0], rtol=1e-6)
