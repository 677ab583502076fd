from __future__ import annotations

import numpy as np
import pytest
from golden import assert_close, context, expect, parse, random_feeds, reasons, run

from graphopt.base import PassResult
from graphopt.registry import pass_class

FOLD = pass_class("fold-carried-affine")()


def tensor(name: str, *shape: int) -> str:
    values = np.random.default_rng(len(name) + sum(shape)).standard_normal(shape).ravel()
    return f"float[{','.join(map(str, shape))}] {name} = {{{', '.join(f'{v:.5f}' for v in values)}}}"


def check(text: str, operators: list[str]) -> PassResult:
    """The pass leaves these operators, and the outputs are those of before."""
    model = parse(text)
    feeds = random_feeds(model)
    reference = run(model, feeds)
    result = FOLD.run(model, context())
    assert [node.op_type for node in model.graph] == operators, reasons(result)
    assert_close(run(model, feeds), reference)
    return result


def test_golden() -> None:
    expect(
        """g (float[N,3,2] x) => (float[N,2,3,2] y) <float[2,4] w = {1.0,2.0,3.0,4.0,5.0,6.0,7.0,8.0},
        int64[4] s = {0,0,2,2}, float k = {0.5}>
        { t = MatMul(x, w) r = Reshape(t, s) p = Transpose <perm: ints = [0,2,1,3]> (r) y = Mul(p, k) }""",
        """g (float[N,3,2] x) => (float[N,2,3,2] y) <float[2,4] w = {0.5,1.0,1.5,2.0,2.5,3.0,3.5,4.0},
        int64[4] s = {0,0,2,2}>
        { t = MatMul(x, w) r = Reshape(t, s) y = Transpose <perm: ints = [0,2,1,3]> (r) }""",
        FOLD,
    )


@pytest.mark.parametrize(
    ("constant", "operator"),
    [
        (tensor("k", 3), "y = Mul(p, k)"),
        (tensor("k", 2, 1, 1), "y = Sub(k, p)"),
        (tensor("k", 2, 1, 3), "y = Add(k, p)"),
        (tensor("k", 1, 2, 1, 3), "y = Div(p, k)"),
    ],
)
def test_channels_are_followed_through_a_split_of_heads(constant: str, operator: str) -> None:
    check(
        f"""g (float[N,S,4] x) => (float[N,2,S,3] y) <{tensor("w", 4, 6)}, {tensor("b", 6)}, int64[4] s = {{0,0,2,3}},
        {constant}>
        {{ t = MatMul(x, w) u = Add(t, b) r = Reshape(u, s) p = Transpose <perm: ints = [0,2,1,3]> (r) {operator} }}""",
        ["MatMul", "Add", "Reshape", "Transpose"],
    )


def test_batchnorm_behind_a_transpose() -> None:
    check(
        f"""g (float[N,5,4] x) => (float[N,3,5] y) <{tensor("w", 4, 3)}, {tensor("s", 3)}, {tensor("b", 3)},
        {tensor("m", 3)}, float[3] v = {{0.5,1.0,2.0}}>
        {{ t = MatMul(x, w) p = Transpose <perm: ints = [0,2,1]> (t) y = BatchNormalization(p, s, b, m, v) }}""",
        ["MatMul", "Add", "Transpose"],
    )


def test_convolution_average_flatten() -> None:
    check(
        f"""g (float[N,2,4,4] x) => (float[N,3] y) <{tensor("w", 3, 2, 3, 3)}, {tensor("k", 3)}, {tensor("c", 3)}>
        {{ t = Conv <pads: ints = [1,1,1,1]> (x, w) a = GlobalAveragePool(t) f = Flatten(a) m = Mul(f, k)
           y = Add(m, c) }}""",
        ["Conv", "GlobalAveragePool", "Flatten"],
    )


def test_into_the_linear_operator_behind() -> None:
    check(
        f"""g (float[N,3,2,2] x) => (float[N,5] y) <{tensor("k", 3, 1, 1)}, {tensor("w", 12, 5)}>
        {{ r = Relu(x) m = Mul(r, k) f = Flatten(m) y = Gemm(f, w) }}""",
        ["Relu", "Flatten", "Gemm"],
    )
    check(
        f"""g (float[N,3,2,2] x) => (float[N,5] y) <{tensor("k", 3, 1, 1)}, {tensor("c", 3, 1, 1)},
        {tensor("w", 3, 5)}>
        {{ r = Relu(x) m = Mul(r, k) n = Add(m, c) a = GlobalAveragePool(n) f = Flatten(a) y = Gemm(f, w) }}""",
        ["Relu", "GlobalAveragePool", "Flatten", "Gemm"],
    )


def test_all_readers_or_none() -> None:
    heads = ", ".join(tensor(f"w{i}", 4, 3 + i) for i in range(3))
    text = f"""g (float[N,S,4] x) => (float[N,S,3] a, float[N,S,4] b, float[N,S,5] c) <{heads}, {tensor("k", 4)}>
        {{ r = Relu(x) m = Mul(r, k) a = MatMul(m, w0) b = MatMul(m, w1) c = MatMul(m, w2) }}"""
    check(text, ["Relu", "MatMul", "MatMul", "MatMul"])
    other = text.replace("c = MatMul(m, w2)", "d = Neg(m) c = MatMul(d, w2)")
    check(other, ["Relu", "Mul", "MatMul", "MatMul", "Neg", "MatMul"])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            f"""g (float[2,3,4] x) => (float[4,6] y) <{tensor("w", 4, 4)}, int64[2] s = {{4,6}}, {tensor("k", 6)}>
            {{ t = MatMul(x, w) r = Reshape(t, s) y = Mul(r, k) }}""",
            "cannot be followed",
        ),
        (
            f"""g (float[N,3,4] x) => (float[N,4,3] y) <{tensor("w", 4, 4)}, {tensor("k", 3)}>
            {{ t = MatMul(x, w) r = Transpose <perm: ints = [0,2,1]> (t) y = Mul(r, k) }}""",
            "not one number per channel",
        ),
        (
            f"""g (float[N,3,4] x) => (float[N,4,3] y, float[N,4,3] r) <{tensor("w", 4, 4)}, float k = {{2.0}}>
            {{ t = MatMul(x, w) r = Transpose <perm: ints = [0,2,1]> (t) y = Mul(r, k) }}""",
            "",
        ),
    ],
)
def test_does_not_fire(text: str, reason: str) -> None:
    assert reason in reasons(expect(text, None, FOLD))
