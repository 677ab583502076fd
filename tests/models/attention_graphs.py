"""Small attention blocks, each written differently."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from text_graph import graph

from graphopt.calibration import Calibration, load

WIDTH, HEADS, DIM = 12, 2, 6


def separate(*, rotary: bool = False, cache: bool = False) -> ir.Model:
    """Queries, keys and values from layers of their own; `rotary`: a table on the queries; `cache`: keys are output."""
    outputs = "float[n, s, 12] y" + (", float[n, 2, s, 6] keys" if cache else "")
    return graph(
        f"(float[n, s, 12] x) => ({outputs})",
        f"""
        q0 = MatMul (x, wq)
        q = Add (q0, bq)
        k0 = MatMul (x, wk)
        k = Add (k0, bk)
        v0 = MatMul (x, wv)
        v = Add (v0, bv)
        q1 = Reshape (q, split)
        q2 = Transpose <perm = [0, 2, 1, 3]> (q1)
        {"q3 = Mul (q2, table)" if rotary else "q3 = Mul (q2, scale)"}
        k1 = Reshape (k, split)
        k2 = Transpose <perm = [0, 2, 3, 1]> (k1)
        {"keys = Transpose <perm = [0, 1, 3, 2]> (k2)" if cache else ""}
        v1 = Reshape (v, split)
        v2 = Transpose <perm = [0, 2, 1, 3]> (v1)
        scores = MatMul (q3, k2)
        p = Softmax <axis = -1> (scores)
        a0 = MatMul (p, v2)
        a1 = Transpose <perm = [0, 2, 1, 3]> (a0)
        a = Reshape (a1, merge)
        y0 = MatMul (a, wo)
        y = Add (y0, bo)
        """,
        wq=(12, 12), wk=(12, 12), wv=(12, 12), wo=(12, 12), bq=(12,), bk=(12,), bv=(12,), bo=(12,),
        split=np.array([0, 0, HEADS, DIM]), merge=np.array([0, 0, 12]),
        scale=np.float32(0.1), table=np.linspace(0.05, 0.1, DIM, dtype=np.float32),
    )  # fmt: skip


def fused() -> ir.Model:
    """One layer for all three, as in vision transformers."""
    return graph(
        "(float[n, s, 12] x) => (float[n, s, 12] y)",
        """
        h0 = MatMul (x, w)
        h = Add (h0, b)
        h1 = Reshape (h, split)
        h2 = Transpose <perm = [2, 0, 3, 1, 4]> (h1)
        q = Gather <axis = 0> (h2, zero)
        k = Gather <axis = 0> (h2, one)
        v = Gather <axis = 0> (h2, two)
        kt = Transpose <perm = [0, 1, 3, 2]> (k)
        scores = MatMul (q, kt)
        s1 = Mul (scores, scale)
        p = Softmax <axis = -1> (s1)
        a0 = MatMul (p, v)
        a1 = Transpose <perm = [0, 2, 1, 3]> (a0)
        a = Reshape (a1, merge)
        y = MatMul (a, wo)
        """,
        w=(12, 36), b=(36,), wo=(12, 12), split=np.array([0, 0, 3, HEADS, DIM]), merge=np.array([0, 0, 12]),
        zero=np.array(0), one=np.array(1), two=np.array(2), scale=np.float32(0.1),
    )  # fmt: skip


def grouped() -> ir.Model:
    """Four heads of queries share two of keys and values."""
    return graph(
        "(float[n, s, 12] x) => (float[n, s, 12] y)",
        """
        q = MatMul (x, wq)
        k = MatMul (x, wk)
        v = MatMul (x, wv)
        q1 = Reshape (q, queries)
        q2 = Transpose <perm = [0, 2, 1, 3]> (q1)
        k1 = Reshape (k, shared)
        k2 = Transpose <perm = [0, 2, 3, 1]> (k1)
        k3 = Unsqueeze (k2, axis)
        k4 = Concat <axis = 2> (k3, k3)
        k5 = Reshape (k4, keys)
        v1 = Reshape (v, shared)
        v2 = Transpose <perm = [0, 2, 1, 3]> (v1)
        v3 = Unsqueeze (v2, axis)
        v4 = Expand (v3, twice)
        v5 = Reshape (v4, values)
        s0 = MatMul (q2, k5)
        p = Softmax <axis = -1> (s0)
        a0 = MatMul (p, v5)
        a1 = Transpose <perm = [0, 2, 1, 3]> (a0)
        a = Reshape (a1, merge)
        y = MatMul (a, wo)
        """,
        wq=(12, 12), wk=(12, 6), wv=(12, 6), wo=(12, 12), queries=np.array([0, 0, 4, 3]), shared=np.array([0, 0, 2, 3]),
        axis=np.array([2]), twice=np.array([1, 1, 2, 1, 1]), keys=np.array([0, 4, 3, -1]),
        values=np.array([0, 4, -1, 3]), merge=np.array([0, 0, 12]),
    )  # fmt: skip


def tokens(model: ir.Model, samples: int = 64) -> Calibration:
    """Correlated sequences of seven."""
    random = np.random.default_rng(3)
    x = random.normal(size=(samples, 7, WIDTH)) @ (random.normal(size=(WIDTH, WIDTH)) * np.logspace(0, -1.5, WIDTH))
    return load({"x": x.astype(np.float32)}, model)
