"""Formulas in a graph become the operators that they are.

A rule says which formulas an operator has (`graphopt.rewriting.match`) and how the operator is written where one was
found. Here is what all rules have in common: nothing else may read what is inside, the opset must have the operator in
the type at hand, the target must not run it slower than its parts, and the result keeps shape and name. Rules are tried
from the end of a graph to its start, so that a formula is met before the smaller ones that it consists of.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.base import PassResult, Skip
from graphopt.files.shape_inference import infer_shapes
from graphopt.rewriting.constants import allow_private_initializers, constant
from graphopt.rewriting.edit import drop_if_unused, new_initializer, remove_node, sole_use
from graphopt.rewriting.formulas import Pattern
from graphopt.rewriting.found import Found
from graphopt.rewriting.names import Names
from graphopt.rewriting.nodes import is_onnx, label, mark_origin
from graphopt.rewriting.scopes import scopes, settle_functions
from graphopt.rewriting.size import node_bytes
from graphopt.target import Target

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Written:
    """How an operator is written: its inputs, arrays as new constants in the type of the result, and its attributes."""

    inputs: tuple[ir.Value | Array, ...]
    attributes: Mapping[str, float | int | str]


Plan = Callable[[Found, ir.Value], Written | str | None]
"""From what was found and the value that is computed to the operator, or to the reason why it cannot be written; None:
with these numbers it is another formula."""


@dataclass(frozen=True)
class Rule:
    """An operator and its formulas.

    Attributes:
        operator: of the standard domain.
        since: opset from which on it has the meaning at hand.
        forms: its formulas, longest first; their `x` is what the operator reads.
        plan: how it is written.
        merges: the operator is written for two nodes and more; a formula that is one node alone is another operator's.
        single: whether it has numbers of its own or in attributes, which have the digits of float32.
        overflow: how the operator differs where a step of the formula overflows; "": it does not. Such a rule fires
            with `fast_math` only.
        slower: why the parts at hand are no slower than the operator, as runtimes fuse them otherwise; "": they are.
    """

    operator: str
    since: int
    forms: tuple[Pattern, ...]
    plan: Plan
    merges: bool = True
    single: bool = False
    overflow: str = ""
    slower: Callable[[Found, ir.Value], str] | None = None


def plain(**attributes: float | int | str) -> Plan:
    """The operator of `x` alone, with these attributes."""
    return lambda found, result: Written((found.values["x"],), attributes)


def recognise(
    model: ir.Model, rules: Sequence[Rule], target: Target, *, fast_math: bool = False, slow: bool = False
) -> PassResult:
    """Write the formulas of `rules` as operators, in place, in all bodies and functions.

    Args:
        model: the model; shapes are inferred.
        rules: what to look for; of two that match, the first.
        target: its `slow_operators` are not written.
        fast_math: let rules fire that differ where a step overflows.
        slow: write what the target runs slower than its parts, too.

    Returns:
        What was written, and for each formula that was found and left: why.
    """
    result = PassResult(changed=False)
    present = {node.op_type for graph, _ in scopes(model) for node in graph}
    by_root: dict[str, list[tuple[Rule, Pattern]]] = {}
    for rule in rules:
        for form in rule.forms:
            for op_type in form.operators() if form.needs() <= present else ():
                by_root.setdefault(op_type, []).append((rule, form))
    names: Names | None = None
    done = Counter[str]()
    for graph, opset in scopes(model):
        for node in reversed(tuple(graph)):
            if node.op_type not in by_root or node.graph is not graph or not is_onnx(node, node.op_type):
                continue
            candidates = by_root[node.op_type]
            if names is None:
                if not any(_matches(node, rule, form) for rule, form in candidates):
                    continue
                names = Names(model)
                know_shapes(model)
            writer = _Writer(graph, opset, names, target, fast_math, slow)
            reasons: dict[str, str] = {}
            for rule, form in candidates:
                outcome = writer.attempt(node, rule, form)
                if outcome == "":
                    done[rule.operator] += 1
                    reasons.clear()
                    break
                if outcome is not None:
                    reasons.setdefault(rule.operator, outcome)
            result.skipped += [Skip(label(node), f"{operator}: {why}") for operator, why in reasons.items()]
    if done:
        settle_functions(model)
        result.changed = True
        listing = ", ".join(f"{count} {operator}" for operator, count in sorted(done.items()))
        result.notes.append(f"operators recognised in what was written out: {listing}")
        result.notes.extend(filter(None, [allow_private_initializers(model)]))
    return result


@dataclass(frozen=True)
class _Writer:
    graph: ir.Graph
    opset: int
    names: Names
    target: Target
    fast_math: bool
    slow: bool

    def attempt(self, root: ir.Node, rule: Rule, form: Pattern) -> str | None:
        """Rewrite `root` if it is the formula; "" where it was done, else why not; None where it is another formula."""
        reason: str | None = None
        for found in form.match(root.outputs[0], Found()):
            written = rule.plan(found, root.outputs[0]) if len(found.nodes) > rule.merges else None
            if isinstance(written, Written):
                written = self._refusal(root, rule, found) or self._too_large(root, found, written) or written
            if isinstance(written, Written):
                self._write(root, rule.operator, found, written)
                return ""
            reason = reason or written
        return reason

    def _refusal(self, root: ir.Node, rule: Rule, found: Found) -> str | None:
        """What stands against the operator, whatever its inputs."""
        if self.opset < rule.since:
            return f"opset {self.opset} does not have it (since {rule.since})"
        if rule.overflow and not self.fast_math:
            return f"it differs where numbers overflow: {rule.overflow} (fast_math=true allows it)"
        if not self.slow and rule.operator in self.target.slow_operators:
            return f"{self.target.name} runs it slower than its parts (slow=true writes it all the same)"
        if not self.slow and rule.slower is not None and (parts := rule.slower(found, root.outputs[0])):
            return f"{parts} (slow=true writes it all the same)"
        for node in found.nodes:
            if node is not root and any(_read_outside(value, found) for value in node.outputs):
                return "something else reads what is inside"
            if node.graph is not self.graph:
                return "a part of it is computed outside of this body"
        dtype = root.outputs[0].dtype or next((tensor.dtype for tensor in found.scalars), None)
        if dtype is None:
            return "its type is not known"
        if not _takes(rule.operator, self.opset, dtype):
            return f"opset {self.opset} does not have it in {dtype.name.lower()}"
        if dtype == ir.DataType.DOUBLE and rule.single:
            return "its numbers have the digits of float32, and this is float64"
        x, y = found.values["x"].shape, root.outputs[0].shape
        if any(len(tensor.shape) for tensor in found.scalars) and (x is None or y is None or len(x) != len(y)):
            return "its constants may give the result more axes than its input has"
        return None

    def _too_large(self, root: ir.Node, found: Found, written: Written) -> str | None:
        """Where new constants take more bytes than what goes."""
        width = (root.outputs[0].dtype or found.scalars[0].dtype).itemsize
        new = sum(16 + int(part.size * width) for part in written.inputs if isinstance(part, np.ndarray))
        gone = sum(node_bytes(node) for node in found.nodes if node is not root)
        read = {id(part) for part in written.inputs}
        for value in found.values.values():
            tensor = constant(value)
            if tensor is not None and id(value) not in read and sole_use(value):
                gone += tensor.nbytes
        return f"its constants would take {new} bytes, more than the {gone} of what goes" if new > gone else None

    def _write(self, root: ir.Node, operator: str, found: Found, written: Written) -> None:
        """Make `root` the operator and remove what nobody reads any more; names of node and result stay."""
        dtype = root.outputs[0].dtype or found.scalars[0].dtype
        mark_origin(root, sorted(label(node) for node in found.nodes if node is not root))
        before = [value for value in root.inputs if value is not None]
        inputs = [part if isinstance(part, ir.Value) else self._constant(root, part, dtype) for part in written.inputs]
        root.op_type = operator
        root.attributes.clear()
        for name, setting in written.attributes.items():
            root.attributes[name] = ir.convenience.convert_attribute(name, setting)
        root.resize_inputs(len(inputs))
        for index, value in enumerate(inputs):
            root.replace_input_with(index, value)
        for value in before:
            drop_if_unused(value)
        _remove_unread(found.nodes - {root})

    def _constant(self, root: ir.Node, data: Array, dtype: ir.DataType) -> ir.Value:
        return new_initializer(self.graph, self.names.fresh(f"{root.outputs[0].name}_constant"), data, dtype)


def know_shapes(model: ir.Model) -> None:
    """Infer shapes where a value of the main graph has none: inference takes longer than everything else here."""
    nodes = (node for node in model.graph if not is_onnx(node, "Constant"))
    if any(value.shape is None or value.dtype is None for node in nodes for value in node.outputs):
        infer_shapes(model)


def _matches(node: ir.Node, rule: Rule, form: Pattern) -> bool:
    return any(len(found.nodes) > rule.merges for found in form.match(node.outputs[0], Found()))


def _read_outside(value: ir.Value, found: Found) -> bool:
    return value.is_graph_output() or any(use.node not in found.nodes for use in value.uses())


def _remove_unread(nodes: frozenset[ir.Node]) -> None:
    """Remove those of `nodes` that nobody reads, and then what only they read."""
    left = set(nodes)
    while unread := [node for node in left if not any(value.uses() for value in node.outputs)]:
        for node in unread:
            remove_node(node)
        left.difference_update(unread)


@cache
def _takes(operator: str, opset: int, dtype: ir.DataType) -> bool:
    """Whether the standard has the operator for this type of its first input."""
    import onnx

    schema = onnx.defs.get_schema(operator, opset)
    wanted = schema.inputs[0].type_str
    allowed = next((c.allowed_type_strs for c in schema.type_constraints if c.type_param_str == wanted), [wanted])
    return f"tensor({dtype.name.lower()})" in allowed
