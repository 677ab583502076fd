from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from golden import assert_close, context, expect, parse, random_feeds, reasons, run

from graphopt.base import PassResult
from graphopt.registry import pass_class

FOLD = pass_class("fold-batchnorm")()
# scale / sqrt(var + eps) = (1, 2), shift = (1, -2)
STATS = "float[2] s = {2.0, 2.0}, float[2] b = {1.5, 2.0}, float[2] m = {0.5, 2.0}, float[2] v = {3.99999, 0.99999}"


def stat(channels: int) -> str:
    numbers = [", ".join(f"{x:.3f}" for x in np.random.default_rng(i).uniform(0.5, 2, channels)) for i in range(4)]
    return ", ".join(f"float[{channels}] {n} = {{{x}}}" for n, x in zip("sbmv", numbers, strict=True))


def random_tensor(name: str, *shape: int) -> str:
    data = np.random.default_rng(sum(map(ord, name))).standard_normal(shape).reshape(-1)
    return f"float[{','.join(map(str, shape))}] {name} = {{{', '.join(f'{x:.3f}' for x in data)}}}"


def expect_folded(text: str, operators: list[str]) -> None:
    """For layouts: the operators that remain, and equal numbers."""
    model = parse(text)
    feeds = random_feeds(model)
    reference = run(model, feeds)
    result = FOLD.run(model, context())
    assert [n.op_type for n in model.graph] == operators, reasons(result)
    assert_close(run(model, feeds), reference)


def test_after_conv_without_bias() -> None:
    result = expect(
        f"""g (float[N,1,3,3] x) => (float[N,2,3,3] y) <float[2,1,1,1] "c.weight" = {{3.0, 5.0}}, {STATS}>
        {{ t = Conv(x, "c.weight")  y = BatchNormalization(t, s, b, m, v) }}""",
        """g (float[N,1,3,3] x) => (float[N,2,3,3] y) <float[2,1,1,1] w = {3.0, 10.0}, float[2] b = {1.0, -2.0}>
        { y = Conv(x, w, b) }""",
        FOLD,
    )
    assert "1 BatchNormalization folded into the linear operator before it" in result.notes


def test_names_and_provenance() -> None:
    model = parse(
        f"""g (float[N,1,3,3] x) => (float[N,2,3,3] y) <float[2,1,1,1] "c.weight" = {{3.0, 5.0}}, {STATS}>
        {{ [conv] t = Conv(x, "c.weight") [norm] u = BatchNormalization(t, s, b, m, v) y = Relu(u) }}"""
    )
    FOLD.run(model, context())
    assert list(model.graph.initializers) == ["c.weight", "c.bias"]
    conv = model.graph[0]
    assert conv.name == "conv"
    assert conv.outputs[0].name == "t"
    assert conv.metadata_props["graphopt.folded_from"] == "norm"
    assert model.graph.initializers["c.weight"].metadata_props["graphopt.folded_from"] == "norm"


def test_after_conv_with_bias() -> None:
    expect(
        f"""g (float[N,1,3,3] x) => (float[N,2,3,3] y) <float[2,1,1,1] w = {{3.0, 5.0}}, float[2] c = {{1.0,
        1.0}}, {STATS}>
        {{ t = Conv(x, w, c)  y = BatchNormalization(t, s, b, m, v) }}""",
        """g (float[N,1,3,3] x) => (float[N,2,3,3] y) <float[2,1,1,1] w = {3.0, 10.0}, float[2] c = {2.0, 0.0}>
        { y = Conv(x, w, c) }""",
        FOLD,
    )


