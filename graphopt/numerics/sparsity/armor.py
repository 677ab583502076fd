"""ARMOR: W ~ A S B with a sparse core S between block-diagonal wrappers, fitted to what the layer really does.

The factorisation is that of "ARMOR" (arXiv:2510.05528): S keeps N of every M along the inputs, A and B are
block-diagonal, cost b (1/m + 1/n) of the dense parameters and bend the weight towards the pattern. There it minimises a
diagonal proxy on NoWag-normalised weights with Adam; here (`objective="hessian"`) it minimises the layer's own error

    f(A, S, B) = tr((W - A S B) H (W - A S B)^T),      H = E[x x^T], damped,

one factor after the other, each step exact or a descent, so that f never rises:

    B   least squares by conjugate gradients, A by one solve a block row (`blocks`)
    S   a Gauss-Seidel pass over all groups, supports and values (`descent`)

from SparseGPT's core and A = B = I. Alternation is slow at the end, so the next cycle starts ahead of the last one, at
theta_k + beta (theta_k - theta_k-1); a cycle that ends higher is dropped and beta halved (a monotone safeguard). The
gauge is fixed by unit rows of B and unit columns of A.

`objective="paper"` minimises the paper's own proxy  sum_ij (V_ij - (A S B)_ij)^2 h_j,  V = diag(1/r) W diag(1/c), from
NoWag-P's core by the same steps, with the paper's guarantee (Theorem 3.1): never worse than NoWag-P in that proxy.

For a convolution with T taps, columns are ordered tap by tap and B is shared by the taps (a 1x1 convolution of groups
before the sparse one). Arrays are numpy or torch; any shape: the last block is padded while it is fitted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from array_api_compat import array_namespace

from graphopt.numerics.sparsity.blocks import Blocks, identity, left_update, right_update, transposed
from graphopt.numerics.sparsity.descent import Sweep
from graphopt.numerics.sparsity.moments import check_weight, error
from graphopt.numerics.sparsity.one_shot import normalise, sparsegpt, wanda
from graphopt.numerics.sparsity.patterns import Pattern

Wrappers = Literal["in", "out", "both", "none"]
Objective = Literal["hessian", "paper"]

CYCLES = 20
CONJUGATE_STEPS = 4
FIRST_MOMENTUM, LAST_MOMENTUM, GROWTH = 0.7, 0.95, 1.05
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Factors:
    """W ~ A S B.

    Attributes:
        core: S, (m, n), sparse.
        left: A, blocks (count, b, b) on the rows; None: I. The last block is smaller where b does not divide m: its
            rows and columns past the end are to be ignored.
        right: B, blocks on the columns of a tap, likewise.
        taps: T.
        losses: f before the first and after every cycle, in the units of the objective.
    """

    core: Any
    left: Any = None
    right: Any = None
    taps: int = 1
    losses: list[float] = field(default_factory=list)

    def dense(self) -> Any:
        """A S B multiplied out, (m, n)."""
        result = self.core
        if self.right is not None:
            result = _apply(result, self.right, self.taps)
        return result if self.left is None else _apply(result.T, transposed(self.left), 1).T

    def overhead(self) -> float:
        """Elements of the wrappers relative to those of W."""
        m, n = (int(size) for size in self.core.shape)
        sides = ((self.left, m), (self.right, n // self.taps))
        return sum(_elements(blocks, size) for blocks, size in sides if blocks is not None) / (m * n)


def block_size(m: int, n: int, overhead: float, wrappers: Wrappers, pattern: Pattern, taps: int = 1) -> int:
    """The largest block whose wrappers hold at most `overhead` of W's elements, a multiple of the group; 0: none does.

    Args:
        m, n: shape of W; n counts the columns of all taps.
        overhead: share, such as 0.05.
        wrappers: which there are.
        pattern: its groups.
        taps: of a convolution.
    """
    inputs = n // taps
    per_size = {"in": inputs, "out": m, "both": inputs + m, "none": 0}[wrappers]
    if not per_size:
        return 0
    step = pattern.of or 1
    size = int(overhead * m * n / per_size + 1e-9)
    largest = {"in": inputs, "out": m, "both": max(inputs, m)}[wrappers]
    return min(size, -(-largest // step) * step) // step * step


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
        tolerance: ends when a cycle gains less than this share of the loss.

    Raises:
        ValueError: the weight is not finite or all zero; a pattern without groups; no wrappers to fit.
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
    late = _clock(seconds)
    if not weights:
        raise ValueError("there are no weights to factorise")
    for weight in weights:
        check_weight(weight)
    if not pattern.of:
        raise ValueError("a factorisation needs a pattern of groups, such as 2:4")
    if wrappers != "none" and (block < 2 or block % pattern.of):
        raise ValueError(f"blocks of {block} do not hold whole groups of {pattern.of}")
    xp = array_namespace(*weights)
    metric = xp.astype(metric, weights[0].dtype)
    stack = _Stack.of(weights, metric, block if wrappers in {"out", "both"} else 1, objective)
    target, rows, columns = stack.weight, None, None
    if objective == "paper":
        target, rows, columns = normalise(target)
        metric = metric * xp.eye(int(metric.shape[0]), dtype=metric.dtype, device=metric.device)
        start = wanda(target, xp.linalg.diagonal(metric), pattern)  # on the normalised weight: NoWag-P
    else:
        start = sparsegpt(target, metric, pattern)
    problem = _Problem.padded(target, metric, pattern, block, wrappers, taps)
    found, losses = problem.solve(problem.state(problem.pad(start)), cycles, late, tolerance)
    factors = problem.factors(found, losses, int(target.shape[0]), int(target.shape[1]))
    return stack.parted(factors if rows is None else _unscaled(factors, rows, columns))


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


@dataclass(frozen=True)
class _State:
    left: Any
    core: Any
    right: Any


@dataclass(frozen=True)
class _Problem:
    """W, H, how they are cut: padded so that blocks divide both."""

    weight: Any
    metric: Any
    pattern: Pattern
    rows: Blocks | None
    columns: Blocks | None
    taps: int

    @classmethod
    def padded(cls, weight: Any, metric: Any, pattern: Pattern, block: int, wrappers: Wrappers, taps: int) -> _Problem:
        xp = array_namespace(weight)
        m, inputs = int(weight.shape[0]), int(weight.shape[1]) // taps
        wide = block if wrappers in {"in", "both"} else pattern.of
        across = Blocks(wide, -(-inputs // wide), taps)
        down = Blocks(block, -(-m // block)) if wrappers in {"out", "both"} else None
        made = cls(weight, metric, pattern, down, across if wrappers in {"in", "both"} else None, taps)
        if across.width != inputs * taps:
            place = _places(metric, inputs, across)
            mean = xp.mean(xp.linalg.diagonal(metric))
            grown = mean * xp.eye(across.width, dtype=metric.dtype, device=metric.device)
            grown[place[:, None], place[None, :]] = metric
            metric = grown
        return replace(made, weight=made.pad(weight), metric=metric)

    def pad(self, matrix: Any) -> Any:
        """(m, n) with zeros where blocks or groups reach past the end."""
        xp = array_namespace(matrix)
        m, n = int(matrix.shape[0]), int(matrix.shape[1])
        wide = self.columns.size if self.columns is not None else self.pattern.of
        inputs = n // self.taps
        across = Blocks(wide, -(-inputs // wide), self.taps)
        height = self.rows.width if self.rows is not None else m
        if (height, across.width) == (m, n):
            return matrix
        grown = xp.zeros((height, across.width), dtype=matrix.dtype, device=matrix.device)
        grown[:m, _places(matrix, inputs, across)] = matrix
        return grown

    def state(self, core: Any) -> _State:
        left = None if self.rows is None else identity(core, self.rows)
        right = None if self.columns is None else identity(core, self.columns)
        return _State(left, core, right)

    def residual(self, state: _State) -> tuple[Any, float]:
        """E H and f."""
        xp = array_namespace(self.weight)
        gap = self.weight - self._left(state, self._right(state))
        turned = gap @ self.metric
        return turned, float(xp.sum(xp.astype(gap * turned, xp.float64)))

    def solve(
        self, state: _State, cycles: int, late: Callable[[], bool], tolerance: float
    ) -> tuple[_State, list[float]]:
        """Alternate with momentum; the loss never rises."""
        turned, loss = self.residual(state)
        losses, previous, momentum = [loss], state, 0.0
        for _ in range(cycles):
            if late():
                break
            trial, ahead = state, turned
            if momentum:
                trial = _extrapolated(state, previous, momentum)
                ahead, _ = self.residual(trial)
            after = self._cycle(trial, ahead)
            after_turned, after_loss = self.residual(after)
            if not after_loss < loss:
                if not momentum:
                    break
                momentum = momentum / 2 if momentum > 0.1 else 0.0
                previous = state
                losses.append(loss)
                continue
            gained = loss - after_loss
            previous, state, turned, loss = state, after, after_turned, after_loss
            losses.append(loss)
            momentum = min(LAST_MOMENTUM, momentum * GROWTH) if momentum else FIRST_MOMENTUM
            if gained < tolerance * loss:
                break
        return state, losses

    def _cycle(self, state: _State, turned: Any) -> _State:
        if self.columns is not None:
            change = right_update(self._left(state, state.core), turned, self.metric, self.columns, CONJUGATE_STEPS)
            state = replace(state, right=state.right + change)
            turned, _ = self.residual(state)
        if self.rows is not None:
            change = left_update(self._right(state), turned, self.metric, self.rows)
            state = replace(state, left=state.left + change)
            turned, _ = self.residual(state)
        state = self._gauged(state)
        xp = array_namespace(state.core)
        metric = self.metric if self.columns is None else self.columns.congruence(state.right, self.metric)
        gradient = turned if self.columns is None else self.columns.right(turned, transposed(state.right))
        meet = None
        if self.rows is not None:
            gradient = self.rows.left(transposed(state.left), gradient)
            meet = xp.reshape(xp.sum(xp.abs(transposed(state.left) @ state.left), axis=2), (-1,))
        core = state.core + 0.0
        Sweep(metric, self.pattern)(core, gradient + 0.0, meet)
        return replace(state, core=core)

    def _gauged(self, state: _State) -> _State:
        xp = array_namespace(state.core)
        core = state.core
        if state.right is not None:
            norms = _norms(state.right, axis=2)
            state = replace(state, right=state.right / norms[:, :, None])
            core = core * xp.tile(xp.reshape(norms, (-1,)), (self.taps,))[None, :]
        if state.left is not None:
            norms = _norms(state.left, axis=1)
            state = replace(state, left=state.left / norms[:, None, :])
            core = core * xp.reshape(norms, (-1,))[:, None]
        return replace(state, core=core)

    def _right(self, state: _State) -> Any:
        return state.core if self.columns is None else self.columns.right(state.core, state.right)

    def _left(self, state: _State, matrix: Any) -> Any:
        return matrix if self.rows is None else self.rows.left(state.left, matrix)

    def factors(self, state: _State, losses: list[float], m: int, n: int) -> Factors:
        """Without the padding."""
        wide = self.columns.size if self.columns is not None else self.pattern.of
        across = Blocks(wide, int(state.core.shape[1]) // wide // self.taps, self.taps)
        core = state.core[:m, :][:, _places(state.core, n // self.taps, across)]
        return Factors(core, state.left, state.right, self.taps, losses)


def _places(like: Any, inputs: int, across: Blocks) -> Any:
    """Where the columns of the given matrix stand in the padded one."""
    xp = array_namespace(like)
    tap = xp.arange(across.taps, device=like.device) * (across.size * across.count)
    return xp.reshape(tap[:, None] + xp.arange(inputs, device=like.device)[None, :], (-1,))


def _extrapolated(state: _State, previous: _State, momentum: float) -> _State:
    """theta + beta (theta - theta'); the core keeps its support."""
    xp = array_namespace(state.core)

    def ahead(now: Any, before: Any) -> Any:
        return None if now is None else now + momentum * (now - before)

    core = xp.where(state.core != 0, ahead(state.core, previous.core), xp.zeros_like(state.core))
    return _State(ahead(state.left, previous.left), core, ahead(state.right, previous.right))


def _norms(blocks: Any, axis: int) -> Any:
    """Lengths of rows (axis 2) or columns (axis 1) of each block; 1 for an empty one."""
    xp = array_namespace(blocks)
    norms = xp.sqrt(xp.sum(blocks * blocks, axis=axis))
    return xp.where(norms > 0, norms, xp.ones_like(norms))


def _apply(matrix: Any, blocks: Any, taps: int) -> Any:
    """X B_full with blocks that may reach past the end of a tap."""
    xp = array_namespace(matrix)
    m, n = int(matrix.shape[0]), int(matrix.shape[1])
    count, size = int(blocks.shape[0]), int(blocks.shape[1])
    across = Blocks(size, count, taps)
    place = _places(matrix, n // taps, across)
    grown = xp.zeros((m, across.width), dtype=matrix.dtype, device=matrix.device)
    grown[:, place] = matrix
    return across.right(grown, blocks)[:, place]


def _elements(blocks: Any, size: int) -> int:
    """Elements of blocks without what reaches past the end."""
    whole, side = size // int(blocks.shape[1]), int(blocks.shape[1])
    return whole * side * side + (size - whole * side) ** 2


def _unscaled(factors: Factors, rows: Any, columns: Any) -> Factors:
    """diag(r) A S B diag(c): scales go into the wrappers where there are any, else into the core."""
    xp = array_namespace(factors.core)
    core, left, right = factors.core, factors.left, factors.right
    if left is None:
        core = core * rows[:, None]
    else:
        left = left * _spread(xp, rows, left)[:, :, None]
    if right is None:
        core = core * columns[None, :]
    elif factors.taps == 1:
        right = right * _spread(xp, columns, right)[:, None, :]
    return replace(factors, core=core, left=left, right=right)


def _spread(xp: Any, scales: Any, blocks: Any) -> Any:
    """Scales cut like blocks, 1 past the end."""
    grown = xp.ones((int(blocks.shape[0]) * int(blocks.shape[1]),), dtype=blocks.dtype, device=blocks.device)
    grown[: int(scales.shape[0])] = scales
    return xp.reshape(grown, (int(blocks.shape[0]), int(blocks.shape[1])))


def _clock(seconds: float | None) -> Callable[[], bool]:
    if seconds is None:
        return lambda: False
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end
