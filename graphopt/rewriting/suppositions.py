"""Which branch of an If can be taken at all: one whose results do not fit what reads them makes every run fail.

Exporters write `If(dim == 1, Squeeze(x), x)` for a squeeze whose axis they did not know. Its result has one rank or
the other, and inference knows neither; but an LSTM behind it takes one of them only. So suppose that a branch is taken,
give its shapes to the results of the If, and follow them through the graph around it, through each If whose condition
they decide, until operands of a node do not fit together. Shapes that were known before hold in any case.

Once the sizes of the inputs are fixed, a branch made for other sizes may fail by itself: one for 8 kHz, given as many
samples as 16 kHz need.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from graphopt.files.integers import dimensions, integers
from graphopt.files.node_shapes import Contradiction, Result, fitting_results
from graphopt.rewriting.dead_code import reachable
from graphopt.rewriting.nodes import is_onnx, label

BRANCHES = ("else_branch", "then_branch")
"""By the condition: false, true."""


def branch(node: ir.Node, taken: bool) -> ir.Graph:
    """The branch that an If takes under this condition."""
    return node.attributes[BRANCHES[taken]].as_graph()


def only_branch(node: ir.Node, opset: int) -> tuple[bool, str] | None:
    """The condition under which an If does not make the model fail, and where it fails under the other.

    Args:
        node: an If.
        opset: version of the standard operator set.

    Returns:
        None where either branch may be taken, or none.
    """
    graph = node.graph
    if not isinstance(graph, ir.Graph):
        return None
    failures = [_failure_within(branch(node, taken), opset) for taken in (False, True)]
    if failures == [None, None] and _differ(branch(node, False), branch(node, True)):
        needed, _ = reachable(graph)
        if node in needed:
            failures = [_Supposition(opset, needed).failure(node, taken) for taken in (False, True)]
    match failures:
        case [None, str(where)]:
            return False, where
        case [str(where), None]:
            return True, where
        case _:
            return None


def _failure_within(body: ir.Graph, opset: int) -> str | None:
    """The first node of a branch that fails whenever it is taken; None if none is known to."""
    needed, _ = reachable(body)
    for node in body:
        if node in needed:
            try:
                fitting_results(node, opset)
            except Contradiction:
                return label(node)
    return None


def _differ(one: ir.Graph, other: ir.Graph) -> bool:
    """True where the branches give a result of different, known ranks: other shapes hardly decide anything."""
    pairs = zip(one.outputs, other.outputs, strict=True)
    return any(a.shape is not None and b.shape is not None and len(a.shape) != len(b.shape) for a, b in pairs)


class _Supposition:
    """Shapes that hold if one branch is taken; the model gets its own back at the end.

    Args:
        opset: version of the standard operator set.
        needed: nodes that are run wherever the graph is.
    """

    def __init__(self, opset: int, needed: set[ir.Node]) -> None:
        self._opset = opset
        self._needed = needed
        self._before: dict[ir.Value, tuple[ir.TypeProtocol | None, ir.Shape | None]] = {}

    def failure(self, node: ir.Node, taken: bool) -> str | None:
        """The first node behind `node`, an If, that fails if this branch is taken; None if none is known to."""
        try:
            self._pass_on(node, branch(node, taken))
            return self._follow(_behind(node))
        finally:
            for value, (kind, shape) in self._before.items():
                value.type, value.shape = kind, shape

    def _follow(self, nodes: Iterable[ir.Node]) -> str | None:
        for node in nodes:
            if node not in self._needed:
                continue
            if is_onnx(node, "If"):
                failed = self._through(node)
                if failed is not None:
                    return failed
            elif any(value in self._before for value in node.inputs if value is not None):
                try:
                    found = fitting_results(node, self._opset)
                except Contradiction:
                    return label(node)
                for value, result in zip(node.outputs, found, strict=True):
                    self._tell(value, result)
        return None

    def _through(self, node: ir.Node) -> str | None:
        """Go through the branch of a later If, where what is supposed decides which."""
        condition = integers(node.inputs[0])
        if condition is None or condition.size != 1:
            return None
        body = branch(node, bool(condition.ravel()[0]))
        failed = self._follow(body)
        if failed is None:
            self._pass_on(node, body)
        return failed

    def _pass_on(self, node: ir.Node, body: ir.Graph) -> None:
        for value, inner in zip(node.outputs, body.outputs, strict=True):
            dims = dimensions(inner)
            self._tell(value, None if inner.type is None or dims is None else (inner.type, dims))

    def _tell(self, value: ir.Value, result: Result | None) -> None:
        """Give a value the shape that follows, with sizes that are known in any case where this leaves them open."""
        if result is None:
            return
        kind, dims = result
        known = dimensions(value)
        if known is not None and len(known) == len(dims):
            dims = [old if isinstance(old, int) else new for old, new in zip(known, dims, strict=True)]
        self._before.setdefault(value, (value.type, value.shape))
        value.type, value.shape = kind, ir.Shape(dims)


def _behind(node: ir.Node) -> Iterable[ir.Node]:
    """The nodes that stand behind `node` in its graph."""
    graph = node.graph
    assert isinstance(graph, ir.Graph)  # only_branch checked it
    found = False
    for other in graph:
        if found:
            yield other
        found = found or other is node
