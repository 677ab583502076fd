from __future__ import annotations

import numpy as np
import pytest
from golden import HEADER, assert_close, context, expect, parse, random_feeds, reasons, run

from graphopt.registry import pass_class

FOLD = pass_class("fold-constants")()


def test_arithmetic_on_constants() -> None:
    expect(
        """g (float[N,2] x) => (float[N,2] y) <float[2] a = {1.0, 2.0}, float[2] b = {3.0, 4.0}>
        { t = Add(a, b) u = Mul(t, t) y = Add(x, u) }""",
        "g (float[N,2] x) => (float[N,2] y) <float[2] u = {16.0, 36.0}> { y = Add(x, u) }",
        FOLD,
    )


@pytest.mark.parametrize("opset", [9, 13, 15])
def test_normalised_constants_are_what_the_runtime_makes_of_them(opset: int) -> None:
    """The reference evaluator of onnx 1.23 takes mean and variance of the batch below opset 14."""
    model = parse(
        f"""<ir_version: 7, opset_import: ["" : {opset}]> g (float[N,2] x) => (float[N,2] y)
        <float[1,2] k = {{1.0, 2.0}}, float[2] s = {{1.0, 2.0}}, float[2] b = {{3.0, 4.0}}, float[2] m = {{5.0, 6.0}},
         float[2] v = {{1.0, 4.0}}> {{ t = BatchNormalization(k, s, b, m, v) y = Add(x, t) }}"""
    )
    feeds = random_feeds(model)
    before = run(model, feeds)
    FOLD.run(model, context())
    assert_close(run(model, feeds), before)


def test_name_and_provenance_of_a_folded_value() -> None:
    model = parse(
        """g (float[N,2] x) => (float[N,2] y) <float[2] a = {1.0, 2.0}, float[2] b = {3.0, 4.0}>
        { t = Add(a, b) y = Add(x, t) }"""
    )
    FOLD.run(model, context())
    assert list(model.graph.initializers) == ["t"]
    assert model.graph.initializers["t"].metadata_props == {"graphopt.folded_from": "a,b"}


def test_constant_nodes_become_initializers_by_reference() -> None:
    model = parse("""g (float[N,2] x) => (float[N,2] y)
    { k = Constant <value = float[2] {1.0, 2.0}> () y = Add(x, k) }""")
    tensor = model.graph[0].attributes["value"].as_tensor()
    result = FOLD.run(model, context())
    assert model.graph.initializers["k"].const_value is tensor
    assert result.notes == ["1 Constant nodes became initializers"]


def test_constants_of_bodies_stay_in_the_body() -> None:
    model = parse(
        """g (bool c, float[2] x) => (float[2] y) { y = If (c) <
             then_branch = a () => (float[2] p) { k = Constant <value = float[2] {1.0, 2.0}> () p = Add(x, k) },
             else_branch = d () => (float[2] q) { q = Constant <value = float[2] {5.0, 6.0}> () } > }"""
    )
    x = np.ones(2, np.float32)
    FOLD.run(model, context())
    attributes = model.graph[0].attributes
    assert list(attributes["then_branch"].as_graph().initializers) == ["k"]
    # A body whose output is an initializer is refused by several runtimes.
    assert [n.op_type for n in attributes["else_branch"].as_graph()] == ["Constant"]
    for condition, wanted in ((True, [2, 3]), (False, [5, 6])):
        np.testing.assert_array_equal(run(model, {"c": np.array(condition), "x": x})[0], wanted)


@pytest.mark.parametrize(("condition", "operator"), [(1, "Relu"), (0, "Neg")])
def test_an_if_whose_condition_is_constant_becomes_its_branch(condition: int, operator: str) -> None:
    expect(
        f"""g (float[2] x) => (float[2] y) {{ c = Constant <value = bool {{{condition}}}> () y = If (c) <
             then_branch = a () => (float[2] p) {{ p = Relu(x) }},
             else_branch = d () => (float[2] q) {{ q = Neg(x) }} > }}""",
        f"g (float[2] x) => (float[2] y) {{ y = {operator}(x) }}",
        FOLD,
    )


