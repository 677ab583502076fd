"""quantize: placement as ONNX text, fusion in ONNX Runtime's optimised graph, accuracy on the real ResNet-20."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from text_graph import graph

from graphopt import calibration, model
from graphopt.base import Context, PassResult
from graphopt.data.activations import submodel
from graphopt.errors import DataError, UsageError
from graphopt.executor import Session
from graphopt.passes.quantize import Quantize
from graphopt.progress import Silent
from graphopt.quantization.static.rules import CPU_OPS, RULES, Kind
from graphopt.registry import pass_class
from graphopt.target import QuantScheme, Target

RNG = np.random.default_rng(0)


def _parse(text: str, weights: dict[str, np.ndarray], opset: int = 18) -> ir.Model:
    """A model from the body of a graph; `weights` become initialisers."""
    parsed = ir.from_onnx_text(f'<ir_version: 8, opset_import: ["": {opset}]>\n{text}')
    for name, data in weights.items():
        value = next(v for node in parsed.graph for v in node.inputs if v is not None and v.name == name)
        value.const_value = ir.Tensor(data, name=name)
        parsed.graph.register_initializer(value)
    model.infer_shapes(parsed)
    return parsed


def _conv(out: int, into: int, kernel: int = 3) -> np.ndarray:
    return RNG.standard_normal((out, into, kernel, kernel)).astype(np.float32) / kernel


def _normal(*shape: int) -> np.ndarray:
    """Normal values cut at three, with both extremes among them: what is measured on some holds for others."""
    values = np.clip(RNG.standard_normal(shape), -3, 3).astype(np.float32)
    values.flat[:2] = 3, -3
    return values


def _bias(n: int) -> np.ndarray:
    return RNG.standard_normal(n).astype(np.float32)


def _context(m: ir.Model, target: Target | None = None, samples: int = 64, data: Any = None) -> Context:
    if data is None:
        data = {
            v.name: _normal(samples, *[d if isinstance(d, int) else 8 for d in v.shape[1:]]) for v in m.graph.inputs
        }
    return Context(target or Target("cpu", "ort"), calibration.load(data, m), None, 0, 1, Silent(), pass_class)


def _quantize(m: ir.Model, target: Target | None = None, data: Any = None, **options: Any) -> PassResult:
    result = Quantize(**options).run(m, _context(m, target, data=data))
    model.check(m)
    return result


def _text(m: ir.Model) -> list[str]:
    """One line a node: outputs = op(inputs)."""
    return [f"{_names(n.outputs)} = {n.op_type}({_names(n.inputs)})" for n in m.graph]


def _names(values: Iterable[ir.Value | None]) -> str:
    return ", ".join("" if v is None else str(v.name) for v in values)


def _fused(m: ir.Model, tmp_path: Path) -> Counter[str]:
    """Operators of the graph as ONNX Runtime optimises it."""
    import onnxruntime as ort

    source, optimised = tmp_path / "m.onnx", tmp_path / "optimised.onnx"
    model.save(m, source)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(optimised)
    options.log_severity_level = 4
    ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    return Counter(n.op_type for n in onnx.load(optimised).graph.node)


def _close(before: ir.Model, after: ir.Model, data: dict[str, np.ndarray], db: float) -> None:
    a, b = Session(before).run(data), Session(after).run(data)
    for name, want in a.items():
        noise = np.sum((b[name] - want) ** 2) / np.sum(want**2)
        assert -10 * np.log10(noise) > db, f"{name}: {-10 * np.log10(noise):.1f} dB"


CONV_RELU = """g (float[N, 3, 8, 8] x) => (float[N, 4, 8, 8] y) {
    c = Conv <pads = [1, 1, 1, 1]> (x, w, b)
    y = Relu(c)
}"""


def test_conv_relu_golden(tmp_path):
    m = _parse(CONV_RELU, {"w": _conv(4, 3), "b": _bias(4)})
    before = m.clone()
    result = _quantize(m)
    assert result.changed
    assert _text(m) == [
        "x_quantized = QuantizeLinear(x, x_scale, x_zero_point)",
        "x_dequantized = DequantizeLinear(x_quantized, x_scale, x_zero_point)",
        "w_dequantized = DequantizeLinear(w_quantized, w_scale, w_zero_point)",
        "b_dequantized = DequantizeLinear(b_quantized, b_scale, b_zero_point)",
        "c = Conv(x_dequantized, w_dequantized, b_dequantized)",
        "y_float = Relu(c)",
        "y_quantized = QuantizeLinear(y_float, y_scale, y_zero_point)",
        "y = DequantizeLinear(y_quantized, y_scale, y_zero_point)",
    ]
    stored = {name: v.const_value for name, v in m.graph.initializers.items()}
    assert stored["w_quantized"].dtype == ir.DataType.INT8
    assert tuple(stored["w_scale"].shape) == (4,)
    assert not stored["w_zero_point"].numpy().any()
    assert stored["b_quantized"].dtype == ir.DataType.INT32
    np.testing.assert_allclose(
        stored["b_scale"].numpy(), stored["x_scale"].numpy() * stored["w_scale"].numpy(), rtol=1e-6
    )
    assert stored["x_zero_point"].dtype == ir.DataType.UINT8
    assert int(stored["y_zero_point"].numpy()) == 0  # absorbs the ReLU
    assert "w" not in stored
    _close(before, m, {"x": _normal(8, 3, 8, 8)}, 30)
    assert _fused(m, tmp_path) == {"QuantizeLinear": 1, "QLinearConv": 1, "DequantizeLinear": 1}


def test_the_target_gives_the_types():
    scheme = QuantScheme(activation="int8", symmetric_activation=True)
    m = _parse(CONV_RELU, {"w": _conv(4, 3), "b": _bias(4)})
    _quantize(m, Target("trt", "trt", device="gpu", quant=scheme), per_channel=False)
    for name in ("x_zero_point", "y_zero_point"):
        tensor = m.graph.initializers[name].const_value
        assert tensor.dtype == ir.DataType.INT8 and int(tensor.numpy()) == 0
    assert tuple(m.graph.initializers["w_scale"].const_value.shape) == ()


def test_biases_stay_in_float_where_the_target_takes_no_int32():
    scheme = QuantScheme(activation="int8", symmetric_activation=True, bias="float")
    target = Target("trt", "trt", device="gpu", quant=scheme)
    m = _parse(CONV_RELU, {"w": _conv(4, 3), "b": _bias(4)})
    before = m.clone()
    _quantize(m, target)
    assert m.graph.initializers["b"].const_value.dtype == ir.DataType.FLOAT
    assert not [v for v in m.graph.initializers.values() if v.const_value.dtype == ir.DataType.INT32]
    _close(before, m, {"x": _normal(8, 3, 8, 8)}, 30)


def test_the_beta_of_a_gemm_goes_into_its_float_bias():
    text = """g (float[N, 8] x) => (float[N, 6] y) { y = Gemm <alpha = 0.5, beta = 3.0> (x, w, b) }"""
    scheme = QuantScheme(activation="int8", symmetric_activation=True, bias="float")
    bias = _bias(6)
    m = _parse(text, {"w": _normal(8, 6), "b": bias})
    before = m.clone()
    _quantize(m, Target("trt", "trt", device="gpu", quant=scheme), data={"x": _normal(64, 8)})
    (gemm,) = [n for n in m.graph if n.op_type == "Gemm"]
    np.testing.assert_array_equal(gemm.inputs[2].const_value.numpy(), bias * np.float32(3))
    _close(before, m, {"x": _normal(8, 8)}, 30)


@pytest.mark.parametrize(
    ("wanted", "option", "pairs"), [(True, "all", 2), (True, "auto", 1), (True, "none", 1), (False, "all", 1)]
)
def test_outputs_of_sparse_products_are_integers_where_kernels_that_skip_zeros_write_them(wanted, option, pairs):
    text = """g (float[N, 8] x) => (float[N, 6] y, float[N, 6] z)
        { h = MatMul(x, w)  y = Tanh(h)  k = MatMul(x, v)  z = Tanh(k) }"""
    weight = _normal(8, 6)
    sparse = weight * (np.arange(8) % 2 == 0)[:, None].astype(np.float32)
    scheme = QuantScheme(activation="int8", symmetric_activation=True, sparse_outputs=wanted)
    m = _parse(text, {"w": sparse, "v": weight})
    target = Target("trt", "trt", device="gpu", quant=scheme)
    found = _quantize(m, target, data={"x": _normal(64, 8)}, sparse_outputs=option)
    assert sum(n.op_type == "QuantizeLinear" for n in m.graph) == pairs
    (dense,) = [n for n in m.graph if n.op_type == "Tanh" and n.outputs[0].name == "z"]
    assert dense.inputs[0].producer().op_type == "MatMul"
    told = [note for note in found.notes if f"outputs of {pairs - 1} of 1 products with sparse weights" in note]
    assert bool(told) == (wanted and option != "none")  # auto: here the one output would double the noise


RESIDUAL = """g (float[N, 4, 8, 8] x) => (float[N, 4, 8, 8] y) {
    a = Conv <pads = [1, 1, 1, 1]> (x, w1)
    r = Relu(a)
    c = Conv <pads = [1, 1, 1, 1]> (r, w2)
    s = Add(c, r)
    t = Relu(s)
    y = Conv <pads = [1, 1, 1, 1]> (t, w3)
}"""


def test_residual_add_reads_and_writes_integers(tmp_path):
    m = _parse(RESIDUAL, {f"w{i}": _conv(4, 4) for i in (1, 2, 3)})
    before = m.clone()
    _quantize(m)
    lines = _text(m)
    assert "s = Add(c_dequantized, r_dequantized)" in lines
    assert "t_quantized = QuantizeLinear(t, t_scale, t_zero_point)" in lines
    assert sum("QuantizeLinear(" in line and "De" not in line for line in lines) == 5  # x, r, c, t, y: once each
    assert _fused(m, tmp_path) == {"QuantizeLinear": 1, "QLinearConv": 3, "QLinearAdd": 1, "DequantizeLinear": 1}
    _close(before, m, {"x": _normal(8, 4, 8, 8)}, 25)


def test_concat_rescales_its_inputs(tmp_path):
    m = _parse(
        """g (float[N, 4, 8, 8] x) => (float[N, 4, 8, 8] y) {
            a = Conv <pads = [1, 1, 1, 1]> (x, w1)
            b = Conv <pads = [1, 1, 1, 1]> (x, w2)
            c = Concat <axis = 1> (a, b)
            y = Conv <pads = [1, 1, 1, 1]> (c, w3)
        }""",
        {"w1": _conv(4, 4), "w2": _conv(4, 4) * 5, "w3": _conv(4, 8)},
    )
    _quantize(m)
    assert "c = Concat(a_dequantized, b_dequantized)" in _text(m)
    scales = {name: float(m.graph.initializers[f"{name}_scale"].const_value.numpy()) for name in "abc"}
    assert scales["b"] > 3 * scales["a"]
    assert _fused(m, tmp_path) == {"QuantizeLinear": 1, "QLinearConv": 3, "QLinearConcat": 1, "DequantizeLinear": 1}


SHORTCUT = """g (float[N, 4, 8, 8] x) => (float[N, 8, 4, 4] y)
    <int64[1] zero = {0}, int64[1] eight = {8}, int64[1] two = {2}, int64[1] three = {3},
     int64[8] pads = {0, 2, 0, 0, 0, 2, 0, 0}> {
        a = Conv <pads = [1, 1, 1, 1]> (x, w1)
        r = Relu(a)
        h = Slice(r, zero, eight, two, two)
        i = Slice(h, zero, eight, three, two)
        p = Pad(i, pads)
        c = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (r, w2)
        s = Add(c, p)
        t = Relu(s)
        y = Conv <pads = [1, 1, 1, 1]> (t, w3)
}"""


def test_slice_and_pad_shortcut_stays_in_integers(tmp_path):
    """The option-A shortcut of CIFAR ResNets: one scale from the ReLU to the padded tensor, no float in between."""
    m = _parse(SHORTCUT, {"w1": _conv(4, 4), "w2": _conv(8, 4), "w3": _conv(8, 8)})
    before = m.clone()
    _quantize(m)
    lines = _text(m)
    assert "h = Slice(r_dequantized, zero, eight, two, two)" in lines
    assert "h_quantized = QuantizeLinear(h, r_scale, r_zero_point)" in lines
    assert "p_quantized = Pad(i_quantized, pads, r_zero_point)" in lines
    assert "p_dequantized = DequantizeLinear(p_quantized, r_scale, r_zero_point)" in lines
    assert not any(line.startswith("i_dequantized") for line in lines)  # nobody reads it
    fused = _fused(m, tmp_path)
    assert fused == {
        "QuantizeLinear": 1, "QLinearConv": 3, "QLinearAdd": 1, "Slice": 2, "Pad": 1, "DequantizeLinear": 1,
    }  # fmt: skip
    _close(before, m, {"x": _normal(8, 4, 8, 8)}, 25)


def test_padding_with_a_value_stays_in_float():
    """The value may lie far outside the range of what is padded, and would be clipped to it."""
    text = """g (float[N, 2, 4, 4] x) => (float[N, 4, 6, 6] y)
        <int64[8] pads = {0, 1, 0, 0, 0, 1, 0, 0}, float v = {50}> {
            a = Conv (x, w1)
            p = Pad(a, pads, v)
            y = Conv <pads = [1, 1, 1, 1]> (p, w2)
    }"""
    m = _parse(text, {"w1": _conv(2, 2, 1), "w2": _conv(4, 4, 1)})
    before = m.clone()
    _quantize(m, sensitive="none")
    _close(before, m, {"x": _normal(8, 2, 4, 4)}, 25)


@pytest.mark.parametrize(
    ("result", "body", "weights"),
    [
        ("N", "h = MatMul(x, w)  y = MatMul(h, v)", {"w": (8, 8), "v": (8,)}),
        (
            "N, 8",
            "h = MatMul(x, w)  z = MatMul(h, v)  g = MatMul(x, u)  y = Add(g, z)",
            {"w": (8, 0), "v": (0, 8), "u": (8, 8)},
        ),
    ],
)
def test_vectors_and_empty_matrices_are_weights(result, body, weights):
    m = graph(f"(float[N, 8] x) => (float[{result}] y)", body, **weights)
    before, data = m.clone(), {"x": _normal(32, 8)}
    _quantize(m, data=data)
    _close(before, m, data, 25)


@pytest.mark.parametrize("shape", ["N, 6", "3, 5, 6", "N, M, 6"])
@pytest.mark.parametrize("activation", ["", "Relu"])
def test_matmul_with_bias_has_an_integer_kernel(tmp_path, shape, activation):
    """ONNX Runtime makes Gemm of MatMul + Add where it can, and an integer Gemm only of one with an int32 bias."""
    text = f"""g (float[{shape}] x) => (float[{shape[:-1]}4] y) {{
        a = MatMul(x, w)
        {"y = Add(b, a)" if not activation else f"c = Add(b, a) r = {activation}(c) y = MatMul(r, v)"}
    }}"""
    weights = {"w": _normal(6, 4), "b": _bias(4)}
    if activation:
        weights["v"] = _normal(4, 4)
    m = _parse(text, weights)
    before = m.clone()
    fixed = shape.startswith("3")
    data = [{"x": _normal(3 if fixed else 8, 5, 6)}]
    if len(shape.split(",")) == 2:
        data = [{"x": _normal(8, 6)}]
    _quantize(m, data=data)
    fused = _fused(m, tmp_path)
    assert not {"MatMul", "Gemm", "FusedGemm", "FusedMatMul"} & set(fused), fused
    assert tuple(m.graph.initializers["w_scale"].const_value.shape) == (4,)
    _close(before, m, data[0], 25)


def test_gemm_factors_and_transposed_weight(tmp_path):
    m = _parse(
        """g (float[N, 6] x) => (float[N, 4] y) {
            y = Gemm <alpha = 0.5, beta = 2.0, transB = 1> (x, w, b)
        }""",
        {"w": _normal(4, 6), "b": _bias(4)},
    )
    before = m.clone()
    _quantize(m)
    assert _fused(m, tmp_path) == {"QuantizeLinear": 1, "QGemm": 1}
    _close(before, m, {"x": _normal(8, 6)}, 30)


def test_global_mean_runs_on_integers(tmp_path):
    m = _parse(
        """g (float[N, 4, 8, 8] x) => (float[N, 3] y) <int64[2] axes = {-1, 2}> {
            c = Conv <pads = [1, 1, 1, 1]> (x, w)
            m = ReduceMean <keepdims = 0> (c, axes)
            y = Gemm (m, v)
        }""",
        {"w": _conv(4, 4), "v": _normal(4, 3)},
    )
    before = m.clone()
    _quantize(m, sensitive="none")
    assert _fused(m, tmp_path)["QLinearGlobalAveragePool"] == 1
    _close(before, m, {"x": _normal(8, 4, 8, 8)}, 20)


def test_no_pair_stands_where_no_kernel_takes_it(tmp_path):
    """Softmax, Exp and what hangs on them stay in float, and so does a mean over other axes."""
    m = _parse(
        """g (float[N, 4, 8, 8] x) => (float[N, 4, 8, 8] y) {
            c = Conv <pads = [1, 1, 1, 1]> (x, w)
            e = Exp(c)
            f = Transpose <perm = [0, 1, 3, 2]> (e)
            s = Add(f, e)
            y = Softmax <axis = 1> (s)
        }""",
        {"w": _conv(4, 4) * 0.2},
    )
    _quantize(m, sensitive="none")
    assert {n.op_type for n in m.graph if "Quantize" in n.op_type or "Dequantize" in n.op_type}
    lines = _text(m)
    assert lines[-4:] == ["e = Exp(c_dequantized)", "f = Transpose(e)", "s = Add(f, e)", "y = Softmax(s)"]


def test_odd_channel_counts():
    m = _parse(RESIDUAL, {"w1": _conv(3, 4), "w2": _conv(3, 3), "w3": _conv(4, 3)})
    before = m.clone()
    _quantize(m)
    _close(before, m, {"x": _normal(4, 4, 8, 8)}, 25)


def test_shared_weight_is_stored_once():
    m = _parse(
        """g (float[N, 4, 8, 8] x) => (float[N, 4, 8, 8] y) {
            a = Conv <pads = [1, 1, 1, 1]> (x, w)
            y = Conv <pads = [1, 1, 1, 1]> (a, w)
        }""",
        {"w": _conv(4, 4)},
    )
    _quantize(m)
    stored = [n for n in m.graph.initializers if n.startswith("w")]
    assert sorted(stored) == ["w_quantized", "w_scale", "w_zero_point"]


def test_quantised_graph_is_left_alone():
    m = _parse(CONV_RELU, {"w": _conv(4, 3), "b": _bias(4)})
    _quantize(m)
    before = _text(m)
    result = _quantize(m)
    assert not result.changed
    assert _text(m) == before
    assert [s.reason for s in result.skipped] == ["quantised already: DequantizeLinear gives it an input"]


def test_reasons_node_by_node():
    m = _parse(
        """g (float[N, 4, 8, 8] x, float[4, 4, 3, 3] dynamic) => (float[N, 4, 8, 8] y, float[N, 4, 10, 10] z) {
            [first] a = Conv <pads = [1, 1, 1, 1]> (x, w)
            [second] b = Conv <pads = [1, 1, 1, 1]> (a, dynamic)
            [third] y = Conv <pads = [1, 1, 1, 1]> (b, w)
            [fourth] z = ConvTranspose (b, w)
        }""",
        {"w": _conv(4, 4)},
    )
    data = [{"x": _normal(2, 4, 8, 8), "dynamic": _conv(4, 4)}]
    result = _quantize(m, data=data, exclude=("thi*",))
    assert {s.node: s.reason for s in result.skipped} == {
        "second": "its weight is not a constant",
        "third": "excluded by 'thi*'",
        "fourth": "the target has no integer kernel for ConvTranspose",
    }
    assert "w" in m.graph.initializers  # the layers in float read it still


def test_masks_and_infinities_stay_in_float():
    m = _parse(
        """g (float[N, 4] x, float[N, 4] mask) => (float[N, 4] y) {
            [a] a = MatMul(x, w)
            m = Add(a, mask)
            [b] y = MatMul(m, v)
        }""",
        {"w": _normal(4, 4), "v": _normal(4, 4)},
    )
    mask = np.where(RNG.random((8, 4)) < 0.5, 0, np.finfo(np.float32).min).astype(np.float32)
    result = _quantize(m, data={"x": _normal(8, 4), "mask": mask}, sensitive="none")
    reasons = {s.node: s.reason for s in result.skipped}
    assert "spans" in reasons["b"]
    assert "a_quantized" not in " ".join(_text(m))


def test_the_layer_that_dominates_stays_in_float():
    """A narrow signal beside a wide one in the first layer's input: eight bits erase it, and log shows that."""
    m = _parse(
        """g (float[N, 2, 16, 16] x) => (float[N, 4, 16, 16] y) <float tiny = {0.000001}> {
            [front] a = Conv (x, w)
            q = Mul(a, a)
            p = Add(q, tiny)
            l = Log(p)
            [b1] c1 = Conv <pads = [1, 1, 1, 1]> (l, w1)
            r1 = Relu(c1)
            [b2] c2 = Conv <pads = [1, 1, 1, 1]> (r1, w2)
            r2 = Relu(c2)
            [b3] y = Conv <pads = [1, 1, 1, 1]> (r2, w3)
        }""",
        {"w": np.array([[1, 0], [0, 1]], np.float32).reshape(2, 2, 1, 1),
         "w1": _conv(8, 2), "w2": _conv(8, 8), "w3": _conv(4, 8)},
    )  # fmt: skip
    x = _normal(16, 2, 16, 16)
    x[:, 1] *= 1e-3
    kept = m.clone()
    everything = m.clone()
    result = _quantize(kept, data={"x": x})
    assert [s.node for s in result.skipped] == ["front"]
    assert "in float by measurement" in result.skipped[0].reason
    _quantize(everything, data={"x": x}, sensitive="none")
    want = Session(m).run({"x": x})["y"]
    error = {name: np.sum((Session(c).run({"x": x})["y"] - want) ** 2) for name, c in
             (("kept", kept), ("everything", everything))}  # fmt: skip
    assert error["kept"] < error["everything"] / 10
    row = next(r for r in result.details["quantised layers"] if r["layer"] == "front")
    assert row["type"] == "float32" and row["output SQNR dB, alone"] < 30


