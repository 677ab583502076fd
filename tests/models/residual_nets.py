"""Residual networks whose branches differ in what they matter."""

from __future__ import annotations

import numpy as np
from text_graph import graph


def residual_blocks(weights_of_blocks, seed=0, channels=8, relu=True):
    """A stem, one block x + f(x) for each number, and a classifier; a number scales what its block adds.

    Block i: `b{i}` = Conv (`s{i}`), Relu, `d{i}` = Conv, `e{i}` = Add, `s{i+1}` = Relu (or the sum itself).
    """
    rng = np.random.default_rng(seed)

    def weight(*shape):
        return (rng.normal(size=shape) * np.sqrt(2 / np.prod(shape[1:]))).astype(np.float32)

    parameters = {"w": weight(channels, 3, 3, 3), "b": rng.normal(size=channels).astype(np.float32)}
    lines = ["a = Conv <pads = [1, 1, 1, 1]> (x, w, b)", "s0 = Relu (a)" if relu else "s0 = Identity (a)"]
    for i, size in enumerate(weights_of_blocks):
        parameters[f"v{i}"] = weight(channels, channels, 3, 3)
        parameters[f"u{i}"] = np.float32(size) * weight(channels, channels, 3, 3)
        parameters[f"c{i}"] = np.float32(0.3) * rng.normal(size=channels).astype(np.float32)
        lines += [
            f"b{i} = Conv <pads = [1, 1, 1, 1]> (s{i}, v{i})",
            f"r{i} = Relu (b{i})",
            f"d{i} = Conv <pads = [1, 1, 1, 1]> (r{i}, u{i}, c{i})",
            f"{'e' if relu else 's'}{i if relu else i + 1} = Add (s{i}, d{i})",
            *([f"s{i + 1} = Relu (e{i})"] if relu else []),
        ]
    last = len(weights_of_blocks)
    lines += [f"g = GlobalAveragePool (s{last})", "h = Flatten (g)", "y = Gemm (h, k, m)"]
    parameters |= {"k": weight(channels, 5), "m": rng.normal(size=5).astype(np.float32)}
    return graph("(float[n, 3, 8, 8] x) => (float[n, 5] y)", "\n".join(lines), **parameters)
