"""What decides the time of a linear layer: operator, sizes, what the runtime fuses behind it, and the widths.

The widths are the sizes that pruning changes; everything else of a layer is its `LayerShape`, whose text is its key in
the table of latencies:

    Conv, ConvTranspose     (input channels, output channels); depthwise: (channels,)
    Gemm, MatMul            (inputs, outputs), the second operand a constant
    Product                 (batches, contracted, columns): a MatMul of two computed tensors
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.analysis import shapes
from graphopt.analysis.rules import node_key
from graphopt.analysis.units import Coupling
from graphopt.pruning.selection import Vector
from graphopt.rewriting.constants import constant
from graphopt.rewriting.edit import sole_use
from graphopt.rewriting.nodes import is_onnx

ACTIVATIONS = ("Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "Elu", "Gelu", "QuickGelu")
"""Operators behind a layer that runtimes fuse into it, or that at least run once for each of its outputs."""


@dataclass(frozen=True)
class LayerShape:
    """A kind of layer, without its widths.

    Attributes:
        op: see the module docstring.
        precision: "float32", "float16", ... or "int8".
        extent: Conv: batch and spatial sizes of the input; Gemm, MatMul: rows; Product: other batches, rows.
        kernel, strides, pads, dilations: of a convolution; () for the others.
        groups: of a convolution; 0 means depthwise, one group a channel.
        bias: whether something constant is added; always for Conv and Gemm, which add it on the way.
        add: whether the result enters a sum with a tensor of its shape.
        activation: operator behind that; "" for none.
    """

    op: str
    precision: str
    extent: tuple[int, ...]
    kernel: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    groups: int = 1
    bias: bool = True
    add: bool = False
    activation: str = ""

    def __str__(self) -> str:
        """The key in the table."""
        parts = [self.op, self.precision, f"on {_by(self.extent)}"]
        if self.kernel:
            parts.append(f"kernel {_by(self.kernel)} strides {_by(self.strides)} pads {_by(self.pads)}")
            parts.append(f"dilations {_by(self.dilations)} {f'groups {self.groups}' if self.groups else 'depthwise'}")
        parts += [word for word, said in (("bias", self.bias), ("Add", self.add)) if said]
        return " ".join([*parts, *([self.activation] if self.activation else [])])

    def work(self, widths: tuple[int, ...]) -> float:
        """Multiply-accumulates at these widths, roughly (padding is not looked at)."""
        if self.op == "Product":
            return float(math.prod(self.extent) * math.prod(widths))
        places = math.prod(self.extent) / max(1, math.prod(self.strides))
        return float(places * math.prod(self.kernel) * math.prod(widths) / max(1, self.groups))


@dataclass(frozen=True)
class Site:
    """A layer of a model.

    Attributes:
        key: of its node.
        shape: its kind.
        widths: as they are.
        axes: unit ids by position for every width; None where nothing can go.
    """

    key: str
    shape: LayerShape
    widths: tuple[int, ...]
    axes: tuple[Vector | None, ...]


def sites(model: ir.Model, coupling: Coupling, *, integer: bool = False) -> Iterator[Site]:
    """The linear layers of the main graph whose sizes are all known.

    Args:
        model: with inferred shapes, of the same names as the one `coupling` was made of.
        coupling: tells which axes can shrink.
        integer: as they will be once quantised.
    """
    for node in model.graph:
        view = _convolution if is_onnx(node, "Conv", "ConvTranspose") else _product
        if not is_onnx(node, "Conv", "ConvTranspose", "Gemm", "MatMul"):
            continue
        tensor = constant(node.inputs[1])
        dtype = (tensor.dtype if tensor is not None else node.outputs[0].dtype) or ir.DataType.FLOAT
        found = view(node, coupling, "int8" if integer else dtype.numpy().name)
        if found is not None:
            bias, add, activation = _behind(node)
            shape = dataclasses.replace(found.shape, bias=bias, add=add, activation=activation)
            yield dataclasses.replace(found, shape=shape)


def _convolution(node: ir.Node, coupling: Coupling, precision: str) -> Site | None:
    x, y, weight = (_dims(v) for v in (node.inputs[0], node.outputs[0], node.inputs[1]))
    if x is None or y is None or weight is None:
        return None
    rank = len(x) - 2
    kernel = tuple(weight[2:])
    attributes = node.attributes
    strides = tuple(attributes.get_ints("strides", ()) or (1,) * rank)
    dilations = tuple(attributes.get_ints("dilations", ()) or (1,) * rank)
    pads = tuple(attributes.get_ints("pads", ()) or (0,) * (2 * rank))
    if (attributes.get_string("auto_pad", "NOTSET") or "NOTSET").startswith("SAME"):
        reach = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
        pads = (*(r // 2 for r in reach), *(r - r // 2 for r in reach))
    groups = int(attributes.get_int("group", 1) or 1)
    inside, outside = _axis(coupling.operand_units(node, 0, 1)), _axis(coupling.axis_units(node_key(node), 1))
    depthwise = groups > 1 and groups == x[1] == y[1]
    shape = LayerShape(
        node.op_type, precision, (x[0], *x[2:]), kernel, strides, pads, dilations, 0 if depthwise else groups
    )
    if depthwise:
        return Site(node_key(node), shape, (y[1],), (outside,))
    return Site(node_key(node), shape, (x[1], y[1]), (inside, outside))


def _product(node: ir.Node, coupling: Coupling, precision: str) -> Site | None:
    a, b, y = (_dims(v) for v in (*node.inputs[:2], node.outputs[0]))
    if a is None or b is None or y is None or min(len(a), len(b), len(y)) < 2:
        return None
    contracted = 0 if is_onnx(node, "Gemm") and node.attributes.get_int("transA", False) else len(a) - 1
    inside = _axis(coupling.operand_units(node, 0, contracted))
    outside = _axis(coupling.axis_units(node_key(node), len(y) - 1))
    if constant(node.inputs[1]) is not None and len(b) == 2:
        shape = LayerShape(node.op_type, precision, (math.prod(y[:-1]),))
        return Site(node_key(node), shape, (a[contracted], y[-1]), (inside, outside))
    lead = {axis: _axis(coupling.axis_units(node_key(node), axis)) for axis in range(len(y) - 2)}
    shrinking = next((axis for axis, units in lead.items() if units is not None), None)
    batches = 1 if shrinking is None else y[shrinking]
    shape = LayerShape("Product", precision, (math.prod(y[:-2]) // batches, y[-2]))
    heads = None if shrinking is None else lead[shrinking]
    return Site(node_key(node), shape, (batches, a[contracted], y[-1]), (heads, inside, outside))


def _dims(value: ir.Value | None) -> list[int] | None:
    return None if value is None else shapes.static_dims(value)


def _behind(node: ir.Node) -> tuple[bool, bool, str]:
    """Whether a constant is added to the result, whether a tensor is, and the activation behind that."""
    bias, add = not is_onnx(node, "MatMul"), False
    value = node.outputs[0]
    while (use := sole_use(value)) is not None:
        other = use.node.inputs[1 - use.idx] if is_onnx(use.node, "Add") else None
        if other is None or add:
            break
        if constant(other) is not None:
            bias = True
        elif other.shape == value.shape and not _claimed(other):
            add = True
        else:
            break
        value = use.node.outputs[0]
    use = sole_use(value)
    activation = use.node.op_type if use is not None and use.node.op_type in ACTIVATIONS else ""
    return bias, add, activation


def _claimed(value: ir.Value) -> bool:
    """True where the other operand of a sum comes from a convolution of its own, which then takes the sum instead.

    Two convolutions can enter one sum (a projection shortcut); a runtime fuses the sum into one of them. Here it is the
    one that is the second operand.
    """
    node, use = value.producer(), sole_use(value)
    return node is not None and is_onnx(node, "Conv") and use is not None and use.idx == 1


def _axis(factors: tuple[Vector, ...]) -> Vector | None:
    if not factors:
        return None
    stacked = np.stack(factors)
    return stacked if stacked.any() else None


def _by(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))
