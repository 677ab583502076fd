from __future__ import annotations

import numpy as np
import pytest
from golden import expect, reasons

from graphopt.registry import pass_class

GEMM = pass_class("recognise-gemm")()
TABLES = "float[3,2] w = {1, 2, 3, 4, 5, 6}, float[2] b = {1, 2}"


@pytest.mark.parametrize(
    ("given", "bias"),
    [
        ("m = MatMul(x, w) y = Add(m, b)", "b"),
        ("m = MatMul(x, w) y = Add(b, m)", "b"),
        ("m = Gemm(x, w) y = Add(m, b)", "b"),
        ("k = Constant <value = float {2}> () m = MatMul(x, w) y = Add(m, k)", "k"),
    ],
)
def test_a_matrix_and_a_bias(given: str, bias: str) -> None:
    constant = "k = Constant <value = float {2}> ()" if bias == "k" else ""
    expect(
        f"g (float[N,3] x) => (float[N,2] y) <{TABLES}> {{ {given} }}",
        f"g (float[N,3] x) => (float[N,2] y) <{TABLES}> {{ {constant} y = Gemm(x, w, {bias}) }}",
        GEMM,
    )


def test_alpha_stays_and_beta_goes() -> None:
    expect(
        f"g (float[N,3] x) => (float[N,2] y) <{TABLES}> {{ m = Gemm<alpha = 2.0, beta = 3.0>(x, w) y = Add(m, b) }}",
        f"g (float[N,3] x) => (float[N,2] y) <{TABLES}> {{ y = Gemm<alpha = 2.0>(x, w, b) }}",
        GEMM,
    )


def test_two_computed_operands() -> None:
    tables = "float[4] b = {1, 2, 3, 4}"
    expect(
        f"g (float[2,3] x, float[4,3] z) => (float[2,4] y) <{tables}> {{ m = Gemm<transB = 1>(x, z) y = Add(m, b) }}",
        f"g (float[2,3] x, float[4,3] z) => (float[2,4] y) <{tables}> {{ y = Gemm<transB = 1>(x, z, b) }}",
        GEMM,
    )


def test_a_stack_between_reshapes() -> None:
    expect(
        f"""g (float[B,6,3] x) => (float[B,12] y) <{TABLES}, int64[4] s = {{0, 2, 3, 3}}, int64[2] t = {{0, -1}}> {{
          r = Reshape(x, s) m = MatMul(r, w) a = Add(m, b) y = Reshape(a, t) }}""",
        f"""g (float[B,6,3] x) => (float[B,12] y) <{TABLES}, int64[2] s = {{-1, 3}}, int64[2] t = {{-1, 12}}> {{
          r = Reshape(x, s) m = Gemm(r, w, b) y = Reshape(m, t) }}""",
        GEMM,
        feeds={"x": np.random.default_rng(0).standard_normal((2, 6, 3)).astype(np.float32)},
    )


def test_a_stack_in_a_body() -> None:
    text = f"""g (bool c, float[4,3] x) => (float[8] y) <{TABLES}> {{ y = If (c) <
      then_branch = one () => (float[8] p) {{ z = Constant <value_ints = [1, 4, 3]> ()
        f = Constant <value_ints = [8]> () r = Reshape(x, z) m = MatMul(r, w) a = Add(m, b) p = Reshape(a, f) }},
      else_branch = two () => (float[8] q) {{
        f2 = Constant <value_ints = [8]> () m2 = MatMul(x, w) q = Reshape(m2, f2) }}>
    }}"""
    after = text.replace("[1, 4, 3]", "[4, 3]").replace("m = MatMul(r, w) a = Add(m, b)", "a = Gemm(r, w, b)")
    expect(text, after, GEMM)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("m = MatMul(x, w) a = Add(m, b) n = Neg(m) y = Mul(a, n)", "read elsewhere"),
        ("m = MatMul(x, w) r = Constant <value = float[2,1] {1, 2}> () y = Add(m, r)", "one number per column"),
        ("m = MatMul(x, w) r = Constant <value = float[1,1,2] {1, 2}> () a = Add(m, r) y = Squeeze(a, z)",
         "one number per column"),
        ("m = MatMul(x, w) n = Neg(m) y = Add(m, n)", ""),
        ("m = Gemm(x, w, b) y = Add(m, b)", ""),
    ],
)  # fmt: skip
def test_what_stays(given: str, reason: str) -> None:
    text = f"g (float[2,3] x) => (float[2,2] y) <{TABLES}, int64[1] z = {{0}}> {{ {given} }}"
    assert reason in reasons(expect(text, None, GEMM))


def test_a_stack_without_reshapes_stays() -> None:
    text = f"g (float[B,6,3] x) => (float[B,6,2] y) <{TABLES}> {{ m = MatMul(x, w) y = Add(m, b) }}"
    assert not reasons(expect(text, None, GEMM))


def test_quantised_operands_stay() -> None:
    text = """g (float[2,3] x) => (float[2,2] y)
      <uint8[3,2] w = {1, 2, 3, 4, 5, 6}, float s = {0.5}, float[2] b = {1, 2}> {
      d = DequantizeLinear(w, s) m = MatMul(x, d) y = Add(m, b) }"""
    assert "quantised" in reasons(expect(text, None, GEMM))
