"""Loops written by hand: coverings of a range in whole vectors, and what strides an array is read with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tvm import ir, sym, tirx

from graphopt.backends.tvm_schedules.stages import constant, dtype, is_const, substitute, zero

Body = Callable[[Any], Any]


def index(value: int) -> Any:
    """A constant index."""
    return tirx.IntImm("int64", value)


def sequence(statements: Iterable[Any]) -> Any:
    """Statements one after another."""
    listed = list(statements)
    return listed[0] if len(listed) == 1 else tirx.SeqStmt(listed)


def loop(name: str, extent: Any, body: Body, kind: tirx.ForKind = tirx.ForKind.SERIAL) -> Any:
    """`for name in range(extent): body(name)`; nothing but the body where the extent is 1."""
    if is_const(extent, 1):
        return body(zero(extent))
    var = tirx.Var(name, dtype(extent))
    return tirx.For(var, zero(var), extent, kind, body(var))


def vectorized(lanes: int, body: Body, like: Any) -> Any:
    """The statement that `body` makes of a lane, for all lanes in one instruction."""
    return loop("lane", tirx.const(lanes, dtype(like)), body, tirx.ForKind.VECTORIZED)


def vector(start: Any, lanes: int) -> Any:
    """The index of `lanes` elements in a row."""
    return start if lanes == 1 else tirx.Ramp(start, tirx.const(1, dtype(start)), lanes)


def splat(value: Any, lanes: int) -> Any:
    """One number in every lane."""
    return value if lanes == 1 else tirx.Broadcast(value, lanes)


def covered(name: str, extent: Any, sizes: Sequence[int], body: Callable[[Any, int], Any]) -> Any:
    """`body(start, size)` over pieces that cover range(extent): pieces of one size, the last one moved back to fit.

    Elements where the last two pieces overlap are computed twice, to the same values: no piece needs a mask or a
    smaller remainder. Where the extent is smaller than the first size, the next one is taken; the last size must be 1.

    Args:
        name: of the loop variable.
        extent: constant, or known at run time only: then one of the sizes is chosen there.
        sizes: falling.
        body: makes the statement of a piece.
    """
    static = constant(extent)
    size, smaller = sizes[0], sizes[1:]
    if static is not None:
        if static < size:
            return covered(name, extent, smaller, body)
        return _pieces(name, extent, static // size, static % size != 0, size, body)
    whole = tirx.const(size, dtype(extent))
    count = tirx.floordiv(extent + whole - 1, whole)
    if not smaller:
        return loop(name, extent, lambda var: body(var, 1))
    return tirx.IfThenElse(
        extent >= whole,
        loop(name, count, lambda var: body(tirx.min(var * whole, extent - whole), size)),
        covered(name, extent, smaller, body),
    )


def _pieces(name: str, extent: Any, count: int, rest: bool, size: int, body: Callable[[Any, int], Any]) -> Any:
    if not rest:
        return loop(name, tirx.const(count, dtype(extent)), lambda var: body(var * size, size))
    last = tirx.const(int(extent.value) - size, dtype(extent))
    return loop(
        name, tirx.const(count + 1, dtype(extent)), lambda var: body(tirx.min(var * size, last), size)
    )  # fmt: skip


def powers_below(lanes: int) -> tuple[int, ...]:
    """`lanes` and the powers of two below it."""
    return tuple(1 << bit for bit in range(lanes.bit_length() - 1, -1, -1))


def address(load: Any, analyzer: sym.Analyzer) -> Any:
    """Where in its array an element stands, in elements."""
    place = None
    for position, size in zip(load.indices, load.source.shape, strict=True):
        place = position if place is None else place * size + position
    return index(0) if place is None else analyzer.simplify(place)


class Strides:
    """How far apart neighbours along one variable stand in every array that a formula reads."""

    def __init__(self, reads: Iterable[Any], ranges: Iterable[tuple[Any, Any]]) -> None:
        self._analyzer = sym.Analyzer()
        for var, extent in ranges:
            self._analyzer.bind(var, ir.Range.from_min_extent(zero(var), extent))
        self._addresses = [address(load, self._analyzer) for load in reads]

    def along(self, var: Any) -> list[int | None]:
        """For each read the distance in elements; None where it is not one constant, as behind a table of indices."""
        return [
            constant(self._analyzer.simplify(substitute(place, {var: var + 1}) - place)) for place in self._addresses
        ]


def contiguous(strides: Sequence[int | None]) -> bool:
    """Whether a vector along the variable is loaded by one instruction, or is one number in all lanes."""
    return all(stride in (0, 1) for stride in strides)