@pytest.mark.parametrize(
    ("text", "operators"),
    [
        (  # grouped, padded
            f"""g (float[N,4,5,5] x) => (float[N,6,5,5] y) <{random_tensor("w", 6, 2, 3, 3)}, {stat(6)}>
            {{ t = Conv <group: int = 2, pads: ints = [1,1,1,1]> (x, w) y = BatchNormalization(t, s, b, m, v) }}""",
            ["Conv"],
        ),
        (  # depthwise with multiplier
            f"""g (float[N,3,5,5] x) => (float[N,6,3,3] y) <{random_tensor("w", 6, 1, 3, 3)}, {stat(6)}>
            {{ t = Conv <group: int = 3> (x, w) y = BatchNormalization(t, s, b, m, v) }}""",
            ["Conv"],
        ),
        (  # one spatial axis, dilated
            f"""g (float[N,4,9] x) => (float[N,6,5] y) <{random_tensor("w", 6, 4, 3)}, {stat(6)}>
            {{ t = Conv <dilations: ints = [2]> (x, w) y = BatchNormalization(t, s, b, m, v) }}""",
            ["Conv"],
        ),
        (  # transposed, grouped, strided, output-padded
            f"""g (float[N,4,3,3] x) => (float[N,6,8,8] y) <{random_tensor("w", 4, 3, 3, 3)}, {stat(6)}>
            {{ t = ConvTranspose <group: int = 2, strides: ints = [2,2], output_padding: ints = [1,1]> (x, w)
               y = BatchNormalization(t, s, b, m, v) }}""",
            ["ConvTranspose"],
        ),
        (
            f"""g (float[N,4] x) => (float[N,6] y) <{random_tensor("w", 6, 4)}, {random_tensor("c", 1, 6)}, {stat(6)}>
            {{ t = Gemm <transB: int = 1, alpha: float = 0.5, beta: float = 2.0> (x, w, c)
               y = BatchNormalization(t, s, b, m, v) }}""",
            ["Gemm"],
        ),
        (
            f"""g (float[N,4] x) => (float[N,6] y) <{random_tensor("w", 4, 6)}, {stat(6)}>
            {{ t = Gemm(x, w) y = BatchNormalization(t, s, b, m, v) }}""",
            ["Gemm"],
        ),
        (
            f"""g (float[N,4] x) => (float[N,6] y) <{random_tensor("w", 4, 6)}, {random_tensor("c", 6)}, {stat(6)}>
            {{ t = MatMul(x, w) u = Add(c, t) y = BatchNormalization(u, s, b, m, v) }}""",
            ["MatMul", "Add"],
        ),
        (
            f"""g (float[N,4] x) => (float[N,6] y) <{random_tensor("w", 4, 6)}, {stat(6)}>
            {{ t = MatMul(x, w) y = BatchNormalization(t, s, b, m, v) }}""",
            ["MatMul", "Add"],
        ),
        (  # before, no padding, grouped
            f"""g (float[N,4,5,5] x) => (float[N,6,3,3] y) <{random_tensor("w", 6, 2, 3, 3)}, {stat(4)}>
            {{ t = BatchNormalization(x, s, b, m, v) y = Conv <group: int = 2> (t, w) }}""",
            ["Conv"],
        ),
        (  # before two readers
            f"""g (float[N,4,5,5] x) => (float[N,6,3,3] y, float[N,2,5,5] z)
            <{random_tensor("w", 6, 4, 3, 3)}, {random_tensor("u", 2, 4, 1, 1)}, {stat(4)}>
            {{ t = BatchNormalization(x, s, b, m, v) y = Conv(t, w) z = Conv(t, u) }}""",
            ["Conv", "Conv"],
        ),
        (  # before Gemm, alpha counts for the shift too
            f"""g (float[N,4] x) => (float[N,6] y) <{random_tensor("w", 4, 6)}, {random_tensor("c", 6)}, {stat(4)}>
            {{ t = BatchNormalization(x, s, b, m, v) y = Gemm <alpha: float = 0.5> (t, w, c) }}""",
            ["Gemm"],
        ),
        (
            f"""g (float[N,4] x) => (float[N,6] y) <{random_tensor("w", 4, 6)}, {stat(4)}>
            {{ t = BatchNormalization(x, s, b, m, v) y = MatMul(t, w) }}""",
            ["MatMul", "Add"],
        ),
        (  # before a 1x1 transposed convolution the shift is constant
            f"""g (float[N,4,3,3] x) => (float[N,6,3,3] y) <{random_tensor("w", 4, 3, 1, 1)}, {stat(4)}>
            {{ t = BatchNormalization(x, s, b, m, v) y = ConvTranspose <group: int = 2> (t, w) }}""",
            ["ConvTranspose"],
        ),
        (  # chain: two normalisations around a convolution
            f"""g (float[N,4,5,5] x) => (float[N,4,3,3] y) <{random_tensor("w", 4, 4, 3, 3)}, {stat(4)}>
            {{ t = BatchNormalization(x, s, b, m, v) u = Conv(t, w) y = BatchNormalization(u, s, b, m, v) }}""",
            ["Conv"],
        ),
    ],
)
def test_layouts(text: str, operators: list[str]) -> None:
    expect_folded(text, operators)


def test_before_padded_conv_needs_zero_shift() -> None:
    text = f"""g (float[N,2,4,4] x) => (float[N,1,4,4] y) <{random_tensor("w", 1, 2, 3, 3)}, %s>
    {{ t = BatchNormalization(x, s, b, m, v) y = Conv <pads: ints = [1,1,1,1]> (t, w) }}"""
    assert "zero-padded" in reasons(expect(text % STATS, None, FOLD))
    zero = "float[2] s = {2.0, 3.0}, float[2] b = {0.0, 0.0}, float[2] m = {0.0, 0.0}, float[2] v = {1.0, 2.0}"
    expect_folded(text % zero, ["Conv"])
    assert "zero-padded" in reasons(
        expect((text % STATS).replace("pads: ints = [1,1,1,1]", 'auto_pad: string = "SAME_UPPER"'), None, FOLD)
    )


