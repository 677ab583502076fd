"""Functions of several stages: softmax, normalisations, sums with what was fused to them; row by row where they can."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

import tvm_ffi
from tvm import ir, relax, s_tir, tirx

from graphopt.backends.tvm_schedules.loops import dear_calls, sequence
from graphopt.backends.tvm_schedules.machine import PARALLEL_ELEMENTS, Machine
from graphopt.backends.tvm_schedules.nests import nest
from graphopt.backends.tvm_schedules.stages import (
    NotStagesError,
    Program,
    Stage,
    constant,
    inlined,
    loads,
    parse,
    substitute,
)


def rows_rule(function: tirx.PrimFunc, machine: Machine) -> tirx.PrimFunc | None:
    """Formulas and reductions of any kind; None where the function holds something else (`stages.parse`).

    Producers are put into their readers, unless they are dear and would be computed again. What is left runs row by
    row: all stages share as many outer loops as agree in them, and what passes between them is one row, in the
    first-level cache.
    """
    if relax.analysis.has_reshape_pattern(function):
        return None  # Relax makes it a view of its argument
    try:
        program = inlined(parse(function), keep_dear)
    except NotStagesError:
        return None
    shared = shared_axes(program.stages) if len(program.stages) > 1 else 0
    body = _by_rows(program, shared, machine) if shared else _one_by_one(program, machine)
    return with_body(function, body)


def with_body(function: tirx.PrimFunc, body: Any) -> tirx.PrimFunc:
    """The function with the same parameters and attributes that does `body`, in the root block that Relax looks for."""
    root = s_tir.SBlock([], [], [], "root", body)
    return tirx.PrimFunc(
        function.params, s_tir.SBlockRealize([], tirx.const(True, "bool"), root), function.ret_type, function.attrs
    )


def keep_dear(stage: Stage, readers: Sequence[Stage]) -> bool:
    """Whether a stage should be computed once and kept: it is dear, and its readers would compute it more often."""
    if not dear_calls(stage.value):
        return False
    if len(readers) > 1:
        return True
    (reader,) = readers
    places = {tuple(str(i) for i in load.indices) for load in loads(reader.value) if load.source == stage.buffer}
    return len(places) > 1 or points(reader) is None or points(stage) is None or points(reader) > points(stage)  # type: ignore[operator]


def points(stage: Stage) -> int | None:
    """How many times a stage's formula is computed; None where sizes are open."""
    sizes = [constant(size) for size in (*stage.extents, *stage.reduced_extents)]
    return None if None in sizes else prod(s for s in sizes if s is not None)


def work(stages: Sequence[Stage]) -> int:
    """Formulas that are computed in all; a million where sizes are open."""
    counts = [points(stage) for stage in stages]
    return 1 << 20 if None in counts else sum(c for c in counts if c is not None)


def shared_axes(stages: Sequence[Stage]) -> int:
    """How many outer loops all stages have in common: each reads from the others at its own place along them.

    Axes of one element count for nothing, they come and go with reshapes. The last axis of a stage without reduction is
    left to its own loop, for vectors.
    """
    by_buffer = {stage.buffer: stage for stage in stages}
    most = min(len(real_axes(stage)) - (0 if stage.reduced else 1) for stage in stages)
    for stage in stages:
        own = [axis for axis, _ in real_axes(stage)]
        for load in loads(stage.value):
            if load.source not in by_buffer:
                continue
            producer = by_buffer[load.source]
            read = [load.indices[i] for i, size in enumerate(producer.extents) if constant(size) != 1]
            agree = 0
            while agree < min(len(read), len(own)) and read[agree] == own[agree]:
                agree += 1
            most = min(most, agree)
    first = [size for _, size in real_axes(stages[0])]
    for stage in stages[1:]:
        sizes = [size for _, size in real_axes(stage)]
        agree = 0
        while agree < min(len(sizes), len(first), most) and _same(sizes[agree], first[agree]):
            agree += 1
        most = min(most, agree)
    return max(most, 0)


def real_axes(stage: Stage) -> list[tuple[Any, Any]]:
    """The axes of more than one element, with their sizes."""
    return [(a, s) for a, s in zip(stage.axes, stage.extents, strict=True) if constant(s) != 1]


