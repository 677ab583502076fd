from __future__ import annotations

import numpy as np
import pytest
from golden import assert_close, context, expect, parse, random_feeds, reasons, run

from graphopt.registry import pass_class

MERGE = pass_class("merge-linear")()


def tensor(name: str, *shape: int) -> str:
    values = np.random.default_rng(len(name) + sum(shape)).standard_normal(shape).ravel()
    return f"float[{','.join(map(str, shape))}] {name} = {{{', '.join(f'{v:.5f}' for v in values)}}}"


def check(text: str, operators: list[str]) -> None:
    """The pass leaves these operators, and the outputs are those of before."""
    model = parse(text)
    feeds = random_feeds(model)
    reference = run(model, feeds)
    result = MERGE.run(model, context())
    assert result.changed
    assert [node.op_type for node in model.graph] == operators, reasons(result)
    assert_close(run(model, feeds), reference)


def test_matmul_matmul() -> None:
    expect(
        """g (float[N,3,2] x) => (float[N,3,1] y) <float[2,2] w = {1.0,2.0,3.0,4.0}, float[2,1] v = {5.0,6.0}>
        { t = MatMul(x, w) y = MatMul(t, v) }""",
        "g (float[N,3,2] x) => (float[N,3,1] y) <float[2,1] v = {17.0,39.0}> { y = MatMul(x, v) }",
        MERGE,
    )


def test_biases_on_both_sides() -> None:
    expect(
        """g (float[N,3,2] x) => (float[N,3,1] y) <float[2,2] w = {1.0,2.0,3.0,4.0}, float[2] b = {1.0,10.0},
        float[2,1] v = {5.0,6.0}, float[1] c = {0.5}>
        { t = MatMul(x, w) u = Add(t, b) s = MatMul(u, v) y = Add(c, s) }""",
        """g (float[N,3,2] x) => (float[N,3,1] y) <float[2,1] v = {17.0,39.0}, float[1] c = {65.5}>
        { s = MatMul(x, v) y = Add(c, s) }""",
        MERGE,
    )


def test_the_node_that_holds_the_bias_stays() -> None:
    expect(
        """g (float[N,2] x) => (float[N,1] y) <float[2,2] w = {1.0,2.0,3.0,4.0}, float[2] b = {1.0,10.0},
        float[2,1] v = {5.0,6.0}>
        { t = Gemm <alpha: float = 2.0> (x, w, b) y = MatMul(t, v) }""",
        """g (float[N,2] x) => (float[N,1] y) <float[2,1] w = {34.0,78.0}, float[1] b = {65.0}>
        { y = Gemm(x, w, b) }""",
        MERGE,
    )


def test_gemm_gemm_transposed() -> None:
    expect(
        """g (float[N,2] x) => (float[N,1] y) <float[2,2] w = {1.0,3.0,2.0,4.0}, float[2] b = {1.0,10.0},
        float[1,2] v = {5.0,6.0}, float[1] c = {2.0}>
        { t = Gemm <transB: int = 1> (x, w, b)
          y = Gemm <transB: int = 1, alpha: float = 0.5, beta: float = 2.0> (t, v, c) }""",
        """g (float[N,2] x) => (float[N,1] y) <float[1,2] v = {8.5,19.5}, float[1] c = {36.5}>
        { y = Gemm <transB: int = 1> (x, v, c) }""",
        MERGE,
    )


def test_low_rank_stays() -> None:
    result = expect(
        f"""g (float[N,4] x) => (float[N,4] y) <{tensor("w", 4, 1)}, {tensor("v", 1, 4)}>
        {{ t = MatMul(x, w) y = MatMul(t, v) }}""",
        None,
        MERGE,
    )
    assert "16 numbers, more than the 8" in reasons(result)


@pytest.mark.parametrize(
    ("weights", "first", "second"),
    [
        (((4, 4, 1, 1), (2, 4, 3, 3)), "", "<strides: ints = [2,2], pads: ints = [1,1,1,1]>"),
        (((3, 4, 3, 3), (2, 3, 1, 1)), "<pads: ints = [1,0,1,0], strides: ints = [2,1]>", "<strides: ints = [1,2]>"),
        (((3, 4, 1, 1), (2, 3, 1, 1)), "<pads: ints = [1,0,0,1]>", ""),
        (((4, 2, 1, 1), (4, 2, 1, 1)), "<group: int = 2>", "<group: int = 2>"),
        (((4, 2, 1, 1), (2, 4, 1, 1)), "<group: int = 2>", ""),
        (((4, 1, 3, 3), (4, 1, 1, 1)), "<group: int = 4, dilations: ints = [2,2]>", "<group: int = 4>"),
    ],
)
def test_convolutions(weights: tuple[tuple[int, ...], ...], first: str, second: str) -> None:
    w, v = weights
    check(
        f"""g (float[N,4,7,7] x) => (float[N,{v[0]},H,W] y) <{tensor("w", *w)}, {tensor("v", *v)}>
        {{ t = Conv {first} (x, w) y = Conv {second} (t, v) }}""",
        ["Conv"],
    )