def test_the_branch_not_taken_frees_what_it_captured() -> None:
    model = parse(
        """g (float[2] x) => (float[2] y) <float[2] w = {1.0, 2.0}> {
           c = Constant <value = bool {1}> () t = Neg(x) y = If (c) <
             then_branch = a () => (float[2] p) { p = Relu(x) },
             else_branch = d () => (float[2] q) { q = Add(t, w) } > }"""
    )
    FOLD.run(model, context())
    assert [n.op_type for n in model.graph] == ["Relu"]
    assert not model.graph.initializers
    assert len(tuple(model.graph.inputs[0].uses())) == 1


def test_shape_arithmetic_with_static_dimensions() -> None:
    expect(
        """g (float[2,3,4] x) => (float[2,12] y) { s = Shape(x) i = Constant <value = int64 {0}> () n = Gather(s, i)
           z = Constant <value = int64[1] {0}> () u = Unsqueeze(n, z) m = Constant <value = int64[1] {-1}> ()
           k = Concat <axis: int = 0> (u, m) t = Reshape(x, k) y = Relu(t) }""",
        "g (float[2,3,4] x) => (float[2,12] y) <int64[2] k = {2, -1}> { t = Reshape(x, k) y = Relu(t) }",
        FOLD,
    )


@pytest.mark.parametrize("take", ["Gather(s, i)", "Slice(s, i, j)"])
def test_symbolic_dimensions_stay_symbolic(take: str) -> None:
    text = f"""g (float[N,3,4] x) => (float[A,B] y) <int64[1] i = {{%d}}, int64[1] j = {{%d}}, int64[1] m = {{-1}}>
    {{ s = Shape(x) n = {take} k = Concat <axis: int = 0> (n, m) t = Reshape(x, k) y = Relu(t) }}"""
    # dimension 0 is symbolic
    model = parse(text % (0, 1))
    FOLD.run(model, context())
    assert "Shape" in [n.op_type for n in model.graph]
    for n in (1, 5):
        out = run(model, {"x": np.ones((n, 3, 4), np.float32)})[0]
        assert out.shape == (n, 12)
    # dimension 1 is 3, whatever N is
    expect(
        text % (1, 2),
        "g (float[N,3,4] x) => (float[A,B] y) <int64[2] k = {3, -1}> { t = Reshape(x, k) y = Relu(t) }",
        FOLD,
    )


@pytest.mark.parametrize(
    "cone",
    [
        "k = Constant <value = int64[2] {1000, 8}> () t = Expand(a, k)",
        "k = Constant <value = int64[1] {1000}> () t = Tile(a, k)",
        "k = Constant <value = int64[1] {8000}> () t = ConstantOfShape <value = float[1] {0.5}> (k)",
        "s = Constant <value_int = 0> () e = Constant <value_int = 8000> () d = Constant <value_int = 1> () "
        "r = Range(s, e, d) t = Cast <to: int = 1> (r)",
    ],
)
def test_does_not_inflate(cone: str) -> None:
    text = f"""g (float[1] x) => (float[A] y) <float[8] a = {{1.0,2.0,3.0,4.0,5.0,6.0,7.0,8.0}}>
    {{ {cone} y0 = Mul(x, t) y1 = Add(y0, a0) y = Relu(y1) }}""".replace("a0", "x")
    model = parse(text.replace("float[A] y", "float[A,B] y" if "Expand" in cone else "float[A] y"))
    feeds = random_feeds(model)
    reference = run(model, feeds)
    result = FOLD.run(model, context())
    assert "takes more room than what it replaces" in reasons(result)
    assert sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value) < 200
    assert_close(run(model, feeds), reference)
    allowed = parse(text.replace("float[A] y", "float[A,B] y" if "Expand" in cone else "float[A] y"))
    pass_class("fold-constants")(max_growth=100_000).run(allowed, context())
    assert [n.op_type for n in allowed.graph] == ["Mul", "Add", "Relu"]


