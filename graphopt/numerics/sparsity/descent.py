"""Coordinate descent on the values and the support of a sparse core.

The core S of a factorised weight W ~ A S B sees the loss through two metrics. With L = A^T A and M = B H B^T,

    f(S) = tr((W - A S B) H (W - A S B)^T),      G = A^T (W - A S B) H B^T = -1/2 df/dS.

Where rows of S do not meet (A = I, L = I), a group g of a row with values s costs  c = G_g + s M_gg  in its best
values: with all other weights held, support P is best filled by s_P = (M_PP)^-1 c_P, which lowers f by c_P . s_P. All
supports of a group are tried (six for 2:4), the best is taken, and the gradient follows: G_: <- G_: - (s' - s) M_g:.
Where rows do meet, L is majorised by the diagonal D_p = sum_q |L_pq| (D - L is diagonally dominant, so f(S + d) <= f(S)
- 2<G, d> + tr(D d M d^T)): rows decouple again, every pass still lowers f, and c = G_g / D_p + s M_gg.

Groups of a row are visited one after the other, all rows at once (`graphopt.numerics.sweeps`). Arrays are numpy or
torch.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from math import comb
from typing import Any

from array_api_compat import array_namespace

from graphopt.numerics.metric import check_metric, check_weight
from graphopt.numerics.sparsity.blocks import ridged
from graphopt.numerics.sparsity.one_shot import sparsegpt
from graphopt.numerics.sparsity.patterns import Pattern
from graphopt.numerics.sweeps import sweep, total

SUPPORTS = 1000
"""Of a group, to be tried one by one (6:12 has 924); where there are more, supports stay and only values move."""


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
        pattern: what stays; without groups, or with more than `SUPPORTS` of one, the start's support stays and only
            values move.
        sweeps: passes over all groups, at most.
        start: (m, n), of this pattern; None: SparseGPT's.
        tolerance: ends when a pass gains less than this share of the loss.
        seconds: no pass begins later. The result then depends on the speed of the machine: no longer the same bytes
            twice.

    Returns:
        (m, n) in the dtype of `weight`; never worse than the start.

    Raises:
        ValueError: `weight` is not finite or all zero; `metric` is not finite, positive definite or of its size.
    """
    began = time.monotonic()
    xp = array_namespace(weight)
    check_weight(weight)
    check_metric(metric, int(weight.shape[1]))
    core = (sparsegpt(weight, metric, pattern) if start is None else start) + 0.0
    solve = Sweep(xp.astype(metric, weight.dtype), pattern)
    gap = weight - core
    gradient = gap @ solve.metric
    least = total(gap * gradient)
    for _ in range(sweeps):
        if seconds is not None and time.monotonic() - began > seconds:
            break
        after = core + 0.0
        solve(after, gradient)
        gap = weight - after
        gradient = gap @ solve.metric
        now = total(gap * gradient)
        if not now < least:
            break
        gained, core, least = least - now, after, now
        if gained < tolerance * least:
            break
    return core


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
        tried = pattern.of > 0 and comb(pattern.of, pattern.keep) <= SUPPORTS
        self._step = pattern.of if tried else 1
        self._fills = _fillings(metric, pattern) if tried else None

    def __call__(self, core: Any, gradient: Any, rows: Any = None) -> float:
        """Improve `core` in place.

        Args:
            core: S, (m, n).
            gradient: G, (m, n); used up.
            rows: D, (m,): how much rows meet; None: they do not.

        Returns:
            What f lost; where rows meet, at least that.
        """
        return sweep(core, gradient, self.metric, self._filled, self._step, rows)

    def _filled(self, wanted: Any, old: Any, column: int) -> Any:
        """The best values of a group in every row; `wanted`: c, (group, m)."""
        xp = array_namespace(wanted)
        if self._fills is None:
            return xp.where(old != 0, wanted / self.metric[column, column], xp.zeros_like(wanted))
        fill = self._fills[column // self._step]
        size, m = (int(length) for length in wanted.shape)
        best = xp.argmax(fill.gains @ (wanted[fill.one, :] * wanted[fill.two, :]), axis=0)
        values = xp.reshape(fill.values @ wanted, (-1, size, m))
        return values[best, :, xp.arange(m, device=wanted.device)].T


@dataclass(frozen=True)
class _Fill:
    """How to fill one group, for all its supports P at once.

    Attributes:
        values: (supports * M, M): (M_PP)^-1 of each, zero outside P.
        gains: (supports, pairs): the same as forms, of the products c_i c_j, i <= j.
        one, two: (pairs,): i and j.
    """

    values: Any
    gains: Any
    one: Any
    two: Any


def _fillings(metric: Any, pattern: Pattern) -> list[_Fill]:
    """One a group; the last may be shorter."""
    xp = array_namespace(metric)
    n = int(metric.shape[0])
    whole = n - n % pattern.of
    found: list[_Fill] = []
    if whole:
        at = xp.reshape(xp.arange(whole, device=metric.device), (-1, pattern.of))
        found += _fills(metric[at[:, :, None], at[:, None, :]], pattern)
    if whole < n:
        size = n - whole
        found += _fills(metric[whole:, whole:][None, :, :], Pattern(min(pattern.keep, size), size, 0.0))
    return found


def _fills(blocks: Any, pattern: Pattern) -> list[_Fill]:
    """(groups, M, M) -> one each."""
    xp = array_namespace(blocks)
    count, size = int(blocks.shape[0]), pattern.of
    double = ridged(xp.astype(blocks, xp.float64), 10 * float(xp.finfo(blocks.dtype).eps))
    supports = pattern.supports()
    inverses = xp.zeros((count, len(supports), size, size), dtype=xp.float64, device=blocks.device)
    for place, support in enumerate(supports):
        chosen = xp.asarray(support, device=blocks.device)
        rows, columns = chosen[:, None], chosen[None, :]
        inverses[:, place, rows, columns] = xp.linalg.inv(double[:, rows, columns])
    pairs = [(i, j) for i in range(size) for j in range(i, size)]
    one, two = (xp.asarray(side, device=blocks.device) for side in zip(*pairs, strict=True))
    twice = xp.where(one == two, xp.asarray(1.0, dtype=xp.float64), xp.asarray(2.0, dtype=xp.float64))
    gains = xp.astype(inverses[:, :, one, two] * twice, blocks.dtype)
    values = xp.astype(xp.reshape(inverses, (count, len(supports) * size, size)), blocks.dtype)
    return [_Fill(values[g, :, :], gains[g, :, :], one, two) for g in range(count)]
