"""Scales, put into the constants that they stand on: W' = W s_in / s_out, in float64, rounded once to its type."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from graphopt.analysis import shapes
from graphopt.errors import ModelError
from graphopt.quantization.scales.groups import ScaleGroups
from graphopt.quantization.scales.walk import ScaledOperand, is_vector
from graphopt.rewriting.constants import float64
from graphopt.rewriting.edit import set_constant
from graphopt.rewriting.names import Names
from graphopt.rewriting.nodes import label

NARROW = 16.0
"""Largest scale where weights have 16 bits: so have activations, and they have little room."""


def log_limit(operands: Iterable[ScaledOperand], limit: float) -> float:
    """Base-2 logarithm of the largest scale that is allowed on some operands."""
    narrow = any(operand.value.dtype == ir.DataType.FLOAT16 for operand in operands)
    return float(np.log2(min(limit, NARROW) if narrow else limit))


def apply_scales(found: ScaleGroups, scales: NDArray[np.float64], names: Names) -> int:
    """Write scaled constants, in place.

    Args:
        found: where scales stand.
        scales: (classes + 1,) positive numbers; the first is 1.
        names: of the model, for private copies of vectors that others read too.

    Returns:
        How many constants changed.

    Raises:
        ModelError: a constant leaves the range of its type.
    """
    done: set[ir.Value] = set()
    changed = 0
    for operand in found.operands:
        factor = scales[operand.multiply] / scales[operand.divide]
        value = operand.value
        if value in done or bool((factor == 1).all()):
            continue
        data = float64(value)
        assert data is not None
        scaled = data * factor
        _check(operand, data, scaled)
        changed += 1
        if is_vector(value):
            set_constant(operand.node, operand.index, scaled, names, [])
        else:  # all of its uses have these scales
            shapes.set_constant(value, _as_stored(value, scaled))
            done.add(value)
    return changed


def _as_stored(value: ir.Value, data: NDArray[np.float64]) -> NDArray[np.generic]:
    tensor = shapes.constant_tensor(value)
    assert tensor is not None
    return np.array(data.astype(tensor.dtype.numpy()), order="C")


def _check(operand: ScaledOperand, data: NDArray[np.float64], scaled: NDArray[np.float64]) -> None:
    stored = _as_stored(operand.value, scaled)
    if (np.isfinite(data) & ~np.isfinite(stored.astype(np.float64))).any():
        raise ModelError(
            f"scaling takes '{operand.value.name}' out of the range of its type",
            where=label(operand.node),
            hint="lower the option limit",
        )
