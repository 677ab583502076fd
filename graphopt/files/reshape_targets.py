"""Shapes of results that onnx's inference leaves open, above all of Reshape to targets computed from sizes of tensors.

The target is followed entry by entry through Shape, Gather, Slice, Concat, Unsqueeze, Squeeze, Cast and Identity. An
entry is a number, the name of a symbolic dimension, or unknown; 0 copies the dimension of the input, and -1 is what
the other entries leave: the product of the input's dimensions divided by theirs. In the same way a Range from 0 to the
size of a dimension is as long as that dimension, which makes the positions of a transformer as many as its tokens.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

import onnx_ir as ir

Entry = int | str | None
LONGEST = 64
"""Vectors with more entries than a rank can have are no targets."""
_AS_INPUT = {"GroupNormalization"}
"""Operators without inference in onnx whose result is shaped as their first input."""


def open_results(model: ir.Model) -> Iterator[ir.Value]:
    """Results, also in bodies, that inference left open and that `result_dims` may know more of."""
    for node in model.graph.all_nodes():
        known = node.op_type in {"Reshape", "Range", *_AS_INPUT} and node.domain in {"", "ai.onnx"}
        if not known:
            continue
        shape = node.outputs[0].shape
        if shape is None or (node.op_type == "Range" and not shape.is_static()):
            yield node.outputs[0]


def result_dims(node: ir.Node) -> list[Entry] | None:
    """Dimensions of an open result as far as its operands tell; None where not even the rank is known."""
    source, target = (node.inputs[k] if k < len(node.inputs) else None for k in (0, 1))
    if node.op_type in _AS_INPUT:
        return None if source is None else _dims(source)
    if node.op_type == "Range":
        return _range_dims(node)
    entries = _entries(target)
    if source is None or entries is None:
        return None
    return _dimensions(_dims(source), entries, copies=not node.attributes.get_int("allowzero", 0))


def _range_dims(node: ir.Node) -> list[Entry] | None:
    start, limit, step = (_followed(v) for v in node.inputs)
    return limit if start == [0] and step == [1] and limit is not None and isinstance(limit[0], str) else None


def _dims(value: ir.Value) -> list[Entry] | None:
    """Dimensions of a tensor; None where its rank is unknown."""
    if value.shape is None:
        return None
    return [d if isinstance(d, int) else d.value for d in value.shape]


def _dimensions(source: list[Entry] | None, entries: Sequence[Entry], copies: bool) -> list[Entry]:
    """The shape of a result, given the target's entries."""
    result: list[Entry] = []
    for place, entry in enumerate(entries):
        copied = source[place] if source is not None and place < len(source) else None
        result.append(copied if entry == 0 and copies else entry)
    rest = [place for place, entry in enumerate(result) if entry == -1]
    for place in rest:
        others = [entry for k, entry in enumerate(result) if k != place]
        result[place] = _quotient(source, others) if len(rest) == 1 else None
    return result


def _quotient(source: list[Entry] | None, others: Sequence[Entry]) -> int | None:
    """The product of `source` over that of `others`, if symbolic factors cancel."""
    if source is None or None in source or None in others:
        return None
    names = [Counter(d for d in dims if isinstance(d, str)) for dims in (source, others)]
    above, below = (math.prod(d for d in dims if isinstance(d, int)) for dims in (source, others))
    return above // below if names[0] == names[1] and below > 0 and above % below == 0 else None


def _entries(value: ir.Value | None) -> list[Entry] | None:
    """Entries of an integer vector or scalar; None where not even their number is known."""
    found = _followed(value)
    if found is not None or value is None or value.shape is None or len(value.shape) > 1:
        return found
    count = value.shape[0] if len(value.shape) else 1
    return [None] * count if isinstance(count, int) and count <= LONGEST else None


def _followed(value: ir.Value | None) -> list[Entry] | None:
    constant = ir.convenience.get_const_tensor(value) if value is not None else None
    if constant is not None:
        return [int(k) for k in constant.numpy().ravel()] if constant.size <= LONGEST else None
    node = value.producer() if value is not None else None
    if node is None or node.domain not in {"", "ai.onnx"}:
        return None
    first = node.inputs[0] if node.inputs else None
    if node.op_type in {"Identity", "Cast", "Unsqueeze", "Squeeze"}:
        return _entries(first)
    if node.op_type == "Shape":
        dims = _dims(first) if first is not None else None
        return (
            None if dims is None else dims[node.attributes.get_int("start", 0) : node.attributes.get_int("end", None)]
        )
    if node.op_type == "Concat":
        parts = [_entries(v) for v in node.inputs]
        return None if any(p is None for p in parts) else [entry for part in parts for entry in part or ()]
    entries = _entries(first)
    if entries is None:
        return None
    if node.op_type == "Gather":
        places = _followed(node.inputs[1])
        if places is not None and all(isinstance(p, int) and -len(entries) <= p < len(entries) for p in places):
            return [entries[p] for p in places if isinstance(p, int)]
    if node.op_type == "Slice":
        start, stop = _bound(node, 1, "starts"), _bound(node, 2, "ends")
        step = _bound(node, 4, "steps") if len(node.inputs) > 4 else 1
        if isinstance(start, int) and isinstance(stop, int) and step == 1:
            return entries[start:stop]
    return None


def _bound(node: ir.Node, index: int, attribute: str) -> Entry:
    """A bound of a Slice of a vector, an attribute before opset 10; None where it is computed."""
    found: Sequence[Entry] | None = node.attributes.get_ints(attribute, None)
    if found is None and index < len(node.inputs):
        found = _followed(node.inputs[index])
    return found[0] if found is not None and len(found) == 1 else None
