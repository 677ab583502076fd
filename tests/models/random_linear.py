"""Random graphs in which linear operators follow each other, stand beside each other and meet constants.

Made for the passes that fold weights into weights: few kinds of nodes, small integers of channels, so that shapes often
agree and rules often apply. The same seed gives the same graph.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.model import infer_shapes

Shape = tuple[int, ...]


class LinearGraph:
    """Grows one graph from an image (batch, channels, 6, 6) or a sequence (batch, 3, channels)."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.image = bool(self.random.integers(2))
        self.nodes: list[ir.Node] = []
        self.weights: list[ir.Value] = []
        self.shape: dict[ir.Value, Shape] = {}
        sizes: Shape = (2, 4, 6, 6) if self.image else (2, 3, 4)
        self.input = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["N", *sizes[1:]]))
        self.shape[self.input] = sizes
        self.pool = [self.input]

    def pick(self) -> ir.Value:
        """A tensor, the last ones more often than others."""
        return self.pool[max(0, len(self.pool) - 1 - int(self.random.geometric(0.45) - 1))]

    def constant(self, *shape: int, positive: bool = False) -> ir.Value:
        data = self.random.standard_normal(shape) * 0.5
        tensor = np.asarray(np.abs(data) + 0.2 if positive else data, np.float32)
        name = f"w{len(self.weights)}"
        value = ir.Value(name=name, const_value=ir.Tensor(tensor, name=name), shape=ir.Shape(shape))
        value.dtype = ir.DataType.FLOAT
        self.weights.append(value)
        return value

    def add(self, op: str, inputs: list[ir.Value | None], shape: Shape, **attributes: object) -> None:
        node = ir.node(op, inputs, attributes=attributes, name=f"n{len(self.nodes)}")
        node.outputs[0].name = f"t{len(self.nodes)}"
        self.nodes.append(node)
        self.shape[node.outputs[0]] = shape
        self.pool.append(node.outputs[0])

    def step(self) -> None:
        """One more node."""
        steps = [self.affine, self.affine, self.sum, self.sum, self.relu]
        steps += [self.conv] * 6 + [self.norm, self.pad, self.pool_step, self.transposed] if self.image else []
        steps += [] if self.image else [self.matmul] * 5 + [self.heads]
        steps[int(self.random.integers(len(steps)))]()

    def conv(self) -> None:
        x = self.pick()
        n, c, h, w = self.shape[x]
        out = int(self.random.choice([2, 4]))
        groups = int(self.random.choice([g for g in (1, 1, 2, c) if c % g == 0 and out % g == 0]))
        k, s = int(self.random.choice([1, 1, 3])), int(self.random.choice([1, 1, 1, 2]))
        p = int(self.random.integers(2)) if k == 3 else 0
        if min(h, w) + 2 * p < k:
            return
        bias = self.constant(out) if self.random.integers(2) else None
        shape = (n, out, (h + 2 * p - k) // s + 1, (w + 2 * p - k) // s + 1)
        weight = self.constant(out, c // groups, k, k)
        inputs = [x, weight] + ([bias] if bias is not None else [])
        self.add("Conv", inputs, shape, group=groups, strides=[s, s], pads=[p] * 4)

    def transposed(self) -> None:
        x = self.pick()
        n, c, h, w = self.shape[x]
        k = int(self.random.choice([1, 3]))
        if h > 8:
            return
        self.add("ConvTranspose", [x, self.constant(c, 4, k, k)], (n, 4, h + k - 1, w + k - 1))

    def matmul(self) -> None:
        x = self.pick()
        *front, c = self.shape[x]
        out = int(self.random.choice([2, 4, 4]))
        self.add("MatMul", [x, self.constant(c, out)], (*front, out))
        if self.random.integers(2):
            self.add("Add", [self.pool[-1], self.constant(out)], (*front, out))

    def heads(self) -> None:
        x = self.pick()
        if self.shape[x] != (2, 3, 4):
            return
        target = ir.Value(
            name=f"s{len(self.weights)}", const_value=ir.tensor([0, 0, 2, 2], name=f"s{len(self.weights)}")
        )
        target.dtype, target.shape = ir.DataType.INT64, ir.Shape([4])
        self.weights.append(target)
        self.add("Reshape", [x, target], (2, 3, 2, 2))
        self.add("Transpose", [self.pool[-1]], (2, 2, 3, 2), perm=[0, 2, 1, 3])

    def affine(self) -> None:
        x = self.pick()
        shape = self.shape[x]
        channel = 1 if self.image else len(shape) - 1
        wide: Shape = tuple(d if a == channel else 1 for a, d in enumerate(shape))
        k = self.constant(*(wide[1:] if self.random.integers(3) else ()), positive=True)
        sides: list[ir.Value | None] = [x, k] if self.random.integers(3) else [k, x]
        op = str(self.random.choice(["Mul", "Add", "Sub", "Div"]))
        self.add(op, [x, k] if op == "Div" else sides, shape)

    def sum(self) -> None:
        x = self.pick()
        others = [v for v in self.pool if self.shape[v] == self.shape[x] and v is not x]
        if others:
            other = others[int(self.random.integers(len(others)))]
            self.add(str(self.random.choice(["Add", "Add", "Sub", "Sum"])), [x, other], self.shape[x])

    def relu(self) -> None:
        x = self.pick()
        self.add("Relu", [x], self.shape[x])

    def norm(self) -> None:
        x = self.pick()
        c = self.shape[x][1]
        statistics = [self.constant(c, positive=i in (0, 3)) for i in range(4)]
        self.add("BatchNormalization", [x, *statistics], self.shape[x])

    def pad(self) -> None:
        x = self.pick()
        n, c, h, w = self.shape[x]
        pads = ir.Value(name=f"p{len(self.weights)}", const_value=ir.tensor([0, 0, 1, 0, 0, 0, 0, 1]))
        pads.dtype, pads.shape = ir.DataType.INT64, ir.Shape([8])
        self.weights.append(pads)
        self.add("Pad", [x, pads], (n, c, h + 1, w + 1))

    def pool_step(self) -> None:
        x = self.pick()
        n, c, h, w = self.shape[x]
        if min(h, w) >= 2:
            op = str(self.random.choice(["MaxPool", "AveragePool"]))
            self.add(op, [x], (n, c, h - 1, w - 1), kernel_shape=[2, 2])


def linear_graph(seed: int, steps: int = 14) -> ir.Model:
    """One random graph; every tensor that nothing reads is an output."""
    grown = LinearGraph(seed)
    for _ in range(steps):
        grown.step()
    outputs = [v for v in grown.pool if not v.uses() and v is not grown.input]
    if not outputs:
        grown.relu()
        outputs = [grown.pool[-1]]
    for value in outputs:
        value.dtype = ir.DataType.FLOAT
    graph = ir.Graph(
        [grown.input], outputs, nodes=grown.nodes, initializers=grown.weights, opset_imports={"": 17}, name="linear"
    )
    model = ir.Model(graph, ir_version=8)
    infer_shapes(model)
    return model
