"""Moments of each layer where earlier layers are sparse already, beside what the dense network computes.

Layers are taken front to back. With x what a layer reads in the changed network and t what it should put out, the
weight and bias that come closest are the least squares fit of t by x, so that a layer also makes up for errors of the
layers before it. What t is:

- the layer's output in the dense network;
- where that only enters a sum whose other side is final, what is missing to the dense network's sum:
  t = sum_dense - (sum_changed - y_changed), so that layers repair what arrives over residual connections.

Two walks (`graphopt.pruning.walk`) stand side by side, one through each network; layers behind them are not run again
and hand their new weights back, so that no weight is held twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.calibration import Calibration
from graphopt.numerics.moments import Moments
from graphopt.parallel import Workers
from graphopt.pruning.targets import target_of
from graphopt.pruning.walk import Walk
from graphopt.rewriting.layers import layers_of
from graphopt.sparsity.layers import Floats, SparseLayer
from graphopt.sparsity.moments import Thinning
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
        self._changed = model.clone()
        self._nodes = list(self._changed.graph)
        self._layers = layers_of(self._changed)[0]
        self._dense_weights: dict[ir.Value, Any] = {}
        place = {node: i for i, node in enumerate(self._nodes)}
        self._place = {key: place[layer.linear.node] for key, layer in self._layers.items()}
        self._inputs = sorted(by_input(sets), key=lambda readers: min(map(self._at, _members(readers))))
        self._workers = workers
        self._thinning = Thinning(samples or calibration.samples)
        dense = model.clone()
        self._dense_nodes = list(dense.graph)
        self._before, self._after = (
            Walk(each, calibration, limit=samples, run=workers.map) for each in (dense, self._changed)
        )

    def _at(self, layer: SparseLayer) -> int:
        return self._place[layer.layer.key]

    def stages(self) -> Iterator[list[Task]]:
        """See `graphopt.sparsity.tasks.Stages`."""
        for number, readers in enumerate(self._inputs):
            ahead = [layer for later in self._inputs[number + 1 :] for layer in _members(later)]
            yield self._measured(readers, ahead)
            if ahead:
                self._advance(min(map(self._at, ahead)) - 1)

    def solved(self, layer: SparseLayer, weight: Floats, bias: Floats) -> None:
        """See `graphopt.sparsity.tasks.Stages`."""
        own = self._layers[layer.layer.key]
        value = own.linear.node.inputs[1]
        assert value is not None
        self._dense_weights[value] = value.const_value
        own.store(layer.by_channel(weight), bias)

    def _advance(self, place: int) -> None:
        """Move both walks behind a node, and give dense weights back to what is never run again."""
        if place < 0:
            return
        self._before.advance(self._dense_nodes[place])
        self._after.advance(self._nodes[place])
        for value in list(self._dense_weights):
            if all(self._after.passed(node) for node in value.consumers()):
                value.const_value = self._dense_weights.pop(value)

    def _measured(self, readers: list[Set], ahead: list[SparseLayer]) -> list[Task]:
        layers = _members(readers)
        # Of the clone: wrappers that were written meanwhile give what a layer of the model reads another name.
        own = [self._layers[layer.layer.key] for layer in layers]
        first = own[0]
        inputs = [Moments(full=True) for _ in range(first.groups)]
        goals = [[Moments() for _ in range(first.groups)] for _ in layers]
        totals = [self._total(layer, [*ahead, *layers]) for layer in layers]
        outputs = [layer.output for layer in own]
        wanted = list(dict.fromkeys([*outputs, *totals]))
        stream = zip(
            self._before.stream(wanted), self._after.stream(list(dict.fromkeys([first.source, *wanted]))), strict=True
        )
        for dense, now in stream:
            x = np.asarray(now[first.source])

            def add(k: int, dense: dict[str, Any] = dense, now: dict[str, Any] = now, x: Any = x) -> None:
                total, y = totals[k], now[outputs[k]]
                t = dense[outputs[k]]
                if total != outputs[k] and now[total].shape == y.shape == dense[total].shape:
                    t = dense[total] - (now[total] - y)
                thin = self._thinning(first, x, y)
                with np.errstate(all="ignore"):  # what is not finite is found before it is used
                    for group in range(first.groups):
                        for columns, rows in own[k].columns(x, t, group, thin):
                            goals[k][group].update(columns, rows, axis=0)
                            if k == 0:
                                inputs[group].update(columns, axis=0)

            for _ in self._workers.map(add, range(len(layers))):
                pass
        of = {layer.layer.key: found for layer, found in zip(layers, goals, strict=True)}
        return [Task(each, inputs, [of[layer.layer.key] for layer in each]) for each in readers]

    def _total(self, layer: SparseLayer, unsolved: list[SparseLayer]) -> str:
        """Name of the tensor that a layer is held against: its output or the sum that this enters."""
        own = self._layers[layer.layer.key]
        others = {self._layers[each.layer.key].linear.node for each in unsolved if each is not layer}
        return target_of(own, others).total


def _members(readers: Sequence[Set]) -> list[SparseLayer]:
    return [layer for each in readers for layer in each]
