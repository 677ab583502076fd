"""Loops written by hand: coverings of a range in whole vectors, and what strides an array is read with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import tvm_ffi
from tvm import ir, sym, tirx

from graphopt.backends.tvm_schedules.stages import CHOICES, constant, dtype, is_const, substitute, zero

Body = Callable[[Any], Any]

HEAVY = frozenset(
    f"tirx.{name}" for name in (
        "exp", "exp2", "exp10", "erf", "log", "log2", "log1p", "log10", "pow", "sigmoid", "sqrt", "rsqrt", "tanh",
        "sin", "cos", "tan", "sinh", "cosh", "asin", "acos", "atan", "atan2",
    )
)  # fmt: skip
"""What takes longer than reading its result again."""


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


def computed(lanes: int, store: Callable[[Any], Any], like: Any) -> Any:
    """The store that `store` makes of a lane, for all lanes in vectors; dear functions in it one after another.

    TVM's simplifiers write out names where they stand, which doubles a formula with every function that is nested in
    another. So all but single ones go through a register.
    """
    lane = tirx.Var("lane", dtype(like))
    whole = store(lane)
    steps: list[Any] = []
    found: list[tuple[Any, Any]] = []

    def step(call: Any) -> Any:
        if getattr(call.op, "name", "") not in HEAVY or dtype(call) != "float32":
            return call
        for known, register_of in found:
            if tvm_ffi.structural_equal(known, call):
                return tirx.BufferLoad(register_of, [lane])
        held = register(lanes, f"step{len(found)}")
        found.append((call, held))
        own = tirx.Var("lane", dtype(like))
        steps.append(tirx.AllocBuffer(held))
        steps.append(_lanes(own, lanes, tirx.BufferStore(held, substitute(call, {lane: own}), [own])))
        return tirx.BufferLoad(held, [lane])

    if dear_calls(whole.value) > 1 and not has_branches(whole.value):
        whole = tirx.BufferStore(whole.buffer, tvm_ffi.structural_map(whole.value, (ir.Call, step)), whole.indices)
    return sequence([*steps, _lanes(lane, lanes, whole)])


def _lanes(lane: Any, lanes: int, statement: Any) -> Any:
    if lanes == 1:
        return tvm_ffi.structural_map(statement, (tirx.Var, lambda var: zero(lane) if var == lane else var))
    return tirx.For(lane, zero(lane), tirx.const(lanes, dtype(lane)), tirx.ForKind.VECTORIZED, statement)


def dear_calls(value: Any) -> int:
    """How many functions in a formula take longer than to read their result again."""
    found: list[Any] = []
    tvm_ffi.structural_walk(value, (ir.Call, lambda call: found.append(getattr(call.op, "name", ""))))
    return sum(name in HEAVY for name in found)


def has_branches(value: Any) -> bool:
    """Whether parts of a formula are computed under a condition alone."""
    found: list[Any] = []
    tvm_ffi.structural_walk(value, (ir.Call, lambda call: found.append(getattr(call.op, "name", ""))))
    return any(name in CHOICES for name in found)


def register(lanes: int, name: str, dtype: str = "float32") -> Any:
    """An array small enough to live in a register."""
    return tirx.decl_buffer((lanes,), dtype, name, scope="local")


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


def partitioned(name: str, extent: Any, sizes: Sequence[int], body: Callable[[Any, int], Any]) -> Any:
    """As `covered`, with every element in one piece: the rest in pieces of the next sizes.

    For arrays that TVM may lay over one that the formula reads: computed twice, an element would read its own result.
    """
    static, start, statements = constant(extent), zero(extent), []
    for size in sizes if static is not None else (sizes[0], 1):
        left = extent - start
        count = tirx.floordiv(left, tirx.const(size, dtype(extent)))
        if static is not None:
            done = int(start.value)
            count = tirx.const((static - done) // size, dtype(extent))
        if is_const(count, 0):
            continue
        statements.append(loop(name, count, lambda var, at=start, size=size: body(at + var * size, size)))  # type: ignore[misc]
        start = start + count * size
    return sequence(statements)


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
