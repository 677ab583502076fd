"""A model run piece by piece over a data stream, with the pieces that are behind never run again.

A `Walk` stands at a cut of the graph: a place in the topological order. It holds, batch by batch, the tensors that
cross the cut, so `stream` runs only the nodes between the cut and the tensors asked for. `advance` moves the cut
forward. Where what crosses would not fit into the memory allowed, the cut stays where it is, and later calls run more
nodes: slower, never wrong. This is what makes layer-by-layer work over a deep network linear instead of quadratic in
its depth. Weights may change between calls, but only of nodes that are not behind the cut.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from graphopt.data.feeds import Call
from graphopt.errors import ModelError

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphopt.calibration import Calibration
    from graphopt.data.activations import Mapped
    from graphopt.data.feeds import Array
    from graphopt.executor import Session

MEMORY = 512 << 20
"""Bytes that one walk may hold."""


class Walk:
    """A cut through a model, moving forward.

    Args:
        model: in topological order; its nodes must stay the same while the walk lasts, its weights may change.
        calibration: the data.
        memory: bytes of tensors to hold.
        limit: samples to use.
        batch_size: samples a call; None: the data's own.
        threads: of ONNX Runtime.
        run: as for `graphopt.data.activations.activations`.
    """

    def __init__(
        self,
        model: ir.Model,
        calibration: Calibration,
        *,
        memory: int = MEMORY,
        limit: int | None = None,
        batch_size: int | None = None,
        threads: int = 1,
        run: Mapped = map,
    ) -> None:
        self._model = model
        self._run = run
        self._calibration = calibration
        self._memory, self._limit, self._threads = memory, limit, threads
        self._batch_size = batch_size
        self._nodes = list(model.graph)
        self._place = {node: i for i, node in enumerate(self._nodes)}
        self._made = {v.name: v for node in self._nodes for v in node.outputs if v.name}
        self._cut = 0
        self._held: list[dict[str, Array]] | None = None  # None: the cut is at the inputs

    def stream(self, names: Sequence[str]) -> Iterator[dict[str, Array]]:
        """The tensors of these names, batch by batch.

        Raises:
            ModelError: a tensor lies behind the cut and does not cross it, or is not in the main graph.
        """
        with _Part(self, names) as part:
            yield from self._run(part.run, self._batches())

    def passed(self, node: ir.Node) -> bool:
        """Whether a node is behind the cut: it will not run again."""
        return self._place[node] < self._cut

    def advance(self, node: ir.Node) -> bool:
        """Move the cut behind `node`; False where what crosses there does not fit, or the cut is there already."""
        cut = self._place[node] + 1
        if cut <= self._cut:
            return False
        crossing = self._crossing(cut)
        held: list[dict[str, Array]] = []
        batches = list(self._batches()) if self._held is not None else None
        with _Part(self, crossing, until=cut) as part:
            total = 0
            found_by_batch = self._run(part.run, batches if batches is not None else self._batches())
            for number, found in enumerate(found_by_batch):
                total += sum(a.nbytes for a in found.values())
                if batches is not None and number == 0 and total * len(batches) > self._memory:
                    return False
                if total > self._memory:
                    return False
                held.append(found)
        self._cut, self._held = cut, held
        return True

    def _batches(self) -> Iterator[Mapping[str, Array]]:
        if self._held is None:
            yield from self._calibration.batches(self._batch_size, self._limit)
        else:
            yield from self._held

    def _crossing(self, cut: int) -> list[str]:
        """Tensors that nodes from `cut` on read and earlier nodes, or the caller, make."""
        from graphopt.slicing import reads_of

        crossing: dict[str, None] = {}
        fed = {v.name for v in self._model.graph.inputs if v.name not in self._model.graph.initializers}
        for node in self._nodes[cut:]:
            for value in reads_of(node):
                producer = value.producer()
                inside = producer is not None and self._place.get(producer, cut) < cut
                if value.name and (inside or value.name in fed):
                    crossing[value.name] = None
        return list(crossing)

    def needed(self, names: Sequence[str]) -> tuple[list[ir.Node], list[ir.Value]]:
        """Nodes from the cut on that these tensors need, in order, and the tensors that cross the cut into them."""
        from graphopt.slicing import reads_of

        nodes: set[ir.Node] = set()
        reads: dict[ir.Value, None] = {}
        pending = [self._made[n] for n in names]
        while pending:
            value = pending.pop()
            producer = value.producer()
            place = -1 if producer is None else self._place.get(producer, -1)
            if value.const_value is not None and producer is None:
                continue
            if producer is None or place < self._cut:
                reads[value] = None
            elif producer not in nodes:
                nodes.add(producer)
                pending += reads_of(producer)
        return sorted(nodes, key=self._place.__getitem__), list(reads)


class _Part:
    """A session on the nodes between a cut and some tensors."""

    def __init__(self, walk: Walk, names: Sequence[str], until: int | None = None) -> None:
        self._walk = walk
        self._names = list(dict.fromkeys(names))
        self._session: Session | None = None
        self._opening = threading.Lock()

    def __enter__(self) -> _Part:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._session is not None:
            self._session.close()

    def run(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        """The tensors for one batch."""
        there = {n: batch[n] for n in self._names if n in batch}
        rest = [n for n in self._names if n not in there]
        if not rest:
            return there
        with self._opening:
            if self._session is None:
                self._session = self._open(rest, batch)
        read = [spec.name for spec in self._session.inputs]
        feeds = batch.only(read) if isinstance(batch, Call) else {name: batch[name] for name in read}
        return there | self._session.run(feeds)

    def _open(self, names: list[str], batch: Mapping[str, Array]) -> Session:
        import onnx_ir as ir

        from graphopt.executor import Session
        from graphopt.slicing import reads_of

        walk, model = self._walk, self._walk._model
        unknown = [n for n in names if n not in walk._made]
        if unknown:
            raise ModelError("there is no such tensor in the main graph", where=repr(unknown[0]))
        nodes, reads = walk.needed(names)
        lost = [v.name for v in reads if v.name not in batch]
        if lost:
            raise ModelError("the tensor lies behind the place that this walk has reached", where=repr(lost[0]))
        used = {v: None for node in nodes for v in reads_of(node) if v.const_value is not None and v.producer() is None}
        constants = [v for v in used if model.graph.initializers.get(v.name or "") is v]
        view = ir.GraphView(
            [*reads, *(v for v in constants if model.ir_version < 4)],
            [walk._made[n] for n in names],
            nodes=nodes,
            initializers=constants,
            opset_imports=model.graph.opset_imports,
            name=model.graph.name or "part",
        )
        graph = view.clone()
        for value in graph.inputs:
            actual = batch.get(value.name or "")
            if actual is not None:
                value.type = ir.TensorType(ir.DataType.from_numpy(actual.dtype))
                value.shape = ir.Shape([None] * np.ndim(actual))
        for value in graph.outputs:
            value.shape = None
        functions = [function.clone() for function in model.functions.values()]
        part = ir.Model(graph, ir_version=model.ir_version, functions=functions)
        return Session(part, optimize=True, threads=walk._threads)
