"""What an operator rule is, and the views of the graph that it works on.

A rule answers four questions about one operator, and all four stand together in one class (analysis/ops/):

    label    which positions of its inputs and outputs live and die together
    dead     what value a consumer sees at a position whose unit is dead
    cost     multiply-accumulates, as a product of alive counts
    rewrite  which attributes and constants hold sizes, and what they become

An operator without a rule freezes everything it touches, with its name as the reason.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import onnx_ir as ir

from graphopt.analysis import shapes
from graphopt.analysis.labels import Axes, Factors, LabelTable, Vector

if TYPE_CHECKING:
    from graphopt.analysis.dead_values import DeadValues
    from graphopt.analysis.remove import Removal

Role = Literal["producer", "consumer", "follower"]
"""producer: zeroing the slice makes the unit's output zero (a filter, its bias). consumer: the slice reads the unit.
follower: the slice only keeps the unit company (a running variance, a scale that multiplies)."""
Accepts = Literal["anything", "constant", "zero", "none"]


def where(node: ir.Node) -> str:
    """How messages name a node."""
    name = node.name or (node.outputs[0].name if node.outputs else "")
    domain = f"{node.domain}." if node.domain not in {"", "ai.onnx"} else ""
    return f"{domain}{node.op_type} '{name}'"


def node_key(node: ir.Node) -> str:
    """What identifies a node: the name of its first named output (names of nodes are optional in ONNX)."""
    return next((v.name for v in node.outputs if v.name), node.name or "")


@dataclass(frozen=True)
class Use:
    """One use of a parameter whose slices follow labels.

    Vectors (at most one axis longer than 1) are labelled per use, so that a filler constant that two layers share does
    not tie them: at removal each use gets the slice it needs. Larger tensors are labelled once: shared means tied.
    """

    parameter: str
    node: str
    index: int
    axes: Axes
    roles: dict[int, Role]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Sink:
    """A place where positions of an axis end: contracted, averaged, or judged together.

    Attributes:
        value: the tensor whose axis ends.
        axis: that axis.
        node: the operator.
        accepts: which dead values leave the result unchanged: "anything" (the units go on in the result, where they are
            judged again), "constant" (folded into a bias), "zero", or "none".
        reason: why nothing else is exact, for the report.
        index: which operand of the node it is; a parameter has labels by use.
        zero: the value that counts as zero: a zero point where integers stand for numbers.
        factors: the labels that end here; empty: all of the axis.
    """

    value: str
    axis: int
    node: str
    accepts: Accepts
    reason: str
    index: int = 0
    zero: float = 0.0
    factors: Factors = field(default=(), compare=False)


@dataclass(frozen=True)
class CostTerm:
    """MACs of a node = coefficient * product over `axes` of the number of alive positions.

    Attributes:
        node: name of the node.
        coefficient: everything that does not depend on units; symbolic dimensions count as 1.
        axes: one entry an axis; the unit id of each position (0 = never removed). A position with several factors
            counts as alive iff all its units are, so an entry is an array of shape (factors, positions).
    """

    node: str
    coefficient: float
    axes: tuple[Vector, ...]


@dataclass
class Labeller:
    """The graph while labels are being given. Rules read operand labels with `of` and write results with `set`.

    Attributes:
        entered: the graphs that can be walked, see `graphopt.analysis.scope`.
    """

    table: LabelTable = field(default_factory=LabelTable)
    labels: dict[str, Axes] = field(default_factory=dict)
    uses: list[Use] = field(default_factory=list)
    sinks: list[Sink] = field(default_factory=list)
    entered: frozenset[ir.Graph] = frozenset()
    _tied: dict[str, Axes] = field(default_factory=dict)
    _read: set[str] = field(default_factory=set)

    def of(self, value: ir.Value | None) -> Axes:
        """Labels of a computed value; an unlabelled tensor has none."""
        if value is None or value.name is None:
            return {}
        self._read.add(value.name)
        return self.labels.get(value.name, {})

    def operand(
        self,
        node: ir.Node,
        index: int,
        roles: dict[int, Role] | None = None,
        role: Role = "follower",
        only: Sequence[int] | None = None,
    ) -> Axes:
        """Labels of an operand that may be a parameter; a parameter is given labels on every axis longer than 1.

        Args:
            node: the node.
            index: which operand.
            roles: roles by axis of a parameter; axes that are not listed have `role`.
            role: see `Role`.
            only: axes of a parameter that can have units at all; the others are never shortened.
        """
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is None or value.name is None:
            return {}
        tensor = shapes.constant_tensor(value)
        if tensor is None or value.name in self.labels:
            return self.of(value)
        long = {axis: size for axis, size in enumerate(shapes.sizes(value) or ()) if size > 1}
        wanted = [axis for axis in long if only is None or axis in only]
        axes = self._tied.get(value.name, {}) if len(long) > 1 else {}
        if not axes:
            axes = {axis: (self.table.fresh(long[axis]),) for axis in wanted}
            if len(long) > 1:
                self._tied[value.name] = axes
        self.freeze(axes, f"{where(node)}: the axis can have no units", but=wanted)
        given = roles or {}
        found = {axis: given.get(axis, role) for axis in axes}
        self.uses.append(Use(value.name, node_key(node), index, axes, found, tuple(tensor.shape.numpy())))
        return dict(axes)

    def walk(self, graph: ir.Graph) -> None:
        """Label all nodes of a graph, in its order."""
        for node in graph:
            handler = rule_for(node)
            if handler is None:
                self.freeze_node(node, f"{where(node)}: no rule for {node.domain or 'ai.onnx'}::{node.op_type}")
                continue
            self.visit(node, handler)
            for value in node.outputs:
                self.check_sizes(node, value)

    def visit(self, node: ir.Node, rule: OpRule) -> None:
        """Let a rule label a node. A labelled operand that the rule does not look at is a size or an index: frozen."""
        around, self._read = self._read, set()  # the node may stand in a body that a rule is walking
        rule.label(node, self)
        for value in node.inputs:
            if value is not None and value.name in self.labels and value.name not in self._read:
                self.freeze(self.labels[value.name], f"{where(node)}: '{value.name}' is a size or an index")
        self._read = around

    def check_sizes(self, node: ir.Node, value: ir.Value) -> None:
        """Labels must fit the inferred shape; a rule that disagrees with shape inference may not decide anything."""
        shape = shapes.dims(value)
        for axis, factors in list(self.labels.get(value.name or "", {}).items()):
            # An unnamed size is one that shape inference lost; labels that were moved here know it.
            fits = shape is not None and axis < len(shape) and shape[axis] in (len(factors[0]), None)
            if not fits:
                # Shape inference leaves out the mask of the Dropout of old opsets, which nobody reads either.
                if value.uses() or value.is_graph_output():
                    reason = f"{where(node)}: the size of axis {axis} of '{value.name}' is not known"
                    self.freeze({axis: factors}, reason)
                del self.labels[value.name or ""][axis]

    def set(self, value: ir.Value, axes: Axes) -> None:
        """Give an output its labels."""
        if value.name and axes:
            self.labels[value.name] = {axis: factors for axis, factors in axes.items() if factors}

    def equate(self, left: Factors, right: Factors, reason: str) -> Factors:
        """The same axis seen twice: its positions live and die together.

        One side without labels is an axis that never shrinks, which freezes the other side.
        """
        if not left or not right:
            self.table.freeze(left or right, reason)
            return left or right
        if len(left) > len(right):
            left, right = right, left
        if len(left) == 1 < len(right):
            self.table.define(left[0], right, reason)
            return right
        pairs = _aligned(left, right)
        if pairs is None:
            self.table.define(self.table.product(left), right, reason)
            return right
        for one, other in pairs:
            self.table.equate(one, other, reason)
        return left

    def heads(self, factors: Factors) -> None:
        """Remember that an axis counts the matrices of a batched product of activations."""
        if factors:
            self.table.note(self.table.product(factors), "head")

    def freeze(self, axes: Axes, reason: str, only: Iterable[int] | None = None, but: Iterable[int] = ()) -> None:
        """Freeze all axes of a tensor, some (`only`), or all but some (`but`)."""
        chosen = axes if only is None else [axis for axis in only if axis in axes]
        skipped = set(but)
        for axis in chosen:
            if axis not in skipped:
                self.table.freeze(axes[axis], reason)

    def freeze_node(self, node: ir.Node, reason: str) -> None:
        """Freeze everything that a node reads, also inside its subgraphs, and label nothing that it writes."""
        for index, value in enumerate(node.inputs):
            if value is not None:
                self.freeze(self.operand(node, index), reason)
        for value in captured(node):
            if value.name and value.name in self.labels:
                self.freeze(self.labels[value.name], reason)
            elif shapes.constant_tensor(value) is not None:
                self.freeze_constant(value, reason)

    def freeze_constant(self, value: ir.Value, reason: str) -> None:
        """A parameter that is read where units cannot be followed keeps its full size."""
        name = value.name or ""
        tied = self._tied.setdefault(name, {})
        tensor = shapes.constant_tensor(value)
        if tensor is None:
            return
        for axis, size in enumerate(tensor.shape):
            if isinstance(size, int) and size > 1:
                factors = tied.setdefault(axis, (self.table.fresh(size),))
                self.table.freeze(factors, reason)

    def sink(
        self,
        node: ir.Node,
        index: int,
        axis: int,
        accepts: Accepts,
        reason: str,
        factors: Factors = (),
        *,
        zero: float = 0.0,
    ) -> None:
        """Record that positions of an operand's axis end here; the fields are those of `Sink`."""
        value = node.inputs[index]
        if value is None or not value.name:
            return
        if accepts == "constant" and shapes.constant_tensor(value) is not None:
            accepts = "zero"  # only what activations bring is folded into biases
        self.sinks.append(Sink(value.name, axis, node_key(node), accepts, reason, index, zero, factors))