@pytest.mark.parametrize("order", ["wide first", "pointwise first"])
def test_biases_of_convolutions(order: str) -> None:
    w, v = ((3, 4, 3, 3), (2, 3, 1, 1)) if order == "wide first" else ((4, 4, 1, 1), (2, 4, 3, 3))
    check(
        f"""g (float[N,4,7,7] x) => (float[N,2,H,W] y)
        <{tensor("w", *w)}, {tensor("b", w[0])}, {tensor("v", *v)}, {tensor("c", v[0])}>
        {{ t = Conv(x, w, b) y = Conv(t, v, c) }}""",
        ["Conv"],
    )


def test_a_bias_does_not_pass_padding() -> None:
    result = expect(
        f"""g (float[N,4,7,7] x) => (float[N,2,7,7] y) <{tensor("w", 4, 4, 1, 1)}, {tensor("b", 4)},
        {tensor("v", 2, 4, 3, 3)}>
        {{ t = Conv(x, w, b) y = Conv <pads: ints = [1,1,1,1]> (t, v) }}""",
        None,
        MERGE,
    )
    assert "does not carry the bias" in reasons(result)


def test_transposed_convolutions() -> None:
    attributes = "<strides: ints = [2,2], pads: ints = [1,1,1,1], output_padding: ints = [1,1]>"
    check(
        f"""g (float[N,4,5,5] x) => (float[N,2,H,W] y) <{tensor("w", 4, 4, 1, 1)}, {tensor("v", 4, 2, 3, 3)}>
        {{ t = Conv(x, w) y = ConvTranspose {attributes} (t, v) }}""",
        ["ConvTranspose"],
    )
    check(
        f"""g (float[N,4,5,5] x) => (float[N,2,H,W] y) <{tensor("w", 4, 3, 3, 3)}, {tensor("bias", 3)},
        {tensor("v", 2, 3, 1, 1)}>
        {{ t = ConvTranspose {attributes} (x, w, bias) y = Conv(t, v) }}""",
        ["ConvTranspose"],
    )


def test_a_dense_layer_behind_a_depthwise_one_stays() -> None:
    result = expect(
        f"""g (float[N,4,7,7] x) => (float[N,4,5,5] y) <{tensor("w", 4, 1, 3, 3)}, {tensor("v", 4, 4, 1, 1)}>
        {{ t = Conv <group: int = 4> (x, w) y = Conv(t, v) }}""",
        None,
        MERGE,
    )
    assert "144 numbers, more than the 52" in reasons(result)


def test_not_across_readers_shared_weights_or_larger_kernels() -> None:
    read = f"""g (float[N,4] x) => (float[N,2] y, float[N,3] t) <{tensor("w", 4, 3)}, {tensor("v", 3, 2)}>
        {{ t = MatMul(x, w) y = MatMul(t, v) }}"""
    expect(read, None, MERGE)
    shared = f"""g (float[N,4] x) => (float[N,4] y, float[N,4] z) <{tensor("w", 4, 4)}, {tensor("v", 4, 4)}>
        {{ t = MatMul(x, w) y = MatMul(t, v) r = Relu(x) z = MatMul(r, v) }}"""
    assert "shared" in reasons(expect(shared, None, MERGE))
    large = f"""g (float[N,1,7,7] x) => (float[N,1,3,3] y) <{tensor("w", 1, 1, 3, 3)}, {tensor("v", 1, 1, 3, 3)}>
        {{ t = Conv(x, w) y = Conv(t, v) }}"""
    assert "more than one position" in reasons(expect(large, None, MERGE))


def test_a_shared_first_weight_stays_for_its_other_readers() -> None:
    check(
        f"""g (float[N,4] x) => (float[N,2] y, float[N,4] z) <{tensor("w", 4, 4)}, {tensor("v", 4, 2)}>
        {{ t = MatMul(x, w) y = MatMul(t, v) r = Relu(x) z = MatMul(r, w) }}""",
        ["MatMul", "Relu", "MatMul"],
    )


def test_three_in_a_row_in_a_body_and_in_a_function() -> None:
    check(
        f"""g (float[N,4] x, bool c) => (float[N,2] y)
        {{ y = If (c) <then_branch = t () => (float[N,2] p)
           <{tensor("w", 4, 3)}, {tensor("v", 3, 3)}, {tensor("u", 3, 2)}>
           {{ a = MatMul(x, w) b = MatMul(a, v) p = MatMul(b, u) }},
           else_branch = e () => (float[N,2] q) <{tensor("k", 4, 2)}> {{ q = MatMul(x, k) }}> }}""",
        ["If"],
    )
    model = parse("""<ir_version: 10, opset_import: ["" : 17, "l": 1]>
    g (float[N,2] x) => (float[N,1] y) { y = l.f(x) }
    <domain: "l", opset_import: ["": 17]> f (a) => (b) { w = Constant <value = float[2,2] {1.0,2.0,3.0,4.0}> ()
      v = Constant <value = float[2,1] {5.0,6.0}> () t = MatMul(a, w) b = MatMul(t, v) }""")
    feeds = random_feeds(model)
    reference = run(model, feeds)
    assert MERGE.run(model, context()).changed
    assert [n.op_type for function in model.functions.values() for n in function] == ["Constant", "MatMul"]
    assert_close(run(model, feeds), reference)
