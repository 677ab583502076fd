"""Random steps for `random_graphs`: equations, indices, sorting, and operators of ONNX Runtime's own domain."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir


class OperatorSteps:
    """Steps of a `GraphBuilder`: each takes a tensor [n, c, h, w] and gives one, or None where it does not fit."""

    random: np.random.Generator
    opset: int
    add: Any
    weight: Any
    constant: Any
    shape: Any
    _reshape: Any

    def operators(self) -> list[Any]:
        """All steps of this class."""
        return [
            *(self._einsum, self._outer, self._gathered, self._scattered, self._sorted, self._running, self._like),
            *(self._fused_attention, self._fused_product, self._fused_activation, self._fused_conv),
        ]

    def _tokens(self, x: ir.Value) -> ir.Value:
        """[n, positions, channels]."""
        n, c, h, w = self.shape(x)
        return self.add("Transpose", [self._reshape(x, n, c, h * w)], (n, h * w, c), perm=[0, 2, 1])

    def _image(self, y: ir.Value, h: int, w: int) -> ir.Value:
        n, _, c = self.shape(y)
        return self._reshape(self.add("Transpose", [y], (n, c, h * w), perm=[0, 2, 1]), n, c, h, w)

    def _einsum(self, x, pool):
        """A projection of the channels, its weight either way round."""
        if self.opset < 12:
            return None
        n, c, h, w = self.shape(x)
        out = 2 * int(self.random.integers(1, 7))
        turned = bool(self.random.random() < 0.5)
        weight = self.weight(*((out, c) if turned else (c, out)), scale=1 / np.sqrt(c))
        equation = ["nchw,cd->ndhw", "nchw,dc->ndhw"][turned]
        return self.add("Einsum", [x, weight], (n, out, h, w), equation=equation)

    def _outer(self, x, pool):
        """How alike channels are, at every position of one axis, back to channels."""
        if self.opset < 12:
            return None
        n, c, h, w = self.shape(x)
        alike = self.add("Einsum", [x, x], (n, c, c), equation="nchw,ndhw->ncd")
        alike = self.add("Tanh", [alike], (n, c, c))
        return self.add("Einsum", [alike, x], (n, c, h, w), equation="nab,nbhw->nahw")

    def _gathered(self, x, pool):
        n, c, h, w = self.shape(x)
        if self.opset < 11:
            return None
        index = self._spread(self.random.integers(0, h, (1, 1, h, 1)), x)
        return self.add("GatherElements", [x, index], (n, c, h, w), axis=2)

    def _spread(self, index: np.ndarray, x: ir.Value) -> ir.Value:
        """An index for every element of a tensor."""
        sizes = self.add("Shape", [x], (len(self.shape(x)),))
        return self.add("Expand", [self.constant(index, "index"), sizes], self.shape(x))

    def _scattered(self, x, pool):
        """Features added up at other positions, as messages in a graph are."""
        n, c, h, w = self.shape(x)
        if self.opset < 16:
            return None
        y = self._tokens(x)
        operands = [y, self._spread(self.random.integers(0, h * w, (1, h * w, 1)), y), y]
        y = self.add("ScatterElements", operands, (n, h * w, c), axis=1, reduction="add")
        return self._image(y, h, w)

    def _sorted(self, x, pool):
        n, c, h, w = self.shape(x)
        if self.opset < 11:
            return None
        count = self.constant(np.array([h]), "count")
        return self.add("TopK", [x, count], (n, c, h, w), 2, axis=2)[0]

    def _running(self, x, pool):
        if self.opset < 14:
            return None
        axis = int(self.random.integers(2, 4))
        if self.random.random() < 0.5:
            return self.add("Trilu", [x], self.shape(x), upper=int(self.random.integers(2)))
        return self.add("CumSum", [x, self.constant(np.array(axis), "axis")], self.shape(x))

    def _like(self, x, pool):
        return None if self.opset < 15 else self.add("CastLike", [x, self.weight(1)], self.shape(x))

    def _fused_attention(self, x, pool):
        n, c, h, w = self.shape(x)
        t = self._tokens(x)
        heads, size, values = (int(k) for k in self.random.choice([2, 3, 4], 3))
        widths = (heads * size, heads * size, heads * values)
        scale = 1 / np.sqrt(c)
        shape = (n, h * w, widths[2])
        if self.random.random() < 0.5:
            operands = [t, self.weight(c, sum(widths), scale=scale), self.weight(sum(widths), scale=0.3)]
            given = {"num_heads": heads, "qkv_hidden_sizes": list(widths)}
            y = self.add("Attention", operands, shape, domain="com.microsoft", **given)
        else:
            parts = [self.add("MatMul", [t, self.weight(c, k, scale=scale)], (n, h * w, k)) for k in widths]
            if self.random.random() < 0.5:
                parts.append(self.weight(sum(widths), scale=0.3))
            y = self.add("MultiHeadAttention", parts, shape, domain="com.microsoft", num_heads=heads)
        y = self.add("MatMul", [y, self.weight(widths[2], c, scale=1 / np.sqrt(widths[2]))], (n, h * w, c))
        return self.add("Add", [x, self._image(y, h, w)], self.shape(x))

    def _fused_product(self, x, pool):
        n, c, h, w = self.shape(x)
        out = 2 * int(self.random.integers(1, 7))
        weight = self.weight(out, c, scale=1 / np.sqrt(c))
        t = self._tokens(x)
        y = self.add("FusedMatMul", [t, weight], (n, h * w, out), domain="com.microsoft", transB=1, alpha=0.7)
        return self._image(y, h, w)

    def _fused_activation(self, x, pool):
        op = str(self.random.choice(["Gelu", "QuickGelu", "BiasGelu", "FastGelu"]))
        if op in {"Gelu", "QuickGelu"}:
            return self.add(op, [x], self.shape(x), domain="com.microsoft")
        _, c, h, w = self.shape(x)
        t = self._tokens(x)
        y = self.add(op, [t, self.weight(c, scale=0.3)], self.shape(t), domain="com.microsoft")
        return self._image(y, h, w)

    def _fused_conv(self, x, pool):
        n, c, h, w = self.shape(x)
        out = c if self.random.random() < 0.5 else 2 * int(self.random.integers(1, 7))
        operands = [x, self.weight(out, c, 3, 3, scale=0.3), self.weight(out, scale=0.3)]
        if out == c and self.random.random() < 0.5:
            operands.append(x)
        activation = str(self.random.choice(["Relu", "Sigmoid", "Tanh"]))
        given = {"pads": [1, 1, 1, 1], "kernel_shape": [3, 3], "activation": activation}
        return self.add("FusedConv", operands, (n, out, h, w), domain="com.microsoft", **given)
