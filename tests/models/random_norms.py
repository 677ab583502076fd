"""Random steps for `random_graphs`: norms over channels, as single operators and as exporters write them out."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

FIRST_LAYER_NORM = 17


class NormSteps:
    """Steps of a `GraphBuilder`: each takes a tensor [n, c, h, w] and gives one, or None where it does not fit."""

    random: np.random.Generator
    opset: int
    add: Any
    weight: Any
    constant: Any
    shape: Any
    _reduction: Any
    _reshape: Any
    _number: Any

    def norms(self) -> list[Any]:
        """All steps of this class."""
        return [self._layer_norm, self._written_layer_norm, self._written_rms_norm, self._written_group_norm, self._lp]

    def _layer_norm(self, x, pool):
        """Over the channels, brought to the last axis, or over all axes but the batch."""
        if self.opset < FIRST_LAYER_NORM:
            return None
        n, c, h, w = self.shape(x)
        whole = self.random.random() < 0.3
        y = x if whole else self.add("Transpose", [x], (n, h, w, c), perm=[0, 2, 3, 1])
        sizes = self.shape(y)[1:] if whole else (c,)
        parameters = [self.weight(*sizes, offset=1.0)]
        if self.random.random() < 0.7:
            parameters.append(self.weight(*sizes))
        y = self.add("LayerNormalization", [y, *parameters], self.shape(y), axis=1 if whole else -1, epsilon=0.1)
        return y if whole else self.add("Transpose", [y], (n, c, h, w), perm=[0, 3, 1, 2])

    def _written_layer_norm(self, x, pool):
        axes = [[1], [1, 2, 3]][int(self.random.integers(2))]
        y = self.add("Sub", [x, self._reduction("ReduceMean", x, axes, 1)], self.shape(x))
        return self._gained(self._by_root(y, y, axes))

    def _written_rms_norm(self, x, pool):
        return self._gained(self._by_root(x, x, [1]))

    def _by_root(self, x: ir.Value, y: ir.Value, axes: list[int]) -> ir.Value:
        """y / sqrt(mean(x^2) + 0.1), by a quotient or a reciprocal."""
        power = self.random.random() < 0.5
        square = self.add("Pow", [x, self._number(2.0, 0)], self.shape(x)) if power else None
        square = square or self.add("Mul", [x, x], self.shape(x))
        mean = self._reduction("ReduceMean", square, axes, 1)
        root = self.add("Sqrt", [self.add("Add", [mean, self._number(0.1, 0)], self.shape(mean))], self.shape(mean))
        if self.random.random() < 0.5:
            return self.add("Div", [y, root], self.shape(y))
        return self.add("Mul", [y, self.add("Reciprocal", [root], self.shape(root))], self.shape(y))

    def _gained(self, y: ir.Value) -> ir.Value:
        c = self.shape(y)[1]
        gain = [y, self.weight(c, 1, 1, offset=1.0)][:: int(self.random.choice([1, -1]))]
        y = self.add("Mul", gain, self.shape(y))
        return self.add("Add", [y, self.weight(c, 1, 1)], self.shape(y)) if self.random.random() < 0.7 else y

    def _written_group_norm(self, x, pool):
        n, c, h, w = self.shape(x)
        groups = int(self.random.choice([g for g in (1, 2, 3, 4) if c % g == 0]))
        ones, zeros = (self.constant(np.full(groups, k, np.float32)) for k in (1, 0))
        y = self._reshape(x, n, groups, c // groups * h * w)
        y = self.add("InstanceNormalization", [y, ones, zeros], self.shape(y), epsilon=0.1)
        return self._gained(self._reshape(y, n, c, h, w))

    def _lp(self, x, pool):
        return self.add("LpNormalization", [x], self.shape(x), axis=1, p=int(self.random.integers(1, 3)))
