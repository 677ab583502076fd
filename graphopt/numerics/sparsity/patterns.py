"""Which weights of a matrix stay: N of every M along a row, or a share of all.

Groups of M run along the input dimension (the last axis), as sparse tensor cores want them. Where a row ends within a
group, the last group is shorter and keeps at most N. Arrays are numpy or torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from array_api_compat import array_namespace

_TEXT = re.compile(r"(\d+):(\d+)|(\d+(?:\.\d+)?)%")


@dataclass(frozen=True)
class Pattern:
    """What stays.

    Attributes:
        keep: N, how many of a group stay.
        of: M, the size of a group; 0: no groups, the share `density` of the whole matrix stays.
        density: kept share.
    """

    keep: int
    of: int
    density: float

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}" if self.of else f"{self.density:.4g}".rstrip("0")

    def supports(self) -> list[tuple[int, ...]]:
        """All sets of N positions within a group."""
        return list(combinations(range(self.of), self.keep))


def parse(text: str) -> Pattern:
    """'2:4' -> two of four; '50%' -> half of all weights, wherever they are.

    Raises:
        ValueError: neither form, or nothing or everything would stay.
    """
    match = _TEXT.fullmatch(text.strip())
    if match is not None and match[1]:
        keep, of = int(match[1]), int(match[2])
        if 0 < keep < of <= 16:
            return Pattern(keep, of, keep / of)
    elif match is not None and 0 < float(match[3]) < 100:
        return Pattern(0, 0, float(match[3]) / 100)
    raise ValueError(f"'{text}' is no pattern: say 2:4 (two of every four stay, groups up to 16) or 50%")


def mask(scores: Any, pattern: Pattern) -> Any:
    """Where the largest scores are.

    Args:
        scores: (m, n), finite.
        pattern: what stays.

    Returns:
        (m, n) bool; of equal scores the earlier stays.
    """
    xp = array_namespace(scores)
    m, n = (int(size) for size in scores.shape)
    if not pattern.of:
        order = xp.argsort(-xp.reshape(scores, (-1,)), stable=True)
        kept = xp.zeros((m * n,), dtype=xp.bool, device=scores.device)
        kept[order[: round(pattern.density * m * n)]] = True
        return xp.reshape(kept, (m, n))
    short = -n % pattern.of
    if short:  # positions past the end lose to all others
        lowest = xp.full((m, short), -float("inf"), dtype=scores.dtype, device=scores.device)
        scores = xp.concat([scores, lowest], axis=1)
    groups = xp.permute_dims(xp.reshape(scores, (m, -1, pattern.of)), (2, 0, 1))
    kept = xp.permute_dims(largest(groups, pattern.keep), (1, 2, 0))
    return xp.reshape(kept, (m, -1))[:, :n]


def largest(scores: Any, keep: int) -> Any:
    """Where the `keep` largest are along the first, short axis: as many outrank each; of equals the earlier."""
    xp = array_namespace(scores)
    size = int(scores.shape[0])
    chosen = []
    for i in range(size):
        rank = xp.zeros(scores.shape[1:], dtype=xp.int8, device=scores.device)
        for j in range(size):
            if j != i:
                rank += scores[j, ...] >= scores[i, ...] if j < i else scores[j, ...] > scores[i, ...]
        chosen.append(rank < keep)
    return xp.stack(chosen)


def holds(weight: Any, pattern: Pattern) -> bool:
    """No group has more than N nonzeros (or the matrix more than its share)."""
    xp = array_namespace(weight)
    filled = xp.astype(weight != 0, xp.int64)
    m, n = (int(size) for size in weight.shape)
    if not pattern.of:
        return int(xp.sum(filled)) <= round(pattern.density * m * n)
    short = -n % pattern.of
    if short:
        filled = xp.concat([filled, xp.zeros((m, short), dtype=xp.int64, device=weight.device)], axis=1)
    return bool(xp.all(xp.sum(xp.reshape(filled, (m, -1, pattern.of)), axis=-1) <= pattern.keep))
