"""What a factorisation is made of: W ~ A S B, a sparse core S between block-diagonal wrappers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from array_api_compat import array_namespace

from graphopt.numerics.sparsity.blocks import Blocks, places, transposed
from graphopt.numerics.sparsity.patterns import Pattern

Wrappers = Literal["in", "out", "both", "none"]


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

    def largest(self) -> float:
        """The largest magnitude in A, S and B: a type that does not hold it cannot store them."""
        parts = (part for part in (self.left, self.core, self.right) if part is not None)
        return max(float(array_namespace(part).max(array_namespace(part).abs(part))) for part in parts)


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


def _apply(matrix: Any, blocks: Any, taps: int) -> Any:
    """X B_full with blocks that may reach past the end of a tap."""
    xp = array_namespace(matrix)
    m, n = int(matrix.shape[0]), int(matrix.shape[1])
    count, size = int(blocks.shape[0]), int(blocks.shape[1])
    across = Blocks(size, count, taps)
    place = places(matrix, n // taps, across)
    grown = xp.zeros((m, across.width), dtype=matrix.dtype, device=matrix.device)
    grown[:, place] = matrix
    return across.right(grown, blocks)[:, place]


def _elements(blocks: Any, size: int) -> int:
    """Elements of blocks without what reaches past the end."""
    whole, side = size // int(blocks.shape[1]), int(blocks.shape[1])
    return whole * side * side + (size - whole * side) ** 2


def unscaled(factors: Factors, rows: Any, columns: Any) -> Factors:
    """diag(r) A S B diag(c): scales go into the wrappers where there are any, else into the core."""
    xp = array_namespace(factors.core)
    core, left, right = factors.core, factors.left, factors.right
    if left is None:
        core = core * rows[:, None]
    else:
        left = left * _spread(xp, rows, left)[:, :, None]
    if right is None:
        core = core * columns[None, :]
    else:
        channels = columns[: int(columns.shape[0]) // factors.taps]  # one scale for all taps
        right = right * _spread(xp, channels, right)[:, None, :]
    return replace(factors, core=core, left=left, right=right)


def _spread(xp: Any, scales: Any, blocks: Any) -> Any:
    """Scales cut like blocks, 1 past the end."""
    grown = xp.ones((int(blocks.shape[0]) * int(blocks.shape[1]),), dtype=blocks.dtype, device=blocks.device)
    grown[: int(scales.shape[0])] = scales
    return xp.reshape(grown, (int(blocks.shape[0]), int(blocks.shape[1])))
