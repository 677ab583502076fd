"""Writing W ~ A S B into a graph: block-diagonal wrappers as standard operators around a sparse core.

    Gemm, MatMul    x -> Reshape (..., blocks, b) -> Transpose -> MatMul with (blocks, b, b) -> Transpose -> Reshape
    Conv            a 1x1 convolution with as many groups as there are blocks (it commutes with zero padding: no bias)

The core stays the layer's weight, under its name, with the zeros in place: what skips zeros finds them in a constant
operand. A bias that stood with the core of a layer with an outer wrapper A moves behind A. Every node is marked with
its role (`graphopt.sparsity.marks`), so that later passes leave it as it is.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.numerics.sparsity.armor import Factors
from graphopt.rewriting.edit import Names, mark_origin, new_initializer, replace_value
from graphopt.sparsity.layers import Floats, SparseLayer
from graphopt.sparsity.marks import Role, mark


def factors_blocked(layer: SparseLayer) -> str | None:
    """Why a layer cannot be written as factors; None where it can."""
    shape = layer.layer.linear.input.shape
    if layer.layer.groups > 1:
        return "wrappers of a grouped convolution have no operator"
    if layer.layer.window is None and (shape is None or len(shape) < 2):
        return "the number of dimensions of its input is not known"
    return None


def write_factors(model: ir.Model, layer: SparseLayer, factors: Factors, bias: Floats) -> None:
    """Put the wrappers around a layer and the core in its place.

    Args:
        model: to which the layer belongs.
        layer: `factors_blocked` found nothing against it.
        factors: blocks that divide the layer's channels.
        bias: (outputs,), of the whole layer.
    """
    writer = _Writer(layer, Names(model))
    node = layer.layer.linear.node
    core = np.asarray(factors.core, dtype=np.float64)[None]
    mark(node, "core", [layer.layer.key])
    if factors.right is not None:
        source = layer.layer.linear.input
        made = writer.wrapper(source, np.asarray(factors.right), "in", before=node)
        for index, value in enumerate(node.inputs):
            if value is source:
                node.replace_input_with(index, made)
    outside = layer.layer.linear.add is not None  # the bias of a MatMul stands behind whatever follows it
    if factors.left is None or outside:
        layer.store(core, bias)
    else:
        layer.store(core, np.zeros_like(bias))
    if factors.left is not None:
        writer.behind(np.asarray(factors.left), None if outside else bias)


class _Writer:
    """Makes the nodes of one layer's wrappers."""

    def __init__(self, layer: SparseLayer, names: Names) -> None:
        self._layer, self._names = layer, names
        node = layer.layer.linear.node
        assert isinstance(node.graph, ir.Graph)
        self._graph = node.graph
        weight = node.inputs[1]
        assert weight is not None
        assert weight.const_value is not None
        self._dtype = weight.const_value.dtype
        self._rank = len(layer.layer.linear.input.shape or ())

    def wrapper(self, x: ir.Value, blocks: Floats, side: Role, *, before: ir.Node) -> ir.Value:
        """Blocks applied to the channels of x, in front of a node."""
        nodes = self._nodes(x, blocks, side)
        self._graph.insert_before(before, nodes)
        return nodes[-1].outputs[0]

    def behind(self, blocks: Floats, bias: Floats | None) -> None:
        """Blocks applied to the layer's own output, then its bias, and every reader of the output reads that."""
        node = self._layer.layer.linear.node
        y = node.outputs[0]
        nodes = self._nodes(y, blocks, "out")
        if bias is not None and bias.any():
            self._add_bias(nodes, bias)
        self._graph.insert_after(node, nodes)
        replace_value(y, nodes[-1].outputs[0])
        nodes[0].replace_input_with(0, y)

    def _add_bias(self, nodes: list[ir.Node], bias: Floats) -> None:
        value = self._constant("out_bias", bias)
        if self._layer.layer.window is None:
            nodes.append(self._node("Add", [nodes[-1].outputs[0], value], "out", "add"))
        else:
            nodes[0].resize_inputs(3)
            nodes[0].replace_input_with(2, value)

    def _nodes(self, x: ir.Value, blocks: Floats, side: Role) -> list[ir.Node]:
        count, size = blocks.shape[0], blocks.shape[1]
        window = self._layer.layer.window
        if window is not None:
            kernel = (1,) * len(window.kernel)
            weight = self._constant(f"{side}_blocks", blocks.reshape(count * size, size, *kernel))
            return [self._node("Conv", [x, weight], side, "", group=count, kernel_shape=kernel)]
        rank = self._rank
        lead = list(range(rank - 1))
        blocked = self._integers(f"{side}_blocked", [0] * len(lead) + [count, size])
        flat = self._integers(f"{side}_flat", [0] * len(lead) + [count * size])
        turned = blocks.swapaxes(1, 2).reshape(count, *(1,) * (rank - 2), size, size)
        cut = self._node("Reshape", [x, blocked], side, "cut")
        first = self._node("Transpose", [cut.outputs[0]], side, "first", perm=[rank - 1, *lead, rank])
        product = self._node("MatMul", [first.outputs[0], self._constant(f"{side}_blocks", turned)], side, "")
        last = self._node("Transpose", [product.outputs[0]], side, "last", perm=[*range(1, rank), 0, rank])
        return [cut, first, product, last, self._node("Reshape", [last.outputs[0], flat], side, "joined")]

    def _node(self, op: str, inputs: list[ir.Value], side: Role, part: str, **attributes: object) -> ir.Node:
        name = f"{side}_{part}" if part else side
        node = ir.node(op, inputs, attributes=attributes or None)  # type: ignore[arg-type]
        layer = self._layer.layer
        node.name = self._names.fresh(f"{layer.label}_{name}")
        node.outputs[0].name = self._names.fresh(f"{layer.key}_{name}")
        node.outputs[0].type = ir.TensorType(self._dtype)
        mark_origin(node, [layer.label])
        mark(node, side, [layer.key])
        return node

    def _constant(self, name: str, data: Floats) -> ir.Value:
        return new_initializer(self._graph, self._names.fresh(f"{self._layer.layer.key}_{name}"), data, self._dtype)

    def _integers(self, name: str, data: list[int]) -> ir.Value:
        wanted = self._names.fresh(f"{self._layer.layer.key}_{name}")
        return new_initializer(self._graph, wanted, np.array(data), ir.DataType.INT64)