def _aligned(left: Factors, right: Factors) -> list[tuple[Vector, Vector]] | None:
    """Factors of two descriptions of one axis, paired by how they vary along it; None where they do not match."""
    if len(left) != len(right):
        return None
    if len(left) == 1:
        return [(left[0], right[0])]
    rest = {_pattern(vector): vector for vector in right}
    found = [(vector, rest.pop(_pattern(vector), None)) for vector in left]
    pairs = [(one, other) for one, other in found if other is not None]
    return pairs if len(pairs) == len(left) else None


def _pattern(vector: Vector) -> bytes:
    """Which positions of a vector are equal."""
    _, first, inverse = np.unique(vector, return_index=True, return_inverse=True)
    return np.asarray(first[inverse], dtype=np.int64).tobytes()


def captured(node: ir.Node) -> list[ir.Value]:
    """Values of outer scopes that the subgraphs of a node read."""
    outer: dict[ir.Value, None] = {}
    for attribute in node.attributes.values():
        graphs = (
            [attribute.as_graph()]
            if attribute.type == ir.AttributeType.GRAPH
            else list(attribute.as_graphs())
            if attribute.type == ir.AttributeType.GRAPHS
            else []
        )
        for graph in graphs:
            inside: set[ir.Value] = set()
            nested = [graph, *graph.subgraphs()]
            for each in nested:
                inside.update(each.inputs, each.initializers.values())
            for inner in graph.all_nodes():
                inside.update(inner.outputs)
            for inner in graph.all_nodes():
                outer.update((v, None) for v in inner.inputs if v is not None and v not in inside)
            for each in nested:
                outer.update((v, None) for v in each.outputs if v not in inside)
    return list(outer)


