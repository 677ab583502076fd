"""What a schedule rule is, and the note that one leaves where it could not finish."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm import s_tir, tirx

from graphopt.backends.tvm_schedules.machine import Machine

DONE = "tirx.is_scheduled"
"""Attribute of a function that has its schedule; TVM's own passes know it too."""

Rule = Callable[[tirx.PrimFunc, Machine], s_tir.Schedule | tirx.PrimFunc | None]
"""Takes a function without a schedule; gives its schedule, or None where the function is not of the rule's kind.

A rule transforms by the primitives of `tvm.s_tir.Schedule`, each of which checks that it changes nothing about what is
computed, or reads the function as formulas (`stages.py`) and writes new loops for them. A rule may raise; the
dispatcher notes it and tries the next."""


@dataclass(frozen=True)
class Unscheduled:
    """A rule that took a function and failed: which function, which rule, why."""

    function: str
    rule: str
    reason: str

    @staticmethod
    def of(function: str, rule: str, error: Exception) -> Unscheduled:
        """The note about what `rule` raised; its last line says what was wrong, the others where in TVM."""
        return Unscheduled(function, rule, (str(error).strip().splitlines() or [type(error).__name__])[-1])

    def __str__(self) -> str:
        return f"{self.function}: {self.rule}: {self.reason}"
