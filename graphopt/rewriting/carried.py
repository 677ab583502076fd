"""Numbers per channel, followed through operators that move channels and positions but compute nothing per channel.

`carry(array, node)`: `array` broadcasts against what the node reads and says one number for every element of it; the
result says the same of what the node gives. Axes along which the numbers do not change have size 1, and only those may
be of unknown length. Reshapes are followed where the channels end up on axes of their own: (N, S, 12 * 64) becomes
(N, S, 12, 64), whatever N and S are. A pool that averages without padding keeps y = a x + c as well: its weights add
up to one.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.rewriting.edit import sole_use
from graphopt.rewriting.nodes import is_onnx

Array = npt.NDArray[Any]

MOVES = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Identity")
AVERAGES = ("GlobalAveragePool", "AveragePool")
_LONGEST = 16
"""Operators followed from one linear operator."""


def carry(array: Array, node: ir.Node) -> Array | None:
    """`array` behind `node`, one of MOVES or AVERAGES; None where it cannot be followed."""
    source, result = node.inputs[0], node.outputs[0]
    if source is None or any(a.is_ref() for a in node.attributes.values()):
        return None
    if is_onnx(node, "Identity"):
        return array
    if is_onnx(node, "Transpose"):
        order = node.attributes.get_ints("perm", tuple(reversed(range(array.ndim))))
        return np.transpose(array, order) if sorted(order) == list(range(array.ndim)) else None
    if is_onnx(node, *AVERAGES):
        padded = any(node.attributes.get_ints("pads", ())) or node.attributes.get_int("ceil_mode", 0) != 0
        plain = not padded and node.attributes.get_string("auto_pad", "NOTSET") in ("NOTSET", "VALID")
        return array if plain and all(d == 1 for d in array.shape[2:]) else None
    if not is_onnx(node, *MOVES) or source.shape is None or result.shape is None:
        return None
    return _reshaped(array, tuple(source.shape), tuple(result.shape))


def path_from_linear(value: ir.Value, operators: tuple[str, ...]) -> tuple[ir.Value, list[ir.Node]]:
    """Back from `value` through nodes that only the next one reads: where they begin, and the nodes in order."""
    path: list[ir.Node] = []
    while len(path) < _LONGEST:
        node = value.producer()
        if node is None or not is_onnx(node, *operators) or node.inputs[0] is None or not sole_use(value):
            break
        path.append(node)
        value = node.inputs[0]
    return value, path[::-1]


def carry_along(array: Array, path: list[ir.Node]) -> Array | None:
    """`array` behind all nodes of `path`; None where it cannot be followed."""
    for node in path:
        found = carry(array, node)
        if found is None:
            return None
        array = found
    return array


def _reshaped(array: Array, before: tuple[Any, ...], after: tuple[Any, ...]) -> Array | None:
    if array.ndim != len(before):
        return None
    varying = [axis for axis, size in enumerate(array.shape) if size != 1]
    if not varying:
        return array.reshape((1,) * len(after))
    if any(d == 0 for d in (*before, *after)):
        return None
    # Where the channels alone do not end up on axes of their own, they may together with the known axes behind them.
    known = varying[-1] + 1
    while known < len(before) and isinstance(before[known], int):
        known += 1
    for last in dict.fromkeys((varying[-1] + 1, known)):
        found = _block_reshaped(array, varying[0], last, before, after)
        if found is not None:
            return found
    return None


def _block_reshaped(
    array: Array, first: int, last: int, before: tuple[Any, ...], after: tuple[Any, ...]
) -> Array | None:
    """`array`, which changes only along axes `first` to `last` of the tensor, where these become axes of their own."""
    block = before[first:last]
    if not all(isinstance(d, int) for d in block):
        return None
    dense = np.broadcast_to(array.reshape(array.shape[first:last]), block)
    for start in range(len(after)):
        for stop in range(start + 1, len(after) + 1):
            inner = after[start:stop]
            if not all(isinstance(d, int) for d in inner) or math.prod(inner) != dense.size:
                continue
            # Reshape keeps the number of elements, so that one side determines the other.
            if _same_count(before[:first], after[:start]) or _same_count(before[last:], after[stop:]):
                return dense.reshape((1,) * start + tuple(inner) + (1,) * (len(after) - stop))
    return None


def _same_count(left: tuple[Any, ...], right: tuple[Any, ...]) -> bool:
    """Whether two lists of dimensions surely have the same product: equal numbers, and the same symbols."""
    counts = []
    for dims in (left, right):
        if any(not isinstance(d, int) and getattr(d, "value", None) is None for d in dims):
            return False
        symbols = Counter(str(d) for d in dims if not isinstance(d, int))
        counts.append((math.prod(d for d in dims if isinstance(d, int)), symbols))
    return counts[0] == counts[1]
