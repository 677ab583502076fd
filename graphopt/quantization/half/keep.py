"""Which nodes stay in float32 when a model becomes float16 or bfloat16, each with its reason.

In this order: what the user or the target excludes, what the standard does not admit, what is quantised already, the
table of operators (`rules`), arithmetic on positions, constants that do not survive in the half type, activations
that leave its range on the calibration data, the rest of a norm behind its sums, and what stands between two nodes that
stay and would only be cast back and forth.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import numpy as np
import onnx_ir as ir

from graphopt.quantization.back.recognised import is_quantised, quantised_already
from graphopt.quantization.half.rules import (
    AFTER_SUMS,
    BOUNDS,
    CHEAP,
    DIVISIONS,
    FLOAT32_OPS,
    MASK,
    SCATTERING,
    SHAPING,
    SUMS,
    WEIGHT_LOSS,
    clipped,
    is_mask,
    positional,
)
from graphopt.quantization.half.types import CONTROL_FLOW, Signature, is_float32, signature
from graphopt.rewriting.constants import array
from graphopt.rewriting.nodes import is_onnx, label
from graphopt.rewriting.scopes import bodies, graphs

HEADROOM = 2.0
"""Activations beyond the largest number divided by this stay in float32: other data reaches further."""

TINY = 2.0**-14
"""A tensor whose largest number is below float16's smallest normal one has lost its digits there."""


@dataclass
class Keep:
    """What stays and how the rest is typed.

    Attributes:
        reasons: nodes that stay in float32, in graph order.
        signatures: of all nodes that do not, but for constants and control flow.
    """

    reasons: dict[ir.Node, str] = field(default_factory=dict)
    signatures: dict[ir.Node, Signature] = field(default_factory=dict)


def keep(
    model: ir.Model,
    dtype: ir.DataType,
    largest: float,
    *,
    exclude: Collection[str],
    float_ops: Collection[str],
    measured: Mapping[str, float] | None,
    quantised: bool = False,
) -> Keep:
    """Decide for all nodes.

    Args:
        model: with inferred types, functions inlined; not changed.
        dtype: the half type.
        largest: its largest number.
        exclude: globs over node names.
        float_ops: operators without a kernel of this type on the target.
        measured: largest magnitudes of tensors of the main graph on data.
        quantised: Q and DQ, and what stands at them, become half, too.
    """
    found = Keep()
    nodes = [node for graph in graphs(model) for node in graph if not is_onnx(node, "Constant")]
    where = positional(nodes)
    for node in nodes:
        reason = _asked(node, exclude, float_ops, dtype) or _foreign(node, through=quantised)
        if is_onnx(node, "Scan") and model.opset_imports.get("", 1) < 9:
            reason = "Scan of opset 8 carries its states differently"
        if reason is None and not is_onnx(node, *CONTROL_FLOW):
            read = signature(node, model.opset_imports, dtype)
            if isinstance(read, str):
                reason = read
            else:
                found.signatures[node] = read
                if any(read.inputs) or any(read.outputs):
                    reason = _by_rule(node) or where.get(node) or _constants(node, read, dtype, largest)
        if reason is not None and _in_float32(node):
            found.reasons[node] = reason
    _bodies_of_kept(found)
    if measured is not None:
        _overflowing(model, found, largest, measured, dtype)
    _behind_kept(found)
    _spread(nodes, found)
    found.reasons = {node: found.reasons[node] for node in nodes if node in found.reasons}
    return found


def _in_float32(node: ir.Node) -> bool:
    """Whether anything about the node is float32, in its bodies too."""
    values = [*node.inputs, *node.outputs]
    return any(is_float32(v) for v in values) or any(is_float32(v) for body in bodies(node) for v in body.outputs)


def _asked(node: ir.Node, exclude: Collection[str], float_ops: Collection[str], dtype: ir.DataType) -> str | None:
    for pattern in exclude:
        if fnmatchcase(label(node), pattern):
            return f"excluded by {pattern!r}"
    if node.op_type in float_ops:
        return f"the target has no {dtype.name.lower()} kernel for {node.op_type}"
    if "Transpose>MatMul" in float_ops and _multiplies_moved_batches(node):
        return f"the target cannot load {dtype.name.lower()} products behind a Transpose that moves the first axis"
    return None


def _multiplies_moved_batches(node: ir.Node) -> bool:
    """Whether a product by a constant reads a Transpose of three or more axes that moves the first, or is read so."""
    if is_onnx(node, "Transpose"):
        return _moves_batches(node) and any(_multiplies_moved_batches(use.node) for use in node.outputs[0].uses())
    if not is_onnx(node, "MatMul") or all(array(value) is None for value in node.inputs):
        return False
    producers = (value.producer() for value in node.inputs if value is not None)
    return any(p is not None and is_onnx(p, "Transpose") and _moves_batches(p) for p in producers)


def _moves_batches(transpose: ir.Node) -> bool:
    order = transpose.attributes.get_ints("perm", ())
    return not order or (len(order) > 2 and order[0] != 0)


def _foreign(node: ir.Node, *, through: bool) -> str | None:
    if next(bodies(node), None) is not None and not is_onnx(node, *CONTROL_FLOW):
        return f"its bodies are those of {node.op_type}, of which nothing is known"
    if through and (not is_quantised(node) or is_onnx(node, "QuantizeLinear", "DequantizeLinear")):
        return None
    return quantised_already(node)


