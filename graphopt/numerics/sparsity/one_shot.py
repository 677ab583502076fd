"""Sparse weights in one pass: magnitude, Wanda, NoWag-P, SparseGPT.

    magnitude   keep the largest |w|
    Wanda       keep the largest |w_ij| sqrt(h_j),  h = diag E[x x^T]          (Sun et al., arXiv:2306.11695, eq. 1)
    NoWag-P     keep the largest v_ij^2 h_j of the weight with unit columns, then unit rows, V = diag(1/r) W diag(1/c)
                                                                                (Liu et al., arXiv:2504.14569)
    SparseGPT   column by column, with U^T U = H^-1 (U upper triangular): a group's mask keeps the largest
                w_j^2 / u_jj^2, and what is cut is made up for by the columns to its right:
                    e = (w_j - s_j) / u_jj,   W_:,j.. <- W_:,j.. - e U_j,j..    (Frantar & Alistarh, arXiv:2301.00774)

Arrays are numpy or torch; W is (m, n), outputs by inputs.
"""

from __future__ import annotations

from typing import Any

from array_api_compat import array_namespace

from graphopt.numerics.metric import inverse_root
from graphopt.numerics.sparsity.patterns import Pattern, largest, mask

CHUNK = 64
"""Columns per chunk: within it updates are vectors, behind it one matrix product."""


def magnitude(weight: Any, pattern: Pattern) -> Any:
    """The largest weights, unchanged."""
    xp = array_namespace(weight)
    return xp.where(mask(xp.abs(weight), pattern), weight, xp.zeros_like(weight))


def wanda(weight: Any, second: Any, pattern: Pattern) -> Any:
    """The weights that carry most of their output, unchanged; `second`: (n,), E[x_j^2]."""
    xp = array_namespace(weight)
    return xp.where(mask(weight * weight * second[None, :], pattern), weight, xp.zeros_like(weight))


def normalise(weight: Any, taps: int = 1) -> tuple[Any, Any, Any]:
    """W = diag(r) V diag(c): columns brought to unit length, then rows, but for those of zeros; returns V, r, c.

    With `taps`, the columns of a channel have one length for all taps.
    """
    xp = array_namespace(weight)
    columns = _lengths(xp.reshape(weight, (int(weight.shape[0]) * taps, -1)), axis=0)
    columns = xp.tile(columns, (taps,))
    scaled = weight / columns[None, :]
    rows = _lengths(scaled, axis=1)
    return scaled / rows[:, None], rows, columns


def _lengths(matrix: Any, axis: int) -> Any:
    xp = array_namespace(matrix)
    lengths = xp.sqrt(xp.sum(matrix * matrix, axis=axis))
    return xp.where(lengths > 0, lengths, xp.ones_like(lengths))


def nowag(weight: Any, second: Any, pattern: Pattern) -> Any:
    """Wanda's choice on the normalised weight; `second`: (n,), E[x_j^2]."""
    xp = array_namespace(weight)
    scaled, _, _ = normalise(weight)
    return xp.where(mask(scaled * scaled * second[None, :], pattern), weight, xp.zeros_like(weight))


def sparsegpt(weight: Any, metric: Any, pattern: Pattern) -> Any:
    """Cut from left to right, each time updating the columns that are still to come.

    Args:
        weight: (m, n).
        metric: H, (n, n), positive definite.
        pattern: what stays. A share without groups is dealt out to chunks by w_j^2 / [H^-1]_jj before anything is cut.

    Returns:
        (m, n) in the dtype of `weight`.

    Raises:
        ValueError: the metric is not positive definite.
    """
    xp = array_namespace(weight)
    m, n = (int(size) for size in weight.shape)
    upper = inverse_root(metric)
    dealt = None
    if not pattern.of:
        dealt = mask(weight * weight / xp.astype(xp.sum(upper * upper, axis=0), weight.dtype)[None, :], pattern)
    upper = xp.astype(upper, weight.dtype)
    left = xp.empty((n, m), dtype=weight.dtype, device=weight.device)
    left[:, :] = weight.T  # turned, so that a column is contiguous
    width = CHUNK - CHUNK % pattern.of if pattern.of else CHUNK
    for start in range(0, n, width):
        stop = min(start + width, n)
        part, factor = left[start:stop, :], upper[start:stop, start:stop]
        diagonal = xp.linalg.diagonal(factor)[:, None]
        errors = xp.empty_like(part)
        kept = xp.ones(part.shape, dtype=xp.bool, device=part.device)
        if dealt is not None:
            share = float(xp.mean(xp.astype(dealt[:, start:stop], xp.float64)))
            kept = mask((part / diagonal) ** 2, Pattern(0, 0, share))
        for j in range(stop - start):
            if pattern.of and j % pattern.of == 0:
                group = slice(j, min(j + pattern.of, stop - start))
                kept[group, :] = largest((part[group, :] / diagonal[group, :]) ** 2, pattern.keep)
            errors[j, :] = xp.where(kept[j, :], 0 * part[j, :], part[j, :] / diagonal[j, 0])
            part[j, :] = xp.where(kept[j, :], part[j, :], 0 * part[j, :])
            part[j + 1 :, :] -= factor[j, j + 1 :][:, None] * errors[j, :][None, :]
        left[stop:, :] -= upper[start:stop, stop:].T @ errors
    found = xp.empty_like(weight)
    found[:, :] = left.T
    return found
