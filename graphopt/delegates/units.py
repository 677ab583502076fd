"""What a delegate takes or leaves as one: a node, or an operator with the Q and DQ around it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import numpy as np
import onnx_ir as ir

from graphopt.analysis import shapes
from graphopt.rewriting.constants import array
from graphopt.rewriting.nodes import is_onnx

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)

NOT_QUANTISED = {"Resize": (1, 2), "Upsample": (1,), "Clip": (1, 2), "Pad": (2,)}
"""Inputs by operator that are floats and yet no activations: they stay what they are in a quantised operator."""


@dataclass(frozen=True)
class Unit:
    """Nodes that go to a delegate together or not at all.

    Attributes:
        node: the operator.
        before: DequantizeLinear of its inputs; () for a node that stands alone.
        after: QuantizeLinear of its outputs, and before them a Relu or Clip that they make superfluous.
    """

    node: ir.Node
    before: tuple[ir.Node, ...] = ()
    after: tuple[ir.Node, ...] = ()

    @property
    def quantised(self) -> bool:
        """Whether it is an operator with the Q and DQ around it."""
        return bool(self.before)

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        """All of them, in the order of execution."""
        return (*self.before, self.node, *self.after)

    @property
    def op(self) -> str:
        """The operator as tables write it."""
        domain = self.node.domain
        return self.node.op_type if domain in ("", "ai.onnx") else f"{domain}:{self.node.op_type}"

    def operand(self, name: str) -> ir.Value | None:
        """An input or output by the standard's name or by its position; in a quantised unit the tensor of integers.

        None where the operator has none of this name, or the node leaves it out. Of a list of inputs ("inputs" of
        Concat): the first.
        """
        inputs, outputs = _names(self.node.op_type, self.node.domain, shapes.opset(self.node))
        index = int(name) if name.isdigit() else inputs.get(name)
        if index is not None:
            value = self.node.inputs[index] if index < len(self.node.inputs) else None
            made = value.producer() if value is not None else None
            return made.inputs[0] if made is not None and made in self.before else value
        if name not in outputs or outputs[name] >= len(self.node.outputs):
            return None
        value = self.node.outputs[outputs[name]]
        last = next((n for n in self.after if is_onnx(n, "QuantizeLinear")), None)
        return value if last is None else last.outputs[0]

    def parameters(self, name: str) -> tuple[np.ndarray | None, np.ndarray | None] | None:
        """Scale and zero point of an operand of a quantised unit; None where it has none."""
        value = self.operand(name)
        if value is None:
            return None
        for node in (*self.before, *self.after):
            at = node.inputs[0] if is_onnx(node, "DequantizeLinear") else node.outputs[0]
            if at is value and is_onnx(node, "DequantizeLinear", "QuantizeLinear"):
                return array(node.inputs[1]), array(node.inputs[2]) if len(node.inputs) > 2 else None
        return None


@cache
def _names(op: str, domain: str, version: int) -> tuple[dict[str, int], dict[str, int]]:
    """Positions of inputs and outputs by their names in the standard; none for an operator that is not in it."""
    import onnx

    try:
        schema = onnx.defs.get_schema(op, version, "" if domain == "ai.onnx" else domain)
    except onnx.defs.SchemaError:
        return {}, {}
    inputs = {entry.name: place for place, entry in enumerate(schema.inputs)}
    return inputs, {entry.name: place for place, entry in enumerate(schema.outputs)}


def units(graph: ir.Graph, *, groups: bool) -> list[Unit]:
    """The units of a graph in the order of execution; every node but Constants belongs to at least one.

    Args:
        graph: bodies of If, Loop and Scan belong to their node.
        groups: whether operators are taken with their Q and DQ, else each node stands alone.

    Returns:
        A DequantizeLinear that several operators read is in the group of each, as runtimes copy it for them.
    """
    nodes = [node for node in graph if not is_onnx(node, "Constant")]
    found = {node: _group(node) for node in nodes} if groups else {}
    made = {node: group for node, group in found.items() if group is not None}
    inside: set[ir.Node] = set()
    for group in made.values():
        inside |= {n for n in group.nodes if n is not group.node and _only_in(n, made)}
    kept = {node: group for node, group in made.items() if node not in inside}
    return [kept.get(node, Unit(node)) for node in nodes if node not in inside]


def _only_in(node: ir.Node, groups: dict[ir.Node, Unit]) -> bool:
    """Whether everybody who reads a DequantizeLinear is the operator of a group; true of what stands behind one."""
    if not is_onnx(node, "DequantizeLinear"):
        return True
    output = node.outputs[0]
    return not output.is_graph_output() and all(use.node in groups for use in output.uses())


def _group(node: ir.Node) -> Unit | None:
    """The operator with its Q and DQ, if all its float inputs and outputs have them."""
    if is_onnx(node, "QuantizeLinear", "DequantizeLinear") or not node.outputs:
        return None
    plain = NOT_QUANTISED.get(node.op_type, ())
    floats = [v for i, v in enumerate(node.inputs) if v is not None and i not in plain and v.dtype in FLOATS]
    before = [value.producer() for value in floats]
    if not before or not all(n is not None and is_onnx(n, "DequantizeLinear") for n in before):
        return None
    after: list[ir.Node] = []
    for output in node.outputs:
        readers = _quantisers(output)
        if readers is None:
            return None
        after += readers
    return Unit(node, tuple(dict.fromkeys(n for n in before if n is not None)), tuple(after)) if after else None


def _quantisers(value: ir.Value) -> list[ir.Node] | None:
    """The QuantizeLinear that alone read a value; a Relu or Clip between them that changes nothing comes with them."""
    if value.is_graph_output():
        return None
    readers = list(dict.fromkeys(use.node for use in value.uses()))
    if readers and all(is_onnx(n, "QuantizeLinear") and n.inputs[0] is value for n in readers):
        return readers
    if len(readers) == 1 and is_onnx(readers[0], "Relu", "Clip"):
        behind = list(dict.fromkeys(use.node for use in readers[0].outputs[0].uses()))
        quantise = all(is_onnx(n, "QuantizeLinear") for n in behind) and not readers[0].outputs[0].is_graph_output()
        if behind and quantise and all(_superfluous(readers[0], n) for n in behind):
            return [readers[0], *behind]
    return None if readers else []


def _superfluous(clip: ir.Node, quantise: ir.Node) -> bool:
    """Whether the range of a QuantizeLinear cuts off all that a Relu or Clip before it would."""
    scale = array(quantise.inputs[1])
    zero = array(quantise.inputs[2]) if len(quantise.inputs) > 2 else np.zeros((), np.uint8)
    if scale is None or zero is None or scale.size != 1 or zero.size != 1 or zero.dtype.kind not in "iu":
        return False
    limits = np.iinfo(zero.dtype)
    low, high = (float(scale.ravel()[0]) * (end - float(zero.ravel()[0])) for end in (limits.min, limits.max))
    if clip.op_type == "Relu":
        return low >= 0
    bounds = [array(clip.inputs[i]) if i < len(clip.inputs) else None for i in (1, 2)]
    least, most = (None if b is None or b.size != 1 else float(b.ravel()[0]) for b in bounds)
    return least is not None and most is not None and low >= least and high <= most


def parents(all_units: Iterable[Unit]) -> dict[Unit, list[Unit]]:
    """The units whose results a unit reads, in bodies too, each once."""
    listed = list(all_units)
    owner: dict[ir.Node, list[Unit]] = {}
    for unit in listed:
        for node in unit.nodes:
            owner.setdefault(node, []).append(unit)
    found: dict[Unit, list[Unit]] = {unit: [] for unit in listed}
    for unit in listed:
        for value in _read(unit):
            made = value.producer()
            for other in owner.get(made, ()) if made is not None else ():
                if other is not unit and made in other.nodes and made not in unit.nodes:
                    found[unit].append(other)
        found[unit] = list(dict.fromkeys(found[unit]))
    return found


def _read(unit: Unit) -> list[ir.Value]:
    from graphopt.rewriting.scopes import bodies

    values = [v for node in unit.nodes for v in node.inputs if v is not None]
    for node in unit.nodes:
        for body in bodies(node):
            values += [v for inner in body.all_nodes() for v in inner.inputs if v is not None]
    return values
