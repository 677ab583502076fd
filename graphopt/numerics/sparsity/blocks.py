"""Block-diagonal matrices, and the exact least-squares update of one that stands to the right of a core.

A block-diagonal matrix of blocks b x b is held as an array (blocks, b, b). With a core S (m, n) and What = S B the loss

    f(B) = tr((W - S B) H (W - S B)^T),       blocks of  S^T (W - S B) H  on the diagonal = -1/2 df/dB,

is a quadratic form in B alone: the change D of B that minimises it solves

    diag-blocks(K D H) = diag-blocks(S^T E H),       K = S^T S,  E = W - S B.

Solved by conjugate gradients, preconditioned block by block with K_jj^-1 (.) H_jj^-1 (which is one step of block Gauss-
Seidel's update, for all blocks at once): a step costs n^2 b, little beside K itself. Every number of steps lowers f.

Where the same B acts on T taps (positions of a convolution kernel; B_full = I_T (x) B, columns ordered tap by tap) the
diagonal blocks of all taps are summed, and the form stays quadratic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from array_api_compat import array_namespace

RIDGE = 1e-6
"""Of the preconditioner and of K, relative to the mean of its diagonal: an unused row of the core stays solvable."""


@dataclass(frozen=True)
class Blocks:
    """How columns are cut.

    Attributes:
        size: b.
        count: blocks of one tap; ``size * count`` columns a tap.
        taps: T.
    """

    size: int
    count: int
    taps: int = 1

    @property
    def width(self) -> int:
        """Columns of all taps."""
        return self.size * self.count * self.taps

    def right(self, matrix: Any, blocks: Any) -> Any:
        """X B_full: (m, width) times (count, b, b)."""
        xp = array_namespace(matrix)
        m = int(matrix.shape[0])
        cut = xp.reshape(matrix, (m, self.taps, self.count, self.size))
        moved = xp.permute_dims(cut, (2, 0, 1, 3))  # (count, m, taps, b)
        made = xp.reshape(moved, (self.count, m * self.taps, self.size)) @ blocks
        back = xp.reshape(made, (self.count, m, self.taps, self.size))
        return xp.reshape(xp.permute_dims(back, (1, 2, 0, 3)), (m, self.width))

    def left(self, blocks: Any, matrix: Any) -> Any:
        """B_full X: (count, b, b) times (width, m)."""
        return self.right(matrix.T, transposed(blocks)).T

    def diagonal(self, left: Any, right: Any) -> Any:
        """Diagonal blocks of L^T R, taps summed: (m, width), (m, width) -> (count, b, b)."""
        xp = array_namespace(left)
        m = int(left.shape[0])
        shape = (m * self.taps, self.count, self.size)
        one = xp.permute_dims(xp.reshape(left, shape), (1, 2, 0))
        return one @ xp.permute_dims(xp.reshape(right, shape), (1, 0, 2))

    def own(self, square: Any) -> Any:
        """Diagonal blocks of a (width, width) matrix, taps averaged: (count, b, b)."""
        xp = array_namespace(square)
        each = self.taps * self.count
        cut = xp.reshape(square, (each, self.size, each, self.size))
        place = xp.arange(each, device=square.device)
        found = xp.reshape(cut[place, :, place, :], (self.taps, self.count, self.size, self.size))
        return xp.mean(found, axis=0)

    def congruence(self, blocks: Any, metric: Any) -> Any:
        """B_full H B_full^T, symmetric."""
        made = self.left(blocks, self.right(metric, transposed(blocks)))
        return (made + made.T) / 2


def transposed(blocks: Any) -> Any:
    """Each block transposed."""
    return array_namespace(blocks).permute_dims(blocks, (0, 2, 1))


def identity(like: Any, blocks: Blocks) -> Any:
    """Blocks I."""
    xp = array_namespace(like)
    one = xp.eye(blocks.size, dtype=like.dtype, device=like.device)
    return xp.tile(one[None, :, :], (blocks.count, 1, 1))


def right_update(core: Any, residual: Any, metric: Any, blocks: Blocks, steps: int) -> Any:
    """The change of B that (nearly) minimises the loss; see the module's head.

    Args:
        core: S, (m, width).
        residual: E H, (m, width).
        metric: H, (width, width).
        blocks: how columns are cut.
        steps: conjugate-gradient steps.

    Returns:
        (count, b, b).
    """
    xp = array_namespace(core)
    gram = core.T @ core
    inverse_gram = xp.linalg.inv(_ridged(blocks.own(gram)))
    inverse_metric = xp.linalg.inv(_ridged(blocks.own(metric)))
    left = blocks.diagonal(core, residual)
    change, direction, before = xp.zeros_like(left), xp.zeros_like(left), 0.0
    for _ in range(steps):
        preconditioned = inverse_gram @ left @ inverse_metric
        now = float(xp.sum(left * preconditioned))
        if not now > 0:
            break
        direction = preconditioned + (now / before if before else 0.0) * direction
        made = blocks.diagonal(blocks.right(gram, direction).T, metric)
        curvature = float(xp.sum(direction * made))
        if not curvature > 0:
            break
        change = change + (now / curvature) * direction
        left = left - (now / curvature) * made
        before = now
    return change


def left_update(made: Any, residual: Any, metric: Any, blocks: Blocks) -> Any:
    """The change of A that minimises tr((W - A Y) H (W - A Y)^T): block rows do not meet, each is a least squares.

    Args:
        made: Y = S B, (m, n).
        residual: E H, (m, n), with E = W - A Y.
        metric: H, (n, n).
        blocks: how rows are cut; ``blocks.width == m``.

    Returns:
        (count, b, b): diag-blocks(E H Y^T) (diag-blocks(Y H Y^T))^-1.
    """
    xp = array_namespace(made)
    system = _ridged(blocks.diagonal((made @ metric).T, made.T))
    right = blocks.diagonal(residual.T, made.T)
    return xp.permute_dims(xp.linalg.solve(system, transposed(right)), (0, 2, 1))


def _ridged(squares: Any) -> Any:
    xp = array_namespace(squares)
    mean = xp.mean(xp.linalg.diagonal(squares))
    eye = xp.eye(int(squares.shape[-1]), dtype=squares.dtype, device=squares.device)
    return squares + (RIDGE * mean) * eye[None, :, :]
