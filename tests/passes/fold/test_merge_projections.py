from __future__ import annotations

import numpy as np
import pytest
from golden import assert_close, context, expect, parse, random_feeds, run

from graphopt.registry import pass_class

MERGE = pass_class("merge-projections")()


def tensor(name: str, *shape: int) -> str:
    values = np.random.default_rng(sum(name.encode())).standard_normal(shape).ravel()
    return f"float[{','.join(map(str, shape))}] {name} = {{{', '.join(f'{v:.5f}' for v in values)}}}"


def check(text: str, operators: list[str]) -> None:
    model = parse(text)
    feeds = random_feeds(model)
    reference = run(model, feeds)
    assert MERGE.run(model, context()).changed
    assert [node.op_type for node in model.graph] == operators
    assert_close(run(model, feeds), reference)


def test_golden() -> None:
    expect(
        """g (float[N,3,2] x) => (float[N,3,1] y, float[N,3,2] z)
        <float[2,1] v = {1.0,2.0}, float[2,2] w = {3.0,4.0,5.0,6.0}, float[2] b = {7.0,8.0}>
        { y = MatMul(x, v) t = MatMul(x, w) z = Add(t, b) }""",
        """g (float[N,3,2] x) => (float[N,3,1] y, float[N,3,2] z)
        <float[2,3] w = {1.0,3.0,4.0,2.0,5.0,6.0}, float[3] b = {0.0,7.0,8.0}, int64[2] s = {1,2}>
        { t = MatMul(x, w) u = Add(t, b) y, z = Split <axis: int = -1> (u, s) }""",
        MERGE,
    )


@pytest.mark.parametrize("opset", [11, 13, 18])
@pytest.mark.parametrize("transposed", [0, 1])
def test_grouped_queries_by_gemm(opset: int, transposed: int) -> None:
    shapes = [(4, n)[:: -1 if transposed else 1] for n in (6, 2, 2)]
    weights = ", ".join(tensor(f"w{i}", *shape) for i, shape in enumerate(shapes))
    gemm = f"Gemm <transB: int = {transposed}, alpha: float = 2.0>"
    check(
        f"""<ir_version: 8, opset_import: ["" : {opset}]>
        g (float[N,4] x) => (float[N,6] q, float[N,2] k, float[N,2] v) <{weights}, {tensor("b", 2)}>
        {{ q = {gemm} (x, w0) r = Relu(x) k = {gemm} (x, w1, b) v = {gemm} (x, w2) }}""".replace("r = Relu(x) ", ""),
        ["Gemm", "Split"],
    )


def test_readers_between_stay_in_order_and_other_tensors_apart() -> None:
    check(
        f"""g (float[N,4] x) => (float[N,3] y) <{tensor("u", 4, 3)}, {tensor("v", 4, 3)}, {tensor("w", 3, 3)}>
        {{ gate = MatMul(x, u) s = Sigmoid(gate) up = MatMul(x, v) p = Mul(s, up) y = MatMul(p, w) }}""",
        ["MatMul", "Split", "Sigmoid", "Mul", "MatMul"],
    )


def test_shared_weights_stay() -> None:
    expect(
        f"""g (float[N,4] x) => (float[N,4] y, float[N,4] z) <{tensor("u", 4, 4)}>
        {{ y = MatMul(x, u) z = MatMul(x, u) }}""",
        None,
        MERGE,
    )


def test_fold_leaves_projections_to_the_runtime() -> None:
    model = parse(f"""g (float[N,4] x) => (float[N,3] y, float[N,3] z) <{tensor("u", 4, 3)}, {tensor("v", 4, 3)}>
    {{ y = MatMul(x, u) z = MatMul(x, v) }}""")
    assert not pass_class("fold")().run(model, context()).changed
