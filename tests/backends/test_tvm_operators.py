"""Operators that TVM's importer lacks: what is compiled of them computes what ONNX Runtime does."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from text_graph import graph

pytest.importorskip("tvm", reason="the extra 'tvm' is not installed")

from graphopt import registry
from graphopt.backends.tvm import TvmBackend
from graphopt.backends.tvm_check import check
from graphopt.errors import ModelError
from graphopt.executor import Session
from graphopt.verify import random_feeds

MS = '"com.microsoft" : 1'
TARGET = registry.target("tvm-cpu")


def same(model: ir.Model, feeds: dict[str, np.ndarray] | None = None) -> None:
    given = dict(random_feeds(model, 0, samples=1)[0]) if feeds is None else feeds
    with Session(model) as reference:
        wanted = reference.run(given)
    found = TvmBackend().session(model, TARGET).run(given)
    assert wanted.keys() == found.keys()
    for name, want in wanted.items():
        assert found[name].dtype == want.dtype
        np.testing.assert_allclose(found[name], want, rtol=1e-4, atol=1e-5, err_msg=name)


def test_fused_products_and_convolutions() -> None:
    same(
        graph(
            "(float[2,4,6,6] x, float[2,5,4] t) => (float[2,5,3] p, float[2,4,5] q, float[2,4,6,6] c, float[2,4,6,6] d,"
            " float[5,3] g)",
            "p = com.microsoft.FusedMatMul<alpha = 0.7, transB = 1>(t, w)"
            "  q = com.microsoft.FusedMatMul<transA = 1>(t, e)"
            '  c = com.microsoft.FusedConv<activation = "LeakyRelu", activation_params = [0.3], pads = [1, 1, 1, 1]>'
            '(x, k, b)  d = com.microsoft.FusedConv<activation = "Tanh", pads = [1, 1, 1, 1]>(x, k, b, x)'
            '  g = com.microsoft.FusedGemm<activation = "Sigmoid", transB = 1>(s, w, v)',
            imports=MS,
            w=(3, 4),
            e=(2, 5, 5),
            k=(4, 4, 3, 3),
            b=(4,),
            s=(5, 4),
            v=(3,),
        )
    )


def test_activations_and_norms() -> None:
    same(
        graph(
            "(float[n,5,8] x) => (float[n,5,8] a, float[n,5,8] b, float[n,5,8] c, float[n,5,8] d, float[n,5,8] e,"
            " float[n,5,8] f, float[n,5,8] sum, float[n,5,8] g)",
            "a = Celu<alpha = 0.6>(x)  b = com.microsoft.QuickGelu(x)  c = LpNormalization<axis = 1, p = 1>(x)"
            "  d = SimplifiedLayerNormalization<axis = -1, epsilon = 1e-4>(x, w)"
            "  e = com.microsoft.SkipSimplifiedLayerNormalization<epsilon = 1e-4>(x, x, w)"
            "  f, m, s, sum = com.microsoft.SkipLayerNormalization<epsilon = 1e-4>(x, b, w)"
            "  g = com.microsoft.SkipLayerNormalization<epsilon = 1e-4>(x, b, w, v, v)",
            imports=MS,
            w=(8,),
            v=(8,),
        )
    )


def test_zeros_have_a_norm_of_zero() -> None:
    model = graph("(float[2,3] x) => (float[2,3] y)", "y = LpNormalization<p = 2>(x)")
    same(model, {"x": np.array([[0, 0, 0], [3, 0, 4]], dtype=np.float32)})


def test_attention_of_onnx_runtime() -> None:
    mask = np.array([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]], dtype=np.int32)
    model = graph(
        "(float[2,5,8] x, float[2,3,8] z, int32[2,5] mask) => (float[2,5,8] a, float[2,5,8] b, float[2,3,8] c)",
        "a = com.microsoft.Attention<num_heads = 2>(x, w, bias, mask)"
        "  b = com.microsoft.Attention<num_heads = 4, unidirectional = 1, scale = 0.2>(x, w, bias)"
        "  c = com.microsoft.MultiHeadAttention<num_heads = 2>(z, x, x, bias, mask, more)",
        imports=MS, w=(8, 24), bias=(24,), more=(1, 2, 3, 5),
    )  # fmt: skip
    same(model, {**random_feeds(model, 0, samples=1)[0], "mask": mask})


def test_attention_of_the_standard() -> None:
    model = graph(
        "(float[2,4,5,6] q, float[2,2,5,6] k, float[2,5,24] t, bool[5,5] mask)"
        " => (float[2,4,5,6] a, float[2,5,24] b, float[2,4,5,6] c)",
        "a = Attention<is_causal = 1>(q, k, k)  b = Attention<q_num_heads = 4, kv_num_heads = 4, scale = 0.3>(t, t, t)"
        "  c = Attention(q, k, k, mask)",
        opset=23,
    )
    feeds = dict(random_feeds(model, 0, samples=1)[0])
    same(model, {**feeds, "mask": np.tri(5, dtype=bool)})


def test_expand_beside_an_open_batch() -> None:
    model = graph("(float[n,1,3] x) => (float[n,4,3] y)", "y = Expand(x, s)", s=np.array([1, 4, 1]))
    session = TvmBackend().session(model, TARGET)
    x = np.arange(6, dtype=np.float32).reshape(2, 1, 3)
    np.testing.assert_array_equal(session.run({"x": x})["y"], np.repeat(x, 4, axis=1))


@pytest.mark.parametrize(
    ("signature", "body", "said"),
    [
        ("(float[2,4,4] x) => (float[2,4,4] y)",
         "y = com.microsoft.FusedMatMul<transBatchA = 1>(x, x)", "transBatchA"),
        ("(float[1,4,6] x, float[6,18] w, float[18] b, float[2,1,2,3,3] past) => (float[1,4,6] y)",
         "y = com.microsoft.Attention<num_heads = 2>(x, w, b, , past)", "past"),
        ("(float[1,4,6] x, float[6] w) => (float[1,4,6] y, float[1,4,1] mean)",
         "y, mean = com.microsoft.SkipLayerNormalization(x, x, w)", "mean"),
    ],
)  # fmt: skip
def test_what_of_them_is_not_converted_is_named(signature: str, body: str, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        check(graph(signature, body, imports=MS))


def test_positions_of_an_open_sequence() -> None:
    model = graph(
        "(int64[b,t] ids) => (float[b,t,4] y, int64[m] later)",
        "s = Shape(ids)  n = Gather(s, one)  r = Range(nought, n, one)  p = Gather(q, r)  e = Gather(v, ids)"
        "  y = Add(e, p)  later = Range(three, n, one)",
        nought=np.array(0), one=np.array(1), three=np.array(3), q=(16, 4), v=(9, 4),
    )  # fmt: skip
    for length in (2, 5):
        same(model, {"ids": np.arange(length)[None]})
