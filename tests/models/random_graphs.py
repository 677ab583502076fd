"""Random convolutional graphs: branches, reshapes, concats, splits, groups, broadcasts, shared weights.

A graph is grown node by node from a pool of tensors, so every operator meets every other. The same seed gives the same
graph. All convolution filters have random values, normalisation statistics are far from (0, 1), biases are not zero.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from random_norms import NormSteps
from random_operators import OperatorSteps
from random_steps import MoreSteps

from graphopt.model import infer_shapes

_UNARY = [
    "Relu",
    "Sigmoid",
    "Tanh",
    "LeakyRelu",
    "HardSigmoid",
    "Softplus",
    "Exp",
    "Elu",
    "Identity",
    "Neg",
    "HardSwish",
]


class GraphBuilder(MoreSteps, NormSteps, OperatorSteps):
    """Grows one graph."""

    def __init__(self, seed: int, opset: int = 17) -> None:
        self.random = np.random.default_rng(seed)
        self.opset = opset
        self.nodes: list[ir.Node] = []
        self.initializers: list[ir.Value] = []
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.shared: dict[tuple[int, ...], ir.Value] = {}
        self.input = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch", 4, 8, 8]))
        self.shapes["x"] = (2, 4, 8, 8)

    # Building blocks -------------------------------------------------------------------------------------------------

    def constant(self, array: np.ndarray, name: str = "w") -> ir.Value:
        name = f"{name}{len(self.initializers)}"
        value = ir.Value(name=name, const_value=ir.Tensor(array, name=name))
        value.shape, value.dtype = ir.Shape(array.shape), ir.DataType.from_numpy(array.dtype)
        self.initializers.append(value)
        return value

    def weight(self, *shape: int, scale: float = 1.0, offset: float = 0.0) -> ir.Value:
        return self.constant((self.random.normal(size=shape) * scale + offset).astype(np.float32))

    def add(
        self,
        op: str,
        inputs: list[ir.Value | None],
        shape: tuple[int, ...],
        outputs: int = 1,
        domain: str = "",
        **attributes,
    ):
        name = f"n{len(self.nodes)}_{op}"
        node = ir.node(op, inputs, domain=domain, attributes=attributes, num_outputs=outputs, name=name)
        self.nodes.append(node)
        for k, value in enumerate(node.outputs):
            value.name = f"t{len(self.nodes)}_{k}"
            self.shapes[value.name] = shape
        return node.outputs[0] if outputs == 1 else list(node.outputs)

    def shape(self, value: ir.Value) -> tuple[int, ...]:
        return self.shapes[value.name] if value.const_value is None else tuple(value.const_value.shape)

    def conv(self, x: ir.Value, out: int, kernel: int = 3, group: int = 1, pad: int | None = None) -> ir.Value:
        n, c, h, w = self.shape(x)
        pad = kernel // 2 if pad is None else pad
        size = (out, c // group, kernel, kernel)
        if size in self.shared and self.random.random() < 0.15:
            weight = self.shared[size]
        else:
            weight = self.shared[size] = self.weight(*size, scale=1 / np.sqrt(c * kernel * kernel / group))
        inputs = [x, weight]
        if self.random.random() < 0.6:
            inputs.append(self.weight(out, scale=0.3))
        edge = 2 * pad - kernel + 1
        return self.add(
            "Conv", inputs, (n, out, h + edge, w + edge), group=group, pads=[pad] * 4, kernel_shape=[kernel, kernel]
        )

    def batchnorm(self, x: ir.Value) -> ir.Value:
        c = self.shape(x)[1]
        parameters = [self.weight(c, offset=1.0), self.weight(c), self.weight(c)]
        variance = self.constant(self.random.uniform(0.5, 2, c).astype(np.float32))
        return self.add("BatchNormalization", [x, *parameters, variance], self.shape(x))

    # One random step -------------------------------------------------------------------------------------------------

    def step(self, pool: list[ir.Value]) -> ir.Value:
        x = pool[int(self.random.integers(max(0, len(pool) - 4), len(pool)))]
        moves: list[Callable[[ir.Value, list[ir.Value]], ir.Value | None]] = [
            self._conv,
            self._conv,
            self._conv,
            self._grouped,
            self._depthwise,
            self._transposed,
            self._norm,
            self._unary,
            self._unary,
            self._residual,
            self._residual,
            self._concat,
            self._split,
            self._slice,
            self._pad,
            self._gate,
            self._shuffle,
            self._pool,
            self._pixel,
            self._affine,
            self._permute,
            self._clip,
            self._resize,
            self._gather,
            self._computed_reshape,
            *self.more(),
            *self.norms(),
            *self.operators(),
        ]
        while True:
            found = moves[int(self.random.integers(len(moves)))](x, pool)
            if found is not None:
                return found

    def _conv(self, x, pool):
        kernel = int(self.random.choice([1, 3]))
        return self.conv(x, int(self.random.integers(2, 9)) * 2, kernel)

    def _grouped(self, x, pool):
        c = self.shape(x)[1]
        group = next((g for g in self.random.permutation([2, 3, 4]) if c % g == 0 and c > g), None)
        return None if group is None else self.conv(x, int(group * self.random.integers(1, 5)), 3, int(group))

    def _depthwise(self, x, pool):
        c = self.shape(x)[1]
        return self.conv(x, c * int(self.random.choice([1, 1, 2])), 3, c) if c <= 24 else None

    def _transposed(self, x, pool):
        n, c, h, w = self.shape(x)
        if h > 8:
            return None
        group = 2 if c % 2 == 0 and self.random.random() < 0.3 else 1
        out = int(self.random.integers(1, 5)) * 2
        weight = self.weight(c, out // group, 2, 2, scale=0.3)
        return self.add(
            "ConvTranspose",
            [x, weight, self.weight(out)],
            (n, out, 2 * h, 2 * w),
            strides=[2, 2],
            group=group,
            kernel_shape=[2, 2],
        )

    def _norm(self, x, pool):
        if self.random.random() < 0.3:
            c = self.shape(x)[1]
            return self.add("InstanceNormalization", [x, self.weight(c, offset=1.0), self.weight(c)], self.shape(x))
        return self.batchnorm(x)

    def _unary(self, x, pool):
        op = str(self.random.choice(_UNARY if self.opset >= 14 else [u for u in _UNARY if u != "HardSwish"]))
        return self.add(op, [x], self.shape(x))

    def _clip(self, x, pool):
        bounds = self.random.choice([[0, 6], [-1, 1], [0.5, 3]])
        if self.opset < 11:
            return self.add("Clip", [x], self.shape(x), min=float(bounds[0]), max=float(bounds[1]))
        low, high = (self.constant(np.float32(v), "bound") for v in bounds)
        return self.add("Clip", [x, low, high], self.shape(x))

    def _residual(self, x, pool):
        partners = [p for p in pool if p is not x and self.shape(p) == self.shape(x)]
        if not partners:
            return None
        op = str(self.random.choice(["Add", "Add", "Add", "Mul", "Sub", "Max"]))
        return self.add(op, [x, partners[int(self.random.integers(len(partners)))]], self.shape(x))

    def _concat(self, x, pool):
        n, c, h, w = self.shape(x)
        partners = [p for p in pool if self.shape(p)[2:] == (h, w) and c + self.shape(p)[1] <= 32]
        if not partners:
            return None
        other = partners[int(self.random.integers(len(partners)))]
        return self.add("Concat", [x, other], (n, c + self.shape(other)[1], h, w), axis=1)

    def _split(self, x, pool):
        n, c, h, w = self.shape(x)
        if c < 4:
            return None
        first = int(self.random.integers(1, c - 1))
        if self.opset < 13:
            one, two = self.add("Split", [x], (n, first, h, w), 2, axis=1, split=[first, c - first])
        else:
            sizes = self.constant(np.array([first, c - first]), "sizes")
            one, two = self.add("Split", [x, sizes], (n, first, h, w), 2, axis=1)
        self.shapes[two.name] = (n, c - first, h, w)
        pool.append(one)
        return two

    def _slice(self, x, pool):
        n, c, h, w = self.shape(x)
        if c < 4:
            return None
        start, step = int(self.random.integers(0, 2)), int(self.random.choice([1, 2, -1]))
        if self.opset < 10:
            return self.add("Slice", [x], (n, c - start, h, w), axes=[1], starts=[start], ends=[c])
        bounds = [c - 1, -(2**63), 1, step] if step < 0 else [start, c, 1, step]
        size = c if step < 0 else len(range(start, c, step))
        values = [self.constant(np.array([b]), "bound") for b in bounds]
        return self.add("Slice", [x, *values], (n, size, h, w))

    def _gather(self, x, pool):
        n, c, h, w = self.shape(x)
        order = self.random.permutation(c)[: max(2, c - 1)]
        return self.add("Gather", [x, self.constant(order, "order")], (n, len(order), h, w), axis=1)

    def _pad(self, x, pool):
        n, c, h, w = self.shape(x)
        before, after = (int(k) for k in self.random.integers(0, 3, 2))
        if c + before + after > 32:
            return None
        pads = [0, before, 0, 0, 0, after, 0, 0]
        if self.opset < 11:
            return self.add(
                "Pad", [x], (n, c + before + after, h, w), pads=pads, value=float(self.random.choice([0, 0.7]))
            )
        inputs = [x, self.constant(np.array(pads), "pads")]
        if self.random.random() < 0.3:
            inputs.append(self.constant(np.float32(0.7), "fill"))
        return self.add("Pad", inputs, (n, c + before + after, h, w))

    def _gate(self, x, pool):
        n, c = self.shape(x)[:2]
        mean = self.add("GlobalAveragePool", [x], (n, c, 1, 1))
        gate = self.add("Sigmoid", [self.conv(mean, c, 1)], (n, c, 1, 1))
        return self.add("Mul", [x, gate], self.shape(x))

    def _shuffle(self, x, pool):
        n, c, h, w = self.shape(x)
        group = 2 if c % 2 == 0 and c > 2 else 0
        if not group:
            return None
        split = self.constant(np.array([0, group, c // group, h, w]), "shape")
        y = self.add("Reshape", [x, split], (n, group, c // group, h, w))
        y = self.add("Transpose", [y], (n, c // group, group, h, w), perm=[0, 2, 1, 3, 4])
        return self.add("Reshape", [y, self.constant(np.array([0, -1, h, w]), "shape")], (n, c, h, w))

    def _computed_reshape(self, x, pool):
        """A reshape to a shape computed from the tensor itself, as exporters write them."""
        n, c, h, w = self.shape(x)
        sizes = self.add("Shape", [x], (4,))
        batch = self.add("Gather", [sizes, self.constant(np.array([0]), "i")], (1,), axis=0)
        flat = self.add("Concat", [batch, self.constant(np.array([c, h * w]), "rest")], (3,), axis=0)
        y = self.add("Reshape", [x, flat], (n, c, h * w))
        y = self.add(str(self.random.choice(["Relu", "Tanh"])), [y], (n, c, h * w))
        return self.add("Reshape", [y, sizes], (n, c, h, w))

    def _pool(self, x, pool):
        n, c, h, w = self.shape(x)
        if h < 4 or h % 2:
            return None
        op = str(self.random.choice(["MaxPool", "AveragePool"]))
        pooled = self.add(op, [x], (n, c, h // 2, w // 2), kernel_shape=[2, 2], strides=[2, 2])
        self.shapes[pooled.name] = (n, c, h // 2, w // 2)
        return pooled

    def _pixel(self, x, pool):
        n, c, h, w = self.shape(x)
        if c % 4 or h > 8 or self.opset < 11:
            return None
        mode = str(self.random.choice(["DCR", "CRD"]))
        return self.add("DepthToSpace", [x], (n, c // 4, 2 * h, 2 * w), blocksize=2, mode=mode)

    def _resize(self, x, pool):
        n, c, h, w = self.shape(x)
        if h > 8 or self.opset < 13:
            return None
        scales = self.constant(np.array([1, 1, 2, 2], np.float32), "scales")
        return self.add("Resize", [x, None, scales], (n, c, 2 * h, 2 * w), mode="nearest")

    def _affine(self, x, pool):
        c = self.shape(x)[1]
        y = self.add("Mul", [x, self.weight(c, 1, 1, offset=1.0)], self.shape(x))
        return self.add(str(self.random.choice(["Add", "Sub"])), [y, self.weight(c, 1, 1)], self.shape(x))

    def _permute(self, x, pool):
        n, c, h, w = self.shape(x)
        y = self.add("Transpose", [x], (n, h, w, c), perm=[0, 2, 3, 1])
        out = int(self.random.integers(2, 9)) * 2
        y = self.add("MatMul", [y, self.weight(c, out, scale=1 / np.sqrt(c))], (n, h, w, out))
        y = self.add("Add", [y, self.weight(out)], (n, h, w, out))
        return self.add("Transpose", [y], (n, out, h, w), perm=[0, 3, 1, 2])

    # The whole -------------------------------------------------------------------------------------------------------

    def build(self, steps: int) -> ir.Model:
        pool = [self.conv(self.input, 8)]
        while len(pool) < steps:
            pool.append(self.step(pool))
        outputs = []
        # Heads on the last tensors and on all that nothing reads, so that no branch of the graph is dead code.
        for value in [v for v in pool if not v.uses() or v in pool[-2:]]:
            n, c, h, w = self.shape(value)
            if self.random.random() < 0.5:
                if self.opset < 18:
                    pooled = self.add("ReduceMean", [value], (n, c), axes=[2, 3], keepdims=0)
                else:
                    axes = self.constant(np.array([2, 3]), "axes")
                    pooled = self.add("ReduceMean", [value, axes], (n, c), keepdims=0)
                features = c
            else:
                pooled = self.add("Flatten", [value], (n, c * h * w), axis=1)
                features = c * h * w
            gemm = [pooled, self.weight(5, features, scale=1 / np.sqrt(features)), self.weight(5)]
            outputs.append(self.add("Gemm", gemm, (n, 5), transB=1))
        graph = ir.Graph(
            [self.input],
            outputs,
            nodes=self.nodes,
            initializers=self.initializers,
            opset_imports={"": self.opset, "com.microsoft": 1},
            name="random",
        )
        for output in outputs:
            output.type, output.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", 5])
        model = ir.Model(graph, ir_version=8)
        infer_shapes(model)
        return model


def random_graph(seed: int, steps: int | None = None) -> ir.Model:
    """The graph of a seed; shapes inferred, batch symbolic."""
    builder = GraphBuilder(seed, opset=(9, 11, 13, 17, 20)[seed % 5])
    return builder.build(steps or int(builder.random.integers(4, 16)))
