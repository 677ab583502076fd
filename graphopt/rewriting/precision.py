"""Whether numbers in float64 can be stored in the type of a weight: finite, and as precise as that type promises."""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir

from graphopt.rewriting.constants import Float64

_ELEMENTS = 1 << 20
"""Numbers that are looked at together."""


def misfit(weight: Float64, bias: Float64, dtype: ir.DataType) -> str | None:
    """Why a folded weight (groups, outputs, inputs, positions) or bias cannot be stored in `dtype`."""
    reason = _does_not_fit(weight, dtype)
    return f"the folded weight {reason}" if reason else misfit_of_bias(bias, dtype)


def misfit_of_bias(bias: Float64, dtype: ir.DataType) -> str | None:
    """Why a folded bias cannot be stored in `dtype`; None where it can."""
    reason = _does_not_fit(bias.reshape(1, -1, 1), dtype)
    return f"the folded bias {reason}" if reason else None


def _does_not_fit(data: Float64, dtype: ir.DataType) -> str | None:
    """Why `data` cannot be stored in `dtype`: not finite, or (per channel) less precise than the dtype promises.

    Args:
        data: (groups, channels, numbers of a channel ...).
        dtype: of the weight.
    """
    norm, error = np.zeros(data.shape[:2]), np.zeros(data.shape[:2])
    inner = tuple(range(1, data.ndim - 1))
    step = max(1, _ELEMENTS * data.shape[1] // max(1, data[:1].size))
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        for group, start in itertools.product(range(data.shape[0]), range(0, data.shape[1], step)):
            piece = data[group, start : start + step]
            stored = piece.astype(dtype.numpy()).astype(np.float64)
            if not np.isfinite(stored).all():
                return f"is not finite in {dtype.name}"
            norm[group, start : start + step] = np.sqrt(np.square(piece).sum(axis=inner))
            error[group, start : start + step] = np.sqrt(np.square(stored - piece).sum(axis=inner))
        # Half an ulp per element is normal; subnormal channels lose more. Values below the scale of the largest
        # channel by the precision itself do not matter to the sum they enter.
        ulp = float(dtype.eps)
        negligible = float(norm.max(initial=0.0)) * ulp
        bad = (error > ulp * norm) & (norm > negligible)
    return f"loses precision in {dtype.name} (subnormal numbers)" if bad.any() else None
