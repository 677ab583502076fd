from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from golden import assert_close, context, expect, parse, random_feeds, reasons, run
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from graphopt.base import Context, Effect, Pass, PassResult
from graphopt.registry import pass_class
from graphopt.rewriting.edit import new_initializer
from graphopt.rewriting.scopes import graphs
from graphopt.rewriting.size import size

FOLD = pass_class("fold")()


def test_members_make_work_for_each_other() -> None:
    # The Reshape is an identity only once Shape is resolved, the Mul is beside the Conv only once the Dropout is gone,
    # and the two branches are equal only after all of it.
    result = expect(
        """g (float[2,1,4,4] x) => (float[2,2,4,4] y)
        <float[2] s = {2.0, 2.0}, float[2] b = {0.0, 1.0}, float[2] m = {0.0, 0.0}, float[2] v = {4.0, 1.0},
         float[2,1,1] k = {3.0, 5.0}>
        { w = Constant <value = float[2,1,1,1] {1.0, 2.0}> () h = Shape(x) xr = Reshape(x, h)
          c = Conv(xr, w) n = BatchNormalization <epsilon: float = 0.0> (c, s, b, m, v) d = Dropout(n) p = Mul(d, k)
          i = Identity(p) q = Relu(i) r = Relu(p) z = Add(q, r) unread = Neg(z) y = Abs(z) }""",
        """g (float[2,1,4,4] x) => (float[2,2,4,4] y) <float[2,1,1,1] w = {3.0, 20.0}, float[2] b = {0.0, 5.0}>
        { p = Conv(x, w, b) q = Relu(p) z = Add(q, q) y = Abs(z) }""",
        FOLD,
    )
    rows = result.details["what each member changed"]
    assert {row["pass"] for row in rows} >= {"fold-constants", "fold-batchnorm", "fold-conv-affine"}
    assert sum(row["nodes"] for row in rows) == -8


def test_a_second_run_changes_nothing() -> None:
    model = parse("""g (float[N,2] x) => (float[N,2] y) <float k = {1.0}>
    { t = Mul(x, k) u = Identity(t) y = Relu(u) }""")
    assert FOLD.run(model, context()).changed
    again = FOLD.run(model, context())
    assert not again.changed
    assert not again.notes


@dataclass(frozen=True)
class Grow(Pass):
    name: ClassVar[str] = "remove-identities"
    effect: ClassVar[Effect] = Effect.EXACT

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        new_initializer(model.graph, "ballast", np.zeros(100), ir.DataType.FLOAT)
        node = model.graph[0]
        node.replace_input_with(0, model.graph.initializers["ballast"])
        return PassResult(changed=True)


@dataclass(frozen=True)
class Restless(Pass):
    name: ClassVar[str] = "remove-identities"
    effect: ClassVar[Effect] = Effect.EXACT

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        return PassResult(changed=True)


def with_member(member: type[Pass]) -> Context:
    def resolve(name: str) -> type[Pass]:
        return member if name == member.name else pass_class(name)

    return replace(context(), resolve=resolve)


def test_growth_that_is_allowed_is_not_undone() -> None:
    text = """g (float[1] x) => (float[1000] y)
    { k = Constant <value = int64[1] {1000}> () t = ConstantOfShape(k) c = Cos(t) y = Mul(x, c) }"""
    kept, stored = parse(text), parse(text)
    FOLD.run(kept, context())
    result = replace(FOLD, max_growth=4000).run(stored, context())
    assert [node.op_type for node in kept.graph] == ["ConstantOfShape", "Cos", "Mul"]
    assert [node.op_type for node in stored.graph] == ["Mul"]
    assert not any("undone" in note for note in result.notes)


def test_a_member_that_enlarges_the_model_is_undone() -> None:
    model = parse("g (float[N,2] x) => (float[N,2] y) { y = Relu(x) }")
    result = FOLD.run(model, with_member(Grow))
    assert not result.changed
    assert any("remove-identities undone: it made the model larger" in note for note in result.notes)
    assert not model.graph.initializers
    assert model.graph[0].inputs[0] is model.graph.inputs[0]


def test_the_bound_on_rounds_is_said() -> None:
    model = parse("g (float[N,2] x) => (float[N,2] y) { y = Relu(x) }")
    result = pass_class("fold")(rounds=3).run(model, with_member(Restless))
    assert any("stopped after 3 rounds" in note for note in result.notes)


def test_options_reach_the_members() -> None:
    model = parse("g (float[N,2] x) => (float[N,2] y) <float k = {0.0}> { t = Add(x, k) y = Relu(t) }")
    assert not pass_class("fold")(keep_signed_zero=True).run(model, context()).changed
    assert FOLD.run(model, context()).changed


def test_equal_input_gives_equal_output() -> None:
    text = """g (float[N,1,4,4] x) => (float[N,2,4,4] y)
    <float[2,1,1,1] w = {1.0, 2.0}, float[2] s = {2.0, 2.0}, float[2] b = {0.5, 1.0}, float[2] m = {0.0, 0.0},
    float[2] v = {4.0, 1.0}>
    { t = Conv(x, w) y = BatchNormalization(t, s, b, m, v) }"""
    written = []
    for _ in range(2):
        model = parse(text)
        FOLD.run(model, context())
        written.append(ir.to_proto(model).SerializeToString(deterministic=True))
    assert written[0] == written[1]


