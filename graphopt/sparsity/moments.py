"""Second moments of what layers read, streamed over the calibration data, once for all layers that read the same.

Layers are taken in portions whose moments fit into the memory allowed; each portion is one pass over the data. All are
moments of the model as it was before any layer changed, so that layers do not wait for each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.calibration import Calibration
from graphopt.data.activations import activations
from graphopt.numerics.moments import Moments
from graphopt.parallel import Workers
from graphopt.rewriting.layers import Layer, layers_of
from graphopt.sparsity.layers import Floats, SparseLayer
from graphopt.sparsity.tasks import Set, Task, by_input

MEMORY = 1 << 30
"""Bytes of moments that are kept at once: 8 n^2 a group for n columns.

Beside them each thread holds one batch of activations (at most `graphopt.data.activations.SLICE_BYTES`) and up to five
more matrices as large as those of one layer.
"""

ROWS = 1 << 18
"""Observations per layer; regularly thinned where there are more."""


class Measured:
    """The moments of a model, portion by portion (`graphopt.sparsity.tasks.Stages`).

    Args:
        model: whose activations are taken; a clone is kept, so it may change meanwhile.
        sets: layers of that model.
        calibration: the data.
        samples: at most; None: all.
        workers: share the work.
        memory: see `MEMORY`; a single larger input is taken all the same.
    """

    def __init__(
        self,
        model: ir.Model,
        sets: Sequence[Set],
        calibration: Calibration,
        samples: int | None,
        workers: Workers,
        memory: int = MEMORY,
    ) -> None:
        self._model, self._sets, self._calibration = model.clone(), sets, calibration
        self._layers = layers_of(self._model)[0]
        self._samples, self._workers, self._memory = samples, workers, memory

    def stages(self) -> Iterator[list[Task]]:
        """See `graphopt.sparsity.tasks.Stages`."""
        for portion in _portions(by_input(self._sets), self._memory):
            found = self._measured([readers[0][0] for readers in portion])
            yield [
                Task(each, moments) for readers, moments in zip(portion, found, strict=True) for each in readers
            ]  # fmt: skip

    def solved(self, layer: SparseLayer, weight: Floats, bias: Floats) -> None:
        """See `graphopt.sparsity.tasks.Stages`: nothing depends on it."""

    def _measured(self, layers: list[SparseLayer]) -> list[list[Moments]]:
        """Moments of the inputs of these layers, one a group."""
        found = [[Moments(full=True) for _ in range(each.layer.groups)] for each in layers]
        # Of the clone: wrappers that were written meanwhile give what a layer of the model reads another name.
        own = [self._layers[each.layer.key] for each in layers]
        names = [(layer.source, layer.key) for layer in own]
        thinning = Thinning(self._samples or self._calibration.samples)
        stream = activations(
            self._model, names, self._calibration, limit=self._samples, threads=1, run=self._workers.map
        )
        for tensors in stream:
            # a tensor that is not there comes with another slice
            there = [
                (layer, moments)
                for layer, moments in zip(own, found, strict=True)
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

            for _ in self._workers.map(add, there):
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


def _portions(inputs: list[list[Set]], memory: int) -> Iterator[list[list[Set]]]:
    portion: list[list[Set]] = []
    held = 0
    for readers in inputs:
        layer = readers[0][0].layer
        size = 8 * layer.width**2 * layer.groups
        if portion and held + size > memory:
            yield portion
            portion, held = [], 0
        portion.append(readers)
        held += size
    if portion:
        yield portion
