"""absorb-transposes: a Transpose of a matrix becomes the transposition that Gemm does by itself.

Gemm(Transpose(A), B) = Gemm(A, B, transA = 1 - transA)       and the same for B
MatMul(A, Transpose(B)) = Gemm(A, B, transB = 1)              for matrices, not for stacks of them
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphopt.base import Context, Effect, Pass, PassResult, Skip
from graphopt.rewriting.cuts import made_by, remove_unread
from graphopt.rewriting.edit import is_onnx, label, mark_origin, sole_use
from graphopt.rewriting.editor import Editor
from graphopt.rewriting.layout import permutation

_FIRST_GEMM_WITHOUT_BIAS = 11
_TYPES = (ir.DataType.FLOAT, ir.DataType.DOUBLE)
"""Types for which every runtime has both products."""


@dataclass(frozen=True)
class AbsorbTransposes(Pass):
    """Let Gemm transpose its operands itself, and make a Gemm of a MatMul of a transposed matrix.

    Algebra: see the head of the file. Does not fire: where something else reads the transposed tensor, on stacks of
    matrices, on types without Gemm. Preserves: the name of the result.
    """

    name: ClassVar[str] = "absorb-transposes"
    effect: ClassVar[Effect] = Effect.EXACT

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Absorb one Transpose after the other."""
        result = PassResult(changed=False)
        editor = Editor(model)
        count = 0
        for node, opset in editor.nodes():
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
        if count:
            result.changed = True
            result.notes.append(f"{count} Transposes became part of a Gemm")
        return result


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
