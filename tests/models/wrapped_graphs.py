"""Random graphs with a stretch of their nodes moved into the body of an If, Loop or Scan; the function stays the same.

"if": both branches hold the stretch, the second one renamed. "loop" and "scan" run it once and stack its results, which
are unstacked behind; a scan takes one tensor slice by slice. "state" carries a tensor through the stretch twice, which
is another function. "nested": an If in a Loop or Scan.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from random_graphs import random_graph

from graphopt.model import infer_shapes
from graphopt.rewriting.names import Names
from graphopt.rewriting.scopes import bodies

KINDS = ("if", "loop", "scan", "state", "nested")


def wrapped_graph(seed: int, kind: str) -> ir.Model | None:
    """The graph of a seed with a random stretch in a body; None where it has no stretch that fits."""
    model = random_graph(seed)
    wrapper = _Wrapper(model, np.random.default_rng(seed + 1))
    done = wrapper.nested() if kind == "nested" else wrapper.wrap(kind)
    if not done:
        return None
    infer_shapes(model)
    return model


class _Wrapper:
    def __init__(self, model: ir.Model, random: np.random.Generator) -> None:
        self.graph, self.random, self.names = model.graph, random, Names(model)
        self.opset = model.opset_imports[""]

    def wrap(self, kind: str, around: ir.Node | None = None) -> bool:
        if kind in ("loop", "state") and self.opset < 11:  # before, every Loop carries a state
            return False
        nodes = list(self.graph)
        if kind == "state":
            return self._state(nodes)
        end = next(k for k, n in enumerate(nodes) if any(v.is_graph_output() for v in n.outputs))
        place = nodes.index(around) if around is not None else None
        first = int(self.random.integers(0, end if place is None else place + 1))
        last = int(self.random.integers(first if place is None else place, end))
        stretch = nodes[first : last + 1]
        results = [v for n in stretch for v in n.outputs if self._leaves(v, stretch)]
        sources = self._sources(stretch)
        sizes = any(v.dtype != ir.DataType.FLOAT for v in results)  # inference follows none out of a body
        if not results or sizes or (kind == "scan" and not sources):
            return False
        if kind == "if":
            self._if(stretch, results)
        else:
            self._stacked(stretch, results, sources[0] if kind == "scan" else None)
        return True

    def nested(self) -> bool:
        if not self.wrap("if"):
            return False
        inner = next(n for n in self.graph if n.op_type == "If")
        return self.wrap(str(self.random.choice(["loop", "scan"])), around=inner)

    @staticmethod
    def _leaves(value: ir.Value, stretch: list[ir.Node]) -> bool:
        """Also what only a body in the graph around reads, which counts as a reader of its own."""
        inside = {*stretch, *(inner for node in stretch for body in bodies(node) for inner in body.all_nodes())}
        return value.is_graph_output() or any(use.node not in inside for use in value.uses())

    # Kinds -----------------------------------------------------------------------------------------------------------

    def _if(self, stretch: list[ir.Node], results: list[ir.Value]) -> None:
        condition = ir.Value(name=self.names.fresh("cond"), type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))
        self.graph.inputs.append(condition)
        outer = [(v, self._outer_uses(v, stretch)) for v in results]
        anchor = self._anchor(stretch)
        copies, mapping = self._copy(stretch)
        self.graph.remove(stretch)
        branches = {
            "then_branch": ir.Graph([], results, nodes=stretch, name="then"),
            "else_branch": ir.Graph([], [mapping[v] for v in results], nodes=copies, name="else"),
        }
        self._insert(anchor, "If", [condition], branches, outer)

    def _stacked(self, stretch: list[ir.Node], results: list[ir.Value], source: ir.Value | None) -> None:
        """One run; results get an axis of size 1, which is taken away again."""
        outer = [(v, self._outer_uses(v, stretch)) for v in results]
        anchor = self._anchor(stretch)
        self.graph.remove(stretch)
        if source is not None:
            axis = int(self.random.integers(0, 3))
            part = ir.Value(name=self.names.fresh("part"), type=source.type)
            self._read_instead(stretch, source, part)
            whole = self._unsqueeze(anchor, source, axis)
            body = ir.Graph([part], results, nodes=stretch, name="body")
            ends = [int(self.random.choice([0, 1, -1] if self.opset > 10 else [0, 1])) for _ in results]
            attributes = {"body": body, "num_scan_inputs": 1, "scan_input_axes": [axis], "scan_output_axes": ends}
            self._insert(anchor, "Scan", [whole], attributes, outer, ends)
            return
        number = ir.Value(name=self.names.fresh("i"), type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([]))
        goes_on = ir.Value(name=self.names.fresh("on"), type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))
        still = self._node("Identity", [goes_on])
        body = ir.Graph([number, goes_on], [still.outputs[0], *results], nodes=[*stretch, still], name="body")
        self._insert(anchor, "Loop", [self._constant(np.array(1)), None], {"body": body}, outer, [0] * len(results))

    def _state(self, nodes: list[ir.Node]) -> bool:
        """A loop that runs twice over a stretch from one tensor to a later one of the same shape."""
        pairs = [
            (a, b, n)
            for a, m in enumerate(nodes)
            for b, n in enumerate(nodes)
            if a < b
            and m.outputs[0].shape == n.outputs[0].shape
            and m.outputs[0].dtype == n.outputs[0].dtype == ir.DataType.FLOAT
            and len(n.outputs) == 1
            and not n.outputs[0].is_graph_output()
            and not any(self._leaves(v, nodes[a + 1 : b + 1]) for k in nodes[a + 1 : b] for v in k.outputs)
            and any(v is m.outputs[0] for k in nodes[a + 1 : b + 1] for v in k.inputs)
            and not any(k.op_type == "Exp" for k in nodes[a + 1 : b + 1])  # exp(exp(x)) is soon beyond float32
        ]
        if not pairs:
            return False
        a, b, last = pairs[int(self.random.integers(len(pairs)))]
        stretch, start, result = nodes[a + 1 : b + 1], nodes[a].outputs[0], last.outputs[0]
        outer = [(result, self._outer_uses(result, stretch))]
        anchor = self._anchor(stretch)
        self.graph.remove(stretch)
        number = ir.Value(name=self.names.fresh("i"), type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([]))
        goes_on = ir.Value(name=self.names.fresh("on"), type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))
        inside = ir.Value(name=self.names.fresh("state"), type=start.type)
        self._read_instead(stretch, start, inside)
        still = self._node("Identity", [goes_on])
        body = ir.Graph([number, goes_on, inside], [still.outputs[0], result], nodes=[*stretch, still], name="body")
        self._insert(anchor, "Loop", [self._constant(np.array(2)), None, start], {"body": body}, outer)
        return True

    # Parts -----------------------------------------------------------------------------------------------------------

    def _sources(self, stretch: list[ir.Node]) -> list[ir.Value]:
        """Computed tensors that the nodes of a stretch read themselves."""
        outside = [v for n in stretch for v in n.inputs if v is not None and v.producer() not in (None, *stretch)]
        return [v for v in outside if v.dtype == ir.DataType.FLOAT]

    def _anchor(self, stretch: list[ir.Node]) -> ir.Node:
        nodes = list(self.graph)
        return nodes[nodes.index(stretch[-1]) + 1]

    @staticmethod
    def _outer_uses(value: ir.Value, stretch: list[ir.Node]) -> list[tuple[ir.Node, int]]:
        inside = {*stretch, *(inner for node in stretch for body in bodies(node) for inner in body.all_nodes())}
        return [(use.node, use.idx) for use in value.uses() if use.node not in inside]

    @staticmethod
    def _read_instead(stretch: list[ir.Node], old: ir.Value, new: ir.Value) -> None:
        for node in stretch:
            for each in (node, *(inner for body in bodies(node) for inner in body.all_nodes())):
                for index, value in enumerate(each.inputs):
                    if value is old:
                        each.replace_input_with(index, new)

    def _copy(self, stretch: list[ir.Node]) -> tuple[list[ir.Node], dict[ir.Value, ir.Value]]:
        mapping: dict[ir.Value, ir.Value] = {}
        copies = []
        for node in stretch:
            copy = ir.Node(
                node.domain,
                node.op_type,
                [mapping.get(v, v) if v is not None else None for v in node.inputs],
                node.attributes.values(),
                num_outputs=len(node.outputs),
                name=self.names.fresh(f"{node.name}_copy"),
            )
            for old, new in zip(node.outputs, copy.outputs, strict=True):
                new.name = self.names.fresh(f"{old.name}_copy")
                mapping[old] = new
            copies.append(copy)
        return copies, mapping

    def _node(self, op: str, inputs: list[ir.Value | None], outputs: int = 1, **attributes) -> ir.Node:
        node = ir.node(op, inputs, attributes=attributes, num_outputs=outputs, name=self.names.fresh(op))
        for value in node.outputs:
            value.name = self.names.fresh(f"{op}_out")
        return node

    def _constant(self, array: np.ndarray) -> ir.Value:
        name = self.names.fresh("c")
        value = ir.Value(name=name, const_value=ir.Tensor(array, name=name), shape=ir.Shape(array.shape))
        value.dtype = ir.DataType.from_numpy(array.dtype)
        self.graph.register_initializer(value)
        return value

    def _unsqueeze(self, anchor: ir.Node, value: ir.Value, axis: int) -> ir.Value:
        if self.opset < 13:
            node = self._node("Unsqueeze", [value], axes=[axis])
        else:
            node = self._node("Unsqueeze", [value, self._constant(np.array([axis]))])
        anchor.prepend(node)
        return node.outputs[0]

    def _insert(self, anchor, op, inputs, attributes, outer, squeeze: list[int] | None = None) -> None:
        node = self._node(op, inputs, len(outer), **attributes)
        anchor.prepend(node)
        for k, (output, (old, uses)) in enumerate(zip(node.outputs, outer, strict=True)):
            output.type = old.type
            result = output
            if squeeze is not None:
                axes = squeeze[k]
                last = (
                    self._node("Squeeze", [output], axes=[axes])
                    if self.opset < 13
                    else self._node("Squeeze", [output, self._constant(np.array([axes]))])
                )
                anchor.prepend(last)
                result = last.outputs[0]
                result.type = old.type
            for user, index in uses:
                user.replace_input_with(index, result)
