"""Which operators the analysis knows, and what it does about each: the table behind docs/operators.md."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from graphopt.analysis.rules import OpRule, registered

FROZEN = "frozen"
"""The family of operators that nothing can be removed around."""


@dataclass(frozen=True)
class Operator:
    """One operator of one domain.

    Attributes:
        domain: "" for ONNX's own.
        name: of the operator.
        family: the file in `graphopt/analysis/ops` that its rule stands in.
        units: what becomes of units, or why there are none.
        counted: its multiply-accumulates are counted.
        rewritten: it has sizes in attributes or constants, which are rewritten.
    """

    domain: str
    name: str
    family: str
    units: str
    counted: bool
    rewritten: bool


def operators() -> list[Operator]:
    """Every operator with a rule, sorted by domain and name."""
    return [_operator(domain, name, found) for (domain, name), found in sorted(registered().items())]


def _operator(domain: str, name: str, found: OpRule) -> Operator:
    kind = type(found)
    family = kind.__module__.rpartition(".")[2]
    if family == FROZEN:
        from graphopt.analysis.ops.frozen import reason

        units = reason(domain, name)
    else:
        units = " ".join((inspect.getdoc(kind) or "").partition("\n\n")[0].split())
    return Operator(
        domain,
        name,
        family,
        units,
        kind.cost is not OpRule.cost,
        kind.rewrite is not OpRule.rewrite,
    )
