"""The work of a unit, for shares."""

from __future__ import annotations

from graphopt.analysis.rules import CostView, rule_for
from graphopt.delegates.units import Unit
from graphopt.rewriting.scopes import bodies


def macs(unit: Unit) -> float:
    """Multiply-accumulates of the operator, of one run of its bodies too; unknown and symbolic sizes count as 1."""
    view = CostView(lambda node, index, axis: (), lambda value, axis: ())
    total = 0.0
    for node in (unit.node, *(inner for body in bodies(unit.node) for inner in body.all_nodes())):
        rule = rule_for(node)
        if rule is not None:
            total += sum(coefficient for coefficient, _ in rule.cost(node, view))
    return total
