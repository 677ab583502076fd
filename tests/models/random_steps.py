"""More random steps for `random_graphs`: other ranks, attention, broadcasts, reductions, weights that are computed."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir


class MoreSteps:
    """Steps of a `GraphBuilder`: each takes a tensor [n, c, h, w] and gives one, or None where it does not fit."""

    random: np.random.Generator
    opset: int
    add: Any
    constant: Any
    weight: Any
    conv: Any
    shape: Any

    def more(self) -> list[Any]:
        """All steps of this class."""
        return [
            *(self._prelu, self._expand, self._tile, self._squeeze, self._with_itself, self._where, self._bounded),
            *(self._power, self._reduce, self._attention, self._lower, self._many, self._volume, self._sequence),
            *(self._computed_weight, self._cut, self._window, self._features, self._center),
            *(self._shared_keys, self._roll, self._repeated, self._one_channel, self._longer_shuffle),
        ]

    # Helpers ---------------------------------------------------------------------------------------------------------

    def _ints(self, *values: int) -> ir.Value:
        """A small integer constant: an initializer, or a Constant node."""
        if self.random.random() < 0.5 or self.opset < 13:
            return self.constant(np.array(values, dtype=np.int64), "i")
        return self.add("Constant", [], (len(values),), value_ints=[int(v) for v in values])

    def _number(self, value: float, rank: int) -> ir.Value:
        return self.constant(np.full((1,) * rank, value, dtype=np.float32), "k")

    def _reshape(self, x: ir.Value, *shape: int) -> ir.Value:
        return self.add("Reshape", [x, self._ints(0, *shape[1:])], shape)

    def _reduction(self, op: str, x: ir.Value, axes: list[int], keep: int) -> ir.Value:
        shape = [1 if a in axes else s for a, s in enumerate(self.shape(x)) if keep or a not in axes]
        if self.opset < (13 if op == "ReduceSum" else 18):
            return self.add(op, [x], tuple(shape), axes=axes, keepdims=keep)
        return self.add(op, [x, self._ints(*axes)], tuple(shape), keepdims=keep)

    def _axes(self, op: str, x: ir.Value, axes: list[int], shape: tuple[int, ...]) -> ir.Value:
        if self.opset < 13:
            return self.add(op, [x], shape, axes=axes)
        return self.add(op, [x, self._ints(*axes)], shape)

    # Steps -----------------------------------------------------------------------------------------------------------

    def _prelu(self, x, pool):
        c = self.shape(x)[1]
        return self.add("PRelu", [x, self.weight(*((c, 1, 1) if self.random.random() < 0.7 else (1,)))], self.shape(x))

    def _expand(self, x, pool):
        n, c, h, w = self.shape(x)
        mean = self.add("GlobalAveragePool", [x], (n, c, 1, 1))
        wide = self.add(
            "Expand", [mean, self._ints(*((1, c, h, w) if self.random.random() < 0.5 else (h, w)))], (n, c, h, w)
        )
        return self.add("Add", [x, wide], self.shape(x))

    def _tile(self, x, pool):
        n, c, h, w = self.shape(x)
        return None if c > 12 else self.add("Tile", [x, self._ints(1, 2, 1, 1)], (n, 2 * c, h, w))

    def _squeeze(self, x, pool):
        n, c, h, w = self.shape(x)
        place = int(self.random.integers(1, 5))
        shape = [n, c, h, w]
        shape.insert(place, 1)
        y = self._axes("Unsqueeze", x, [place], tuple(shape))
        y = self.add("Sigmoid", [y], tuple(shape))
        return self._axes("Squeeze", y, [place - 5 if self.opset >= 11 else place], self.shape(x))

    def _with_itself(self, x, pool):
        n, c, h, w = self.shape(x)
        return None if c > 12 else self.add("Concat", [x, x], (n, 2 * c, h, w), axis=-3 if self.opset >= 11 else 1)

    def _where(self, x, pool):
        partners = [p for p in pool if self.shape(p) == self.shape(x)]
        other = partners[int(self.random.integers(len(partners)))] if partners else self._number(0.0, 0)
        above = self.add("Greater", [x, self._number(0.1, 1)], self.shape(x))
        return self.add("Where", [above, x, other], self.shape(x))

    def _bounded(self, x, pool):
        op = str(self.random.choice(["Min", "Max"]))
        rank = int(self.random.integers(0, 4))
        return self.add(op, [x, self._number(float(self.random.choice([-0.5, 0, 0.5])), rank)], self.shape(x))

    def _power(self, x, pool):
        y = self.add("Pow", [x, self._number(2.0, 0)], self.shape(x))
        return self.add("Div", [y, self._number(3.0, 1)], self.shape(x))

    def _reduce(self, x, pool):
        op = str(
            self.random.choice(["ReduceSum", "ReduceMean", "ReduceL2", "ReduceMax", "ReduceL1", "ReduceSumSquare"])
        )
        axes = [[2, 3], [1], [2], [1, 2, 3]][int(self.random.integers(4))]
        y = self._reduction(op, x, axes, 1)
        return self.add(str(self.random.choice(["Add", "Sub", "Mul"])), [x, y], self.shape(x))

    def _attention(self, x, pool):
        n, c, h, w = self.shape(x)
        heads, size = int(self.random.choice([2, 3])), int(self.random.choice([2, 4]))
        inner = heads * size
        t = self.add("Transpose", [self._reshape(x, n, c, h * w)], (n, h * w, c), perm=[0, 2, 1])
        parts = []
        for perm in ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]):
            y = self.add("MatMul", [t, self.weight(c, inner, scale=1 / np.sqrt(c))], (n, h * w, inner))
            if self.random.random() < 0.5:
                y = self.add("Add", [y, self.weight(inner)], (n, h * w, inner))
            y = self._reshape(y, n, h * w, heads, size)
            shape = self.shape(y)
            parts.append(self.add("Transpose", [y], tuple(shape[p] for p in perm), perm=perm))
        score = self.add("MatMul", parts[:2], (n, heads, h * w, h * w))
        score = self.add("Softmax", [score], self.shape(score), axis=3)
        y = self.add("MatMul", [score, parts[2]], (n, heads, h * w, size))
        y = self._reshape(self.add("Transpose", [y], (n, h * w, heads, size), perm=[0, 2, 1, 3]), n, h * w, inner)
        y = self.add("MatMul", [y, self.weight(inner, c, scale=1 / np.sqrt(inner))], (n, h * w, c))
        y = self.add("Transpose", [y], (n, c, h * w), perm=[0, 2, 1])
        return self.add("Add", [x, self._reshape(y, n, c, h, w)], self.shape(x))

    def _lower(self, x, pool):
        c, h, w = self.shape(x)[1:]
        shape = [(c, 1, 1), (1,), (), (h, w), (c, h, w), (1, c, 1, 1)][int(self.random.integers(6))]
        operands = [x, self.weight(*shape)]
        op = str(self.random.choice(["Add", "Sub", "Mul"]))
        return self.add(op, operands[:: int(self.random.choice([1, -1]))], self.shape(x))

    def _many(self, x, pool):
        n, c, h, w = self.shape(x)
        parts = next((k for k in (4, 3, 2) if c % k == 0 and c > k), None)
        if parts is None:
            return None
        given = {"num_outputs": parts} if self.opset >= 18 else {}
        outputs = self.add("Split", [x], (n, c // parts, h, w), parts, axis=1, **given)
        order = self.random.permutation(parts)
        return self.add("Concat", [outputs[k] for k in order], (n, c, h, w), axis=1)

    def _volume(self, x, pool):
        """A convolution over three axes."""
        n, c, h, w = self.shape(x)
        y = self._reshape(x, n, c, 2, h // 2, w) if h % 2 == 0 else self._reshape(x, n, c, 1, h, w)
        group = c if self.random.random() < 0.3 else 1
        out = c if group > 1 else 2 * int(self.random.integers(1, 6))
        inputs = [y, self.weight(out, c // group, 1, 3, 1, scale=0.4), self.weight(out, scale=0.3)]
        y = self.add("Conv", inputs, (n, out, *self.shape(y)[2:]), pads=[0, 1, 0, 0, 1, 0], group=group)
        return self._reshape(y, n, out, h, w)

    def _sequence(self, x, pool):
        """A convolution, possibly transposed or grouped, over one axis."""
        n, c, h, w = self.shape(x)
        y = self._reshape(x, n, c, h * w)
        group = 2 if c % 2 == 0 and c > 2 and self.random.random() < 0.4 else 1
        out = 2 * int(self.random.integers(1, 6))
        if self.random.random() < 0.4:
            weight = self.weight(c, out // group, 1, scale=0.4)
            y = self.add("ConvTranspose", [y, weight, self.weight(out)], (n, out, h * w), group=group)
        else:
            weight = self.weight(out, c // group, 3, scale=0.4)
            y = self.add("Conv", [y, weight], (n, out, h * w), pads=[1, 1], group=group)
        return self._reshape(y, n, out, h, w)

    def _computed_weight(self, x, pool):
        """A 1x1 convolution whose weight and bias are rearranged, cast or scaled on the way."""
        n, c, h, w = self.shape(x)
        out = 2 * int(self.random.integers(2, 7))
        kind = int(self.random.integers(6))
        if kind == 0:
            weight = self.add("Transpose", [self.weight(c, out, 1, 1, scale=0.4)], (out, c, 1, 1), perm=[1, 0, 2, 3])
        elif kind == 1:
            weight = self.add("Reshape", [self.weight(out, c, scale=0.4), self._ints(out, c, 1, 1)], (out, c, 1, 1))
        elif kind == 2:
            double = self.constant(self.random.normal(size=(out, c, 1, 1)) * 0.4)
            weight = self.add("Cast", [double], (out, c, 1, 1), to=1)
        elif kind == 3:
            raw = self.weight(out, c, 1, 1)
            norm = self._reduction("ReduceL2", raw, [1, 2, 3], 1)
            weight = self.add("Div", [raw, norm], (out, c, 1, 1))
        elif kind == 4:
            sizes = [out, 3]
            given = {"split": sizes} if self.opset < 13 else {}
            inputs = [self.weight(out + 3, c, 1, 1, scale=0.4), *([] if given else [self._ints(*sizes)])]
            weight = self.add("Split", inputs, (out, c, 1, 1), 2, axis=0, **given)[0]
        else:
            order = self.random.integers(-(out + 3), out + 3, out)
            weight = self.add(
                "Gather", [self.weight(out + 3, c, 1, 1, scale=0.4), self._ints(*order)], (out, c, 1, 1), axis=0
            )
        bias = self.add("Identity", [self.weight(out)], (out,)) if self.random.random() < 0.5 else self.weight(out)
        return self.add("Conv", [x, weight, bias], (n, out, h, w))

    def _cut(self, x, pool):
        """Padding below zero."""
        n, c, h, w = self.shape(x)
        if c < 6:
            return None
        before, after = (int(k) for k in self.random.integers(0, 3, 2))
        pads = [0, -before, 0, 0, 0, -after, 0, 0]
        shape = (n, c - before - after, h, w)
        if self.opset < 11:
            return self.add("Pad", [x], shape, pads=pads)
        return self.add("Pad", [x, self._ints(*pads)], shape)

    def _window(self, x, pool):
        """Some channels at some positions."""
        n, c, h, w = self.shape(x)
        if c < 4 or h < 8 or self.opset < 10:
            return None
        bounds = [self._ints(1, 0), self._ints(c, h), self._ints(1, -2), self._ints(2, 2)]
        return self.add("Slice", [x, *bounds], (n, len(range(1, c, 2)), h // 2, w))

    def _features(self, x, pool):
        """Pooled features through Gemms, broadcast back over the positions."""
        n, c = self.shape(x)[:2]
        y = self._reduction("ReduceMean", x, [2, 3], 0)
        inner = int(self.random.integers(2, 9))
        alpha, beta = (float(self.random.choice([0.5, 1.0, 2.0])) for _ in range(2))
        beta = 0.0 if self.random.random() < 0.1 else beta
        bias = [(), (1,), (inner,), (1, inner)][int(self.random.integers(4))]
        y = self.add("Gemm", [y, self.weight(c, inner), self.weight(*bias)], (n, inner), alpha=alpha, beta=beta)
        y = self.add(str(self.random.choice(["Sigmoid", "Relu", "Exp"])), [y], (n, inner))
        beta = float(self.random.choice([0.0, 0.5, 1.0]))
        y = self.add(
            "Gemm", [y, self.weight(c, inner, scale=0.3), self.weight(c)], (n, c), transB=1, alpha=alpha, beta=beta
        )
        y = self._axes("Unsqueeze", self.add("Tanh", [y], (n, c)), [2, 3], (n, c, 1, 1))
        return self.add("Mul", [x, y], self.shape(x))

    def _center(self, x, pool):
        """Differences from the mean over channels, a layer normalisation in pieces."""
        mean = self._reduction("ReduceMean", x, [1], 1)
        y = self.add("Sub", [x, mean], self.shape(x))
        square = self.add("Mul", [y, y], self.shape(x))
        variance = self.add(
            "Add", [self._reduction("ReduceMean", square, [1], 1), self._number(0.1, 0)], self.shape(mean)
        )
        return self.add("Div", [y, self.add("Sqrt", [variance], self.shape(mean))], self.shape(x))

    def _shared_keys(self, x, pool):
        """Attention in which heads of queries share one of keys and values, copied by Expand, Gather or Tile."""
        n, c, h, w = self.shape(x)
        if self.opset < 13:
            return None
        shared, times, size = int(self.random.choice([2, 3])), 2, int(self.random.choice([2, 3]))
        heads, length = shared * times, h * w
        t = self.add("Transpose", [self._reshape(x, n, c, length)], (n, length, c), perm=[0, 2, 1])
        parts = []
        for count, perm in ((heads, [0, 2, 1, 3]), (shared, [0, 2, 3, 1]), (shared, [0, 2, 1, 3])):
            y = self.add("MatMul", [t, self.weight(c, count * size, scale=1 / np.sqrt(c))], (n, length, count * size))
            y = self._reshape(y, n, length, count, size)
            y = self.add("Transpose", [y], tuple(self.shape(y)[p] for p in perm), perm=perm)
            parts.append(y if count == heads else self._copied(y, shared, times))
        score = self.add("MatMul", parts[:2], (n, heads, length, length))
        score = self.add("Softmax", [score], self.shape(score), axis=3)
        y = self.add("MatMul", [score, parts[2]], (n, heads, length, size))
        y = self.add("Transpose", [y], (n, length, heads, size), perm=[0, 2, 1, 3])
        y = self._reshape(y, n, length, heads * size)
        y = self.add("MatMul", [y, self.weight(heads * size, c, scale=0.4)], (n, length, c))
        return self._reshape(self.add("Transpose", [y], (n, c, length), perm=[0, 2, 1]), n, c, h, w)

    def _copied(self, y, shared, times):
        n, _, a, b = self.shape(y)
        kind = int(self.random.integers(3))
        if kind == 0:
            order = self.constant(np.repeat(np.arange(shared), times), "order")
            return self.add("Gather", [y, order], (n, shared * times, a, b), axis=1)
        if kind == 1:
            return self.add("Tile", [y, self._ints(1, times, 1, 1)], (n, shared * times, a, b))
        y = self._axes("Unsqueeze", y, [2], (n, shared, 1, a, b))
        y = self.add("Expand", [y, self._ints(1, shared, times, a, b)], (n, shared, times, a, b))
        return self._reshape(y, n, shared * times, a, b)

    def _roll(self, x, pool):
        """The last channels first, or positions as windows are shifted."""
        shape = self.shape(x)
        axis = int(self.random.choice([1, 2]))
        if shape[axis] < 4 or self.opset < 10:
            return None
        at, size = int(self.random.integers(1, shape[axis])), shape[axis]
        parts = []
        for start, end in ((at, size), (0, at)):
            bounds = [self._ints(start), self._ints(end), self._ints(axis)]
            parts.append(self.add("Slice", [x, *bounds], (*shape[:axis], end - start, *shape[axis + 1 :])))
        return self.add("Concat", parts, shape, axis=axis)

    def _repeated(self, x, pool):
        """Channels taken more than once."""
        n, c, h, w = self.shape(x)
        order = self.random.integers(0, c, min(c + 2, 16))
        return self.add("Gather", [x, self.constant(order, "order")], (n, len(order), h, w), axis=1)

    def _one_channel(self, x, pool):
        """One channel that all others are multiplied with."""
        n, c, h, w = self.shape(x)
        one = self.add("Gather", [x, self.constant(np.array(int(self.random.integers(-c, c))), "i")], (n, h, w), axis=1)
        return self.add("Mul", [x, self._axes("Unsqueeze", one, [1], (n, 1, h, w))], self.shape(x))

    def _longer_shuffle(self, x, pool):
        """Channels dealt out along three axes."""
        n, c, h, w = self.shape(x)
        if c % 4 or c < 8:
            return None
        y = self._reshape(x, n, 2, 2, c // 4, h, w)
        y = self.add("Transpose", [y], (n, c // 4, 2, 2, h, w), perm=[0, 3, 1, 2, 4, 5])
        return self._reshape(y, n, c, h, w)
