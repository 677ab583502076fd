"""The alternation behind a factorisation W ~ A S B: one factor after the other, ahead of the last cycle.

    f(A, S, B) = tr((W - A S B) H (W - A S B)^T)

A cycle updates B by conjugate gradients, A by one solve a block row (`blocks`), then S by one pass over all its groups
(`descent`); each lowers f. The gauge is fixed by unit rows of B and unit columns of A.

Alternation is slow at the end, and ends in a support that is hard to leave. So the next cycle starts ahead of the last
one, at theta_k + beta (theta_k - theta_k-1). While beta is large, f hardly falls: the motion keeps supports changing.
As beta goes to zero, with 1 - t^2 over the budget, f falls below where small steps would have ended (as with a learning
rate that is annealed). A cycle may end a little above the last, one that ends higher is dropped, and the best counts.

With V = W H made once, a cycle without A costs four products of m n^2 multiply-adds at most: S^T S, the residual times
H, and what the pass over S spends; f before the pass comes from that residual, what the pass gains from the pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from array_api_compat import array_namespace

from graphopt.numerics.sparsity.blocks import (
    Blocks,
    identity,
    left_update,
    lengths,
    moved,
    places,
    right_update,
    transposed,
)
from graphopt.numerics.sparsity.descent import Sweep
from graphopt.numerics.sparsity.factors import Factors, Wrappers
from graphopt.numerics.sparsity.patterns import Pattern

CONJUGATE_STEPS = 4
MOMENTUM = 0.95
SLACK = 0.02
"""A cycle ahead may end this much above the last, relative to its loss."""


@dataclass(frozen=True)
class State:
    """A, S, B; None: I."""

    left: Any
    core: Any
    right: Any


@dataclass(frozen=True)
class Problem:
    """W, H, how they are cut: filled up with zeros so that blocks divide both.

    Attributes:
        weight: W, (m, n).
        metric: H, (n, n).
        wanted: W H.
        pattern: of the core.
        rows: how A cuts; None: there is none.
        columns: how B cuts, or how groups do.
        bent: there is a B.
    """

    weight: Any
    metric: Any
    wanted: Any
    pattern: Pattern
    rows: Blocks | None
    columns: Blocks
    bent: bool

    @classmethod
    def of(cls, weight: Any, metric: Any, pattern: Pattern, block: int, wrappers: Wrappers, taps: int) -> Problem:
        """Cut W (m, n) and H (n, n), columns tap by tap, for blocks of `block`."""
        xp = array_namespace(weight)
        m, inputs = int(weight.shape[0]), int(weight.shape[1]) // taps
        bent = wrappers in {"in", "both"}
        wide = block if bent else pattern.of
        columns = Blocks(wide, -(-inputs // wide), taps)
        rows = Blocks(block, -(-m // block)) if wrappers in {"out", "both"} else None
        if columns.width != inputs * taps:
            place = places(metric, inputs, columns)
            mean = xp.mean(xp.linalg.diagonal(metric))
            grown = mean * xp.eye(columns.width, dtype=metric.dtype, device=metric.device)
            grown[place[:, None], place[None, :]] = metric
            metric = grown
        made = cls(weight, metric, None, pattern, rows, columns, bent)
        weight = made.pad(weight)
        return replace(made, weight=weight, wanted=weight @ metric if wrappers != "none" else None)

    def pad(self, matrix: Any) -> Any:
        """(m, n) with zeros where blocks or groups reach past the end."""
        xp = array_namespace(matrix)
        m, n = int(matrix.shape[0]), int(matrix.shape[1])
        height = self.rows.width if self.rows is not None else m
        if (height, self.columns.width) == (m, n):
            return matrix
        grown = xp.zeros((height, self.columns.width), dtype=matrix.dtype, device=matrix.device)
        grown[:m, places(matrix, n // self.columns.taps, self.columns)] = matrix
        return grown

    def factors(self, state: State, losses: list[float], m: int, n: int) -> Factors:
        """Without what was filled up."""
        taps = self.columns.taps
        core = state.core[:m, :][:, places(state.core, n // taps, self.columns)]
        return Factors(core, state.left, state.right, taps, losses)

    def solve(self, core: Any, spent: Callable[[int], float], tolerance: float) -> tuple[State, list[float]]:
        """Alternate with momentum from A = B = I.

        Args:
            core: S to begin with, of the pattern, filled up.
            spent: share of the budget that is used up after so many cycles; 1: stop.
            tolerance: ends when neither a cycle ahead nor one from where it ended gains this share of the loss.

        Returns:
            The best found; its loss at first and after every cycle, which never rises.
        """
        left = None if self.rows is None else identity(core, self.rows)
        right = identity(core, self.columns) if self.bent else None
        best = previous = state = State(left, core, right)
        loss = self._residual(state)[1]
        losses = [loss]
        while (used := spent(len(losses) - 1)) < 1:
            ahead = previous is not state
            beta = MOMENTUM * (1 - used * used)
            after, reached = self._cycle(_ahead(state, previous, beta) if ahead else state)
            gained = (loss - reached) / loss if loss > 0 else 0.0
            if not gained > (-SLACK if ahead else 0.0):
                losses.append(losses[-1])
                if not ahead:
                    break
                previous = state
                continue
            previous, state, loss = state, after, reached
            if loss < losses[-1]:
                best = state
            losses.append(min(loss, losses[-1]))
            if abs(gained) < tolerance:
                if not ahead:
                    break
                previous = state
        return best, losses

    def _residual(self, state: State) -> tuple[Any, float]:
        """(W - A S B) H and f."""
        xp = array_namespace(self.weight)
        made = self._inner(state)
        gap = self.weight - (made if self.rows is None else self.rows.left(state.left, made))
        turned = gap @ self.metric
        return turned, float(xp.sum(gap * turned, dtype=xp.float64))

    def _inner(self, state: State) -> Any:
        return self.columns.right(state.core, state.right) if self.bent else state.core

    def _cycle(self, state: State) -> tuple[State, float]:
        xp = array_namespace(state.core)
        if self.bent:
            outer = state.core if self.rows is None else self.rows.left(state.left, state.core)
            change = right_update(outer, self.wanted, state.right, self.metric, self.columns, CONJUGATE_STEPS)
            state = replace(state, right=moved(state.right, change, along=2))
        if self.rows is not None:
            change = left_update(self._inner(state), self.wanted, state.left, self.metric, self.rows)
            state = replace(state, left=moved(state.left, change, along=1))
        state = self._gauged(state)
        gradient, loss = self._residual(state)
        metric = self.metric
        if self.bent:
            metric = self.columns.congruence(state.right, metric)
            gradient = self.columns.right(gradient, transposed(state.right))
        core = state.core + 0.0
        if self.rows is None:
            return replace(state, core=core), loss - Sweep(metric, self.pattern)(core, gradient)
        gradient = self.rows.left(transposed(state.left), gradient)
        meet = xp.reshape(xp.sum(xp.abs(transposed(state.left) @ state.left), axis=2), (-1,))
        Sweep(metric, self.pattern)(core, gradient, meet)
        state = replace(state, core=core)
        return state, self._residual(state)[1]

    def _gauged(self, state: State) -> State:
        xp = array_namespace(state.core)
        core = state.core
        if state.right is not None:
            norms = lengths(state.right, along=2)
            state = replace(state, right=state.right / norms[:, :, None])
            core = core * xp.tile(xp.reshape(norms, (-1,)), (self.columns.taps,))[None, :]
        if state.left is not None:
            norms = lengths(state.left, along=1)
            state = replace(state, left=state.left / norms[:, None, :])
            core = core * xp.reshape(norms, (-1,))[:, None]
        return replace(state, core=core)


def _ahead(state: State, previous: State, momentum: float) -> State:
    """theta + beta (theta - theta'); the core keeps its support."""
    xp = array_namespace(state.core)

    def ahead(now: Any, before: Any, along: int) -> Any:
        return None if now is None else moved(now, momentum * (now - before), along)

    core = state.core + momentum * (state.core - previous.core)
    core = xp.where(state.core != 0, core, xp.zeros_like(core))
    return State(ahead(state.left, previous.left, 1), core, ahead(state.right, previous.right, 2))
