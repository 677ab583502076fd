from __future__ import annotations

import numpy as np
import pytest
from golden import assert_close, context, expect, parse, random_feeds, reasons, run

from graphopt.registry import pass_class

FOLD = pass_class("fold-norm-affine")()


def tensor(name: str, *shape: int) -> str:
    values = np.random.default_rng(sum(name.encode())).standard_normal(shape).ravel()
    return f"float[{','.join(map(str, shape))}] {name} = {{{', '.join(f'{v:.5f}' for v in values)}}}"


def test_golden() -> None:
    expect(
        """g (float[N,3,2] x) => (float[N,3,2] y) <float[2] s = {2.0,3.0}, float[2] b = {1.0,10.0},
        float[2,2] w = {1.0,2.0,3.0,4.0}, float[2] c = {0.5,0.5}>
        { n = LayerNormalization(x, s, b) t = MatMul(n, w) y = Add(t, c) }""",
        """g (float[N,3,2] x) => (float[N,3,2] y) <float[2] s = {1.0,1.0},
        float[2,2] w = {2.0,4.0,9.0,12.0}, float[2] c = {31.5,42.5}>
        { n = LayerNormalization(x, s) t = MatMul(n, w) y = Add(t, c) }""",
        FOLD,
    )


def test_all_readers() -> None:
    heads = ", ".join(f"{tensor(f'w{i}', 4, 2 + i)}, {tensor(f'b{i}', 2 + i)}" for i in range(3))
    model = parse(f"""g (float[N,4] x) => (float[N,2] q, float[N,3] k, float[N,4] v)
    <{heads}, {tensor("s", 4)}, {tensor("b", 4)}>
    {{ n = LayerNormalization(x, s, b) q = Gemm(n, w0, b0) k = Gemm(n, w1, b1) v = Gemm(n, w2, b2) }}""")
    feeds = random_feeds(model)
    reference = run(model, feeds)
    assert FOLD.run(model, context()).changed
    assert not FOLD.run(model, context()).changed
    assert_close(run(model, feeds), reference)


@pytest.mark.parametrize(
    ("readers", "reason"),
    [
        ("t = Relu(n) y = Add(t, x)", "Relu reads it"),
        ("y = MatMul(n, w) ", "would need an Add"),
        ("t = MatMul(w, n) y = Relu(t)", "MatMul reads it"),
    ],
)
def test_does_not_fire(readers: str, reason: str) -> None:
    text = f"""g (float[4,4] x) => (float[4,4] y) <{tensor("w", 4, 4)}, {tensor("s", 4)}, {tensor("b", 4)}>
    {{ n = LayerNormalization(x, s, b) {readers} }}"""
    assert reason in reasons(expect(text, None, FOLD))


def test_fold_leaves_it() -> None:
    model = parse(f"""g (float[N,4] x) => (float[N,4] y) <{tensor("w", 4, 4)}, {tensor("c", 4)}, {tensor("s", 4)}>
    {{ n = LayerNormalization(x, s) y = Gemm(n, w, c) }}""")
    assert not pass_class("fold")().run(model, context()).changed