def test_reasons_of_all_members_are_reported_once() -> None:
    text = """g (float[N,2,4,4] x) => (float[N,2,4,4] y, float[N,2,4,4] z)
    <float[2] s = {2.0, 2.0}, float[2] b = {0.5, 1.0}, float[2] m = {0.0, 0.0}, float[2] v = {4.0, 1.0}>
    { t = Relu(x) [norm] y = BatchNormalization(t, s, b, m, v) [same] z = Identity(y) }"""
    told = reasons(FOLD.run(parse(text), context()))
    assert told.count("norm: ") == 1
    assert "same: " in told


# -- random graphs ---------------------------------------------------------------------------------------------------


@st.composite
def networks(draw: st.DrawFn) -> onnx.ModelProto:
    """Small convolutional graphs with shared weights, branches, concatenations and constants of every kind."""
    generator = np.random.default_rng(draw(st.integers(0, 2**16)))
    nodes: list[onnx.NodeProto] = []
    weights: dict[str, np.ndarray[Any, Any]] = {}
    tensors: list[tuple[str, int]] = [("x", 2)]

    def weight(*shape: int, positive: bool = False) -> str:
        same = [n for n, w in weights.items() if w.shape == shape and (not positive or (w > 0).all())]
        if same and draw(st.integers(0, 3)) == 0:
            return same[draw(st.integers(0, len(same) - 1))]
        name = f"w{len(weights)}"
        data = generator.uniform(0.5, 2.0, shape) if positive else generator.standard_normal(shape)
        weights[name] = data.astype(np.float32)
        return name

    def add(op: str, inputs: list[str], channels: int, **attributes: Any) -> None:
        name = f"t{len(nodes)}"
        nodes.append(helper.make_node(op, inputs, [name], name=f"n{len(nodes)}", **attributes))
        tensors.append((name, channels))

    for _ in range(draw(st.integers(2, 9))):
        # Mostly go on from the newest tensor, so that chains arise.
        name, channels = tensors[-1 if draw(st.integers(0, 3)) else draw(st.integers(0, len(tensors) - 1))]
        kind = draw(
            st.sampled_from(
                [
                    "conv",
                    "conv",
                    "bn",
                    "bn",
                    "relu",
                    "affine",
                    "add",
                    "concat",
                    "identity",
                    "transposed",
                    "cast",
                    "twin",
                ]
            )
        )
        if kind == "conv":
            groups = draw(st.sampled_from([1, channels]))
            out = draw(st.sampled_from([1, 2])) * groups
            kernel = draw(st.sampled_from([1, 3]))
            inputs = [name, weight(out, channels // groups, kernel, kernel)]
            if draw(st.booleans()):
                inputs.append(weight(out))
            pad = kernel // 2
            add("Conv", inputs, out, group=groups, pads=[pad] * 4)
        elif kind == "transposed":
            inputs = [name, weight(channels, 2, 3, 3)]
            add("ConvTranspose", inputs, 2, pads=[1] * 4)
        elif kind == "bn":
            statistics = [weight(channels), weight(channels), weight(channels), weight(channels, positive=True)]
            add("BatchNormalization", [name, *statistics], channels)
        elif kind == "relu":
            add("Relu", [name], channels)
        elif kind == "affine":
            shape = draw(st.sampled_from([(), (1,), (channels, 1, 1), (1, channels, 1, 1), (6,)]))
            k = weight(*shape, positive=True)
            op = draw(st.sampled_from(["Mul", "Add", "Sub", "Div"]))
            add(op, [name, k] if draw(st.booleans()) or op == "Div" else [k, name], channels)
        elif kind == "add":
            other = [n for n, c in tensors if c == channels]
            add("Add", [name, other[draw(st.integers(0, len(other) - 1))]], channels)
        elif kind == "concat":
            other_name, other_channels = tensors[draw(st.integers(0, len(tensors) - 1))]
            if channels + other_channels <= 8:
                add("Concat", [name, other_name], channels + other_channels, axis=1)
        elif kind == "identity":
            add("Identity", [name], channels)
        elif kind == "cast":
            add("Cast", [name], channels, to=1)
        elif kind == "twin" and nodes:
            twin = onnx.NodeProto()
            twin.CopyFrom(nodes[-1])
            twin.name, twin.output[0] = f"n{len(nodes)}", f"t{len(nodes)}"
            nodes.append(twin)
            first, channels = tensors[-1]
            tensors.append((twin.output[0], channels))
            # They meet, so that neither is dead code.
            add("Add", [first, twin.output[0]], channels)
    outputs = {tensors[-1]} | {t for t in tensors[1:] if draw(st.integers(0, 5)) == 0}
    if tensors[-1][0] == "x":
        nodes.append(helper.make_node("Relu", ["x"], ["t"], name="n"))
        outputs = {("t", 2)}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", 1, ["N", 2, 6, 6])],
        [helper.make_tensor_value_info(n, 1, ["N", c, 6, 6]) for n, c in sorted(outputs)],
        [numpy_helper.from_array(w, n) for n, w in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(networks())
def test_random_networks_compute_the_same(proto: onnx.ModelProto) -> None:
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    feeds = random_feeds(model)
    with np.errstate(all="ignore"):
        reference = run(model, feeds)
        before = size(model)
        names = [v.name for v in model.graph.outputs]
        FOLD.run(model, context())
        after = size(model)
        assert [v.name for v in model.graph.outputs] == names
        assert after.nodes <= before.nodes
        assert after.bytes <= before.bytes
        assert_close(run(model, feeds), reference, tolerance=1e-4)


def test_random_networks_do_exercise_the_rules() -> None:
    """The property above would hold for a pass that does nothing."""
    fired: set[str] = set()

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(networks())
    def collect(proto: onnx.ModelProto) -> None:
        model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
        result = FOLD.run(model, context())
        fired.update(row["pass"] for row in result.details.get("what each member changed", []))

    collect()
    assert fired >= {"fold-constants", "fold-batchnorm", "fold-conv-affine", "merge-common-subexpressions"}


def test_no_node_refers_to_what_is_gone() -> None:
    model = parse(
        """g (bool c, float[1,1,4,4] x) => (float[1,1,4,4] y)
        <float[1,1,1,1] w = {2.0}, float[1] s = {2.0}, float[1] b = {0.5}, float[1] m = {0.0}, float[1] v = {4.0}>
        { t = Conv(x, w) u = BatchNormalization(t, s, b, m, v) y = If (c) <
            then_branch = p () => (float[1,1,4,4] p0) { i = Identity(u) p0 = Add(i, u) },
            else_branch = q () => (float[1,1,4,4] q0) { q0 = Relu(u) } > }"""
    )
    feeds = {"c": np.array(True), "x": np.random.default_rng(0).standard_normal((1, 1, 4, 4)).astype(np.float32)}
    reference = run(model, feeds)
    FOLD.run(model, context())
    assert [n.op_type for n in model.graph] == ["Conv", "If"]
    present = {n for g in graphs(model) for n in g}
    for graph in graphs(model):
        for node in graph:
            for value in node.inputs:
                assert value is None or value.producer() is None or value.producer() in present
    assert_close(run(model, feeds), reference)


@pytest.mark.parametrize("last", ["y = Identity(t)", "o = Constant <value_ints = [1]> () y = Squeeze(r, o)"])
def test_a_stale_output_shape_is_not_believed(last: str) -> None:
    # The file declares a batch of 1 for y, as exporters do; the input is dynamic.
    text = """g (float[N,4] x) => (float[1,4] y, int64[B] z) <int64[3] k = {-1, 1, 4}>
    { t = Relu(x) r = Reshape(t, k) %s s = Shape(t) z = Abs(s) }"""
    model = parse(text % last)
    FOLD.run(model, context())
    out = run(model, {"x": np.ones((3, 4), np.float32)})
    assert out[0].shape == (3, 4)
    assert out[1].tolist() == [3, 4]


LOOP = """g (int64 n, bool go, float[1,1,4,4] x) => (float[1,1,4,4] y, float[A,B] h)
<float[1,1,1,1] w = {2.0}, float[1] s = {2.0}, float[1] b = {0.5}, float[1] m = {0.0}, float[1] v = {4.0}>
{ y, h = Loop (n, go, x) <body = body (int64 i, bool c, float[1,1,4,4] p) => (bool d, float[1,1,4,4] q, float[2] r) {
    one = Constant <value = float {1.0}> () t = Conv(p, w) u = BatchNormalization(t, s, b, m, v) q = Mul(u, one)
    d = Identity(c) k = Constant <value = float[2] {1.0, 2.0}> () e = Add(k, k) f = Cast <to: int = 1> (i)
    r = Mul(e, f) } > }"""


def test_loop_bodies() -> None:
    model = parse(LOOP)
    feeds = {
        "n": np.array(3),
        "go": np.array(True),
        "x": np.random.default_rng(0).standard_normal((1, 1, 4, 4)).astype(np.float32),
    }
    reference = run(model, feeds)
    FOLD.run(model, context())
    body = model.graph[0].attributes["body"].as_graph()
    # The condition is passed on by an Identity that has to stay.
    assert sorted(n.op_type for n in body) == ["Cast", "Conv", "Identity", "Mul"]
    assert_close(run(model, feeds), reference)


def test_silent_without_work() -> None:
    result = FOLD.run(parse("g (float[N,2] x) => (float[N,2] y) { y = Relu(x) }"), context())
    assert result == PassResult(changed=False)


@pytest.mark.parametrize("rounds", [0, -1])
def test_rounds_must_be_positive(rounds: int) -> None:
    from graphopt.errors import UsageError

    with pytest.raises(UsageError):
        pass_class("fold")(rounds=rounds)
