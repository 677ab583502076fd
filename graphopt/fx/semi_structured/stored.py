"""What a graph of `to_torch` has stored: tensors, and whatever is computed from stored tensors alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphopt.fx.operators import find


def function_of(operator: str, domain: str = "") -> Any:
    """The function that stands for an ONNX operator in such graphs."""
    row = find(domain, operator, 21)
    assert row is not None
    return row.function


class Stored:
    """Stored values of a module's graph, evaluated when first asked for.

    Args:
        module: made by `to_torch`.
    """

    def __init__(self, module: torch.fx.GraphModule) -> None:
        self._module = module
        self._found: dict[torch.fx.Node, bool] = {}

    def holds(self, node: Any) -> bool:
        """Whether the value of a node is the same whatever the inputs are."""
        if not isinstance(node, torch.fx.Node):
            return False
        if node not in self._found:
            made = node.op == "call_function" and bool(node.all_input_nodes)
            self._found[node] = node.op == "get_attr" or (made and all(self.holds(n) for n in node.all_input_nodes))
        return self._found[node]

    def value(self, node: Any) -> Tensor | None:
        """The stored tensor of a node; None where it has none."""
        if not self.holds(node):
            return None
        with torch.no_grad():
            found = self._evaluate(node)
        return found.detach() if isinstance(found, Tensor) else None

    def name(self, node: torch.fx.Node) -> str:
        """The name of the first tensor that the value of a node is made of, for people."""
        from graphopt.fx.names import onnx_name

        while node.op != "get_attr":
            node = node.all_input_nodes[0]
        return onnx_name(str(node.target))

    def _evaluate(self, node: torch.fx.Node) -> Any:
        if node.op == "get_attr":
            found: Any = self._module
            for part in str(node.target).split("."):
                found = getattr(found, part)
            return found
        arguments, named = torch.fx.map_arg((node.args, node.kwargs), self._evaluate)
        return node.target(*arguments, **named)
