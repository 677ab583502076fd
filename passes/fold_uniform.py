"""fold-uniform: weights that are one number everywhere are folded as numbers, and stay computed by ConstantOfShape.

    (W * x + b) a + c = (a W) * x + (a b + c)        W, b uniform: a W and a b + c are, too
    BN(x; s, t, m, v) a + c = BN(x; a s, a t + c, m, v)

where a and c are those of a BatchNormalization with uniform parameters, or of a Mul, Div, Add or Sub by a uniform
tensor. A ConstantOfShape with another number takes no more room than the one before; written out, it would be a weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.base import Context, Effect, Pass, PassResult, Skip
from graphopt.rewriting.affine import arithmetic_affine, inference_problem
from graphopt.rewriting.constants import constant
from graphopt.rewriting.cuts import made_by, remove_unread, set_inputs, sizes
from graphopt.rewriting.edit import bypass, cannot_replace, sole_use
from graphopt.rewriting.editor import Editor
from graphopt.rewriting.nodes import is_onnx, label
from graphopt.rewriting.uniform import Uniforms, uniform

_ARITHMETIC = ("Mul", "Div", "Add", "Sub")
_EPSILON = 1e-5


@dataclass(frozen=True)
class FoldUniform(Pass):
    """Fold BatchNormalization and arithmetic with tensors of one number into weights of one number.

    Algebra: see the head of the file. In float64, rounded once. Does not fire: where the tensor between is read by
    others or given out, where a uniform operand may broadcast a tensor to a larger one, where a parameter is not
    uniform (fold-batchnorm and fold-conv-affine fold constants), where a number does not fit the type.
    Preserves: names of nodes that stay; nothing is written out.
    """

    name: ClassVar[str] = "fold-uniform"
    effect: ClassVar[Effect] = Effect.EXACT

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Fold from the front, chains link by link."""
        result = PassResult(changed=False)
        editor = Editor(model)
        made = Uniforms(editor)
        count = 0
        for node, opset in editor.nodes():
            affine = _affine(node, opset)
            if affine is None or (isinstance(affine, str) and not any(map(_computed, node.inputs))):
                continue
            reason = affine if isinstance(affine, str) else _fold(node, *affine, made)
            if reason is None:
                count += 1
            elif reason:
                result.skipped.append(Skip(label(node), reason))
        editor.close()
        if count:
            result.changed = True
            result.notes.append(f"{count} operators with uniform parameters folded into uniform weights")
        return result


def _computed(value: ir.Value | None) -> bool:
    """True for a tensor of one number that is not stored: what is stored alone is for other folds."""
    return constant(value) is None and uniform(value) is not None


def _affine(node: ir.Node, opset: int) -> tuple[ir.Value, float, float] | str | None:
    """What `node` reads, scales by and adds; None where it does nothing uniform, or why that cannot be told."""
    if is_onnx(node, "BatchNormalization"):
        return _norm(node, opset)
    if not is_onnx(node, *_ARITHMETIC) or len(node.inputs) != 2:
        return None
    numbers = [uniform(value) for value in node.inputs]
    if (numbers[0] is None) == (numbers[1] is None):
        return None
    place = 0 if numbers[0] is not None else 1
    source, operand = node.inputs[1 - place], node.inputs[place]
    number = numbers[place]
    if source is None or operand is None or number is None:
        return None
    if not _within(operand, source):
        return "its uniform operand may be larger than what it scales"
    found = arithmetic_affine(node, np.array(number), constant_first=place == 0)
    return found if isinstance(found, str) else (source, float(found[0]), float(found[1]))


def _norm(node: ir.Node, opset: int) -> tuple[ir.Value, float, float] | str | None:
    numbers = [uniform(value) for value in node.inputs[1:5]]
    if node.inputs[0] is None or len(numbers) < 4 or all(number is None for number in numbers):
        return None
    scale, bias, mean, variance = numbers
    if scale is None or bias is None or mean is None or variance is None:
        return "some of its parameters are uniform, others are not"
    reason = inference_problem(node, opset)
    if reason is not None:
        return reason
    deviation = variance + (node.attributes.get_float("epsilon", _EPSILON) or 0.0)
    if deviation <= 0:
        return "its variance is not positive"
    factor = scale / float(np.sqrt(deviation))
    return node.inputs[0], factor, bias - factor * mean


def _within(operand: ir.Value, source: ir.Value) -> bool:
    """True where broadcasting leaves `source` in its shape."""
    small, large = sizes(operand), sizes(source)
    if small is None or large is None or len(small) > len(large):
        return False
    return all(a == 1 or (a is not None and a == b) for a, b in zip(reversed(small), reversed(large), strict=False))


def _fold(node: ir.Node, source: ir.Value, scale: float, shift: float, made: Uniforms) -> str | None:
    """Fold into what makes `source`; otherwise why not, "" where nothing uniform does."""
    maker = made_by(source, node, "Conv", "BatchNormalization")
    places = (1, 2)
    if maker is None or uniform(maker.inputs[1]) is None:
        return ""
    if not any(map(_computed, (*node.inputs, *maker.inputs))):
        return ""
    if is_onnx(maker, "BatchNormalization") and uniform(maker.inputs[2]) is None:
        return ""
    if sole_use(source) is None:
        return "what it reads is also read elsewhere"
    reason = cannot_replace(node.outputs[0], source)
    if reason is not None:
        return reason
    old = [maker.inputs[k] if k < len(maker.inputs) else None for k in places]
    weight, bias = (uniform(value) for value in old)
    if weight is None or (old[1] is not None and bias is None):
        return "the bias of what it reads is not uniform"
    found = _parameters(maker, old, weight * scale, (bias or 0.0) * scale + shift, made, label(node))
    if isinstance(found, str):
        return found
    unread = list(node.inputs)
    inputs = list(maker.inputs)
    inputs[1:3] = found
    set_inputs(maker, inputs)
    reason = bypass(node, source, origin_of=maker)
    for value in unread:
        remove_unread(value)
    return reason


def _parameters(
    maker: ir.Node, old: list[ir.Value | None], weight: float, bias: float, made: Uniforms, name: str
) -> list[ir.Value] | str:
    """Weight and, where there is one, bias of these numbers; or why they cannot be made."""
    new = made.like(old[0], maker, weight, f"{name}_scale")
    if isinstance(new, str) or (old[1] is None and not bias):
        return new if isinstance(new, str) else [new]
    channels = sizes(old[0])
    added: ir.Value | str
    if old[1] is not None:
        added = made.like(old[1], maker, bias, f"{name}_shift")
    elif channels is None or not isinstance(channels[0], int):
        added = "the number of its channels is unknown"
    else:
        added = made.vector(channels[0], new.dtype or ir.DataType.FLOAT, maker, bias, f"{name}_shift")
    if isinstance(added, str):
        remove_unread(new)
        return added
    return [new, added]
