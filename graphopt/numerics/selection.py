"""One of several choices for each of many items, so that a sum is smallest while others stay within bounds.

The multiple-choice knapsack problem, solved by dynamic programming over partial sums. Of partial choices only those
are kept that can still become the best: within every bound with the smallest that the rest must add, and not dominated.
Up to `STATES` of them the result is exact. Beyond, one is kept for each cell of a grid over the bounds: sums stay
exact, so bounds always hold, and what is lost is at most what lies between neighbouring cells.

Source: Kellerer, Pferschy, Pisinger 2004, Knapsack Problems, chapter 11 (dominance, dynamic programming with lists).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

STATES = 20_000
"""Partial choices held at once."""

SLACK = 1e-9
"""By what share of a bound rounding in float64 may carry a sum over it."""


@dataclass(frozen=True)
class _Layer:
    """Partial choices up to one item: sums, and how each came about."""

    cost: Floats
    used: Floats
    parent: NDArray[np.int64]
    choice: NDArray[np.int64]


def select(costs: Sequence[Floats], uses: Sequence[Floats], bounds: Sequence[float]) -> list[int] | None:
    """The choice of smallest cost that keeps all bounds.

    Args:
        costs: for each item (choices,) finite numbers.
        uses: for each item (choices, resources) non-negative numbers.
        bounds: (resources,) of the sums; inf for none.

    Returns:
        The index of the choice for every item; None where no choice keeps the bounds.
    """
    limit = np.asarray(bounds, np.float64) * (1 + SLACK)
    count = len(limit)
    tables = [np.asarray(use, np.float64).reshape(len(own), count) for own, use in zip(costs, uses, strict=True)]
    least = [table.min(axis=0) for table in tables]
    rest = np.sum(least, axis=0) if least else np.zeros(count)
    layers: list[_Layer] = []
    cost, used = np.zeros(1), np.zeros((1, count))
    for own, table, smallest in zip(costs, tables, least, strict=True):
        rest = rest - smallest
        choices = len(own)
        grown = (cost[:, None] + np.asarray(own, np.float64)[None]).ravel()
        taken = (used[:, None, :] + table[None]).reshape(len(grown), count)
        keep = np.flatnonzero((taken + rest <= limit).all(axis=1))
        if not keep.size:
            return None
        keep = keep[_worth_keeping(grown[keep], taken[keep], limit)]
        cost, used = grown[keep], taken[keep]
        layers.append(_Layer(cost, used, keep // choices, keep % choices))
    if not layers:
        return []
    state = int(np.argmin(cost))
    found = []
    for layer in reversed(layers):
        found.append(int(layer.choice[state]))
        state = int(layer.parent[state])
    return found[::-1]


def _worth_keeping(cost: Floats, used: Floats, limit: Floats) -> NDArray[np.int64]:
    """Indices of states that are not dominated (one resource), and at most `STATES` of them."""
    bounded = np.flatnonzero(np.isfinite(limit))
    if not bounded.size:
        return np.array([int(np.argmin(cost))])
    order = np.lexsort((cost, *(used[:, axis] for axis in bounded[::-1])))
    if bounded.size == 1:
        best = np.minimum.accumulate(cost[order])
        order = order[np.r_[True, best[1:] < best[:-1]]]
    if len(order) <= STATES:
        return np.asarray(order, np.int64)
    cells = int(STATES ** (1 / bounded.size))
    spans = np.ptp(used[order][:, bounded], axis=0)
    low = used[order][:, bounded].min(axis=0)
    place = np.floor((used[order][:, bounded] - low) / np.where(spans > 0, spans, 1) * (cells - 1)).astype(np.int64)
    cell = np.ravel_multi_index(tuple(place.T), (cells,) * bounded.size)
    by_cell = np.lexsort((cost[order], cell))
    first = np.r_[True, cell[by_cell][1:] != cell[by_cell][:-1]]
    # The state of least use may be the only one that later items leave room for.
    frugal = int(np.argmin(((used[order][:, bounded]) / limit[bounded]).sum(axis=1)))
    return np.asarray(order[np.unique(np.r_[by_cell[first], frugal])], np.int64)
