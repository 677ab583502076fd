"""What of a module's graph is known once the sizes of its inputs are: sizes, and what is computed from stored tensors.

Such values are computed once and stored, with a copy on the host from which operators read sizes. What is left runs
without a word between host and device, which is what a recorded graph of kernels needs, and with fewer kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphopt.fx.semi_structured.stored import function_of

HOST_ELEMENTS = 4096
"""Tensors up to this size are copied to the host: sizes, scales and axes are small."""


def with_known_sizes(module: torch.fx.GraphModule, inputs: tuple[Tensor, ...]) -> torch.fx.GraphModule:
    """The same module for inputs of the sizes of these; it shares the weights.

    Args:
        module: made by `lower`; not changed.
        inputs: run once, on the device of the module.
    """
    run = _Run(module)
    run.run(*inputs)
    graph = torch.fx.Graph()
    places: dict[torch.fx.Node, torch.fx.Node] = {}
    tensors: dict[str, Any] = {}
    for node in module.graph.nodes:
        if node in run.known:
            continue
        for source in node.all_input_nodes:
            if source in run.known and source not in places:
                name = f"known_{len(places)}"
                tensors[name] = _readable(run.known[source])
                places[source] = graph.get_attr(name)
        places[node] = graph.node_copy(node, places.__getitem__)
        if node.op in {"get_attr", "call_module"}:
            tensors[str(node.target)] = _attribute(module, str(node.target))
    graph.lint()
    return torch.fx.GraphModule(tensors, graph, class_name="SizedModule")


class _Run(torch.fx.Interpreter):  # type: ignore[misc]
    """One run that keeps what does not depend on the values of the inputs."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module)
        self.known: dict[torch.fx.Node, Any] = {}
        self._sizes = {function_of("Shape"), function_of("Size")}

    def run_node(self, node: torch.fx.Node) -> Any:
        """See torch."""
        result = super().run_node(node)
        if node.op == "get_attr":
            known = not isinstance(result, torch.nn.Parameter)
        elif node.op == "call_function":
            before = node.all_input_nodes
            known = node.target in self._sizes or (bool(before) and all(source in self.known for source in before))
        else:
            known = False
        if known:
            self.known[node] = result
        return result


def _readable(value: Any) -> Any:
    if isinstance(value, Tensor) and value.numel() <= HOST_ELEMENTS:
        value = value.detach().clone()
        value.on_host = value.cpu()
    return value


def _attribute(module: torch.fx.GraphModule, target: str) -> Any:
    found: Any = module
    for part in target.split("."):
        found = getattr(found, part)
    return found
