"""strip-metadata: what exporters note about how they made a graph: stack traces, traced calls, classes of modules.

Nothing of it says what the model computes, and on a small model it takes a third of the file. What may mean something
to whoever runs the model stays: documentation and properties of the model, of its inputs and outputs, and the
provenance that passes write (`graphopt.*`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphopt.base import Context, Effect, Pass, PassResult
from graphopt.rewriting.scopes import scopes

_PREFIXES = ("pkg.torch.", "pkg.onnxscript.")
_KEYS = frozenset({"namespace"})
"""torch's exporter names the modules around a node once more under this key."""


@dataclass(frozen=True)
class StripMetadata(Pass):
    """Remove what exporters note on nodes, tensors and graphs for debugging the export, and documentation of nodes.

    Algebra: none; no runtime reads it. Does not fire: on properties and documentation of the model, of graphs, inputs
    and outputs, on names, on keys that no exporter is known to write. Preserves: names and provenance.
    """

    name: ClassVar[str] = "strip-metadata"
    effect: ClassVar[Effect] = Effect.EXACT

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Look at every node, tensor and graph."""
        freed = sum(_strip(holder.metadata_props) for holder in _holders(model))
        for graph, _ in scopes(model):
            for node in graph:
                freed += len(node.doc_string or "")
                node.doc_string = None
        notes = [f"about {freed} bytes of notes of the exporter removed"] if freed else []
        return PassResult(changed=freed > 0, notes=notes)


def _holders(model: ir.Model) -> Iterator[ir.Graph | ir.Function | ir.Node | ir.Value]:
    yield from model.functions.values()
    for graph, _ in scopes(model):
        yield graph
        yield from graph.inputs
        yield from graph.initializers.values()
        for node in graph:
            yield node
            yield from node.outputs


def _strip(properties: dict[str, str]) -> int:
    """Remove an exporter's entries; how many bytes they were."""
    found = [key for key in properties if key in _KEYS or key.startswith(_PREFIXES)]
    return sum(len(key) + len(properties.pop(key)) for key in found)
