"""Random graphs in which norms of all kinds meet: over groups of channels, tokens, channels and positions.

Group norms as an operator, with a scale for each group (opset 18) or channel (opset 21), and written out as a norm over
instances or as means; streams of tokens with a norm before each branch; sums, concats and grouped convolutions between
them, so that one tensor is grouped in several ways. The steps of `random_graphs` come in between.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from random_graphs import GraphBuilder

OPSETS = (13, 18, 21)
_IR_VERSION = 10
_MICROSOFT = "com.microsoft"


class NormGraphBuilder(GraphBuilder):
    """Grows one graph."""

    def step(self, pool: list[ir.Value]) -> ir.Value:
        moves = [
            *(self._group_operator, self._group_operator, self._written_group_norm, self._group_means),
            *(self._whole_written, self._stream, self._stream, self._instances, self._layer_norm, self._residual),
            *(self._residual, self._beside, self._concat, self._grouped, self._transposed_groups, self._conv),
        ]
        while self.random.random() < 0.75:
            x = pool[int(self.random.integers(max(0, len(pool) - 4), len(pool)))]
            found = moves[int(self.random.integers(len(moves)))](x, pool)
            if found is not None:
                return found
        return super().step(pool)

    def _group_count(self, channels: int) -> int:
        return int(self.random.choice([g for g in (1, 2, 3, 4, 8) if g == 1 or (channels % g == 0 and channels > g)]))

    def _group_operator(self, x: ir.Value, pool: list[ir.Value]) -> ir.Value | None:
        if self.opset < 18:
            return None
        c = self.shape(x)[1]
        groups = self._group_count(c)
        size = groups if self.opset < 21 else c
        operands = [x, self.weight(size, offset=1.0), self.weight(size)]
        return self.add("GroupNormalization", operands, self.shape(x), num_groups=groups, epsilon=0.1)

    def _group_means(self, x: ir.Value, pool: list[ir.Value]) -> ir.Value:
        """(y - mean) / sqrt(variance) of channels and positions of a group, then a gain for each channel."""
        n, c, h, w = self.shape(x)
        groups = self._group_count(c)
        axes = [2, 3, 4] if self.random.random() < 0.5 else [2]
        inner = (c // groups, h, w) if len(axes) == 3 else (c // groups * h * w,)
        y = self._reshape(x, n, groups, *inner)
        y = self.add("Sub", [y, self._reduction("ReduceMean", y, axes, 1)], self.shape(y))
        return self._gained(self._reshape(self._by_root(y, y, axes), n, c, h, w))

    def _whole_written(self, x: ir.Value, pool: list[ir.Value]) -> ir.Value:
        """A group norm whose Reshape back takes the sizes of its input, or whose gain other readers share."""
        n, c, h, w = self.shape(x)
        groups = self._group_count(c)
        scale = self.weight(groups, offset=1.0), self.weight(groups)
        y = self._reshape(x, n, groups, c // groups * h, w) if self.random.random() < 0.5 else None
        y = y or self._reshape(x, n, groups, -1)
        y = self.add("InstanceNormalization", [y, *scale], self.shape(y), epsilon=0.1)
        sizes = self.add("Shape", [x], (4,)) if self.random.random() < 0.7 else self._ints(0, -1, h, w)
        y = self.add("Reshape", [y, sizes], (n, c, h, w))
        return self._gained(y) if self.random.random() < 0.8 else y

    def _instances(self, x: ir.Value, pool: list[ir.Value]) -> ir.Value:
        c = self.shape(x)[1]
        operands = [x, self.weight(c, offset=1.0), self.weight(c)]
        return self.add("InstanceNormalization", operands, self.shape(x), epsilon=0.1)

    def _beside(self, x: ir.Value, pool: list[ir.Value]) -> ir.Value:
        """A residual branch that begins with a norm and ends with a convolution, as in a diffusion network."""
        c = self.shape(x)[1]
        norm = [self._group_operator, self._written_group_norm, self._instances][int(self.random.integers(3))]
        y = norm(x, pool) or self._written_group_norm(x, pool)
        y = self.add("Relu", [y], self.shape(y))
        y = self.conv(y, inner := int(self.random.integers(1, 5)) * 4, 3)
        if self.random.random() < 0.6:
            y = self._written_group_norm(y, pool)
        assert self.shape(y)[1] == inner
        return self.add("Add", [x, self.conv(y, c, 1)], self.shape(x))

    def _transposed_groups(self, x: ir.Value, pool: list[ir.Value]) -> ir.Value | None:
        n, c, h, w = self.shape(x)
        group = next((int(g) for g in self.random.permutation([2, 3, 4]) if c % g == 0), None)
        if group is None:
            return None
        each = int(self.random.integers(1, 4))
        operands = [x, self.weight(c, each, 3, 3, scale=0.3), self.weight(group * each, scale=0.3)]
        shape = (n, group * each, h, w)
        return self.add("ConvTranspose", operands, shape, pads=[1] * 4, group=group, kernel_shape=[3, 3])

    # Tokens ----------------------------------------------------------------------------------------------------------

    def _stream(self, x: ir.Value, pool: list[ir.Value]) -> ir.Value:
        """Tokens through one or two branches, a norm before each, and one behind the last."""
        h, w = self.shape(x)[2:]
        t = self._tokens(x)
        for _ in range(int(self.random.integers(1, 3))):
            t = self._branch(t)
        if self.random.random() < 0.6:
            t = self._token_norm(t)
        y = self._image(t, h, w)
        return self.add("Add", [y, x], self.shape(x)) if self.random.random() < 0.3 else y

    def _branch(self, t: ir.Value) -> ir.Value:
        n, length, c = self.shape(t)
        inner = int(self.random.integers(2, 9))
        y = self.add("MatMul", [self._token_norm(t), self.weight(c, inner, scale=1 / np.sqrt(c))], (n, length, inner))
        y = self.add("Relu", [y], self.shape(y))
        y = self.add("MatMul", [y, self.weight(inner, c, scale=1 / np.sqrt(inner))], self.shape(t))
        if self.random.random() < 0.3:
            return self._skip(t, y)
        return self.add("Add", [t, y], self.shape(t))

    def _skip(self, t: ir.Value, y: ir.Value) -> ir.Value:
        """The sum and its norm in one operator."""
        c = self.shape(t)[2]
        gain, given = self.weight(c, offset=1.0), {"domain": _MICROSOFT, "epsilon": 0.1}
        if self.random.random() < 0.5:
            return self.add("SkipSimplifiedLayerNormalization", [t, y, gain], self.shape(t), **given)
        return self.add("SkipLayerNormalization", [t, y, gain, self.weight(c)], self.shape(t), **given)

    def _token_norm(self, t: ir.Value) -> ir.Value:
        c = self.shape(t)[2]
        kind = int(self.random.integers(4))
        if kind == 0 and self.opset >= 17:
            operands = [t, self.weight(c, offset=1.0), self.weight(c)]
            return self.add("LayerNormalization", operands, self.shape(t), axis=-1, epsilon=0.1)
        if kind == 1:
            return self.add(
                "SimplifiedLayerNormalization", [t, self.weight(c, offset=1.0)], self.shape(t), axis=-1, epsilon=0.1
            )
        y: Any = t
        if kind == 2:
            y = self.add("Sub", [t, self._reduction("ReduceMean", t, [2], 1)], self.shape(t))
        y = self.add("Mul", [self._by_root(y, y, [2]), self.weight(c, offset=1.0)], self.shape(t))
        return self.add("Add", [y, self.weight(c)], self.shape(t)) if self.random.random() < 0.5 else y


def norm_graph(seed: int) -> ir.Model:
    """The graph of a seed; shapes inferred, batch symbolic."""
    builder = NormGraphBuilder(seed, opset=OPSETS[seed % 3])
    model = builder.build(int(builder.random.integers(4, 13)))
    model.ir_version = _IR_VERSION
    return model
