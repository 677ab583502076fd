"""Constants that can be stored as integers, and who reads them: products, convolutions, recurrent nodes, look-ups.

A weight is seen as matrices (groups, rows, columns), as `graphopt.rewriting.layers.Layer.weight` has them. Columns are
what a scale is shared along: input channels of a product, the kernel too of a convolution, a row of a table.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from graphopt.base import Skip
from graphopt.quantization.rounding.matrices import from_matrices, to_matrices
from graphopt.quantization.static.plan import excluded
from graphopt.rewriting.constants import array, constant
from graphopt.rewriting.nodes import is_onnx, label
from graphopt.rewriting.scopes import graphs
from graphopt.sparsity.marks import is_wrapper

Array = NDArray[Any]

RECURRENT = ("LSTM", "GRU", "RNN")
PLACES = {
    "Conv": (1,),
    "ConvTranspose": (1,),
    "Gemm": (1,),
    "MatMul": (1, 0),
    "Gather": (0,),
    **dict.fromkeys(RECURRENT, (1, 2)),
}
"""Operators with weights that can be integers, and which inputs those are."""


@dataclass(frozen=True)
class Reader:
    """A node that reads a weight.

    Attributes:
        node: one of `PLACES`.
        index: which input of `node` the weight is.
        transpose: the Transpose through which a MatMul reads it; None where it reads it as it is.
    """

    node: ir.Node
    index: int
    transpose: ir.Node | None = None

    @property
    def key(self) -> str:
        """Name of the node's first output that has one."""
        return key_of(self.node)

    @property
    def rows_first(self) -> bool:
        """Whether the constant itself is (groups, rows, columns) but for its shape; else rows come behind columns."""
        if self.transpose is not None or is_onnx(self.node, "Conv", "Gather", *RECURRENT):
            return True
        if is_onnx(self.node, "Gemm"):
            return self.node.attributes.get_int("transB", 0) != 0
        return is_onnx(self.node, "MatMul") and self.index == 0

    def matrices(self, weight: Array) -> Array:
        """The weight as (groups, rows, columns)."""
        if is_onnx(self.node, *RECURRENT):
            return weight
        if self.transpose is not None or is_onnx(self.node, "Gather"):
            return weight.reshape(1, weight.shape[0], -1)
        return to_matrices(self.node, self.index, weight)

    def restored(self, matrices: Array, like: Array) -> Array:
        """Other numbers in the place of those that `matrices` was given, in the shape of `like`."""
        if self.transpose is not None or is_onnx(self.node, "Gather", *RECURRENT):
            return matrices.reshape(like.shape)
        return from_matrices(self.node, self.index, matrices, like)


@dataclass(frozen=True)
class Weight:
    """A constant and all who read it.

    Attributes:
        value: initializer, or output of a Constant node.
        readers: in the order of the graph.
    """

    value: ir.Value
    readers: tuple[Reader, ...]

    @property
    def array(self) -> Array:
        """Its numbers."""
        found = array(self.value)
        assert found is not None  # `weights_of` asked
        return found

    @property
    def tensor(self) -> ir.TensorProtocol:
        """The constant."""
        found = constant(self.value)
        assert found is not None  # `weights_of` asked
        return found

    @property
    def keys(self) -> list[str]:
        """Of its readers."""
        return list(dict.fromkeys(reader.key for reader in self.readers))


def key_of(node: ir.Node) -> str:
    """Name of the first output that has one."""
    return next((v.name for v in node.outputs if v.name), "")


