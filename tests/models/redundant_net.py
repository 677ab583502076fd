"""A network with redundant channels, and inputs for it."""

from __future__ import annotations

import numpy as np
from text_graph import graph

from graphopt.calibration import load


def doubled(array, axis, scale=1.0):
    """Every slice twice; readers take half of each."""
    return (scale * np.concatenate([array, array], axis)).astype(np.float32)


def redundant(seed=0):
    """A residual network in which every channel exists twice: half of all units carry nothing new."""
    rng = np.random.default_rng(seed)

    def weight(*shape):
        return rng.normal(size=shape) * np.sqrt(2 / np.prod(shape[1:]))

    return graph(
        "(float[n, 3, 8, 8] x) => (float[n, 5] y)",
        """
        a = Conv <pads = [1, 1, 1, 1]> (x, w0, b0)
        s = Relu (a)
        b = Conv <pads = [1, 1, 1, 1]> (s, w1, b1)
        c = Relu (b)
        d = Conv <pads = [1, 1, 1, 1]> (c, w2, b2)
        e = Add (s, d)
        f = Relu (e)
        g = GlobalAveragePool (f)
        h = Flatten (g)
        y = Gemm (h, w3, b3)
        """,
        w0=doubled(weight(4, 3, 3, 3), 0),
        b0=doubled(rng.normal(size=4), 0),
        w1=doubled(doubled(weight(6, 4, 3, 3), 1, 0.5), 0),
        b1=doubled(rng.normal(size=6), 0),
        w2=doubled(doubled(weight(4, 6, 3, 3), 1, 0.5), 0),
        b2=doubled(rng.normal(size=4), 0),
        w3=doubled(weight(8, 5), 0, 0.5)[:8],
        b3=rng.normal(size=5).astype(np.float32),
    )


def images(model, samples=256, seed=1, shape=(3, 8, 8)):
    x = np.random.default_rng(seed).normal(size=(samples, *shape)).astype(np.float32)
    return load({"x": x}, model)
