"""Which positions a Slice takes: bounds from attributes or operands, computed ones as far as shapes tell."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from graphopt.files.integers import Entry, dimensions, entries, integers


def slices(node: ir.Node) -> dict[int, slice | None] | None:
    """Axis -> slice of a Slice node.

    A slice is None where its bounds are computed from more than sizes, and `slice(None)` where it runs from 0 to the
    size of the very axis, which may be symbolic. None for all where even the axes are not known, or the rank.
    """
    source = node.inputs[0]
    dims = dimensions(source) if source is not None else None
    found = _bounds(node)
    if not dims or found is None:
        return None
    starts, ends, axes, steps = found
    result: dict[int, slice | None] = {}
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size = dims[axis % len(dims)]
        if start == 0 and step == 1 and isinstance(end, str) and end == size:
            result[axis % len(dims)] = slice(None)
        elif isinstance(start, int) and isinstance(end, int):
            # numpy wraps a negative end; ONNX's "past the front" is any number below -size.
            stop = None if step < 0 and end < -(2**31) + 1 else end
            result[axis % len(dims)] = slice(start, stop, step)
        else:
            result[axis % len(dims)] = None
    return result


def _bounds(node: ir.Node) -> tuple[Sequence[Entry], Sequence[Entry], Sequence[int], Sequence[int]] | None:
    """(starts, ends, axes, steps); None where it is not known how many there are, or axes or steps are computed."""
    if "starts" in node.attributes:  # before opset 10
        starts: Sequence[Entry] = list(node.attributes.get_ints("starts", ()) or ())
        ends: Sequence[Entry] = list(node.attributes.get_ints("ends", ()) or ())
        return starts, ends, list(node.attributes.get_ints("axes", ()) or range(len(starts))), [1] * len(starts)
    first, last = (entries(value) for value in node.inputs[1:3])
    given = [None if value is None else integers(value) for value in node.inputs[3:5]]
    if any(found is None and value is not None for found, value in zip(given, node.inputs[3:5], strict=True)):
        return None
    told = next((len(found) for found in (*given, first, last) if found is not None and found.ndim == 1), None)
    if told is None:
        return None
    starts, ends = ([None] * told if found is None else found.tolist() for found in (first, last))
    axes, steps = (
        default if place >= len(given) or (found := given[place]) is None else [int(entry) for entry in found]
        for place, default in enumerate((list(range(told)), [1] * told))
    )
    return starts, ends, axes, steps
