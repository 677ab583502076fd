"""Formulas with their loops, and what brings the loops into a form that fills vectors: splits, segments, merges."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise, product
from math import prod
from typing import Any

import tvm_ffi
from tvm import ir, tirx

from graphopt.backends.tvm_schedules.loops import Strides
from graphopt.backends.tvm_schedules.stages import (
    CHOICES,
    Stage,
    constant,
    dtype,
    loads,
    simplified,
    substitute,
    zero,
)

MOST_SEGMENTS = 32


@dataclass(frozen=True)
class Assignment:
    """`buffer[indices] = value` for every value of the loops' variables.

    Attributes:
        buffer: what is written.
        indices: where, in the loops' variables.
        value: the formula; may read the variables of `bound` as well.
        loops: variables with their extents, outermost first.
        bound: other variables in `indices` and `value`, with their extents: those of loops around this one.
    """

    buffer: Any
    indices: tuple[Any, ...]
    value: Any
    loops: tuple[tuple[Any, Any], ...]
    bound: tuple[tuple[Any, Any], ...] = ()

    @property
    def store(self) -> Any:
        """The element that is written, as if it were read."""
        return tirx.BufferLoad(self.buffer, list(self.indices))

    def strides(self) -> Strides:
        """Of the write, then of every read."""
        return Strides([self.store, *loads(self.value)], (*self.loops, *self.bound))

    def replaced(self, new: dict[Any, Any], loops: tuple[tuple[Any, Any], ...]) -> Assignment:
        """With variables replaced by formulas of the variables of other loops."""
        ranges = (*loops, *self.bound)
        store = simplified(substitute(self.store, new), ranges)
        value = simplified(substitute(self.value, new), ranges)
        return replace(self, indices=tuple(store.indices), value=value, loops=loops)


def of_stage(stage: Stage, bound: int = 0) -> Assignment:
    """The assignment of a stage without reduction, the first `bound` axes being those of loops around it."""
    ranges = tuple((var, size) for var, size in zip(stage.axes, stage.extents, strict=True))
    indices = tuple(var if constant(size) != 1 else zero(var) for var, size in ranges)
    loops = tuple((var, size) for var, size in ranges[bound:] if constant(size) != 1)
    return Assignment(stage.buffer, indices, stage.value, loops, ranges[:bound])


def prepared(assignment: Assignment) -> Iterator[Assignment]:
    """The pieces of an assignment: axes split where indices divide by a constant, cut where conditions change, merged
    where neighbours are one run of memory in every array."""
    for piece in _segments(_split(assignment)):
        yield _merged(piece)


def _split(assignment: Assignment) -> Assignment:
    """Axes of which indices take `v // c` and `v % c` become two: reshapes of split axes then read plain rows."""
    for var, extent in assignment.loops:
        size = constant(extent)
        divisors = sorted(
            d for d in _divisors(assignment.value, var) if size is not None and size % d == 0 and 1 < d < size
        )
        if size is None or not divisors:
            continue
        inner = divisors[0]
        outer_var, inner_var = tirx.Var(f"{var.name}o", dtype(var)), tirx.Var(f"{var.name}i", dtype(var))
        pair = ((outer_var, tirx.const(size // inner, dtype(var))), (inner_var, tirx.const(inner, dtype(var))))
        loops = tuple(new for loop in assignment.loops for new in (pair if loop[0] == var else (loop,)))
        return _split(assignment.replaced({var: outer_var * inner + inner_var}, loops))
    return assignment


def _divisors(value: Any, var: Any) -> set[int]:
    found = set()

    def note(node: Any) -> None:
        divisor = constant(node.b)
        if divisor is not None and node.a == var:
            found.add(divisor)

    tvm_ffi.structural_walk(value, [(tirx.FloorDiv, note), (tirx.FloorMod, note)])
    return found


def _segments(assignment: Assignment) -> Iterator[Assignment]:
    """Loops cut where a condition on one variable changes: concatenations and paddings lose their branches."""
    cuts = [_cuts(assignment.value, var, constant(extent)) for var, extent in assignment.loops]
    if prod(len(points) - 1 for points in cuts) > MOST_SEGMENTS:
        yield assignment
        return
    for corner in product(*(list(pairwise(points)) for points in cuts)):
        loops, new = [], {}
        for (var, extent), (low, high) in zip(assignment.loops, corner, strict=True):
            if low is None or high is None:
                loops.append((var, extent))
                continue
            if high - low == 1:
                new[var] = tirx.const(low, dtype(var))
                continue
            piece = tirx.Var(var.name, dtype(var))  # of its own: TVM wants one extent for a variable in a function
            new[var] = piece + low if low else piece
            loops.append((piece, tirx.const(high - low, dtype(var))))
        yield assignment.replaced(new, tuple(loops))


def _cuts(value: Any, var: Any, size: int | None) -> list[int | None]:
    if size is None:
        return [0, None]
    points: set[int] = {0, size}

    def note(node: Any) -> None:
        if getattr(node.op, "name", "") in CHOICES:
            tvm_ffi.structural_walk(
                node.args[0], [(kind, compare) for kind in (tirx.LT, tirx.LE, tirx.GT, tirx.GE, tirx.EQ)]
            )

    def compare(node: Any) -> None:
        for this, other, mirrored in ((node.a, node.b, False), (node.b, node.a, True)):
            offset, bound = _offset(this, var), constant(other)
            if offset is None or bound is None:
                continue
            at = bound - offset  # var compared with at
            if isinstance(node, tirx.EQ):
                points.update((at, at + 1))
            elif isinstance(node, (tirx.LE, tirx.GT)) != mirrored:
                points.add(at + 1)
            else:
                points.add(at)

    tvm_ffi.structural_walk(value, (ir.Call, note))
    return [*sorted(p for p in points if 0 <= p <= size)]


def _offset(value: Any, var: Any) -> int | None:
    """c where `value` is var + c."""
    if isinstance(value, tirx.Var):
        return 0 if value == var else None
    if isinstance(value, (tirx.Add, tirx.Sub)) and value.a == var:
        offset = constant(value.b)
        return None if offset is None else offset if isinstance(value, tirx.Add) else -offset
    return None


def _merged(assignment: Assignment) -> Assignment:
    """Neighbouring loops that are one run of memory in every array become one loop."""
    position = len(assignment.loops) - 1
    while position > 0:
        (outer, outer_size), (inner, inner_size) = assignment.loops[position - 1 : position + 1]
        if _is_one_run(assignment, outer, inner, inner_size):
            both = tirx.Var(f"{outer.name}_{inner.name}", dtype(outer))
            loops = list(assignment.loops)
            loops[position - 1 : position + 1] = [(both, outer_size * inner_size)]
            new = {outer: tirx.floordiv(both, inner_size), inner: tirx.floormod(both, inner_size)}
            assignment = assignment.replaced(new, tuple(loops))
        position -= 1
    return assignment


def _is_one_run(assignment: Assignment, outer: Any, inner: Any, inner_size: Any) -> bool:
    size = constant(inner_size)
    if size is None or outer in _scalars(assignment) or inner in _scalars(assignment):
        return False
    strides = assignment.strides()
    return all(
        a is not None and b is not None and a == b * size
        for a, b in zip(strides.along(outer), strides.along(inner), strict=True)
    )  # fmt: skip


def _scalars(assignment: Assignment) -> set[Any]:
    """Variables that the formula uses otherwise than in plain indices of arrays: as a number, or to choose by."""
    used: set[Any] = set()

    def outside(node: Any) -> Any:
        return tirx.const(0, str(node.ty.dtype)) if not isinstance(node.ty, tirx.BufferType) else node

    bare = tvm_ffi.structural_map(assignment.value, (ir.expr.TensorLoad, outside), order="post")
    tvm_ffi.structural_walk(bare, (tirx.Var, used.add))
    return used