def test_a_cone_that_shrinks_folds_although_a_step_inflates() -> None:
    model = parse(
        """g (float[1] x) => (float[1] y) <float[8] a = {1.0,2.0,3.0,4.0,5.0,6.0,7.0,8.0}>
        { k = Constant <value = int64[2] {1000, 8}> () t = Expand(a, k)
          s = ReduceSum <keepdims: int = 0> (t) y = Mul(x, s) }"""
    )
    FOLD.run(model, context())
    assert [n.op_type for n in model.graph] == ["Mul"]


def test_limits_are_options_and_reasons_name_them() -> None:
    text = """g (float[2,2] x) => (float[2,2] y) <float[2,2] a = {1.0,2.0,3.0,4.0}>
    { t = Transpose <perm: ints = [1,0]> (a) y = MatMul(x, t) }"""
    result = expect(text, None, pass_class("fold-constants")(max_bytes=8))
    assert "a tensor above max_bytes=8 is involved" in reasons(result)
    assert FOLD.run(parse(text), context()).changed


def test_a_tied_weight_is_not_duplicated_transposed() -> None:
    numbers = ", ".join(f"{i}.0" for i in range(128))
    text = f"""g (int64[N] i) => (float[N,32] y) <float[32,4] e = {{{numbers}}}>
    {{ t = Gather(e, i) w = Transpose <perm: ints = [1,0]> (e) y = MatMul(t, w) }}"""
    assert "takes more room than what it replaces" in reasons(expect(text, None, FOLD))


def test_quantised_weights_stay_quantised() -> None:
    text = """g (float[N,2] x) => (float[N,2] y) <int8[2,2] q = {1,2,3,4}, float s = {0.5}, int8 z = {0}>
    { w = DequantizeLinear(q, s, z) y = MatMul(x, w) }"""
    expect(text, None, FOLD)


def test_random_operators_stay() -> None:
    expect("g (float[2] x) => (float[2] y) { r = RandomNormal <shape: ints = [2]> () z = Mul(r, x) y = Sub(z, z) }",
           None, FOLD, runnable=False)  # fmt: skip


def test_graph_output_that_is_constant_stays_an_output() -> None:
    text = """g (float[2] x) => (float[2] y, float[2] z) <float[2] a = {1.0, 2.0}> { y = Relu(x) z = Add(a, a) }"""
    assert "computes an output of the graph" in reasons(expect(text, None, FOLD))


def test_nan_and_infinity_are_computed_as_they_are() -> None:
    model = parse(
        """g (float[1] x) => (float[1] y) <float[1] a = {1.0}, float[1] b = {0.0}>
        { i = Div(a, b) n = Mul(i, b) y = Add(x, n) }"""
    )
    FOLD.run(model, context())
    assert [n.op_type for n in model.graph] == ["Add"]
    assert np.isnan(run(model, {"x": np.ones(1, np.float32)})[0]).all()


def test_overridable_initializers() -> None:
    text = """<ir_version: 3, opset_import: ["" : 9]>
    g (float[2] x, float[2] a) => (float[2] y) <float[2] a = {1.0, 2.0}> { t = Neg(a) y = Add(x, t) }"""
    model = parse(text)
    result = FOLD.run(model, context())
    assert [v.name for v in model.graph.inputs] == ["x"]
    assert [n.op_type for n in model.graph] == ["Add"]
    assert any("1 initializers were also graph inputs" in note for note in result.notes)
    kept = parse(text)
    assert not pass_class("fold-constants")(keep_overridable=True).run(kept, context()).changed
    assert [v.name for v in kept.graph.inputs] == ["x", "a"]
    assert kept.ir_version == 3


def test_what_cannot_be_evaluated_is_said_and_not_printed(capfd: pytest.CaptureFixture[str]) -> None:
    model = parse(
        HEADER
        + """g (float[2] x) => (float[2] y) <float[2] a = {1.0, 2.0}, int64[1] i = {7}>
        { [out_of_range] t = Gather(a, i) y = Add(x, t) }"""
    )
    result = FOLD.run(model, context())
    assert any("out_of_range" in note for note in result.notes)
    assert capfd.readouterr().err == ""
