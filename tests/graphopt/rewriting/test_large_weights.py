"""Large weights are scaled in pieces: what comes out is what small ones give, and memory stays bounded."""

from __future__ import annotations

import io
import tracemalloc

import numpy as np
import onnx_ir as ir
import pytest
from fold_checks import context
from text_graph import graph

from graphopt.files.piecewise import ScaledTensor, rows
from graphopt.files.weights import chunks, contains_nan
from graphopt.model import load, save
from graphopt.passes.fold_batchnorm import FoldBatchNorm
from graphopt.rewriting import large_weights, linear
from graphopt.verify import compare, random_feeds

STATISTICS = {"scale": (5,), "bias": (5,), "mean": (5,), "var": np.linspace(0.5, 2, 5).astype(np.float32)}
NORM = "BatchNormalization ({}, scale, bias, mean, var)"


def model(kind: str) -> ir.Model:
    match kind:
        case "gemm":
            body, shape = f"h = Gemm (x, w)  y = {NORM.format('h')}", (7, 5)
        case "gemm transposed":
            body, shape = f"h = Gemm <transB: int = 1, alpha: float = 0.5> (x, w)  y = {NORM.format('h')}", (5, 7)
        case "matmul":
            body, shape = f"h = MatMul (x, w)  y = {NORM.format('h')}", (7, 5)
        case "before gemm":
            body, shape = f"h = {NORM.format('x')}  y = Gemm <transB: int = 1> (h, w)", (6, 5)
        case "before matmul":
            body, shape = f"h = {NORM.format('x')}  y = MatMul (h, w)", (5, 6)
        case "conv":
            text = "(float[2, 3, 6, 6] x) => (float[2, 5, 4, 4] y)"
            return graph(text, f"h = Conv (x, w)  y = {NORM.format('h')}", w=(5, 3, 3, 3), **STATISTICS)
    inputs = 5 if kind.startswith("before") else 7
    outputs = 6 if kind.startswith("before") else 5
    return graph(f"(float[3, {inputs}] x) => (float[3, {outputs}] y)", body, w=shape, **STATISTICS)


@pytest.mark.parametrize("kind", ["gemm", "gemm transposed", "matmul", "before gemm", "before matmul", "conv"])
def test_pieces_give_what_the_whole_gives(kind, monkeypatch, tmp_path):
    original = model(kind)
    small, large = original.clone(), original.clone()
    FoldBatchNorm().run(small, context())
    monkeypatch.setattr(linear, "LARGE", 1)
    monkeypatch.setattr("graphopt.files.piecewise.ELEMENTS", 8)
    assert FoldBatchNorm().run(large, context()).changed
    weight = large.graph.initializers["w"].const_value
    assert isinstance(weight, ScaledTensor)
    np.testing.assert_array_equal(weight.numpy(), small.graph.initializers["w"].const_value.numpy())
    assert compare(original, large, random_feeds(original, 0)).equal
    save(large, tmp_path / "m.onnx")
    np.testing.assert_array_equal(load(tmp_path / "m.onnx").graph.initializers["w"].const_value.numpy(), weight.numpy())


def test_a_weight_of_a_data_file_goes_to_a_data_file(tmp_path):
    big = graph("(float[2, 64] x) => (float[2, 64] y)", "y = MatMul (x, w)", w=(64, 64))
    save(big, tmp_path / "in.onnx", external=True)
    large = load(tmp_path / "in.onnx")
    weight = large.graph.initializers["w"]
    weight.const_value = ScaledTensor(weight.const_value, np.full(64, 0.5), 1)
    save(large, tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx.data").is_file()
    np.testing.assert_array_equal(
        load(tmp_path / "out.onnx").graph.initializers["w"].const_value.numpy(), weight.const_value.numpy()
    )


def test_what_the_type_cannot_hold_is_refused():
    weight = ir.Tensor(np.ones((4, 3), np.float16))
    scale = np.array([1.0, 1e6, 1.0])
    assert "not finite in FLOAT16" in large_weights.scaled(weight, scale, 1, 1)
    assert "loses precision" in large_weights.scaled(
        ir.Tensor(np.full((4, 3), 0.3, np.float16)), scale * 0 + 1e-7, 1, 1
    )


def test_two_scales_are_rounded_once():
    weight = ir.Tensor(np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32))
    a, b = np.array([0.1, 0.2, 0.3]), np.array([3.0, 7.0, 9.0])
    twice = ScaledTensor(ScaledTensor(weight, a, 1), b, 1)
    np.testing.assert_array_equal(twice.numpy(), (weight.numpy().astype(np.float64) * (a * b)).astype(np.float32))
    assert twice.source is weight


def test_memory_is_that_of_a_piece():
    weight = ir.Tensor(np.ones((1 << 13, 1 << 11), np.float32), name="w")
    tracemalloc.start()
    found = large_weights.scaled(weight, np.full(1 << 11, 0.5), 1, 1)
    assert isinstance(found, ScaledTensor) and not contains_nan(found)
    written = sum(len(chunk) for chunk in chunks(found))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert written == weight.nbytes
    assert peak < 0.75 * weight.nbytes
    found.tofile(sink := io.BytesIO())
    assert sink.getbuffer().nbytes == weight.nbytes


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_extremes_are_told_without_arithmetic(dtype):
    """Where the shortcut says that all products are normal numbers, they are; and ordinary weights take it."""
    limits, rng = np.finfo(dtype), np.random.default_rng(0)
    for smallest, largest, factor in (
        (1.0, 8.0, 0.5),
        (limits.tiny, 8.0, 0.5),
        (1.0, limits.max, 2.0),
        (0.0, 0.0, 2.0),
    ):
        data = rng.uniform(1, 2, (6, 5)).astype(dtype) * (largest > 0)
        data[0], data[3, 2], data[5, 0] = 0, smallest, -largest
        scale = np.full(5, factor)
        with np.errstate(over="ignore"):
            product = data.astype(np.float64) * scale
        normal = (np.abs(product[product != 0]) >= limits.tiny).all() and np.abs(product).max() < limits.max
        assert large_weights._stays_normal(ir.Tensor(data), scale) == normal
    assert not large_weights._stays_normal(ir.Tensor(np.array([[np.nan, 1]], dtype)), np.ones(2))
    assert not large_weights._stays_normal(ir.Tensor(np.ones((1, 2), dtype)), np.array([np.inf, 1]))


@pytest.mark.parametrize("kind", [ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT, ir.DataType.DOUBLE])
def test_rows_are_rounded_as_the_whole_is(kind):
    data = np.random.default_rng(1).normal(size=(9, 4)).astype(kind.numpy())
    scale = np.random.default_rng(2).normal(size=9)
    found = ScaledTensor(ir.Tensor(data, dtype=kind), scale, 0)
    whole = (data.astype(np.float64) * scale[:, None]).astype(kind.numpy())
    np.testing.assert_array_equal(found.rows(2, 7), whole[2:7])
    np.testing.assert_array_equal(found.numpy(), whole)


def test_rows_of_a_file_at_an_odd_place(tmp_path):
    net = graph("(float[2, 9] x) => (float[2, 70] y)", "h = MatMul (x, w)  y = Add (h, b)", w=(9, 70), b=(70,))
    save(net, tmp_path / "in.onnx")  # inside the message: nothing is aligned
    for name, value in load(tmp_path / "in.onnx").graph.initializers.items():
        whole = net.graph.initializers[name].const_value.numpy()
        np.testing.assert_array_equal(rows(value.const_value, 3, 8), whole[3:8])