def weights_of(model: ir.Model, exclude: tuple[str, ...] = ()) -> tuple[list[Weight], list[Skip]]:
    """Weights of the main graph and of the bodies in it that can be integers, and nodes whose weights cannot.

    Args:
        model: not changed. Weights listed as graph inputs can be overridden by callers and stay.
        exclude: globs over names of nodes whose weights stay in float.
    """
    readers: dict[ir.Value, list[Reader]] = {}
    refused: dict[ir.Value, str] = {}
    skipped: dict[str, str] = {}
    names = Counter(key_of(node) for graph in graphs(model) for node in graph)
    for graph in graphs(model):
        for node in graph:
            for reader, value in _read(node):
                reason = excluded(node, exclude) or _unfit_node(node, names) or _unfit_weight(reader, value)
                if reason:
                    refused.setdefault(value, reason if constant(value) is None else f"{label(node)}: {reason}")
                    skipped.setdefault(label(node), reason)
                else:
                    readers.setdefault(value, []).append(reader)
    weights = []
    for value, found in readers.items():
        reason = _read_by_others(value, found, refused)
        if reason:
            skipped.update({label(r.node): reason for r in found if label(r.node) not in skipped})
        else:
            weights.append(Weight(value, tuple(found)))
    return weights, [Skip(*pair) for pair in skipped.items()]


def _read(node: ir.Node) -> Iterator[tuple[Reader, ir.Value]]:
    """Every weight that a node reads; operands that other nodes compute are none."""
    if not is_onnx(node, *PLACES):
        return
    for index in PLACES[node.op_type]:
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is None:
            continue
        producer = value.producer()
        if producer is not None and is_onnx(producer, "Transpose") and is_onnx(node, "MatMul") and index == 1:
            source, perm = producer.inputs[0], producer.attributes.get_ints("perm", (1, 0))
            if _is_float_matrix(source) and tuple(perm or ()) == (1, 0) and source is not None:
                yield Reader(node, index, producer), source
        elif _is_weight(value, is_table=node.op_type == "Gather") or (
            index == 1 and is_onnx(node, "Conv", "ConvTranspose")
        ):
            yield Reader(node, index), value


def _is_weight(value: ir.Value, *, is_table: bool) -> bool:
    """A constant, or an initializer that callers may override; a table holds floats in two axes or more."""
    tensor = constant(value) if not value.is_graph_input() else value.const_value
    if tensor is None or (is_table and not tensor.dtype.is_floating_point()):
        return False
    return len(tensor.shape) >= 2


def _is_float_matrix(value: ir.Value | None) -> bool:
    tensor = constant(value)
    return tensor is not None and tensor.dtype.is_floating_point() and len(tensor.shape) == 2


def _unfit_node(node: ir.Node, names: Counter[str]) -> str | None:
    if is_wrapper(node):
        return "the wrapper of a sparse core: it stays in float"
    if names[key_of(node)] > 1:
        return f"its output {key_of(node)!r} has the name of another one in a body"
    if is_onnx(node, "Gather") and node.attributes.get_int("axis", 0) != 0:
        return "it looks up along another axis than the first"
    return None


def _unfit_weight(reader: Reader, value: ir.Value) -> str | None:
    tensor = constant(value)
    if tensor is None:
        overridable = value.is_graph_input() and value.is_initializer()
        return "its weight " + ("can be overridden by the caller" if overridable else "is computed, no constant")
    if tensor.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE):
        return f"its weight has dtype {tensor.dtype.name.lower()}"
    if math.prod(tensor.shape.numpy()) == 0:
        return "its weight is empty"
    if is_onnx(reader.node, "Gemm") and len(tensor.shape) != 2:
        return f"its weight has {len(tensor.shape)} axes, not 2"
    if not np.isfinite(np.asarray(tensor.numpy()).astype(np.float32)).all():
        return "its weight holds NaN, Inf or numbers beyond float32"
    return None


def _read_by_others(value: ir.Value, readers: list[Reader], refused: dict[ir.Value, str]) -> str | None:
    """Why integers cannot stand for the constant though these readers would take them."""
    if value.is_graph_output():
        return "its weight is an output of the graph"
    if value in refused:
        return f"its weight is shared with a node that stays in float ({refused[value]})"
    through = {reader.transpose or reader.node for reader in readers}
    others = [use.node for use in value.uses() if use.node not in through]
    behind = {reader.transpose for reader in readers if reader.transpose is not None}
    ours = {reader.node for reader in readers}
    others += [use.node for t in behind for use in t.outputs[0].uses() if use.node not in ours]
    if any(t.outputs[0].is_graph_output() for t in behind):
        return "its weight is an output of the graph, transposed"
    return f"its weight is also read by {label(others[0])}, which needs floats" if others else None
