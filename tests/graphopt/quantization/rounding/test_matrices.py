"""Weights as matrices: the form of layers, and back."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from text_graph import graph

from graphopt.quantization.rounding.matrices import from_matrices, to_matrices
from graphopt.rewriting.layers import layers_of

RNG = np.random.default_rng(0)

LAYERS = {
    "Conv": ("Conv(x, w)", (8, 6, 3, 2)),
    "Conv, grouped": ("Conv<group = 2>(x, w)", (8, 3, 3, 2)),
    "Conv, depthwise": ("Conv<group = 6>(x, w)", (6, 1, 3, 3)),
    "ConvTranspose": ("ConvTranspose(x, w)", (6, 5, 3, 2)),
    "ConvTranspose, grouped": ("ConvTranspose<group = 2>(x, w)", (6, 5, 3, 2)),
    "Gemm": ("Gemm(x, w)", (6, 5)),
    "Gemm, transposed": ("Gemm<transB = 1>(x, w)", (5, 6)),
    "MatMul": ("MatMul(x, w)", (6, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_form_is_that_of_layers(name):
    call, shape = LAYERS[name]
    weight = RNG.standard_normal(shape).astype(np.float32)
    x = "float[N, 6]" if len(shape) == 2 else "float[N, 6, 9, 9]"
    model = graph(f"({x} x) => (float y)", f"y = {call}", w=weight)
    node = next(n for n in model.graph if n.outputs[0].name == "y")
    matrices = to_matrices(node, 1, weight)
    np.testing.assert_array_equal(matrices, layers_of(model)[0]["y"].weight().astype(np.float32))
    back = from_matrices(node, 1, matrices, weight)
    np.testing.assert_array_equal(back, weight)
    assert back.flags.c_contiguous


@pytest.mark.parametrize(("index", "shape"), [(0, (5, 6)), (1, (2, 3, 6, 5)), (0, (3, 5, 6)), (1, (6,)), (0, (6,))])
def test_products_that_are_no_layers(index, shape):
    """A row holds what is summed for one output, whichever side of the product the weight is."""
    weight = RNG.standard_normal(shape).astype(np.float32)
    node = ir.node("MatMul", [ir.Value(name="a"), ir.Value(name="b")])
    matrices = to_matrices(node, index, weight)
    assert matrices.ndim == 3 and matrices.shape[2] == 6
    x = RNG.standard_normal(6).astype(np.float32)
    want = weight @ x if index == 0 else x @ weight
    np.testing.assert_allclose((matrices @ x).ravel(), np.ravel(want), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(from_matrices(node, index, matrices, weight), weight)
