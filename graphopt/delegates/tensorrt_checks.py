"""Conditions of TensorRT's parser that its table cannot write otherwise; see `graphopt.delegates.checks`."""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir

from graphopt.analysis import shapes
from graphopt.delegates.checks import attribute, check, sizes
from graphopt.delegates.units import Unit
from graphopt.rewriting.nodes import is_onnx

MOST = 3840
"""TopK takes fewer than this."""

DEFAULTS = {"LSTM": ("Sigmoid", "Tanh", "Tanh"), "GRU": ("Sigmoid", "Tanh"), "RNN": ("Tanh",)}
MOVES = ("Concat", "Flatten", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")


@check("not-training")
def not_training(unit: Unit) -> str | None:
    """Dropout that does nothing."""
    value = unit.operand("training_mode")
    return "its training_mode is true" if value is not None and shapes.scalar(value) else None


@check("lower-case-equation")
def lower_case_equation(unit: Unit) -> str | None:
    """The equation of Einsum has lower-case letters alone."""
    text = attribute(unit, "equation", "")
    text = text.decode() if isinstance(text, bytes) else str(text)
    others = re.sub(r"[a-z\->., ]", "", text)
    return f"its equation {text!r} has other characters than a to z" if others else None


@check("same-activations")
def same_activations(unit: Unit) -> str | None:
    """Both directions of a recurrent layer have the same activations."""
    if attribute(unit, "direction", "forward") != "bidirectional":
        return None
    for name, default in (("activations", DEFAULTS[unit.op] * 2), ("activation_alpha", ()), ("activation_beta", ())):
        given = attribute(unit, name, default)
        values = tuple(given) if isinstance(given, (tuple, list)) else ()
        half = len(values) // 2
        if values[:half] != values[half:]:
            return f"{name} of its two directions differ: {', '.join(str(v) for v in values)}"
    return None


@check("all-axes-in-order")
def all_axes_in_order(unit: Unit) -> str | None:
    """Resize tells a scale for every axis, in order."""
    axes, data = attribute(unit, "axes"), sizes(unit, "X")
    if not isinstance(axes, (tuple, list)) or data is None or unit.operand("scales") is None:
        return None
    return None if tuple(axes) == tuple(range(len(data))) else f"its scales are for axes {list(axes)} alone"


@check("few-largest")
def few_largest(unit: Unit) -> str | None:
    """TopK takes fewer than 3840."""
    value = unit.operand("K")
    count = shapes.scalar(value) if value is not None else attribute(unit, "k")
    return f"its K is {int(count)}, not below {MOST}" if isinstance(count, (int, float)) and count >= MOST else None


@check("filler-type")
def filler_type(unit: Unit) -> str | None:
    """ConstantOfShape fills with a type that TensorRT has."""
    value = unit.node.attributes.get("value")
    kind = np.dtype(np.float32) if value is None else value.as_tensor().dtype.numpy()
    taken = ("float32", "float16", "bfloat16", "int32", "int64", "bool", "float64")
    return None if kind.name in taken else f"it fills with {kind.name}"


@check("between-linear")
def between_linear(unit: Unit) -> str | None:
    """Integers that only move between QuantizeLinear and DequantizeLinear."""
    node = unit.node
    before = [v for v in node.inputs if v is not None and v.dtype == ir.DataType.INT8]
    for value in before:
        made = value.producer()
        if made is not None and not is_onnx(made, "QuantizeLinear", *MOVES):
            return f"its integers come from {made.op_type}, not from QuantizeLinear"
        if made is None and shapes.constant_tensor(value) is None:
            return f"its integers come from the input {value.name!r}"
    for output in node.outputs:
        readers = [use.node for use in output.uses()]
        other = next((n for n in readers if not is_onnx(n, "DequantizeLinear", *MOVES)), None)
        if other is not None or output.is_graph_output():
            return f"its integers go to {other.op_type if other else 'an output of the model'}, not to DequantizeLinear"
    return None
