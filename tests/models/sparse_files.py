"""Models with sparse weights in every layout, for the tests of how they are stored."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from text_graph import graph


def keep_n_of_m(shape: tuple[int, ...], axis: int, keep: int = 2, of: int = 4, seed: int = 0) -> np.ndarray[Any, Any]:
    """Normal float32 values, the largest N of every M along an axis kept."""
    lines = np.moveaxis(np.random.default_rng(seed).normal(size=shape), axis, -1).copy()
    for start in range(0, lines.shape[-1], of):
        block = lines[..., start : start + of]
        order = np.abs(block).argsort(-1).argsort(-1)
        block[order < block.shape[-1] - keep] = 0
    return np.ascontiguousarray(np.moveaxis(lines, -1, axis)).astype(np.float32)


def scattered(shape: tuple[int, ...], density: float, seed: int = 0) -> np.ndarray[Any, Any]:
    """Normal float32 values, a share of them kept wherever they are."""
    random = np.random.default_rng(seed)
    return np.where(random.random(shape) < density, random.normal(size=shape), 0).astype(np.float32)


def sparse_network(opset: int = 17) -> ir.Model:
    """Convolution, Gemm and MatMul: 2:4, 1:4 and unstructured, with ragged tails; the last bias is small and dense."""
    return graph(
        "(float[n,32,9,9] x) => (float[n,10] y)",
        """c = Conv<pads=[1,1,1,1],kernel_shape=[3,3]>(x, k)
        r = Relu(c)  p = GlobalAveragePool(r)  f = Flatten(p)
        g = Gemm<transB=1>(f, w1, b1)  h = MatMul(g, w2)  a = MatMul(h, w3)  y = Add(a, b)""",
        opset=opset,
        k=keep_n_of_m((62, 32, 3, 3), 1),
        w1=keep_n_of_m((128, 62), 1),
        b1=(128,),
        w2=scattered((128, 128), 0.4),
        w3=keep_n_of_m((128, 10), 0, 1, 4),
        b=(10,),
    )
