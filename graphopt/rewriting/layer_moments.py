"""Moments of what layers read, in one pass over calibration data, and how much of it is kept at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from graphopt.data.activations import activations
from graphopt.numerics.moments import Moments

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphopt.calibration import Calibration
    from graphopt.parallel import Workers
    from graphopt.rewriting.layers import Layer

MEMORY = 1 << 30
"""Bytes of moments that are kept at once: 8 n^2 a group for n columns.

Beside them each thread holds one batch of activations (at most `graphopt.data.activations.SLICE_BYTES`).
"""

ROWS = 1 << 18
"""Observations per layer; regularly thinned where there are more."""

Item = TypeVar("Item")


def input_moments(
    model: ir.Model,
    layers: Sequence[Layer],
    calibration: Calibration,
    samples: int | None,
    workers: Workers,
    *,
    full: bool = True,
) -> list[list[Moments]]:
    """Moments of the columns of these layers, one a group.

    Args:
        model: is not changed.
        layers: of that model.
        calibration: the data.
        samples: at most; None: all.
        workers: share the work.
        full: matrices; False: diagonals.
    """
    found = [[Moments(full=full) for _ in range(layer.groups)] for layer in layers]
    names = [(layer.source, layer.key) for layer in layers]
    thinning = Thinning(samples or calibration.samples)
    for tensors in activations(model, names, calibration, limit=samples, threads=1, run=workers.map):
        # a tensor that is not there comes with another slice
        there = [
            (layer, moments)
            for layer, moments in zip(layers, found, strict=True)
            if layer.source in tensors and layer.key in tensors
        ]

        def add(pair: tuple[Layer, list[Moments]], tensors: dict[str, Any] = tensors) -> None:
            layer, moments = pair
            x, y = np.asarray(tensors[layer.source]), np.asarray(tensors[layer.key])
            thin = thinning(layer, x, y)
            with np.errstate(all="ignore"):  # what is not finite is found before it is used
                for group, each in enumerate(moments):
                    for columns, _ in layer.columns(x, y, group, thin):
                        each.update(columns, axis=0)

        for _ in workers.map(add, there):
            pass
    return found


class Thinning:
    """How many observations to leave out so that about `ROWS` are taken from all the data.

    Args:
        samples: that there are; None: unknown.
    """

    def __init__(self, samples: int | None) -> None:
        self._samples = samples

    def __call__(self, layer: Layer, x: Any, y: Any) -> int:
        """One of how many is taken of this batch."""
        batches = self._samples / x.shape[0] if self._samples and x.ndim and x.shape[0] else 1.0
        return max(1, int(layer.positions(y) * max(1.0, batches) / ROWS))


def portions(items: Sequence[Item], layer: Callable[[Item], Layer], memory: int) -> Iterator[list[Item]]:
    """Items in order, as many at once as their layers' moments fit into `memory`; a larger one is taken alone."""
    portion: list[Item] = []
    held = 0
    for item in items:
        each = layer(item)
        size = 8 * each.width**2 * each.groups
        if portion and held + size > memory:
            yield portion
            portion, held = [], 0
        portion.append(item)
        held += size
    if portion:
        yield portion
