"""Which pieces of a network may die together: the coupling analysis of a graph, solved into units.

`analyse` walks the main graph once in topological order, lets each operator's rule label tensors, solves the labels
into units and asks which units leave only constants behind. See DESIGN section 4 and docs/architecture.md; the idea of
zero-invariant groups is from "Only Train Once" (Chen et al., 2021, arXiv:2107.07467, section 3), widened here to
constants.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import onnx_ir as ir

from graphopt.analysis import shapes
from graphopt.analysis.dead_values import DeadValues, colours
from graphopt.analysis.frozen import Frozen, from_constants, frozen_axes
from graphopt.analysis.labels import Axes, Factors, Solution, Vector
from graphopt.analysis.members import MemberTable, Mode, modes
from graphopt.analysis.rules import CostTerm, CostView, Labeller, Role, Sink, Use, node_key, rule_for
from graphopt.analysis.scope import nodes_by_key, scopes


@dataclass(frozen=True)
class Member:
    """A slice of a parameter that lives and dies with a unit.

    Attributes:
        parameter: name of the initializer (or of the Constant node's output).
        axis: the axis that is sliced.
        indices: the positions that go.
        role: see `graphopt.analysis.rules.Role`.
    """

    parameter: str
    axis: int
    indices: tuple[int, ...]
    role: Role


@dataclass(frozen=True, eq=False)
class Unit:
    """A minimal removable piece.

    Attributes:
        id: from 1, in the order of the graph.
        exact: removing it from a model in which its producers are zero changes nothing.
        reason: why not, where it is not exact.
        mode: what kind of unit it is.
        members: the slices it consists of.
    """

    id: int
    exact: bool
    reason: str
    mode: Mode
    _table: MemberTable = field(repr=False)

    @cached_property
    def members(self) -> tuple[Member, ...]:  # noqa: D102  (an attribute; the units of a large model are many)
        return tuple(Member(*found) for found in self._table.of(self.id))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Unit) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[object, ...]:
        return self.id, self.members, self.exact, self.reason, self.mode


@dataclass
class Coupling:
    """What `analyse` found.

    Attributes:
        units: all units; ``units[i].id == i + 1``.
        frozen: axes of parameters that (partly) stay, with the reason.
        uses: every labelled use of a parameter.
        sinks: where labelled axes end.
        labels: labels of activations, by tensor name.
        solution: label -> unit.
        terms: multiply-accumulates by node.
    """

    model: ir.Model
    uses: list[Use]
    sinks: list[Sink]
    labels: dict[str, Axes]
    solution: Solution
    units: list[Unit] = field(default_factory=list)
    frozen: list[Frozen] = field(default_factory=list)
    terms: list[CostTerm] = field(default_factory=list)

    def axis_units(self, value: str, axis: int) -> Factors:
        """Unit ids by position of an activation's axis, one vector a factor; empty where nothing can go."""
        return self.solution.units(self.labels.get(value, {}).get(axis, ()))

    def parameter_axes(self, name: str) -> dict[int, Factors]:
        """Unit ids by position of each axis of a parameter (of its first use, where uses differ)."""
        for use in self.uses:
            if use.parameter == name:
                return {axis: found for axis, f in use.axes.items() if (found := self.solution.units(f))}
        return {}

    def operand_units(self, node: ir.Node, index: int, axis: int) -> Factors:
        """Unit ids by position of an operand's axis, parameter or activation."""
        use = self._use_of.get((node_key(node), index))
        if use is not None:
            return self.solution.units(use.axes.get(axis, ()))
        value = node.inputs[index]
        return self.axis_units(value.name or "", axis) if value is not None else ()

    def ending(self, sink: Sink) -> Factors:
        """Unit ids by position that end in a sink."""
        if sink.factors:
            return self.solution.units(sink.factors)
        use = self._use_of.get((sink.node, sink.index))
        if use is not None:
            return self.solution.units(use.axes.get(sink.axis, ()))
        return self.axis_units(sink.value, sink.axis)

    @cached_property
    def _use_of(self) -> dict[tuple[str, int], Use]:
        return {(use.node, use.index): use for use in self.uses}

    def labelled(self) -> Iterator[tuple[str, dict[int, Factors]]]:
        """Units of every labelled tensor: activations, then parameters."""
        for name, axes in self.labels.items():
            yield name, {axis: self.solution.units(factors) for axis, factors in axes.items()}
        for use in self.uses:
            yield use.parameter, {axis: self.solution.units(factors) for axis, factors in use.axes.items()}

    def dead_values(self, *, hypothetical: bool) -> DeadValues:
        """What a consumer sees at positions of dead units: if their producers were zeroed, or as parameters are now."""
        asked = self._colours if hypothetical else np.zeros(self.solution.count + 1, dtype=np.int64)
        found = DeadValues(self.labels, self.solution, self._use_of, hypothetical, asked)
        for _ in found.every_colour():
            found.walk(self.model.graph)
        return found

    @cached_property
    def _colours(self) -> Vector:
        """A colour for each unit, so that no position of any axis carries two of one colour."""
        every = [self.solution.monomials]
        every += [np.stack(f, axis=1) for _, axes in self.labelled() for f in axes.values() if len(f) > 1]
        return colours(every, self.solution.count)

    def unsafe(self, values: DeadValues) -> dict[int, str]:
        """Units that some consumer cannot do without, given what their positions hold; with the first reason."""
        first = " (all that it reads is constant: run fold first)"
        reasons: dict[int, str] = {}
        nodes, ahead = nodes_by_key(self.model), from_constants(self.model)
        for colour in values.every_colour():
            for sink in self.sinks:
                if sink.accepts == "anything":
                    continue
                held = values.operand(nodes[sink.node], sink.index, sink.axis)
                for vector in self.ending(sink):
                    if held is None or sink.accepts == "none":
                        bad = np.ones(len(vector), dtype=bool)
                    else:
                        bad = ~np.isfinite(held) if sink.accepts == "constant" else ~(held == sink.zero)
                    for unit in np.unique(vector[bad & (vector != 0) & (values.colours[vector] == colour)]):
                        reasons.setdefault(int(unit), sink.reason + (first if sink.node in ahead else ""))
        return reasons


def analyse(model: ir.Model) -> Coupling:
    """Find the units of a model. Shapes must have been inferred (`graphopt.model.infer_shapes`); nothing is changed.

    Args:
        model: any valid model; an operator without a rule freezes what it touches.
    """
    g = Labeller(entered=frozenset(scopes(model)))
    g.walk(model.graph)
    for output in model.graph.outputs:
        g.freeze(g.of(output), f"output '{output.name}' of the graph")
        if shapes.constant_tensor(output) is not None:
            g.freeze_constant(output, f"output '{output.name}' of the graph")
    solution = _only_with_parameters(g)
    coupling = Coupling(model, g.uses, g.sinks, g.labels, solution)
    coupling.units = _units(coupling)
    coupling.frozen = list(frozen_axes(coupling))
    view = CostView(coupling.operand_units, lambda v, axis: coupling.axis_units(v.name or "", axis))
    coupling.terms = list(_terms(model.graph, view))
    return coupling


def _terms(graph: ir.Graph, view: CostView, times: float = 1.0) -> Iterator[CostTerm]:
    """Work of the nodes of a graph; of a body whose runs are not known, that of one run."""
    for node in graph:
        handler = rule_for(node)
        if handler is None:
            continue
        for coefficient, axes in handler.cost(node, view):
            yield CostTerm(node_key(node), times * coefficient, axes)
        for body, runs in handler.bodies(node):
            yield from _terms(body, view, times * (1.0 if runs is None else runs))


def _only_with_parameters(g: Labeller) -> Solution:
    """Solve; then freeze units that own no parameter (zeros of a padding that meet nothing): nothing would be saved."""
    solution = g.table.solve()
    owned = np.zeros(solution.count + 1, dtype=bool)
    for use in g.uses:
        for factors in use.axes.values():
            for vector in solution.units(factors):
                owned[vector] = True
    owned[0] = False
    return solution.only(owned)


def _units(coupling: Coupling) -> list[Unit]:
    table, kinds = MemberTable(coupling.uses, coupling.solution), modes(coupling.solution)
    unsafe = coupling.unsafe(coupling.dead_values(hypothetical=True))
    return [
        Unit(unit, unit not in unsafe, unsafe.get(unit, ""), kinds[unit], table)
        for unit in range(1, coupling.solution.count + 1)
    ]
