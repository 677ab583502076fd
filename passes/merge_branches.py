"""merge-branches: a sum of linear maps of one tensor becomes one linear operator.

    W x + V x + x + s B A x + BN(x)  =  W' x + b'

A convolution is linear in its kernel, so that parallel kernels of the same stride add up once the smaller ones are laid
into the windows of the largest: a 1x1 kernel is its middle tap, the identity a 1x1 unit matrix, a factorised branch the
product of its factors. RepVGG, MobileOne and ACNet train such blocks, LoRA adapters and averaged experts are such sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphopt.base import Context, Effect, Pass, PassResult, Skip, option
from graphopt.errors import ModelError
from graphopt.rewriting.branches import base_windows, branch_of, embedded
from graphopt.rewriting.constants import constant
from graphopt.rewriting.edit import bypass, remove_unread, sole_use
from graphopt.rewriting.linear import Linear, linear_giving
from graphopt.rewriting.names import Names
from graphopt.rewriting.nodes import is_onnx, label
from graphopt.rewriting.scopes import scopes
from graphopt.rewriting.weight_pass import begun, finish
from graphopt.sparsity.marks import declared_pattern, role_of


@dataclass(frozen=True)
class MergeBranches(Pass):
    """Add parallel linear branches of one tensor up into the one with the largest kernel: RepVGG, ACNet, LoRA, experts.

    Algebra: W x + V x + x + B A x = (W + V' + I' + B A) x, kernels laid into the windows of the largest; biases and
    BatchNormalization or constants behind a branch come along. In float64, rounded once to the weight's dtype.

    Does not fire: where no branch has taps and connections for all the others (the sum would be larger than they are),
    where strides or output sizes differ, where the weight that would hold the sum is shared, where a branch is read by
    others or given out, on factorised and sparse layers (`armor`, `sparsify`).
    Preserves: node, weight and bias of the largest branch, by name.
    Source: RepVGG (arXiv:2101.03697), ACNet (arXiv:1908.03930), MobileOne (arXiv:2206.04040), LoRA (arXiv:2106.09685).
    """

    name: ClassVar[str] = "merge-branches"
    effect: ClassVar[Effect] = Effect.EXACT
    keep_overridable: bool = option(False, "leave initializers alone that are also graph inputs")

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Merge in every sum of `model`."""
        result = begun(model, keep_overridable=self.keep_overridable)
        names = Names(model, later=True)
        merged = 0
        for graph, opset in scopes(model):
            # Backwards: where the last sum of a tree goes, the one before it takes its place.
            for node in reversed(tuple(graph)):
                if node.graph is not graph or not _is_root(node):
                    continue
                count, reasons = _merge(node, opset, names)
                merged += count
                result.skipped.extend(Skip(label(node), reason) for reason in reasons)
        if merged:
            finish(model, result, f"{merged} parallel branches added into the weights of others")
        return result


@dataclass(frozen=True)
class _Term:
    """One summand: where it is read, and whether it is subtracted."""

    value: ir.Value
    reader: ir.Node
    sign: float


def _is_sum(node: ir.Node | None) -> bool:
    return node is not None and is_onnx(node, "Add", "Sub", "Sum")


def _is_root(node: ir.Node) -> bool:
    if not _is_sum(node) or sum(constant(v) is None for v in node.inputs) < 2:
        return False
    use = sole_use(node.outputs[0])
    return use is None or use.node.graph is not node.graph or not _is_sum(use.node)


def _terms(node: ir.Node, sign: float = 1.0) -> Iterator[_Term]:
    """Summands of a tree of sums, in order; a constant added to a tensor ends the tree."""
    for index, value in enumerate(node.inputs):
        if value is None or constant(value) is not None:
            continue
        own = -sign if index == 1 and is_onnx(node, "Sub") else sign
        inner = value.producer()
        nested = inner is not None and _is_sum(inner) and inner.graph is node.graph and sole_use(value) is not None
        if nested and inner is not None and all(constant(v) is None for v in inner.inputs):
            yield from _terms(inner, own)
        else:
            yield _Term(value, node, own)


def _merge(root: ir.Node, opset: int, names: Names) -> tuple[int, list[str]]:
    """Merge what can be in one sum; how many branches went, and why others did not."""
    count = 0
    while True:
        reasons: dict[str, None] = {}
        terms = list(_terms(root))
        bases = [(term, linear) for term in terms if (linear := _base(term, opset)) is not None]
        bases.sort(key=lambda found: -found[1].weight_size)
        taken = any(_absorb(term, linear, other, opset, names, reasons) for term, linear in bases for other in terms)
        if not taken:
            return count, list(reasons)
        count += 1
        if root.graph is None:
            return count, []


def _base(term: _Term, opset: int) -> Linear | None:
    """The linear operator that gives a term, where its weight may take more."""
    found = linear_giving(term.value, opset=opset)
    if not isinstance(found, Linear) or not sole_use(term.value) or found.node.graph is not term.reader.graph:
        return None
    if role_of(found.node) is not None or declared_pattern(found.node) is not None:
        return None
    return found if not isinstance(base_windows(found), str) else None


def _absorb(term: _Term, base: Linear, other: _Term, opset: int, names: Names, reasons: dict[str, None]) -> bool:
    """Add `other` into the weight of `base` and take it out of the sum."""
    if other.value is term.value or (other.value is not base.input and not sole_use(other.value)):
        return False
    branch = branch_of(other.value, base, opset)
    if branch is None:
        return False
    weight = branch if isinstance(branch, str) else embedded(branch, base)
    if isinstance(branch, str) or isinstance(weight, str):
        reasons[str(weight)] = None
        return False
    minuend = is_onnx(other.reader, "Sub") and other.reader.inputs[0] is other.value
    if minuend and other.reader.inputs[1] is not term.value:
        reasons["it is what others are subtracted from"] = None
        return False
    # Where the minuend goes, the subtrahend is no longer subtracted: V - W becomes W' = V - W.
    own, sign = (-1.0, 1.0) if minuend else (1.0, other.sign * term.sign)
    producer = other.value.producer()
    origin = [label(other.reader)] if producer is None or other.value is base.input else [label(producer)]
    # In place: a weight of hundreds of megabytes is twice that in float64.
    weight *= sign
    base.add_to(weight, own)
    reason = base.replace(weight, own * base.bias() + sign * branch.bias, names, origin)
    if reason:
        reasons[reason] = None
        return False
    _take_out(other)
    if producer is not None and other.value is not base.input:
        remove_unread(producer)
    return True


def _take_out(term: _Term) -> None:
    """Leave `term` out of the sum that reads it."""
    reader = term.reader
    rest = list(reader.inputs)
    rest.pop(next(index for index, value in enumerate(rest) if value is term.value))
    _forget_shapes(reader)
    if len(rest) == 1 and rest[0] is not None:
        reason = bypass(reader, rest[0])
        if reason:
            raise ModelError(reason, where=label(reader), hint="report this: the sum holds a linear operator")
        return
    for index, value in enumerate(rest):
        reader.replace_input_with(index, value)
    reader.resize_inputs(len(rest))


def _forget_shapes(node: ir.Node) -> None:
    """What a sum gives may be smaller now, up to where the largest branch joins it."""
    value = node.outputs[0]
    while (use := sole_use(value)) is not None and _is_sum(use.node):
        value.shape = None
        value = use.node.outputs[0]
