"""Sizes that a model leaves open, as runtimes want them that build for ranges: least, usual and largest of each.

Text: `batch=1:8:32,seq=1:64:512`. A dimension is named as in the model, or INPUT.AXIS (`x.0`) where it has no name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from graphopt.errors import UsageError

if TYPE_CHECKING:
    import onnx_ir as ir

Range = tuple[int, int, int]
Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def open_sizes(model: ir.Model) -> dict[str, list[str]]:
    """The dimensions that inputs leave open: how they are named in a text of ranges, by input, in order of axes."""
    found: dict[str, list[str]] = {}
    for value in model.graph.inputs:
        if value.name in model.graph.initializers or value.shape is None:
            continue
        names = [_name(value, axis) for axis, size in enumerate(value.shape) if not isinstance(size, int)]
        if names:
            found[value.name or ""] = names
    return found


def parse_ranges(text: str) -> dict[str, Range]:
    """Ranges by dimension.

    Raises:
        UsageError: the text is not of that form, or sizes do not rise from 1 on.
    """
    found: dict[str, Range] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, sizes = part.rpartition("=")
        numbers = [int(size) if size.isascii() and size.isdigit() else 0 for size in sizes.split(":")]
        if not equals or len(numbers) != 3 or not 1 <= numbers[0] <= numbers[1] <= numbers[2]:
            raise UsageError(
                f"{part!r} is not NAME=LEAST:USUAL:LARGEST", where="sizes", hint="write it as in batch=1:8:32"
            )
        if name in found:
            raise UsageError(f"{name!r} is given twice", where="sizes", hint="give it once")
        found[name] = (numbers[0], numbers[1], numbers[2])
    return found


def input_ranges(model: ir.Model, text: str) -> dict[str, Shapes]:
    """Least, usual and largest shape of every input that leaves a size open.

    Raises:
        UsageError: an open dimension has no range, or a range no dimension; lists the open ones.
    """
    ranges, names = parse_ranges(text), open_sizes(model)
    wanted = list(dict.fromkeys(name for each in names.values() for name in each))
    for name in (*ranges, *wanted):
        if name not in ranges or name not in wanted:
            what = "has no range" if name in wanted else "is no open dimension of the inputs"
            raise UsageError(
                f"{name!r} {what}", where="sizes", hint=f"the open dimensions are {', '.join(wanted) or 'none'}"
            )
    found: dict[str, Shapes] = {}
    for value in model.graph.inputs:
        if value.name in names and value.shape is not None:
            bounds = [(d, d, d) if isinstance(d, int) else ranges[_name(value, a)] for a, d in enumerate(value.shape)]
            least, usual, largest = zip(*bounds, strict=True)
            found[value.name] = (least, usual, largest)
    return found


def _name(value: ir.Value, axis: int) -> str:
    assert value.shape is not None
    size = value.shape[axis]
    return f"{value.name}.{axis}" if isinstance(size, int) or size.value is None else size.value
