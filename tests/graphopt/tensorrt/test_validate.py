"""Every rule of TensorRT that a file can break, by faults planted in models that break none."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from golden import context
from text_graph import graph

from graphopt import calibration, registry
from graphopt.errors import ModelError
from graphopt.model import infer_shapes
from graphopt.passes.quantize import Quantize
from graphopt.tensorrt import Finding, validate
from graphopt.tensorrt.validate import parts, require_valid

JETSON = registry.target("jetson-orin")


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).normal(size=shape).astype(np.float32)


def net() -> ir.Model:
    """A copy of the model that obeys every rule."""
    return _net().clone()


@cache
def _net() -> ir.Model:
    """A residual block and a head, quantised for Jetson, float16 around the integers."""
    model = graph(
        "(float[N,4,8,8] x) => (float[N,3] y)",
        """a = Conv<pads=[1,1,1,1]>(x, w1, b1)  r = Relu(a)  c = Conv<pads=[1,1,1,1]>(r, w2, b2)  s = Add(c, r)
        t = Relu(s)  u = ConvTranspose(t, w3)  p = GlobalAveragePool(u)  h = Flatten(p)  m = MatMul(h, g)
        y = Gemm(m, k, j)""",
        w1=normal(8, 4, 3, 3) / 6, b1=normal(8) / 4, w2=normal(8, 8, 3, 3) / 8, b2=normal(8) / 4,
        w3=normal(8, 8, 2, 2) / 5, g=normal(8, 8) / 3, k=normal(8, 3) / 3, j=normal(3),
    )  # fmt: skip
    ctx: Any = dataclasses.replace(context(), target=JETSON)
    ctx = dataclasses.replace(ctx, calibration=calibration.load({"x": normal(8, 4, 8, 8)}, model))
    Quantize(sensitive="none", ranges="minmax").run(model, ctx)
    Quantize(scheme="fp16").run(model, ctx)
    infer_shapes(model)
    return model


def found(model: ir.Model, version: str = "10.3") -> dict[str, list[Finding]]:
    rules: dict[str, list[Finding]] = {}
    for finding in validate(model, JETSON, version):
        rules.setdefault(f"{finding.severity} {finding.rule}", []).append(finding)
    return rules


def weight_pair(model: ir.Model, op: str) -> ir.Node:
    layer = next(n for n in model.graph if n.op_type == op)
    return next(
        v.producer() for v in layer.inputs
        if v is not None and v.producer() is not None and v.producer().op_type == "DequantizeLinear"
        and v.producer().inputs[0].const_value is not None
    )  # fmt: skip


def set_input(model: ir.Model, node: ir.Node, index: int, array: np.ndarray) -> None:
    name = f"planted_{index}_{node.outputs[0].name}"
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name), type=None, shape=ir.Shape(array.shape))
    value.type = ir.TensorType(ir.DataType.from_numpy(array.dtype))
    model.graph.register_initializer(value)
    node.replace_input_with(index, value)


def test_what_is_quantised_for_the_target_breaks_no_rule() -> None:
    assert not found(net())
    assert not found(graph("(float[N,4] x) => (float[N,3] y)", "y = MatMul(x, w)", w=(4, 3)))


# -- planted faults ----------------------------------------------------------------------------------------------------


def off_zero(model: ir.Model) -> None:
    node = next(n for n in model.graph if n.op_type == "QuantizeLinear")
    set_input(model, node, 2, np.array(3, np.int8))


def unsigned(model: ir.Model) -> None:
    pair = weight_pair(model, "Conv")
    set_input(model, pair, 0, pair.inputs[0].const_value.numpy().astype(np.uint8))
    set_input(model, pair, 2, np.zeros(8, np.uint8))


def integer_bias(model: ir.Model) -> None:
    layer = next(n for n in model.graph if n.op_type == "Gemm")
    for name, array in (("bq", np.ones(3, np.int32)), ("bs", np.ones(3, np.float16))):
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        value.type, value.shape = ir.TensorType(ir.DataType.from_numpy(array.dtype)), ir.Shape(array.shape)
        model.graph.register_initializer(value)
    values = model.graph.initializers
    made = ir.node("DequantizeLinear", [values["bq"], values["bs"]], {"axis": 0}, name="bias_pair")
    made.outputs[0].type, made.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT16), ir.Shape([3])
    model.graph.insert_before(layer, made)
    layer.replace_input_with(2, made.outputs[0])


def wrong_axis(op: str, axis: int) -> Callable[[ir.Model], None]:
    def plant(model: ir.Model) -> None:
        pair = weight_pair(model, op)
        pair.attributes["axis"] = ir.AttrInt64("axis", axis)
        set_input(model, pair, 1, np.full(pair.inputs[0].shape[axis], 0.01, np.float16))

    return plant


def too_many_scales(model: ir.Model) -> None:
    set_input(model, weight_pair(model, "Conv"), 1, np.full(5, 0.01, np.float16))


def zero_scale(model: ir.Model) -> None:
    scales = np.full(8, 0.01, np.float16)
    scales[2] = 0
    set_input(model, weight_pair(model, "Conv"), 1, scales)


def activation_per_channel(model: ir.Model) -> None:
    node = [n for n in model.graph if n.op_type == "QuantizeLinear"][1]
    for each in (node, next(use.node for use in node.outputs[0].uses())):
        set_input(model, each, 1, np.full(8, 0.1, np.float16))
        set_input(model, each, 2, np.zeros(8, np.int8))


def no_zero_point(model: ir.Model) -> None:
    node = next(n for n in model.graph if n.op_type == "QuantizeLinear")
    node.resize_inputs(2)


def float_input(model: ir.Model) -> None:
    layer = next(n for n in model.graph if n.op_type == "Conv")
    quantizer = layer.inputs[0].producer().inputs[0].producer()
    cast = ir.node("Cast", [quantizer.inputs[0]], {"to": int(ir.DataType.FLOAT16)}, name="to_half")
    cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT16), quantizer.inputs[0].shape
    model.graph.insert_before(layer, cast)
    layer.replace_input_with(0, cast.outputs[0])


def cast_between(model: ir.Model) -> None:
    layer = next(n for n in model.graph if n.op_type == "Conv")
    cast = ir.node("Cast", [layer.inputs[0]], {"to": int(ir.DataType.FLOAT16)}, name="between")
    cast.outputs[0].type, cast.outputs[0].shape = layer.inputs[0].type, layer.inputs[0].shape
    model.graph.insert_before(layer, cast)
    layer.replace_input_with(0, cast.outputs[0])


def float_weight(model: ir.Model) -> None:
    layer = next(n for n in model.graph if n.op_type == "Conv")
    set_input(model, layer, 1, normal(8, 4, 3, 3).astype(np.float16))


def computed_scale(model: ir.Model) -> None:
    node = next(n for n in model.graph if n.op_type == "QuantizeLinear")
    top = ir.node("ReduceMax", [node.inputs[0]], {"keepdims": 0}, name="top")
    top.outputs[0].type, top.outputs[0].shape = node.inputs[0].type, ir.Shape([])
    model.graph.insert_before(node, top)
    node.replace_input_with(1, top.outputs[0])


def odd_four_bits(model: ir.Model) -> None:
    pair = weight_pair(model, "Gemm")
    value = pair.inputs[0]
    new = ir.Value(name="four", const_value=ir.Tensor(np.ones((5, 3), "int4"), name="four"), shape=ir.Shape([5, 3]))
    new.type = ir.TensorType(ir.DataType.INT4)
    model.graph.register_initializer(new)
    pair.replace_input_with(0, new)
    if len(pair.inputs) > 2:
        pair.resize_inputs(2)
    assert value is not None


def four_bits_in_a_convolution(model: ir.Model) -> None:
    pair = weight_pair(model, "Conv")
    data = pair.inputs[0].const_value.numpy()
    new = ir.Value(name="four", const_value=ir.Tensor((data // 16).astype("int4"), name="four"))
    new.type, new.shape = ir.TensorType(ir.DataType.INT4), ir.Shape(data.shape)
    model.graph.register_initializer(new)
    pair.replace_input_with(0, new)
    if len(pair.inputs) > 2:
        pair.resize_inputs(2)


def shared_weight(model: ir.Model) -> None:
    first, second = [n for n in model.graph if n.op_type == "Conv"]
    second.replace_input_with(1, first.inputs[1])


FAULTS: dict[str, tuple[Callable[[ir.Model], None], str, str]] = {
    "zero point": (off_zero, "error zero-point", "its zero point is 3, not 0"),
    "unsigned": (unsigned, "error signed", "unsigned"),
    "int32 bias": (integer_bias, "error float-bias", "biases stay in float"),
    "axis of Conv": (wrong_axis("Conv", 1), "error axis", "along axis 1, its output channels along 0"),
    "axis of ConvTranspose": (wrong_axis("ConvTranspose", 0), "error axis", "axis 0, its output channels along 1"),
    "axis of MatMul": (wrong_axis("MatMul", 0), "error axis", "along axis 0, its output channels along 1"),
    "number of scales": (too_many_scales, "error axis", "5 scales for 8 channels"),
    "a scale of 0": (zero_scale, "error scale", "must be positive"),
    "activation per channel": (activation_per_channel, "error per-tensor", "8 scales"),
    "no zero point": (no_zero_point, "error zero-point", "the standard says uint8"),
    "input in float": (float_input, "error both-sides", "which no convolution takes"),
    "a Cast between": (cast_between, "error placement", "a Cast parts DequantizeLinear"),
    "weight in float": (float_weight, "warning both-sides", "its weight is not"),
    "computed scale": (computed_scale, "error scale", "is computed"),
    "odd int4": (odd_four_bits, "error int4", "an odd number"),
    "int4 in Conv": (four_bits_in_a_convolution, "error int4", "not Conv"),
    "shared weight": (shared_weight, "warning shared-weight", "2 layers"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_with_its_node(name: str) -> None:
    plant, rule, text = FAULTS[name]
    model = net()
    plant(model)
    rules = found(model)
    assert rule in rules, {r: [f.sentence() for f in fs] for r, fs in rules.items()}
    hit = next(f for f in rules[rule] if text in f.text)
    names = {n.name for n in model.graph} | {f"{n.op_type}({n.outputs[0].name})" for n in model.graph}
    assert hit.nodes and set(hit.nodes) <= names and hit.hint
    if rule.startswith("error"):
        with pytest.raises(ModelError, match="TensorRT would not take it") as raised:
            require_valid(validate(model, JETSON), JETSON, parts(model))
        assert any(node in str(raised.value) for node in hit.nodes)


# -- everything beside Q and DQ ----------------------------------------------------------------------------------------

MODELS: dict[str, tuple[Callable[[], ir.Model], str, str]] = {
    "unsupported": (lambda: graph("(float[8] x) => (float[M] y)", "y, i = Unique(x)"), "error operator", "Unique"),
    "plugin": (
        lambda: graph("(float[2,8] x) => (float[2,8] y)", "y = com.example.Squareplus(x)", imports='"com.example" : 1'),
        "error plugin", "needs a plugin",
    ),
    "string": (lambda: graph("(string[2] x) => (string[2] y)", "y = Identity(x)"), "error types", "string"),
    "int16": (lambda: graph("(float[2] x) => (int16[2] y)", "y = Cast<to=5>(x)"), "error types", "int16"),
    "float64": (lambda: graph("(double[2] x) => (double[2] y)", "y = Relu(x)"), "warning float64", "float32"),
    "uint8": (lambda: graph("(uint8[2] x) => (uint8[2] y)", "y = Add(x, x)"), "error uint8", "inputs and outputs"),
    "old opset": (lambda: graph("(float[2] x) => (float[2] y)", "y = Relu(x)", opset=8), "error opset", "older than 9"),
    "new opset": (
        lambda: graph("(float[2] x) => (float[2] y)", "y = Relu(x)", opset=23), "warning opset", "newer than 21",
    ),
    "operator of a later version": (
        lambda: graph("(float[2,4] x) => (float[2,4] y)", "y = RMSNormalization(x, g)", opset=23, g=(4,)),
        "error version", "came with TensorRT 10.15",
    ),
    "ellipsis": (
        lambda: graph("(float[2,4] x) => (float[4,2] y)", 'y = Einsum<equation="...ij->...ji">(x)'),
        "error version", "10.12",
    ),
    "plugin of its library": (
        lambda: graph(
            "(float[1,4,8,8] x, float[2,4] r) => (float[2,4,1,1] y)", "y = RoiAlign(x, r, i)", i=np.zeros(2, np.int64)
        ),
        "warning library", "RoiAlign",
    ),
    "data-dependent": (
        lambda: graph("(float[8] x) => (int64[1,M] y)", "y = NonZero(x)"), "warning data-dependent", "NonZero",
    ),
    "rank": (
        lambda: graph(
            "(float[2,4] x) => (float[1,1,1,1,1,1,1,2,4] y)", "y = Reshape(x, s)", s=np.array([1] * 7 + [2, 4])
        ),
        "error rank", "9 axes",
    ),
    "unknown rank": (lambda: graph("(float x) => (float y)", "y = Relu(x)"), "", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", [n for n in MODELS if n != "unknown rank"])
def test_what_the_file_holds_beside_q_and_dq(name: str) -> None:
    make, rule, text = MODELS[name]
    rules = found(make())
    assert rule in rules, {r: [f.sentence() for f in fs] for r, fs in rules.items()}
    assert any(text in f.sentence() for f in rules[rule])


def test_an_input_of_unknown_rank_is_an_error() -> None:
    model = graph("(float[2] x) => (float[2] y)", "y = Relu(x)")
    model.graph.inputs[0].shape = None
    assert "error profile" in found(model)


def test_wide_integers_are_cut_down_before_version_9() -> None:
    def model(number: int) -> ir.Model:
        return graph("(int64[2] x) => (int64[2] y)", "y = Add(x, c)", c=np.array(number))

    assert "error int64" in found(model(1 << 40), "8.6")
    assert "error int64" not in found(model(1 << 40), "10.3")
    assert "error int64" not in found(model(7), "8.6")
    ends = graph(
        "(float[9] x) => (float[8] y)", "y = Slice(x, a, b)", a=np.array([1]), b=np.array([np.iinfo(np.int64).max])
    )
    assert "warning int64" in found(ends, "8.6") and "error int64" not in found(ends, "8.6")


def test_bodies() -> None:
    def branches(other: str, shape: str) -> ir.Model:
        model = ir.from_onnx_text(f"""<ir_version: 9, opset_import: ["" : 18]>
            g (float[4] x, bool c) => (float y) <int64[2] s = {{2, 2}}> {{
              y = If(c) <then_branch = t () => (float[4] a) {{ a = Neg(x) }},
                         else_branch = e () => (float[{shape}] {other}) {{ {other} = Reshape(x, s) }}> }}""")
        infer_shapes(model)
        return model

    assert any("1 and 2 axes" in f.text for f in found(branches("b", "2,2"))["error if"])

    def loop(trips: str) -> ir.Model:
        model = ir.from_onnx_text(f"""<ir_version: 9, opset_import: ["" : 18]>
            g (float[4] x, int64 n) => (float[4] y, float[K,4] z) <int64 three = {{3}}, bool yes = {{1}}> {{
              y, z = Loop({trips}, yes, x) <body = b (int64 i, bool go, float[4] v) =>
                  (bool more, float[4] w, float[4] row) {{ more = Identity(go)  w = Neg(v)  row = Relu(v) }}> }}""")
        infer_shapes(model)
        return model

    assert not found(loop("three"))
    assert any("length" in f.text for f in found(loop("n"))["error loop"])


def test_sums_whose_layer_is_quantised_are_warned_of() -> None:
    """As quantised for the CPU, signs and zero points changed: both operands of the sum are behind Q/DQ."""
    model = net()
    total = next(n for n in model.graph if n.op_type == "Add")
    spared = next(i for i, v in enumerate(total.inputs) if v.producer().op_type == "Conv")
    pair = total.inputs[1 - spared].producer()
    quantizer = pair.inputs[0].producer()
    value = total.inputs[spared]
    q = ir.node("QuantizeLinear", [value, *quantizer.inputs[1:]], name="planted_q")
    d = ir.node("DequantizeLinear", [q.outputs[0], *pair.inputs[1:]], name="planted_d")
    q.outputs[0].type, q.outputs[0].shape = quantizer.outputs[0].type, value.shape
    d.outputs[0].type, d.outputs[0].shape = value.type, value.shape
    model.graph.insert_before(total, [q, d])
    total.replace_input_with(spared, d.outputs[0])
    assert any("fused sums" in f.text for f in found(model)["warning placement"])


def test_int8_convolutions_that_had_no_kernel_somewhere_are_named() -> None:
    model = graph(
        "(float[1,3,8,8] x) => (float[1,6,8,8] y)",
        """q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)  e = DequantizeLinear<axis=0>(w, ws)
        c = Conv(d, e)  q2 = QuantizeLinear(c, s, z)  d2 = DequantizeLinear(q2, s, z)
        f = DequantizeLinear<axis=0>(v, ws)  y = Conv<group=6>(d2, f)""",
        s=np.array(0.1, np.float32), z=np.array(0, np.int8), w=np.ones((6, 3, 1, 1), np.int8),
        ws=np.full(6, 0.1, np.float32), v=np.ones((6, 1, 1, 1), np.int8),
    )  # fmt: skip
    rules = found(model)
    assert "3 input channels" in rules["warning channels"][0].text and len(rules["warning depthwise"][0].nodes) == 1


def test_zeros_must_survive_stored_and_dequantised() -> None:
    from graphopt.sparsity.marks import declare_pattern

    rows = np.zeros((8, 8), np.int8)
    rows[:, ::2] = np.arange(1, 33).reshape(8, 4)

    def model(weight: np.ndarray) -> ir.Model:
        made = graph(
            "(float[N,8] x) => (float[N,8] y)",
            """q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)  e = DequantizeLinear<axis=1>(w, ws)
            y = MatMul(d, e)""",
            s=np.array(0.1, np.float32), z=np.array(0, np.int8), w=weight, ws=np.full(8, 0.1, np.float32),
        )  # fmt: skip
        declare_pattern(next(n for n in made.graph if n.op_type == "MatMul"), "2:4")
        return made

    assert not found(model(np.ascontiguousarray(rows.T)))
    rows[3, 1] = 5
    assert "2:4" in {f.rule for f in validate(model(np.ascontiguousarray(rows.T)), JETSON)}


def test_findings_that_say_the_same_are_one_and_errors_come_first() -> None:
    model = graph("(float[8] x) => (float[M] y, float[K] w)", "y, i = Unique(x)  n = NonZero(x)  c = Cast<to=1>(n)  "
                  "f = Flatten(c)  w, j = Unique(f)")  # fmt: skip
    listed = validate(model, JETSON)
    assert [f.severity for f in listed] == sorted(f.severity for f in listed)
    unique = [f for f in listed if f.rule == "operator"]
    assert len(unique) == 1 and len(unique[0].nodes) == 2
