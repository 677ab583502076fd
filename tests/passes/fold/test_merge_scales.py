from __future__ import annotations

import pytest
from golden import expect, reasons

from graphopt.registry import pass_class

MERGE = pass_class("merge-scales")()
HEAD = "g (float[N,3] x) => (float[N,3] y) "
GIVEN = "<float a = {2.0}, float b = {8.0}, float[3] v = {1.0, 2.0, 4.0}, float[3,1] w = {1.0, 2.0, 4.0}> "


@pytest.mark.parametrize(
    ("before", "constant", "after"),
    [
        ("t = Mul(x, a) y = Mul(v, t)", "float[3] k = {2.0, 4.0, 8.0}", "y = Mul(x, k)"),
        ("t = Mul(a, x) y = Div(t, b)", "float k = {0.25}", "y = Mul(x, k)"),
        ("t = Div(x, a) y = Mul(t, b)", "float k = {0.25}", "y = Div(x, k)"),
        ("t = Div(x, a) y = Div(t, b)", "float k = {16.0}", "y = Div(x, k)"),
        ("t = Add(x, a) u = Sub(t, b) y = Add(v, u)", "float[3] k = {-5.0, -4.0, -2.0}", "y = Add(x, k)"),
        ("t = Sub(x, a) y = Add(t, b)", "float k = {-6.0}", "y = Sub(x, k)"),
    ],
)
def test_golden(before: str, constant: str, after: str) -> None:
    expect(HEAD + GIVEN + "{" + before + "}", HEAD + f"<{constant}> " + "{" + after + "}", MERGE)


@pytest.mark.parametrize(
    ("before", "reason"),
    [
        ("t = Mul(x, z) y = Mul(t, a)", "a factor is zero"),
        ("t = Mul(x, s) y = Mul(t, s)", "leaves the range"),
        ("t = Mul(x, a) u = Mul(t, b) y = Add(t, u)", "also read elsewhere"),
        ("t = Mul(x, v) u = Mul(t, b) y = Mul(u, v)", "a constant of it is also read"),
        ("t = Sub(a, x) y = Add(t, b)", ""),
        ("t = Mul(x, a) y = Add(t, b)", ""),
    ],
)
def test_kept(before: str, reason: str) -> None:
    given = GIVEN.replace("> ", ", float z = {0.0}, float s = {0.000000000000000000000000000001}> ")
    assert reason in reasons(expect(HEAD + given + "{" + before + "}", None, MERGE))


def test_a_larger_constant_is_not_made() -> None:
    text = "g (float[3,3] x) => (float[3,3] y) " + GIVEN + "{ t = Mul(x, v) y = Mul(t, w) }"
    assert "would be larger" in reasons(expect(text, None, MERGE))


def test_a_table_that_is_there_twice_stays() -> None:
    """One of the two can be read by both, which saves more than the node."""
    table = "float[N] {} = {{" + ", ".join(str(float(k + 1)) for k in range(64)) + "}}"
    tables = ", ".join(table.replace("N", "64").format(name) for name in ("p", "q")).replace("}}", "}")
    head = f"g (float[2,64] x) => (float[2,64] y) <float a = {{2.0}}, {tables}>"
    text = f"{head} {{ t = Mul(x, a) u = Mul(t, p) y = Div(u, q) }}"
    assert "a second time" in reasons(expect(text, None, MERGE))
