"""Coordinate descent on the values and the support of a sparse core.

The core S of a factorised weight W ~ A S B sees the loss through two metrics. With L = A^T A and M = B H B^T,

    f(S) = tr((W - A S B) H (W - A S B)^T),      G = A^T (W - A S B) H B^T = -1/2 df/dS.

Where rows of S do not meet (A = I, L = I), a group g of a row with values s costs  c = G_g + s M_gg  in its best
values: with all other weights held, support P is best filled by s_P = (M_PP)^-1 c_P, which lowers f by c_P . s_P. All
supports of a group are tried (six for 2:4), the best is taken, and the gradient follows: G_: <- G_: - (s' - s) M_g:.
Where rows do meet, L is majorised by the diagonal D_p = sum_q |L_pq| (D - L is diagonally dominant, so f(S + d) <= f(S)
- 2<G, d> + tr(D d M d^T)): rows decouple again, every pass still lowers f, and c = G_g / D_p + s M_gg.

Groups of a row are visited one after the other (Gauss-Seidel), all rows at once; within a chunk of columns the
gradient is updated by thin products, behind it by one matrix product. Arrays are numpy or torch.
"""

from __future__ import annotations

import time
from typing import Any

from array_api_compat import array_namespace

from graphopt.numerics.sparsity.moments import check_weight, error
from graphopt.numerics.sparsity.one_shot import sparsegpt
from graphopt.numerics.sparsity.patterns import Pattern

CHUNK = 64


def coordinate_descent(
    weight: Any,
    metric: Any,
    pattern: Pattern,
    sweeps: int = 6,
    start: Any = None,
    tolerance: float = 1e-4,
    seconds: float | None = None,
) -> Any:
    """A sparse V that minimises tr((W - V) H (W - V)^T), from SparseGPT's.

    Args:
        weight: W, (m, n).
        metric: H, (n, n), positive definite.
        pattern: what stays; without groups the start's support stays and only values move.
        sweeps: passes over all groups, at most.
        start: (m, n), of this pattern; None: SparseGPT's.
        tolerance: ends when a pass gains less than this share of the loss.
        seconds: no pass begins later. The result then depends on the speed of the machine: no longer the same bytes
            twice.

    Returns:
        (m, n) in the dtype of `weight`; never worse than the start.

    Raises:
        ValueError: `weight` is not finite or all zero.
    """
    began = time.monotonic()
    xp = array_namespace(weight)
    check_weight(weight)
    core = (sparsegpt(weight, metric, pattern) if start is None else start) + 0.0
    solve = Sweep(xp.astype(metric, weight.dtype), pattern)
    best, least = core + 0.0, error(weight, core, metric)
    for _ in range(sweeps):
        if seconds is not None and time.monotonic() - began > seconds:
            break
        gradient = (weight - core) @ solve.metric
        solve(core, gradient)
        now = error(weight, core, metric)
        if not now < least:
            break
        gained, best, least = least - now, core + 0.0, now
        if gained < tolerance * least:
            break
    return best


class Sweep:
    """One pass over all groups of a core, for a given right metric.

    Args:
        metric: M = B H B^T, (n, n), positive definite.
        pattern: what stays.

    Attributes:
        metric: as given.
    """

    def __init__(self, metric: Any, pattern: Pattern) -> None:
        self.metric = metric
        self._pattern = pattern
        self._fills = _fillings(metric, pattern) if pattern.of else None

    def __call__(self, core: Any, gradient: Any, rows: Any = None) -> None:
        """Improve `core` in place.

        Args:
            core: S, (m, n).
            gradient: G, (m, n); afterwards that of the new core where rows do not meet, else to be computed anew.
            rows: D, (m,): how much rows meet; None: they do not.
        """
        n = int(core.shape[1])
        step = self._pattern.of or 1
        width = CHUNK - CHUNK % step
        for start in range(0, n, width):
            stop = min(start + width, n)
            before = core[:, start:stop] + 0.0
            local = gradient[:, start:stop] + 0.0 if rows is None else gradient[:, start:stop] / rows[:, None]
            block = self.metric[start:stop, start:stop]
            for g in range(0, stop - start, step):
                group = slice(g, min(g + step, stop - start))
                old = before[:, group]
                wanted = local[:, group] + old @ block[group, group]
                new = self._fill(wanted, old, start + g)
                core[:, start + group.start : start + group.stop] = new
                local -= (new - old) @ block[group, :]
            moved = (core[:, start:stop] - before) @ self.metric[start:stop, :]
            gradient -= moved if rows is None else moved * rows[:, None]
            if rows is None:
                gradient[:, start:stop] = local

    def _fill(self, wanted: Any, old: Any, column: int) -> Any:
        """The best values of a group in every row; `wanted`: c, (rows, group)."""
        xp = array_namespace(wanted)
        if self._fills is None:
            return xp.where(old != 0, wanted / self.metric[column, column], xp.zeros_like(wanted))
        fill = self._fills[column // self._pattern.of]  # (M, supports * M)
        size = int(wanted.shape[1])
        values = xp.reshape(wanted @ fill, (int(wanted.shape[0]), -1, size))
        gains = values @ wanted[:, :, None]
        best = xp.argmax(gains[:, :, 0], axis=1)
        return values[xp.arange(int(wanted.shape[0]), device=wanted.device), best, :]


def _fillings(metric: Any, pattern: Pattern) -> list[Any]:
    """For each group the inverses (M_PP)^-1 of all supports P, side by side: (M, supports * M), zero outside P."""
    xp = array_namespace(metric)
    n = int(metric.shape[0])
    found = []
    whole = n - n % pattern.of
    if whole:
        at = xp.reshape(xp.arange(whole, device=metric.device), (-1, pattern.of))
        blocks = xp.astype(metric[at[:, :, None], at[:, None, :]], xp.float64)
        found.extend(list(_inverses(blocks, pattern.supports(), metric.dtype)))
    if whole < n:
        rest = xp.astype(metric[whole:, whole:], xp.float64)[None, :, :]
        size = n - whole
        short = Pattern(min(pattern.keep, size), size, 0.0)
        found.extend(list(_inverses(rest, short.supports(), metric.dtype)))
    return found


def _inverses(blocks: Any, supports: list[tuple[int, ...]], dtype: Any) -> Any:
    """(groups, M, M) -> (groups, M, supports * M)."""
    xp = array_namespace(blocks)
    count, size = int(blocks.shape[0]), int(blocks.shape[1])
    result = xp.zeros((count, size, len(supports), size), dtype=xp.float64, device=blocks.device)
    for place, support in enumerate(supports):
        chosen = list(support)
        inverse = xp.linalg.inv(blocks[:, chosen, :][:, :, chosen])
        for i, row in enumerate(chosen):
            for j, column in enumerate(chosen):
                result[:, row, place, column] = inverse[:, i, j]
    return xp.astype(xp.reshape(result, (count, size, -1)), dtype)
