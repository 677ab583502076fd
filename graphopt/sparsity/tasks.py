"""What there is to solve: layers, what they read, and what they should compute, in stages of bounded memory.

A *set* is a tuple of layers that are solved together: one layer, or several that share a wrapper. A *stage* is a list
of tasks that do not wait for each other; the next stage is measured when the last one is solved.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from graphopt.numerics.moments import Moments
from graphopt.sparsity.layers import Floats, SparseLayer

Set = tuple[SparseLayer, ...]
"""Layers of one `SparseLayer.reads`."""


@dataclass(frozen=True)
class Task:
    """One set with its data.

    Attributes:
        layers: the set.
        inputs: moments of what the layers read, one a group of channels; None without calibration data.
        goals: for each layer, one a group: moments of the output it should have beside its input (not full); None: what
            it computes now is what it should.
    """

    layers: Set
    inputs: list[Moments] | None = None
    goals: list[list[Moments]] | None = None


class Stages(Protocol):
    """Where tasks come from."""

    def stages(self) -> Iterator[list[Task]]:
        """Measure one stage after the other."""

    def solved(self, layer: SparseLayer, weight: Floats, bias: Floats) -> None:
        """Hear of a layer's new weights, (groups, outputs, columns) tap by tap, before the next stage is drawn."""


class Unmeasured:
    """All sets at once, without data."""

    def __init__(self, sets: Sequence[Set]) -> None:
        self._sets = sets

    def stages(self) -> Iterator[list[Task]]:
        """See `Stages`."""
        yield [Task(each) for each in self._sets]

    def solved(self, layer: SparseLayer, weight: Floats, bias: Floats) -> None:
        """See `Stages`: nothing depends on it."""


def by_input(sets: Sequence[Set]) -> list[list[Set]]:
    """Sets that read the same columns of the same tensor, in order of appearance."""
    found: dict[object, list[Set]] = {}
    for each in sets:
        found.setdefault(each[0].reads[:2], []).append(each)
    return list(found.values())
