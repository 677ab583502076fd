"""ARMOR: W ~ A S B with a sparse core S between block-diagonal wrappers, fitted to what the layer really does.

The factorisation is that of "ARMOR" (arXiv:2510.05528): S keeps N of every M along the inputs, A and B are
block-diagonal, cost b (1/m + 1/n) of the dense parameters and bend the weight towards the pattern. There it minimises a
diagonal proxy on NoWag-normalised weights with Adam; here (`objective="hessian"`) it minimises the layer's own error

    f(A, S, B) = tr((W - A S B) H (W - A S B)^T),      H = E[x x^T], damped,

by an alternation (`alternation`) from SparseGPT's core and A = B = I, in which f never rises.

`objective="paper"` minimises the paper's own proxy  sum_ij (V_ij - (A S B)_ij)^2 h_j,  V = diag(1/r) W diag(1/c), from
NoWag-P's core by the same steps, with the paper's guarantee (Theorem 3.1): never worse than NoWag-P in that proxy.

For a convolution with T taps, columns are ordered tap by tap and B is shared by the taps (a 1x1 convolution of groups
before the sparse one). Arrays are numpy or torch; any shape: the last block is padded while it is fitted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from array_api_compat import array_namespace

from graphopt.numerics.metric import check_metric, check_weight, error
from graphopt.numerics.sparsity.alternation import Problem
from graphopt.numerics.sparsity.factors import Factors, Wrappers, block_size, unscaled
from graphopt.numerics.sparsity.one_shot import normalise, sparsegpt, wanda
from graphopt.numerics.sparsity.patterns import Pattern

__all__ = ["Factors", "armor", "armor_shared", "block_size"]

Objective = Literal["hessian", "paper"]

CYCLES = 20
TOLERANCE = 1e-4


def armor(
    weight: Any,
    metric: Any,
    pattern: Pattern,
    *,
    block: int,
    objective: Objective = "hessian",
    wrappers: Wrappers = "in",
    taps: int = 1,
    cycles: int = CYCLES,
    seconds: float | None = None,
    tolerance: float = TOLERANCE,
) -> Factors:
    """Factorise a weight.

    Args:
        weight: W, (m, n), float32 or float64; columns tap by tap.
        metric: H, (n, n), positive definite (`moments.damped`).
        pattern: of the core; N:M.
        block: b, see `block_size`.
        objective: what is minimised.
        wrappers: which there are.
        taps: T; n is a multiple of it.
        cycles: at most.
        seconds: at most. The number of cycles then depends on the speed of the machine: no longer the same bytes twice.
        tolerance: ends when cycles gain less than this share of the loss.

    Raises:
        ValueError: the weight is not finite or all zero; the metric not finite, positive definite or of its size; a
            pattern without groups; blocks that do not hold whole ones.
    """
    return _fit([weight], metric, pattern, block, objective, wrappers, taps, cycles, seconds, tolerance)[0]


def armor_shared(
    weights: Sequence[Any],
    metric: Any,
    pattern: Pattern,
    *,
    block: int,
    objective: Objective = "hessian",
    wrappers: Literal["in", "both"] = "in",
    taps: int = 1,
    cycles: int = CYCLES,
    seconds: float | None = None,
    tolerance: float = TOLERANCE,
) -> list[Factors]:
    """Factorise weights that read the same input with one B for all of them: W_k ~ A_k S_k B.

    The rows are stacked; with `objective="hessian"` each weight counts relative to its own signal tr(W_k H W_k^T), so
    that none is sacrificed to a louder one. One B is one small product instead of one a weight, and at the same number
    of parameters its blocks are as many times larger: `block_size` takes the rows of all weights together.

    Args:
        weights: W_k, (m_k, n), of one dtype.
        metric, pattern, block, objective, taps, cycles, seconds, tolerance: as for `armor`.
        wrappers: B alone, or an A of its own for every weight as well.

    Returns:
        One a weight, all with the same `right`; each has the losses of the whole stack.

    Raises:
        ValueError: as for `armor`; no weights.
    """
    return _fit(list(weights), metric, pattern, block, objective, wrappers, taps, cycles, seconds, tolerance)


def _fit(
    weights: list[Any],
    metric: Any,
    pattern: Pattern,
    block: int,
    objective: Objective,
    wrappers: Wrappers,
    taps: int,
    cycles: int,
    seconds: float | None,
    tolerance: float,
) -> list[Factors]:
    spent = _budget(cycles, seconds)
    if not weights:
        raise ValueError("there are no weights to factorise")
    for weight in weights:
        check_weight(weight)
        check_metric(metric, int(weight.shape[1]))
    if not pattern.of:
        raise ValueError("a factorisation needs a pattern of groups, such as 2:4")
    if wrappers != "none" and (block < 2 or block % pattern.of):
        raise ValueError(f"blocks of {block} do not hold whole groups of {pattern.of}")
    xp = array_namespace(*weights)
    metric = xp.astype(metric, weights[0].dtype)
    stack = _Stack.of(weights, metric, block if wrappers in {"out", "both"} else 1, objective)
    target, rows, columns = stack.weight, None, None
    if objective == "paper":
        # B takes the scales of columns, and all taps have the same B
        target, rows, columns = normalise(target, taps if wrappers in {"in", "both"} else 1)
        metric = metric * xp.eye(int(metric.shape[0]), dtype=metric.dtype, device=metric.device)
        start = wanda(target, xp.linalg.diagonal(metric), pattern)  # on the normalised weight: NoWag-P
    else:
        start = sparsegpt(target, metric, pattern)
    problem = Problem.of(target, metric, pattern, block, wrappers, taps)
    found, losses = problem.solve(problem.pad(start), spent, tolerance)
    factors = problem.factors(found, losses, int(target.shape[0]), int(target.shape[1]))
    return stack.parted(factors if rows is None else unscaled(factors, rows, columns))


@dataclass(frozen=True)
class _Stack:
    """Weights on top of each other, each scaled, and filled up with zero rows so that no block has rows of two.

    Attributes:
        weight: (rows of all, n).
        heights: m_k.
        step: filled up to multiples of it, but for the last.
        scales: of each.
    """

    weight: Any
    heights: list[int]
    step: int
    scales: list[float]

    @classmethod
    def of(cls, weights: list[Any], metric: Any, step: int, objective: Objective) -> _Stack:
        heights = [int(weight.shape[0]) for weight in weights]
        if len(weights) == 1:
            return cls(weights[0], heights, step, [1.0])
        xp = array_namespace(*weights)
        scales = [1.0 if objective == "paper" else error(weight, 0 * weight, metric) ** -0.5 for weight in weights]
        parts = []
        for weight, scale in zip(weights, scales, strict=True):
            short = (-int(weight.shape[0]) % step, int(weight.shape[1]))
            parts += [weight * scale, xp.zeros(short, dtype=weight.dtype, device=weight.device)]
        return cls(xp.concat(parts[:-1], axis=0), heights, step, scales)

    def parted(self, factors: Factors) -> list[Factors]:
        """The factors of each weight."""
        if len(self.heights) == 1:
            return [factors]
        found, start = [], 0
        for height, scale in zip(self.heights, self.scales, strict=True):
            core = factors.core[start : start + height, :] / scale
            blocks = -(-height // self.step)
            at = start // self.step
            left = None if factors.left is None else factors.left[at : at + blocks, :, :]
            found.append(replace(factors, core=core, left=left))
            start += blocks * self.step
        return found


def _budget(cycles: int, seconds: float | None) -> Callable[[int], float]:
    """Which share of the budget is used up after so many cycles."""
    began = time.monotonic()

    def spent(done: int) -> float:
        share = done / cycles if cycles > 0 else 1.0
        if seconds is None:
            return share
        return max(share, (time.monotonic() - began) / seconds if seconds > 0 else 1.0)

    return spent
