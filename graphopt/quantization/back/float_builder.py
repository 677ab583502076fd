"""Writing float operators in the place of integer ones: nodes, constants and Q/DQ pairs beside the node that goes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from graphopt.quantization.back.numbers import dequantised
from graphopt.rewriting.constants import array
from graphopt.rewriting.edit import cannot_replace, new_initializer, remove_node, replace_value
from graphopt.rewriting.names import Names
from graphopt.rewriting.nodes import is_onnx, label, mark_origin

Array = NDArray[Any]


class Refused(Exception):
    """A node cannot be written in float; the text says why."""


class FloatBuilder:
    """Builds in front of one node at a time (`at`), and replaces it (`replace`)."""

    def __init__(self, model: ir.Model, *, keep: bool) -> None:
        self.model = model
        self.keep = keep
        self.names = Names(model)
        self.opset = model.opset_imports.get("", model.opset_imports.get("ai.onnx", 1))
        self._node: ir.Node | None = None
        self._made: list[ir.Node] = []
        self.weights = 0

    def at(self, node: ir.Node) -> None:
        """Build in front of this node from now on."""
        self._node, self._made = node, []

    @property
    def node(self) -> ir.Node:
        """The node that is being replaced."""
        assert self._node is not None
        return self._node

    def constant(self, value: ir.Value | None, what: str) -> Array:
        """The array of an input that must be constant.

        Raises:
            Refused: it is computed.
        """
        data = array(value)
        if data is None:
            raise Refused(f"its {what} is computed")
        return data

    def optional(self, value: ir.Value | None, what: str) -> Array | None:
        """The same; None for an input that is left out."""
        return None if value is None else self.constant(value, what)

    def input(self, index: int) -> ir.Value | None:
        """An input of the node; None where it is left out."""
        return self.node.inputs[index] if index < len(self.node.inputs) else None

    def op(
        self, op_type: str, inputs: Sequence[ir.Value | None], dtype: ir.DataType | None = None, *,
        attributes: Sequence[ir.Attr] = (), stem: str | None = None,
    ) -> ir.Value:  # fmt: skip
        """A node of the standard domain; returns its output."""
        name = self.names.fresh(stem or f"{self.node.outputs[0].name}_{op_type}")
        kind = None if dtype is None else ir.TensorType(dtype)
        made = ir.Node(
            "", op_type, inputs, list(attributes), outputs=[ir.Value(name=name, type=kind)],
            name=self.names.fresh(f"{label(self.node)}_{op_type}"),
        )  # fmt: skip
        self.insert(made)
        return made.outputs[0]

    def insert(self, made: ir.Node) -> None:
        """Put a node in front of the one that goes."""
        graph = self.node.graph
        assert graph is not None
        graph.insert_before(self.node, made)
        mark_origin(made, [label(self.node)])
        self._made.append(made)

    def undo(self) -> None:
        """Take away what was built for a node that stays."""
        for made in reversed(self._made):
            remove_node(made)

    def number(self, data: Array, stem: str, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        """A new constant."""
        graph = self.node.graph
        assert isinstance(graph, ir.Graph)
        return new_initializer(graph, self.names.fresh(stem), np.asarray(data), dtype)

    def stored(self, value: ir.Value | None, data: Array, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        """The constant in float that the constant `value` stands for."""
        assert value is not None
        self.weights += 1
        return self.number(data, float_name(value), dtype)

    def weight(
        self, value: ir.Value | None, scale: ir.Value | None, zero: ir.Value | None, axis: int, what: str = "weight"
    ) -> ir.Value:
        """The float constant that a quantised constant stands for."""
        q, s = self.constant(value, what), self.constant(scale, f"scale of the {what}")
        data = dequantised(q, s, self.optional(zero, f"zero point of the {what}"), axis)
        return self.stored(value, data)

    def bias(self, value: ir.Value | None, scales: Sequence[ir.Value | None], factor: float = 1.0) -> ir.Value | None:
        """The float bias of an int32 one in units of the product of `scales`."""
        if value is None:
            return None
        unit = np.full(1, factor, np.float32)
        for scale in scales:
            unit = unit * self.constant(scale, "scale of the bias").astype(np.float32).reshape(-1)
        return self.stored(value, self.constant(value, "bias").astype(np.float32) * unit)

    def real(self, value: ir.Value | None, scale: ir.Value | None, zero: ir.Value | None) -> ir.Value:
        """What an integer activation stands for: DequantizeLinear, which goes if its integers were made here."""
        if array(value) is not None:
            return self.weight(value, scale, zero, 0, "operand")
        if scale is not None and (data := array(scale)) is not None and data.size > 1:
            raise Refused("its activations have a scale per channel")
        return self.op("DequantizeLinear", [value, scale, *([zero] if zero is not None else [])], _type(scale))

    def integers(self, value: ir.Value, scale: ir.Value | None, zero: ir.Value | None) -> ir.Value:
        """QuantizeLinear behind a float result."""
        zeros = [zero] if zero is not None else []
        return self.op("QuantizeLinear", [value, scale, *zeros], zero.dtype if zero is not None else ir.DataType.UINT8)

    def dynamic(self, value: ir.Value) -> ir.Value:
        """The value as an operator that quantises it by itself reads it: itself, or with that rounding kept."""
        if not self.keep:
            return value
        names = [self.names.fresh(f"{value.name}_{part}") for part in ("quantized", "scale", "zero_point")]
        made = ir.node(
            "DynamicQuantizeLinear", [value], name=self.names.fresh(f"{value.name}_DynamicQuantizeLinear"),
            outputs=[ir.Value(name=name) for name in names],
        )  # fmt: skip
        self.insert(made)
        q, scale, zero = made.outputs
        return self.op("DequantizeLinear", [q, scale, zero], ir.DataType.FLOAT)

    def replace(self, new: Sequence[ir.Value | None]) -> None:
        """Let the readers of the node read these values, and take the node away."""
        for old, value in zip(self.node.outputs, new, strict=False):
            if value is not None:
                hand_over(old, value, self.node, self)
        remove_node(self.node)


def hand_over(old: ir.Value, new: ir.Value, node: ir.Node, build: FloatBuilder) -> None:
    """Let every reader of `old` read `new`, with an Identity in between where a graph output forbids it."""
    if cannot_replace(old, new) is not None:
        copy = ir.node("Identity", [new], name=build.names.fresh(f"{old.name}_Identity"))
        copy.outputs[0].name = build.names.fresh(f"{old.name}_copy")
        copy.outputs[0].type = new.type
        graph = node.graph
        assert graph is not None
        graph.insert_after(node, copy)
        new = copy.outputs[0]
    if new.type is None or (new.dtype is not None and old.dtype != new.dtype):
        old.type = new.type
    replace_value(old, new)


def float_name(value: ir.Value) -> str:
    """A name for the float constant of an integer one."""
    name = str(value.name)
    for suffix in ("_quantized", "_quant", "_q", "_int8", "_Q4", "_Q4G32", "_Q8"):
        if name.endswith(suffix):
            return name.removesuffix(suffix)
    return f"{name}_float"


def _type(scale: ir.Value | None) -> ir.DataType:
    return scale.dtype if scale is not None and scale.dtype is not None else ir.DataType.FLOAT


def kept_attributes(node: ir.Node, *left_out: str) -> list[ir.Attr]:
    """The attributes of a node but for some."""
    return [attribute for name, attribute in node.attributes.items() if name not in left_out]


def standard(node: ir.Node, op_type: str) -> bool:
    """Whether a node is this operator, of ONNX or of ONNX Runtime."""
    return is_onnx(node, op_type) or (node.domain == "com.microsoft" and node.op_type == op_type)
