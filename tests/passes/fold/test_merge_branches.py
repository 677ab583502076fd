from __future__ import annotations

import numpy as np
import pytest
from golden import assert_close, context, expect, parse, random_feeds, reasons, run

from graphopt.base import PassResult
from graphopt.registry import pass_class

MERGE = pass_class("merge-branches")()
FOLD = pass_class("fold")()
PAD = "pads: ints = [1,1,1,1]"


def tensor(name: str, *shape: int) -> str:
    values = np.random.default_rng(len(name) + sum(shape)).standard_normal(shape).ravel()
    return f"float[{','.join(map(str, shape))}] {name} = {{{', '.join(f'{v:.5f}' for v in values)}}}"


def norm(name: str, channels: int) -> str:
    positive = ", ".join(f"{0.5 + 0.25 * i}" for i in range(channels))
    return ", ".join(
        [*(tensor(f"{name}_{part}", channels) for part in "sbm"), f"float[{channels}] {name}_v = {{{positive}}}"]
    )


def check(text: str, operators: list[str], what: object = MERGE) -> PassResult:
    """The pass leaves these operators, and the outputs are those of before."""
    model = parse(text)
    feeds = random_feeds(model)
    reference = run(model, feeds)
    result = what.run(model, context())  # type: ignore[attr-defined]
    assert [node.op_type for node in model.graph] == operators, reasons(result)
    assert_close(run(model, feeds), reference)
    return result


def test_identity_and_a_pointwise_kernel_in_the_middle() -> None:
    expect(
        """g (float[N,1,4,4] x) => (float[N,1,4,4] y) <float[1,1,3,3] w = {1.0,2.0,3.0,4.0,5.0,6.0,7.0,8.0,9.0},
        float[1,1,1,1] v = {10.0}, float[1] c = {0.5}>
        { a = Conv <pads: ints = [1,1,1,1]> (x, w) b = Conv(x, v, c) s = Add(a, b) y = Add(x, s) }""",
        """g (float[N,1,4,4] x) => (float[N,1,4,4] y) <float[1,1,3,3] w = {1.0,2.0,3.0,4.0,16.0,6.0,7.0,8.0,9.0},
        float[1] c = {0.5}>
        { y = Conv <pads: ints = [1,1,1,1]> (x, w, c) }""",
        MERGE,
    )


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_repvgg(groups: int) -> None:
    each = 4 // groups
    check(
        f"""g (float[N,4,6,6] x) => (float[N,4,6,6] y) <{tensor("w", 4, each, 3, 3)}, {tensor("v", 4, each, 1, 1)},
        {norm("p", 4)}, {norm("q", 4)}, {norm("r", 4)}>
        {{ a = Conv <group: int = {groups}, {PAD}> (x, w) an = BatchNormalization(a, p_s, p_b, p_m, p_v)
           b = Conv <group: int = {groups}> (x, v) bn = BatchNormalization(b, q_s, q_b, q_m, q_v)
           i = BatchNormalization(x, r_s, r_b, r_m, r_v) s = Add(an, bn) t = Add(s, i) y = Relu(t) }}""",
        ["Conv", "Relu"],
        FOLD,
    )


def test_mobileone_with_stride() -> None:
    branches = " ".join(f"a{i} = Conv <group: int = 3, strides: ints = [2,2], {PAD}> (x, w{i})" for i in range(3))
    weights = ", ".join(tensor(f"w{i}", 3, 1, 3, 3) for i in range(3))
    check(
        f"""g (float[N,3,8,8] x) => (float[N,3,4,4] y) <{weights}, {tensor("v", 3, 1, 1, 1)}, {tensor("bias", 3)}>
        {{ {branches} b = Conv <group: int = 3, strides: ints = [2,2]> (x, v, bias) y = Sum(a0, b, a1, a2) }}""",
        ["Conv"],
    )


def test_acnet_whatever_the_order() -> None:
    tall, wide = "pads: ints = [1,0,1,0]", "pads: ints = [0,1,0,1]"
    for total in ("s = Add(b, c) y = Add(s, a)", "s = Add(a, b) y = Add(s, c)"):
        check(
            f"""g (float[N,2,6,6] x) => (float[N,3,6,6] y) <{tensor("w", 3, 2, 3, 3)}, {tensor("u", 3, 2, 3, 1)},
            {tensor("v", 3, 2, 1, 3)}>
            {{ a = Conv <{PAD}> (x, w) b = Conv <{tall}> (x, u) c = Conv <{wide}> (x, v) {total} }}""",
            ["Conv"],
        )


