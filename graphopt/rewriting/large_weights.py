"""Folds into weights of hundreds of megabytes, with no more memory than a piece takes, in float64 all the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.files.piecewise import PiecewiseTensor, ScaledTensor, row_ranges, rows

LARGE = 64 << 20
"""Bytes from which on a weight is computed in pieces."""

Float64 = npt.NDArray[np.float64]


def scaled(tensor: ir.TensorProtocol, scale: Float64, axis: int, outputs: int) -> ScaledTensor | str:
    """`tensor` times `scale` along `axis`, computed when it is read; or why its type cannot hold that.

    Args:
        tensor: the weight as it is stored.
        scale: (length of the axis,).
        axis: 0 or 1.
        outputs: the axis of its output channels, 0 or 1: precision is judged channel by channel.
    """
    found = ScaledTensor(tensor, np.ascontiguousarray(scale, np.float64), axis)
    return found if _stays_normal(tensor, scale) else unfit(found, outputs) or found


def unfit(found: PiecewiseTensor, outputs: int) -> str | None:
    """Why the type of a computed weight cannot hold it, judged by output channel; None where it can.

    Args:
        found: the weight.
        outputs: the axis of its output channels, 0 or 1.
    """
    dtype = found.dtype
    norms, errors = (np.zeros(int(found.shape.numpy()[outputs])) for _ in range(2))
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        for start, piece in found.exact():
            stored = piece.astype(dtype.numpy()).astype(np.float64)
            if not np.isfinite(stored).all():
                return f"the folded weight is not finite in {dtype.name}"
            for total, values in ((norms, piece), (errors, stored - piece)):
                _add_squares(total, values, start, outputs)
        norms, errors = np.sqrt(norms), np.sqrt(errors)
        # As for small weights (`graphopt.rewriting.linear`): subnormal channels lose more than half an ulp an element.
        ulp = float(dtype.eps)
        bad = (errors > ulp * norms) & (norms > norms.max(initial=0.0) * ulp)
    return f"the folded weight loses precision in {dtype.name} (subnormal numbers)" if bad.any() else None


def carried(tensor: ir.TensorProtocol, shift: Float64, outputs: int) -> Float64:
    """What `shift`, added to the inputs of a layer, adds to each of its outputs: (outputs,).

    Args:
        tensor: the weight as it is stored; its first two axes are outputs and inputs in either order.
        shift: (inputs,).
        outputs: the axis of its output channels, 0 or 1.
    """
    total = np.zeros(int(tensor.shape.numpy()[outputs]))
    for start, piece in ScaledTensor(tensor, np.ascontiguousarray(shift, np.float64), 1 - outputs).exact():
        sums = piece.sum(axis=tuple(a for a in range(piece.ndim) if a != outputs))
        _at(total, start, sums, outputs)
    return total


_BITS: dict[int, type[np.unsignedinteger[Any]]] = {2: np.uint16, 4: np.uint32, 8: np.uint64}


def _stays_normal(tensor: ir.TensorProtocol, scale: Float64) -> bool:
    """Whether no product overflows or becomes subnormal: each is then off by half an ulp at most.

    Floating-point numbers of one sign are ordered like their bits, so the largest and the smallest magnitude are found
    without arithmetic; a zero, less one, is the largest of integers.
    """
    dtype = np.dtype(tensor.dtype.numpy())
    bits = _BITS[dtype.itemsize]
    largest, smallest = 0, int(np.iinfo(bits).max)
    for start, stop in row_ranges(tensor):
        magnitudes = np.ascontiguousarray(rows(tensor, start, stop)).view(bits) << bits(1)
        largest = max(largest, int(magnitudes.max(initial=0)))
        magnitudes -= bits(1)
        smallest = min(smallest, int(magnitudes.min(initial=smallest)))
    if largest == 0:
        return bool(np.isfinite(scale).all())
    low, high = (float(np.array(n >> 1, bits).view(dtype)) for n in (smallest + 1, largest))
    factors = np.abs(scale[scale != 0])
    limits = tensor.dtype
    with np.errstate(over="ignore", invalid="ignore"):
        fits = high * factors.max(initial=0.0) < float(limits.max)
        return bool(fits and low * factors.min(initial=np.inf) >= float(limits.tiny))


def _add_squares(total: Float64, values: Float64, start: int, outputs: int) -> None:
    sums = np.square(values).sum(axis=tuple(a for a in range(values.ndim) if a != outputs))
    _at(total, start, sums, outputs)


def _at(total: Float64, start: int, sums: npt.NDArray[Any], outputs: int) -> None:
    """Add the sums of a piece: to its own rows where these are the outputs, else to all of them."""
    if outputs == 0:
        total[start : start + len(sums)] += sums
    else:
        total += sums
