"""quantize, scheme by scheme: what is written, without data where none is needed, once, the same twice, zeros kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from text_graph import graph

import graphopt
from graphopt import calibration
from graphopt.base import Context, PassResult
from graphopt.errors import UsageError
from graphopt.executor import Session
from graphopt.model import check, infer_shapes
from graphopt.passes.quantize import Quantize
from graphopt.progress import Silent
from graphopt.registry import pass_class, target
from graphopt.rewriting.scopes import graphs

RNG = np.random.default_rng(0)
INTEGERS = ("int8", "int8-dynamic", "int8-weights", "int4-weights")
WITHOUT_DATA = ("int8-dynamic", "int8-weights", "int4-weights", "fp16")
LEAST_DB = {"int8": 30, "int8-dynamic": 30, "int8-weights": 35, "int4-weights": 15, "fp16": 50}


def _quantize(model: ir.Model, scheme: str, data: Any = None, **options: Any) -> PassResult:
    """Run the pass; data for the schemes that need it."""
    if data is None and scheme == "int8":
        data = _data(model)
    source = None if data is None else calibration.load(data, model)
    context = Context(target("cpu"), source, None, 0, 1, Silent(), pass_class)
    result = Quantize(scheme=scheme, **options).run(model, context)  # type: ignore[arg-type]
    check(model)
    return result


def _data(model: ir.Model, samples: int = 32) -> dict[str, np.ndarray]:
    made = {}
    for value in model.graph.inputs:
        shape = (samples, *(d if isinstance(d, int) else 8 for d in value.shape[1:]))
        whole = value.dtype is not None and value.dtype.is_integer()
        x = RNG.integers(0, 10, shape) if whole else np.clip(RNG.standard_normal(shape), -3, 3)
        made[str(value.name)] = x.astype(value.dtype.numpy())
    return made


def _decibel(before: ir.Model, after: ir.Model) -> float:
    feeds = _data(before, 8)
    want, got = (Session(m).run(feeds) for m in (before, after))
    noise = max(float(np.sum(np.square(got[n] - want[n])) / np.sum(np.square(want[n]))) for n in want)
    return float(-10 * np.log10(max(noise, 1e-12)))


def _bytes(model: ir.Model) -> bytes:
    return ir.to_proto(model).SerializeToString(deterministic=True)


def _text(model: ir.Model) -> list[str]:
    return [f"{_names(n.outputs)} = {n.op_type}({_names(n.inputs)})" for g in graphs(model) for n in g]


def _names(values: Iterable[ir.Value | None]) -> str:
    return ", ".join("" if v is None else str(v.name) for v in values)


def _ops(model: ir.Model) -> Counter[str]:
    return Counter(n.op_type for g in graphs(model) for n in g)


def _stored(model: ir.Model) -> dict[str, np.ndarray]:
    return {n: v.const_value.numpy() for n, v in model.graph.initializers.items() if v.const_value is not None}


def _product(inputs: int = 64, outputs: int = 48) -> ir.Model:
    """Large enough for every form to pay."""
    return graph(
        f"(float[N, {inputs}] x) => (float[N, {outputs}] y)",
        "h = MatMul (x, w)  y = Add (h, b)",
        w=(inputs, outputs), b=(outputs,),
    )  # fmt: skip


# -- what is written -------------------------------------------------------------------------------------------------


def test_int8_dynamic_golden():
    model = _product()
    _quantize(model, "int8-dynamic")
    assert _text(model) == [
        "x_quantized, x_scale, x_zero_point = DynamicQuantizeLinear(x)",
        "h_int32 = MatMulInteger(x_quantized, w_quantized, x_zero_point)",
        "h_float = Cast(h_int32)",
        "h_scale = Mul(x_scale, w_scale)",
        "h = Mul(h_float, h_scale)",
        "y = Add(h, b)",
    ]


def test_int8_weights_golden():
    model = _product()
    _quantize(model, "int8-weights")
    assert _text(model) == [
        "w_Cast_0 = Cast(w_quantized)",
        "w_Mul_0 = Mul(w_Cast_0, w_scale)",
        "w = Reshape(w_Mul_0, w_shape)",
        "h = MatMul(x, w)",
        "y = Add(h, b)",
    ]


def test_int4_weights_golden():
    model = _product()
    _quantize(model, "int4-weights")
    assert _text(model) == [
        "w_Cast_0 = Cast(w_quantized)",
        "w_Mod_0 = Mod(w_Cast_0, w_base)",
        "w_Sub_0 = Sub(w_Cast_0, w_Mod_0)",
        "w_Mul_0 = Mul(w_Sub_0, w_step)",
        "w_Concat_0 = Concat(w_Mod_0, w_Mul_0)",
        "w_Reshape_0 = Reshape(w_Concat_0, w_view)",
        "w_Cast_1_0 = Cast(w_zero_point)",
        "w_Sub_1_0 = Sub(w_Reshape_0, w_Cast_1_0)",
        "w_Mul_1_0 = Mul(w_Sub_1_0, w_scale)",
        "w = Reshape(w_Mul_1_0, w_shape)",
        "h = MatMul(x, w)",
        "y = Add(h, b)",
    ]


@pytest.mark.parametrize("scheme", ["int8-weights", "int4-weights"])
def test_weights_of_large_products_are_computed_from_blocks(scheme):
    model = _product(512, 384)
    before = model.clone()
    result = _quantize(model, scheme)
    assert _ops(model) == {"MatMulNBits": 1} or _ops(model) == {"MatMulNBits": 1, "Add": 1}
    assert "w" not in model.graph.initializers
    assert _decibel(before, model) > LEAST_DB[scheme]
    assert result.changed and not result.skipped


def test_fp16_golden():
    model = _product()
    _quantize(model, "fp16")
    assert _text(model) == [
        "x_float16 = Cast(x)",
        "h = MatMul(x_float16, w)",
        "y_inner = Add(h, b)",
        "y = Cast(y_inner)",
    ]


@pytest.mark.parametrize("group", [1, 2, 8])
def test_weights_of_grouped_convolutions_have_a_scale_for_every_channel(group):
    model = graph(
        "(float[N, 8, 6, 6] x) => (float[N, 16, 4, 4] y)",
        f"y = Conv <group = {group}> (x, w)",
        w=(16, 8 // group, 3, 3),
    )
    before = model.clone()
    context = Context(target("jetson-orin"), None, None, 0, 1, Silent(), pass_class)
    assert Quantize(scheme="int8-weights").run(model, context).changed
    assert _ops(model) == {"DequantizeLinear": 1, "Conv": 1}
    assert _decibel(before, model) > LEAST_DB["int8-weights"]


# -- data --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", WITHOUT_DATA)
def test_what_needs_no_data_runs_without(scheme):
    model = _product()
    before = model.clone()
    found = graphopt.optimize(model, f"quantize{{scheme={scheme}}}", bench=False)
    assert found.report.passes[0].status == "applied"
    assert _decibel(before, found.model) > LEAST_DB[scheme]


@pytest.mark.parametrize("scheme", ["int8", "auto"])
def test_what_needs_data_is_refused_before_any_work(scheme):
    with pytest.raises(UsageError, match="calib"):
        graphopt.optimize(_product(), f"quantize{{scheme={scheme}}}", bench=False)


# -- determinism -----------------------------------------------------------------------------------------------------


def _network() -> ir.Model:
    """A convolution, a shared weight, a depthwise one, a Gemm, a table."""
    return graph(
        "(float[N, 4, 8, 8] x, int64[N, 3] i) => (float[N, 10] y, float[N, 3, 10] e)",
        """
        c = Conv <pads = [1, 1, 1, 1]> (x, w, b)
        r = Relu (c)
        d = Conv <pads = [1, 1, 1, 1], group = 16> (r, v)
        p = GlobalAveragePool (d)
        f = Flatten (p)
        g = Gemm <transB = 1> (f, u, a)
        s = Relu (g)
        y = MatMul (s, t)
        t0 = Gather (table, i)
        e0 = MatMul (t0, t)
        e = Tanh (e0)
        """,
        w=(16, 4, 3, 3), b=(16,), v=(16, 1, 3, 3), u=(64, 16), a=(64,), t=(64, 10), table=(600, 64),
    )  # fmt: skip


@pytest.mark.parametrize("scheme", INTEGERS)
def test_the_same_bytes_twice_and_nothing_the_second_time(scheme):
    first, second = _network(), _network()
    data = _data(first)
    before = first.clone()
    result = _quantize(first, scheme, data)
    _quantize(second, scheme, data)
    assert result.changed
    assert _bytes(first) == _bytes(second)
    assert _decibel(before, first) > LEAST_DB[scheme] - 10
    infer_shapes(first)
    written = _bytes(first)
    again = _quantize(first, scheme, data)
    assert not again.changed
    assert _bytes(first) == written


# -- where weights come from -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", INTEGERS)
def test_weights_in_constant_nodes(scheme):
    weight = RNG.standard_normal((64, 48)).astype(np.float32)
    model = graph("(float[N, 64] x) => (float[N, 48] y)", "y = MatMul (x, w)", w=weight)
    value = model.graph.initializers.pop("w")
    node = ir.node("Constant", [], {"value": ir.Tensor(weight)}, outputs=[ir.Value(name="w_constant")])
    model.graph.insert_before(model.graph[0], node)
    value.replace_all_uses_with(node.outputs[0])
    infer_shapes(model)
    before = model.clone()
    assert _quantize(model, scheme).changed
    assert "Constant" not in _ops(model)
    assert not any(a.dtype == np.float32 and a.size >= weight.size for a in _stored(model).values())
    assert _decibel(before, model) > LEAST_DB[scheme]


@pytest.mark.parametrize("scheme", INTEGERS)
def test_a_shared_weight_is_stored_once(scheme):
    model = graph(
        "(float[N, 64] x) => (float[N, 64] y)", "h = MatMul (x, w)  r = Tanh (h)  y = MatMul (r, w)", w=(64, 64)
    )
    before = model.clone()
    _quantize(model, scheme)
    large = [n for n, a in _stored(model).items() if a.nbytes >= 64 * 64 // 2]
    assert len(large) == 1 and large[0].startswith("w_")
    assert _decibel(before, model) > LEAST_DB[scheme] - 5


@pytest.mark.parametrize("scheme", INTEGERS)
def test_a_table_tied_to_the_last_layer_is_stored_once(scheme):
    model = graph(
        "(int64[N, 8] i) => (float[N, 8, 600] y)",
        "e = Gather (table, i)  t = Tanh (e)  flat = Reshape (t, rows)  g = Gemm <transB = 1> (flat, table)  "
        "y = Reshape (g, shape)",
        table=(600, 64), rows=np.array([-1, 64]), shape=np.array([-1, 8, 600]),
    )  # fmt: skip
    before = model.clone()
    result = _quantize(model, scheme)
    assert result.changed
    large = [n for n, a in _stored(model).items() if a.nbytes >= 600 * 64 // 2]
    assert len(large) == 1, large
    assert _decibel(before, model) > LEAST_DB[scheme] - 5


@pytest.mark.parametrize("sizes", [(600, 64), (600, 384)])
@pytest.mark.parametrize("scheme", ["int8-weights", "int4-weights"])
def test_a_table_that_the_last_layer_reads_transposed_is_stored_once(scheme, sizes):
    rows, columns = sizes
    model = graph(
        f"(int64[N, 8] i) => (float[N, 8, {rows}] y)",
        "e = Gather (table, i)  t = Tanh (e)  turned = Transpose <perm = [1, 0]> (table)  y = MatMul (t, turned)",
        table=sizes,
    )
    before = model.clone()
    result = _quantize(model, scheme)
    assert result.changed and not result.skipped
    large = [n for n, a in _stored(model).items() if a.nbytes >= rows * columns // 2]
    assert len(large) == 1, large
    assert sum(a.nbytes for a in _stored(model).values()) < 1.3 * rows * columns
    assert _decibel(before, model) > LEAST_DB[scheme] - 5


# -- zeros -----------------------------------------------------------------------------------------------------------


def _sparse(*shape: int) -> np.ndarray:
    weight = RNG.standard_normal(shape).astype(np.float32)
    weight.reshape(-1, 4, shape[-1])[:, 1:3] = 0
    return weight


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scheme", INTEGERS)
@pytest.mark.parametrize("sizes", [(64, 48), (512, 384)])
def test_zeros_stay_zeros(scheme, symmetric, sizes):
    """A weight is read back as it is computed with: rows of a unit matrix go through it."""
    weight = _sparse(*sizes)
    model = graph(f"(float[N, {sizes[0]}] x) => (float[N, {sizes[1]}] y)", "y = MatMul (x, w)", w=weight)
    data = {"x": np.concatenate([np.eye(sizes[0]), -np.eye(sizes[0])]).astype(np.float32)}
    assert _quantize(model, scheme, data if scheme == "int8" else None, symmetric=symmetric).changed
    computed = Session(model).run({"x": np.eye(sizes[0], dtype=np.float32)})["y"]
    assert np.abs(computed[weight == 0]).max() < 1e-6  # kernels take zero points away in float
    assert np.mean(computed[weight != 0] != 0) > 0.8


@pytest.mark.parametrize("scheme", INTEGERS)
def test_wrappers_of_sparse_layers_stay_in_float(scheme):
    model = _product(64, 64)
    data = _data(model, 256)
    spec = "armor{form=factors,overhead=0.4}"
    factors = graphopt.optimize(model, spec, calib=data, target="torch-cuda", bench=False).model
    result = _quantize(factors, scheme, data if scheme == "int8" else None)
    assert result.changed
    reasons = {skip.reason for skip in result.skipped}
    assert "the wrapper of a sparse core: it stays in float" in reasons


# -- what does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", INTEGERS)
def test_nothing_fits_and_every_layer_says_why(scheme):
    model = graph("(double[N, 8] x, double[8, 4] w) => (double[N, 4] y)", "y = MatMul (x, w)")
    before = _bytes(model)
    result = _quantize(model, scheme)
    assert not result.changed and _bytes(model) == before
    assert [skip.node for skip in result.skipped] == ["MatMul(y)"]
    assert all(skip.reason for skip in result.skipped)


@pytest.mark.parametrize("scheme", INTEGERS)
def test_models_in_half_precision(scheme):
    weight = RNG.standard_normal((64, 48)).astype(np.float16)
    model = graph("(float16[N, 64] x) => (float16[N, 48] y)", "y = MatMul (x, w)", w=weight)
    before = model.clone()
    result = _quantize(model, scheme)
    if result.changed:
        assert _decibel(before, model) > LEAST_DB[scheme] - 5
    else:
        assert "float16" in result.skipped[0].reason


@pytest.mark.parametrize("scheme", INTEGERS)
def test_old_opsets(scheme):
    model = graph("(float[N, 64] x) => (float[N, 48] y)", "y = MatMul (x, w)", opset=9, w=(64, 48))
    before = model.clone()
    result = _quantize(model, scheme)
    assert _decibel(before, model) > LEAST_DB[scheme]
    assert result.changed and any("opset" in note for note in result.notes)


def test_whoever_gets_a_slower_model_is_told_of_auto() -> None:
    assert "quantize{scheme=auto}" in Quantize().if_slower()
    assert Quantize(scheme="auto").if_slower() == ""
