"""Weights that a model computes from constants, in float64: g v / ||v||, W / (u^T W v), (W - mean) / deviation.

Only operators whose float64 value is their definition stand here; what else a weight may be computed with is left to
constant folding (`graphopt.rewriting.constant_cones`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.rewriting.constants import array, constant
from graphopt.rewriting.nodes import is_onnx

Array = npt.NDArray[Any]

_LONGEST = 64
"""Nodes of one formula."""

_ARITHMETIC: dict[str, Callable[..., Array]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
    "Pow": np.power,
    "Neg": np.negative,
    "Abs": np.abs,
    "Exp": np.exp,
    "Sqrt": np.sqrt,
    "Reciprocal": np.reciprocal,
    "Max": np.maximum,
    "Min": np.minimum,
    "MatMul": np.matmul,
    "Identity": np.asarray,
}

_REDUCTIONS: dict[str, Callable[..., Array]] = {
    "ReduceSum": np.sum,
    "ReduceMean": np.mean,
    "ReduceL1": lambda x, **along: np.sum(np.abs(x), **along),
    "ReduceL2": lambda x, **along: np.sqrt(np.sum(np.square(x), **along)),
    "ReduceSumSquare": lambda x, **along: np.sum(np.square(x), **along),
    "ReduceMax": np.max,
}

OPERATORS = (*_ARITHMETIC, *_REDUCTIONS, "Transpose", "Reshape", "Unsqueeze", "Squeeze", "Flatten")


def formula_nodes(value: ir.Value) -> list[ir.Node] | None:
    """The nodes that compute `value` from constants, inputs before readers; None where anything else is in it."""
    order: dict[ir.Node, None] = {}
    entered: set[ir.Node] = set()
    todo: list[ir.Value | None] = [value]
    # A stack of its own: a graph may be deeper than Python's. A formula is short, so most walks end after a few steps.
    while todo:
        v = todo[-1]
        node = None if v is None or constant(v) is not None else v.producer()
        if v is None or constant(v) is not None or node in order:
            todo.pop()
            continue
        if node is None or len(node.outputs) != 1 or not is_onnx(node, *OPERATORS):
            return None
        if node in entered:
            order[node] = None
            todo.pop()
            continue
        if len(entered) > _LONGEST or any(a.is_ref() for a in node.attributes.values()):
            return None
        entered.add(node)
        todo.extend(reversed(node.inputs))
    return list(order) or None


def computed(nodes: Sequence[ir.Node], opset: int) -> Array | None:
    """The value of the last of `nodes`, in float64; None where an operand is not what its operator asks for."""
    known: dict[ir.Value, Array] = {}
    last_reader = {value: node for node in nodes for value in node.inputs}
    for node in nodes:
        operands: list[Array | None] = []
        for index, value in enumerate(node.inputs):
            found = known.get(value) if value is not None else None
            if found is None and value is not None:
                found = array(value)
            if found is not None and not (index and node.op_type in _SIZES) and found.dtype.kind in "fV":
                found = found.astype(np.float64, copy=False)
            operands.append(found)
        with np.errstate(all="ignore"):
            result = _apply(node, operands, opset)
        if result is None:
            return None
        for value in node.inputs:
            if value is not None and last_reader[value] is node:
                known.pop(value, None)
        known[node.outputs[0]] = result
    return known[nodes[-1].outputs[0]]


_SIZES = (*_REDUCTIONS, "Reshape", "Unsqueeze", "Squeeze")
"""Operators whose second input holds integers: axes or sizes."""


def _apply(node: ir.Node, operands: list[Array | None], opset: int) -> Array | None:
    x, get = operands[0], node.attributes
    if x is None:
        return None
    if node.op_type in _ARITHMETIC:
        given = [o for o in operands if o is not None]
        if any(o.dtype != np.float64 for o in given) or len(given) != len(operands):
            return None
        result = _ARITHMETIC[node.op_type](*given[:2])
        for more in given[2:]:
            result = _ARITHMETIC[node.op_type](result, more)
        return result
    second = operands[1] if len(operands) > 1 else None
    listed = get.get_ints("axes", None) if "axes" in get else None
    axes = tuple(int(a) for a in second.ravel()) if second is not None else listed
    if node.op_type in _REDUCTIONS:
        if not axes and get.get_int("noop_with_empty_axes", 0) != 0:
            return None
        along = tuple(axes) if axes else None
        return _REDUCTIONS[node.op_type](x, axis=along, keepdims=bool(get.get_int("keepdims", 1)))
    match node.op_type:
        case "Transpose":
            return np.transpose(x, get.get_ints("perm", tuple(reversed(range(x.ndim)))))
        case "Flatten":
            axis = get.get_int("axis", 1) % (x.ndim + 1) if x.ndim else 0
            return x.reshape(int(np.prod(x.shape[:axis])), -1)
        case "Squeeze":
            return np.squeeze(x, tuple(axes) if axes else None)
        case "Unsqueeze" if axes:
            return np.expand_dims(x, tuple(axes))
        case "Reshape" if second is not None and get.get_int("allowzero", 0) == 0:
            sizes = [x.shape[i] if size == 0 else int(size) for i, size in enumerate(second)]
            return x.reshape(sizes)
    return None
