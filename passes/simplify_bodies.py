"""simplify-bodies: If and Loop that always do the same, and what their bodies make or carry for nobody.

    If(c, A, A) = A                              two branches that compute the same
    If(c, A, B) = A                              where the shapes that B gives make every run fail behind the If
    Loop(0 times, x) = x                         also where the condition starts as false
    Loop(once, x) = body(0, true, x)             where nothing is scanned out
    outputs of If and Loop that nobody reads     go, with what is computed for them
    a value that a Loop carries unchanged        is the value it starts with, read from outside

An If whose condition is constant becomes the branch taken in fold-constants.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.base import Context, Effect, Pass, PassResult, Skip
from graphopt.rewriting.body_edit import drop_output, equal_graphs, inline
from graphopt.rewriting.constants import array
from graphopt.rewriting.edit import cannot_replace, replace_value
from graphopt.rewriting.editor import Editor
from graphopt.rewriting.nodes import is_onnx, label
from graphopt.rewriting.scopes import bodies
from graphopt.rewriting.suppositions import branch, only_branch


@dataclass(frozen=True)
class SimplifyBodies(Pass):
    """Inline If and Loop nodes whose course is known, and drop outputs and carried values that nothing needs.

    Algebra: see the head of the file; equal for every input that the model runs with.
    Does not fire: where branches hold random operators or nodes without outputs, where a Loop that runs once scans
    values out, on a Loop of more runs (it would inflate the model).
    Preserves: names of graph outputs; names in a body that are taken outside are changed.
    """

    name: ClassVar[str] = "simplify-bodies"
    effect: ClassVar[Effect] = Effect.EXACT

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Simplify outer nodes before those in their bodies."""
        result = PassResult(changed=False)
        editor = Editor(model)
        done: Counter[str] = Counter()
        for node, opset in editor.nodes():
            if is_onnx(node, "If"):
                done["outputs of If dropped"] += _drop_unread(node, 0)
                if _same_branches(node, editor, result):
                    done["Ifs with equal branches inlined"] += 1
                else:
                    done["Ifs with one branch that can be taken inlined"] += _one_branch(node, opset, editor, result)
            elif is_onnx(node, "Loop"):
                done["outputs of Loop dropped"] += _drop_scans(node) + _drop_carried(node)
                done["constant values no longer carried by Loops"] += _carry_outside(node, result)
                done["Loops that run once or never inlined"] += _known_course(node, editor, result)
        editor.close()
        result.changed = any(done.values())
        result.notes.extend(f"{count} {what}" for what, count in done.items() if count)
        return result


def _unread(value: ir.Value) -> bool:
    return not value.uses() and not value.is_graph_output()


def _drop_unread(node: ir.Node, first: int) -> int:
    """Outputs of an If that nobody reads, the last one apart: a node needs one."""
    count = 0
    for index in reversed(range(first, len(node.outputs))):
        if _unread(node.outputs[index]) and len(node.outputs) > 1:
            drop_output(node, index)
            for body in bodies(node):
                body.outputs.pop(index)
            count += 1
    return count


def _same_branches(node: ir.Node, editor: Editor, result: PassResult) -> int:
    then, other = (node.attributes[name].as_graph() for name in ("then_branch", "else_branch"))
    reason = equal_graphs(then, other)
    if reason is not None:
        if reason:
            result.skipped.append(Skip(label(node), reason))
        return 0
    return _inlined(node, then, [], editor, result)


def _one_branch(node: ir.Node, opset: int, editor: Editor, result: PassResult) -> int:
    found = only_branch(node, opset)
    if found is None:
        return 0
    taken, where = found
    count = _inlined(node, branch(node, taken), [], editor, result)
    if count:
        result.notes.append(f"{label(node)} was always {str(taken).lower()}: else {where} fails")
    return count


def _inlined(
    node: ir.Node, body: ir.Graph, operands: list[ir.Value | None], editor: Editor, result: PassResult, skip: int = 0
) -> int:
    reason = inline(node, body, operands, editor, skip=skip)
    if reason is not None:
        result.skipped.append(Skip(label(node), reason))
        return 0
    return 1


# Loops --------------------------------------------------------------------------------------------------------------


