"""narrow-scans: what a Scan makes, carries or takes in for nobody.

    outputs of a Scan that nobody reads                 go, with what its body computes for them
    states that only their own next value depends on    go, where nobody reads the last one
    inputs that its body does not read                  go, as long as one is left to count the runs by

Loops are narrowed by simplify-bodies.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphopt.base import Context, Effect, Pass, PassResult, Skip
from graphopt.rewriting.body_edit import drop_output
from graphopt.rewriting.editor import Editor
from graphopt.rewriting.nodes import is_onnx, label

_FIRST_WITHOUT_LENGTHS = 9
"""Before this opset a Scan has a first operand of sequence lengths, and a batch."""


@dataclass(frozen=True)
class NarrowScans(Pass):
    """Drop outputs, states and inputs of Scan that nothing needs.

    Algebra: see the head of the file. Does not fire: on the last output (a node needs one), on the last input (the
    number of runs is its length), before opset 9. Preserves: names of what stays.
    """

    name: ClassVar[str] = "narrow-scans"
    effect: ClassVar[Effect] = Effect.EXACT

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Narrow outer Scans before those in their bodies."""
        result = PassResult(changed=False)
        done: Counter[str] = Counter()
        for node, opset in Editor(model).nodes():
            if not is_onnx(node, "Scan"):
                continue
            if opset < _FIRST_WITHOUT_LENGTHS:
                result.skipped.append(Skip(label(node), f"opset {opset} is too old (9 or newer)"))
                continue
            done["outputs of Scan dropped"] += _drop_outputs(node)
            done["states of Scan dropped"] += _drop_states(node)
            done["inputs of Scan dropped"] += _drop_inputs(node)
        result.changed = any(done.values())
        result.notes.extend(f"{count} {what}" for what, count in done.items() if count)
        return result


def _body(node: ir.Node) -> ir.Graph:
    return node.attributes["body"].as_graph()


def _taken(node: ir.Node) -> int:
    return node.attributes.get_int("num_scan_inputs", 0) or 0


def _states(node: ir.Node) -> int:
    return len(node.inputs) - _taken(node)


def _unread(value: ir.Value) -> bool:
    return not value.uses() and not value.is_graph_output()


def _without(node: ir.Node, name: str, place: int) -> None:
    """Take one entry out of an attribute that has one for each scanned input or output."""
    given = node.attributes.get_ints(name, None)
    if given is not None:
        node.attributes[name] = ir.AttrInt64s(name, [v for k, v in enumerate(given) if k != place])


def _drop_outputs(node: ir.Node) -> int:
    count, states = 0, _states(node)
    for index in reversed(range(states, len(node.outputs))):
        if _unread(node.outputs[index]) and len(node.outputs) > 1:
            drop_output(node, index)
            _body(node).outputs.pop(index)
            _without(node, "scan_output_axes", index - states)
            _without(node, "scan_output_directions", index - states)
            count += 1
    return count


def _drop_states(node: ir.Node) -> int:
    count, body = 0, _body(node)
    for index in reversed(range(_states(node))):
        value, following = body.inputs[index], body.outputs[index]
        if len(node.outputs) > 1 and _unread(node.outputs[index]) and _own(value, following, body):
            drop_output(node, index)
            body.outputs.pop(index)
            for reader in tuple(dict.fromkeys(use.node for use in value.uses())):
                _detach(reader, body)
            body.inputs.pop(index)
            _drop_operand(node, index)
            count += 1
    return count


def _own(value: ir.Value, following: ir.Value, body: ir.Graph) -> bool:
    """True where everything that is computed from a state goes into its own next value and nothing else."""
    others = [output for output in body.outputs if output is not following]
    if len(others) < len(body.outputs) - 1:
        return False
    seen: dict[ir.Value, None] = {value: None}
    pending = [value]
    while pending:
        found = pending.pop()
        readers = [use.node for use in found.uses()]
        if any(found is other for other in others) or any(node.graph is not body for node in readers):
            return False
        fresh = [output for node in readers for output in node.outputs if output not in seen]
        seen.update(dict.fromkeys(fresh))
        pending.extend(fresh)
    return True


def _detach(node: ir.Node, body: ir.Graph) -> None:
    """Take out a node and all that is computed from it."""
    if node.graph is not body:
        return
    for output in node.outputs:
        for reader in tuple(dict.fromkeys(use.node for use in output.uses())):
            _detach(reader, body)
    body.remove(node, safe=True)


def _drop_inputs(node: ir.Node) -> int:
    count, body, states = 0, _body(node), _states(node)
    for index in reversed(range(states, len(node.inputs))):
        value = body.inputs[index]
        if _unread(value) and _taken(node) > 1:
            body.inputs.pop(index)
            _drop_operand(node, index)
            node.attributes["num_scan_inputs"] = ir.AttrInt64("num_scan_inputs", _taken(node) - 1)
            _without(node, "scan_input_axes", index - states)
            _without(node, "scan_input_directions", index - states)
            count += 1
    return count


def _drop_operand(node: ir.Node, index: int) -> None:
    inputs = [value for k, value in enumerate(node.inputs) if k != index]
    for k, value in enumerate(inputs):
        node.replace_input_with(k, value)
    node.resize_inputs(len(inputs))
