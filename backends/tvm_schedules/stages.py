"""What a fused function computes, as a list of stages: each an array and one formula for its elements.

FuseTIR writes a function as a row of loop nests, one for each operator, with an array between any two. Read as
formulas, they can be put into one another, and new loops can be written for what is left (`products.py`, `nests.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import tvm_ffi
from tvm import ir, s_tir, sym, tirx

LONGEST_FORMULA = 64
"""Reads of arrays in one formula; with many more, compilation takes minutes."""


class NotStagesError(Exception):
    """The function holds something other than one formula an array; the message says what."""


@dataclass(frozen=True)
class Stage:
    """`buffer[axes] = value`, or over `reduced` axes `buffer[axes] = combine(buffer[axes], value)`.

    Attributes:
        buffer: what it writes.
        axes: a variable for each dimension of `buffer`; none of them stands in a formula where the extent is 1.
        extents: their sizes, elements.
        value: the formula; of a reduction what is combined.
        reduced: variables that are reduced over, outermost first; none where each element is one formula.
        reduced_extents: their sizes.
        combine: `Add`, `Mul`, `Max` or `Min`; None without reduction.
        start: what a reduction begins with.
    """

    buffer: Any
    axes: tuple[Any, ...]
    extents: tuple[Any, ...]
    value: Any
    reduced: tuple[Any, ...] = ()
    reduced_extents: tuple[Any, ...] = ()
    combine: Any = None
    start: Any = None

    def ranges(self) -> Iterator[tuple[Any, Any]]:
        """Every variable with its extent."""
        yield from zip(self.axes, self.extents, strict=True)
        yield from zip(self.reduced, self.reduced_extents, strict=True)

    def at(self, indices: Sequence[Any]) -> Any:
        """The formula of the element at `indices`."""
        return substitute(self.value, dict(zip(self.axes, indices, strict=True)))


@dataclass(frozen=True)
class Program:
    """A function as stages, in the order in which they are computed."""

    function: tirx.PrimFunc
    stages: tuple[Stage, ...]

    @property
    def outputs(self) -> tuple[Any, ...]:
        """The parameters that the function writes."""
        parameters = set(self.function.params)
        return tuple(stage.buffer for stage in self.stages if stage.buffer in parameters)


def parse(function: tirx.PrimFunc) -> Program:
    """The stages of a function that FuseTIR left.

    Raises:
        NotStagesError: nested or opaque blocks, predicates, several arrays in one block, an array written twice.
    """
    root = function.body
    if not isinstance(root, s_tir.SBlockRealize) or root.block.match_buffers:
        raise NotStagesError("it does not begin with a block")
    nests = root.block.body
    stages = [_stage(nest) for nest in (nests.seq if isinstance(nests, tirx.SeqStmt) else [nests])]
    written = [stage.buffer for stage in stages]
    if len(set(written)) != len(written):
        raise NotStagesError("an array is written in several blocks")
    return Program(function, tuple(stages))


def _stage(nest: Any) -> Stage:
    loops = {}
    while isinstance(nest, tirx.For):
        if nest.kind != tirx.ForKind.SERIAL or not is_const(nest.min, 0):
            raise NotStagesError("a loop is not plain")
        loops[nest.loop_var] = nest.extent
        nest = nest.body
    if not isinstance(nest, s_tir.SBlockRealize) or not is_const(nest.predicate, 1):
        raise NotStagesError("a block is not plain")
    block = nest.block
    if block.alloc_buffers or block.match_buffers or not isinstance(block.body, tirx.BufferStore):
        raise NotStagesError(f"block {block.name_hint} is not one assignment")
    if block.annotations and set(block.annotations) - {"axis"}:
        raise NotStagesError(f"block {block.name_hint} is annotated")
    if any(value not in loops for value in nest.iter_values):
        raise NotStagesError(f"block {block.name_hint} is not bound to loops one by one")
    extents = {iter_var.var: iter_var.dom.extent for iter_var in block.iter_vars}
    units = {var: zero(var) for var, extent in extents.items() if is_const(extent, 1)}
    store = block.body
    axes = tuple(store.indices)
    reduced = tuple(v.var for v in block.iter_vars if v.iter_type == tirx.IterVar.CommReduce)
    if any(axis not in extents or axis in reduced for axis in axes) or len(set(axes)) != len(axes):
        raise NotStagesError(f"block {block.name_hint} writes at more than its axes")
    if len(axes) + len(reduced) != len(extents):
        raise NotStagesError(f"block {block.name_hint} has an axis of its own")
    stage = Stage(store.buffer, axes, tuple(extents[v] for v in axes), store.value)
    if reduced:
        combine, operand = _combination(store)
        start = substitute(block.init.value, units) if block.init is not None else None
        if start is None or loads(start):
            raise NotStagesError(f"block {block.name_hint} begins with no constant")
        kept = tuple(v for v in reduced if v not in units)
        stage = replace(
            stage, value=operand, reduced=kept, reduced_extents=tuple(extents[v] for v in kept),
            combine=combine, start=start,
        )  # fmt: skip
    if any(load.source == store.buffer for load in loads(stage.value)):
        raise NotStagesError(f"block {block.name_hint} reads what it writes")
    stage = replace(stage, value=simplified(substitute(stage.value, units), stage.ranges()))
    if stage.combine is not None and not stage.reduced:
        return replace(stage, value=stage.combine(stage.start, stage.value), combine=None, start=None)
    return stage


def _combination(store: Any) -> tuple[type[Any], Any]:
    value = store.value
    for kind in (tirx.Add, tirx.Mul, tirx.Max, tirx.Min):
        if isinstance(value, kind):
            for this, other in ((value.a, value.b), (value.b, value.a)):
                if isinstance(this, ir.expr.TensorLoad) and this.source == store.buffer:
                    return kind, other
    raise NotStagesError(f"{store.buffer} is reduced by something else than +, *, max or min")


def inlined(program: Program, keep: Callable[[Stage, Sequence[Stage]], bool]) -> Program:
    """The program with every stage that is no output and no reduction put into its readers, unless `keep` holds it.

    A stage stays too where a formula would read more than `LONGEST_FORMULA` elements: in a chain of operators that use
    their operand twice, formulas would double with each.

    Args:
        program: not changed.
        keep: asked for a stage and those that read it, after earlier stages were put into all of them.
    """
    outputs = set(program.outputs)
    stages = list(program.stages)
    for candidate in program.stages:
        position = next(i for i, stage in enumerate(stages) if stage.buffer == candidate.buffer)
        stage = stages[position]
        readers = [s for s in stages if any(load.source == stage.buffer for load in loads(s.value))]
        if stage.buffer in outputs or stage.reduced or not readers or keep(stage, readers):
            continue
        if any(_reads_with(stage, reader) > LONGEST_FORMULA for reader in readers):
            continue
        stages = [_with(stage, s) if s in readers else s for s in stages if s is not stage]
    return Program(program.function, tuple(stages))


def _reads_with(stage: Stage, reader: Stage) -> int:
    """How many reads of arrays `_with` would leave in the formula."""
    reads = loads(reader.value)
    places = [load for load in reads if load.source == stage.buffer]
    return len(reads) + len(places) * (len(loads(stage.value)) - 1)


def _with(stage: Stage, reader: Stage) -> Stage:
    def put(load: Any) -> Any:
        return stage.at(load.indices) if load.source == stage.buffer else load

    value = tvm_ffi.structural_map(reader.value, (ir.expr.TensorLoad, put))
    return replace(reader, value=simplified(value, reader.ranges()))


def simplified(value: Any, ranges: Any) -> Any:
    """`value` with its integers (indices, conditions) simplified under the ranges of variables, not its floats."""
    analyzer = sym.Analyzer()
    for var, extent in ranges:
        analyzer.bind(var, ir.Range.from_min_extent(zero(var), extent))
    return simplified_by(value, analyzer)


def simplified_by(value: Any, analyzer: sym.Analyzer) -> Any:
    """`simplified` with an analyzer that knows the ranges already."""

    def load(node: Any) -> Any:
        return tirx.BufferLoad(node.source, [analyzer.simplify(index) for index in node.indices])

    def choice(node: Any) -> Any:
        if getattr(node.op, "name", "") not in CHOICES:
            return node
        condition = analyzer.simplify(node.args[0])
        if is_const(condition, 1):
            return node.args[1]
        if is_const(condition, 0):
            return node.args[2]
        return tirx.if_then_else(condition, node.args[1], node.args[2])

    def select(node: Any) -> Any:
        condition = analyzer.simplify(node.condition) if not loads(node.condition) else node.condition
        if is_const(condition, 1):
            return node.true_value
        if is_const(condition, 0):
            return node.false_value
        return tirx.Select(condition, node.true_value, node.false_value)

    return tvm_ffi.structural_map(value, [(ir.expr.TensorLoad, load), (ir.Call, choice), (tirx.Select, select)])


CHOICES = ("tirx.if_then_else", "prim.if_then_else")


def substitute(value: Any, new: Mapping[Any, Any]) -> Any:
    """`value` with variables replaced."""
    if not new:
        return value
    return tvm_ffi.structural_map(value, (tirx.Var, lambda var: new.get(var, var)))


def loads(value: Any) -> list[Any]:
    """Every read of an array in `value`, indices of other reads included."""
    found: list[Any] = []
    tvm_ffi.structural_walk(value, (ir.expr.TensorLoad, found.append))
    return found


def variables(value: Any) -> set[Any]:
    """The variables in `value`, arrays not among them."""
    found: set[Any] = set()
    tvm_ffi.structural_walk(value, (tirx.Var, found.add))
    return {var for var in found if not isinstance(var.ty, tirx.BufferType)}


def zero(like: Any) -> Any:
    """0 of the type of an index."""
    return tirx.const(0, dtype(like))


def dtype(value: Any) -> str:
    """The type of an expression's elements, as in "float32"."""
    return str(value.ty.dtype)


def is_const(value: Any, number: int) -> bool:
    """Whether an integer expression is this constant."""
    return isinstance(value, tirx.IntImm) and int(value.value) == number


def constant(value: Any) -> int | None:
    """The value of a constant integer; None where it is symbolic."""
    return int(value.value) if isinstance(value, tirx.IntImm) else None
