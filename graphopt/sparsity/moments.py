"""Second moments of what layers read, streamed over the calibration data, once for all layers that read the same.

Layers are taken in portions whose moments fit into the memory allowed; each portion is one pass over the data.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.calibration import Calibration
from graphopt.data.activations import activations
from graphopt.numerics.moments import Moments
from graphopt.sparsity.layers import SparseLayer

MEMORY = 1 << 30
"""Bytes of moments that are kept at once."""

ROWS = 1 << 18
"""Observations per layer; regularly thinned where there are more."""


def input_moments(
    model: ir.Model,
    layers: Sequence[SparseLayer],
    calibration: Calibration,
    *,
    samples: int | None,
    threads: int,
    memory: int = MEMORY,
) -> Iterator[tuple[list[SparseLayer], list[Moments]]]:
    """Moments of the inputs of layers.

    Args:
        model: the model whose activations are taken; not changed while this is iterated.
        layers: of that model.
        calibration: the data.
        samples: at most; None: all.
        threads: of ONNX Runtime.
        memory: see `MEMORY`; a single larger input is taken all the same.

    Yields:
        Layers that read the same columns, and one `Moments(full=True)` a group, columns channel by channel.
    """
    inputs: dict[Any, list[SparseLayer]] = {}
    for each in layers:
        inputs.setdefault((each.layer.source, each.layer.window), []).append(each)
    portion: list[list[SparseLayer]] = []
    held = 0
    for readers in inputs.values():
        size = 8 * readers[0].layer.width ** 2 * readers[0].layer.groups
        if portion and held + size > memory:
            yield from _measured(model, portion, calibration, samples, threads)
            portion, held = [], 0
        portion.append(readers)
        held += size
    if portion:
        yield from _measured(model, portion, calibration, samples, threads)


def _measured(
    model: ir.Model, portion: list[list[SparseLayer]], calibration: Calibration, samples: int | None, threads: int
) -> Iterator[tuple[list[SparseLayer], list[Moments]]]:
    found = [[Moments(full=True) for _ in range(readers[0].layer.groups)] for readers in portion]
    names = [(readers[0].layer.source, readers[0].layer.key) for readers in portion]
    total = samples or calibration.samples
    for tensors in activations(model, names, calibration, limit=samples, threads=threads):
        for readers, moments in zip(portion, found, strict=True):
            layer = readers[0].layer
            x, y = tensors.get(layer.source), tensors.get(layer.key)
            if x is None or y is None:
                continue  # comes with another slice of the tensors
            batches = total / x.shape[0] if total and x.ndim and x.shape[0] else 1.0
            thin = max(1, int(layer.positions(y) * max(1.0, batches) / ROWS))
            for group, each in enumerate(moments):
                for columns, _ in layer.columns(np.asarray(x), np.asarray(y), group, thin):
                    each.update(columns, axis=0)
    yield from zip(portion, found, strict=True)
