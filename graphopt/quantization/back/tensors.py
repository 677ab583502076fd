"""The rounding of activations taken out: every DequantizeLinear of integers that a QuantizeLinear wrote.

Integers are followed forward from where they are written, through operators that move or select them, each of which
gets a twin on floats. A DequantizeLinear with the scale and zero point that the integers were written with reads the
twin.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.quantization.back.float_builder import FloatBuilder, hand_over, kept_attributes, standard
from graphopt.quantization.back.numbers import integer_range
from graphopt.rewriting.constants import array
from graphopt.rewriting.edit import remove_node
from graphopt.rewriting.nodes import is_onnx
from graphopt.rewriting.scopes import graphs

MOVING = (
    "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Gather", "GatherElements", "GatherND",
    "Expand", "Tile", "DepthToSpace", "SpaceToDepth", "Resize", "MaxPool", "Identity", "Pad", "Concat", "ReduceMax",
    "ReduceMin", "Where",
)  # fmt: skip
"""Operators that give integers that they read (scales are positive: maxima of integers are those of numbers)."""

MOVING_ONE = (
    "Reshape",
    "Flatten",
    "Transpose",
    "Squeeze",
    "Unsqueeze",
    "Slice",
    "Gather",
    "GatherND",
    "Expand",
    "Tile",
)
"""Those among them that move one tensor, wherever its integers come from."""

NOT_NEGATIVE = ("Relu", "Sigmoid", "Softmax", "Abs", "Exp", "Sqrt", "Softplus", "HardSigmoid", "ReduceL2")
"""Operators whose results are not below zero."""

THROUGH = (
    *MOVING, "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "ReduceMean", "ReduceSum", "Add", "Mul", "Dropout",
)  # fmt: skip
"""Operators whose results are not below zero where what they read is not."""


@dataclass(frozen=True)
class Quantised:
    """Integers: the float tensor they stand for, and how they were written."""

    real: ir.Value
    scale: ir.Value
    zero: ir.Value | None


class IntegerTensors:
    """One walk over a model; `dropped` counts pairs, `clips` lists what was written for saturation."""

    def __init__(self, model: ir.Model, build: FloatBuilder) -> None:
        self._model, self._build = model, build
        self._known: dict[ir.Value, Quantised] = {}
        self.dropped = 0
        self.clips: list[ir.Node] = []

    def run(self) -> None:
        """Take out what can be taken out."""
        for graph in graphs(self._model):
            for node in list(graph):
                if standard(node, "QuantizeLinear") and node.inputs[0] is not None and node.inputs[1] is not None:
                    zero = node.inputs[2] if len(node.inputs) > 2 else None
                    real = self._unsaturated(node, node.inputs[0], node.inputs[1], zero)
                    self._known[node.outputs[0]] = Quantised(real, node.inputs[1], zero)
                elif is_onnx(node, "DynamicQuantizeLinear") and node.inputs[0] is not None:
                    self._known[node.outputs[0]] = Quantised(node.inputs[0], node.outputs[1], node.outputs[2])
                elif standard(node, "DequantizeLinear"):
                    self._dequantize(node)
                elif is_onnx(node, *MOVING):
                    self._move(node)

    def _dequantize(self, node: ir.Node) -> None:
        found = self._known.get(node.inputs[0]) if node.inputs[0] is not None else None
        zero = node.inputs[2] if len(node.inputs) > 2 else None
        if found is None or not _equal(found.scale, node.inputs[1]) or not _equal(found.zero, zero, absent=0):
            return
        hand_over(node.outputs[0], found.real, node, self._build)
        remove_node(node)
        self.dropped += 1

    def _move(self, node: ir.Node) -> None:
        """A twin of the node on floats, if all it moves are integers of one scale."""
        first = 1 if is_onnx(node, "Where") else 0
        last = len(node.inputs) if is_onnx(node, "Concat", "Where") else first + 1
        moved = [self._known.get(v) if v is not None else None for v in node.inputs[first:last]]
        if not moved or any(m is None for m in moved):
            return
        sources = [m for m in moved if m is not None]
        head = sources[0]
        if any(not _equal(m.scale, head.scale) or not _equal(m.zero, head.zero, absent=0) for m in sources):
            return
        inputs = [*node.inputs[:first], *(m.real for m in sources), *node.inputs[last:]]
        self._build.at(node)
        if is_onnx(node, "Pad") and (node.attributes.get_string("mode", "constant") or "constant") == "constant":
            fill = self._fill(node, head)
            if fill is None:
                return
            inputs[2:3] = [fill]
        kind = head.real.type
        outputs = [
            ir.Value(name=self._build.names.fresh(f"{v.name}_float") if v.name else "", type=kind, shape=v.shape)
            for v in node.outputs[: 1 if is_onnx(node, "MaxPool") else None]
        ]
        twin = ir.Node(
            "", node.op_type, inputs, kept_attributes(node), outputs=outputs,
            name=self._build.names.fresh(f"{node.name or node.op_type}_float"),
        )  # fmt: skip
        self._build.insert(twin)
        for old, new in zip(node.outputs, outputs, strict=False):
            self._known[old] = Quantised(new, head.scale, head.zero)

    def _fill(self, node: ir.Node, source: Quantised) -> ir.Value | None:
        """What a Pad writes, in float."""
        given = node.inputs[2] if len(node.inputs) > 2 else None
        fill, scale, zero = array(given), array(source.scale), array(source.zero)
        if scale is None or (given is not None and fill is None) or (source.zero is not None and zero is None):
            return None
        number = (0.0 if fill is None else float(fill.reshape(-1)[0])) - (
            0 if zero is None else float(zero.reshape(-1)[0])
        )
        return self._build.number(np.array(number * float(scale.reshape(-1)[0])), f"{node.outputs[0].name}_fill")

    def _unsaturated(self, node: ir.Node, x: ir.Value, scale: ir.Value, zero: ir.Value | None) -> ir.Value:
        """The tensor before QuantizeLinear, behind a Relu or Clip(0, 6) if saturation did their work."""
        offset, step = array(zero), array(scale)
        if (zero is not None and offset is None) or step is None or step.size > 1 or x.producer() is None:
            return x
        low, high = integer_range(np.dtype(np.uint8) if offset is None else offset.dtype)
        if int(0 if offset is None else offset.reshape(-1)[0]) != low or _not_negative(x):
            return x
        self._build.at(node)
        top = (high - low) * float(step.reshape(-1)[0])
        if abs(top - 6) > 0.06:
            return self._clip(self._build.op("Relu", [x], x.dtype))
        kind = x.dtype or ir.DataType.FLOAT
        bounds = [
            self._build.number(np.array(n), f"{x.name}_{name}", kind) for n, name in ((0.0, "low"), (6.0, "high"))
        ]
        return self._clip(self._build.op("Clip", [x, *bounds], x.dtype))

    def _clip(self, value: ir.Value) -> ir.Value:
        node = value.producer()
        assert node is not None
        self.clips.append(node)
        return value


def _equal(a: ir.Value | None, b: ir.Value | None, absent: float | None = None) -> bool:
    """Whether two parameters are one value or equal constants."""
    if a is b:
        return True
    left = np.array(absent) if a is None and absent is not None else array(a)
    right = np.array(absent) if b is None and absent is not None else array(b)
    if left is None or right is None:
        return False
    return bool(left.size == right.size and np.array_equal(left.reshape(-1), right.reshape(-1)))


def _not_negative(value: ir.Value | None, depth: int = 8) -> bool:
    """Whether the tensor is known not to fall below zero."""
    data = array(value)
    if data is not None:
        return bool((data >= 0).all())
    node = value.producer() if value is not None else None
    if node is None or depth == 0:
        return False
    if is_onnx(node, *NOT_NEGATIVE):
        return True
    if is_onnx(node, "Clip"):
        low = array(node.inputs[1]) if len(node.inputs) > 1 else None
        return low is not None and low.size == 1 and float(low.reshape(())) >= 0
    if is_onnx(node, "DequantizeLinear"):
        return False
    if not is_onnx(node, *THROUGH):
        return False
    count = len(node.inputs) if is_onnx(node, "Concat", "Add", "Mul") else 1
    return all(_not_negative(v, depth - 1) for v in node.inputs[:count])
