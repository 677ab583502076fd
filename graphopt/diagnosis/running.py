"""Matched tensors of two models on the same data, and what each layer of the second makes of the first one's values.

The second model is cut at every matched tensor: readers get the value that the first model computed there. So each
layer of B, whatever it was fused or split into, runs from exact inputs, and all of them in one forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.calibration import Calibration
from graphopt.data.activations import submodel
from graphopt.diagnosis.matching import Pair
from graphopt.errors import ModelError, VerificationError
from graphopt.rewriting.names import Names
from graphopt.slicing import reads_of
from graphopt.verify import SLICE_BYTES, Runner, run_candidate, run_reference, runner_of_candidate

Array = np.ndarray[Any, Any]

TENSOR_BYTES = 256 << 20
"""Memory for the tensors of one batch: of A, of B, of B cut, and what the cut B is fed with."""

COPIES = 4
PROBED = 64
"""Tensors that one trial run reads at once."""


@dataclass(frozen=True)
class Size:
    """What a trial showed of a tensor: shape and bytes of one call, and how many samples that call had."""

    shape: tuple[int, ...]
    bytes: int
    samples: int


@dataclass(frozen=True)
class Seen:
    """One tensor in one batch: in A, in B, and as B's layer makes it of A's values."""

    pair: Pair
    a: Array
    b: Array
    alone: Array


def sources(pairs: Sequence[Pair]) -> dict[Pair, list[Pair]]:
    """For each tensor the matched ones that B computes it from, with no matched tensor between."""
    by_value = {pair.b: pair for pair in pairs}
    found: dict[Pair, list[Pair]] = {}
    for pair in pairs:
        read: dict[Pair, None] = {}
        pending, seen = [pair.b], {pair.b}
        while pending:
            node = pending.pop().producer()
            for value in () if node is None else reads_of(node):
                if value in by_value:
                    read[by_value[value]] = None
                elif value not in seen:
                    seen.add(value)
                    pending.append(value)
        found[pair] = list(read)
    return found


def probe(
    a: ir.Model, b: ir.Model, pairs: Sequence[Pair], calibration: Calibration, threads: int
) -> dict[Pair, tuple[Size, Size]]:
    """Sizes of the tensors of both models on the first sample."""
    feeds, samples = next(calibration.counted(1, 1))
    found = {}
    for start in range(0, len(pairs), PROBED):
        part = pairs[start : start + PROBED]
        first = Runner(submodel(a, [p.name for p in part]), threads, SLICE_BYTES)
        second = runner_of_candidate(submodel(b, [str(p.b.name) for p in part]), threads, SLICE_BYTES)
        left, right = run_reference(first, [feeds])[0], run_candidate(second, [feeds])[0]
        for pair in part:
            x, y = left[pair.name], right[str(pair.b.name)]
            found[pair] = Size(x.shape, x.nbytes, samples), Size(y.shape, y.nbytes, samples)
    return found


def stream(
    a: ir.Model,
    b: ir.Model,
    pairs: Sequence[Pair],
    sizes: Mapping[Pair, tuple[Size, Size]],
    calibration: Calibration,
    *,
    limit: int | None,
    threads: int,
) -> Iterator[Seen]:
    """Run both models on the data and give every tensor of every batch.

    Memory is bounded by `TENSOR_BYTES` (or one sample of one tensor) and the weights by `SLICE_BYTES`: first fewer
    samples are run at a time, then tensors are taken in slices, each of which passes over the data.

    Raises:
        VerificationError: the second model fails where the first one runs.
        ModelError, DataError: the first model does not run on the data.
    """
    each = {p: COPIES * max(sizes[p][0].bytes, sizes[p][1].bytes) // sizes[p][0].samples for p in pairs}
    rows = max(1, min(calibration.batch_size, TENSOR_BYTES // max(1, sum(each.values()))))
    called = max([rows, *(sizes[p][0].samples for p in pairs)])
    cut = _Cut(b, pairs, sizes)
    for part in _parts(pairs, each, TENSOR_BYTES // called):
        layers, needs = cut.model(part)
        first = Runner(
            submodel(a, list(dict.fromkeys([*(p.name for p in part), *(p.name for p in needs.values())]))),
            threads,
            SLICE_BYTES,
        )
        second = runner_of_candidate(submodel(b, [str(p.b.name) for p in part]), threads, SLICE_BYTES)
        alone = runner_of_candidate(layers, threads, SLICE_BYTES)
        inputs = {value.name for value in layers.graph.inputs}
        for feeds in calibration.batches(rows, limit):
            expected = run_reference(first, [feeds])[0]
            found = run_candidate(second, [feeds])[0]
            given = {name: array for name, array in feeds.items() if name in inputs}
            for name, pair in needs.items():
                with np.errstate(over="ignore"):  # what does not fit a shorter type is an error of the layer to report
                    given[name] = expected[pair.name].astype(_type_in_b(pair), copy=False)
            made = _run_layers(alone, given)
            for pair in part:
                name = str(pair.b.name)
                yield Seen(pair, expected[pair.name], found[name], made[name])


def _run_layers(alone: Runner, given: Mapping[str, Array]) -> dict[str, Array]:
    try:
        return alone.run_all([given])[0]
    except ModelError as error:
        raise VerificationError(
            f"a layer of the second model does not run on the first one's values: {error.what}", where=error.where
        ) from error


def _type_in_b(pair: Pair) -> np.dtype[Any]:
    """The type of a tensor in B; where inference does not know it, that of A."""
    dtype = pair.b.dtype or pair.a.dtype or ir.DataType.FLOAT
    return np.dtype(dtype.numpy())


class _Cut:
    """The second model cut at the matched tensors."""

    def __init__(self, b: ir.Model, pairs: Sequence[Pair], sizes: Mapping[Pair, tuple[Size, Size]]) -> None:
        self._model = b.clone()
        graph = self._model.graph
        graph.outputs.clear()
        values = {v.name: v for node in graph for v in node.outputs}
        names = Names(self._model)
        self._fed: dict[str, Pair] = {}
        for pair in pairs:
            kind = ir.TensorType(ir.DataType.from_numpy(_type_in_b(pair)))
            name = names.fresh(f"{pair.b.name}_of_a")
            fed = ir.Value(name=name, type=kind, shape=ir.Shape([None] * len(sizes[pair][1].shape)))
            values[pair.b.name].replace_all_uses_with(fed)
            graph.inputs.append(fed)
            self._fed[name] = pair

    def model(self, part: Sequence[Pair]) -> tuple[ir.Model, dict[str, Pair]]:
        """The layers that compute some of the tensors, and whose value of A each of its new inputs takes."""
        made = submodel(self._model, [str(pair.b.name) for pair in part])
        used = [value for value in made.graph.inputs if value.uses() or value.is_initializer()]
        made.graph.inputs.clear()
        made.graph.inputs.extend(used)
        return made, {str(v.name): self._fed[str(v.name)] for v in used if v.name in self._fed}


def _parts(pairs: Sequence[Pair], each: Mapping[Pair, int], budget: int) -> Iterator[list[Pair]]:
    """Runs of consecutive tensors of at most `budget` bytes a sample, or of one tensor."""
    part: list[Pair] = []
    for pair in pairs:
        if part and sum(each[p] for p in part) + each[pair] > budget:
            yield part
            part = []
        part.append(pair)
    if part:
        yield part