def test_only_where_one_kernel_has_room_for_the_other() -> None:
    result = expect(
        f"""g (float[N,2,6,6] x) => (float[N,3,6,6] y) <{tensor("u", 3, 2, 3, 1)}, {tensor("v", 3, 2, 1, 3)}>
        {{ b = Conv <pads: ints = [1,0,1,0]> (x, u) c = Conv <pads: ints = [0,1,0,1]> (x, v) y = Add(b, c) }}""",
        None,
        MERGE,
    )
    assert "does not lie within the largest" in reasons(result)
    result = expect(
        f"""g (float[N,4,6,6] x) => (float[N,4,6,6] y) <{tensor("w", 4, 1, 3, 3)}, {tensor("v", 4, 4, 1, 1)}>
        {{ a = Conv <group: int = 4, {PAD}> (x, w) b = Conv(x, v) y = Add(a, b) }}""",
        None,
        MERGE,
    )
    assert "connects channels" in reasons(result)


def test_dilated_kernels_fit_where_their_taps_meet() -> None:
    check(
        f"""g (float[N,1,9,9] x) => (float[N,1,9,9] y) <{tensor("w", 1, 1, 5, 5)}, {tensor("v", 1, 1, 3, 3)}>
        {{ a = Conv <pads: ints = [2,2,2,2]> (x, w)
           b = Conv <pads: ints = [2,2,2,2], dilations: ints = [2,2]> (x, v) y = Add(a, b) }}""",
        ["Conv"],
    )
    expect(
        f"""g (float[N,1,9,9] x) => (float[N,1,9,9] y) <{tensor("w", 1, 1, 3, 3)}, {tensor("v", 1, 1, 3, 3)}>
        {{ a = Conv <{PAD}> (x, w) b = Conv <pads: ints = [2,2,2,2], dilations: ints = [2,2]> (x, v)
           y = Add(a, b) }}""",
        None,
        MERGE,
    )


def test_same_padding() -> None:
    check(
        f"""g (float[N,2,7,7] x) => (float[N,2,4,4] y) <{tensor("w", 2, 2, 3, 3)}, {tensor("v", 2, 2, 1, 1)}>
        {{ a = Conv <auto_pad = "SAME_UPPER", strides: ints = [2,2]> (x, w)
           b = Conv <auto_pad = "SAME_UPPER", strides: ints = [2,2]> (x, v) y = Add(a, b) }}""",
        ["Conv"],
    )


@pytest.mark.parametrize("counted", [0, 1])
def test_an_average_is_a_kernel_where_it_counts_its_padding(counted: int) -> None:
    text = f"""g (float[N,3,6,6] x) => (float[N,3,6,6] y) <{tensor("w", 3, 3, 3, 3)}>
        {{ a = Conv <{PAD}> (x, w)
           b = AveragePool <kernel_shape: ints = [3,3], {PAD}, count_include_pad: int = {counted}> (x)
           y = Add(a, b) }}"""
    if counted:
        check(text, ["Conv"])
    else:
        assert "does not count its padding" in reasons(expect(text, None, MERGE))


def test_lora_by_matmul_and_by_convolution() -> None:
    check(
        f"""g (float[N,3,6] x) => (float[N,3,5] y) <{tensor("w", 6, 5)}, {tensor("bias", 5)}, {tensor("a", 6, 2)},
        {tensor("b", 2, 5)}, float s = {{0.25}}>
        {{ m = MatMul(x, w) n = Add(m, bias) d = MatMul(x, a) u = MatMul(d, b) k = Mul(u, s) y = Add(n, k) }}""",
        ["MatMul", "Add"],
    )
    check(
        f"""g (float[N,4,6,6] x) => (float[N,5,6,6] y) <{tensor("w", 5, 4, 3, 3)}, {tensor("a", 2, 4, 3, 3)},
        {tensor("b", 5, 2, 1, 1)}>
        {{ m = Conv <{PAD}> (x, w) d = Conv <{PAD}> (x, a) u = Conv(d, b) y = Add(m, u) }}""",
        ["Conv"],
    )


def test_lora_with_the_scale_between_and_gemm() -> None:
    check(
        f"""g (float[N,6] x) => (float[N,5] y) <{tensor("w", 5, 6)}, {tensor("bias", 5)}, {tensor("a", 2, 6)},
        {tensor("b", 5, 2)}, float s = {{0.25}}>
        {{ n = Gemm <transB: int = 1> (x, w, bias) d = Gemm <transB: int = 1> (x, a) e = Mul(d, s)
           u = Gemm <transB: int = 1> (e, b) y = Add(n, u) }}""",
        ["Gemm"],
        FOLD,
    )


