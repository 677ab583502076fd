from __future__ import annotations

import numpy as np
import pytest
from golden import expect

from graphopt.registry import pass_class

NARROW = pass_class("narrow-scans")()
FEEDS = {name: np.random.default_rng(k).standard_normal(shape).astype(np.float32)
         for k, (name, shape) in enumerate({"s": (2,), "r": (2,), "x": (5, 2), "z": (5, 2)}.items())}  # fmt: skip


def scan(heads: str, operands: str, taken: int, inside: str, outside: str, nodes: str, last: str) -> str:
    """A Scan over x and z with states s and r; `inside` and `outside` are inputs and outputs of its body."""
    return f"""g (float[2] s, float[2] r, float[5,2] x, float[5,2] z) => (float[A,B] y) {{
      {heads} = Scan <num_scan_inputs = {taken}, body = step ({inside}) => ({outside}) {{ {nodes} }}> ({operands})
      {last} }}"""


INSIDE = {"a": "float[2] a", "b": "float[2] b", "u": "float[2] u", "v": "float[2] v"}
OUTSIDE = {"c": "float[2] c", "d": "float[2] d", "o": "float[2] o", "q": "float[2] q"}


def some(of: dict[str, str], names: str) -> str:
    return ", ".join(of[name] for name in names)


FULL = scan("p, t, k, l", "s, r, x, z", 2, some(INSIDE, "abuv"), some(OUTSIDE, "cdoq"), "{}", "{}")


@pytest.mark.parametrize(
    ("nodes", "last", "after"),
    [
        # The scanned output q goes; the node that makes it is dead then.
        ("c = Add(a, u) d = Add(b, v) o = Mul(c, d) q = Neg(o)", "w = Add(p, t) y = Add(k, w)",
         scan("p, t, k", "s, r, x, z", 2, some(INSIDE, "abuv"), some(OUTSIDE, "cdo"),
              "c = Add(a, u) d = Add(b, v) o = Mul(c, d) q = Neg(o)", "w = Add(p, t) y = Add(k, w)")),
        # So does the state b, which only its own next value reads, and the input v, which only that read.
        ("c = Add(a, u) e = Mul(b, v) d = Tanh(e) o = Neg(c) q = Abs(o)", "w = Add(l, p) y = Add(k, w)",
         scan("p, k, l", "s, x", 1, some(INSIDE, "au"), some(OUTSIDE, "coq"),
              "c = Add(a, u) o = Neg(c) q = Abs(o)", "w = Add(l, p) y = Add(k, w)")),
        # A state of which nothing is read, with a next value of its own.
        ("c = Add(a, u) d = Neg(c) o = Add(c, v) q = Abs(o)", "w = Add(l, p) y = Add(k, w)",
         scan("p, k, l", "s, x, z", 2, some(INSIDE, "auv"), some(OUTSIDE, "coq"),
              "c = Add(a, u) d = Neg(c) o = Add(c, v) q = Abs(o)", "w = Add(l, p) y = Add(k, w)")),
    ],
)  # fmt: skip
def test_what_nobody_needs(nodes: str, last: str, after: str) -> None:
    given = FULL.replace("{ {} }", f"{{ {nodes} }}").replace("      {} }", f"      {last} }}")
    expect(given, after, NARROW, feeds=FEEDS)


@pytest.mark.parametrize(
    ("nodes", "last"),
    [
        ("c = Add(a, b) d = Add(b, v) o = Mul(c, u) q = Neg(o)", "w = Add(p, l) y = Add(k, w)"),
        ("c = Add(a, u) d = Add(b, v) o = Mul(c, u) q = Neg(d)", "w = Add(p, l) y = Add(k, w)"),
    ],
)
def test_what_is_needed(nodes: str, last: str) -> None:
    given = FULL.replace("{ {} }", f"{{ {nodes} }}").replace("      {} }", f"      {last} }}")
    expect(given, None, NARROW, feeds=FEEDS)
