"""Nodes that change the shape of a tensor and not the order of its elements, and Transposes that nearly do.

An axis of size 1 can stand anywhere: a Transpose that moves only such axes is a reshape, and a reshape that moves only
such axes can become part of a Transpose beside it. What stands for sizes in all of this are the *tokens* of a shape:
its dimensions but the ones, in order. The wrapper of a sparse core stays as it is: other passes know it by its form.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from graphopt.rewriting.cuts import made_by, sizes
from graphopt.rewriting.nodes import is_onnx
from graphopt.sparsity.marks import is_wrapper

Dims = Sequence[int | str | None]

RESHAPES = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")


def permutation(node: ir.Node) -> list[int] | None:
    """The permutation of a Transpose, also where none is written (the reverse); None where unknown, or it must stay."""
    if is_wrapper(node) or any(attribute.is_ref() for attribute in node.attributes.values()):
        return None  # the second: the caller of a function gives it
    found = node.attributes.get_ints("perm", None)
    if found is not None:
        return list(found)
    dims = node.inputs[0].shape if node.inputs[0] is not None else None
    return None if dims is None else list(range(len(dims)))[::-1]


def keeps_order(node: ir.Node) -> bool:
    """True for a reshape of any kind and for a Transpose that moves only axes of size 1."""
    if is_onnx(node, *RESHAPES):
        return True
    dims = sizes(node.inputs[0]) if is_onnx(node, "Transpose") else None
    perm = permutation(node) if dims is not None else None
    if dims is None or perm is None:
        return False
    moved = [axis for axis in perm if dims[axis] != 1]
    return moved == sorted(moved)


def target_of(source: Dims, wanted: Dims) -> list[int] | None:
    """A Reshape target that gives `wanted` for every tensor of shape `source`; None where one cannot say it.

    Dimensions without a number are copied from the axis at the same place where it has the same name; one may be left
    open. No target is found beside a dimension of 0, for which 0 and -1 mean other things.
    """
    if 0 in wanted or 0 in source:
        return None
    target = [
        d if isinstance(d, int) else 0 if d is not None and k < len(source) and source[k] == d else -1
        for k, d in enumerate(wanted)
    ]
    return target if target.count(-1) <= 1 else None


def same_elements(one: Dims, other: Dims) -> bool:
    """True where two shapes of equally many elements have the same tokens: only axes of size 1 stand elsewhere."""
    left, right = ([d for d in dims if d != 1] for dims in (one, other))
    if len(left) != len(right):
        return False
    unsure = [(a, b) for a, b in zip(left, right, strict=True) if a is None or b is None]
    return len(unsure) <= 1 and all(a == b for a, b in zip(left, right, strict=True) if a is not None and b is not None)


def carried(source: Dims, perm: Sequence[int], wanted: Dims) -> list[int] | None:
    """The permutation of `source` that gives `wanted`, a shape with the same tokens as the transposed one.

    None where the ranks differ or the tokens do.
    """
    if len(source) != len(wanted) or not same_elements([source[axis] for axis in perm], wanted):
        return None
    tokens = iter([axis for axis in perm if source[axis] != 1])
    ones = iter([axis for axis, d in enumerate(source) if d == 1])
    return [next(ones if d == 1 else tokens) for d in wanted]


def before(node: ir.Node) -> ir.Node | None:
    """The reshape or Transpose that makes the first input of `node`, and can be merged with it."""
    found = made_by(node.inputs[0], node, "Transpose", *RESHAPES)
    return None if found is None or is_wrapper(found) or is_wrapper(node) else found
