from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from golden import assert_close, context, expect, parse, random_feeds, reasons, run

from graphopt.registry import pass_class

FOLD = pass_class("fold-pad")()
KERNEL = ", ".join(f"{i}.5" for i in range(9))


def model(reader: str, pads: str = "0,0,1,2,0,0,3,1", value: str = "0.0", before: str = "s = Relu(x)") -> str:
    return f"""g (float[N,1,6,6] x) => (float[N,1,H,W] y)
    <float[1,1,3,3] w = {{{KERNEL}}}, int64[8] p = {{{pads}}}, float v = {{{value}}}>
    {{ {before} t = Pad(s, p, v) {reader} }}"""


def wanted(reader: str) -> str:
    return f"""g (float[N,1,6,6] x) => (float[N,1,H,W] y) <float[1,1,3,3] w = {{{KERNEL}}}>
    {{ s = Relu(x) {reader} }}"""


@pytest.mark.parametrize(
    ("reader", "after", "pads"),
    [
        ("y = Conv(t, w)", "y = Conv <pads: ints = [1,2,3,1]> (s, w)", "0,0,1,2,0,0,3,1"),
        (
            'y = Conv <auto_pad: string = "VALID", strides: ints = [2,2]> (t, w)',
            "y = Conv <pads: ints = [1,2,3,1], strides: ints = [2,2]> (s, w)",
            "0,0,1,2,0,0,3,1",
        ),
        ("y = Conv <pads: ints = [1,1,1,1]> (t, w)", "y = Conv <pads: ints = [2,3,4,2]> (s, w)", "0,0,1,2,0,0,3,1"),
        (
            'y = Conv <auto_pad: string = "SAME_UPPER", strides: ints = [2,2]> (t, w)',
            "y = Conv <pads: ints = [2,2,1,1], strides: ints = [2,2]> (s, w)",
            "0,0,1,1,0,0,0,0",
        ),
        (
            "y = AveragePool <kernel_shape: ints = [3,3]> (t)",
            "y = AveragePool <kernel_shape: ints = [3,3], pads: ints = [1,1,1,0], count_include_pad: int = 1> (s)",
            "0,0,1,1,0,0,1,0",
        ),
        (
            "y = MaxPool <kernel_shape: ints = [3,3]> (t)",
            "y = MaxPool <kernel_shape: ints = [3,3], pads: ints = [1,1,1,0]> (s)",
            "0,0,1,1,0,0,1,0",
        ),
    ],
)
def test_folds(reader: str, after: str, pads: str) -> None:
    expect(model(reader, pads), wanted(after), FOLD)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (model("y = Conv(t, w)", value="1.0"), "pads with 0, not with 1"),
        (model("y = Conv(t, w)", pads="1,0,0,0,0,0,0,0"), "batch"),
        (model("y = Conv(t, w)", pads="0,0,-1,0,0,0,0,0"), "crops"),
        (model("z = Abs(t) y = Conv(t, w)").replace(" y)", " y, float[N,1,A,B] z)"), "Abs reads it too"),
        (model("y = MaxPool <kernel_shape: ints = [3,3]> (t)", before="s = Neg(x)"), "may be less than 0"),
        (model("y = MaxPool <kernel_shape: ints = [3,3]> (t)"), "as wide as its kernel"),
        (
            model("y = AveragePool <kernel_shape: ints = [3,3], pads: ints = [1,1,1,1]> (t)", pads="0,0,1,1,0,0,1,1"),
            "does not count its own padding",
        ),
        (
            model("y = MaxPool <kernel_shape: ints = [3,3], ceil_mode: int = 1> (t)", pads="0,0,1,1,0,0,1,1"),
            "rounds its size up",
        ),
    ],
)
def test_does_not_fire(text: str, reason: str) -> None:
    assert reason in reasons(expect(text, None, FOLD))


def test_reflection_stays() -> None:
    text = model("y = Conv(t, w)").replace("t = Pad(", 't = Pad <mode: string = "reflect"> (')
    assert "mode=reflect" in reasons(expect(text, None, FOLD))


def test_padding_below_everything_goes_into_max_pooling_of_any_tensor() -> None:
    found = parse(model("y = MaxPool <kernel_shape: ints = [3,3]> (t)", pads="0,0,1,1,0,0,1,1", before="s = Neg(x)"))
    found.graph.initializers["v"].const_value = ir.tensor(np.float32(-np.inf), name="v")
    feeds = random_feeds(found)
    reference = run(found, feeds)
    assert FOLD.run(found, context()).changed
    assert [n.op_type for n in found.graph] == ["Neg", "MaxPool"]
    assert_close(run(found, feeds), reference)


def test_all_readers_or_none() -> None:
    found = parse(
        model("a = Conv(t, w) b = Conv <strides: ints = [2,2]> (t, w)").replace(
            "float[N,1,H,W] y", "float[N,1,A,B] a, float[N,1,C,D] b"
        )
    )
    feeds = random_feeds(found)
    reference = run(found, feeds)
    assert FOLD.run(found, context()).changed
    assert sorted(n.op_type for n in found.graph) == ["Conv", "Conv", "Relu"]
    assert_close(run(found, feeds), reference)


def test_axes_and_the_attributes_of_old_opsets() -> None:
    expect(
        """<ir_version: 8, opset_import: ["" : 18]> g (float[N,1,6,6] x) => (float[N,1,H,W] y)
        <float[1,1,3,3] w = {1.0,2.0,3.0,4.0,5.0,6.0,7.0,8.0,9.0}, int64[2] p = {1, 2}, int64[1] a = {-1}>
        { t = Pad(x, p, , a) y = Conv(t, w) }""",
        """<ir_version: 8, opset_import: ["" : 18]> g (float[N,1,6,6] x) => (float[N,1,H,W] y)
        <float[1,1,3,3] w = {1.0,2.0,3.0,4.0,5.0,6.0,7.0,8.0,9.0}>
        { y = Conv <pads: ints = [0,1,0,2]> (x, w) }""",
        FOLD,
    )
    expect(
        """<ir_version: 8, opset_import: ["" : 10]> g (float[N,1,6,6] x) => (float[N,1,H,W] y)
        <float[1,1,1,1] w = {2.0}>
        { t = Pad <pads: ints = [0,0,1,1,0,0,1,1]> (x) y = Conv(t, w) }""",
        """<ir_version: 8, opset_import: ["" : 10]> g (float[N,1,6,6] x) => (float[N,1,H,W] y)
        <float[1,1,1,1] w = {2.0}> { y = Conv <pads: ints = [1,1,1,1]> (x, w) }""",
        FOLD,
    )