def test_old_opset_is_raised():
    m = _parse(CONV_RELU, {"w": _conv(4, 3), "b": _bias(4)}, opset=9)
    before = m.clone()
    result = _quantize(m)
    assert m.graph.opset_imports[""] == 13
    assert any(note.startswith("opset 9 -> 13") for note in result.notes)
    _close(before, m, {"x": _normal(4, 3, 8, 8)}, 30)


def test_a_layer_with_nan_weights_stays_in_float_and_is_named():
    weight = _conv(4, 3)
    weight[0, 0, 0, 0] = np.nan
    m = _parse(CONV_RELU.replace("c = Conv", "[bad] c = Conv"), {"w": weight, "b": _bias(4)})
    result = Quantize().run(m, _context(m))
    assert [s.node for s in result.skipped] == ["bad"]
    assert "tensor y holds inf or nan" in result.skipped[0].reason
    assert [n.op_type for n in m.graph] == ["Conv", "Relu"]


def test_what_cannot_start():
    m = _parse(CONV_RELU, {"w": _conv(4, 3), "b": _bias(4)})
    context = _context(m, Target("npu", "none", quant=None))
    with pytest.raises(UsageError, match="npu does not execute int8"):
        Quantize().run(m, context)
    told = _context(m, Target("npu", "none", quant=None, quant_refusal="it has floats alone"))
    with pytest.raises(UsageError, match="npu does not execute int8: it has floats alone"):
        Quantize().run(m, told)
    empty = Context(Target("cpu", "ort"), None, None, 0, 1, Silent(), pass_class)
    with pytest.raises(DataError, match="no calibration data"):
        Quantize().run(m, empty)


