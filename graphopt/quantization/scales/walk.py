"""Labels of scales on the tensors of a graph: what the rules of operators (`operators`) write and read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.analysis.labels import LabelTable
from graphopt.numerics.equalization import Classes
from graphopt.rewriting.constants import constant
from graphopt.rewriting.nodes import label
from graphopt.sparsity.moves import Shape, Sizes


@dataclass(frozen=True)
class ScaledOperand:
    """A constant operand that scales stand on.

    Attributes:
        node, index: where it is read.
        divide: scales of the channels that it writes, with its rank, size 1 where they do not vary.
        multiply: scales of the channels that it reads.
        weight: False for what is only added: its magnitude says nothing about a channel.
    """

    node: ir.Node
    index: int
    divide: Classes
    multiply: Classes
    weight: bool = True

    @property
    def value(self) -> ir.Value:
        """The constant."""
        return present(self.node.inputs[self.index])


class ScaleWalk:
    """Labels and equations, as far as the walk has come.

    Attributes:
        table: the equations.
        labels: tensor -> labels, with its rank; a tensor without keeps its scale.
        operands: constants that scales stand on.
        written: layers and the labels of the channels that they write.
        sizes: of tensors.
    """

    def __init__(self) -> None:
        self.table = LabelTable()
        self.labels: dict[ir.Value, Classes] = {}
        self.operands: list[ScaledOperand] = []
        self.written: list[tuple[ir.Node, Classes]] = []
        self.sizes = Sizes()

    def shape(self, value: ir.Value | None) -> Shape:
        """Shape of a tensor of known rank; a prime for every symbol."""
        found = self.sizes.of(value)
        assert found is not None
        return found

    def write(self, node: ir.Node, fresh: Classes, rank: int, axis: int) -> None:
        """A layer writes channels of new scales along an axis of its result."""
        self.labels[node.outputs[0]] = on_axis(fresh, rank, axis)
        self.written.append((node, fresh))

    def line(self, node: ir.Node, value: ir.Value | None, axis: int) -> Classes:
        """Labels along one axis, all of its positions; those along others become one."""
        found = self.tied(node, self.labels[present(value)], [axis]).ravel()
        return np.broadcast_to(found, self.shape(value)[axis])

    def tied(self, node: ir.Node, found: Classes, keep: Iterable[int]) -> Classes:
        """The labels with size 1 along all axes but some: positions along the others get one scale."""
        kept = set(keep)
        for axis in range(found.ndim):
            if axis not in kept and found.shape[axis] != 1:
                first = found.take([0], axis)
                self.table.equate(found, first, f"{node.op_type} '{label(node)}' mixes a channel whose scale is fixed")
                found = first
        return found

    def freeze(self, value: ir.Value | None, reason: str) -> None:
        """A tensor keeps its scale."""
        if value is not None and value in self.labels:
            self.table.freeze([self.labels[value].ravel()], reason)

    def freeze_inputs(self, node: ir.Node, reason: str) -> None:
        """All that a node reads keeps its scale."""
        for value in node.inputs:
            self.freeze(value, reason)

    def tie_shared(self) -> None:
        """All uses of a matrix have the same scales; a use that takes none fixes them. Vectors are copied instead."""
        of: dict[ir.Value, list[ScaledOperand]] = {}
        for operand in self.operands:
            of.setdefault(operand.value, []).append(operand)
        for value, found in of.items():
            tensor = constant(value)
            if tensor is None or is_vector(value):
                continue
            first, *others = found
            shared = f"'{value.name}' is the weight of several layers"
            for other in others:
                self.table.equate(first.divide, other.divide, shared)
                self.table.equate(first.multiply, other.multiply, shared)
            if len(found) < len(tuple(value.uses())) or value.is_graph_output():
                reason = f"'{value.name}' is read by others too"
                self.table.freeze([first.divide.ravel(), first.multiply.ravel()], reason)


def is_vector(value: ir.Value) -> bool:
    """A constant with at most one axis longer than 1: cheap to copy, and often shared by accident."""
    tensor = constant(value)
    return tensor is not None and sum(d != 1 for d in tensor.shape.numpy()) <= 1


def present(value: ir.Value | None) -> ir.Value:
    """An operand that the operator requires."""
    assert value is not None
    return value


def on_axis(line: Classes, rank: int, axis: int) -> Classes:
    """Labels of one axis, with the rank of a tensor."""
    return line.reshape([-1 if a == axis else 1 for a in range(rank)])


def unscaled(rank: int) -> Classes:
    """The label of scale one."""
    return np.zeros((1,) * rank, np.int64)
