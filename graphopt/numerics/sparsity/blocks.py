"""Block-diagonal matrices, and the least-squares update of one that stands to the right of a core.

A block-diagonal matrix of blocks b x b is held as an array (blocks, b, b). With a core S (m, n) and What = S B the loss

    f(B) = tr((W - S B) H (W - S B)^T),       blocks of  S^T (W - S B) H  on the diagonal = -1/2 df/dB,

is a quadratic form in B alone: the change D of B that minimises it solves

    diag-blocks(K D H) = diag-blocks(S^T W H) - diag-blocks(K B H),       K = S^T S.

Solved by conjugate gradients, preconditioned block by block with K_jj^-1 (.) H_jj^-1 (which is one step of block Gauss-
Seidel's update, for all blocks at once): a step costs 4 n^2 b, little beside K itself. Every number of steps lowers f.

Where the same B acts on T taps (positions of a convolution kernel; B_full = I_T (x) B, columns ordered tap by tap) the
diagonal blocks of all taps are summed, and the form stays quadratic.

Everything goes block by block, so that no temporary is larger than a block of columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from array_api_compat import array_namespace

RIDGE = 1e-6
"""Of normal equations, relative to the mean of their diagonal: what is not used, or twice, stays solvable."""

CONDITION = 1e3
"""Of a block, at most, up to the lengths of its rows or columns: wrappers are stored and run in half precision."""

HALVINGS = 6


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

    def cuts(self) -> Iterator[tuple[int, slice]]:
        """Which block acts on which columns."""
        for start in range(0, self.width, self.size):
            yield start // self.size % self.count, slice(start, start + self.size)

    def right(self, matrix: Any, blocks: Any) -> Any:
        """X B_full: (m, width) times (count, b, b)."""
        made = array_namespace(matrix).empty_like(matrix)
        for block, at in self.cuts():
            made[:, at] = matrix[:, at] @ blocks[block, :, :]
        return made

    def left(self, blocks: Any, matrix: Any) -> Any:
        """B_full X: (count, b, b) times (width, m)."""
        made = array_namespace(matrix).empty_like(matrix)
        for block, at in self.cuts():
            made[at, :] = blocks[block, :, :] @ matrix[at, :]
        return made

    def diagonal(self, left: Any, right: Any) -> Any:
        """Diagonal blocks of L^T R, taps summed, float64: (m, width), (m, width) -> (count, b, b)."""
        found = _empty(left, self)
        for block, at in self.cuts():
            found[block, :, :] += _double(left[:, at].T @ right[:, at])
        return found

    def own(self, square: Any) -> Any:
        """Diagonal blocks of a (width, width) matrix, taps averaged, float64: (count, b, b)."""
        found = _empty(square, self)
        for block, at in self.cuts():
            found[block, :, :] += _double(square[at, at])
        return found / self.taps

    def sandwiched(self, gram: Any, blocks: Any, metric: Any) -> Any:
        """Diagonal blocks of K B_full H, taps summed, float64: (count, b, b); H symmetric."""
        xp = array_namespace(gram)
        found = xp.zeros((self.taps, self.count, self.size, self.size), dtype=xp.float64, device=gram.device)
        for block, at in self.cuts():
            one = xp.reshape(gram[:, at] @ blocks[block, :, :], (-1, self.size, self.size))
            two = xp.permute_dims(xp.reshape(metric[at, :], (self.size, -1, self.size)), (1, 0, 2))
            found += xp.reshape(_double(one @ two), found.shape)
        return xp.sum(found, axis=0)

    def congruence(self, blocks: Any, metric: Any) -> Any:
        """B_full H B_full^T."""
        made = self.right(metric, transposed(blocks))
        for block, at in self.cuts():
            made[at, :] = blocks[block, :, :] @ made[at, :]
        return made


def transposed(blocks: Any) -> Any:
    """Each block transposed."""
    return array_namespace(blocks).permute_dims(blocks, (0, 2, 1))


def identity(like: Any, blocks: Blocks) -> Any:
    """Blocks I."""
    xp = array_namespace(like)
    one = xp.eye(blocks.size, dtype=like.dtype, device=like.device)
    return xp.tile(one[None, :, :], (blocks.count, 1, 1))


def places(like: Any, inputs: int, across: Blocks) -> Any:
    """Where the columns of a matrix with `inputs` a tap stand in one whose taps are filled up to whole blocks."""
    xp = array_namespace(like)
    tap = xp.arange(across.taps, device=like.device) * (across.size * across.count)
    return xp.reshape(tap[:, None] + xp.arange(inputs, device=like.device)[None, :], (-1,))


def right_update(core: Any, wanted: Any, right: Any, metric: Any, blocks: Blocks, steps: int) -> Any:
    """The change of B that (nearly) minimises the loss; see the module's head.

    Args:
        core: S, (m, width).
        wanted: W H, (m, width).
        right: B, (count, b, b).
        metric: H, (width, width).
        blocks: how columns are cut.
        steps: conjugate-gradient steps.

    Returns:
        (count, b, b) in the dtype of B.
    """
    xp = array_namespace(core)
    gram = core.T @ core
    inverse_gram = xp.linalg.inv(ridged(blocks.own(gram)))
    inverse_metric = xp.linalg.inv(ridged(blocks.own(metric)))
    left = blocks.diagonal(core, wanted) - blocks.sandwiched(gram, right, metric)
    change, direction, before = xp.zeros_like(left), xp.zeros_like(left), 0.0
    for _ in range(steps):
        preconditioned = inverse_gram @ left @ inverse_metric
        now = float(xp.sum(left * preconditioned))
        if not now > 0:
            break
        direction = preconditioned + (now / before if before else 0.0) * direction
        made = blocks.sandwiched(gram, xp.astype(direction, right.dtype), metric)
        curvature = float(xp.sum(direction * made))
        if not curvature > 0:
            break
        change = change + (now / curvature) * direction
        left = left - (now / curvature) * made
        before = now
    return xp.astype(change, right.dtype)


def left_update(made: Any, wanted: Any, left: Any, metric: Any, blocks: Blocks) -> Any:
    """The change of A that minimises tr((W - A Y) H (W - A Y)^T): block rows do not meet, each is a least squares.

    Args:
        made: Y = S B, (m, n).
        wanted: W H, (m, n).
        left: A, (count, b, b).
        metric: H, (n, n).
        blocks: how rows are cut; ``blocks.width == m``.

    Returns:
        (count, b, b): (diag-blocks(W H Y^T) - A K) K^-1 with K = diag-blocks(Y H Y^T), in the dtype of A; what no row
        of the core uses stays.
    """
    xp = array_namespace(made)
    gram = blocks.diagonal((made @ metric).T, made.T)
    missing = blocks.diagonal(wanted.T, made.T) - _double(left) @ gram
    return xp.astype(transposed(xp.linalg.solve(ridged(gram), transposed(missing))), left.dtype)


def moved(blocks: Any, change: Any, along: int) -> Any:
    """Blocks and their change, or as much of it (1, 1/2, ... or none) as leaves each well conditioned.

    Args:
        blocks, change: (count, b, b).
        along: axis whose lengths do not matter, since the core takes them over: 2 (rows), 1 (columns).
    """
    xp = array_namespace(blocks)
    share = xp.ones((int(blocks.shape[0]),), dtype=blocks.dtype, device=blocks.device)
    for _ in range(HALVINGS):
        made = blocks + share[:, None, None] * change
        unit = made / xp.expand_dims(lengths(made, along), axis=along)
        singular = xp.linalg.svdvals(unit)
        bad = singular[:, 0] > CONDITION * singular[:, -1]
        if not bool(xp.any(bad)):
            return made
        share = xp.where(bad, share / 2, share)
    return xp.where(bad[:, None, None], blocks, made)


def lengths(blocks: Any, along: int) -> Any:
    """Lengths of rows (2) or columns (1) of each block, 1 for an empty one: (count, b)."""
    xp = array_namespace(blocks)
    found = xp.sqrt(xp.sum(blocks * blocks, axis=along))
    return xp.where(found > 0, found, xp.ones_like(found))


def ridged(squares: Any, ridge: float = RIDGE) -> Any:
    """Blocks (count, b, b) with a little of their own mean diagonal added; those of zeros become I."""
    xp = array_namespace(squares)
    mean = xp.mean(xp.linalg.diagonal(squares), axis=-1)
    added = xp.where(mean > 0, ridge * mean, xp.ones_like(mean))
    eye = xp.eye(int(squares.shape[-1]), dtype=squares.dtype, device=squares.device)
    return squares + added[:, None, None] * eye[None, :, :]


def _empty(like: Any, blocks: Blocks) -> Any:
    xp = array_namespace(like)
    return xp.zeros((blocks.count, blocks.size, blocks.size), dtype=xp.float64, device=like.device)


def _double(array: Any) -> Any:
    xp = array_namespace(array)
    return xp.astype(array, xp.float64)
