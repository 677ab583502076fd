"""Transposed convolution as an ordinary one.

    y[o] = sum over i, k with i s + k = o + p of x[i] w[k]

Write o + p = q s + r. Only taps k = r + s t meet it, with i = q - t: phase r of the output is the convolution of x with
every s-th tap from r on. The phases of all axes are computed as sets of output channels of one convolution of stride 1
with ceil(K / s) taps (no multiplication by zeros between inputs), and laid side by side. With stride 1 there is one
phase, and nothing to lay. Dilated kernels are filled with zeros first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from tvm import te

from graphopt.backends.tvm_schedules.windows import Window


@dataclass(frozen=True)
class Axis:
    """One spatial axis of a transposed convolution.

    Attributes:
        taps: of the kernel, dilation included.
        stride: steps of the output for one step of the input.
        padding: outputs dropped in front.
        size: of the output.
        source: size of the input.
    """

    taps: int
    stride: int
    padding: int
    size: Any
    source: Any

    @property
    def kernel(self) -> int:
        """Taps of a phase."""
        return -(-self.taps // self.stride)

    @property
    def first(self) -> int:
        """q of the first output."""
        return self.padding // self.stride

    @property
    def positions(self) -> Any:
        """How many values q takes."""
        return (self.size - 1 + self.padding) // self.stride - self.first + 1

    @property
    def before(self) -> int:
        """Zeros in front of the input, so that the first window ends at x[first]."""
        return self.kernel - 1 - self.first

    @property
    def behind(self) -> Any:
        """Zeros behind the input."""
        return self.positions + self.kernel - 1 - self.source - self.before


def window_of(rows: Axis, columns: Axis) -> Window:
    """The window of the ordinary convolution."""
    padding = (rows.before, columns.before, rows.behind, columns.behind)
    return Window((rows.kernel, columns.kernel), (1, 1), (1, 1), padding)


def phase_weights(weights: np.ndarray, groups: int, dilation: tuple[int, int], rows: Axis, columns: Axis) -> np.ndarray:
    """(I, O/G, KH, KW) as weights of the ordinary convolution, (phases O, I/G, kernel, kernel)."""
    inputs, outputs, height, width = weights.shape
    grouped = weights.reshape(groups, inputs // groups, outputs, height, width).swapaxes(1, 2)
    swapped = grouped.reshape(groups * outputs, inputs // groups, height, width)
    whole = (rows.kernel * rows.stride, columns.kernel * columns.stride)
    filled = np.zeros((*swapped.shape[:2], *whole), weights.dtype)
    filled[:, :, : rows.taps : dilation[0], : columns.taps : dilation[1]] = swapped
    phases = [filled[:, :, r :: rows.stride, c :: columns.stride] for r, c in _phases(rows, columns)]
    return np.concatenate(phases)[:, :, ::-1, ::-1]


def _phases(rows: Axis, columns: Axis) -> list[tuple[int, int]]:
    return list(product(range(rows.stride), range(columns.stride)))


def interleaved(blocks: int, rows: Axis, columns: Axis) -> Callable[[te.Tensor], te.Tensor]:
    """What lays phases, (N, phases blocks, Q, Q, block), side by side: (N, blocks, H, W, block)."""

    def compute(phases: te.Tensor) -> te.Tensor:
        def value(image: Any, block: Any, y: Any, x: Any, lane: Any) -> Any:
            row, column = y + rows.padding, x + columns.padding
            phase = row % rows.stride * columns.stride + column % columns.stride
            at = (row // rows.stride - rows.first, column // columns.stride - columns.first)
            return phases[image, phase * blocks + block, *at, lane]

        shape = (phases.shape[0], blocks, rows.size, columns.size, phases.shape[4])
        return te.compute(shape, value, name="interleaved")

    return compute
