"""A Relax function with its convolutions, and what stands between them, over tensors in blocks.

Every tensor can exist in two forms: as the operators of the model have it (N, C, H, W), and in blocks (`blocks.py`).
Operators with a rule (`blocked_operators.py`) read and write blocks; all others find the form that they know. A form is
made when it is first asked for, so two convolutions with additions and activations between them never leave the blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import relax, tirx
from tvm.relax.expr_functor import PyExprMutator, mutator

from graphopt.backends.tvm_schedules import blocked_operators
from graphopt.backends.tvm_schedules.blocks import Blocked, Blocking, block_of, sizes_of
from graphopt.backends.tvm_schedules.machine import Machine
from graphopt.backends.tvm_schedules.rule import Unscheduled


def to_blocks(module: tvm.IRModule, machine: Machine, failures: list[Unscheduled]) -> tvm.IRModule:
    """Bring convolutions, pooling and elementwise operators between them into blocks."""
    rewriter = _BlockedGraph(module, machine, failures)
    for name, function in module.functions_items():
        if isinstance(function, relax.Function) and not function.attrs.get("Primitive", 0):
            rewriter.builder_.update_func(name, rewriter.visit_expr(function))
    result = rewriter.builder_.finalize()
    return relax.transform.DeadCodeElimination()(result)


@dataclass
class _Forms:
    """The forms that exist of one variable of the model."""

    blocked: dict[relax.Var, Blocked]
    packed: dict[tuple[relax.Var, int], Blocked]
    plain: set[relax.Var]

    def copy(self) -> _Forms:
        return _Forms(dict(self.blocked), dict(self.packed), set(self.plain))


@mutator
class _BlockedGraph(PyExprMutator):  # type: ignore[misc]
    """Visits the bindings in order and keeps which forms of which variables exist."""

    def __init__(self, module: tvm.IRModule, machine: Machine, failures: list[Unscheduled]) -> None:
        super().__init__(module)
        self.machine = machine
        self.failures = failures
        self.forms = _Forms({}, {}, set())

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        """Give the binding in blocks where its operator has a rule."""
        result = self._converted(binding)
        if result is None:
            super().visit_var_binding_(binding)
            return
        self.forms.blocked[binding.var] = result
        if not isinstance(binding.var, relax.DataflowVar):  # seen outside the block, where it has its own form
            plain = self._unpacked(result)
            emit = self.builder_.emit_output if self.builder_.current_block_is_dataflow() else self.builder_.emit
            self._set_plain(binding.var, emit(plain))

    def _converted(self, binding: relax.VarBinding) -> Blocked | None:
        if not isinstance(binding.value, relax.Call):
            return None
        try:
            return blocked_operators.converted(self, binding.value)
        except Exception as error:  # TVM raises whatever a check in C++ raised; the operator stays what it is
            self.failures.append(Unscheduled.of(str(binding.var), "blocks", error))
            return None

    def visit_var_(self, var: relax.Var) -> relax.Expr:
        """The plain form."""
        return self._plain(var, super().visit_var_)

    def visit_dataflow_var_(self, var: relax.DataflowVar) -> relax.Expr:
        """The plain form."""
        return self._plain(var, super().visit_dataflow_var_)

    def visit_if_(self, branches: relax.If) -> relax.Expr:
        """What is made within a branch is not seen outside it."""
        condition = self.visit_expr(branches.cond)
        results = []
        for branch in (branches.true_branch, branches.false_branch):
            outside = self.forms.copy()
            results.append(self.visit_with_new_scope(branch))
            self.forms = outside
        return relax.If(condition, *results)

    def _plain(self, var: relax.Var, visit: Any) -> relax.Expr:
        if var in self.forms.blocked and var not in self.forms.plain:
            self._set_plain(var, self.builder_.emit(self._unpacked(self.forms.blocked[var])))
        return visit(var)

    def _set_plain(self, var: relax.Var, plain: relax.Var) -> None:
        self.set_var_remap(var, plain)
        self.forms.plain.add(var)

    def _unpacked(self, tensor: Blocked) -> relax.Expr:
        return self.call_te(tensor.blocking.unpack, tensor.expr, tensor.rank, primfunc_name_hint="unpack")

    # What the rules of the operators ask for.

    def emit(self, expr: relax.Expr) -> relax.Var:
        """Bind an expression."""
        return self.builder_.emit(expr)

    def call_te(self, function: Any, *args: Any, **options: Any) -> relax.Expr:
        """The call of a kernel given as a tensor expression."""
        return self.builder_.call_te(function, *args, **options)

    def kernel(self, name: tvm.ir.GlobalVar) -> tirx.PrimFunc:
        """A kernel of the module."""
        return self.builder_.get()[name]

    def block(self, channels: int) -> int:
        """Channels in a block of a tensor of so many channels."""
        return block_of(channels, self.machine)

    def in_blocks(self, expr: relax.Expr) -> Blocked | None:
        """The form in blocks that the expression has already; None where it has none."""
        return self.forms.blocked.get(expr) if isinstance(expr, relax.Var) else None

    def packed(self, expr: relax.Expr) -> Blocked:
        """The form in blocks, made where it does not exist."""
        present = self.in_blocks(expr)
        if present is not None:
            return present
        rank, channels = expr.ty.ndim, sizes_of(expr)[1]
        blocking = Blocking(channels, self.block(channels))
        if isinstance(expr, relax.Var) and (expr, blocking.block) in self.forms.packed:
            return self.forms.packed[expr, blocking.block]
        call = self.call_te(blocking.pack, self.visit_expr(expr), primfunc_name_hint="pack")
        result = Blocked(self.emit(call), blocking, rank)
        if isinstance(expr, relax.Var):
            self.forms.packed[expr, blocking.block] = result
        return result

    def constant(self, values: np.ndarray) -> relax.Expr:
        """An array as a constant of the function."""
        return relax.const(np.ascontiguousarray(values))
