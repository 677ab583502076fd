"""How many results a window kernel computes at a time: as many as registers hold, without many that nobody needs."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from graphopt.backends.tvm_schedules.machine import Machine

# A fused multiply-add has a latency of 4 cycles and two leave in each: fewer independent sums than this wait.
_SUMS_IN_FLIGHT = 8
# Sums by registers. Weights and inputs pass through a quarter of them, and LLVM loads ahead where there are many: 28
# sums in 32 registers spill (2.7 times the time of 14 to 16, on an AVX-512 core).
_MOST_SUMS = {16: 12, 32: 16}
# Sizes that are not known are taken for large.
_UNKNOWN = 1 << 12
# What guarding the results at the edge costs where the tile does not divide the image.
_RAGGED = 0.02


@dataclass(frozen=True)
class Tile:
    """Results in registers: blocks of output channels, rows, columns; each is one vector."""

    blocks: int
    rows: int
    columns: int

    @property
    def sums(self) -> int:
        """Vector registers that the sums take."""
        return self.blocks * self.rows * self.columns


def best_tile(
    blocks: int, rows: int | None, columns: int | None, machine: Machine, *, shared_input: bool = True
) -> Tile:
    """The tile that costs least per result.

    A step of the inner loop loads `blocks` vectors of weights and rows x columns inputs, and does rows x columns x
    blocks multiply-adds; on all machines at hand as many loads as multiply-adds leave in a cycle. Results beyond the
    image, where the tile does not divide it, are computed for nothing.

    Args:
        blocks: blocks of output channels.
        rows: height of the output, None where it is only known when the kernel runs.
        columns: width of the output, likewise.
        machine: gives the number of registers.
        shared_input: whether several output blocks read the same inputs (not so depthwise, not so pooling).
    """
    height, width = rows or _UNKNOWN, columns or _UNKNOWN
    limit = _MOST_SUMS[machine.registers]

    def cost(tile: Tile) -> tuple[float, int]:
        step = max(tile.sums, _SUMS_IN_FLIGHT, tile.blocks + tile.rows * tile.columns)
        computed = _rounded(height, tile.rows) * _rounded(width, tile.columns)
        waste = computed / (height * width) + (_RAGGED if computed > height * width else 0)
        return round(step / tile.sums * waste, 3), -tile.columns

    block_counts = [b for b in range(1, min(blocks, 8) + 1) if blocks % b == 0] if shared_input else [1]
    shapes = itertools.product(block_counts, range(1, min(height, 4) + 1), range(1, min(width, limit) + 1))
    return min((tile for tile in (Tile(*shape) for shape in shapes) if tile.sums <= limit), key=cost)


def _rounded(size: int, step: int) -> int:
    return -(-size // step) * step
