"""dequantize: models of ONNX Runtime's quantiser and every operator by itself, against what they computed."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from golden import context, reasons, run
from text_graph import graph

from graphopt import model as files
from graphopt.base import PassResult
from graphopt.passes.dequantize import Dequantize
from graphopt.passes.fold_constants import FoldConstants
from graphopt.quantization.back.recognised import holds_quantised
from graphopt.registry import pass_class

RNG = np.random.default_rng(0)
MS = '"com.microsoft" : 1'
U8, I8 = np.uint8, np.int8


def f32(*numbers: float) -> np.ndarray:
    return np.array(numbers[0] if len(numbers) == 1 else numbers, np.float32)


def integers(*shape: int, dtype: Any = np.int8) -> np.ndarray:
    info = np.iinfo(dtype)
    return RNG.integers(info.min, info.max + 1, shape).astype(dtype)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def dequantize(model: ir.Model, activations: str = "drop") -> PassResult:
    result = Dequantize(activations=activations).run(model, context())  # type: ignore[arg-type]
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return result


def step(model: ir.Model, feeds: dict[str, Any], tolerance: float) -> tuple[ir.Model, PassResult]:
    """With roundings kept the results are the same; returns what is left without them."""
    before = run(model, feeds)
    kept, dropped = model.clone(), model.clone()
    dequantize(kept, "keep")
    for a, b in zip(before, run(kept, feeds), strict=True):
        assert a.dtype == b.dtype
        # an integer kernel and a float one may round a tie to either side
        np.testing.assert_allclose(b, a, rtol=0, atol=tolerance)
    result = dequantize(dropped)
    return dropped, result


S, Z = {"s": f32(0.05), "z": np.array(128, U8)}, {"t": f32(0.1), "u": np.array(120, U8)}

QLINEAR = {
    "QLinearConv": ("1,3,5,5 -> 1,4,5,5", "i = QLinearConv<pads=[1,1,1,1]>(q, s, z, w, ws, wz, t, u, b)",
                    {"w": integers(4, 3, 3, 3), "ws": f32(.002, .003, .001, .002), "wz": np.zeros(4, I8),
                     "b": RNG.integers(-99, 99, 4).astype(np.int32)}),
    "QLinearMatMul": ("2,5 -> 2,3", "i = QLinearMatMul(q, s, z, w, ws, wz, t, u)",
                      {"w": integers(5, 3), "ws": f32(.01, .02, .03), "wz": np.zeros(3, I8)}),
    "QGemm": ("2,5 -> 2,3", "i = com.microsoft.QGemm<transB=1>(q, s, z, w, ws, wz, b, t, u)",
              {"w": integers(3, 5), "ws": f32(.01, .02, .03), "wz": np.zeros(3, I8),
               "b": RNG.integers(-99, 99, 3).astype(np.int32)}),
    "QLinearAdd": ("2,5 -> 2,5", "i = com.microsoft.QLinearAdd(q, s, z, q, s, z, t, u)", {}),
    "QLinearMul": ("2,5 -> 2,5", "i = com.microsoft.QLinearMul(q, s, z, c, ws, z, t, u)",
                   {"c": integers(5, dtype=np.uint8), "ws": f32(.01)}),
    "QLinearConcat": ("2,5 -> 2,10", "i = com.microsoft.QLinearConcat<axis=1>(t, u, q, s, z, q, s, z)", {}),
    "QLinearSigmoid": ("2,5 -> 2,5", "i = com.microsoft.QLinearSigmoid(q, s, z, t, u)", {}),
    "QLinearLeakyRelu": ("2,5 -> 2,5", "i = com.microsoft.QLinearLeakyRelu<alpha=0.2>(q, s, z, t, u)", {}),
    "QLinearSoftmax": ("2,5 -> 2,5", "i = com.microsoft.QLinearSoftmax<axis=-1, opset=13>(q, s, z, t, u)", {}),
    "QLinearAveragePool": ("1,2,6,6 -> 1,2,3,3",
                           "i = com.microsoft.QLinearAveragePool<kernel_shape=[2,2],strides=[2,2]>(q, s, z, t, u)", {}),
    "QLinearGlobalAveragePool": ("1,2,6,6 -> 1,2,1,1", "i = com.microsoft.QLinearGlobalAveragePool(q, s, z, t, u)", {}),
    "QLinearWhere": ("2,5 -> 2,5", "i = com.microsoft.QLinearWhere(m, q, s, z, q, s, z, t, u)",
                     {"m": np.array([True, False, True, False, True])}),
}  # fmt: skip


@pytest.mark.parametrize("op", QLINEAR)
def test_operators_on_integers(op: str) -> None:
    shapes, text, parameters = QLINEAR[op]
    given, made = shapes.split(" -> ")
    model = graph(
        f"(float[{given}] x) => (float[{made}] y)",
        f"q = QuantizeLinear(x, s, z)  {text}  y = DequantizeLinear(i, t, u)",
        imports=MS, **S, **Z, **parameters,
    )  # fmt: skip
    shape = [int(n) for n in given.split(",")]
    x = normal(*shape)
    want = run(model, {"x": x})[0]
    float_model, result = step(model, {"x": x}, tolerance=0.101)
    assert not holds_quantised(float_model)
    assert not result.skipped
    got = run(float_model, {"x": x})[0]
    # saturation aside, at most the rounding of what goes in and comes out
    inside = (want > (0 - 120) * 0.1 + 0.2) & (want < (255 - 120) * 0.1 - 0.2)
    assert inside.mean() > 0.5
    assert np.abs(got - want)[inside].max() < 0.4


def test_means_that_no_kernel_computes() -> None:
    model = graph(
        "(float[2,5] x) => (float[2,1] y)",
        """q = QuantizeLinear(x, s, z)  i = com.microsoft.QLinearReduceMean<axes=[1], keepdims=1>(q, s, z, t, u)
        y = DequantizeLinear(i, t, u)""",
        imports=MS, opset=18, **S, **Z,
    )  # fmt: skip
    dequantize(model)
    x = normal(2, 5)
    np.testing.assert_allclose(run(model, {"x": x})[0], x.mean(1, keepdims=True), rtol=1e-5)


def test_dynamic_products_with_their_scales() -> None:
    model = graph(
        "(float[3,8] x) => (float[3,4] y, float[3,4] v)",
        """q, s, z = DynamicQuantizeLinear(x)  i = MatMulInteger(q, w, z, wz)  f = Cast<to=1>(i)  m = Mul(s, ws)
        y = Mul(f, m)  j = MatMulInteger(q, w, z, wz)  g = Cast<to=1>(j)  h = Mul(g, s)  r = Mul(h, one)
        v = Add(r, b)""",
        w=integers(8, 4), wz=np.zeros(4, I8), ws=f32(.01, .02, .03, .04), one=f32(0.01), b=(4,),
    )  # fmt: skip
    made, _ = step(model, {"x": normal(3, 8)}, tolerance=1e-3)
    assert [n.op_type for n in made.graph] == ["MatMul", "MatMul", "Add"]
    w = np.asarray(made.graph.initializers["w_float"].const_value.numpy())
    np.testing.assert_allclose(w, integers_of(model, "w") * f32(0.01, 0.02, 0.03, 0.04), rtol=1e-6)
    assert "com.microsoft" not in made.opset_imports


def integers_of(model: ir.Model, name: str) -> np.ndarray:
    return np.asarray(model.graph.initializers[name].const_value.numpy()).astype(np.float32)


def test_dynamic_convolutions_and_a_gate_behind_them() -> None:
    model = graph(
        "(float[1,3,6,6] x) => (float[1,4,4,4] y)",
        """q, s, z = DynamicQuantizeLinear(x)  i = ConvInteger(q, w, z, wz)  f = Cast<to=1>(i)  m = Mul(s, ws)
        p = Mul(f, m)  y = Mul(p, gate)""",
        w=integers(4, 3, 3, 3), wz=np.array(0, I8), ws=f32(.01), gate=normal(1, 4, 1, 1),
    )  # fmt: skip
    made, _ = step(model, {"x": normal(1, 3, 6, 6)}, tolerance=1e-3)
    assert [n.op_type for n in made.graph] == ["Conv", "Mul"]


@pytest.mark.parametrize(
    ("behind", "reason"),
    [
        ("f = Cast<to=1>(i)  y = Mul(f, c)", "not multiplied by the scale of its activations once"),
        ("y = Cast<to=1>(i)", "not multiplied by the scale of its activations once"),
        ("a = Abs(i)  f = Cast<to=1>(a)  y = Mul(f, s)", "read by something else than a Cast"),
    ],
)
def test_products_of_integers_that_are_no_layer_stay(behind: str, reason: str) -> None:
    model = graph(
        "(float[3,8] x) => (float[3,4] y)",
        f"q, s, z = DynamicQuantizeLinear(x)  i = MatMulInteger(q, w, z)  {behind}", w=integers(8, 4), c=f32(0.1),
    )  # fmt: skip
    before = run(model, {"x": np.ones((3, 8), np.float32)})
    result = dequantize(model)
    assert reason in reasons(result)
    np.testing.assert_array_equal(run(model, {"x": np.ones((3, 8), np.float32)})[0], before[0])


def test_operators_that_quantise_by_themselves() -> None:
    model = graph(
        "(float[2,8] x) => (float[2,4] y, float[2,4] v)",
        """y = com.microsoft.DynamicQuantizeMatMul(x, w, ws, wz, b)
        q, s, z = DynamicQuantizeLinear(x)  v = com.microsoft.MatMulIntegerToFloat(q, w, s, ws, z, wz)""",
        imports=MS, w=integers(8, 4), ws=f32(.01, .02, .03, .04), wz=np.zeros(4, I8), b=(4,),
    )  # fmt: skip
    made, result = step(model, {"x": normal(2, 8)}, tolerance=1e-3)
    assert sorted(n.op_type for n in made.graph) == ["Add", "MatMul", "MatMul"]
    assert not result.skipped


@pytest.mark.parametrize("per_column", [False, True])
def test_dynamic_lstm(per_column: bool) -> None:
    columns = (1, 28) if per_column else (1,)
    model = graph(
        "(float[3,2,5] x) => (float[3,1,2,7] y)",
        "y = com.microsoft.DynamicQuantizeLSTM<hidden_size=7>(x, w, r, b, , , , , ws, wz, rs, rz)",
        imports=MS, w=integers(1, 5, 28), r=integers(1, 7, 28), b=(1, 56),
        ws=np.full(columns, 0.004, np.float32), wz=np.zeros(columns, I8),
        rs=np.full(columns, 0.004, np.float32), rz=np.zeros(columns, I8),
    )  # fmt: skip
    x = normal(3, 2, 5)
    want = run(model, {"x": x})[0]
    result = dequantize(model)
    assert not result.skipped
    assert [n.op_type for n in model.graph] == ["LSTM"]
    np.testing.assert_allclose(run(model, {"x": x})[0], want, atol=0.03)


@pytest.mark.parametrize(("bits", "zeros"), [(4, None), (4, "packed"), (4, "float"), (8, None), (8, "packed")])
def test_weights_in_blocks(bits: int, zeros: str | None) -> None:
    inputs, outputs, block = 40, 6, 16
    blocks = -(-inputs // block)
    packed = integers(outputs, blocks, block * bits // 8, dtype=np.uint8)
    parameters: dict[str, Any] = {"w": packed, "s": np.abs(normal(outputs * blocks)) / 50}
    if zeros == "packed":
        parameters["z"] = integers(outputs * -(-blocks * bits // 8), dtype=np.uint8)
    elif zeros == "float":
        parameters["z"] = np.abs(normal(outputs * blocks)) * 8
    names = ", ".join(["x", *parameters])
    model = graph(
        f"(float[3,{inputs}] x) => (float[3,{outputs}] y)",
        f"y = com.microsoft.MatMulNBits<K={inputs}, N={outputs}, bits={bits}, block_size={block}>({names})",
        imports=MS, **parameters,
    )  # fmt: skip
    x = normal(3, inputs)
    want = run(model, {"x": x})[0]
    dequantize(model)
    assert [n.op_type for n in model.graph] == ["MatMul"]
    np.testing.assert_allclose(run(model, {"x": x})[0], want, rtol=1e-4, atol=1e-4)


def test_tables_in_blocks() -> None:
    model = graph(
        "(int64[3] i) => (float[3,32] y)",
        "y = com.microsoft.GatherBlockQuantized<block_size=16, quantize_axis=1, gather_axis=0, bits=4>(t, i, s, z)",
        imports=MS, t=integers(10, 16, dtype=np.uint8), s=np.abs(normal(10, 2)), z=integers(10, 1, dtype=np.uint8),
    )  # fmt: skip
    want = run(model, {"i": np.array([0, 7, 9])})[0]
    dequantize(model)
    assert [n.op_type for n in model.graph] == ["Gather"]
    np.testing.assert_allclose(run(model, {"i": np.array([0, 7, 9])})[0], want, rtol=1e-5)


@pytest.mark.parametrize("kind", [ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.INT8])
def test_constants_by_channel_and_in_blocks_of_any_type(kind: ir.DataType) -> None:
    model = graph(
        "(float[2,8] x) => (float[2,4] y, float[2,4] v)",
        """d = DequantizeLinear<axis=0, block_size=4>(w, s)  y = MatMul(x, d)
        e = DequantizeLinear<axis=1>(w, c)  v = MatMul(x, e)""",
        opset=21, w=RNG.integers(0, 8, (8, 4)).astype(np.int8), s=np.abs(normal(2, 4)), c=np.abs(normal(4)),
    )  # fmt: skip
    stored = model.graph.initializers["w"]
    stored.const_value = ir.Tensor(integers_of(model, "w").astype(kind.numpy()), dtype=kind, name="w")
    stored.type = ir.TensorType(kind)
    model.ir_version = 10
    x = normal(2, 8)
    want = run(model, {"x": x})
    dequantize(model)
    assert not holds_quantised(model)
    for a, b in zip(want, run(model, {"x": x}), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-6, atol=1e-6)


def test_weights_that_are_rounded_in_the_graph_stay_rounded() -> None:
    model = graph(
        "(float[2,8] x) => (float[2,4] y)",
        "q = QuantizeLinear<axis=1>(w, s, z)  d = DequantizeLinear<axis=1>(q, s, z)  y = MatMul(x, d)",
        w=(8, 4), s=f32(.02, .03, .04, .05), z=np.zeros(4, I8),
    )  # fmt: skip
    x = normal(2, 8)
    want = run(model, {"x": x})[0]
    dequantize(model)
    assert [n.op_type for n in model.graph] == ["MatMul"]
    np.testing.assert_allclose(run(model, {"x": x})[0], want, rtol=1e-5, atol=1e-5)


def test_data_movement_on_integers_gets_a_twin_on_floats() -> None:
    model = graph(
        "(float[1,4,6,6] x) => (float[1,72] y)",
        """q = QuantizeLinear(x, s, z)  p = Pad(q, pads, z)  m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(p)
        a, b = Split<axis=1>(m)  c = Concat<axis=1>(b, a)  t = Transpose<perm=[0,2,3,1]>(c)  f = Flatten(t)
        g = Slice(f, lo, hi, ax)  y = DequantizeLinear(g, s, z)""",
        **S, pads=np.array([0, 0, 1, 1, 0, 0, 1, 1]), lo=np.array([0]), hi=np.array([72]), ax=np.array([1]),
    )  # fmt: skip
    x = normal(1, 4, 6, 6)
    want = run(model, {"x": x})[0]
    result = dequantize(model)
    assert not holds_quantised(model)
    assert not result.skipped
    np.testing.assert_allclose(run(model, {"x": x})[0], want, atol=0.026)


def test_saturation_that_stood_for_an_activation_is_written() -> None:
    def model(top: float) -> ir.Model:
        return graph(
            "(float[2,8] x) => (float[2,4] y)",
            "h = MatMul(x, w)  q = QuantizeLinear(h, s, z)  d = DequantizeLinear(q, s, z)  y = MatMul(d, v)",
            w=(8, 4), v=(4, 4), s=f32(top / 255), z=np.array(0, U8),
        )  # fmt: skip

    relu, clip = model(40.0), model(6.0)
    results = [dequantize(m) for m in (relu, clip)]
    assert [n.op_type for n in relu.graph] == ["MatMul", "Relu", "MatMul"]
    assert [n.op_type for n in clip.graph] == ["MatMul", "Clip", "MatMul"]
    assert all("1 Relu or Clip written" in " ".join(r.notes) for r in results)
    known = graph(
        "(float[2,8] x) => (float[2,8] y)", "h = Relu(x)  q = QuantizeLinear(h, s, z)  y = DequantizeLinear(q, s, z)",
        s=f32(0.02), z=np.array(0, U8),
    )  # fmt: skip
    dequantize(known)
    assert [n.op_type for n in known.graph] == ["Relu"]
    assert known.graph.outputs[0].name == "y"


def test_integers_from_outside_and_other_scales_stay() -> None:
    model = graph(
        "(uint8[2,8] x, float[2,8] f) => (float[2,8] y, float[2,8] v, uint8[2,8] u)",
        """y = DequantizeLinear(x, s, z)  q = QuantizeLinear(f, s, z)  v = DequantizeLinear(q, t, z)
        u = QuantizeLinear(f, t, z)""",
        **S, t=f32(0.07),
    )  # fmt: skip
    result = dequantize(model)
    assert holds_quantised(model) == {"DequantizeLinear": 2, "QuantizeLinear": 2}
    assert reasons(result).count("not quantised in this graph") == 2


def test_what_has_no_standard_operator_is_named() -> None:
    model = graph("(float[1,4,8] x) => (float[1,4,8] y)", "y = com.microsoft.QMoE<k=1>(x, x)", imports=MS)
    result = Dequantize().run(model, context())
    assert not result.changed
    assert "no standard operators are known for QMoE" in reasons(result)


def test_bodies() -> None:
    model = ir.from_onnx_text("""<ir_version: 8, opset_import: ["" : 17]>
    g (float[4] x, bool c) => (float[4] y) {
        s = Constant<value = float {0.05}>()
        z = Constant<value = uint8 {128}>()
        q = QuantizeLinear(x, s, z)
        y = If (c) <then_branch = t () => (float[4] a) { a = DequantizeLinear(q, s, z) },
                    else_branch = e () => (float[4] b) { d = DequantizeLinear(q, s, z) b = Neg(d) }>
    }""")
    files.infer_shapes(model)
    x = normal(4)
    want = [run(model, {"x": x, "c": np.array(flag)})[0] for flag in (True, False)]
    dequantize(model)
    assert not holds_quantised(model)
    for flag, y in zip((True, False), want, strict=True):
        np.testing.assert_allclose(run(model, {"x": x, "c": np.array(flag)})[0], y, atol=0.026)


def test_float_models_do_not_change() -> None:
    result = dequantize(graph("(float[2] x) => (float[2] y)", "y = Relu(x)"))
    assert not result.changed
    assert result.notes == ["nothing is quantised"]


def test_folding_leaves_quantised_weights_as_they_are() -> None:
    model = graph(
        "(float[2,8] x) => (float[2,4] y)", "d = DequantizeLinear(w, s)  y = MatMul(x, d)", w=integers(8, 4), s=f32(0.1)
    )
    FoldConstants().run(model, context())
    assert holds_quantised(model) == {"DequantizeLinear": 1}


# -- whole models ---


def _static(source: Path, made: Path, form: str) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Once(CalibrationDataReader):
        def __init__(self) -> None:
            self.feeds = iter([{"x": normal(4, 3, 32, 32)}])

        def get_next(self) -> Any:
            return next(self.feeds, None)

    logging.disable(logging.WARNING)
    quantize_static(
        source, made, Once(), quant_format=QuantFormat[form], per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    logging.disable(logging.NOTSET)


def cnn() -> ir.Model:
    return graph(
        "(float[N,3,32,32] x) => (float[N,10] y)",
        """a = Conv<pads=[1,1,1,1], strides=[2,2]>(x, w, b)  r = Relu(a)  c = Conv<pads=[1,1,1,1]>(r, v)  s = Add(c, r)
        t = Relu(s)  p = GlobalAveragePool(t)  f = Flatten(p)  y = Gemm(f, g, h)""",
        b=normal(8), w=normal(8, 3, 3, 3) / 5, v=normal(8, 8, 3, 3) / 8, g=normal(8, 10), h=normal(10),
    )  # fmt: skip


@pytest.mark.parametrize("form", ["QOperator", "QDQ"])
def test_models_of_the_runtimes_quantiser(form: str, tmp_path: Path) -> None:
    source, made = tmp_path / "float.onnx", tmp_path / "int8.onnx"
    original = cnn()
    files.save(original, source)
    _static(source, made, form)
    x = normal(2, 3, 32, 32)
    quantised = files.load(made)
    assert holds_quantised(quantised)
    kept = quantised.clone()
    dequantize(kept, "keep")
    np.testing.assert_allclose(run(kept, {"x": x})[0], run(quantised, {"x": x})[0], atol=0.05)
    dequantize(quantised)
    assert not holds_quantised(quantised)
    assert [n.op_type for n in quantised.graph] == [n.op_type for n in original.graph]
    exact = run(original, {"x": x})[0]
    assert np.linalg.norm(run(quantised, {"x": x})[0] - exact) < 0.05 * np.linalg.norm(exact)


def test_int8_for_one_target_becomes_int8_for_another(tmp_path: Path) -> None:
    import graphopt

    source, made = tmp_path / "float.onnx", tmp_path / "int8.onnx"
    files.save(cnn(), source)
    _static(source, made, "QOperator")
    data = tmp_path / "data.npz"
    np.savez(data, x=normal(16, 3, 32, 32))
    found = graphopt.optimize(made, "dequantize,quantize", target="jetson-orin", calib=data, bench=False)
    kinds = {v.const_value.dtype for name, v in found.model.graph.initializers.items() if "zero_point" in name}
    assert kinds == {ir.DataType.INT8}
    assert "QLinearConv" not in {n.op_type for n in found.model.graph}


def test_the_pass_is_registered() -> None:
    assert pass_class("dequantize") is Dequantize
