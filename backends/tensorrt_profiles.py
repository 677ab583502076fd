"""Optimisation profiles: for every input with free sizes the smallest, the usual and the largest shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from graphopt.analysis import shapes
from graphopt.errors import UsageError

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphopt.data.feeds import Array

Range = tuple[int, int, int]
"""Smallest, usual and largest size of one dimension."""


@dataclass(frozen=True)
class Profiles:
    """Shapes that an engine is built for.

    Attributes:
        inputs: of each input with free sizes "min", "opt" and "max"; {} where all are fixed.
        guessed: dimensions that nobody gave a range, which the engine takes at one size only.
    """

    inputs: dict[str, dict[str, list[int]]]
    guessed: tuple[str, ...] = ()


def parse_profile(text: str) -> dict[str, Range]:
    """Ranges by dimension from "batch=1:4:16,sequence=128"; one number stands for all three.

    Raises:
        UsageError: it is not of that form, or a range does not rise.
    """
    found: dict[str, Range] = {}
    for part in text.split(","):
        name, equals, numbers = part.partition("=")
        sizes = numbers.split(":")
        if not equals or not name.strip() or len(sizes) not in (1, 3) or not all(s.strip().isdigit() for s in sizes):
            raise UsageError(f"{part!r} is not NAME=MIN:OPT:MAX", where="profile", hint="write it as in batch=1:4:16")
        low, usual, high = (int(s) for s in (sizes * 3)[:3])
        if not 0 < low <= usual <= high:
            raise UsageError(f"{part!r} does not rise from a positive size", where="profile", hint="correct the range")
        found[name.strip()] = (low, usual, high)
    return found


def profiles(model: ir.Model, given: Mapping[str, Range], sample: Mapping[str, Array]) -> Profiles:
    """The shapes of a model's inputs.

    Args:
        model: with shapes of known rank at its inputs.
        given: ranges by the name of a dimension; "INPUT:AXIS" stands for one without a name.
        sample: one input, whose sizes are taken where no range was given.

    Raises:
        UsageError: a range names no free dimension of the model.
    """
    made: dict[str, dict[str, list[int]]] = {}
    used: set[str] = set()
    guessed: dict[str, None] = {}
    for value in model.graph.inputs:
        name, known = str(value.name), shapes.dims(value)
        if name in model.graph.initializers or known is None or all(isinstance(d, int) for d in known):
            continue
        ranges: list[Range] = []
        for axis, size in enumerate(known):
            key = size if isinstance(size, str) and size in given else f"{name}:{axis}"
            if isinstance(size, int):
                ranges.append((size, size, size))
            elif key in given:
                used.add(key)
                ranges.append(given[key])
            else:
                guessed[size if isinstance(size, str) else key] = None
                ranges.append((int(sample[name].shape[axis]),) * 3)
        made[name] = {kind: [r[i] for r in ranges] for i, kind in enumerate(("min", "opt", "max"))}
    unknown = sorted(set(given) - used)
    if unknown:
        free = sorted({*guessed, *used})
        raise UsageError(
            f"the model has no free dimension {unknown[0]!r}", where="profile",
            hint=f"its free dimensions are {', '.join(free)}" if free else "its inputs have fixed shapes",
        )  # fmt: skip
    return Profiles(made, tuple(guessed))


def spec(inputs: Mapping[str, list[int]]) -> str:
    """Shapes as trtexec takes them: 'name:1x3x224x224,other:1x128'."""
    return ",".join(f"{quoted(name)}:{'x'.join(map(str, shape)) or 'scalar'}" for name, shape in inputs.items())


def quoted(name: str) -> str:
    """A tensor's name as trtexec takes it: in quotes where it has one of its separators."""
    return f"'{name}'" if any(c in name for c in ":,") else name
