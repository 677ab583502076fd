"""Random graphs with detours: pairs of nodes that undo each other, put behind random tensors. What folding should find.

A detour may meet an operator it commutes with, a second detour, a body or a shared tensor, so that rules are asked
where they may fire and where they may not. The function stays what it was, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from random_graphs import random_graph

from graphopt.model import infer_shapes
from graphopt.rewriting.edit import new_initializer
from graphopt.rewriting.names import Names


def redundant_graph(seed: int, detours: int = 8) -> ir.Model:
    """The random graph of a seed with some detours in it."""
    model = random_graph(seed)
    maker = _Detours(model, np.random.default_rng(seed + 2))
    for _ in range(detours):
        maker.insert()
    infer_shapes(model)
    return model


class _Detours:
    def __init__(self, model: ir.Model, random: np.random.Generator) -> None:
        self.graph, self.random, self.names = model.graph, random, Names(model)
        self.opset = model.opset_imports[""]
        self.kinds: list[Callable[[ir.Value, int], ir.Value]] = [
            *(self.turned, self.flattened, self.scaled, self.shifted, self.cut, self.padded, self.negated, self.cast),
            *(self.joined, self.normalised, self.copied_shape),
        ]

    def insert(self) -> None:
        """Put a random detour behind a random float tensor of the main graph, for all its readers or for one."""
        floats = [
            node.outputs[0]
            for node in self.graph
            if len(node.outputs) == 1
            and node.outputs[0].dtype == ir.DataType.FLOAT
            and node.outputs[0].shape is not None
            and len(node.outputs[0].shape) > 0
            and all(isinstance(d, int) for d in list(node.outputs[0].shape)[1:])
            and not node.outputs[0].is_graph_output()
            and node.outputs[0].uses()
        ]
        value = floats[self.random.integers(len(floats))]
        readers = [(use.node, use.idx) for use in value.uses()]
        self.last = value.producer()
        result = self.kinds[self.random.integers(len(self.kinds))](value, len(value.shape or ()))
        result.shape, result.type = value.shape, value.type
        if self.random.random() < 0.3:
            readers = readers[:1]
        for node, index in readers:
            node.replace_input_with(index, result)

    def add(self, op: str, *inputs: ir.Value, outputs: int = 1, **attributes: object) -> ir.Value:
        node = ir.node(op, list(inputs), attributes=attributes, num_outputs=outputs, name=self.names.fresh(f"d_{op}"))
        for output in node.outputs:
            output.name = self.names.fresh("d")
        assert self.last is not None
        self.graph.insert_after(self.last, node)
        self.last = node
        return node.outputs[0]

    def ints(self, *numbers: int) -> ir.Value:
        return new_initializer(self.graph, self.names.fresh("d_ints"), np.array(numbers), ir.DataType.INT64)

    def floats(self, array: object) -> ir.Value:
        return new_initializer(self.graph, self.names.fresh("d_const"), np.asarray(array), ir.DataType.FLOAT)

    # -- detours ------------------------------------------------------------------------------------------------------

    def turned(self, x: ir.Value, rank: int) -> ir.Value:
        order = self.random.permutation(rank)
        y = self.add("Transpose", x, perm=[int(i) for i in order])
        y = self.add("Relu", self.add("Neg", y)) if self.random.random() < 0.3 else y
        if y.producer().op_type == "Relu":  # x = relu(x) - relu(-x), with the second one turned back
            back = self.add("Transpose", y, perm=[int(i) for i in np.argsort(order)])
            return self.add("Sub", self.add("Relu", x), back)
        return self.add("Transpose", y, perm=[int(i) for i in np.argsort(order)])

    def flattened(self, x: ir.Value, rank: int) -> ir.Value:
        dims = [0, *(int(d) for d in list(x.shape or ())[1:])]
        return self.add("Reshape", self.add("Reshape", x, self.ints(0, -1)), self.ints(*dims)) if rank > 1 else x

    def copied_shape(self, x: ir.Value, rank: int) -> ir.Value:
        return self.add("Reshape", self.add("Reshape", x, self.ints(-1)), self.add("Shape", x))

    def scaled(self, x: ir.Value, rank: int) -> ir.Value:
        scale = self.channels(x, rank)
        return self.add("Div", self.add("Mul", x, self.floats(scale)), self.floats(scale))

    def shifted(self, x: ir.Value, rank: int) -> ir.Value:
        shift = self.channels(x, rank)
        return self.add("Sub", self.add("Add", x, self.floats(shift)), self.floats(shift))

    def channels(self, x: ir.Value, rank: int) -> np.ndarray:
        """A constant for every channel, or a single one."""
        if rank < 2 or self.random.random() < 0.3:
            return np.float32(self.random.uniform(0.5, 2))
        return self.random.uniform(0.5, 2, (int(list(x.shape or ())[1]), *[1] * (rank - 2))).astype(np.float32)

    def cut(self, x: ir.Value, rank: int) -> ir.Value:
        length = list(x.shape or ())[-1] if rank > 1 else 1
        if not isinstance(length, int) or length < 2 or self.opset < 10:
            return self.add("Identity", x)
        at = int(self.random.integers(1, length))
        parts = [
            self.add("Slice", x, self.ints(start), self.ints(end), self.ints(rank - 1))
            for start, end in ((0, at), (at, length))
        ]
        return self.add("Concat", *parts, axis=rank - 1)

    def joined(self, x: ir.Value, rank: int) -> ir.Value:
        if self.opset < 10:
            return self.add("Dropout", x)
        both = self.add("Concat", x, self.add("Sigmoid", x), axis=0)
        half = self.add("Div", self.add("Gather", self.add("Shape", both), self.ints(0), axis=0), self.ints(2))
        return self.add("Slice", both, self.ints(0), half, self.ints(0))

    def padded(self, x: ir.Value, rank: int) -> ir.Value:
        if self.opset < 11 or rank < 2:
            return self.add("Identity", x)
        wide = self.add("Pad", x, self.ints(*[0] * (rank - 1), 1, *[0] * (rank - 1), 2))
        return self.add("Slice", wide, self.ints(1), self.ints(-2), self.ints(rank - 1))

    def negated(self, x: ir.Value, rank: int) -> ir.Value:
        return self.add("Neg", self.add("Neg", x))

    def cast(self, x: ir.Value, rank: int) -> ir.Value:
        return self.add("Cast", self.add("Cast", x, to=int(ir.DataType.DOUBLE)), to=int(ir.DataType.FLOAT))

    def normalised(self, x: ir.Value, rank: int) -> ir.Value:
        """Batch normalisation by statistics, and what undoes it."""
        if rank != 4:
            return self.add("Identity", x)
        count = int(list(x.shape or ())[1])
        scale, mean = self.random.uniform(0.5, 2, (2, count))
        variance, bias = self.random.uniform(0.5, 2, (2, count))
        made = self.add(
            "BatchNormalization", x, *(self.floats(array) for array in (scale, bias, mean, variance)), epsilon=1e-5
        )
        factor = scale / np.sqrt(variance + 1e-5)
        back = self.add("Sub", made, self.floats((bias - mean * factor).reshape(-1, 1, 1)))
        return self.add("Div", back, self.floats(factor.reshape(-1, 1, 1)))
