"""Weights of matrix products in panels, made while compiling: one panel is what a kernel reads in one go."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
import tvm
from tvm import relax, tirx

from graphopt.backends.tvm_schedules.machine import Machine
from graphopt.backends.tvm_schedules.product_loops import Kernel
from graphopt.backends.tvm_schedules.products import Block, Product, block_for, find
from graphopt.backends.tvm_schedules.rows import with_body
from graphopt.backends.tvm_schedules.rule import DONE
from graphopt.backends.tvm_schedules.stages import constant, loads


@dataclass(frozen=True)
class _Packing:
    """Parameter `position` of a product is its right operand, transposed or not, and goes into panels."""

    found: Product
    position: int
    transposed: bool
    block: Block

    def panels(self, weight: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """(reduced, columns) as (panels, reduced, columns of a block); the last panel ends with the last column."""
        inner, columns = constant(self.found.stage.reduced_extents[0]), constant(self.found.column[1])
        assert inner is not None and columns is not None
        matrix = weight.reshape(columns, inner).T if self.transposed else weight.reshape(inner, columns)
        width = self.block.columns
        starts = [min(panel * width, columns - width) for panel in range(ceil(columns / width))]
        return np.stack([matrix[:, start : start + width] for start in starts])


def pack_weights(module: tvm.IRModule, machine: Machine) -> tvm.IRModule:
    """`module` with its matrix products by weights scheduled, and these weights in panels.

    A function is taken where every call of it hands a constant over as the right operand.
    """
    calls, others = _calls(module)
    packings = {}
    for name, function in module.functions_items():
        if (
            isinstance(function, tirx.PrimFunc)
            and name in calls
            and name not in others
            and not function.attrs.get(DONE, 0)
        ):
            packing = _packing(function, machine)
            if packing is not None and all(
                isinstance(c.args[1][packing.position], tvm.ir.GenericConst) for c in calls[name]
            ):
                packings[name] = packing
    if not packings:
        return module
    rewriter = _Rewriter(module, machine, packings)
    for name, function in module.functions_items():
        if isinstance(function, relax.Function):
            rewriter.builder_.update_func(name, rewriter.visit_expr(function))
    result = rewriter.builder_.get()
    for name in packings:
        del result[name]
    return result


def packed_name(name: str) -> str:
    """What the kernel of this name is called once its weight is packed."""
    return f"{name}_packed"


def _calls(module: tvm.IRModule) -> tuple[dict[Any, list[Any]], set[Any]]:
    """Calls of each TIR function, and the functions that are used in other ways."""
    calls: dict[Any, list[Any]] = defaultdict(list)
    uses: dict[Any, int] = defaultdict(int)

    def visit(expression: Any) -> None:
        if isinstance(expression, tvm.ir.GlobalVar):
            uses[expression] += 1
        if _is_call_tir(expression):
            calls[expression.args[0]].append(expression)

    for function in module.functions.values():
        if isinstance(function, relax.Function):
            relax.analysis.post_order_visit(function, visit)
    return calls, {name for name, count in uses.items() if count > len(calls[name])}


def _is_call_tir(expression: Any) -> bool:
    return isinstance(expression, tvm.ir.Call) and getattr(expression.op, "name", "") == "relax.call_tir"


def _packing(function: tirx.PrimFunc, machine: Machine) -> _Packing | None:
    found = find(function)
    if found is None or found.outer or len(found.stage.reduced) != 1:
        return None
    columns, inner = constant(found.column[1]), constant(found.stage.reduced_extents[0])
    source = found.right.source
    if columns is None or inner is None or source not in list(function.params):
        return None
    if any(read.source == source for read in _reads(found)):
        return None
    used = [i for i, size in zip(found.right.indices, source.shape, strict=True) if constant(size) != 1]
    wanted = [found.stage.reduced[0], found.column[0]]
    sizes = [constant(size) for size in source.shape if constant(size) != 1]
    if used not in (wanted, wanted[::-1]) or sizes != ([inner, columns] if used == wanted else [columns, inner]):
        return None
    block = block_for(found.row_count(), columns, machine)
    return _Packing(found, list(function.params).index(source), used != wanted, block)


def _reads(found: Product) -> list[Any]:
    return [found.left, *(loads(found.last.value) if found.last is not found.stage else [])]


def _scheduled(function: tirx.PrimFunc, packing: _Packing, machine: Machine) -> tirx.PrimFunc:
    old = function.params[packing.position]
    inner, columns = constant(packing.found.stage.reduced_extents[0]), constant(packing.found.column[1])
    assert inner is not None and columns is not None
    width = packing.block.columns
    packed = tirx.decl_buffer((ceil(columns / width), inner, width), "float32", f"{old.name}_panels")
    params = [packed if p == old else p for p in function.params]
    body = Kernel(packing.found, machine, packing.block, packed).body()
    return with_body(tirx.PrimFunc(params, function.body, function.ret_type, function.attrs), body).with_attr(DONE, 1)


@relax.expr_functor.mutator
class _Rewriter(relax.PyExprMutator):  # type: ignore[misc]
    """Calls of packed functions with panels in place of the weight; a weight of several calls is packed once."""

    def __init__(self, module: tvm.IRModule, machine: Machine, packings: dict[Any, _Packing]) -> None:
        super().__init__(module)
        self._packings = packings
        self._kernels = {
            name: self.builder_.add_func(_scheduled(module[name], packing, machine), packed_name(name.name_hint))
            for name, packing in packings.items()
        }
        self._packed: dict[tuple[Any, ...], Any] = {}

    def visit_call_(self, call: Any) -> Any:
        if not _is_call_tir(call) or call.args[0] not in self._packings:
            return super().visit_call_(call)
        packing = self._packings[call.args[0]]
        operands = [self.visit_expr(operand) for operand in call.args[1]]
        operands[packing.position] = self._panels(operands[packing.position], packing)
        return relax.Call(
            call.op, [self._kernels[call.args[0]], relax.Tuple(operands), *call.args[2:]], call.attrs, call.ty_args
        )

    def _panels(self, weight: Any, packing: _Packing) -> Any:
        key = (weight.value, packing.block.columns, packing.transposed)
        if key not in self._packed:
            panels = packing.panels(weight.value.numpy())
            self._packed[key] = relax.const(tvm.runtime.tensor(np.ascontiguousarray(panels)))
        return self._packed[key]
