"""Conditions under which an operator of `graphopt.quantization.scales.rules` passes a scale, beyond its name."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.rewriting.constants import Float64, float64
from graphopt.rewriting.nodes import is_onnx


def weight_of(node: ir.Node) -> Float64 | None:
    """The constant weight of a layer; None where it is computed, stands on the left or is no floating-point array."""
    return float64(node.inputs[1])


def contracted_axis(node: ir.Node, rank: int) -> int:
    """The axis of a layer's input, of a rank, that its weight contracts."""
    if is_onnx(node, "Gemm"):
        return 0 if node.attributes.get_int("transA", 0) else 1
    return rank - 1 if is_onnx(node, "MatMul") else 1


def refusal(node: ir.Node) -> str | None:
    """Why an operator that may pass scales does not here; None where it does.

    Args:
        node: of an operator of the tables.
    """
    match node.op_type:
        case "Conv" | "ConvTranspose" | "Gemm" if weight_of(node) is None:
            return "has a weight that is computed"
        case "Clip":
            return _clip(node)
        case "Cast":
            to = ir.DataType(node.attributes.get_int("to", 0) or 0)
            return None if to.is_floating_point() and to.bitwidth >= 16 else "rounds to another type"
        case "PRelu":
            return "has slopes that are not constant" if float64(node.inputs[1]) is None else None
        case "Dropout":
            return "may be in training mode" if len(node.inputs) > 2 and node.inputs[2] is not None else None
        case "BatchNormalization":
            return "is in training mode" if node.attributes.get_int("training_mode", 0) else None
        case "Pad":
            return _pad(node)
        case "Resize":
            mode = node.attributes.get_string("coordinate_transformation_mode", "half_pixel")
            outside = node.attributes.get_float("extrapolation_value", 0.0)
            return f"fills with {outside:g}" if mode == "tf_crop_and_resize" and outside else None
    return None


def _clip(node: ir.Node) -> str | None:
    bounds = [
        a.as_float() for name in ("min", "max") if (a := node.attributes.get(name)) is not None
    ]  # before opset 11
    for given in node.inputs[1:]:
        found = float64(given)
        if given is not None and (found is None or found.size != 1):
            return "has a bound that is computed"
        if found is not None:
            bounds.append(float(found.ravel()[0]))
    for bound in bounds:
        if bound != 0 and abs(bound) < np.finfo(np.float32).max:
            return f"has the bound {bound:g}, which would have to differ from channel to channel"
    return None


def _pad(node: ir.Node) -> str | None:
    if node.attributes.get_string("mode", "constant") != "constant":
        return None
    given = node.inputs[2] if len(node.inputs) > 2 else None
    fill = float64(given)
    value = node.attributes.get_float("value", 0.0)  # before opset 11
    if value or (given is not None and (fill is None or fill.any())):
        return "fills with another value than zero"
    return None
