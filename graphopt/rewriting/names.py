"""Names that are still free; derived from the old ones only, so that equal input gives equal output."""

from __future__ import annotations

import onnx_ir as ir

from graphopt.rewriting.scopes import scopes


class Names:
    """All names of values and nodes in a model, and new ones that clash with none of them.

    Args:
        model: the model.
        later: collect the names when the first new one is asked for: most runs of most passes need none. Only where
            nothing is taken out of the graph under its name to be put back later.
    """

    def __init__(self, model: ir.Model, *, later: bool = False) -> None:
        self._model = model
        self._taken: set[str] | None = None if later else _all_names(model)

    def fresh(self, wanted: str) -> str:
        """`wanted`, or `wanted_1`, `wanted_2`, ... where it is taken."""
        if self._taken is None:
            self._taken = _all_names(self._model)
        name, count = wanted, 0
        while name in self._taken:
            count += 1
            name = f"{wanted}_{count}"
        self._taken.add(name)
        return name


def _all_names(model: ir.Model) -> set[str]:
    names: set[str | None] = set()
    for graph, _ in scopes(model):
        names.update(value.name for value in graph.inputs)
        names.update(value.name for value in graph.initializers.values())
        for node in graph:
            names.add(node.name)
            names.update([value.name for value in node.outputs])
    return {name for name in names if name}
