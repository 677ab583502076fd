"""Shapes of results that onnx's inference leaves open, above all of Reshape to targets computed from sizes of tensors.

Sizes are followed entry by entry (`graphopt.files.integers`). Where all entries of an operand that sizes a result are
numbers, inference is given a constant in its place. Where some are names of symbolic dimensions, the shape of the
result is told: in a Reshape 0 copies the dimension of the input, and -1 is what the other entries leave, the product of
the input's dimensions divided by theirs. In the same way a Range from 0 to the size of a dimension is as long as that
dimension, which makes the positions of a transformer as many as its tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.files.integers import dimensions, entries, integers, product, product_of
from graphopt.files.slices import slices

Entry = int | str | None
_SIZES = {
    **dict.fromkeys(("Reshape", "Expand", "Pad", "Tile", "Split", "Unsqueeze", "Squeeze"), (1,)),
    **{"ConstantOfShape": (0,), "Slice": (1, 2, 3, 4), "Resize": (3,), "Range": (0, 1, 2), "TopK": (1,)},
}
"""Operands that size results, by operator."""
_AS_INPUT = {"GroupNormalization"}
"""Operators without inference in onnx whose result is shaped as their first input."""


def is_open(value: ir.Value) -> bool:
    """True where the rank or an unnamed dimension of a result is unknown."""
    return value.shape is None or any(not isinstance(d, int) and d.value is None for d in value.shape)


def known_operands(node: ir.Node) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    """Computed operands that size the results of a node and of which every entry is a number: (index, entries)."""
    if node.domain not in {"", "ai.onnx"}:
        return
    for index in _SIZES.get(node.op_type, ()):
        operand = node.inputs[index] if index < len(node.inputs) else None
        if operand is not None and operand.producer() is not None:
            found = integers(operand)
            if found is not None:
                yield index, found


def result_dims(node: ir.Node) -> list[Entry] | None:
    """Dimensions of the first result as far as operands tell; None where not even the rank is known."""
    if node.domain not in {"", "ai.onnx"}:
        return None
    source, target = (node.inputs[k] if k < len(node.inputs) else None for k in (0, 1))
    if source is None:
        return None
    if node.op_type in _AS_INPUT:
        return list(dimensions(source) or ()) or None
    if node.op_type == "Range":
        return _range_dims(node)
    if node.op_type == "ConstantOfShape":
        return _vector(source)
    if node.op_type == "Pad":
        return _padded(dimensions(source), _vector(target)) if len(node.inputs) < 4 else None
    if node.op_type in {"Tile", "Resize", "Upsample"}:
        factors = node.inputs[2 if node.op_type == "Resize" and len(node.inputs) > 2 else 1]
        return _scaled(dimensions(source), entries(factors)) if "axes" not in node.attributes else None
    if node.op_type == "Slice":
        return _sliced(node, dimensions(source))
    wanted = _vector(target) if node.op_type in {"Reshape", "Expand"} else None
    if wanted is None:
        return None
    dims = dimensions(source)
    if node.op_type == "Expand":
        return None if dims is None else _expanded(dims, wanted)
    return _reshaped(dims, wanted, copies=not node.attributes.get_int("allowzero", 0))


def as_read(value: ir.Value) -> list[Entry] | None:
    """Dimensions of a tensor as the weights tell that it is multiplied with; None where none do."""
    dims = dimensions(value)
    for use in value.uses() if dims else ():
        if use.idx != 0 or use.node.op_type not in {"MatMul", "Gemm"} or use.node.attributes.get_int("transA", 0) != 0:
            continue
        weight = use.node.inputs[1]
        sizes = dimensions(weight) if weight is not None else None
        inner = None if not sizes else sizes[-1 if use.node.attributes.get_int("transB", 0) else max(len(sizes) - 2, 0)]
        if isinstance(inner, int):
            return [*[None] * (len(dims or ()) - 1), inner]
    return None


def _sliced(node: ir.Node, dims: Sequence[Entry] | None) -> list[Entry] | None:
    """Axes that are not cut keep their size, also where it is not known how the others are cut."""
    cuts = slices(node)
    if dims is None or cuts is None:
        return None
    result = list(dims)
    for axis, cut in cuts.items():
        size = dims[axis]
        if cut is None:
            result[axis] = None
        elif cut != slice(None):
            result[axis] = len(range(size)[cut]) if isinstance(size, int) else None
    return result


def _vector(value: ir.Value | None) -> list[Entry] | None:
    found = entries(value)
    return None if found is None or found.ndim != 1 else [e if isinstance(e, int | str) else None for e in found]


def _expanded(dims: Sequence[Entry], wanted: Sequence[Entry]) -> list[Entry]:
    """Sizes of 1 on either side give way to those of the other."""
    rank = max(len(dims), len(wanted))
    one_each: list[Entry] = [1]
    sides = [[*one_each * (rank - len(side)), *side] for side in (dims, wanted)]
    return [
        other if one == 1 else one if other in (1, one) or (other is None and one is not None) else None
        for one, other in zip(*sides, strict=True)
    ]


def _padded(dims: Sequence[Entry] | None, pads: Sequence[Entry] | None) -> list[Entry] | None:
    """Axes without pads keep their size; numbers add up."""
    if dims is None or pads is None or len(pads) != 2 * len(dims):
        return None
    result: list[Entry] = []
    for dim, before, after in zip(dims, pads, pads[len(dims) :], strict=False):
        numbers = [k for k in (dim, before, after) if isinstance(k, int)]
        result.append(dim if before == after == 0 else sum(numbers) if len(numbers) == 3 else None)
    return result


def _scaled(dims: Sequence[Entry] | None, factors: npt.NDArray[np.object_] | None) -> list[Entry] | None:
    """Axes that are scaled by 1 keep their size."""
    if dims is None or factors is None or len(factors.ravel()) != len(dims):
        return None
    return [dim if factor == 1 else None for dim, factor in zip(dims, factors.ravel(), strict=True)]


def _range_dims(node: ir.Node) -> list[Entry] | None:
    start, limit, step = (None if found is None else found.ravel().tolist() for found in map(entries, node.inputs))
    return limit if start == [0] and step == [1] and limit is not None and isinstance(limit[0], str) else None


def _reshaped(source: Sequence[Entry] | None, wanted: Iterable[Entry], copies: bool) -> list[Entry]:
    """The shape of a result, given the target's entries."""
    result: list[Entry] = []
    for place, entry in enumerate(wanted):
        copied = source[place] if source is not None and place < len(source) else None
        result.append(copied if entry == 0 and copies else entry)
    rest = [place for place, entry in enumerate(result) if entry == -1]
    for place in rest:
        others = [entry for k, entry in enumerate(result) if k != place]
        result[place] = _quotient(source, others) if len(rest) == 1 else None
    return result


def _quotient(source: Sequence[Entry] | None, others: Sequence[Entry]) -> Entry:
    """The product of `source` over that of `others`, where its factors are among those of `source`."""
    if source is None or None in source or None in others:
        return None
    above, names = product_of(d for d in source if d is not None)
    below, gone = product_of(d for d in others if d is not None)
    if below <= 0 or above % below or Counter(gone) - Counter(names):
        return None
    return product(above // below, sorted((Counter(names) - Counter(gone)).elements()))
