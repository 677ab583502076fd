"""Any mixture of formats: valid, close to float, the same bytes twice; what it looks like as text."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import replace

import attention_graphs
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_graphs import random_graph
from text_graph import graph

from graphopt import calibration
from graphopt.base import Context
from graphopt.model import check, infer_shapes
from graphopt.pipeline.clone import private_clone
from graphopt.progress import Silent
from graphopt.quantization.apply import apply
from graphopt.quantization.formats import FORMATS, Format, candidates
from graphopt.quantization.prepared import Prepared
from graphopt.quantization.search.sensitivity import decibel
from graphopt.quantization.static.scheme import StaticOptions, prepare
from graphopt.registry import pass_class, target
from graphopt.target import Target
from graphopt.verify import random_feeds

CPU = target("cpu")


def _prepared(model: ir.Model, device: Target = CPU) -> Prepared:
    assert device.quant is not None
    data = calibration.load(random_feeds(model, 0, samples=8), model)
    ctx = Context(device, data, None, 0, 1, Silent(), pass_class)
    return prepare(model, ctx, device.quant, StaticOptions(ranges="minmax"))[0]


def _applied(prepared: Prepared, assignment: dict[str, Format]) -> ir.Model:
    copy = private_clone(prepared.model)
    apply(copy, assignment, prepared)
    check(copy)
    return copy


def _bytes(model: ir.Model) -> bytes:
    return ir.to_proto(model).SerializeToString(deterministic=True)


def _text(model: ir.Model) -> list[str]:
    """One line a node: outputs = op(inputs), scales and zero points left out."""
    hidden = ("_scale", "_zero_point", "_zero_point_1", "_scale_1")
    return [
        f"{_names(n.outputs)} = {n.op_type}({_names(v for v in n.inputs if v and not str(v.name).endswith(hidden))})"
        for n in model.graph
    ]


def _names(values: Iterable[ir.Value | None]) -> str:
    return ", ".join(str(v.name) for v in values if v is not None)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 10**6))
def test_random_assignments_of_random_graphs(seed):
    blocks = [attention_graphs.separate, attention_graphs.fused, attention_graphs.grouped]
    model = blocks[seed // 3 % 3]() if seed % 3 == 0 else random_graph(seed)
    infer_shapes(model)
    choose = random.Random(seed)
    device = target(choose.choice(["cpu", "cpu", "cpu-arm64", "jetson-orin"]))
    prepared = _prepared(model, device)
    before = _bytes(model)
    found = candidates(model, device)
    chosen = {key: choose.choice(c.formats) for key, c in found.items() if choose.random() < 0.8}
    written = _applied(prepared, chosen)
    assert _bytes(written) == _bytes(_applied(prepared, chosen))
    assert _bytes(prepared.model) == before
    assert decibel(prepared.reference.noise(written)) > (3 if "int4-weights" in chosen.values() else 8)


CHAIN = """
    h = MatMul (x, w)
    hb = Add (h, b)
    r = Relu (hb)
    k = MatMul (r, v)
    s = Add (k, r)
    y = MatMul (s, u)
"""


def _chain() -> ir.Model:
    return graph("(float[N, 16] x) => (float[N, 16] y)", CHAIN, w=(16, 16), b=(16,), v=(16, 16), u=(16, 16))


def test_static_and_dynamic_layers_side_by_side():
    """A dynamic layer between static ones: what stands beside it is planned as if it were in float."""
    prepared = _prepared(_chain())
    written = _applied(prepared, {"h": "int8", "k": "int8-dynamic", "y": "int8"})
    assert _text(written) == [
        "x_quantized = QuantizeLinear(x)",
        "x_dequantized = DequantizeLinear(x_quantized)",
        "w_dequantized = DequantizeLinear(w_quantized)",
        "h = MatMul(x_dequantized, w_dequantized)",
        "b_dequantized = DequantizeLinear(b_quantized)",
        "hb = Add(h, b_dequantized)",
        "r = Relu(hb)",
        "r_quantized_1 = QuantizeLinear(r)",
        "r_dequantized = DequantizeLinear(r_quantized_1)",
        "r_quantized, r_scale, r_zero_point = DynamicQuantizeLinear(r_dequantized)",
        "k_int32 = MatMulInteger(r_quantized, v_quantized)",
        "k_float = Cast(k_int32)",
        "k_scale = Mul()",
        "k = Mul(k_float)",
        "k_quantized = QuantizeLinear(k)",
        "k_dequantized = DequantizeLinear(k_quantized)",
        "s = Add(k_dequantized, r_dequantized)",
        "s_quantized = QuantizeLinear(s)",
        "s_dequantized = DequantizeLinear(s_quantized)",
        "u_dequantized = DequantizeLinear(u_quantized)",
        "y = MatMul(s_dequantized, u_dequantized)",
    ]


def test_nothing_assigned_is_nothing_done():
    prepared = _prepared(_chain())
    before = _bytes(prepared.model)
    assert _bytes(_applied(prepared, {})) == before
    assert _bytes(_applied(prepared, {"h": "float"})) == before


def test_without_data_no_layer_is_static_and_says_why():
    model = _chain()
    assert CPU.quant is not None
    prepared = Prepared(model, CPU.quant, per_channel=True)
    done = apply(private_clone(model), {"h": "int8"}, prepared)
    assert [(s.node, s.reason) for s in done.skipped] == [("MatMul(h)", "tensor x has no scale: it was not measured")]


def test_candidates_and_what_stands_against_them():
    model = graph(
        "(int64[N] i, float[N, 16] x) => (float[N, 16] y, float[N, N] p, float[1, N, 8] r)",
        """
        e = Gather (table, i)
        s = Add (e, x)
        y = MatMul (s, w)
        t = Transpose (x)
        p = MatMul (x, t)
        x3 = Unsqueeze (x, zero)
        g, r = GRU <hidden_size = 8> (x3, gw, gr)
        """,
        table=(50, 16), w=(16, 16), zero=np.array([0]), gw=(1, 24, 16), gr=(1, 24, 8),
    )  # fmt: skip
    found = candidates(model, CPU)
    kinds = {key: c.kind for key, c in found.items()}
    assert kinds == {"e": "table", "s": "between", "y": "layer", "p": "product", "g": "recurrent"}
    assert {"int8", "int8-dynamic"} <= set(found["y"].formats)
    for candidate in found.values():
        assert candidate.formats[0] == "float"
        assert {*candidate.formats, *candidate.reasons} == set(FORMATS)
        assert all(candidate.reasons.values())
    assert "int8" in found["p"].formats
    barred = candidates(model, CPU, ("MatMul(y)",))["y"]
    assert barred.formats == ("float",) and set(barred.reasons.values()) == {"excluded by 'MatMul(y)'"}
    none = candidates(model, replace(CPU, quant=None))
    assert not any({"int8", "int8-dynamic"} & set(c.formats) for c in none.values())


@pytest.mark.parametrize("format", ["int8", "int8-dynamic"])
def test_sparse_weights_stay_sparse(format):
    """2:4 zeros are on every symmetric grid."""
    rng = np.random.default_rng(0)
    sparse = rng.standard_normal((16, 16)).astype(np.float32)
    sparse.reshape(-1, 4, 16)[:, :2] = 0
    prepared = _prepared(graph("(float[N, 16] x) => (float[N, 16] y)", "y = MatMul (x, w)", w=sparse))
    written = _applied(prepared, {"y": format})
    stored = next(v.const_value for n, v in written.graph.initializers.items() if n == "w_quantized")
    assert stored.numpy().any() and not stored.numpy()[sparse == 0].any()
