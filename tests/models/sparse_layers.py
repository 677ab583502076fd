"""One layer of each kind on data that mixes its channels, for the passes that make weights sparse."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from text_graph import graph

from graphopt import calibration
from graphopt.base import Context
from graphopt.progress import Silent
from graphopt.registry import pass_class
from graphopt.target import Target

LAYERS: dict[str, tuple[str, str, dict[str, Any], tuple[int, ...]]] = {
    "MatMul and Add": (
        "(float[n,6,32] x) => (float[n,6,24] y)",
        "h = MatMul(x, w) y = Add(h, b)",
        {"w": (32, 24), "b": (24,)},
        (6, 32),
    ),
    "MatMul without a bias": ("(float[n,32] x) => (float[n,24] y)", "y = MatMul(x, w)", {"w": (32, 24)}, (32,)),
    "Gemm": (
        "(float[n,32] x) => (float[n,24] y)",
        "y = Gemm<transB=1>(x, w, b)",
        {"w": (24, 32), "b": (24,)},
        (32,),
    ),
    "Conv": (
        "(float[n,32,7,7] x) => (float[n,24,4,4] y)",
        "y = Conv<strides=[2,2], pads=[1,1,1,1], kernel_shape=[3,3]>(x, w)",
        {"w": (24, 32, 3, 3)},
        (32, 7, 7),
    ),
}
"""Name -> signature, body, shapes of parameters, shape of one input sample."""


def layer_model(name: str) -> ir.Model:
    signature, body, shapes, _ = LAYERS[name]
    return graph(signature, body, **shapes)


def mixed(name: str, count: int = 96, seed: int = 0) -> dict[str, np.ndarray]:
    """Samples whose channels are correlated, of unequal strength and with a mean."""
    shape = LAYERS[name][3]
    random = np.random.default_rng(seed)
    channel = 0 if len(shape) == 3 else len(shape) - 1
    x = np.moveaxis(random.normal(size=(count, *shape)), channel + 1, -1)
    x = x @ np.random.default_rng(7).normal(size=(32, 32)) * np.geomspace(2, 0.2, 32) + np.linspace(-1, 1, 32)
    return {"x": np.ascontiguousarray(np.moveaxis(x, -1, channel + 1)).astype(np.float32)}


def context(model: ir.Model, data: dict[str, np.ndarray] | None, *, sparse: bool = False) -> Context:
    """A run's context; `sparse`: on a target whose kernels skip zeros."""
    found = None if data is None else calibration.load(data, model)
    target = Target("cuda", "torch", sparsity_2_4=True) if sparse else Target("cpu", "ort")
    return Context(target, found, None, 0, 1, Silent(), pass_class)


def along_inputs(weight: np.ndarray, name: str) -> np.ndarray:
    """A weight as (rows, input channels): a row per output and kernel position."""
    if weight.ndim == 4:
        return weight.transpose(0, 2, 3, 1).reshape(-1, weight.shape[1])
    return weight if name == "Gemm" else weight.T


def relative(one: np.ndarray, other: np.ndarray) -> float:
    """Distance, relative to the first."""
    return float(np.linalg.norm(one - other) / np.linalg.norm(one))
