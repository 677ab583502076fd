"""Whether numbers in float64 can be stored in the type of a weight: finite, and as precise as that type promises."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.rewriting.edit import Float64


def misfit(weight: Float64, bias: Float64, dtype: ir.DataType) -> str | None:
    """Why a folded weight (groups, outputs, inputs, positions) or bias cannot be stored in `dtype`."""
    for what, data, axes in (("weight", weight, (2, 3)), ("bias", bias, ())):
        reason = _does_not_fit(data, dtype, axes)
        if reason:
            return f"the folded {what} {reason}"
    return None


def misfit_of_bias(bias: Float64, dtype: ir.DataType) -> str | None:
    """Why a folded bias cannot be stored in `dtype`; None where it can."""
    reason = _does_not_fit(bias, dtype, ())
    return f"the folded bias {reason}" if reason else None


def _does_not_fit(data: Float64, dtype: ir.DataType, channel_axes: tuple[int, ...]) -> str | None:
    """Why `data` cannot be stored in `dtype`: not finite, or (per channel) less precise than the dtype promises."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        stored = data.astype(dtype.numpy()).astype(np.float64)
        if not np.isfinite(stored).all():
            return f"is not finite in {dtype.name}"
        norm: npt.NDArray[Any] = np.sqrt((data**2).sum(axis=channel_axes) if channel_axes else data**2)
        error: npt.NDArray[Any] = np.sqrt(
            ((stored - data) ** 2).sum(axis=channel_axes) if channel_axes else (stored - data) ** 2
        )
        # Half an ulp per element is normal; subnormal channels lose more. Values below the scale of the largest
        # channel by the precision itself do not matter to the sum they enter.
        ulp = float(dtype.eps)
        negligible = float(norm.max(initial=0.0)) * ulp
        bad = (error > ulp * norm) & (norm > negligible)
    return f"loses precision in {dtype.name} (subnormal numbers)" if bad.any() else None
