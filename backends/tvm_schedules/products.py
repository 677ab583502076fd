"""Matrix products: which functions are one, and in what blocks they are computed (the loops: `product_loops.py`).

The kernel keeps a block of the result in registers, `rows` rows by some vectors of columns, and walks the whole reduced
axis: each step loads one row of the right operand in vectors, and multiplies it by one broadcast number for each row of
the left. With 32 registers of 16 floats that is 8 rows by 3 vectors: 24 multiply-adds for 3 loads and 8 broadcasts,
more than enough independent sums to hide their latency. Measured on Zen 4: 115 GFLOP/s of a peak of 120 on
128 x 384 x 1536.

- Columns: a right operand that is a weight lies in panels as wide as the block (`weights.py`).
- The last block of rows, or of columns, is moved back to end with the array: it computes some elements again, and needs
  no masks. Fewer rows than a block: a smaller one, down to a matrix-vector product, whose block is all columns.
- Rows of open number: whole blocks where there are enough rows, else one row after the other.
- What was fused behind (bias, activation, residual) runs on the block, while it is in the first-level cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

from tvm import ir, tirx

from graphopt.backends.tvm_schedules.loops import (
    Strides,
    dear_calls,
    powers_below,
)
from graphopt.backends.tvm_schedules.machine import Machine
from graphopt.backends.tvm_schedules.rows import real_axes
from graphopt.backends.tvm_schedules.stages import (
    NotStagesError,
    Stage,
    constant,
    inlined,
    loads,
    parse,
    variables,
)


@dataclass(frozen=True)
class Product:
    """`out[outer, rows, column] = sum over reduced of left[outer, rows, reduced] * right[outer, reduced, column]`.

    Attributes:
        stage: the sum.
        left: its factor without the column; a formula.
        right: the factor with the column, which it reads along in vectors.
        rows: axes that the left factor alone has, with their sizes.
        column: the last axis of the result.
        outer: other axes: of both factors, or more of the right one alone.
        last: the stage that writes the function's result, and reads the sum once at its own place; the sum itself if
            nothing was fused.
    """

    stage: Stage
    left: Any
    right: Any
    rows: tuple[tuple[Any, Any], ...]
    column: tuple[Any, Any]
    outer: tuple[tuple[Any, Any], ...]
    last: Stage

    def row_count(self) -> int | None:
        """Rows in all; None where their number is open."""
        sizes = [constant(size) for _, size in self.rows]
        return None if None in sizes else prod(size for size in sizes if size is not None)

    def is_contiguous(self) -> bool:
        """Whether columns of the right operand are neighbours in memory."""
        return Strides([self.right], self.stage.ranges()).along(self.column[0]) == [1]


FEW_ROWS = 4


def find(function: tirx.PrimFunc) -> Product | None:
    """The product that a function computes, with nothing but formulas behind it; None where it is something else."""
    try:
        program = inlined(parse(function), _keep)
    except NotStagesError:
        return None
    if len(program.stages) > 2:
        return None
    stage, last = program.stages[0], program.stages[-1]
    if stage.combine is not tirx.Add or not is_const_float(stage.start, 0.0) or stage.buffer.dtype != "float32":
        return None
    if not isinstance(stage.value, tirx.Mul) or (last is not stage and not _reads_in_place(last, stage)):
        return None
    axes = real_axes(stage)
    reads = loads(stage.value)
    if not axes or any(read.source.dtype != "float32" for read in reads) or dear_calls(stage.value):
        return None
    column = axes[-1]
    for left, right in ((stage.value.a, stage.value.b), (stage.value.b, stage.value.a)):
        if _fits(stage, left, right, column[0]):
            inside = variables(right)
            rows = tuple(axis for axis in axes[:-1] if axis[0] not in inside)
            outer = tuple(axis for axis in axes[:-1] if axis[0] in inside)
            return Product(stage, left, right, rows, column, outer, last)
    return None


def is_const_float(value: Any, number: float) -> bool:
    """Whether an expression is this constant."""
    return isinstance(value, tirx.FloatImm) and float(value.value) == number


def _keep(stage: Stage, readers: Sequence[Stage]) -> bool:
    """Formulas of an operand are computed ahead, unless they are the operand itself under another name."""
    return any(reader.reduced for reader in readers) and not isinstance(stage.value, ir.expr.TensorLoad)


def _reads_in_place(last: Stage, stage: Stage) -> bool:
    """Whether `last` reads the sum at its own axes alone, so that a block of the one is a block of the other."""
    if last.reduced or len(real_axes(last)) != len(real_axes(stage)) or last.buffer.dtype != "float32":
        return False
    own = [axis for axis, _ in real_axes(last)]
    reads = [read for read in loads(last.value) if read.source == stage.buffer]
    places = [
        [i for i, size in zip(read.indices, stage.extents, strict=True) if constant(size) != 1] for read in reads
    ]  # fmt: skip
    return bool(reads) and all(place == own for place in places)


def _fits(stage: Stage, left: Any, right: Any, column: Any) -> bool:
    """Whether the factors are plain reads, the column stands in the right one alone, the reduced axes in both."""
    if not isinstance(left, ir.expr.TensorLoad) or not isinstance(right, ir.expr.TensorLoad):
        return False
    in_left, in_right = variables(left), variables(right)
    return column not in in_left and column in in_right and all(k in in_left and k in in_right for k in stage.reduced)


@dataclass(frozen=True)
class Block:
    """The part of the result that stays in registers: its rows and its columns, the latter in vectors (`pieces`)."""

    rows: int
    columns: int


def pieces(columns: int, lanes: int) -> list[tuple[int, int]]:
    """(place, lanes) of vectors that cover a row of a block; the last one moved back to fit."""
    step = max(size for size in powers_below(lanes) if size <= columns)
    return [(min(start, columns - step), step) for start in range(0, columns, step)]


def block_for(rows: int | None, columns: int | None, machine: Machine) -> Block:
    """The block that computes a product of this size in the fewest cycles.

    A step of the reduced axis costs what its multiply-adds take, its loads, or the latency of one addition, whichever
    is most: `rows * vectors` cycles, `(rows + 2 vectors) / 2`, 4. Registers hold the block, one row of the right
    operand and one number of the left. Sizes that are open count as many.
    """
    lanes = machine.lanes()
    best, least = Block(1, 1), float("inf")
    for wanted in range(1, MOST_VECTORS + 1):
        width = wanted * lanes if columns is None else min(wanted * lanes, columns)
        vectors = len(pieces(width, lanes))
        for height in range(1, min(rows or MOST_ROWS, MOST_ROWS) + 1):
            if (height + 1) * vectors + 1 > machine.registers and (height > 1 or vectors > machine.registers - 4):
                continue
            across = 1 / width if columns is None else ceil(columns / width)
            along = 1 / height if rows is None else ceil(rows / height)
            cost = (max(height * vectors, (height + 2 * vectors) / 2, 4) + 0.1) * along * across
            if cost < least:
                best, least = Block(height, width), cost
    return best


MOST_VECTORS = 16
MOST_ROWS = 14