def test_before_transposed_convolution_needs_zero_shift() -> None:
    text = f"""g (float[N,2,4,4] x) => (float[N,3,9,9] y) <{random_tensor("w", 2, 3, 3, 3)}, {STATS}>
    {{ t = BatchNormalization(x, s, b, m, v) y = ConvTranspose <strides: ints = [2,2]> (t, w) }}"""
    assert "shift before a transposed convolution" in reasons(expect(text, None, FOLD))


CONV = """g (float[N,2,4,4] x) => (float[N,2,4,4] y{out}) <float[2,2,1,1] w = {{1.0,2.0,3.0,4.0}}, {stats}{more}>
{{ t = Conv(x, w) y = BatchNormalization {attributes} (t, s, b, m, v) {rest} }}"""


def conv(out: str = "", stats: str = STATS, more: str = "", attributes: str = "", rest: str = "") -> str:
    return CONV.format(out=out, stats=stats, more=more, attributes=attributes, rest=rest)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (conv(out=", float[N,2,4,4] z", rest="z = Relu(t)"), "the tensor between is read by others"),
        (conv(out=", float[N,2,4,4] t"), "the tensor between is read by others or given out"),
        (conv(out=", float[N,2,4,4] z", rest="z = Conv(x, w)"), "weight is shared"),
        (conv(out=", float[2,2,1,1] z", rest="z = Relu(w)"), "weight is shared"),
        (conv(stats=STATS.replace("3.99999", "-1.0")), "not finite"),
    ],
)
def test_does_not_fire(text: str, reason: str) -> None:
    assert reason in reasons(expect(text, None, FOLD, runnable="-1.0" not in text))


def test_not_in_training_mode() -> None:
    text = (
        """g (float[N,2,4,4] x) => (float[N,2,4,4] y) <float[2,2,1,1] w = {1.0,2.0,3.0,4.0}, """
        + STATS
        + """>
    { t = Conv(x, w) y, rm, rv = BatchNormalization <training_mode: int = 1> (t, s, b, m, v) }"""
    )
    assert "training_mode=1" in reasons(expect(text, None, FOLD))


def test_listed_statistics_before_opset_14_mean_training() -> None:
    # ONNX Runtime normalises by the batch there too, although nothing reads the statistics.
    text = (
        """<ir_version: 7, opset_import: ["" : 9]>
    g (float[3,2,4,4] x) => (float[3,2,4,4] y) <float[2,2,1,1] w = {1.0,2.0,3.0,4.0}, """
        + STATS
        + """>
    { t = Conv(x, w) y, a, c, d, e = BatchNormalization(t, s, b, m, v) }"""
    )
    assert "before opset 14 means training mode" in reasons(expect(text, None, FOLD))
    single = text.replace("y, a, c, d, e =", "y =")
    expect_folded(single, ["Conv"])


def test_not_with_statistics_per_pixel() -> None:
    stats = ", ".join(f"float[2,4,4] {n} = {{{', '.join(['1.5'] * 32)}}}" for n in "sbmv")
    text = f"""<ir_version: 7, opset_import: ["" : 8]>
    g (float[3,2,4,4] x) => (float[3,2,4,4] y) <float[2,2,1,1] w = {{1.0,2.0,3.0,4.0}}, {stats}>
    {{ t = Conv(x, w) y = BatchNormalization <spatial: int = 0> (t, s, b, m, v) }}"""
    assert "spatial=0" in reasons(expect(text, None, FOLD))


def test_matmul_of_rank_3_has_its_channels_elsewhere() -> None:
    text = f"""g (float[N,2,4] x) => (float[N,2,2] y) <{random_tensor("w", 4, 2)}, {STATS}>
    {{ t = MatMul(x, w) y = BatchNormalization(t, s, b, m, v) }}"""
    assert "channels are on axis 2 of 3" in reasons(expect(text, None, FOLD))


def test_not_behind_a_nonlinear_operator() -> None:
    text = f"""g (float[N,2,4,4] x) => (float[N,2,4,4] y) <{STATS}>
    {{ t = Relu(x) y = BatchNormalization(t, s, b, m, v) }}"""
    assert "Relu is not a linear operator" in reasons(expect(text, None, FOLD))


def test_float16_keeps_its_precision_or_is_left() -> None:
    def half(weight: float, scale: float) -> PassResult:
        model = parse(
            f"""g (float[N,1,2,2] x) => (float[N,1,2,2] y) <float[1,1,1,1] w = {{{weight:f}}},
            float[1] s = {{{scale:f}}},
            float[1] b = {{0.0}}, float[1] m = {{0.0}}, float[1] v = {{1.0}}>
            {{ t = Conv(x, w) y = BatchNormalization(t, s, b, m, v) }}"""
        )
        for value in model.graph.initializers.values():
            assert value.const_value is not None
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float16))
        return FOLD.run(model, context())

    assert "not finite in FLOAT16" in reasons(half(1000, 1000))
    assert "subnormal" in reasons(half(0.0011, 0.00012))
    assert half(3, 2).changed


