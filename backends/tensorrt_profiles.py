"""Optimisation profiles: for every input with open sizes the smallest, the usual and the largest shape of an engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from graphopt.errors import UsageError
from graphopt.lowering.size_ranges import Range, open_sizes, parse_ranges

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphopt.data.feeds import Array

KINDS = ("min", "opt", "max")
"""What TensorRT calls the three shapes."""


@dataclass(frozen=True)
class Profiles:
    """Shapes that an engine is built for.

    Attributes:
        inputs: of each input with open sizes "min", "opt" and "max"; {} where all are fixed.
        guessed: dimensions that nobody gave a range, which the engine takes at one size only.
    """

    inputs: dict[str, dict[str, list[int]]]
    guessed: tuple[str, ...] = ()


def profiles(model: ir.Model, sizes: str, sample: Mapping[str, Array]) -> Profiles:
    """The shapes of a model's inputs.

    Args:
        model: with shapes of known rank at its inputs.
        sizes: ranges of open dimensions, "batch=1:8:32" (`graphopt.lowering.size_ranges`).
        sample: one input, whose sizes are taken where no range was given.

    Raises:
        UsageError: the text is not of that form, or names no open dimension.
    """
    given, guessed = parse_ranges(sizes), dict[str, int]()
    names = open_sizes(model)
    wanted = {name for each in names.values() for name in each}
    if unknown := next((name for name in given if name not in wanted), None):
        listed = ", ".join(sorted(wanted)) or "none"
        raise UsageError(
            f"{unknown!r} is no open dimension of the inputs", where="sizes", hint=f"the open dimensions are {listed}"
        )
    found: dict[str, dict[str, list[int]]] = {}
    for value in model.graph.inputs:
        name = str(value.name)
        if name not in names or value.shape is None:
            continue
        dimensions, ranges = iter(names[name]), list[Range]()
        for axis, size in enumerate(value.shape):
            if isinstance(size, int):
                ranges.append((size, size, size))
            elif (dimension := next(dimensions)) in given:
                ranges.append(given[dimension])
            else:
                guessed[dimension] = taken = int(sample[name].shape[axis])
                ranges.append((taken, taken, taken))
        found[name] = {kind: [bounds[i] for bounds in ranges] for i, kind in enumerate(KINDS)}
    return Profiles(found, tuple(guessed))


def spec(inputs: Mapping[str, list[int]]) -> str:
    """Shapes as trtexec takes them: 'name:1x3x224x224,other:1x128'."""
    return ",".join(f"{quoted(name)}:{'x'.join(map(str, shape)) or 'scalar'}" for name, shape in inputs.items())


def quoted(name: str) -> str:
    """A tensor's name as trtexec takes it: in quotes where it has one of its separators."""
    return f"'{name}'" if any(c in name for c in ":,") else name
