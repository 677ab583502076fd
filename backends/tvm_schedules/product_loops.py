"""The loops of a matrix product (`products.py` says which and why)."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import Any

import tvm_ffi
from tvm import ir, tirx

from graphopt.backends.tvm_schedules.loops import (
    computed,
    covered,
    loop,
    powers_below,
    register,
    sequence,
    splat,
    vector,
)
from graphopt.backends.tvm_schedules.machine import PARALLEL_SUMS, Machine
from graphopt.backends.tvm_schedules.products import FEW_ROWS, Block, Product, block_for, find, pieces
from graphopt.backends.tvm_schedules.rows import real_axes, with_body, work
from graphopt.backends.tvm_schedules.stages import constant, dtype, is_const, substitute, variables, zero


def product_rule(function: tirx.PrimFunc, machine: Machine) -> tirx.PrimFunc | None:
    """A product of two computed arrays, with what was fused behind it; None where the function is something else.

    A right operand whose columns are not neighbours in memory is copied into a panel first; with few rows that would
    cost more than it saves, and such sums are left to the loops of reductions.
    """
    found = find(function)
    if found is None:
        return None
    block = block_for(found.row_count(), constant(found.column[1]), machine)
    if not found.is_contiguous() and (found.row_count() or FEW_ROWS) < FEW_ROWS:
        return None
    return with_body(function, Kernel(found, machine, block, None).body())


class Kernel:
    """Writes the loops of one product.

    Args:
        found: the product.
        machine: whose vectors and cores it is for.
        block: the part of the result in registers.
        packed: the right operand in panels, (panels, reduced, columns of the block); None where it is read as it is.
    """

    def __init__(self, found: Product, machine: Machine, block: Block, packed: Any) -> None:
        self.found, self.machine, self.block, self.packed = found, machine, block, packed
        self.kind = dtype(found.column[0])
        self.row_count = tirx.const(1, self.kind)
        for _, size in found.rows:
            self.row_count = size if is_const(self.row_count, 1) else self.row_count * size
        self.heights = (block.rows,) if block.rows == 1 else (block.rows, 1)
        self.widths = (block.columns, *(size for size in powers_below(machine.lanes()) if size < block.columns))
        self.is_contiguous = packed is not None or found.is_contiguous()

    def body(self) -> Any:
        """All blocks: columns outside, since a panel of the right operand stays in the second-level cache meanwhile."""
        found = self.found
        parallel = self.machine.cores > 1 and work([found.stage]) >= PARALLEL_SUMS
        kind = tirx.ForKind.PARALLEL if parallel else tirx.ForKind.SERIAL
        columns = self._packed_columns() if self.packed is not None else self._columns()
        if not found.outer and isinstance(columns, tirx.For):
            columns = tirx.For(columns.loop_var, columns.min, columns.extent, kind, columns.body)
        for depth, (var, size) in reversed(list(enumerate(found.outer))):
            columns = tirx.For(var, zero(var), size, kind if depth == 0 else tirx.ForKind.SERIAL, columns)
        return columns

    def _packed_columns(self) -> Any:
        width, size = self.block.columns, constant(self.found.column[1])
        assert size is not None
        (k,) = self.found.stage.reduced

        def panel(number: Any) -> Any:
            def right(fresh: dict[Any, Any], _: Any, place: Any, lanes: int) -> Any:
                return tirx.BufferLoad(self.packed, [number, fresh[k], vector(place, lanes)])

            return self._rows(right, tirx.min(number * width, tirx.const(size - width, self.kind)), width)

        return loop("panel", tirx.const(ceil(size / width), self.kind), panel)

    def _columns(self) -> Any:
        def panel(start: Any, width: int) -> Any:
            if self.is_contiguous:
                return self._rows(self._right, start, width)
            return self._copied(start, width)

        return covered("column", self.found.column[1], self.widths, panel)

    def _copied(self, start: Any, width: int) -> Any:
        """Rows of blocks behind a copy of the columns that they need."""
        found = self.found
        panel = tirx.decl_buffer((*found.stage.reduced_extents, width), "float32", "panel")
        inner = {k: tirx.Var(k.name, dtype(k)) for k in found.stage.reduced}
        column = tirx.Var("copied", self.kind)
        value = substitute(found.right, {**inner, found.column[0]: start + column})
        copy = tirx.BufferStore(panel, value, [*inner.values(), column])
        for k, extent in reversed(list(zip(found.stage.reduced, found.stage.reduced_extents, strict=True))):
            copy = tirx.For(inner[k], zero(k), extent, tirx.ForKind.SERIAL, copy)
        copy = tirx.For(column, zero(column), tirx.const(width, self.kind), tirx.ForKind.SERIAL, copy)

        def read(fresh: dict[Any, Any], _: Any, place: Any, lanes: int) -> Any:
            return tirx.BufferLoad(panel, [*(fresh[k] for k in found.stage.reduced), vector(place, lanes)])

        return sequence([tirx.AllocBuffer(panel), copy, self._rows(read, start, width)])

    def _rows(self, right: Callable[[dict[Any, Any], Any, Any, int], Any], start: Any, width: int) -> Any:
        return covered(
            "row", self.row_count, self.heights, lambda row, height: self._tile(right, row, height, start, width)
        )  # fmt: skip

    def _at_row(self, row: Any) -> dict[Any, Any]:
        """The row axes' values at the row of this number."""
        new, left = {}, row
        for position, (var, size) in reversed(list(enumerate(self.found.rows))):
            new[var] = left if position == 0 else tirx.floormod(left, size)
            left = tirx.floordiv(left, size)
        return new

    def _tile(self, right: Any, row: Any, height: int, column: Any, width: int) -> Any:
        found, lanes = self.found, self.machine.lanes()
        first = tirx.Var("first_row", self.kind)
        start = tirx.Var("first_column", self.kind)
        parts = pieces(width, lanes)
        sums = [[register(size, f"sum{i}_{j}") for j, (_, size) in enumerate(parts)] for i in range(height)]
        lefts = [substitute(found.left, self._at_row(first + i)) for i in range(height)]

        def step(fresh: dict[Any, Any]) -> Any:
            statements = []
            rights = []
            for place, size in parts:
                named = tirx.Var(f"right{place}", f"float32x{size}" if size > 1 else "float32")
                statements.append(tirx.Bind(named, right(fresh, start, tirx.const(place, self.kind), size)))
                rights.append(named)
            for i in range(height):
                factor = substitute(lefts[i], fresh)
                for j, (_, size) in enumerate(parts):
                    whole = vector(tirx.const(0, self.kind), size)
                    total = tirx.BufferLoad(sums[i][j], [whole]) + splat(factor, size) * rights[j]
                    statements.append(tirx.BufferStore(sums[i][j], total, [whole]))
            return sequence(statements)

        pairs = list(zip(found.stage.reduced, found.stage.reduced_extents, strict=True))
        fresh = {k: tirx.Var(k.name, dtype(k)) for k, _ in pairs}
        walk = step(fresh)
        for k, extent in reversed(pairs):
            walk = tirx.For(fresh[k], zero(k), extent, tirx.ForKind.SERIAL, walk)
        flat = [s for line in sums for s in line]
        nothing, beginning = tirx.const(0.0, "float32"), tirx.const(0, self.kind)
        clear = [
            tirx.BufferStore(line[j], splat(nothing, size), [vector(beginning, size)])
            for line in sums
            for j, (_, size) in enumerate(parts)
        ]
        return sequence(
            [tirx.Bind(first, row), tirx.Bind(start, column), *map(tirx.AllocBuffer, flat), *clear, walk,
             self._finish(sums, parts, first, start)]
        )  # fmt: skip

    def _right(self, fresh: dict[Any, Any], start: Any, place: Any, lanes: int) -> Any:
        var = self.found.column[0]
        read = substitute(self.found.right, fresh)
        at = [
            vector(substitute(i, {var: start + place}), lanes) if var in variables(i) else i for i in read.indices
        ]  # fmt: skip
        return tirx.BufferLoad(read.source, at)

    def _finish(self, sums: Any, parts: Any, first: Any, start: Any) -> Any:
        """The block goes to the result: as it is, or through what was fused behind."""
        found, last = self.found, self.found.last
        axes = [axis for axis, _ in real_axes(found.stage)]
        own = [axis for axis, _ in real_axes(last)]
        names = dict(zip(axes, own, strict=True))
        place = [v if constant(s) != 1 else zero(v) for v, s in zip(last.axes, last.extents, strict=True)]
        column = names[found.column[0]]

        def result(i: Any, j: int, value: Any, lane: Any) -> Any:
            new = {names[var]: at for var, at in self._at_row(first + i).items()}
            new |= {names[var]: var for var, _ in found.outer}
            new[column] = start + parts[j][0] + lane
            formula = value
            if last is not found.stage:
                formula = substitute(
                    tvm_ffi.structural_map(
                        last.value,
                        (ir.expr.TensorLoad, lambda load: value if load.source == found.stage.buffer else load),
                    ),
                    new,
                )
            return tirx.BufferStore(last.buffer, formula, [substitute(p, new) for p in place])

        simple = last is found.stage or not _has_calls(last.value)
        height = len(sums)
        if simple or height == 1:
            return sequence(
                computed(size, lambda lane, i=i, j=j: result(i, j, tirx.BufferLoad(sums[i][j], [lane]), lane), first)  # type: ignore[misc]
                for i in range(height) for j, (_, size) in enumerate(parts)
            )  # fmt: skip
        block = tirx.decl_buffer((height, parts[-1][0] + parts[-1][1]), "float32", "block")
        spill = [
            tirx.BufferStore(block, tirx.BufferLoad(sums[i][j], [vector(tirx.const(0, self.kind), size)]),
                             [tirx.const(i, self.kind), vector(tirx.const(at, self.kind), size)])
            for i in range(height) for j, (at, size) in enumerate(parts)
        ]  # fmt: skip

        def line(i: Any) -> Any:
            def piece(j: int, at: int, size: int) -> Any:
                return computed(size, lambda lane: result(i, j, tirx.BufferLoad(block, [i, at + lane]), lane), first)

            return sequence(piece(j, at, size) for j, (at, size) in enumerate(parts))

        return sequence([tirx.AllocBuffer(block), *spill, loop("line", tirx.const(height, self.kind), line)])


def _has_calls(value: Any) -> bool:
    found: list[Any] = []
    tvm_ffi.structural_walk(value, (ir.Call, found.append))
    return bool(found)
