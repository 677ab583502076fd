"""Optimal brain surgeon for groups of inputs of a linear map: what removing them costs once the others compensate.

For y = W x with S = Cov(x), removing the components c of x and refitting the rest by least squares raises E|y - W' x|^2
by exactly

    cost(c) = tr(W_c [(S^-1)_cc]^-1 W_c^T),     W' = W - W_c [(S^-1)_cc]^-1 (S^-1)_c,:

and the inverse covariance of what is left follows by downdating, without another inversion:

    S^-1 <- S^-1 - (S^-1)_:,c [(S^-1)_cc]^-1 (S^-1)_c,:

(Hassibi & Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon", 1992; in blocks: Frantar &
Alistarh, "Optimal Brain Compression", arXiv:2208.11580, section 4.) S is centred: the mean of x goes to the bias.

numpy or torch float64 arrays; indices are numpy integer arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from array_api_compat import array_namespace

from graphopt.numerics.least_squares import scale

Indices = npt.NDArray[np.intp]

RIDGE = 1e-3
"""Added to the diagonal of S, relative to its mean: inputs that never vary stay invertible."""


class Elimination:
    """A linear map whose inputs are removed group by group.

    Args:
        covariance: S, (d, d) float64.
        weight: W, (e, d) float64.
        groups: column indices of each group; disjoint, any sizes; columns in no group always stay.
        own: for each group the rows of W (outputs) that disappear with it, or None where no output does.
        ridge: see `RIDGE`.

    Attributes:
        weight: W after the removals so far, (e, d); zero in removed columns.
        signal: E|W x - mean|^2 of the untouched map, the unit in which costs can be compared between layers.
    """

    def __init__(
        self,
        covariance: Any,
        weight: Any,
        groups: Sequence[Indices],
        own: Sequence[Indices] | None = None,
        ridge: float = RIDGE,
    ) -> None:
        xp = array_namespace(covariance)
        self._xp = xp
        d = int(covariance.shape[0])
        lam = ridge * scale(covariance)
        self._inverse = xp.linalg.inv(covariance + lam * xp.eye(d, dtype=xp.float64, device=covariance.device))
        self.weight = xp.astype(weight, xp.float64) + 0.0
        self.signal = float(xp.sum(self.weight * (self.weight @ covariance)))
        self._groups = [np.asarray(g) for g in groups]
        self._own = None if own is None or not any(map(len, own)) else [np.asarray(o) for o in own]
        self._alive = np.ones(len(groups), dtype=bool)

    def costs(self, groups: Sequence[int]) -> npt.NDArray[np.float64]:
        """What removing each of these groups alone, now, adds to the squared error; (len(groups),), not below 0."""
        result = np.zeros(len(groups))
        sizes: dict[int, list[int]] = {}
        for place, group in enumerate(groups):
            sizes.setdefault(len(self._groups[group]), []).append(place)
        for size, places in sizes.items():
            if size == 0:
                continue
            index = np.stack([self._groups[groups[p]] for p in places])
            rows = self._by_output(index)  # (groups, e)
            total = self._numpy(self._xp.sum(rows, axis=1))
            if self._own is not None:
                held = self._numpy(rows)
                for k, p in enumerate(places):
                    total[k] -= held[k, self._own[groups[p]]].sum()
            result[places] = total
        return np.maximum(result, 0.0)

    def remove(self, *groups: int) -> None:
        """Remove groups for good, together: the other columns of W compensate.

        Raises:
            ValueError: one is gone already.
        """
        for group in groups:
            if not self._alive[group]:
                raise ValueError(f"group {group} was removed before")
            self._alive[group] = False
        c = np.concatenate([self._groups[g] for g in groups])
        if len(c):
            rows = self._inverse[c, :]
            block = self._xp.linalg.solve(rows[:, c], rows)  # [(S^-1)_cc]^-1 (S^-1)_c,:
            self.weight -= self.weight[:, c] @ block
            self._inverse -= rows.T @ block
            # exact zeros instead of rounding noise; the diagonal stays regular, nothing couples to it any more
            self.weight[:, c] = 0.0
            self._inverse[c, :] = 0.0
            self._inverse[:, c] = 0.0
            self._inverse[c, c] = 1.0
        for group in groups:
            if self._own is not None and len(self._own[group]):
                self.weight[self._own[group], :] = 0.0

    def _by_output(self, index: Indices) -> Any:
        """Costs of groups of equal size k, by output: index (groups, k) -> (groups, e)."""
        xp = self._xp
        if index.shape[1] == 1:
            single = index[:, 0]
            weight = self.weight[:, single]
            return xp.permute_dims(weight * weight / self._inverse[single, single][None, :], (1, 0))
        blocks = self._inverse[index[:, :, None], index[:, None, :]]  # (groups, k, k)
        columns = xp.permute_dims(self.weight[:, index], (1, 2, 0))  # (groups, k, e)
        return xp.sum(columns * xp.linalg.solve(blocks, columns), axis=1)

    def _numpy(self, array: Any) -> npt.NDArray[np.float64]:
        return np.asarray(array.cpu() if hasattr(array, "cpu") else array, dtype=np.float64).copy()
