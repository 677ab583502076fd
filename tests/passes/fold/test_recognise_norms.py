"""Normalisations in every spelling, and formulas that nearly are one."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from golden import assert_close, context, expect, parse, random_feeds, reasons, run

from graphopt.registry import pass_class

RECOGNISE = pass_class("recognise-norms")()
CONSTANTS = """float eps = {0.00001}, float two = {2.0}, float one = {1.0}, float half = {0.5}, float third = {0.5},
    float minus = {-0.5}, int64[1] ax = {-1}, float[4] g = {0.5, 1.0, 1.5, 2.0}, float[4] b = {1.0, -1.0, 0.5, 0.25},
    float[1,1,4] g3 = {0.5, 1.0, 1.5, 2.0}, float[3,1] gc = {0.5, 1.0, 1.5}, float unbiased = {1.3333334}"""


def text(body: str, opset: int = 23, shape: str = "N,3,4") -> str:
    return f"""<ir_version: 10, opset_import: ["" : {opset}]>
        g (float[{shape}] x) => (float[{shape}] y) <{CONSTANTS}> {{ {body} }}"""


MEAN = "m = ReduceMean (x, ax) d = Sub (x, m)"
VARIANCE = "s = Mul (d, d) v = ReduceMean (s, ax) w = Add (v, eps)"
LAYER = [
    f"{MEAN} {VARIANCE} q = Sqrt (w) n = Div (d, q) h = Mul (n, g) y = Add (h, b)",
    f"{MEAN} s = Pow (d, two) v = ReduceMean (s, ax) w = Add (eps, v) q = Sqrt (w) n = Div (d, q) h = Mul (g, n) "
    "y = Add (b, h)",
    f"{MEAN} {VARIANCE} q = Sqrt (w) r = Reciprocal (q) n = Mul (d, r) h = Mul (n, g) y = Add (h, b)",
    f"{MEAN} {VARIANCE} q = Sqrt (w) r = Div (one, q) n = Mul (r, d) h = Mul (n, g3) y = Add (h, b)",
    f"{MEAN} {VARIANCE} q = Pow (w, half) n = Div (d, q) h = Mul (n, g) y = Add (h, b)",
    f"{MEAN} {VARIANCE} r = Pow (w, minus) i = Mul (r, g) h = Mul (d, i) y = Add (h, b)",
    f"{MEAN} e = Sub (x, m) s = Mul (e, e) v = ReduceMean (s, ax) w = Add (v, eps) q = Sqrt (w) n = Div (d, q) "
    "h = Mul (n, g) y = Add (h, b)",
    f"{MEAN} {VARIANCE} q = Sqrt (w) r = Reciprocal (q) i = Mul (r, g) a = Mul (x, i) c = Mul (m, i) k = Sub (b, c) "
    "y = Add (a, k)",
]
SCALED = [f"{MEAN} {VARIANCE} q = Sqrt (w) n = Div (d, q) y = Mul (n, g)"]
BARE = [f"{MEAN} {VARIANCE} q = Sqrt (w) y = Div (d, q)"]
RMS = [
    "s = Mul (x, x) v = ReduceMean (s, ax) w = Add (v, eps) q = Sqrt (w) r = Reciprocal (q) n = Mul (x, r) "
    "y = Mul (g, n)",
    "s = Pow (x, two) v = ReduceMean (s, ax) w = Add (v, eps) q = Sqrt (w) n = Div (x, q) y = Mul (n, g)",
    "s = Pow (x, two) v = ReduceMean (s, ax) w = Add (v, eps) r = Pow (w, minus) n = Mul (x, r) y = Mul (n, g3)",
]
EPSILON = "epsilon: float = 0.00001"
ONES = "o = Constant <value = float[4] {1.0, 1.0, 1.0, 1.0}> ()"
FOUND = {
    f"y = LayerNormalization <axis: int = -1, {EPSILON}> (x, g, b)": LAYER,
    f"y = LayerNormalization <axis: int = -1, {EPSILON}> (x, g)": SCALED,
    f"{ONES} y = LayerNormalization <axis: int = -1, {EPSILON}> (x, o)": BARE,
    f"y = RMSNormalization <axis: int = -1, {EPSILON}> (x, g)": RMS,
}
SPELLINGS = [(before, after) for after, spellings in FOUND.items() for before in spellings]


@pytest.mark.parametrize(("before", "after"), SPELLINGS)
def test_every_spelling(before: str, after: str) -> None:
    slow = before in SCALED  # with an unknown batch, as here
    expect(text(before), text(after), pass_class("recognise-norms")(slow=slow))


@pytest.mark.parametrize(("shape", "written"), [("4,3,4", True), ("1366,3,4", False), ("N,3,4", False)])
def test_a_scale_without_a_shift_where_one_operator_is_faster(shape: str, written: bool) -> None:
    model = parse(text(SCALED[0], 18, shape))
    result = RECOGNISE.run(model, context())
    assert result.changed == written
    assert ("fuse its parts to something faster (slow=true" in reasons(result)) != written


def test_axes_as_an_attribute_and_symbolic_sizes() -> None:
    body = (
        LAYER[0]
        .replace("ReduceMean (x, ax)", "ReduceMean <axes: ints = [2]> (x)")
        .replace("ReduceMean (s, ax)", "ReduceMean <axes: ints = [-1]> (s)")
    )
    after = f"y = LayerNormalization <axis: int = -1, {EPSILON}> (x, g, b)"
    expect(text(body, 17, "N,T,4"), text(after, 17, "N,T,4"), RECOGNISE)


def test_several_axes() -> None:
    body = LAYER[0].replace("(x, ax)", "(x, both)").replace("(s, ax)", "(s, both)")
    body = f"both = Constant <value = int64[2] {{-1, -2}}> () {body}"
    result = expect(
        text(body),
        text(f"""s = Constant <value = float[3,4]
        {{0.5, 1.0, 1.5, 2.0, 0.5, 1.0, 1.5, 2.0, 0.5, 1.0, 1.5, 2.0}}> () z = Constant <value = float[3,4]
        {{1.0, -1.0, 0.5, 0.25, 1.0, -1.0, 0.5, 0.25, 1.0, -1.0, 0.5, 0.25}}> ()
        y = LayerNormalization <axis: int = 1, {EPSILON}> (x, s, z)"""),
        RECOGNISE,
    )
    assert "1 LayerNormalization" in result.notes[0]


def test_over_the_positions_of_channels() -> None:
    body = SCALED[0].replace("y = Mul (n, g)", "h = Mul (n, gc) y = Add (h, gc)")
    expect(
        text(body),
        text(f"""s = Constant <value = float[3] {{0.5, 1.0, 1.5}}> ()
            y = InstanceNormalization <{EPSILON}> (x, s, s)"""),
        RECOGNISE,
    )


HALF = """<ir_version: 10, opset_import: ["" : 23]> g (float16[N,3,4] x) => (float16[N,3,4] y)
    <float eps = {0.00001}, float two = {2.0}, int64[1] ax = {-1}, float16[4] g = {15360, 14336, 15360, 16384},
     float16[4] b = {15360, 14336, 15360, 16384}> { %s }"""
WIDE = "c = Cast <to: int = 1> (x)"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (
            f"{WIDE} s = Pow (c, two) v = ReduceMean (s, ax) w = Add (v, eps) q = Sqrt (w) r = Reciprocal (q) "
            "n = Mul (c, r) t = Cast <to: int = 10> (n) y = Mul (g, t)",
            f"y = RMSNormalization <axis: int = -1, {EPSILON}> (x, g)",
        ),
        (
            f"{WIDE} m = ReduceMean (c, ax) d = Sub (c, m) {VARIANCE} q = Sqrt (w) n = Div (d, q) "
            "t = Cast <to: int = 10> (n) h = Mul (g, t) y = Add (h, b)",
            f"y = LayerNormalization <axis: int = -1, {EPSILON}> (x, g, b)",
        ),
    ],
)
def test_in_float32_between_casts(before: str, after: str) -> None:
    model, wanted = parse(HALF % before), parse(HALF % after)
    feeds = random_feeds(model)
    reference = run(model, feeds)
    assert RECOGNISE.run(model, context()).changed
    assert [n.op_type for n in model.graph] == [n.op_type for n in wanted.graph]
    assert_close(run(model, feeds), reference, 2e-3)


NEARLY = {
    "over another axis": LAYER[0].replace("ReduceMean (s, ax)", "ReduceMean <axes: ints = [1]> (s)"),
    "epsilon outside": f"{MEAN} s = Mul (d, d) v = ReduceMean (s, ax) u = Sqrt (v) q = Add (u, eps) n = Div (d, q) "
    "h = Mul (n, g) y = Add (h, b)",
    "unbiased": f"{MEAN} s = Mul (d, d) z = ReduceMean (s, ax) v = Mul (z, unbiased) w = Add (v, eps) q = Sqrt (w) "
    "n = Div (d, q) h = Mul (n, g) y = Add (h, b)",
    "of a cube": f"{MEAN} e = Mul (d, d) s = Mul (e, d) v = ReduceMean (s, ax) w = Add (v, eps) q = Sqrt (w) "
    "n = Div (d, q) h = Mul (n, g) y = Add (h, b)",
    "deviation of another tensor": f"{MEAN} a = Abs (x) {VARIANCE} q = Sqrt (w) n = Div (a, q) y = Mul (n, g)",
    "summed, not averaged": LAYER[0].replace("v = ReduceMean", "v = ReduceSum"),
    "times the root": LAYER[0].replace("Div (d, q)", "Mul (d, q)"),
}  # fmt: skip


@pytest.mark.parametrize("name", NEARLY)
def test_nearly(name: str) -> None:
    opset = 17 if "<axes" in NEARLY[name] else 23
    body = (
        NEARLY[name].replace("ReduceMean (x, ax)", "ReduceMean <axes: ints = [-1]> (x)")
        if opset == 17
        else NEARLY[name]
    )
    expect(text(body, opset, "N,4,4"), None, RECOGNISE)


def by_attribute(body: str) -> str:
    """The same before opset 18, where axes were attributes."""
    return body.replace(", ax)", ")").replace("ReduceMean", "ReduceMean <axes: ints = [-1]>")


@pytest.mark.parametrize(("inner", "last"), [("m", 1), ("d", 4), ("v", 1), ("q", 1)])
def test_what_is_read_elsewhere_stays(inner: str, last: int) -> None:
    body = text(by_attribute(f"{LAYER[0]} z = Cos ({inner})"), 17)
    body = body.replace("(float[N,3,4] y)", f"(float[N,3,4] y, float[N,3,{last}] z)")
    assert "LayerNormalization: something else reads what is inside" in reasons(expect(body, None, RECOGNISE))


def test_where_the_mean_is_read_elsewhere_the_rest_is_an_rms_norm() -> None:
    model = parse(text(f"{SCALED[0]} z = Cos (d)").replace("(float[N,3,4] y)", "(float[N,3,4] y, float[N,3,4] z)"))
    assert RECOGNISE.run(model, context()).changed
    assert [n.op_type for n in model.graph] == ["ReduceMean", "Sub", "RMSNormalization", "Cos"]


def test_with_its_scale_left_outside_where_that_is_no_constant() -> None:
    body = text(f"{BARE[0].replace('y =', 'n =')} k = Sigmoid (x) y = Mul (n, k)")
    model = parse(body)
    assert RECOGNISE.run(model, context()).changed
    assert [n.op_type for n in model.graph] == ["LayerNormalization", "Sigmoid", "Mul"]


def test_the_opset_is_told() -> None:
    body = text(by_attribute(LAYER[0]), 13)
    assert "opset 13 does not have it (since 17)" in reasons(expect(body, None, RECOGNISE))


def test_a_scale_of_ones_must_not_be_larger_than_what_goes() -> None:
    result = expect(text(BARE[0], shape="N,3,4096"), None, RECOGNISE)
    assert "more than the" in reasons(result)


def test_a_shared_scale_of_another_shape_is_not_copied() -> None:
    body = LAYER[0].replace("Mul (n, g)", "Mul (n, g3)").replace("y = Add (h, b)", "z = Add (h, b) y = Add (z, g3)")
    after = f"{ONES} n = LayerNormalization <axis: int = -1, {EPSILON}> (x, o) h = Mul (n, g3) z = Add (h, b)"
    expect(text(body, 23, "2,3,4"), text(f"{after} y = Add (z, g3)", 23, "2,3,4"), RECOGNISE)


def test_the_scale_keeps_its_name() -> None:
    model = parse(text(LAYER[0]))
    RECOGNISE.run(model, context())
    (node,) = model.graph
    assert [v.name for v in node.inputs if isinstance(v, ir.Value)] == ["x", "g", "b"]


def test_constant_rows_give_the_same() -> None:
    model = parse(text(LAYER[0]))
    x = np.full((1, 3, 4), 3.0, np.float32)
    reference = run(model, {"x": x})
    RECOGNISE.run(model, context())
    np.testing.assert_allclose(run(model, {"x": x})[0], reference[0], atol=1e-6)
