"""Gauss-Seidel over the columns of a weight: every row visits its columns in turn, all rows at once.

With V in place of W and the metric M, f(V) = tr((W - V) M (W - V)^T) has the gradient G = (W - V) M = -1/2 df/dV. With
all other columns held, f of a group g of a row is a parabola in its values v, whose minimum is where v M_gg = c,

    c = G_g + v_old M_gg,        and replacing v_old by v changes it by    G_: <- G_: - (v - v_old) M_g:.

Whatever values are allowed, the best of them follow from c and M_gg, so that no pass raises f. Within a chunk of
columns the gradient is updated by thin products, behind it by one matrix product. Arrays are numpy or torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from array_api_compat import array_namespace

CHUNK = 64
"""Columns whose gradient is kept up to date column by column."""

Best = Callable[[Any, Any, int], Any]
"""c and the old values of one group, (group, m) each, and its first column -> its new values, (group, m)."""


def sweep(core: Any, gradient: Any, metric: Any, best: Best, step: int = 1, rows: Any = None) -> float:
    """Improve `core` in place, in one pass over its columns.

    Args:
        core: V, (m, n).
        gradient: G, (m, n); used up.
        metric: M, (n, n), symmetric, with a positive diagonal.
        best: the best values of a group.
        step: columns of a group; the last group may have fewer.
        rows: D, (m,), positive: what the gradient and f of a row are to be divided and multiplied by; None: ones.

    Returns:
        What f lost.
    """
    n = int(core.shape[1])
    if rows is not None:
        gradient /= rows[:, None]
    gained, width = 0.0, max(step, CHUNK - CHUNK % step)
    for start in range(0, n, width):
        stop = min(start + width, n)
        here = slice(start, stop)
        own = metric[here, here]
        first, before = turned(gradient[:, here]), turned(core[:, here])  # rows of these are contiguous
        after = _chunk(first + 0.0, before, own, best, step, start)
        moved = after - before
        lost = moved * (2 * first - own @ moved)
        gained += total(lost if rows is None else lost * rows[None, :])
        core[:, here] = after.T
        if stop < n:
            gradient[:, stop:] -= moved.T @ metric[here, stop:]
    return gained


def _chunk(local: Any, before: Any, own: Any, best: Best, step: int, start: int) -> Any:
    """The new values of some columns, turned: (columns, m); `local`: their gradient, used up."""
    xp = array_namespace(local)
    width = int(local.shape[0])
    after = xp.empty_like(before)
    for g in range(0, width, step):
        group = slice(g, min(g + step, width))
        old = before[group, :]
        after[group, :] = new = best(local[group, :] + own[group, group] @ old, old, start + g)
        if group.stop < width:
            local[group.stop :, :] -= own[group.stop :, group] @ (new - old)
    return after


def turned(matrix: Any) -> Any:
    """The transposed matrix, its rows contiguous."""
    xp = array_namespace(matrix)
    made = xp.empty((int(matrix.shape[1]), int(matrix.shape[0])), dtype=matrix.dtype, device=matrix.device)
    made[:, :] = matrix.T
    return made


def total(values: Any) -> float:
    """Their sum, in float64."""
    xp = array_namespace(values)
    return float(xp.sum(values, dtype=xp.float64))