def test_overridable_parameters() -> None:
    text = f"""<ir_version: 3, opset_import: ["" : 9]>
    g (float[N,1,3,3] x, float[2,1,1,1] w, float[2] s, float[2] b, float[2] m, float[2] v) => (float[N,2,3,3] y)
    <float[2,1,1,1] w = {{3.0, 5.0}}, {STATS}>
    {{ t = Conv(x, w)  y = BatchNormalization(t, s, b, m, v) }}"""
    model = parse(text)
    result = FOLD.run(model, context())
    assert [v.name for v in model.graph.inputs] == ["x"]
    assert model.ir_version == 4
    assert any("also graph inputs" in n for n in result.notes)
    assert any("IR version 3 -> 4" in n for n in result.notes)
    kept = parse(text)
    keeping = pass_class("fold-batchnorm")(keep_overridable=True)
    assert "can be overridden" in reasons(keeping.run(kept, context()))
    assert len(kept.graph.inputs) == 6


def test_shared_statistics_stay_for_their_other_readers() -> None:
    expect_folded(
        f"""g (float[N,2,3,3] x) => (float[N,2,3,3] y)
        <float[2,2,1,1] w = {{1.0,2.0,3.0,4.0}}, float[2,2,1,1] u = {{4.0,3.0,2.0,1.0}}, {STATS}>
        {{ t = Conv(x, w) n = BatchNormalization(t, s, b, m, v) r = Relu(n)
           q = Conv(r, u, b) y = BatchNormalization(q, s, b, m, v) }}""",
        ["Conv", "Relu", "Conv"],
    )


def test_weights_captured_by_a_body_are_uses() -> None:
    text = f"""g (bool c, float[1,2,3,3] x) => (float[1,2,3,3] y)
    <float[2,2,1,1] w = {{1.0,2.0,3.0,4.0}}, {STATS}>
    {{ t = Conv(x, w) n = BatchNormalization(t, s, b, m, v)
       y = If (c) <
         then_branch = a () => (float[1,2,3,3] p) {{ p = Conv(n, w) }},
         else_branch = d () => (float[1,2,3,3] q) {{ q = Relu(n) }} > }}"""
    assert "weight is shared" in reasons(expect(text, None, FOLD))


def test_folds_inside_a_body() -> None:
    model = parse(
        f"""g (bool c, float[1,2,3,3] x) => (float[1,2,3,3] y)
        <float[2,2,1,1] w = {{1.0,2.0,3.0,4.0}}, {STATS}>
        {{ y = If (c) <
             then_branch = a () => (float[1,2,3,3] p) {{ t = Conv(x, w) p = BatchNormalization(t, s, b, m, v) }},
             else_branch = d () => (float[1,2,3,3] q) {{ q = Relu(x) }} > }}"""
    )
    feeds = {"c": np.array(True), "x": np.random.default_rng(0).standard_normal((1, 2, 3, 3)).astype(np.float32)}
    reference = run(model, feeds)
    assert FOLD.run(model, context()).changed
    body = model.graph[0].attributes["then_branch"].as_graph()
    assert [n.op_type for n in body] == ["Conv"]
    assert body.outputs[0].name == "p"
    assert_close(run(model, feeds), reference)


def test_weights_in_constant_nodes() -> None:
    model = parse(
        f"""g (float[N,1,3,3] x) => (float[N,2,3,3] y) <{STATS}>
        {{ w = Constant <value = float[2,1,1,1] {{3.0, 5.0}}> () t = Conv(x, w) y = BatchNormalization(t, s, b,
        m, v) }}"""
    )
    feeds = random_feeds(model)
    reference = run(model, feeds)
    FOLD.run(model, context())
    assert [n.op_type for n in model.graph] == ["Conv"]
    assert isinstance(model.graph[0].inputs[1], ir.Value)
    assert_close(run(model, feeds), reference)


def test_reasons_name_no_tensor_so_that_equal_ones_are_one_line() -> None:
    text = f"""g (float[N,2,4,4] x, float[2,2,1,1] u, float[2,2,1,1] w, float[2] p, float[2] q) => (float[N,2,4,4] y)
    <{STATS}> {{ a = Conv(x, u)  n = BatchNormalization(a, p, b, m, v)
       c = Conv(n, w)  y = BatchNormalization(c, q, b, m, v) }}"""
    skipped = expect(text, None, FOLD).skipped
    assert len(skipped) == 2
    assert {skip.reason for skip in skipped} == {"its scale is not a floating-point constant"}
