"""Which constant subgraphs are worth computing now: those whose result takes no more room than they do.

A *cone* is a connected set of nodes that depend on constants only. Folding it removes its nodes and the initializers
that only it reads, and stores the tensors that leave it. A cone that would grow the file by more than the limit gives
up the node at its rim that inflates most (Expand, Tile, ConstantOfShape, Range, a table computed from a few numbers);
what remains is looked at again. Sizes come from inferred shapes: nothing is computed and no weight is read to decide.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Container

import onnx_ir as ir

from graphopt.rewriting.constants import constant
from graphopt.rewriting.nodes import is_onnx, label
from graphopt.rewriting.scopes import scopes
from graphopt.rewriting.size import initializer_bytes, node_bytes

NEVER = frozenset(
    {
        # random
        *("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"),
        # they carry the quantisation, which a folded tensor would lose
        *("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"),
        # below opset 14 the reference evaluator takes mean and variance of what it normalises (onnx 1.23)
        "BatchNormalization",
        # slow or imprecise in the reference evaluator, and hardly ever constant
        *("Conv", "ConvTranspose", "LSTM", "GRU", "RNN", "Resize", "Upsample", "Dropout", "If", "Loop", "Scan"),
    }
)
"""Operators that are not computed ahead."""

_UNSIZED = "the size of its result is not known"
_OVERHEAD = 24
"""Bytes of an initializer in a file besides its data and its name, about."""


class Plan:
    """The nodes of a model that should be folded, and why the other constant ones should not.

    Attributes:
        fold: nodes to fold.
        refused: reason by node.
        unsized: those of them whose size inference has not told yet, as in model-local functions.
    """

    def __init__(self, model: ir.Model, *, max_growth: int, max_bytes: int) -> None:
        self.fold: set[ir.Node] = set()
        self.refused: dict[ir.Node, str] = {}
        self.unsized: set[ir.Node] = set()
        self._max_growth = max_growth
        for graph, _ in scopes(model):
            candidates: dict[ir.Node, None] = {}
            for node in graph:
                if not self._depends_on_constants(node, candidates):
                    continue
                reason = _not_computable(node, max_bytes)
                if reason is None:
                    candidates[node] = None
                elif reason:
                    self.refused[node] = reason
                    if reason == _UNSIZED:
                        self.unsized.add(node)
            for cone in _connected(candidates):
                self._decide(cone)

    def _decide(self, cone: list[ir.Node]) -> None:
        todo = [cone]
        while todo:
            nodes = todo.pop()
            inside = set(nodes)
            growth = _growth(nodes, inside)
            if growth <= self._max_growth:
                self.fold |= inside
                continue
            worst = max((n for n in nodes if _leaves(n, inside)), key=lambda n: _bytes(n) - _input_bytes(n))
            self.refused[worst] = f"its result takes more room than what it replaces (max_growth={self._max_growth})"
            rest: dict[ir.Node, None] = {}
            for node in nodes:
                if node is not worst and self._depends_on_constants(node, rest):
                    rest[node] = None
            todo.extend(_connected(rest))

    @staticmethod
    def _depends_on_constants(node: ir.Node, known: Container[ir.Node]) -> bool:
        sources = [v for v in node.inputs if v is not None]
        return bool(sources) and all(constant(v) is not None or _made_by(v, known) for v in sources)


def _made_by(value: ir.Value, nodes: Container[ir.Node]) -> bool:
    producer = value.producer()
    return producer is not None and producer in nodes


def _not_computable(node: ir.Node, max_bytes: int) -> str | None:
    """None where `node` can be computed now, "" where that is no news, otherwise the reason."""
    if not is_onnx(node, node.op_type) or is_onnx(node, *NEVER, "Constant"):
        return ""
    if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) or a.is_ref() for a in node.attributes.values()):
        return ""
    if len(node.outputs) != 1:
        return f"{node.op_type} has several outputs"
    if node.outputs[0].is_graph_output():
        return "it computes an output of the graph"
    size = _known_bytes(node.outputs[0])
    if size is None:
        return _UNSIZED
    largest = max([size, *(_known_bytes(v) or 0 for v in node.inputs if v is not None)])
    return f"a tensor above max_bytes={max_bytes} is involved" if largest > max_bytes else None


def _known_bytes(value: ir.Value) -> int | None:
    tensor = constant(value)
    if tensor is not None:
        return tensor.nbytes
    if value.shape is None or value.dtype is None or not all(isinstance(d, int) for d in value.shape):
        return None
    if value.dtype in (ir.DataType.STRING, ir.DataType.UNDEFINED):
        return None
    return math.ceil(math.prod(int(d) for d in value.shape.numpy()) * value.dtype.itemsize)


def _bytes(node: ir.Node) -> int:
    return _known_bytes(node.outputs[0]) or 0


def _input_bytes(node: ir.Node) -> int:
    return sum(_known_bytes(v) or 0 for v in dict.fromkeys(node.inputs) if v is not None)


def _leaves(node: ir.Node, inside: set[ir.Node]) -> bool:
    return any(use.node not in inside for use in node.outputs[0].uses())


def _growth(nodes: list[ir.Node], inside: set[ir.Node]) -> int:
    growth = 0
    sources: dict[ir.Value, None] = {}
    for node in nodes:
        growth -= node_bytes(node)
        if _leaves(node, inside):
            growth += _bytes(node) + len(node.outputs[0].name or "") + _OVERHEAD
        sources.update(dict.fromkeys(v for v in node.inputs if v is not None and v.is_initializer()))
    for value in sources:
        if not value.is_graph_output() and all(use.node in inside for use in value.uses()):
            growth -= initializer_bytes(value)
    return growth


def _connected(nodes: dict[ir.Node, None]) -> list[list[ir.Node]]:
    """The connected components of `nodes` under "reads the output of", each in graph order."""
    parent = {node: node for node in nodes}

    def root(node: ir.Node) -> ir.Node:
        while parent[node] is not node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for node in nodes:
        for value in node.inputs:
            producer = value.producer() if value is not None else None
            if producer in parent:
                parent[root(producer)] = root(node)
    components: dict[ir.Node, list[ir.Node]] = defaultdict(list)
    for node in nodes:
        components[root(node)].append(node)
    return list(components.values())


def tell(refused: dict[ir.Node, str]) -> list[tuple[str, str]]:
    """Name and reason of each refused node, in order."""
    return [(label(node), reason) for node, reason in refused.items()]
