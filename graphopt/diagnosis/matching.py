"""Which tensors of a model B stand for which tensors of a model A that it was made of.

Rules in the order in which they are asked; each tensor of B is taken once:

1. *provenance*: a node of B that says what was folded into it (`graphopt.folded_from`) computes what the last of these
   nodes computed in A. Its own output kept its name, and no longer its meaning. So does a new node that replaced some.
2. *name*: the tensor has the same name.
   Where B left out a Relu or Clip since the quantised tensor saturates, it is the tensor behind that.
3. *node*: the node has the same name. Where it gives integers, the tensor is the one behind its DequantizeLinear.
4. *place*: same operator, attributes and shapes of constants on matched inputs, and nothing else fits there. Quantise,
   dequantise, Cast and Identity are looked through.

Matched are floating-point tensors of the main graphs that depend on an input. Whether a match holds, shapes and values
tell: see `graphopt.diagnosis.layers`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import onnx_ir as ir

from graphopt.quantization.static.rules import ABSORBED
from graphopt.rewriting.edit import sole_use
from graphopt.rewriting.nodes import FOLDED_FROM, is_onnx, label
from graphopt.slicing import reads_of

How = Literal["provenance", "name", "node", "place", "value"]

READABLE = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16)
"""Types that numpy has, so that the runtime takes and gives them."""

TRANSPARENT = ("QuantizeLinear", "DequantizeLinear", "Cast", "Identity")
"""Operators that hand a tensor on in another type."""


@dataclass(frozen=True)
class Pair:
    """A tensor of A, the tensor of B that stands for it, and the rule that found it."""

    a: ir.Value
    b: ir.Value
    how: How

    @property
    def name(self) -> str:
        """The name of the tensor in A."""
        return str(self.a.name)


@dataclass(frozen=True)
class Unmatched:
    """A tensor of A without a counterpart, its node, and why."""

    tensor: str
    node: str
    op: str
    reason: str


def unmatched(value: ir.Value, reason: str) -> Unmatched:
    """The entry of a tensor that a node computes."""
    node = value.producer()
    assert node is not None
    return Unmatched(str(value.name), label(node), node.op_type, reason)


def match(a: ir.Model, b: ir.Model) -> tuple[list[Pair], list[Unmatched]]:
    """Match the tensors of two models with the same inputs, both with inferred shapes; neither is changed.

    Returns:
        pairs in the order of A, and the floating-point tensors of A that have no counterpart.
    """
    return _Matcher(a.graph, b.graph).run()


def varying(graph: ir.Graph) -> set[ir.Value]:
    """The values of the main graph that depend on an input."""
    found = {v for v in graph.inputs if not v.is_initializer()}
    for node in graph:
        if any(v in found for v in reads_of(node)):
            found.update(node.outputs)
    return found


class _Matcher:
    def __init__(self, a: ir.Graph, b: ir.Graph) -> None:
        self.a, self.b = a, b
        self.varying = varying(a) | varying(b)
        self.found: dict[ir.Value, Pair] = {}
        self.taken: set[ir.Value] = set()
        self.other = {v.name: v for v in b.inputs}
        self.inputs = {v: self.other[v.name] for v in a.inputs if v.name in self.other}
        self.values = {str(v.name): v for node in b for v in node.outputs if v in self.varying}
        self.nodes = {node.name: node for node in b if node.name}
        self.folded: set[str] = set()

    def run(self) -> tuple[list[Pair], list[Unmatched]]:
        wanted = [v for node in self.a for v in node.outputs if v.name and v in self.varying and _may_be_float(v)]
        outputs = {v.name for v in self.b.outputs}
        for value in wanted:
            if value.is_graph_output() and value.name in outputs:
                self._take(value, self.values.get(str(value.name)), "name")
        self._by_provenance()
        for value in wanted:
            self._take(value, self.values.get(str(value.name)), "name")
        for value, other in self._replacements():
            self._take(value, other, "provenance")
        for value in wanted:
            self._take(value, self._by_node(value), "node")
        for value in wanted:
            self._take(value, self._by_place(value), "place")
        pairs = [self.found[v] for v in wanted if v in self.found]
        return pairs, [unmatched(v, self._reason(v)) for v in wanted if v not in self.found]

    def _take(self, value: ir.Value, other: ir.Value | None, how: How) -> None:
        if other is None or value in self.found:
            return
        other = _absorbed(value, other) or _in_float(other)
        fits = other is not None and other not in self.taken and shapes_fit(value.shape, other.shape)
        if other is not None and fits and value.dtype in (None, *READABLE):
            self.found[value] = Pair(value, other, how)
            self.taken.add(other)

    def _by_provenance(self) -> None:
        """Match what nodes of B compute that took over the work of others, and trust none of their names."""
        order = {label(node): (index, node) for index, node in enumerate(self.a)}
        for node in self.b:
            origins = node.metadata_props.get(FOLDED_FROM, "").split(",")
            known = [order[name] for name in (label(node), *origins) if name in order]
            if label(node) not in order or len(known) < 2:
                continue
            self.folded.update(label(each) for _, each in known)
            last = max(known, key=lambda entry: entry[0])[1]
            if not _reaches(order[label(node)][1], last):
                continue
            result = _with_bias(node)
            self._take(last.outputs[0], result, "provenance")
            self.taken.update((node.outputs[0], result))

    def _replacements(self) -> Iterator[tuple[ir.Value, ir.Value]]:
        """What the last of nodes that are gone gave, and the result of the one new node that says it came of them."""
        old = {label(node): node for node in self.a}
        order = {name: index for index, name in enumerate(old)}
        there = {label(node) for node in self.b}
        made: dict[str, list[ir.Node]] = {}
        for node in self.b:
            origins = [name for name in node.metadata_props.get(FOLDED_FROM, "").split(",") if name in old]
            if origins and label(node) not in old and not there.intersection(origins):
                made.setdefault(max(origins, key=order.__getitem__), []).append(node)
        for name, nodes in made.items():
            if len(nodes) == 1:
                yield old[name].outputs[0], nodes[0].outputs[0]

    def _by_node(self, value: ir.Value) -> ir.Value | None:
        node = value.producer()
        twin = self.nodes.get(node.name) if node is not None and node.name else None
        if node is None or twin is None:
            return None
        index = value.index()
        outputs = twin.outputs
        return outputs[index] if index is not None and index < len(outputs) else None

    def _by_place(self, value: ir.Value) -> ir.Value | None:
        node = value.producer()
        if node is None or value in self.found:
            return None
        anchor = next((v for v in node.inputs if v in self.varying), None)
        base = None if anchor is None else _base(anchor)
        there = None if base is None else self._counterpart(base)
        if base is None or there is None:
            return None
        mine = self._sign(node, ours=True)
        if mine is None:
            return None
        rivals = [n for n in _readers(base) if n.outputs[0] not in self.found and self._sign(n, ours=True) == mine]
        fits = [n for n in _readers(there) if n.outputs[0] not in self.taken and self._sign(n, ours=False) == mine]
        if len(rivals) == 1 and len(fits) == 1 and len(fits[0].outputs) == len(node.outputs):
            return fits[0].outputs[value.index() or 0]
        return None

    def _counterpart(self, base: ir.Value) -> ir.Value | None:
        pair = self.found.get(base)
        return self.inputs.get(base) if pair is None else _base(pair.b)

    def _sign(self, node: ir.Node, *, ours: bool) -> tuple[Any, ...] | None:
        """What a node computes from what, in terms of B's tensors; None where an input has no counterpart."""
        inputs: list[Any] = []
        for value in node.inputs:
            if value is None:
                inputs.append(None)
            elif value not in self.varying:
                shape = _base(value).shape
                inputs.append(None if shape is None else tuple(str(d) for d in shape))
            else:
                known = self._counterpart(_base(value)) if ours else _base(value)
                if known is None:
                    return None
                inputs.append(id(known))
        attributes = sorted(
            (name, str(value.value))
            for name, value in node.attributes.items()
            if not value.is_ref() and value.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
        )
        return node.domain, node.op_type, tuple(inputs), tuple(attributes)

    def _reason(self, value: ir.Value) -> str:
        if value.dtype not in (None, *READABLE):
            return f"{_type(value)} cannot be read from the runtime"
        same = self.values.get(str(value.name)) or self._by_node(value)
        if same is not None and same not in self.taken:
            other = _in_float(same)
            if other is None:
                return f"{same.name} of B is {_type(same)}, and nothing dequantises it"
            return f"its shape is {_shown(value.shape)}, and {_shown(other.shape)} in B"
        node = value.producer()
        if node is not None and label(node) in self.folded:
            return "folded: a node of B computes it together with what is behind it"
        return "B has nothing of its name, of its node's name or in its place"