def test_averaged_experts() -> None:
    check(
        f"""g (float[N,3,4] x) => (float[N,3,4] y) <{tensor("u", 4, 4)}, {tensor("v", 4, 4)}, {tensor("w", 4, 4)},
        {tensor("bias", 4)}, float k = {{3.0}}>
        {{ a = MatMul(x, u) b = MatMul(x, v) bb = Add(b, bias) c = MatMul(x, w) s = Add(a, bb) t = Add(s, c)
           y = Div(t, k) }}""",
        ["MatMul", "Add"],
        FOLD,
    )


@pytest.mark.parametrize(
    "total",
    ["y = Sub(a, b)", "s = Sub(b, x) y = Sub(a, s)", "s = Sub(x, a) y = Sub(s, b)", "s = Sub(b, a) y = Sub(x, s)"],
)
def test_differences(total: str) -> None:
    check(
        f"""g (float[N,4] x) => (float[N,4] y) <{tensor("u", 4, 4)}, {tensor("v", 4, 4)}>
        {{ a = Gemm(x, u) b = Gemm(x, v) {total} }}""",
        ["Gemm"],
    )


def test_the_rest_of_the_sum_stays() -> None:
    check(
        f"""g (float[N,4,5,5] x, float[N,4,1,1] z) => (float[N,4,5,5] y) <{tensor("u", 4, 4, 1, 1)},
        {tensor("v", 4, 4, 1, 1)}>
        {{ a = Conv(x, u) b = Conv(x, v) r = Sigmoid(z) s = Add(a, r) y = Add(s, b) }}""",
        ["Conv", "Sigmoid", "Add"],
    )


def test_transposed_convolutions() -> None:
    attributes = "strides: ints = [2,2]"
    check(
        f"""g (float[N,3,5,5] x) => (float[N,2,H,W] y) <{tensor("u", 3, 2, 4, 4)}, {tensor("v", 3, 2, 2, 2)}>
        {{ a = ConvTranspose <{attributes}, {PAD}> (x, u) b = ConvTranspose <{attributes}> (x, v) y = Add(a, b) }}""",
        ["ConvTranspose"],
    )


def test_not_where_a_branch_is_read_or_the_weight_is_shared() -> None:
    expect(
        f"""g (float[N,4] x) => (float[N,4] y, float[N,4] a, float[N,4] b) <{tensor("u", 4, 4)}, {tensor("v", 4, 4)}>
        {{ a = MatMul(x, u) b = MatMul(x, v) y = Add(a, b) }}""",
        None,
        MERGE,
    )
    check(
        f"""g (float[N,4] x) => (float[N,4] y, float[N,4] z) <{tensor("u", 4, 4)}, {tensor("v", 4, 4)}>
        {{ a = MatMul(x, u) b = MatMul(x, v) y = Add(a, b) r = Relu(x) z = MatMul(r, v) }}""",
        ["MatMul", "Relu", "MatMul"],
    )


def test_in_a_loop_and_in_a_function() -> None:
    check(
        f"""g (float[N,4] x, bool c) => (float[N,4] y)
        {{ y = If (c) <then_branch = t () => (float[N,4] p) <{tensor("u", 4, 4)}, {tensor("v", 4, 4)}>
           {{ a = MatMul(x, u) b = MatMul(x, v) p = Add(a, b) }},
           else_branch = e () => (float[N,4] q) {{ q = Relu(x) }}> }}""",
        ["If"],
    )
    model = parse("""<ir_version: 10, opset_import: ["" : 17, "l": 1]>
    g (float[N,2] x) => (float[N,2] y) { y = l.f(x) }
    <domain: "l", opset_import: ["": 17]> f (a) => (b) { w = Constant <value = float[2,2] {1.0,2.0,3.0,4.0}> ()
      v = Constant <value = float[2,2] {5.0,6.0,7.0,8.0}> () s = MatMul(a, w) t = MatMul(a, v) b = Add(s, t) }""")
    feeds = random_feeds(model)
    reference = run(model, feeds)
    assert MERGE.run(model, context()).changed
    assert [n.op_type for function in model.functions.values() for n in function] == ["Constant", "MatMul"]
    assert_close(run(model, feeds), reference)
