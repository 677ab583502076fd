"""CPU schedules for Relax: TVM has none, and its plain loops are 36 to 177 times slower than ONNX Runtime.

Two steps, between which TVM legalises and fuses:

1. `legalize`, on Relax operators: what has kernels of our own is brought into the form that they compute (weights
   packed ahead, channels in blocks of a vector). `LEGALIZERS` is the order.
2. `schedule`, on TIR functions: every function gets a schedule by the first rule that takes it. `RULES` is the order,
   and the last one takes whatever is left.

Each family stands in its own file; `machine.py` is what they know of the processor.
"""

from __future__ import annotations

from collections.abc import Callable

import tvm
from tvm import relax, tirx
from tvm.target import Target

from graphopt.backends.tvm_schedules import vector_math
from graphopt.backends.tvm_schedules.blocked_graph import to_blocks
from graphopt.backends.tvm_schedules.machine import Machine
from graphopt.backends.tvm_schedules.product_loops import product_rule
from graphopt.backends.tvm_schedules.rows import rows_rule
from graphopt.backends.tvm_schedules.rule import DONE, Rule, Unscheduled
from graphopt.backends.tvm_schedules.weights import pack_weights
from graphopt.backends.tvm_schedules.window_rule import window_rule

__all__ = ["LEGALIZERS", "RULES", "Machine", "Rule", "Unscheduled", "legalize", "schedule", "unscheduled"]

LEGALIZERS: tuple[Callable[[tvm.IRModule, Machine, list[Unscheduled]], tvm.IRModule], ...] = (to_blocks,)
"""Rewrites of Relax functions, in the order in which they run."""

RULES: dict[str, Rule] = {"window": window_rule, "product": product_rule, "rows": rows_rule}
"""Name -> rule, in the order in which they are tried."""


def legalize(module: tvm.IRModule, target: Target, *, failures: list[Unscheduled] | None = None) -> tvm.IRModule:
    """`module` with the operators that have kernels of our own in the form of these kernels; the others as they are.

    Args:
        module: Relax functions after `DecomposeOpsForInference` and `FoldConstant`; `LegalizeOps`, `FuseOps` and
            `FuseTIR` come behind.
        target: whose vector width decides the blocks.
        failures: gets an entry for each operator whose rule raised; the operator then stays as it is.
    """
    machine = Machine.of(target)
    with target:
        for legalizer in LEGALIZERS:
            module = legalizer(module, machine, [] if failures is None else failures)
    return module


def schedule(module: tvm.IRModule, target: Target, *, failures: list[Unscheduled] | None = None) -> tvm.IRModule:
    """A copy of `module` in which every function that a rule takes has a schedule.

    Args:
        module: what `FuseTIR` leaves: Relax functions and the TIR functions that they call.
        target: whose vector width, registers and `num-cores` the schedules are made for.
        failures: gets an entry for each rule that took a function and raised; the function then goes to the next rule,
            and stays as it is (correct, slow) where none is left.
    """
    vector_math.install()
    machine = Machine.of(target)
    module = pack_weights(module, machine)
    updates = {}
    with target:
        for name, function in module.functions_items():
            if not isinstance(function, tirx.PrimFunc) or function.attrs.get(DONE, 0):
                continue
            scheduled = _first_schedule(name.name_hint, function, machine, [] if failures is None else failures)
            if scheduled is not None:
                updates[name] = scheduled.with_attr(DONE, 1)
    result = tvm.IRModule(module.functions, attrs=module.attrs, global_infos=module.global_infos)
    for name, function in updates.items():
        result.update_func(name, function)
    return result


def unscheduled(module: tvm.IRModule) -> list[str]:
    """Names of the kernels that no rule took, without those that only give a tensor another shape and are not run."""
    return [
        name.name_hint
        for name, function in module.functions_items()
        if isinstance(function, tirx.PrimFunc)
        and not function.attrs.get(DONE, 0)
        and not relax.analysis.has_reshape_pattern(function)
    ]


def _first_schedule(
    name: str, function: tirx.PrimFunc, machine: Machine, failures: list[Unscheduled]
) -> tirx.PrimFunc | None:
    for rule_name, rule in RULES.items():
        try:
            schedule = rule(function, machine)
        except Exception as error:
            # TVM raises whatever a check in C++ raised: ValueError, InternalError, ScheduleError
            failures.append(Unscheduled.of(name, rule_name, error))
            continue
        if schedule is not None:
            return schedule if isinstance(schedule, tirx.PrimFunc) else schedule.mod["main"]
    return None
