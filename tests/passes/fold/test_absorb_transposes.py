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


@pytest.mark.parametrize(
    ("perm", "reduction", "after"),
    [
        ("0, 2, 3, 1", "ReduceMax<axes = [1, 2], keepdims = 0>(t)", "ReduceMax<axes = [2, 3], keepdims = 0>(x)"),
        ("0, 2, 3, 1", "ReduceSum<keepdims = 0>(t, k)", "ReduceSum<keepdims = 0>(x, l)"),
        ("3, 2, 1, 0", "ReduceMean<keepdims = 0>(t)", "ReduceMean<keepdims = 0>(x)"),
        ("0, 3, 1, 2", "ReduceMean<axes = [-3], keepdims = 0>(t)", "ReduceMean<axes = [3], keepdims = 0>(x)"),
    ],
)
def test_reductions_that_drop_axes(perm: str, reduction: str, after: str) -> None:
    head = "g (float[2,3,4,5] x) => (float[*] y) <int64[2] k = {1, -2}, int64[2] l = {2, 3}>".replace("[*]", "")
    expect(
        f"{head} {{ t = Transpose<perm = [{perm}]>(x) s = {reduction} y = Relu(s) }}",
        f"{head} {{ s = {after} y = Relu(s) }}",
        pass_class("absorb-transposes")(),
    )


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        ("t = Transpose<perm = [0, 3, 2, 1]>(x) y = ReduceMax<axes = [1], keepdims = 0>(t)", "changes the order"),
        ("t = Transpose<perm = [0, 2, 3, 1]>(x) y = ReduceMax<axes = [1, 2], keepdims = 1>(t)", ""),
        ("t = Transpose<perm = [0, 2, 3, 1]>(x) r = ReduceMax<axes = [1, 2, 3], keepdims = 0>(t) "
         "s = ReduceMax<axes = [0, 1, 2, 3], keepdims = 0>(t) y = Add(r, s)", "also read elsewhere"),
    ],
)  # fmt: skip
def test_reductions_that_stay(nodes: str, reason: str) -> None:
    text = f"g (float[2,3,4,5] x) => (float y) {{ {nodes} }}"
    assert reason in reasons(expect(text, None, pass_class("absorb-transposes")()))