# For every connecting operator of the table: attributes and extra inputs of an example.
CONNECTING = {
    "Add": ("", ", x0"), "Mul": ("", ", x0"), "Concat": ("<axis = 1>", ", x0"),
    "AveragePool": ("<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>", ""), "GlobalAveragePool": ("", ""),
    "LeakyRelu": ("<alpha = 0.1>", ""), "Sigmoid": ("", ""), "MaxPool": ("<kernel_shape = [2, 2]>", ""),
    "Reshape": ("", ", shape"), "Flatten": ("", ""), "Transpose": ("<perm = [0, 1, 3, 2]>", ""),
    "Squeeze": ("", ", one"), "Unsqueeze": ("", ", one"), "Slice": ("", ", one, two, two"),
    "Split": ("<axis = 1>", ", halves"), "Gather": ("<axis = 1>", ", one"), "Expand": ("", ", twice"),
    "Tile": ("", ", ones"), "DepthToSpace": ("<blocksize = 2>", ""), "Resize": ("", ", , double"),
    "Pad": ("", ", pads"),
}  # fmt: skip


@pytest.mark.parametrize("op", [op for op in CPU_OPS if RULES[op].kind is not Kind.COMPUTE])
def test_every_rule_of_the_table_holds_in_the_runtime(tmp_path, op):
    """conv, operator, matrix product: nothing but integers between the first quantisation and the last."""
    attributes, extra = CONNECTING[op]
    squeezed = "z0 = MaxPool <kernel_shape = [1, 1]> (c)"
    if op == "Squeeze":
        squeezed = "s = Slice(c, zero, one, one) z0 = MaxPool <kernel_shape = [1, 1]> (s)"
    results = "z, rest" if op == "Split" else "z"
    text = f"""g (float[1, 4, 8, 8] x) => (float[A, B] y)
        <int64[4] shape = {{1, 4, 8, 8}}, int64[4] ones = {{1, 1, 1, 1}}, int64[1] zero = {{0}}, int64[1] one = {{1}},
         int64[1] two = {{2}}, int64[4] twice = {{2, 4, 8, 8}}, int64[2] halves = {{2, 2}},
         float[4] double = {{1, 1, 2, 2}},
         int64[8] pads = {{0, 0, 1, 1, 0, 0, 1, 1}}, int64[2] flat = {{1, -1}}> {{
            x0 = Conv <pads = [1, 1, 1, 1]> (x, w0)
            c = Conv <pads = [1, 1, 1, 1]> (x, w)
            {squeezed}
            {results} = {op} {attributes} (z0 {extra})
            f = Reshape(z, flat)
            y = MatMul(f, v)
    }}"""
    m = _parse(text, {"w0": _conv(4, 4), "w": _conv(4, 4), "v": np.zeros((1, 4), np.float32)})
    columns = Session(submodel(m, ["f"]))
    shape = columns.run({"x": _normal(1, 4, 8, 8)})["f"].shape
    weight = RNG.standard_normal((shape[1], 4)).astype(np.float32)
    m.graph.initializers["v"].const_value = ir.Tensor(weight, name="v")
    m.graph.initializers["v"].shape = ir.Shape(weight.shape)
    model.infer_shapes(m)
    _quantize(m, sensitive="none", data=[{"x": _normal(1, 4, 8, 8)}])
    fused = _fused(m, tmp_path)
    assert fused["QuantizeLinear"] == 1 and fused["DequantizeLinear"] == 0, fused
    assert op in fused or f"QLinear{op}" in fused, fused


