"""move-transposes: Transposes stand where fewest of them are needed.

    g(Transpose_p(x)) = Transpose_p(g'(x))       elementwise operators, reductions, Softmax, Concat, Split, Slice, Pad
    Transpose_p^-1(Transpose_p(x)) = x           where two meet

g' is g with its axes and constants permuted. Which operators change is the minimum of the number of Transposes over all
choices, a minimum cut (`graphopt.rewriting.layouts`), and nothing changes where that saves none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.base import Context, Effect, Pass, PassResult, Skip
from graphopt.rewriting.cuts import remove_unread
from graphopt.rewriting.edit import bypass
from graphopt.rewriting.editor import Editor
from graphopt.rewriting.layout import permutation
from graphopt.rewriting.layouts import Region, best, composed, needed, region
from graphopt.rewriting.nodes import is_onnx, label, mark_origin
from graphopt.rewriting.permuted import moving_inputs, permute
from graphopt.rewriting.scopes import scopes


@dataclass(frozen=True)
class MoveTransposes(Pass):
    """Move Transposes through operators that do the same on permuted tensors, where that leaves fewer of them.

    Algebra: see the head of the file. Does not fire: where no Transpose would go, where those that stay would move more
    elements than all did before, through operators that tell axes apart (Conv, MatMul, ...), past constants that others
    read too (they would be stored twice). Preserves: names and values of graph outputs. Bits are only moved, apart from
    the order in which reductions add.
    """

    name: ClassVar[str] = "move-transposes"
    effect: ClassVar[Effect] = Effect.EXACT

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """One region after the other, each permutation by itself."""
        result = PassResult(changed=False)
        editor = Editor(model)
        total = 0
        for graph, opset in scopes(model):
            seen: set[ir.Node] = set()
            for node in tuple(graph):
                perm = permutation(node) if is_onnx(node, "Transpose") and node.graph is graph else None
                if perm is None or node in seen or any(a.is_ref() for a in node.attributes.values()):
                    continue
                found = region(node, tuple(perm), opset)
                seen |= found.makers
                chosen, saved = best(found)
                if not saved:
                    if found.operators:
                        reason = "no place behind or before the operators around it takes fewer Transposes"
                        result.skipped.append(Skip(label(node), reason))
                    continue
                moved = needed(found, chosen)
                if moved["then"] > moved["now"]:
                    reason = "fewer Transposes would move more elements in all"
                    result.skipped.append(Skip(label(node), reason))
                    continue
                _rearrange(graph, found, chosen, editor)
                total += saved
        editor.close()
        if total:
            result.changed = True
            result.notes.append(f"{total} Transposes saved by moving them")
        return result


def _rearrange(graph: ir.Graph, found: Region, chosen: set[ir.Node], editor: Editor) -> None:
    """Let the chosen operators work on permuted tensors, with Transposes where others read or made these."""
    perm = found.perm
    inverse = [int(k) for k in np.argsort(perm)]
    offered: dict[ir.Value, ir.Value] = {}
    operators = [node for node in found.operators if node in chosen]
    for node in operators:
        permute(node, perm, editor)
        for place in moving_inputs(node):
            value = node.inputs[place]
            assert value is not None  # moving inputs are there
            if value.producer() not in chosen:
                if value not in offered:
                    offered[value] = _permuted(value, graph, perm, inverse, editor)
                node.replace_input_with(place, offered[value])
    for node in operators:
        for output in node.outputs:
            _restore(output, graph, perm, inverse, chosen, editor)
    for value, other in offered.items():
        for use in tuple(value.uses()):
            if _is(use.node, inverse) and use.node.graph is graph and use.node is not other.producer():
                bypass(use.node, other)
        _merge_readers(value, graph)
        remove_unread(value)


def _merge_readers(value: ir.Value, graph: ir.Graph) -> None:
    """Transposes that read what a Transpose makes read its source, so that it is needed for others only."""
    maker = value.producer()
    made = permutation(maker) if maker is not None and is_onnx(maker, "Transpose") else None
    if maker is None or made is None or maker.graph is not graph:
        return
    for use in tuple(value.uses()):
        taken = permutation(use.node) if is_onnx(use.node, "Transpose") and use.node.graph is graph else None
        if taken is not None and len(taken) == len(made):
            use.node.attributes["perm"] = ir.AttrInt64s("perm", composed(made, taken))
            use.node.replace_input_with(0, maker.inputs[0])


def _permuted(value: ir.Value, graph: ir.Graph, perm: tuple[int, ...], inverse: list[int], editor: Editor) -> ir.Value:
    """t' of t = Transpose_perm(t'): what a Transpose reads, or a new Transpose."""
    maker = value.producer()
    if maker is not None and is_onnx(maker, "Transpose") and maker.graph is graph and maker.inputs[0] is not None:
        made = permutation(maker)
        if made == list(perm):
            return maker.inputs[0]
        if made is not None and len(made) == len(inverse) and not any(a.is_ref() for a in maker.attributes.values()):
            both = composed(made, inverse)
            return editor.transposed(maker.inputs[0], graph, both, f"{value.name}_permuted")
    return editor.transposed(value, graph, inverse, f"{value.name}_permuted")


def _restore(
    output: ir.Value, graph: ir.Graph, perm: tuple[int, ...], inverse: list[int], chosen: set[ir.Node], editor: Editor
) -> None:
    """`output` holds the permuted tensor now: readers that want the plain one get it from a Transpose."""
    declared = output.shape
    readers = [use for use in output.uses() if use.node not in chosen]
    given_out = output.is_graph_output()
    if declared is not None:
        output.shape = ir.Shape([declared[axis] for axis in inverse])
    plain: ir.Value | None = None
    for use in readers:
        taken = permutation(use.node) if is_onnx(use.node, "Transpose") and use.node.graph is graph else None
        if taken == inverse and bypass(use.node, output) is None:
            continue
        if taken is not None and taken != inverse and not given_out:
            use.node.attributes["perm"] = ir.AttrInt64s("perm", composed(perm, taken))
            continue
        plain = plain or editor.transposed(output, graph, perm, str(output.name))
        use.node.replace_input_with(use.idx, plain)
    if given_out:
        plain = plain or editor.transposed(output, graph, perm, str(output.name))
        for index, value in enumerate(graph.outputs):
            if value is output:
                graph.outputs[index] = plain
        name, output.name = output.name, editor.fresh(f"{output.name}_permuted")
        plain.name, plain.shape = name, declared
    if plain is not None and (maker := plain.producer()) is not None and (source := output.producer()) is not None:
        mark_origin(maker, [label(source)])


def _is(node: ir.Node, perm: list[int]) -> bool:
    return is_onnx(node, "Transpose") and permutation(node) == perm
