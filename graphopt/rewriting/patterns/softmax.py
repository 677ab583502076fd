"""Softmax and its logarithm.

    e = exp(x - max(x)),  y = e / sum(e),  log y = x - max(x) - log(sum(e))

Without the maximum the quotient is the same until exp overflows; the operators never do.
"""

from __future__ import annotations

import math

import onnx_ir as ir

from graphopt.rewriting.found import Found, Free
from graphopt.rewriting.match import Attribute, Reduce, Tensor, op
from graphopt.rewriting.recognise import Rule, Written

x = Tensor("x")
_SHIFTED = x - Reduce("ReduceMax", x)
_EXP = op("Exp", _SHIFTED)
_BARE = op("Exp", x)


def _along_one_axis(found: Found, result: ir.Value) -> Written | str | None:
    shape, axes = found.values["x"].shape, found.axes["axes"]
    if shape is None:
        return "the number of its axes is not known"
    if axes is None or len(axes) != 1:
        return None
    axis = -1 if axes[0] == len(shape) - 1 else axes[0]
    return Written((found.values["x"],), {"axis": axis})


def _along_the_last_axis(found: Found, result: ir.Value) -> Written | str | None:
    """Before opset 13 the operators normalise over all axes from one on: the same over the last axis only."""
    written = _along_one_axis(found, result)
    return written if isinstance(written, Written) and written.attributes["axis"] == -1 else None


def _log(found: Found, result: ir.Value) -> Written:
    axis = found.numbers["axis"]
    return Written((found.values["x"],), {} if math.isnan(axis) else {"axis": int(axis)})


_QUOTIENT = (_EXP / Reduce("ReduceSum", _EXP),)
_LOGARITHM = (_SHIFTED - op("Log", Reduce("ReduceSum", _EXP)),)
_BARE_QUOTIENT = (_BARE / Reduce("ReduceSum", _BARE),)
_BARE_LOGARITHM = (x - op("Log", Reduce("ReduceSum", _BARE)),)
_LOG_OF_SOFTMAX = (op("Log", op("Softmax", x, axis=Attribute(Free("axis"), math.nan))),)

RULES = (
    Rule("Softmax", 13, _QUOTIENT, _along_one_axis),
    Rule("Softmax", 1, _QUOTIENT, _along_the_last_axis),
    Rule("LogSoftmax", 13, _LOGARITHM, _along_one_axis),
    Rule("LogSoftmax", 1, _LOGARITHM, _along_the_last_axis),
    Rule("Softmax", 13, _BARE_QUOTIENT, _along_one_axis, overflow="Softmax stays finite"),
    Rule("LogSoftmax", 13, _BARE_LOGARITHM, _along_one_axis, overflow="LogSoftmax stays finite"),
    Rule("LogSoftmax", 1, _LOG_OF_SOFTMAX, _log, overflow="where Softmax is rounded to 0, LogSoftmax is finite"),
)
"""In the order in which they are tried at a node."""
