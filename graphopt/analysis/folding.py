"""What dead inputs contribute to a linear node, once and for all: a constant, folded into its bias.

With y = alpha W x + beta b, where the positions D of x are dead and hold the constants h, beta b grows by alpha W_D h.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from graphopt.analysis import shapes
from graphopt.analysis.rules import node_key

if TYPE_CHECKING:
    from graphopt.analysis.remove import Removal


def fold_constants(
    removal: Removal,
    node: ir.Node,
    source: ir.Value,
    axis: int,
    *,
    weight: int,
    bias: int | None,
    transposed: bool = False,
    alpha: float = 1.0,
    beta: float = 1.0,
) -> None:
    """Add what dead inputs contribute to the bias of a linear node: alpha X W + beta B.

    A bias that cannot take it (there is none to have, it is computed, or beta is 0) gets an Add behind the node.

    Args:
        removal: in progress.
        node: the node.
        source: its data input, with the contracted `axis`.
        axis: the contracted axis.
        weight: index of the weight operand, laid out [out, in, ...], or [in, out] if `transposed`.
        bias: index of the bias operand; None where the operator has none.
        transposed: layout of the weight.
        alpha: factor of the product.
        beta: factor of the bias.
    """
    mask = removal.mask(source, axis)
    if mask is None:
        return
    dead = np.flatnonzero(~mask)
    held = removal.values.held(source, axis, ~removal.alive)[dead]
    array = shapes.constant(node.inputs[weight])
    if array is None:  # nothing but zeros can be folded where the weight is computed
        held = np.where(held == 0, 0.0, np.nan)
    if np.isnan(held).any():
        removal.report.assumed_zero.append(node.name or node_key(node))
    held = np.nan_to_num(held, nan=0.0)
    if array is None or not held.any():
        return
    rows = np.take(array, dead, axis=0 if transposed else 1).astype(np.float64)
    rows = rows if transposed else rows.reshape(*rows.shape[:2], -1).sum(axis=2).T
    delta = alpha * (held @ rows)
    kept = removal.operand_mask(node, weight, 1 if transposed else 0)
    delta = delta if kept is None else delta[kept]
    removal.report.folded.append(node.name or node_key(node))
    given = node.inputs[bias] if bias is not None and bias < len(node.inputs) else None
    old = removal.left_of(node, bias, given) if bias is not None and given is not None else None
    if bias is None or not beta or (given is not None and old is None):
        shape = (-1,) if transposed or array.ndim == 2 else (-1, *(1,) * (array.ndim - 2))
        added = delta.astype(array.dtype).reshape(shape)
        removal.insert_after(node, "Add", removal.new_constant(f"{node_key(node)}_bias", added, node.graph))
        return
    delta = delta / beta if old is None else old.astype(np.float64) + delta / beta
    removal.uses.pop((node_key(node), bias), None)
    removal.set_input(node, bias, delta.astype(array.dtype))
