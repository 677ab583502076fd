"""What a delegate would take of a model: nodes, parts, share of the work, and which change would help."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import onnx_ir as ir

from graphopt.analysis import shapes
from graphopt.delegates.judge import Refusal, refusals
from graphopt.delegates.partition import partition, runs
from graphopt.delegates.table import Delegate, delegate
from graphopt.delegates.units import Unit, parents, units
from graphopt.delegates.work import macs
from graphopt.rewriting.nodes import label
from graphopt.rewriting.scopes import bodies


@dataclass(frozen=True)
class Part:
    """Nodes that go to the delegate as one graph.

    Attributes:
        nodes: their names, in the order of execution.
        macs: share of the model's multiply-accumulates.
    """

    nodes: tuple[str, ...]
    macs: float


@dataclass(frozen=True)
class Refused:
    """A node that stays with ONNX Runtime's CPU provider.

    Attributes:
        node: its name.
        op: its operator.
        reasons: everything that stands against it.
        macs: share of the model's multiply-accumulates.
    """

    node: str
    op: str
    reasons: tuple[str, ...]
    macs: float


@dataclass(frozen=True)
class Change:
    """Something to do to the model, and what the delegate would take then.

    Attributes:
        change: an imperative.
        nodes: those that it helps.
        taken: nodes that would be taken, of all.
        macs: share of the multiply-accumulates that would be.
        parts: number of parts that there would be.
    """

    change: str
    nodes: tuple[str, ...]
    taken: int
    macs: float
    parts: int


@dataclass(frozen=True)
class Report:
    """What a delegate takes of a model.

    Attributes:
        delegate: its name; `title` how it is called.
        nodes: number of nodes of the model, Constants not counted.
        taken: number of those that the delegate takes.
        macs: share of the multiply-accumulates in them, symbolic sizes counted as 1; share of the nodes where nothing
            that counts multiplies or its sizes are not known (`measure`).
        measure: what `macs` and those of the other records are shares of: "multiply-accumulates" or "nodes".
        parts: what it gets.
        refused: what stays.
        changes: what would help, the most helpful first.
        notes: conditions of the nodes taken that no file tells.
        date, sources: of the table.
    """

    delegate: str
    title: str
    provider: str
    nodes: int
    taken: int
    macs: float
    parts: tuple[Part, ...]
    refused: tuple[Refused, ...]
    changes: tuple[Change, ...]
    notes: tuple[str, ...]
    date: str
    sources: tuple[str, ...]
    measure: str = "multiply-accumulates"

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)

    def summary(self) -> str:
        """One line."""
        parts = f"{len(self.parts)} part{'' if len(self.parts) == 1 else 's'}"
        taken = f"{self.taken} of {self.nodes} nodes in {parts}"
        return f"{self.title}: {taken}, {self.macs:.1%} of the {self.measure}"


def report(model: ir.Model, which: Delegate | str) -> Report:
    """Tell what a delegate would take of a model.

    Args:
        model: not changed. Shapes must have been inferred (`graphopt.load` does); functions are refused as they stand.
        which: a delegate, or the name of its table.

    Raises:
        UsageError: there is no such table.
    """
    chosen = delegate(which) if isinstance(which, str) else which
    return _Survey(model, chosen).report()


class _Survey:
    def __init__(self, model: ir.Model, chosen: Delegate) -> None:
        self.delegate = chosen
        self.groups = any(rule.quantised for rule in chosen.rules)
        self.units = units(model.graph, groups=self.groups)
        self.parents = parents(self.units)
        fix = _fix(model)
        self.against: dict[Unit, tuple[Refusal, ...]] = {}
        for unit in self.units:
            self.against[unit] = () if self._fused(unit) else self._against(unit, fix)
        self.blocked = self._behind_stops()
        self.work = {unit: macs(unit) for unit in self.units}
        self.total = sum(self.work.values())

    def _fused(self, unit: Unit) -> bool:
        """Whether it becomes part of the kernel before it, which nobody else reads."""
        hosts = self.delegate.fused.get(unit.op, ())
        before = [parent for parent in self.parents[unit] if parent.op in hosts and not parent.quantised]
        if not before or unit.quantised or self.against[before[0]]:
            return False
        output = before[0].node.outputs[0]
        return not output.is_graph_output() and {use.node for use in output.uses()} == {unit.node}

    def _against(self, unit: Unit, fix: str) -> tuple[Refusal, ...]:
        inside = tuple(bodies(unit.node))
        if inside and self.delegate.bodies:
            found = list(refusals(unit, self.delegate, fix))
            for inner in (each for body in inside for each in units(body, groups=self.groups)):
                found += [
                    replace(r, reason=f"{label(inner.node)} in it: {r.reason}") for r in self._against(inner, fix)
                ]
            return tuple(found)
        if inside:
            reason = "nodes with bodies are not taken, nor is what stands in them"
            return (Refusal("body", reason, f"unroll or remove {unit.op}"),)
        return refusals(unit, self.delegate, fix)

    def _behind_stops(self) -> frozenset[Unit]:
        """Units that depend on an operator behind which the delegate takes nothing."""
        blocked: set[Unit] = set()
        for unit in self.units:
            if unit.op in self.delegate.stops or any(parent in blocked for parent in self.parents[unit]):
                blocked.add(unit)
        return frozenset(blocked)

    def parts(self, granted: frozenset[str] = frozenset()) -> list[list[Unit]]:
        """The parts, were some changes made."""

        def taken(unit: Unit) -> bool:
            return unit not in self.blocked and all(found.change in granted for found in self.against[unit])

        if self.delegate.partitions == "runs":
            return runs(self.units, taken)
        return partition(self.units, self.parents, taken, self.delegate.worthless)

    def share(self, some: Sequence[Unit]) -> float:
        work = sum(self.work[unit] for unit in some)
        return work / self.total if self.total else len(_nodes(some)) / max(len(_nodes(self.units)), 1)

    def report(self) -> Report:
        chosen, parts = self.delegate, self.parts()
        inside = {unit for part in parts for unit in part}
        taken = _nodes([unit for unit in self.units if unit in inside])
        refused = tuple(self._refused(unit) for unit in self.units if unit not in inside)
        notes = dict.fromkeys(
            f"{rule.ops[0] if len(rule.ops) == 1 else ', '.join(op for op in rule.ops if op == unit.op)}: {rule.note}"
            for unit in inside
            for rule in chosen.rules_for(unit.op, quantised=unit.quantised)
            if rule.note
        )
        return Report(
            delegate=chosen.name,
            title=chosen.title,
            provider=chosen.provider,
            nodes=len(_nodes(self.units)),
            taken=len(taken),
            macs=self.share([unit for unit in self.units if unit in inside]),
            parts=tuple(Part(tuple(label(n) for n in _nodes(part)), self.share(part)) for part in parts),
            refused=refused,
            changes=tuple(self._changes(len(taken), self.share(list(inside)), len(parts))),
            notes=(*([chosen.note] if chosen.note else []), *sorted(notes)),
            date=chosen.date,
            sources=chosen.sources,
            measure="multiply-accumulates" if self.total else "nodes",
        )

    def _refused(self, unit: Unit) -> Refused:
        reasons = tuple(dict.fromkeys(found.reason for found in self.against[unit]))
        if not reasons and unit in self.blocked:
            reasons = (f"it stands behind {' or '.join(self.delegate.stops)}, from which on nothing is taken",)
        if not reasons:
            reasons = (f"{unit.op} alone is not worth the transfer",)
        return Refused(label(unit.node), unit.op, reasons, self.share([unit]) if self.total else 0.0)

    def _changes(self, taken: int, share: float, parts: int) -> list[Change]:
        """Every single change that helps, then all of these together where that is more than the best of them."""
        every = list(dict.fromkeys(r.change for unit in self.units for r in self.against[unit] if r.change))
        helpful = []
        for change in every:
            found = self._with(frozenset({change}))
            if (found.taken, found.macs, -found.parts) > (taken, share, -parts):
                helpful.append(found)
        helpful.sort(key=lambda c: (-round(c.macs, 6), c.parts, -c.taken, c.change))
        together = self._with(frozenset(every))
        if len(every) > 1 and (not helpful or (together.macs, together.taken) > (helpful[0].macs, helpful[0].taken)):
            helpful.append(together)
        return helpful

    def _with(self, granted: frozenset[str]) -> Change:
        parts = self.parts(granted)
        inside = [unit for part in parts for unit in part]
        helped = tuple(
            label(unit.node) for unit in self.units if any(found.change in granted for found in self.against[unit])
        )
        name = next(iter(granted)) if len(granted) == 1 else "all changes together"
        return Change(name, helped, len(_nodes(inside)), self.share(inside), len(parts))


def _nodes(some: Sequence[Unit]) -> list[ir.Node]:
    return list(dict.fromkeys(node for unit in some for node in unit.nodes))


def _fix(model: ir.Model) -> str:
    """The change that fixes all free sizes of the inputs."""
    free: dict[str, None] = {}
    unnamed = []
    for value in model.graph.inputs:
        for size in shapes.dims(value) or ():
            if isinstance(size, str):
                free[size] = None
            elif size is None:
                unnamed.append(value.name)
    options = [f"--dim {name}=SIZE" for name in free] + [f"--input-shape {name}=..." for name in dict.fromkeys(unnamed)]
    return f"fix the sizes of the inputs ({' '.join(options)}) and fold" if options else "fold"
