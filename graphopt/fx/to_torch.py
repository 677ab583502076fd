"""`graphopt.to_torch`: an ONNX model becomes a trainable torch module, and its trained weights go back.

Every node becomes one call of a function of `graphopt.fx.operators`; stored float tensors become parameters under
their ONNX names, all else buffers. The graph of the ONNX model stays what it is: what comes back from training are
weights (`update_weights`), so that names, shapes and nodes are exactly those that went out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from graphopt.analysis import shapes
from graphopt.errors import ModelError
from graphopt.fx.extra import require_torch
from graphopt.fx.names import onnx_name, torch_names

if TYPE_CHECKING:
    import torch

    from graphopt.fx.operators import Operator

_SHOWN = 12
"""Refused nodes that an error names one by one."""


def to_torch(model: ir.Model) -> torch.fx.GraphModule:
    """Make a torch module of an ONNX model; it computes the same, with gradients.

    Inputs are taken by position or by name, one output is returned as it is and several as a tuple, in the model's
    order. Float tensors that operators weight their data with are parameters; statistics of normalisations, scales of
    quantisation, sizes, single numbers and tensors that hold infinities are buffers. Symbolic sizes stay free. No
    gradient passes QuantizeLinear.

    Args:
        model: the model; not changed, its weights are copied.

    Raises:
        MissingBackendError: torch is not installed.
        ModelError: operators that are not covered; names all the nodes.
    """
    require_torch("to_torch")
    from graphopt.pipeline.clone import private_clone

    copy = private_clone(model)
    if copy.functions:
        from onnx_ir.passes.common import InlinePass

        InlinePass()(copy)
    operators = _operators(copy)
    return _module(copy, operators)


def uncovered(model: ir.Model) -> list[str]:
    """One line for every node of the main graph that `to_torch` refuses; empty where it takes the model.

    Raises:
        MissingBackendError: torch is not installed.
    """
    require_torch("to_torch")
    lines = []
    for node in model.graph:
        found = _covered(node)
        if isinstance(found, str):
            lines.append(f"{node.name or node.outputs[0].name} ({found})")
    return lines


def update_weights(model: ir.Model, module: torch.nn.Module) -> int:
    """Write the parameters and buffers of a module that `to_torch` made of this model back, in place.

    Names, nodes and types stay; only tensors whose values differ are replaced.

    Args:
        model: the model that the module was made of.
        module: the module, trained.

    Returns:
        How many tensors changed.

    Raises:
        ModelError: a tensor that the model does not have, or with another shape.
    """
    require_torch("update_weights")
    from graphopt.fx.from_torch import as_array

    values = _stored(model)
    changed = 0
    for key, tensor in module.state_dict().items():
        name = onnx_name(key)
        value = values.get(name)
        if value is None:
            raise ModelError("the model has no such tensor", where=name, hint="give the model the module was made of")
        old = shapes.constant_tensor(value)
        assert old is not None
        array = as_array(tensor)
        if tuple(old.shape.numpy()) != array.shape:
            raise ModelError(
                f"its shape is {list(old.shape.numpy())} and the module's {list(array.shape)}",
                where=name,
                hint="give the model the module was made of",
            )
        before = old.numpy()
        if not np.array_equal(before, array.astype(before.dtype)):
            shapes.set_constant(value, array.astype(before.dtype))
            changed += 1
    return changed


def _stored(model: ir.Model) -> dict[str, ir.Value]:
    """Initializers and outputs of Constant nodes, by name."""
    found = {name: value for name, value in model.graph.initializers.items() if value.const_value is not None}
    constants = [node.outputs[0] for node in model.graph if shapes.constant_tensor(node.outputs[0]) is not None]
    return found | {value.name or "": value for value in constants}


def _covered(node: ir.Node) -> Operator | str | None:
    """The row of the table for a node, or why there is none; None for a Constant."""
    from graphopt.fx.operators import find
    from graphopt.fx.operators.common import torch_type

    if shapes.constant_tensor(node.outputs[0]) is not None:
        return None
    op = f"{node.domain}::{node.op_type}" if node.domain not in {"", "ai.onnx"} else node.op_type
    row = find(node.domain, node.op_type, shapes.opset(node))
    if row is None:
        return op
    used = [i for i, v in enumerate(node.outputs) if v.uses() or v.is_graph_output()]
    reason = row.refusal([a for a in node.attributes if not a.startswith("_")], max(used, default=0) + 1)
    if reason is None and node.op_type == "Cast" and torch_type(node.attributes.get_int("to", 0)) is None:
        reason = "a type that torch lacks"
    return f"{op}: {reason}" if reason else row


def _operators(model: ir.Model) -> dict[ir.Node, Operator]:
    """The operator of every node.

    Raises:
        ModelError: some are not covered.
    """
    lines = uncovered(model)
    if lines:
        more = f" and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
        raise ModelError(
            f"to_torch does not cover {len(lines)} of {len(model.graph)} nodes: {', '.join(lines[:_SHOWN])}{more}",
            hint="fold the model first (bodies of a constant If vanish), or see docs/extending.md for an operator",
        )
    found = {node: _covered(node) for node in model.graph}
    return {node: row for node, row in found.items() if row is not None and not isinstance(row, str)}


def _module(model: ir.Model, operators: Mapping[ir.Node, Operator]) -> torch.fx.GraphModule:
    import torch

    stored = {name: value for name, value in _stored(model).items() if value.uses() or value.is_graph_output()}
    names = torch_names(stored, dir(torch.fx.GraphModule(torch.nn.Module(), torch.fx.Graph())))
    root = torch.nn.Module()
    for name, value in stored.items():
        _attach(root, names[name], value, trained=_trained(value, operators))
    graph = torch.fx.Graph()
    places: dict[ir.Value, torch.fx.Node] = {}
    held = {value: name for name, value in stored.items()}
    # initializers that are listed as inputs, used or not, are no inputs of the module
    inputs = [value for value in model.graph.inputs if not value.is_initializer()]
    for value in inputs:
        places[value] = graph.placeholder(_identifier(value.name or "input"))

    def place(value: ir.Value | None) -> Any:
        if value is None:
            return None
        if value not in places:
            with graph.inserting_after(last_input(graph)):
                places[value] = graph.get_attr(names[held[value]])
        return places[value]

    for node, row in operators.items():
        arguments = [place(value) for value in node.inputs]
        while arguments and arguments[-1] is None:
            arguments.pop()
        attributes = {a.name: _plain(a) for a in node.attributes.values() if a.name in row.attributes}
        if row.outputs is None:
            attributes["outputs"] = len(node.outputs)
        call = graph.create_node("call_function", row.function, tuple(arguments), attributes, _identifier(_label(node)))
        for index, value in enumerate(node.outputs):
            if row.outputs == 1:
                places[value] = call
            elif value.uses() or value.is_graph_output():
                places[value] = graph.call_function(_item, (call, index))
    results = tuple(place(value) for value in model.graph.outputs)
    graph.output(results[0] if len(results) == 1 else results)
    graph.lint()
    module = torch.fx.GraphModule(root, graph, class_name="OnnxModule")
    module.meta["inputs"] = [v.name for v in inputs]
    module.meta["outputs"] = [v.name for v in model.graph.outputs]
    return module


def last_input(graph: torch.fx.Graph) -> torch.fx.Node:
    """The last node of the inputs and stored tensors at the head of a graph; its root where there is none."""
    last = graph._root
    for node in graph.nodes:
        if node.op not in {"placeholder", "get_attr"}:
            break
        last = node
    return last


def _item(values: Sequence[Any], index: int) -> Any:
    """One output of several."""
    return values[index]


def _label(node: ir.Node) -> str:
    return node.outputs[0].name or node.name or node.op_type


def _identifier(name: str) -> str:
    """A name that may stand in Python code; torch makes it unique."""
    clean = "".join(letter if letter.isalnum() and letter.isascii() else "_" for letter in name) or "_"
    return clean if not clean[0].isdigit() else f"_{clean}"


def _plain(attribute: ir.Attr) -> Any:
    """The value of an attribute as Python has it."""
    if attribute.type == ir.AttributeType.STRING:
        return attribute.as_string()
    if attribute.type == ir.AttributeType.STRINGS:
        return list(attribute.as_strings())
    if attribute.type in {ir.AttributeType.INTS, ir.AttributeType.FLOATS}:
        return list(attribute.value)
    if attribute.type == ir.AttributeType.TENSOR:
        from graphopt.fx.operators.common import needed_type

        tensor = attribute.as_tensor()
        return tensor.numpy().reshape(-1).tolist(), needed_type(int(tensor.dtype))
    return attribute.value


def _trained(value: ir.Value, operators: Mapping[ir.Node, Operator]) -> bool:
    """Whether a stored tensor is a parameter: float, finite, no single number, and read by something to weight data."""
    tensor = shapes.constant_tensor(value)
    if tensor is None or not tensor.dtype.is_floating_point() or tensor.dtype.bitwidth < 16:
        return False
    if any(use.idx in operators[use.node].fixed for use in value.uses() if use.node in operators):
        return False
    return len(tensor.shape) > 0 and bool(np.isfinite(tensor.numpy().astype(np.float32)).all())


def _attach(root: torch.nn.Module, name: str, value: ir.Value, *, trained: bool) -> None:
    import torch

    from graphopt.fx.from_torch import as_tensor
    from graphopt.fx.operators.common import needed_type

    tensor = shapes.constant_tensor(value)
    assert tensor is not None
    data = as_tensor(np.array(tensor.numpy())).to(needed_type(int(tensor.dtype)))
    module = root
    *folders, leaf = name.split(".")
    for folder in folders:
        if folder not in module._modules:
            module.add_module(folder, torch.nn.Module())
        module = module.get_submodule(folder)
    if trained:
        module.register_parameter(leaf, torch.nn.Parameter(data))
    else:
        module.register_buffer(leaf, data)
