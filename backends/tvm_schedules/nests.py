"""Loops for one stage: element by element in vectors, or a reduction in several partial vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tvm_ffi
from tvm import ir, tirx

from graphopt.backends.tvm_schedules.assignments import Assignment, of_stage, prepared
from graphopt.backends.tvm_schedules.loops import (
    Strides,
    computed,
    contiguous,
    covered,
    loop,
    partitioned,
    powers_below,
    register,
    sequence,
    splat,
    vector,
    vectorized,
)
from graphopt.backends.tvm_schedules.machine import Machine
from graphopt.backends.tvm_schedules.stages import (
    CHOICES,
    Stage,
    constant,
    dtype,
    loads,
    substitute,
    variables,
    zero,
)

PARTIAL_VECTORS = 4
"""Sums that grow side by side: an addition takes 3 to 4 cycles, and one may begin in each."""


def nest(stage: Stage, machine: Machine, bound: int = 0, parallel: bool = False, inner: bool = False) -> Any:
    """The loops of a stage.

    Args:
        stage: whose buffer is written.
        machine: whose vectors are filled.
        bound: how many of its first axes are variables of loops around it.
        parallel: whether the outermost loop is split among cores.
        inner: whether the buffer is the function's own, and not one of its results.
    """
    kind = tirx.ForKind.PARALLEL if parallel else tirx.ForKind.SERIAL
    if stage.reduced:
        return _reduction(stage, machine, bound, kind, inner)
    return sequence(_elementwise(piece, machine, kind, inner) for piece in prepared(of_stage(stage, bound)))


def _around(loops: Sequence[tuple[Any, Any]], kind: tirx.ForKind, body: Any) -> Any:
    for depth, (var, extent) in reversed(list(enumerate(loops))):
        body = tirx.For(var, zero(var), extent, kind if depth == 0 else tirx.ForKind.SERIAL, body)
    return body


def _elementwise(assignment: Assignment, machine: Machine, kind: tirx.ForKind, inner: bool) -> Any:
    def store(new: dict[Any, Any]) -> Any:
        value = substitute(assignment.value, new)
        return tirx.BufferStore(assignment.buffer, value, [substitute(i, new) for i in assignment.indices])

    if not assignment.loops:
        return computed(1, lambda _: store({}), tirx.const(0, "int64"))
    *outer, (var, extent) = assignment.loops
    if not fills_vectors(assignment.value, assignment.store, var, assignment.strides()):
        return _around(assignment.loops, kind, computed(1, lambda _: store({}), var))

    def piece(start: Any, lanes: int) -> Any:
        return computed(lanes, lambda lane: store({var: start + lane}), var)

    cover = partitioned if inner else covered
    pieces = cover(var.name, extent, powers_below(machine.lanes()), piece)
    if not outer and kind == tirx.ForKind.PARALLEL and isinstance(pieces, tirx.For):
        return tirx.For(pieces.loop_var, pieces.min, pieces.extent, kind, pieces.body)
    return _around(outer, kind, pieces)


def fills_vectors(value: Any, store: Any, var: Any, strides: Strides) -> bool:
    """Whether a formula is worth vectors along `var`: all in 32-bit floats, contiguous or the same in all lanes, no
    branch on the lane. Other loops stay plain, for LLVM to see what it can do."""
    reads = loads(value)
    if any(read.source.dtype != "float32" for read in (store, *reads)) or not contiguous(strides.along(var)):
        return False
    if strides.along(var)[0] != 1:
        return False
    branches: list[Any] = []
    tvm_ffi.structural_walk(value, (ir.Call, branches.append))
    return not any(getattr(c.op, "name", "") in CHOICES and var in variables(c.args[0]) for c in branches)


def _reduction(stage: Stage, machine: Machine, bound: int, kind: tirx.ForKind, inner: bool) -> Any:
    ranges = list(stage.ranges())
    axes = [(v, e) for v, e in zip(stage.axes, stage.extents, strict=True) if constant(e) != 1]
    outside = set(stage.axes[:bound])
    axes = [(v, e) for v, e in axes if v not in outside]
    place = [v if constant(e) != 1 else zero(v) for v, e in zip(stage.axes, stage.extents, strict=True)]
    store = tirx.BufferLoad(stage.buffer, place)
    strides = Strides([store, *loads(stage.value)], ranges)
    if axes and stage.reduced and fills_vectors(stage.value, store, axes[-1][0], strides):
        return _around(axes[:-1], kind, _columns(stage, place, axes[-1], machine, inner))
    along = stage.reduced[-1]
    if _fills_partial_vectors(stage, along, strides):
        return _around(axes, kind, _partial(stage, place, machine))
    return _around(axes, kind, _plain(stage, place))


def _fills_partial_vectors(stage: Stage, along: Any, strides: Strides) -> bool:
    steps = strides.along(along)[1:]
    if stage.buffer.dtype != "float32" or any(read.source.dtype != "float32" for read in loads(stage.value)):
        return False
    calls: list[Any] = []
    tvm_ffi.structural_walk(stage.value, (ir.Call, calls.append))
    branches = any(getattr(c.op, "name", "") in CHOICES and along in variables(c.args[0]) for c in calls)
    return 1 in steps and contiguous(steps) and not branches and _starts_neutral(stage)


def _starts_neutral(stage: Stage) -> bool:
    """Whether combining the start twice is as good as once: every partial vector begins with it."""
    neutral = {tirx.Add: 0.0, tirx.Mul: 1.0}.get(stage.combine)
    return neutral is None or (isinstance(stage.start, tirx.FloatImm) and float(stage.start.value) == neutral)


def _reduced_loops(stage: Stage, body: Callable[[dict[Any, Any]], Any], inner: int = 0) -> Any:
    """Loops over all reduced axes, without the last `inner` ones."""
    pairs = list(zip(stage.reduced, stage.reduced_extents, strict=True))
    fresh = {var: tirx.Var(var.name, dtype(var)) for var, _ in pairs}
    statement = body(fresh)
    for var, extent in reversed(pairs[: len(pairs) - inner]):
        statement = tirx.For(fresh[var], zero(var), extent, tirx.ForKind.SERIAL, statement)
    return statement


def _columns(stage: Stage, place: list[Any], axis: tuple[Any, Any], machine: Machine, inner: bool) -> Any:
    """Vectors across the columns of the result; the rows that are reduced run inside, sums in registers."""
    var, extent = axis
    lanes = machine.lanes()
    sizes = (lanes * PARTIAL_VECTORS, *powers_below(lanes))

    def piece(start: Any, width: int) -> Any:
        step = min(width, lanes)
        sums = [register(step, f"sum{j}") for j in range(width // step)]

        def update(fresh: dict[Any, Any]) -> Any:
            return sequence(
                vectorized(step, lambda lane, j=j, s=s: tirx.BufferStore(  # type: ignore[misc]
                    s, stage.combine(tirx.BufferLoad(s, [lane]),
                                     substitute(stage.value, {**fresh, var: start + j * step + lane})), [lane]), var)
                for j, s in enumerate(sums)
            )  # fmt: skip

        whole = vector(zero(var), step)
        stores = [
            tirx.BufferStore(
                stage.buffer,
                tirx.BufferLoad(s, [whole]),
                [_moved(i, var, vector(start + j * step, step)) for i in place],
            )
            for j, s in enumerate(sums)
        ]
        return sequence(
            [*map(tirx.AllocBuffer, sums), *(tirx.BufferStore(s, splat(stage.start, step), [whole]) for s in sums),
             _reduced_loops(stage, update), *stores]
        )  # fmt: skip

    return (partitioned if inner else covered)(var.name, extent, sizes, piece)


def _moved(position: Any, var: Any, to: Any) -> Any:
    return to if isinstance(position, tirx.Var) and position == var else position


def _plain(stage: Stage, place: list[Any]) -> Any:
    total = register(1, "total", stage.buffer.dtype)
    first = [tirx.const(0, "int64")]

    def update(fresh: dict[Any, Any]) -> Any:
        return tirx.BufferStore(
            total, stage.combine(tirx.BufferLoad(total, first), substitute(stage.value, fresh)), first
        )

    return sequence(
        [tirx.AllocBuffer(total), tirx.BufferStore(total, stage.start, first), _reduced_loops(stage, update),
         tirx.BufferStore(stage.buffer, tirx.BufferLoad(total, first), place)]
    )  # fmt: skip


def _partial(stage: Stage, place: list[Any], machine: Machine) -> Any:
    """Vectors along the last reduced axis, several side by side; then the rest of the row, then across lanes."""
    along, extent = stage.reduced[-1], stage.reduced_extents[-1]
    lanes, index_type = machine.lanes(), dtype(along)
    size = constant(extent)
    width = lanes * PARTIAL_VECTORS
    count = PARTIAL_VECTORS if size is None or size >= width else max(1, size // lanes)
    sums = [register(lanes, f"sum{j}") for j in range(count)]
    total = register(1, "total")
    whole, first = vector(tirx.const(0, index_type), lanes), [tirx.const(0, index_type)]

    def vectors(fresh: dict[Any, Any], start: Any, used: Sequence[Any]) -> Any:
        return sequence(
            vectorized(lanes, lambda lane, j=j, s=s: tirx.BufferStore(  # type: ignore[misc]
                s, stage.combine(tirx.BufferLoad(s, [lane]),
                                 substitute(stage.value, {**fresh, along: start + j * lanes + lane})), [lane]), along)
            for j, s in enumerate(used)
        )  # fmt: skip

    def row(fresh: dict[Any, Any]) -> Any:
        def number(value: Any) -> Any:
            return value if size is None else tirx.const(value, index_type)

        wide = count * lanes
        whole_extent = extent if size is None else size
        blocks = tirx.floordiv(extent, tirx.const(wide, index_type)) if size is None else size // wide
        vectors_left = (
            tirx.floordiv(extent - blocks * wide, tirx.const(lanes, index_type))
            if size is None
            else size % wide // lanes
        )
        done = blocks * wide
        tail = done + vectors_left * lanes
        parts = []
        if size is None or blocks:
            parts.append(loop("block", number(blocks), lambda b: vectors(fresh, b * wide, sums)))
        if size is None or vectors_left:
            parts.append(
                loop("vector", number(vectors_left), lambda b: vectors(fresh, number(done) + b * lanes, sums[:1]))
            )
        if size is None or whole_extent != tail:
            parts.append(loop("rest", number(whole_extent - tail), lambda b: tirx.BufferStore(
                total, stage.combine(tirx.BufferLoad(total, first),
                                     substitute(stage.value, {**fresh, along: number(tail) + b})), first)))  # fmt: skip
        return sequence(parts)

    statements = [*map(tirx.AllocBuffer, (*sums, total)), tirx.BufferStore(total, stage.start, first)]
    statements += [tirx.BufferStore(s, splat(stage.start, lanes), [whole]) for s in sums]
    statements.append(_reduced_loops(stage, row, inner=1))
    statements += _across(stage.combine, sums, total, lanes, index_type)
    statements.append(tirx.BufferStore(stage.buffer, tirx.BufferLoad(total, first), place))
    return sequence(statements)


def _across(combine: Any, sums: Sequence[Any], total: Any, lanes: int, index_type: str) -> list[Any]:
    """All lanes of all partial vectors into `total`: in a tree, vectors of half the length in each step."""
    zero_index = tirx.const(0, index_type)
    statements, left = [], list(sums)
    while len(left) > 1:
        half = (len(left) + 1) // 2
        whole = vector(zero_index, lanes)
        statements += [
            tirx.BufferStore(a, combine(tirx.BufferLoad(a, [whole]), tirx.BufferLoad(b, [whole])), [whole])
            for a, b in zip(left, left[half:], strict=False)
        ]
        left = left[:half]
    width = lanes
    while width > 1:
        width //= 2
        low, high = vector(zero_index, width), vector(tirx.const(width, index_type), width)
        statements.append(
            tirx.BufferStore(left[0], combine(tirx.BufferLoad(left[0], [low]), tirx.BufferLoad(left[0], [high])), [low])
        )
    first = [zero_index]
    statements.append(
        tirx.BufferStore(total, combine(tirx.BufferLoad(total, first), tirx.BufferLoad(left[0], first)), first)
    )
    return statements