def _type(value: ir.Value) -> str:
    return "of unknown type" if value.dtype is None else value.dtype.name.lower()


def _may_be_float(value: ir.Value) -> bool:
    if value.type is not None and not isinstance(value.type, ir.TensorType):
        return False
    return value.dtype is None or value.dtype.is_floating_point()


def _in_float(value: ir.Value) -> ir.Value | None:
    """The tensor itself, or what the DequantizeLinear that reads it gives; None where it has integers only."""
    if value.dtype is None or value.dtype in READABLE:
        return value
    return next((u.node.outputs[0] for u in value.uses() if u.node.op_type == "DequantizeLinear" and u.idx == 0), None)


def _absorbed(value: ir.Value, other: ir.Value) -> ir.Value | None:
    """Where B has no Relu or Clip because a quantised tensor saturates instead: the tensor behind that."""
    node, there = value.producer(), other.producer()
    if node is None or node.op_type not in ABSORBED or there is None or there.op_type in (*ABSORBED, *TRANSPARENT):
        return None
    quantize = next((u.node for u in other.uses() if u.node.op_type == "QuantizeLinear" and u.idx == 0), None)
    return None if quantize is None else _in_float(quantize.outputs[0])


def _with_bias(node: ir.Node) -> ir.Value:
    """The result of a linear node: a MatMul has its bias in the Add behind it."""
    result = node.outputs[0]
    use = sole_use(result) if is_onnx(node, "MatMul") else None
    if use is None or not is_onnx(use.node, "Add"):
        return result
    bias = use.node.inputs[1 - use.idx]
    return use.node.outputs[0] if bias is not None and _is_constant(bias) else result


