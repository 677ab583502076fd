from __future__ import annotations

import pytest
from golden import expect, reasons

from graphopt.registry import pass_class

ABSORB = pass_class("absorb-transposes")()
T = "Transpose <perm: ints = [1, 0]>"
HEAD = "g (float[N,3] x, float[4,3] w) => (float[A,B] y) "


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (f"t = {T} (w) y = Gemm(x, t)", "y = Gemm <transB: int = 1> (x, w)"),
        (f"t = {T} (w) y = MatMul(x, t)", "y = Gemm <transB: int = 1> (x, w)"),
        (f"t = {T} (x) u = {T} (t) y = Gemm <transB: int = 1> (u, w)",
         f"t = {T} (x) y = Gemm <transB: int = 1, transA: int = 1> (t, w)"),
        ("t = Transpose (w) y = Gemm(x, t)", "y = Gemm <transB: int = 1> (x, w)"),
    ],
)  # fmt: skip
def test_golden(before: str, after: str) -> None:
    expect(HEAD + "{" + before + "}", HEAD + "{" + after + "}", ABSORB)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (HEAD + f"{{ t = {T} (w) a = Gemm(x, t) b = Relu(t) y = MatMul(a, w) }}", "also read elsewhere"),
        (f"g (float[N,2,3] x, float[4,3] w) => (float[A,B,C] y) {{ t = {T} (w) y = MatMul(x, t) }}", "stack"),
        (f"g (int32[2,3] x, int32[4,3] w) => (int32[A,B] y) {{ t = {T} (w) y = MatMul(x, t) }}", "no Gemm"),
    ],
)
def test_kept(text: str, reason: str) -> None:
    assert reason in reasons(expect(text, None, ABSORB))


def test_in_a_body() -> None:
    text = f"""g (bool c, float[2,3] x, float[4,3] w) => (float[A,B] y) {{ y = If (c) <
      then_branch = one () => (float[A,B] p) {{ t = {T} (w) p = Gemm(x, t) }},
      else_branch = two () => (float[A,B] q) {{ q = Gemm <transB: int = 1, alpha: float = 2.0> (x, w) }}> }}"""
    after = text.replace(f"t = {T} (w) p = Gemm(x, t)", "p = Gemm <transB: int = 1> (x, w)")
    expect(text, after, ABSORB)