Product = tuple[float, tuple[Vector, ...]]
"""(coefficient, axes): coefficient * product over axes of the number of alive positions; see `CostTerm`."""


@dataclass(frozen=True)
class CostView:
    """Unit ids by position, for rules that count work."""

    of_operand: Callable[[ir.Node, int, int], Factors]
    of_value: Callable[[ir.Value, int], Factors]

    def axis(self, node: ir.Node, index: int, axis: int, size: int) -> Product:
        """(coefficient, axes) of an operand's axis: a labelled one counts alive positions, another its size."""
        return _counted(self.of_operand(node, index, axis), size)

    def result(self, node: ir.Node, axis: int, size: int) -> Product:
        """(coefficient, axes) of an axis of the first output."""
        return _counted(self.of_value(node.outputs[0], axis), size)


def _counted(factors: Factors, size: int) -> Product:
    return (1.0, (np.stack(factors),)) if factors else (float(size), ())


class OpRule(ABC):
    """What one operator does to units. The defaults suit an operator that only passes axes through."""

    ops: ClassVar[Sequence[str]]
    domain: ClassVar[str] = ""

    @abstractmethod
    def label(self, node: ir.Node, g: Labeller) -> None:
        """Give the outputs labels, tie operands, freeze what cannot be followed."""

    def dead(self, node: ir.Node, d: DeadValues) -> None:
        """Tell the dead values of the outputs; saying nothing means unknown."""

    def cost(self, node: ir.Node, c: CostView) -> list[Product]:
        """The node's multiply-accumulates as a sum of products; empty for operators without any."""
        return []

    def bodies(self, node: ir.Node) -> list[tuple[ir.Graph, float | None]]:
        """The graphs that the node runs, and how often in one run of it; None where that depends on the data."""
        return []

    def rewrite(self, node: ir.Node, r: Removal) -> None:
        """Change attributes and constants that hold sizes; parameters are sliced for all operators alike."""


_RULES: dict[tuple[str, str], OpRule] = {}


def rule(cls: type[OpRule]) -> type[OpRule]:
    """Class decorator: this is the rule of `cls.ops` in `cls.domain`."""
    for op_type in cls.ops:
        key = (cls.domain, op_type)
        if key in _RULES:
            raise ValueError(f"two rules for {key}: {type(_RULES[key]).__name__} and {cls.__name__}")
        _RULES[key] = cls()
    return cls


def registered() -> Mapping[tuple[str, str], OpRule]:
    """All rules by domain and operator."""
    import graphopt.analysis.ops  # noqa: F401  (registers the rules)

    return _RULES


def rule_for(node: ir.Node) -> OpRule | None:
    """The rule of a node's operator; None where there is none."""
    domain = "" if node.domain == "ai.onnx" else node.domain
    return registered().get((domain, node.op_type))