def _by_rule(node: ir.Node) -> str | None:
    """The table, and scattering that adds up."""
    if is_onnx(node, *SCATTERING) and node.attributes.get_string("reduction", "none") != "none":
        return SUMS
    return FLOAT32_OPS.get(node.op_type) if is_onnx(node, *FLOAT32_OPS) else None


def _constants(node: ir.Node, read: Signature, dtype: ir.DataType, largest: float) -> str | None:
    """A constant operand that the half type cannot hold."""
    name = dtype.name.lower()
    for index, value in enumerate(node.inputs):
        scale = index == 1 and is_onnx(node, "QuantizeLinear", "DequantizeLinear")
        if value is None or not read.inputs[index] or (read.free[index] and not scale) or not is_float32(value):
            continue
        data = array(value)
        if data is None or not data.size:
            continue
        if is_mask(data, largest):
            data = clipped(data, largest, bound=is_onnx(node, *BOUNDS))
        finite = data[np.isfinite(data)]
        if not finite.size:
            continue
        top = float(np.abs(finite).max())
        if top > largest:
            return f"its constant {value.name!r} reaches {top:.3g}, beyond {name}"
        if top == 0:
            continue
        half = finite.astype(dtype.numpy()).astype(np.float32)
        if scale:
            # of a norm, small scales of single channels would not show; one that becomes 0 is no scale
            scales = finite[finite != 0]
            off = float(np.abs(half[finite != 0] / scales - 1).max())
            if off > WEIGHT_LOSS:
                return f"a scale in {value.name!r} loses {off:.2%} in {name}: it is too small"
            continue
        if not half.any():
            return f"its constant {value.name!r} ({top:.3g}) is zero in {name}"
        lost = float(np.linalg.norm((half - finite) / top) / np.linalg.norm(finite / top))
        if lost > WEIGHT_LOSS:
            return f"its constant {value.name!r} loses {lost:.2%} in {name}: its numbers are too small"
    return None


def _bodies_of_kept(found: Keep) -> None:
    """A node with bodies stays as a whole."""
    for node, reason in list(found.reasons.items()):
        for body in bodies(node):
            for inner in body.all_nodes():
                if _in_float32(inner) and not is_onnx(inner, "Constant"):
                    found.reasons.setdefault(inner, f"inside {label(node)}, which stays: {reason}")


def _behind_kept(found: Keep) -> None:
    """A layer computes in the type that its DequantizeLinear gives it: a Cast between them would part the two."""
    for node, reason in list(found.reasons.items()):
        if is_onnx(node, "DequantizeLinear"):
            for use in node.outputs[0].uses():
                if use.node in found.signatures:
                    found.reasons.setdefault(use.node, f"it reads {label(node)}, which stays: {reason}")


def _overflowing(
    model: ir.Model, found: Keep, largest: float, measured: Mapping[str, float], dtype: ir.DataType
) -> None:
    """What writes and reads a tensor that leaves the range on the data."""
    values = {v.name: v for node in model.graph for v in node.outputs}
    values |= {v.name: v for v in model.graph.inputs}
    for name, top in measured.items():
        value = values.get(name)
        if value is None or not is_float32(value) or top >= MASK:
            continue
        if top * HEADROOM > largest:
            reason = f"{name!r} reaches {top:.4g} on the calibration data; {dtype.name.lower()} ends at {largest:.5g}"
        elif dtype == ir.DataType.FLOAT16 and 0 < top < TINY:
            reason = f"{name!r} reaches only {top:.2g} on the calibration data, where float16 has few digits or none"
        else:
            continue
        producer = value.producer()
        touched = [use.node for use in value.uses()] + ([producer] if producer is not None else [])
        for node in touched:
            if not is_onnx(node, "Constant", *CONTROL_FLOW):
                found.reasons.setdefault(node, reason)


def _spread(nodes: Iterable[ir.Node], found: Keep) -> None:
    """What else stays because of its neighbours."""
    nodes = list(nodes)
    vanishing = {n for n, reason in found.reasons.items() if " is zero in " in reason}
    after = {n for n in found.reasons if FLOAT32_OPS.get(n.op_type) == SUMS} | vanishing
    guarded = set(vanishing)
    for node in nodes:
        before = _writers(node)
        if is_onnx(node, *CONTROL_FLOW):
            continue
        if before and all(p in after for p in before) and is_onnx(node, *AFTER_SUMS):
            found.reasons.setdefault(node, "the rest of a sum that stays in float32")
            after.add(node)
        if any(p in guarded for p in before) and is_onnx(node, *DIVISIONS):
            found.reasons.setdefault(node, "it divides by what must not become zero")
        if any(p in guarded for p in before) and is_onnx(node, *SHAPING):
            found.reasons.setdefault(node, "on the way to a division by what must not become zero")
            guarded.add(node)
    changed = True
    while changed:
        changed = False
        for node in nodes:
            if node in found.reasons or not is_onnx(node, *CHEAP):
                continue
            before = _writers(node)
            readers = {use.node for v in node.outputs for use in v.uses()}
            if before and readers and all(p in found.reasons for p in before) and readers <= found.reasons.keys():
                found.reasons[node] = "between operators in float32"
                changed = True


def _writers(node: ir.Node) -> list[ir.Node | None]:
    """What writes the float32 inputs that are no constants; None for an input of a graph."""
    return [v.producer() for v in node.inputs if v is not None and is_float32(v) and array(v) is None]
