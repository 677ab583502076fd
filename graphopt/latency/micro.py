"""Models of one layer, whose times tell the layer's: the same input goes through several copies of it.

A model with 1 + k copies takes k layers longer than a model with one; what is at the edges of both (conversions of the
layout, of the type, the call itself) cancels in the difference. Where the layer enters a sum, the copies form a chain
of sums; elsewhere the result of each copy is cut down to one pixel or row, so that nothing leaves the runtime's own
layout at full size and nothing is dead code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.latency.shapes import LayerShape
from graphopt.model import infer_shapes

OPSET = 20
"""Has all activations of `graphopt.latency.shapes.ACTIVATIONS`."""

COPY_WORK = 1e7
"""Multiply-accumulates that the copies amount to at least, where `COPIES` allow: some tenths of a millisecond."""

COPIES = (2, 16)
"""Fewest and most additional copies."""

DOMAINS = {"QuickGelu": "com.microsoft"}
"""Activations outside of the standard."""


def copies(shape: LayerShape, widths: tuple[int, ...]) -> int:
    """How many additional copies make a difference that can be measured."""
    wanted = round(COPY_WORK / max(1.0, shape.work(widths)))
    return min(max(wanted, COPIES[0]), COPIES[1])


def micro(shape: LayerShape, widths: tuple[int, ...], count: int) -> ir.Model:
    """A float model of `count` copies of a layer.

    Args:
        shape: the kind of layer; a precision of "int8" makes a float32 model, to be quantised.
        widths: its widths.
        count: copies, at least 1.
    """
    build = _Builder(shape, np.dtype("float32" if shape.precision == "int8" else shape.precision))
    return build.model(widths, count)


@dataclass
class _Builder:
    shape: LayerShape
    dtype: np.dtype[Any]
    nodes: list[ir.Node] = field(default_factory=list)
    inputs: list[ir.Value] = field(default_factory=list)
    constants: list[ir.Value] = field(default_factory=list)
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def model(self, widths: tuple[int, ...], count: int) -> ir.Model:
        """Build; widths are rounded up to what the groups need."""
        widths = tuple(-(-w // max(1, self.shape.groups)) * max(1, self.shape.groups) for w in widths)
        x = self.input("x", self._input_shape(widths))
        results: list[ir.Value] = []
        total: ir.Value | None = None
        for number in range(count):
            value = self._layer(x, widths, number)
            if self.shape.add and total is not None:
                value = self.node("Add", [value, total])
            if self.shape.activation:
                value = self._activation(value)
            total = value
            if not self.shape.add or number == count - 1:
                results.append(self._cut(value))
        outputs = results if not self.shape.kernel else [self._gather(results, widths[-1])]
        for number, value in enumerate(outputs):
            value.name = f"y{number}"
        graph = ir.Graph(
            self.inputs, outputs, nodes=self.nodes, initializers=self.constants, name="layer",
            opset_imports={"": OPSET, "com.microsoft": 1},
        )  # fmt: skip
        model = ir.Model(graph, ir_version=9)
        infer_shapes(model)
        return model

    def _layer(self, x: ir.Value, widths: tuple[int, ...], number: int) -> ir.Value:
        shape = self.shape
        if shape.op == "Product":
            other = self.input(f"b{number}", (shape.extent[0], *widths))
            return self.node("MatMul", [x, other])
        if not shape.kernel:
            product = self.node("MatMul", [x, self.constant((widths[0], widths[1]))])
            return self.node("Add", [product, self.constant((widths[1],))]) if shape.bias else product
        groups = shape.groups or widths[0]
        outside, inside = widths[-1], widths[0]
        first, second = (outside, inside // groups) if shape.op == "Conv" else (inside, outside // groups)
        operands = [x, self.constant((first, second, *shape.kernel))]
        operands += [self.constant((outside,))] if shape.bias else []
        return self.node(
            shape.op, operands, strides=shape.strides, pads=shape.pads, dilations=shape.dilations, group=groups
        )

    def _activation(self, value: ir.Value) -> ir.Value:
        op_type = self.shape.activation
        bounds = [self._initializer(np.array(b, self.dtype)) for b in (0, 6)] if op_type == "Clip" else []
        return self.node(op_type, [value, *bounds], DOMAINS.get(op_type, ""))

    def _input_shape(self, widths: tuple[int, ...]) -> tuple[int, ...]:
        extent = self.shape.extent
        if self.shape.op == "Product":
            return (extent[0], widths[0], extent[1], widths[1])
        return (extent[0], widths[0], *extent[1:]) if self.shape.kernel else (extent[0], widths[0])

    def _cut(self, value: ir.Value) -> ir.Value:
        """One pixel or row of a result."""
        if self.shape.kernel:
            rank = len(self.shape.kernel)
            far = 4 * max(self.shape.extent[1:])  # further than any result of the layer reaches
            return self.node("MaxPool", [value], kernel_shape=(1,) * rank, strides=(far,) * rank)
        bounds = [self.integers([0]), self.integers([1]), self.integers([2 if self.shape.op == "Product" else 0])]
        return self.node("Slice", [value, *bounds])

    def _gather(self, pixels: Sequence[ir.Value], outputs: int) -> ir.Value:
        """Something small that reads them all with an integer kernel where there is one."""
        joined = self.node("Concat", pixels, axis=1) if len(pixels) > 1 else pixels[0]
        channels = len(pixels) * outputs
        return self.node("Conv", [joined, self.constant((4, channels, *(1 for _ in self.shape.kernel)))])

    def node(self, op_type: str, inputs: Sequence[ir.Value], domain: str = "", **attributes: Any) -> ir.Value:
        """Add a node; returns its output."""
        made = ir.node(op_type, inputs, attributes=attributes, domain=domain, name=f"{op_type}{len(self.nodes)}")
        made.outputs[0].name = f"v{len(self.nodes)}"
        self.nodes.append(made)
        return made.outputs[0]

    def input(self, name: str, size: tuple[int, ...]) -> ir.Value:
        """Add an input."""
        value = ir.Value(name=name, shape=ir.Shape(size), type=ir.TensorType(ir.DataType.from_numpy(self.dtype)))
        self.inputs.append(value)
        return value

    def constant(self, size: tuple[int, ...]) -> ir.Value:
        """Add a weight of its own values, so that nothing is shared between copies."""
        spread = 1 / math.sqrt(max(1, math.prod(size[1:])))
        return self._initializer((spread * self.random.normal(size=size)).astype(self.dtype))

    def integers(self, values: Sequence[int]) -> ir.Value:
        """Add indices."""
        return self._initializer(np.array(values, dtype=np.int64))

    def _initializer(self, array: npt.NDArray[Any]) -> ir.Value:
        name = f"c{len(self.constants)}"
        tensor = ir.Tensor(array, name=name)
        value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.constants.append(value)
        return value
