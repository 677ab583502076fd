"""absorb-transposes: a Transpose goes into the operator behind it, which takes its axes in any order.

Gemm(Transpose(A), B) = Gemm(A, B, transA = 1 - transA)       and the same for B
MatMul(A, Transpose(B)) = Gemm(A, B, transB = 1)              for matrices, not for stacks of them
Reduce_axes(Transpose_p(x)) = Reduce_p[axes](x)               where the axes that are left keep their order
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphopt.base import Context, Effect, Pass, PassResult, Skip
from graphopt.rewriting.cuts import given, made_by, numbers, remove_unread
from graphopt.rewriting.edit import sole_use
from graphopt.rewriting.editor import Editor
from graphopt.rewriting.layout import permutation
from graphopt.rewriting.nodes import is_onnx, label, mark_origin
from graphopt.rewriting.permuted import REDUCTIONS, permute

_FIRST_GEMM_WITHOUT_BIAS = 11
_TYPES = (ir.DataType.FLOAT, ir.DataType.DOUBLE)
"""Types for which every runtime has both products."""


@dataclass(frozen=True)
class AbsorbTransposes(Pass):
    """Let Gemm and reductions read what a Transpose reads, and make a Gemm of a MatMul of a transposed matrix.

    Algebra: see the head of the file. Does not fire: where something else reads the transposed tensor, on stacks of
    matrices, on types without Gemm, on reductions that keep their axes (move-transposes moves through those) or whose
    axes are computed. Preserves: the name of the result; the order in which reductions add may change.
    """

    name: ClassVar[str] = "absorb-transposes"
    effect: ClassVar[Effect] = Effect.EXACT

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Absorb one Transpose after the other."""
        result = PassResult(changed=False)
        editor = Editor(model)
        count = 0
        reduced = 0
        for node, opset in editor.nodes():
            if is_onnx(node, *REDUCTIONS):
                reduced += _reduce(node, editor, result)
            if not is_onnx(node, "Gemm", "MatMul"):
                continue
            for place in (0, 1):
                turned = _turned(node, place)
                if turned is None:
                    continue
                reason = _refusal(node, turned, opset)
                if reason is not None:
                    result.skipped.append(Skip(label(turned), reason))
                    continue
                _absorb(node, place, turned)
                count += 1
        editor.close()
        for number, where in ((count, "a Gemm"), (reduced, "a reduction")):
            if number:
                result.changed = True
                result.notes.append(f"{number} Transposes became part of {where}")
        return result


def _reduce(node: ir.Node, editor: Editor, result: PassResult) -> int:
    """Let a reduction that drops its axes read what a Transpose reads."""
    turned = made_by(node.inputs[0], node, "Transpose")
    perm = permutation(turned) if turned is not None else None
    if turned is None or perm is None or node.attributes.get_int("keepdims", 1) != 0:
        return 0
    axes = numbers(node, "axes", 1)
    if (axes is None and given(node, 1)) or (not axes and node.attributes.get_int("noop_with_empty_axes", 0) != 0):
        result.skipped.append(Skip(label(turned), "the axes of the reduction behind it are computed"))
        return 0
    gone = {axis % len(perm) for axis in axes or range(len(perm))}
    left = [place for axis, place in enumerate(perm) if axis not in gone]
    if left != sorted(left):
        result.skipped.append(Skip(label(turned), "it changes the order of axes that the reduction behind it leaves"))
        return 0
    if sole_use(turned.outputs[0]) is None:
        result.skipped.append(Skip(label(turned), "what it makes is also read elsewhere"))
        return 0
    permute(node, perm, editor)
    node.replace_input_with(0, turned.inputs[0])
    mark_origin(node, [label(turned)])
    remove_unread(turned.outputs[0])
    return 1


def _turned(node: ir.Node, place: int) -> ir.Node | None:
    """The Transpose of a matrix that makes an operand."""
    maker = made_by(node.inputs[place], node, "Transpose")
    return maker if maker is not None and permutation(maker) == [1, 0] else None


def _refusal(node: ir.Node, turned: ir.Node, opset: int) -> str | None:
    if sole_use(turned.outputs[0]) is None:
        return "what it makes is also read elsewhere"
    if is_onnx(node, "Gemm"):
        return None
    ranks = [None if v is None or v.shape is None else len(v.shape) for v in node.inputs]
    if ranks != [2, 2]:
        return "the MatMul that reads it multiplies a stack of matrices"
    if opset < _FIRST_GEMM_WITHOUT_BIAS or turned.inputs[0] is None or turned.inputs[0].dtype not in _TYPES:
        return "there is no Gemm of this type"
    return None


def _absorb(node: ir.Node, place: int, turned: ir.Node) -> None:
    name = ("transA", "transB")[place]
    flipped = 1 - (node.attributes.get_int(name, 0) or 0)
    node.op_type = "Gemm"
    node.attributes[name] = ir.AttrInt64(name, flipped)
    node.replace_input_with(place, turned.inputs[0])
    mark_origin(node, [label(turned)])
    remove_unread(turned.outputs[0])
