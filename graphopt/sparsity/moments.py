"""Second moments of what layers read, streamed over the calibration data, once for all layers that read the same.

Layers are taken in portions whose moments fit into the memory allowed; each portion is one pass over the data. All are
moments of the model as it was before any layer changed, so that layers do not wait for each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx_ir as ir

from graphopt.calibration import Calibration
from graphopt.numerics.moments import Moments
from graphopt.parallel import Workers
from graphopt.rewriting.layer_moments import MEMORY, input_moments, portions
from graphopt.rewriting.layers import layers_of
from graphopt.sparsity.layers import Floats, SparseLayer
from graphopt.sparsity.tasks import Set, Task, by_input


class Measured:
    """The moments of a model, portion by portion (`graphopt.sparsity.tasks.Stages`).

    Args:
        model: whose activations are taken; a clone is kept, so it may change meanwhile.
        sets: layers of that model.
        calibration: the data.
        samples: at most; None: all.
        workers: share the work.
        memory: see `graphopt.rewriting.layer_moments.MEMORY`; a single larger input is taken all the same.
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
        for portion in portions(by_input(self._sets), lambda readers: readers[0][0].layer, self._memory):
            found = self._measured([readers[0][0] for readers in portion])
            yield [
                Task(each, moments) for readers, moments in zip(portion, found, strict=True) for each in readers
            ]  # fmt: skip

    def solved(self, layer: SparseLayer, weight: Floats, bias: Floats) -> None:
        """See `graphopt.sparsity.tasks.Stages`: nothing depends on it."""

    def _measured(self, layers: list[SparseLayer]) -> list[list[Moments]]:
        """Moments of the inputs of these layers, one a group."""
        # Of the clone: wrappers that were written meanwhile give what a layer of the model reads another name.
        own = [self._layers[each.layer.key] for each in layers]
        return input_moments(self._model, own, self._calibration, self._samples, self._workers)