def _is_constant(value: ir.Value) -> bool:
    base = _base(value)
    producer = base.producer()
    return base.is_initializer() or (producer is not None and is_onnx(producer, "Constant"))


def _base(value: ir.Value) -> ir.Value:
    """The tensor that is handed on here, before it was quantised, dequantised or cast."""
    while (node := value.producer()) is not None and node.op_type in TRANSPARENT and node.inputs[0] is not None:
        value = node.inputs[0]
    return value


def _readers(value: ir.Value) -> Iterator[ir.Node]:
    """The nodes that read a tensor, also where it is quantised, dequantised or cast between; each once."""
    seen: set[ir.Node] = set()
    pending = [value]
    while pending:
        for use in pending.pop().uses():
            if use.node in seen:
                continue
            seen.add(use.node)
            if use.node.op_type in TRANSPARENT and use.idx == 0:
                pending.append(use.node.outputs[0])
            else:
                yield use.node


def _reaches(first: ir.Node, last: ir.Node) -> bool:
    """Whether the first node has a share in what the last computes; both in one graph, in topological order."""
    pending, seen = [last], {last}
    while pending:
        node = pending.pop()
        if node is first:
            return node is not last
        new = {p for v in reads_of(node) if (p := v.producer()) is not None} - seen
        seen |= new
        pending.extend(new)
    return False


def shapes_fit(a: ir.Shape | None, b: ir.Shape | None) -> bool:
    """Whether two shapes can be the same; dimensions with names fit everything."""
    if a is None or b is None:
        return True
    return len(a) == len(b) and all(
        not isinstance(x, int) or not isinstance(y, int) or x == y for x, y in zip(a, b, strict=True)
    )


def _shown(shape: ir.Shape | None) -> str:
    return "unknown" if shape is None else f"[{', '.join(str(d) for d in shape)}]"