def _same(a: Any, b: Any) -> bool:
    return bool(constant(a) == constant(b) if constant(a) is not None else tvm_ffi.structural_equal(a, b))


def _by_rows(program: Program, shared: int, machine: Machine) -> Any:
    outputs = set(program.outputs)
    loops = real_axes(program.stages[-1])[:shared]
    renamed = [_along(stage, [var for var, _ in loops]) for stage in program.stages]
    rows_of = {s.buffer: _row_of(s, shared) for s in renamed if s.buffer not in outputs}
    inner = [tirx.AllocBuffer(row) for row in rows_of.values()]
    for stage in renamed:
        bound = 0 if stage.buffer in rows_of else _leading(stage, shared)
        inner.append(
            nest(_reading(stage, rows_of, shared, renamed), machine, bound=bound, inner=stage.buffer in rows_of)
        )
    body = sequence(inner)
    parallel = machine.cores > 1 and work(program.stages) >= PARALLEL_ELEMENTS
    for depth, (var, size) in reversed(list(enumerate(loops))):
        kind = tirx.ForKind.PARALLEL if parallel and depth == 0 else tirx.ForKind.SERIAL
        body = tirx.For(var, tirx.const(0, str(var.ty.dtype)), size, kind, body)
    return body


def _leading(stage: Stage, shared: int) -> int:
    """Dimensions up to and with the `shared`-th one of more than one element."""
    count = 0
    for position, size in enumerate(stage.extents):
        if count == shared:
            return position
        count += constant(size) != 1
    return len(stage.extents)


def _along(stage: Stage, loops: Sequence[Any]) -> Stage:
    """The stage with its first axes named like the loops around it."""
    new = dict(zip([axis for axis, _ in real_axes(stage)], loops, strict=False))
    return replace(stage, axes=tuple(new.get(a, a) for a in stage.axes), value=substitute(stage.value, new))


def _row_of(stage: Stage, shared: int) -> Any:
    sizes = [size for _, size in real_axes(stage)[shared:]]
    return tirx.decl_buffer(sizes or [1], stage.buffer.dtype, f"{stage.buffer.name}_row")


def _reading(stage: Stage, rows_of: dict[Any, Any], shared: int, stages: Sequence[Stage]) -> Stage:
    """The stage with rows in place of the arrays that pass between stages."""
    extents = {s.buffer: s.extents for s in stages}

    def inner(buffer: Any, indices: Sequence[Any]) -> list[Any]:
        kept = [i for i, size in zip(indices, extents[buffer], strict=True) if constant(size) != 1][shared:]
        return kept or [tirx.const(0, "int64")]

    def read(load: Any) -> Any:
        return (
            tirx.BufferLoad(rows_of[load.source], inner(load.source, load.indices)) if load.source in rows_of else load
        )

    value = tvm_ffi.structural_map(stage.value, (ir.expr.TensorLoad, read))
    if stage.buffer not in rows_of:
        return replace(stage, value=value)
    row, left = rows_of[stage.buffer], real_axes(stage)[shared:]
    axes = tuple(a for a, _ in left) or (tirx.Var("one", "int64"),)
    sizes = tuple(s for _, s in left) or (tirx.const(1, "int64"),)
    return replace(stage, buffer=row, axes=axes, extents=sizes, value=value)


def _one_by_one(program: Program, machine: Machine) -> Any:
    outputs = set(program.outputs)
    new = {
        s.buffer: tirx.decl_buffer(s.extents, s.buffer.dtype, s.buffer.name)
        for s in program.stages
        if s.buffer not in outputs
    }

    def read(load: Any) -> Any:
        return tirx.BufferLoad(new[load.source], load.indices) if load.source in new else load

    statements: list[Any] = [tirx.AllocBuffer(buffer) for buffer in new.values()]
    for stage in program.stages:
        value = tvm_ffi.structural_map(stage.value, (ir.expr.TensorLoad, read))
        parallel = machine.cores > 1 and work([stage]) >= PARALLEL_ELEMENTS
        own = replace(stage, buffer=new.get(stage.buffer, stage.buffer), value=value)
        statements.append(nest(own, machine, parallel=parallel, inner=stage.buffer in new))
    return sequence(statements)
