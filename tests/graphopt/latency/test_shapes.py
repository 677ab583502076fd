"""What layers of a model are told apart by, and the small models that stand for them."""

import numpy as np
import pytest
from text_graph import graph

from graphopt import registry
from graphopt.analysis.units import analyse
from graphopt.executor import Session
from graphopt.latency.micro import COPIES, copies, micro
from graphopt.latency.precision import as_int8
from graphopt.latency.shapes import LayerShape, sites

CONV = LayerShape("Conv", "float32", (1, 8, 8), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), activation="Relu")
KINDS = {
    "conv": (CONV, (4, 8)),
    "sum": (LayerShape("Conv", "float32", (2, 9, 9), (3, 3), (2, 2), (1, 1, 1, 1), (1, 1), add=True), (4, 8)),
    "grouped": (LayerShape("Conv", "float32", (1, 8, 8), (1, 1), (1, 1), (0,) * 4, (1, 1), groups=2), (5, 8)),
    "depthwise": (LayerShape("Conv", "float32", (1, 8), (3,), (1,), (1, 1), (1,), 0, activation="Clip"), (6,)),
    "transposed": (LayerShape("ConvTranspose", "float32", (1, 4, 4), (2, 2), (2, 2), (0,) * 4, (1, 1)), (3, 5)),
    "gemm": (LayerShape("Gemm", "float32", (7,), activation="Gelu"), (8, 12)),
    "matmul": (LayerShape("MatMul", "float32", (7,), bias=False, add=True), (8, 12)),
    "product": (LayerShape("Product", "float32", (2, 5)), (3, 8, 6)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_small_models_run_and_hold_as_many_layers_as_asked(kind):
    shape, widths = KINDS[kind]
    for count in (1, 3):
        model = micro(shape, widths, count)
        feeds = {v.name: np.ones(v.shape.numpy(), np.float32) for v in model.graph.inputs}
        assert all(np.isfinite(a).all() for a in Session(model).run(feeds).values())
        op = {"Gemm": "MatMul", "Product": "MatMul"}.get(shape.op, shape.op)
        found = [n for n in model.graph if n.op_type == op]
        assert len(found) - (1 if shape.kernel and op == "Conv" else 0) == count  # one reads the pixels
        assert len([n for n in model.graph if n.op_type == shape.activation]) == (count if shape.activation else 0)
        if shape.add:
            sums = [n for n in model.graph if n.op_type == "Add" and all(v.producer() is not None for v in n.inputs)]
            assert len(sums) == count - 1


def test_in_int8_every_copy_has_an_integer_kernel():
    model = as_int8(micro(KINDS["conv"][0], (4, 8), 3), registry.target("cpu"))
    convolutions = [n for n in model.graph if n.op_type == "Conv"]
    assert len(convolutions) == 4
    assert all(n.inputs[i].producer().op_type == "DequantizeLinear" for n in convolutions for i in (0, 1))


def test_small_layers_are_copied_more_often():
    assert copies(CONV, (4, 4)) == COPIES[1]
    assert copies(CONV, (512, 512)) == COPIES[0]


def test_layers_of_a_residual_network():
    model = graph(
        "(float[1, 3, 8, 8] x) => (float[1, 5] y)",
        """
        a = Conv <pads = [1, 1, 1, 1]> (x, w0, b0)
        s = Relu (a)
        b = Conv <pads = [1, 1, 1, 1]> (s, w1)
        c = Relu (b)
        d = Conv <pads = [1, 1, 1, 1]> (c, w2)
        e = Add (s, d)
        f = Relu (e)
        g = GlobalAveragePool (f)
        h = Flatten (g)
        y = Gemm (h, w3)
        """,
        w0=(8, 3, 3, 3), b0=(8,), w1=(12, 8, 3, 3), w2=(8, 12, 3, 3), w3=(8, 5),
    )  # fmt: skip
    found = {site.key: site for site in sites(model, analyse(model))}
    assert [(s.widths, s.shape.bias, s.shape.add, s.shape.activation) for s in found.values()] == [
        ((3, 8), True, False, "Relu"), ((8, 12), True, False, "Relu"), ((12, 8), True, True, "Relu"),
        ((8, 5), True, False, ""),
    ]  # fmt: skip
    assert found["a"].axes[0] is None
    assert np.array_equal(found["b"].axes[1], found["d"].axes[0])
    assert np.array_equal(found["a"].axes[1], found["y"].axes[0])
    assert found["y"].axes[1] is None
    integer = {site.key: site for site in sites(model, analyse(model), integer=True)}
    assert {str(s.shape).split()[1] for s in integer.values()} == {"int8"}


def test_products_of_activations_count_heads_and_both_sides():
    model = graph(
        "(float[1, 6, 8] x) => (float[1, 6, 8] y)",
        """
        q = MatMul (x, wq)  k = MatMul (x, wk)
        qh = Reshape (q, split)  kh = Reshape (k, split)
        qt = Transpose <perm = [0, 2, 1, 3]> (qh)  kt = Transpose <perm = [0, 2, 3, 1]> (kh)
        scores = MatMul (qt, kt)
        p = Softmax <axis = -1> (scores)
        v = MatMul (x, wv)  vh = Reshape (v, split)  vt = Transpose <perm = [0, 2, 1, 3]> (vh)
        o = MatMul (p, vt)  ot = Transpose <perm = [0, 2, 1, 3]> (o)  or = Reshape (ot, join)
        y = MatMul (or, wo)
        """,
        wq=(8, 8), wk=(8, 8), wv=(8, 8), wo=(8, 8),
        split=np.array([1, 6, 2, 4]), join=np.array([1, 6, 8]),
    )  # fmt: skip
    found = {site.key: site for site in sites(model, analyse(model))}
    assert found["scores"].shape.op == found["o"].shape.op == "Product"
    assert found["scores"].widths == (2, 4, 6)
    assert found["o"].widths == (2, 6, 4)
    assert found["q"].shape == found["v"].shape
    assert found["q"].widths == (8, 8)
