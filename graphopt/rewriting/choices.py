"""Where with a constant condition, And, Or and Xor with a constant: which operand they give out unchanged.

The rules have the form of those in `graphopt.rewriting.identities`: the value, a reason why not, or None.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from graphopt.rewriting.constants import array

Outcome = ir.Value | str | None
_LARGEST = 1 << 16
"""Elements of a constant that are looked at."""
_NEUTRAL = {"And": True, "Or": False, "Xor": False, "Equal": True}


def _where(node: ir.Node, opset: int) -> Outcome:
    """Where(true, a, b) = a and Where(false, a, b) = b; Where(c, a, a) = a."""
    condition, one, other = node.inputs
    if one is other and one is not None and _keeps_shape(one, [condition]):
        return one
    data = array(condition)
    if data is None or not 0 < data.size <= _LARGEST or data.any() != data.all():
        return None
    chosen, rest = (one, other) if data.any() else (other, one)
    if chosen is None or not _keeps_shape(chosen, [condition, rest]):
        return "its condition is constant, but its operands may broadcast what it gives out to a larger shape"
    return chosen


def _logic(node: ir.Node, opset: int) -> Outcome:
    """And(x, true) = x, Or(x, false) = x, Xor(x, false) = x, Equal(x, true) = x for booleans."""
    for source, other in (node.inputs, tuple(reversed(node.inputs))):
        data = array(other)
        if source is None or data is None or source.dtype != ir.DataType.BOOL or not 0 < data.size <= _LARGEST:
            continue
        if bool((data == _NEUTRAL[node.op_type]).all()):
            if _keeps_shape(source, [other]):
                return source
            return "its constant may broadcast what it reads to a larger shape"
    return None


def _keeps_shape(value: ir.Value, others: list[ir.Value | None]) -> bool:
    """Whether broadcasting with `others` leaves `value` as it is; shapes that files only declare prove nothing."""
    shape = None if value.is_graph_output() or value.shape is None else list(value.shape)
    for other in others:
        if other is None or other.shape is None or other.is_graph_output():
            return False
        dims = list(other.shape)
        if not dims:
            continue
        if shape is None or len(dims) > len(shape):
            return False
        for one, wanted in zip(dims, shape[len(shape) - len(dims) :], strict=True):
            named = one == wanted and (isinstance(one, int) or one.value is not None)
            if one != 1 and not named:
                return False
    return True


CHOICES: dict[str, Callable[[ir.Node, int], Outcome]] = {"Where": _where, **dict.fromkeys(_NEUTRAL, _logic)}
