"""dedupe-initializers: equal tensors are stored once.

Equal means the same dtype, shape and bits (so 0.0 and -0.0 differ, and NaN equals the same NaN). A few bytes are
sampled first, so that the weights of a large memory-mapped model are read only where they probably are equal.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.base import Context, Effect, Pass, PassResult, Skip
from graphopt.rewriting.nodes import mark_origin
from graphopt.rewriting.scopes import bodies, graphs

_SAMPLES = 64
_CHUNK = 1 << 24


@dataclass(frozen=True)
class DedupeInitializers(Pass):
    """Store equal initializers once; a body also uses an equal one of the graphs around it.

    Does not fire: on initializers that are graph inputs or outputs; on floating-point tensors of several elements that
    are all the same number (zero biases, unit scales): their equality says nothing, saves little, and sharing one
    between layers would keep later passes from changing a layer by itself.
    Preserves: the name of the first of the equal ones.
    """

    name: ClassVar[str] = "dedupe-initializers"
    effect: ClassVar[Effect] = Effect.EXACT

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Deduplicate in the main graph and all bodies."""
        by_form: dict[Any, list[ir.Value]] = defaultdict(list)
        around: dict[ir.Graph, ir.Graph] = {}
        for graph in graphs(model):
            around.update((body, graph) for node in graph for body in bodies(node))
            for value in graph.initializers.values():
                tensor = value.const_value
                if tensor is None or value.is_graph_input() or tensor.dtype == ir.DataType.STRING:
                    continue
                by_form[(tensor.dtype, tuple(tensor.shape))].append(value)
        result = PassResult(changed=False)
        count = saved = 0
        for values in by_form.values():
            for group in _equal(values):
                for value in group[1:]:
                    first = next((f for f in group if f is not value and _visible(f, value, around)), None)
                    if value.is_graph_output() or first is None or value.graph is None or first.graph is None:
                        where = "an output of its graph" if value.is_graph_output() else "of a body beside the other"
                        result.skipped.append(Skip(str(value.name), f"equal to another initializer, but {where}"))
                        continue
                    if value.const_value is not None:
                        saved += value.const_value.nbytes
                    value.replace_all_uses_with(first)
                    value.graph.initializers.pop(str(value.name))
                    mark_origin(first, [str(value.name)])
                    count += 1
        if count:
            result.changed = True
            result.notes.append(f"{count} duplicate initializers removed ({saved} bytes)")
        return result


def _visible(first: ir.Value, other: ir.Value, around: dict[ir.Graph, ir.Graph]) -> bool:
    """True if the graph of `first` is the graph of `other` or one around it."""
    graph = other.graph
    while graph is not None:
        if graph is first.graph:
            return True
        graph = around.get(graph)
    return False


def _equal(values: list[ir.Value]) -> list[list[ir.Value]]:
    """Groups of two or more values whose tensors have equal bits, in the order given."""
    if len(values) < 2:
        return []
    groups: dict[bytes, list[ir.Value]] = defaultdict(list)
    for value in values:
        groups[_sample(_bits(value))].append(value)
    found: dict[tuple[bytes, bytes], list[ir.Value]] = defaultdict(list)
    for sample, candidates in groups.items():
        if len(candidates) < 2:
            continue
        for value in candidates:
            if not _coincidence(value):
                found[(sample, _digest(_bits(value)))].append(value)
    return [group for group in found.values() if len(group) > 1]


def _bits(value: ir.Value) -> npt.NDArray[np.uint8]:
    assert value.const_value is not None  # the caller filters
    return np.ascontiguousarray(value.const_value.numpy()).reshape(-1).view(np.uint8)


def _sample(bits: npt.NDArray[np.uint8]) -> bytes:
    return bits[:: max(1, bits.size // _SAMPLES)].tobytes()


def _digest(bits: npt.NDArray[np.uint8]) -> bytes:
    digest = hashlib.sha256()
    for start in range(0, bits.size, _CHUNK):
        digest.update(bits[start : start + _CHUNK].data)
    return digest.digest()


def _coincidence(value: ir.Value) -> bool:
    tensor = value.const_value
    if tensor is None or not tensor.dtype.is_floating_point() or tensor.size < 2:
        return False
    data = tensor.numpy().reshape(-1)
    return bool((data == data[0]).all())
