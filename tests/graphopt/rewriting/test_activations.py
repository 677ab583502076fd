"""Which factors end a pattern that runtimes fuse."""

from __future__ import annotations

import pytest
from golden import parse

from graphopt.rewriting.activations import fused_pattern

CONSTANTS = """<float half = {0.5}, float one = {1.0}, float three = {3.0}, float six = {6.0}, float zero = {0.0},
    float root = {1.41421356}, float cubic = {0.044715}, float slope = {0.79788456}, float beta = {1.702},
    float[1] single = {0.5}, float[4] vector = {1.0, 2.0, 3.0, 4.0}, int64[1] last = {-1}, float eps = {0.00001}>"""
ERF = "a = Div (x, root) b = Erf (a) c = Add (b, one)"
TANH = (
    "a = Mul (x, x) b = Mul (a, x) c3 = Mul (b, cubic) d = Add (x, c3) e = Mul (d, slope) f = Tanh (e) c = Add (f, one)"
)
CLIP = "a = Add (x, three) c = Clip (a, zero, six)"
NORM = """m = ReduceMean <axes: ints = [-1]> (x) d = Sub (x, m) s = Mul (d, d) v = ReduceMean <axes: ints = [-1]> (s)
    w = Add (v, eps) q = Sqrt (w)"""
RMS = "s = Mul (x, x) v = ReduceMean <axes: ints = [-1]> (s) w = Add (v, eps) q = Sqrt (w) r = Div (one, q)"


@pytest.mark.parametrize(
    ("body", "pattern"),
    [
        (f"{ERF} p = Mul (x, c) y = Mul (p, half)", "Gelu"),
        (f"{ERF} p = Mul (c, x) y = Mul (half, p)", "Gelu"),
        (f"{ERF} p = Mul (x, c) y = Mul (p, single)", "Gelu"),
        (f"{TANH} p = Mul (x, c) y = Mul (p, half)", "Gelu"),
        ("a = Mul (x, beta) b = Sigmoid (a) p = Mul (x, b) y = Mul (p, half)", "Swish"),
        (f"{NORM} p = Div (d, q) y = Mul (p, vector)", "normalisation"),
        (f"{NORM} p = Div (d, q) g = Mul (vector, p) y = Add (g, vector)", "normalisation"),
        (f"{RMS} p = Mul (x, r) y = Mul (p, vector)", "normalisation"),
        # One number for each channel behind an activation is a layer's own.
        (f"{ERF} p = Mul (x, c) y = Mul (p, vector)", None),
        (f"{ERF} p = Mul (x, c) h = Mul (p, half) y = Mul (h, vector)", None),
        (f"{ERF} p = Mul (x, c) h = Mul (p, half) y = Mul (h, six)", None),
        (f"{ERF} p = Mul (x, c) y = Add (p, half)", None),
        (f"{CLIP} p = Mul (x, c) y = Div (p, six)", None),
        # Nothing bends, or the two tensors are different ones.
        ("p = Mul (x, x) y = Mul (p, half)", None),
        ("c = Add (x, one) p = Mul (x, c) y = Mul (p, half)", None),
        ("a, b = Split <axis = 1> (x, two) g = Sigmoid (b) p = Mul (a, g) y = Mul (p, half)", None),
        ("m = GlobalAveragePool (x) g = Sigmoid (m) p = Mul (x, g) y = Mul (p, half)", None),
        ("y = LayerNormalization (x, vector) z = Mul (y, vector)", None),
        ("y = Mul (x, half)", None),
    ],
)
def test_pattern(body: str, pattern: str | None) -> None:
    pool = "GlobalAveragePool" in body
    constants = CONSTANTS.replace("float eps", "int64[2] two = {2, 2}, float eps") if "two" in body else CONSTANTS
    last = "z" if " z = " in body else "y"
    model = parse(f"g ({'float[N,4,4]' if pool else 'float[N,4]'} x) => (float {last}) {constants} {{ {body} }}")
    assert fused_pattern(model.graph.node(len(model.graph) - 1)) == pattern


def test_long_chains_end() -> None:
    """Work is bounded: what is further away than any activation is long is not looked for."""
    steps = " ".join(f"t{k + 1} = Add (t{k}, one)" for k in range(60))
    body = f"t0 = Erf (x) {steps} p = Mul (x, t60) y = Mul (p, half)"
    model = parse(f"g (float[N,4] x) => (float[N,4] y) {CONSTANTS} {{ {body} }}")
    assert fused_pattern(model.graph.node(len(model.graph) - 1)) is None
