"""Moments of each layer where earlier layers are sparse already, beside what the dense network computes.

Layers are taken front to back, fitted to what the dense network puts out (`graphopt.pruning.beside`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx_ir as ir

from graphopt.calibration import Calibration
from graphopt.parallel import Workers
from graphopt.pruning.beside import Beside
from graphopt.sparsity.layers import Floats, SparseLayer
from graphopt.sparsity.tasks import Set, Task, by_input


class Sequential:
    """One stage for each input tensor, front to back (`graphopt.sparsity.tasks.Stages`).

    Args:
        model: the dense network; clones are kept, so it may change meanwhile.
        sets: layers of that model.
        calibration: the data.
        samples: at most; None: all.
        workers: share the work.
    """

    def __init__(
        self, model: ir.Model, sets: Sequence[Set], calibration: Calibration, samples: int | None, workers: Workers
    ) -> None:
        self._beside = Beside(model, calibration, samples, workers)
        self._inputs = sorted(by_input(sets), key=lambda readers: min(map(self._beside.place, _keys(readers))))

    def stages(self) -> Iterator[list[Task]]:
        """See `graphopt.sparsity.tasks.Stages`."""
        for number, readers in enumerate(self._inputs):
            ahead = [key for later in self._inputs[number + 1 :] for key in _keys(later)]
            inputs, goals = self._beside.measured(_keys(readers), ahead)
            yield [Task(each, inputs, [goals[layer.layer.key] for layer in each]) for each in readers]
            if ahead:
                self._beside.advance(ahead)

    def solved(self, layer: SparseLayer, weight: Floats, bias: Floats) -> None:
        """See `graphopt.sparsity.tasks.Stages`."""
        self._beside.store(layer.layer.key, layer.by_channel(weight), bias)


def _keys(readers: Sequence[Set]) -> list[str]:
    return [layer.layer.key for each in readers for layer in each]