@pytest.mark.data
def test_resnet20_is_fused_and_accurate(data_dir, tmp_path):
    m = model.load(data_dir / "models" / "resnet20_cifar10.onnx")
    mean = np.array([0.485, 0.456, 0.406], np.float32).reshape(1, 3, 1, 1)
    std = np.array([0.229, 0.224, 0.225], np.float32).reshape(1, 3, 1, 1)

    def arrays(split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
        with np.load(data_dir / "cifar10" / f"{split}.npz") as stored:
            return (stored["images"][:count].astype(np.float32) / 255 - mean) / std, stored["labels"][:count]

    calib, _ = arrays("train2048", 128)
    images, labels = arrays("test", 600)
    before = Session(m, optimize=True).run({"input": images})["logits"].argmax(1)
    result = _quantize(m, data={"input": calib})
    assert not result.skipped
    fused = _fused(m, tmp_path)
    assert fused == {
        "QuantizeLinear": 1, "QLinearConv": 19, "QLinearAdd": 9, "Slice": 4, "Pad": 2, "QLinearGlobalAveragePool": 1,
        "Flatten": 1, "QGemm": 1,
    }  # fmt: skip
    after = Session(m, optimize=True).run({"input": images})["logits"].argmax(1)
    assert np.mean(after == before) > 0.97
    assert np.mean(after == labels) > np.mean(before == labels) - 0.015


@pytest.mark.parametrize("heavy", [False, True])
def test_auto_takes_the_ranges_that_disturb_less(heavy):
    """Where values far out are rare, the extremes are a bad range for those that are frequent."""
    rng = np.random.default_rng(0)
    weights = {"w": np.eye(4, dtype=np.float32)}
    m = _parse("g (float[N, 4] x) => (float[N, 4] y) { a = MatMul(x, w) y = Tanh(a) }", weights)
    x = (rng.standard_t(2, (4096, 4)) if heavy else rng.uniform(-1, 1, (512, 4))).astype(np.float32)
    first = {"x": x[:256]}
    want, noise = Session(m).run(first)["y"], {}
    for ranges in ("auto", "minmax", "mse"):
        copy = m.clone()
        _quantize(copy, data={"x": x}, sensitive="none", ranges=ranges)
        noise[ranges] = float(np.sum((Session(copy).run(first)["y"] - want) ** 2))
    assert noise["auto"] == min(noise["minmax"], noise["mse"])
    assert not heavy or noise["auto"] < noise["minmax"]