def _body(node: ir.Node) -> ir.Graph:
    return node.attributes["body"].as_graph()


def _carried(node: ir.Node) -> int:
    return len(node.inputs) - 2


def _drop_scans(node: ir.Node) -> int:
    count, carried, body = 0, _carried(node), _body(node)
    for index in reversed(range(carried, len(node.outputs))):
        if _unread(node.outputs[index]) and len(node.outputs) > 1:
            drop_output(node, index)
            body.outputs.pop(index + 1)
            count += 1
    return count


def _drop_carried(node: ir.Node) -> int:
    """Values that a Loop carries and nothing reads, in its body or behind it."""
    count, body = 0, _body(node)
    for index in reversed(range(_carried(node))):
        value, following = body.inputs[index + 2], body.outputs[index + 1]
        unused = not value.uses() and (following is value or not value.is_graph_output())
        if len(node.outputs) > 1 and _unread(node.outputs[index]) and unused:
            if sum(output is value for output in body.outputs) > (following is value):
                continue
            _forget(node, index)
            count += 1
    return count


def _carry_outside(node: ir.Node, result: PassResult) -> int:
    """Values that every run hands on as they are: the body reads what the Loop starts with."""
    count, body = 0, _body(node)
    for index in reversed(range(_carried(node))):
        value, start = body.inputs[index + 2], node.inputs[index + 2]
        if body.outputs[index + 1] is not value or start is None or len(node.outputs) < 2:
            continue
        if sum(output is value for output in body.outputs) > 1:
            result.skipped.append(Skip(label(node), "a value that it carries unchanged is also given out by its body"))
            continue
        reason = cannot_replace(node.outputs[index], start)
        if reason is not None:
            result.skipped.append(Skip(label(node), f"it carries a value unchanged, but {reason}"))
            continue
        replace_value(node.outputs[index], start)
        _forget(node, index)
        value.replace_all_uses_with(start)
        count += 1
    return count


def _forget(node: ir.Node, index: int) -> None:
    """Take the carried value `index` out of a Loop: its output is unread, its input in the body is the caller's."""
    body = _body(node)
    drop_output(node, index)
    body.outputs.pop(index + 1)
    body.inputs.pop(index + 2)
    inputs = [value for k, value in enumerate(node.inputs) if k != index + 2]
    for k, value in enumerate(inputs):
        node.replace_input_with(k, value)
    node.resize_inputs(len(inputs))


def _known_course(node: ir.Node, editor: Editor, result: PassResult) -> int:
    runs = _runs(node)
    if runs is None or runs > 1:
        return 0
    if len(node.outputs) > _carried(node):
        result.skipped.append(Skip(label(node), f"it runs {runs} times, but scans values out"))
        return 0
    operands = list(node.inputs[2:])
    if runs == 1:
        number = editor.constant(node, f"{node.outputs[0].name}_iteration", np.array(0, dtype=np.int64))
        going = editor.constant(node, f"{node.outputs[0].name}_condition", np.array(True))
        return _inlined(node, _body(node), [number, going, *operands], editor, result, skip=1)
    pairs = [(output, value) for output, value in zip(node.outputs, operands, strict=True) if value is not None]
    reason = next(filter(None, (cannot_replace(output, value) for output, value in pairs)), None)
    if reason is not None:
        result.skipped.append(Skip(label(node), f"it never runs, but {reason}"))
        return 0
    for output, value in pairs:
        replace_value(output, value)
    assert isinstance(node.graph, ir.Graph)
    node.graph.remove(node, safe=True)
    return 1


def _runs(node: ir.Node) -> int | None:
    """How often a Loop runs: 0, 1, or more; None where that is computed."""
    given = [None if value is None else array(value) for value in node.inputs[:2]]
    count, condition = (None if data is None else int(data.reshape(-1)[0]) for data in given)
    if condition == 0 or (count is not None and count <= 0):
        return 0
    stops = array(_body(node).outputs[0])
    counted = node.inputs[0] is None or count is not None
    known = counted and (node.inputs[1] is None or condition is not None)
    if known and (count == 1 or (stops is not None and not stops.any())):
        return 1
    return None if count is None else count
