"""Shapes behind operators of ONNX Runtime's own domain."""

from __future__ import annotations

import numpy as np
import pytest
from text_graph import graph

_MICROSOFT = '"com.microsoft" : 1'


def shape_of(model, name: str) -> list:
    value = next(v for node in model.graph for v in node.outputs if v.name == name)
    return [d if isinstance(d, int) else d.value for d in value.shape]


@pytest.mark.parametrize(
    ("node", "parameters", "expected"),
    [
        ("com.microsoft.Gelu(x)", {}, ["b", "s", 8]),
        ("com.microsoft.BiasSplitGelu(x, w)", {"w": (8,)}, ["b", "s", 4]),
        ("com.microsoft.FusedMatMul<transB=1>(x, w)", {"w": (5, 8)}, ["b", "s", 5]),
        ("com.microsoft.FusedMatMul<transA=1>(x, w)", {"w": (2, 5, 7)}, None),
        ("com.microsoft.Attention<num_heads=2>(x, w)", {"w": (8, 18)}, ["b", "s", 6]),
        ("com.microsoft.Attention<num_heads=2, qkv_hidden_sizes=[4, 4, 10]>(x, w)", {"w": (8, 18)}, ["b", "s", 10]),
        ("com.microsoft.MultiHeadAttention<num_heads=2>(x, x, w)", {"w": (1, 3, 6)}, ["b", "s", 6]),
        ("com.microsoft.GroupQueryAttention<num_heads=2, kv_num_heads=1>(x)", {}, ["b", "s", 4]),
        ("com.microsoft.MatMulNBits<N=6, K=8, bits=4, block_size=16>(x, w, w)", {"w": (6,)}, ["b", "s", 6]),
        ("com.microsoft.EmbedLayerNormalization(i, i, w)", {"w": (9, 4), "i": np.zeros((2, 3), np.int32)}, [2, 3, 4]),
        ("SimplifiedLayerNormalization(x, w)", {"w": (8,)}, ["b", "s", 8]),
        ("com.microsoft.NoSuchOperator(x)", {}, None),
    ],
)
def test_results_are_shaped_as_onnx_runtime_shapes_them(node: str, parameters: dict, expected: list | None) -> None:
    model = graph("(float[b,s,8] x) => (float[] y)", f"h = {node}  y = Relu(h)", imports=_MICROSOFT, **parameters)
    value = next(v for n in model.graph for v in n.outputs if v.name == "h")
    if expected is None:
        assert value.shape is None or "s" not in shape_of(model, "h")
    else:
        assert shape_of(model, "h") == expected
    assert [n.op_type for n in model.graph if n.domain == "graphopt.shapes"] == []


def test_the_sum_of_a_skip_normalisation_has_a_shape_and_results_that_nobody_names_do_not_matter() -> None:
    model = graph(
        "(float[b,s,8] x) => (float[] y)",
        "n, m, v, h = com.microsoft.SkipLayerNormalization(x, x, w)  y = Relu(h)",
        imports=_MICROSOFT,
        w=(8,),
    )
    assert shape_of(model, "h") == shape_of(model, "n") == ["b", "s", 8]
