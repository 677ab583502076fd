"""quantize{scheme=int8-dynamic} as a whole: what it writes with and without data, and for whom."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from text_graph import graph

import graphopt
from graphopt.quantization.dynamic.scheme import dynamic_layers
from graphopt.registry import target

RNG = np.random.default_rng(0)
OUTLIERS = np.where(np.arange(16) == 3, 64.0, 1.0)


def block() -> ir.Model:
    """Two products, a residual sum and its norm; one channel of x is much larger than the others."""
    w = (RNG.normal(size=(16, 16)) / OUTLIERS[:, None]).astype(np.float32)
    return graph(
        "(float[n,4,16] x) => (float[n,4,16] y)",
        "h = MatMul(x, w)  r = Relu(h)  k = MatMul(r, v)  s = Add(k, x)  y = LayerNormalization(s, g)",
        w=w, v=(16, 16), g=(16,),
    )  # fmt: skip


def samples() -> dict[str, np.ndarray]:
    return {"x": (RNG.normal(size=(16, 4, 16)) * OUTLIERS).astype(np.float32)}


def quantised(**options: Any) -> list[str]:
    result = graphopt.optimize(block(), options.pop("spec", "quantize{scheme=int8-dynamic}"), bench=False, **options)
    return [node.op_type for node in result.model.graph]


def test_without_data() -> None:
    operators = quantised()
    assert operators.count("DynamicQuantizeLinear") == operators.count("MatMulInteger") == 2
    assert operators.count("Mul") == 4


def test_data_tells_outliers() -> None:
    operators = quantised(calib=samples())
    assert operators[0] == "Mul"
    assert operators.count("Mul") == 5
    assert quantised(calib=samples(), spec="quantize{scheme=int8-dynamic,prepare=none}").count("Mul") == 4


def test_sums_before_norms_follow_the_target() -> None:
    assert quantised()[-2:] == ["Sum", "LayerNormalization"]
    assert quantised(target="cpu-arm64")[-2:] == ["Add", "LayerNormalization"]


def test_targets_tell_which_operators_have_such_kernels() -> None:
    for name, layers in (("cpu", 2), ("jetson-orin", 0), ("torch-cuda", 0)):
        scheme = target(name).quant
        assert len(dynamic_layers(block(), scheme=scheme)[0]) == layers
