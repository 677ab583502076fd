"""GPTQ: a weight rounded column by column, each column's error made up for by the columns still to come.

With H = E[x x^T] of what the layer reads, replacing W by levels V costs tr((W - V) H (W - V)^T). When column j is
rounded, the best answer of the columns F that are not rounded yet is, with U^T U = H_FF^-1 and U upper triangular,

    e = (w_j - v_j) / u_jj,        W_:,F <- W_:,F - e U_j,F

(Frantar et al., arXiv:2210.17323, equations 2 and 3 in the Cholesky form of section 3.3; the optimal brain surgeon with
the constraint v_j instead of 0.) Columns are taken by falling diag(H), so that those that carry most are rounded while
there is still somebody to make up for it (act-order); each keeps the scale of the block in which it stands, which
needs no table of places when the weight is executed. Within a chunk columns are updated one by one, behind it by one
matrix product. A weight of zero stays zero: sparse weights stay sparse.

H is factorised in float64; columns are updated in the type of the weight. Arrays are numpy or torch.
"""

from __future__ import annotations

from typing import Any

from array_api_compat import array_namespace

from graphopt.numerics.levels import Levels
from graphopt.numerics.metric import check_metric, inverse_root
from graphopt.numerics.sweeps import CHUNK


def gptq(weight: Any, metric: Any, levels: Levels, *, ordered: bool = True) -> Any:
    """Round a weight to levels.

    Args:
        weight: W, (m, n), finite.
        metric: H, (n, n), positive definite (`graphopt.numerics.metric.damped`).
        levels: where to.
        ordered: take columns by falling diag(H); False: from left to right.

    Returns:
        (m, n), in the type of the weight: the integers q.

    Raises:
        ValueError: the metric is of another size, not finite, or not positive definite.
    """
    xp = array_namespace(weight)
    m, n = (int(size) for size in weight.shape)
    check_metric(metric, n)
    order = xp.arange(n, device=weight.device)
    if ordered:
        order = xp.argsort(-xp.linalg.diagonal(metric), stable=True)
    upper = xp.astype(inverse_root(metric[order[:, None], order[None, :]]), weight.dtype)
    left = xp.empty((n, m), dtype=weight.dtype, device=weight.device)
    left[:, :] = weight.T[order, :]  # turned, so that a column is contiguous
    stays, found = left != 0, xp.empty_like(left)
    places = [int(place) for place in order]
    for start in range(0, n, CHUNK):
        stop = min(start + CHUNK, n)
        part, factor = left[start:stop, :], upper[start:stop, start:stop]
        errors = xp.empty_like(part)
        for j in range(stop - start):
            rounded = levels.column(places[start + j]).nearest(part[j, :])
            found[start + j, :] = rounded = xp.where(stays[start + j, :], rounded, xp.zeros_like(rounded))
            errors[j, :] = (part[j, :] - rounded) / factor[j, j]
            part[j + 1 :, :] -= factor[j, j + 1 :][:, None] * errors[j, :][None, :]
        left[stop:, :] -= upper[start:stop, stop:].T @ errors
    back = xp.empty_like(weight)
    back[:, order] = found.T
    return levels.steps(back)
