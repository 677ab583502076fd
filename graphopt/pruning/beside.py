"""A network beside itself: as it was, and as it becomes while its layers change front to back.

With x what a layer reads in the changed network and t what it should put out, the weight and bias that come closest are
the least squares fit of t by x, so that a layer also makes up for errors of the layers before it. What t is:

- the layer's output in the network as it was;
- where that only enters a sum whose other side is final, what is missing to that network's sum:
  t = sum_before - (sum_changed - y_changed), so that layers repair what arrives over residual connections.

Two walks (`graphopt.pruning.walk`) stand side by side; layers behind them are not run again and get their old weights
back, so that no weight is held twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from graphopt.numerics.moments import Moments
from graphopt.pruning.targets import target_of
from graphopt.pruning.walk import Walk
from graphopt.rewriting.layer_moments import Thinning
from graphopt.rewriting.layers import layers_of

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphopt.calibration import Calibration
    from graphopt.parallel import Workers
    from graphopt.rewriting.layers import Float64


class Beside:
    """The two networks. Layers are named by their keys.

    Args:
        model: clones are kept, so it may change meanwhile.
        calibration: the data.
        samples: at most; None: all.
        workers: share the work.

    Attributes:
        layers: of the changed network, by key.
    """

    def __init__(self, model: ir.Model, calibration: Calibration, samples: int | None, workers: Workers) -> None:
        before, changed = model.clone(), model.clone()
        self.layers = layers_of(changed)[0]
        self._nodes, self._nodes_before = list(changed.graph), list(before.graph)
        place = {node: i for i, node in enumerate(self._nodes)}
        self._place = {key: place[layer.linear.node] for key, layer in self.layers.items()}
        self._old_weights: dict[ir.Value, Any] = {}
        self._workers = workers
        self._thinning = Thinning(samples or calibration.samples)
        self._before, self._after = (
            Walk(each, calibration, limit=samples, run=workers.map) for each in (before, changed)
        )

    def place(self, key: str) -> int:
        """Where a layer stands in the order of execution."""
        return self._place[key]

    def measured(self, keys: Sequence[str], ahead: Sequence[str]) -> tuple[list[Moments], dict[str, list[Moments]]]:
        """Moments of what layers read, and of what they should put out beside it.

        Args:
            keys: layers that read the same columns.
            ahead: layers that change later.

        Returns:
            moments of the input, one a group, and by key the moments of input and target, one a group (not full).
        """
        layers = [self.layers[key] for key in keys]
        first = layers[0]
        inputs = [Moments(full=True) for _ in range(first.groups)]
        goals: dict[str, list[Moments]] = {key: [Moments() for _ in range(first.groups)] for key in keys}
        totals = [self._total(key, [*ahead, *keys]) for key in keys]
        outputs = [layer.output for layer in layers]
        wanted = list(dict.fromkeys([*outputs, *totals]))
        stream = zip(
            self._before.stream(wanted), self._after.stream(list(dict.fromkeys([first.source, *wanted]))), strict=True
        )
        for then, now in stream:
            x = np.asarray(now[first.source])

            def add(k: int, then: dict[str, Any] = then, now: dict[str, Any] = now, x: Any = x) -> None:
                total, y = totals[k], now[outputs[k]]
                t = then[outputs[k]]
                if total != outputs[k] and now[total].shape == y.shape == then[total].shape:
                    t = then[total] - (now[total] - y)
                thin = self._thinning(first, x, y)
                with np.errstate(all="ignore"):  # what is not finite is found before it is used
                    for group in range(first.groups):
                        for columns, rows in layers[k].columns(x, t, group, thin):
                            goals[keys[k]][group].update(columns, rows, axis=0)
                            if k == 0:
                                inputs[group].update(columns, axis=0)

            for _ in self._workers.map(add, range(len(keys))):
                pass
        return inputs, goals

    def _total(self, key: str, unsolved: Sequence[str]) -> str:
        """Name of the tensor that a layer is held against: its output or the sum that this enters."""
        others = {self.layers[each].linear.node for each in unsolved if each != key}
        return target_of(self.layers[key], others).total

    def store(self, key: str, weight: Float64, bias: Float64) -> None:
        """Change a layer: as `graphopt.rewriting.layers.Layer.store`."""
        layer = self.layers[key]
        value = layer.linear.node.inputs[1]
        assert value is not None  # a layer has a weight
        self._old_weights[value] = value.const_value
        layer.store(weight, bias)

    def advance(self, keys: Sequence[str]) -> None:
        """Leave behind what stands in front of all these layers."""
        place = min(map(self.place, keys)) - 1
        if place < 0:
            return
        self._before.advance(self._nodes_before[place])
        self._after.advance(self._nodes[place])
        for value in list(self._old_weights):
            if all(self._after.passed(node) for node in value.consumers()):
                value.const_value = self._old_weights.pop(value)
