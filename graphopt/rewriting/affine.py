"""Nodes that are one affine map per channel, y = a x + c: BatchNormalization, and arithmetic with a constant.

BatchNormalization: a = scale / sqrt(var + epsilon), c = bias - a mean
x * k: a = k      x / k: a = 1/k      x + k: c = k      x - k: c = -k      k - x: a = -1, c = k
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.rewriting.constants import Float64, float64


def inference_affine(node: ir.Node, opset: int) -> tuple[Float64, Float64] | str:
    """Scale and shift per channel that a BatchNormalization applies, in float64, or why it has none."""
    reason = inference_problem(node, opset)
    if reason is not None:
        return reason
    if len(node.inputs) < 5:
        return "an input is missing"
    parameters = []
    for role, value in zip(("scale", "bias", "mean", "variance"), node.inputs[1:5], strict=True):
        data = float64(value)
        if data is None or value is None:
            overridable = value is not None and value.is_graph_input() and value.is_initializer()
            why = "can be overridden by the caller" if overridable else "is not a floating-point constant"
            return f"its {role} {why}"
        if data.ndim != 1:
            return f"its {role} has shape {data.shape}, not one number per channel"
        parameters.append(data)
    gamma, beta, mean, variance = parameters
    with np.errstate(all="ignore"):
        scale = gamma / np.sqrt(variance + node.attributes.get_float("epsilon", 1e-5))
        shift = beta - scale * mean
    if not (np.isfinite(scale).all() and np.isfinite(shift).all()):
        return "its parameters give a scale or shift that is not finite"
    return scale, shift


def inference_problem(node: ir.Node, opset: int) -> str | None:
    """Why a BatchNormalization is no affine map of its parameters; None where it is one."""
    if opset < 7:
        return f"opset {opset} is too old (7 or newer)"
    if node.attributes.get_int("training_mode", 0):
        return "training_mode=1: it normalises by the statistics of the batch"
    extra = [v for v in node.outputs[1:] if v.name]
    if extra and opset < 14:
        return "it gives out a second result, which before opset 14 means training mode"
    if any(v.uses() or v.is_graph_output() for v in extra):
        return "its running statistics are in use"
    if opset < 9 and not node.attributes.get_int("spatial", 1):
        return "spatial=0: its statistics are per pixel"
    return None


def arithmetic_affine(node: ir.Node, k: Float64, *, constant_first: bool) -> tuple[Float64, Float64] | str:
    """Scale and shift of a Mul, Div, Add or Sub by `k`, each in the shape of `k`; or why there is none."""
    one, zero = np.ones_like(k), np.zeros_like(k)
    match node.op_type, constant_first:
        case "Mul", _:
            scale, shift = k, zero
        case "Add", _:
            scale, shift = one, k
        case "Sub", False:
            scale, shift = one, -k
        case "Sub", True:
            scale, shift = -one, k
        case "Div", False:
            if not k.all():
                return "it divides by zero"
            scale, shift = 1.0 / k, zero
        case _:
            return "a constant divided by a tensor is not affine"
    if not (np.isfinite(scale).all() and np.isfinite(shift).all()):
        return "its constant is not finite"
    return scale, shift


def per_channel(data: Float64, rank: int, axis: int, channels: int) -> Float64 | None:
    """`data`, broadcast against a tensor of this rank, as one number per channel; None where it is not that."""
    if data.size == 1 and data.ndim <= rank:
        return data.reshape(1)
    if data.ndim > rank:
        return None
    full = (1,) * (rank - data.ndim) + data.shape
    others = full[:axis] + full[axis + 1 :]
    return data.reshape(-1) if full[axis] == channels and all(d == 1 for d in others) else None
