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

from graphopt.numerics.sparsity.patterns import Pattern, mask

CHUNK = 128
"""Columns per chunk: within it updates are vectors, behind it one matrix product."""

TINY = 1e-12


def magnitude(weight: Any, pattern: Pattern) -> Any:
    """The largest weights, unchanged."""
    xp = array_namespace(weight)
    return xp.where(mask(xp.abs(weight), pattern), weight, xp.zeros_like(weight))


def wanda(weight: Any, second: Any, pattern: Pattern) -> Any:
    """The weights that carry most of their output, unchanged; `second`: (n,), E[x_j^2]."""
    xp = array_namespace(weight)
    return xp.where(mask(weight * weight * second[None, :], pattern), weight, xp.zeros_like(weight))


def normalise(weight: Any) -> tuple[Any, Any, Any]:
    """W = diag(r) V diag(c): columns brought to unit length, then rows; returns V, r, c."""
    xp = array_namespace(weight)
    columns = xp.sqrt(xp.sum(weight * weight, axis=0)) + TINY
    scaled = weight / columns[None, :]
    rows = xp.sqrt(xp.sum(scaled * scaled, axis=1)) + TINY
    return scaled / rows[:, None], rows, columns


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
    """
    xp = array_namespace(weight)
    n = int(weight.shape[1])
    inverse = _inverse(metric)
    upper = xp.linalg.cholesky(inverse).T
    left = xp.astype(weight, xp.float64) + 0.0
    dealt = None if pattern.of else mask(left * left / xp.linalg.diagonal(inverse)[None, :], pattern)
    width = CHUNK - CHUNK % pattern.of if pattern.of else CHUNK
    for start in range(0, n, width):
        stop = min(start + width, n)
        part, factor = left[:, start:stop] + 0.0, upper[start:stop, start:stop]
        diagonal = xp.linalg.diagonal(factor)
        errors = xp.zeros_like(part)
        kept = None
        if dealt is not None:
            share = float(xp.mean(xp.astype(dealt[:, start:stop], xp.float64)))
            kept = mask((part / diagonal[None, :]) ** 2, Pattern(0, 0, share))
        for j in range(stop - start):
            if pattern.of and j % pattern.of == 0:
                group = slice(j, min(j + pattern.of, stop - start))
                fresh = mask((part[:, group] / diagonal[None, group]) ** 2, pattern)
                kept = fresh if j == 0 or kept is None else xp.concat([kept, fresh], axis=1)
            assert kept is not None
            column = xp.where(kept[:, j], part[:, j], xp.zeros_like(part[:, j]))
            errors[:, j] = (part[:, j] - column) / diagonal[j]
            part[:, j:] -= errors[:, j : j + 1] * factor[j : j + 1, j:]
            part[:, j] = column
        left[:, start:stop] = part
        left[:, stop:] -= errors @ upper[start:stop, stop:]
    return xp.astype(left, weight.dtype)


def _inverse(metric: Any) -> Any:
    """H^-1, float64, symmetric to the last bit. Its Cholesky factor L gives U = L^T: L L^T = U^T U."""
    xp = array_namespace(metric)
    inverse = xp.linalg.inv(xp.astype(metric, xp.float64))
    return (inverse + inverse.T) / 2
