"""Intermediate tensors of a model on calibration data, streamed batch by batch in bounded memory.

The tensors are made outputs of a copy of the graph that is cut behind them (nodes that none of them needs are dropped:
early layers cost only their part of the forward pass). When one batch of all tensors would not fit in `slice_bytes`,
they are taken in slices, one pass over the data each: one session is alive at a time, so memory is that of one model
and one slice. Sizes come from inferred shapes, and where those are unknown from a trial on one sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from graphopt.errors import ModelError

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphopt.calibration import Calibration
    from graphopt.data.feeds import Array

Mapped = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]
"""`map`, or something that does the same."""

SLICE_BYTES = 256 << 20
TRIAL_TENSORS = 32
"""Tensors of unknown size that one trial session reads at once."""


def activations(
    model: ir.Model,
    names: Sequence[str | tuple[str, ...]],
    calibration: Calibration,
    *,
    batch_size: int | None = None,
    limit: int | None = None,
    slice_bytes: int = SLICE_BYTES,
    threads: int = 1,
    run: Mapped = map,
) -> Iterator[dict[str, Array]]:
    """Stream tensors of the main graph.

    Args:
        model: is not changed.
        names: tensors: intermediate ones, graph inputs and outputs, initialisers. A tuple of names is kept in one
            slice, so that its tensors come together.
        calibration: the data.
        batch_size: samples a call; lowered where a single tensor's batch would exceed `slice_bytes`.
        limit: samples to use.
        slice_bytes: memory for the tensors of one batch.
        threads: of ONNX Runtime.
        run: carries out a function on batch after batch, in order; `graphopt.parallel.Workers.map` runs several batches
            at once, each on `threads` threads.

    Yields:
        the tensors of one slice for one batch. Every tensor comes once per batch, batches in order; with more than one
        slice the data is passed several times, slice by slice.

    Raises:
        ModelError: there is no tensor of that name in the main graph.
    """
    groups = [(n,) if isinstance(n, str) else tuple(n) for n in names]
    every = list(dict.fromkeys(n for g in groups for n in g))
    _check(model, every)
    if not every:
        return
    size = calibration.batch_size if batch_size is None else batch_size
    bytes_each = _bytes_per_sample(model, every, calibration, threads)
    for part in _slices(groups, bytes_each, slice_bytes // size):
        per_sample = sum(bytes_each[n] for n in part)
        rows = max(1, min(size, slice_bytes // max(1, per_sample)))
        tap = _Tap(model, part, threads)
        yield from run(tap.run, calibration.batches(rows, limit))


def paired_activations(
    pairs: Sequence[tuple[ir.Model, Sequence[str]]],
    calibration: Calibration,
    *,
    batch_size: int | None = None,
    limit: int | None = None,
    threads: int = 1,
) -> Iterator[tuple[dict[str, Array], ...]]:
    """Stream tensors of several models with the same inputs, side by side on the same batches.

    Args:
        pairs: models (not changed) and the tensors wanted of each; not sliced: all tensors of a batch are in memory.
        calibration: the data.
        batch_size: samples a call.
        limit: samples to use.
        threads: of ONNX Runtime.

    Yields:
        for each batch one mapping per model.

    Raises:
        ModelError: there is no tensor of that name in the main graph.
    """
    taps = []
    for model, names in pairs:
        _check(model, names)
        taps.append(_Tap(model, names, threads))
    for feeds in calibration.batches(batch_size, limit):
        yield tuple(tap.run(feeds) for tap in taps)


class _Tap:
    """A session on the part of a model that some tensors need."""

    def __init__(self, model: ir.Model, names: Sequence[str], threads: int) -> None:
        from graphopt.executor import Session

        inputs = {v.name for v in model.graph.inputs}
        self._inputs = [n for n in names if n in inputs]
        self._constants = {}
        computed = []
        for name in names:
            if name in inputs:
                continue
            if name in model.graph.initializers:
                value = model.graph.initializers[name].const_value
                if value is None:
                    raise ModelError("initialiser has no value", where=name, hint="load the model with its data")
                self._constants[name] = value.numpy()
            else:
                computed.append(name)
        self._session: Any = None
        if computed:
            # optimised: statistics need no bitwise equality, and convolutions run several times faster
            self._session = Session(submodel(model, computed), optimize=True, threads=threads)

    def run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        out = {n: feeds[n] for n in self._inputs} | self._constants
        return out if self._session is None else out | self._session.run(feeds)


def submodel(model: ir.Model, outputs: Sequence[str]) -> ir.Model:
    """A copy of the model with these tensors as its only outputs, and only the nodes that they need.

    Weights are shared, inputs stay (unused ones too). Tensors must be computed by nodes of the main graph.
    """
    from graphopt.slicing import reads_of

    copy = model.clone()
    graph = copy.graph
    values = {v.name: v for node in graph for v in node.outputs}
    wanted = [values[n] for n in outputs]
    graph.outputs.clear()
    graph.outputs.extend(wanted)
    needed: set[ir.Node] = set()
    stack = [p for v in wanted if (p := v.producer()) is not None]
    while stack:
        node = stack.pop()
        if node in needed:
            continue
        needed.add(node)
        stack += [p for v in reads_of(node) if (p := v.producer()) is not None and p.graph is graph]
    graph.remove([n for n in graph if n not in needed], safe=True)
    read = {v for node in needed for v in reads_of(node)}
    for name, value in list(graph.initializers.items()):
        if value not in read and not value.is_graph_input():
            del graph.initializers[name]
    return copy


def _check(model: ir.Model, names: Sequence[str]) -> None:
    known = {v.name for node in model.graph for v in node.outputs} | set(model.graph.initializers)
    known |= {v.name for v in model.graph.inputs}
    for name in names:
        if not name or name not in known:
            raise ModelError(
                "there is no such tensor in the main graph",
                where=repr(name),
                hint="take names of node outputs; tensors inside If, Loop and Scan bodies cannot be streamed",
            )


def _slices(groups: list[tuple[str, ...]], sizes: dict[str, int], budget: int) -> Iterator[list[str]]:
    """Groups packed in order into slices of at most `budget` bytes a sample (or one group)."""
    part: dict[str, None] = {}
    used = 0
    for group in groups:
        new = [n for n in dict.fromkeys(group) if n not in part]
        size = sum(sizes[n] for n in new)
        if part and used + size > budget:
            yield list(part)
            part, used = {}, 0
            new = list(dict.fromkeys(group))
            size = sum(sizes[n] for n in new)
        part.update(dict.fromkeys(new))
        used += size
    if part:
        yield list(part)


def _bytes_per_sample(model: ir.Model, names: list[str], calibration: Calibration, threads: int) -> dict[str, int]:
    """Bytes of each tensor per sample: from its shape, else measured."""
    batch = {v.shape[0].value for v in model.graph.inputs if v.shape and not isinstance(v.shape[0], int)} - {None}
    values = {v.name: v for node in model.graph for v in node.outputs}
    values.update({v.name: v for v in model.graph.inputs})
    values.update(model.graph.initializers)
    sizes: dict[str, int] = {}
    for name in names:
        value = values[name]
        dims = None if value.shape is None else list(value.shape)
        # any free axis but the batch makes the size unknown
        if dims and not isinstance(dims[0], int) and dims[0].value in batch:
            dims[0] = 1
        if dims is not None and value.dtype is not None and all(isinstance(d, int) for d in dims):
            elements = int(np.prod([int(d) for d in dims if isinstance(d, int)], dtype=np.int64))
            sizes[name] = elements * max(1, value.dtype.itemsize.__ceil__())
    unknown = [n for n in names if n not in sizes]
    for start in range(0, len(unknown), TRIAL_TENSORS):
        part = unknown[start : start + TRIAL_TENSORS]
        tap = _Tap(model, part, threads)
        feeds, count = next(calibration.counted(1, 1))
        sizes.update({n: -(-a.nbytes // count) for n, a in tap.run(feeds).items()})
    return sizes
