"""float16 and bfloat16: weights and activations in half the bytes, what does not fit in float32 with the reason.

Three steps. Which nodes stay in float32 (`keep`). Which values become half: what a node that does not stay gives,
by its schema (`types`), and what If, Loop and Scan carry. Then every edge whose ends differ gets a Cast, one for
each tensor, and constants are stored in the type that is read. So no Cast is ever undone by the next one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from graphopt.base import Skip
from graphopt.quantization.half.keep import Keep, keep
from graphopt.quantization.half.rules import BOUNDS, clipped, is_mask
from graphopt.quantization.half.types import CONTROL_FLOW, Signature, control_admits, is_float32
from graphopt.rewriting.constants import array
from graphopt.rewriting.edit import bypass, drop_if_unused, new_initializer, remove_node
from graphopt.rewriting.names import Names
from graphopt.rewriting.nodes import is_onnx, label
from graphopt.rewriting.prepare import prepare
from graphopt.rewriting.scopes import bodies, graphs

TYPES = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
LARGEST = {
    ir.DataType.FLOAT16: float(np.finfo(np.float16).max),
    ir.DataType.BFLOAT16: float.fromhex("0x1.fep127"),
}
MIN_OPSET = {ir.DataType.FLOAT16: 7, ir.DataType.BFLOAT16: 22}
"""Convolutions, poolings and recurrent layers admit bfloat16 from opset 22 on."""

LINEAR = ("QuantizeLinear", "DequantizeLinear")
HALF_LINEAR_OPSET = 19
"""From this opset on they read and write float16 and bfloat16."""

Carried = tuple[int | None, ir.Value | None, list[ir.Value], list[ir.Value]]
"""One thing that goes through an If, Loop or Scan: input index, output, inputs of the body, outputs of the bodies."""


@dataclass
class Converted:
    """What the conversion did.

    Attributes:
        nodes: how many nodes compute in half.
        casts: how many Casts it took.
        kept: nodes that stay in float32, and why.
        notes: sentences for the report.
    """

    nodes: int = 0
    casts: int = 0
    kept: list[Skip] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def to_half(
    model: ir.Model,
    dtype: ir.DataType,
    *,
    keep_io: bool = True,
    exclude: Collection[str] = (),
    float_ops: Collection[str] = (),
    largest: Mapping[str, float] | None = None,
    quantised: bool = False,
) -> Converted:
    """Convert the float32 part of a model, in place: main graph, bodies of If, Loop and Scan, functions (inlined).

    Args:
        model: what the schemas do not admit to be half stays as it is, and so does what is quantised already.
        dtype: FLOAT16 or BFLOAT16.
        keep_io: inputs and outputs stay float32, with a Cast at the border.
        exclude: globs over node names that stay in float32.
        float_ops: operators without a kernel of this type on the target.
        largest: largest magnitude of tensors of the main graph on calibration data; None: not measured.
        quantised: Q and DQ read and write the half type, too (`graphopt.target.HalfTypes.quantised`).

    Raises:
        ModelError: the model contradicts itself.
    """
    from graphopt.files.opset import raise_opset
    from graphopt.files.shape_inference import infer_shapes

    done = Converted(notes=prepare(model))
    least = MIN_OPSET[dtype]
    quantised = quantised and any(is_onnx(node, *LINEAR) for graph in graphs(model) for node in graph)
    if quantised:
        least = max(least, HALF_LINEAR_OPSET)
    if (note := raise_opset(model, least, dtype.name.lower())) is not None:
        done.notes.append(note)
    infer_shapes(model)
    kept = keep(
        model, dtype, LARGEST[dtype], exclude=exclude, float_ops=float_ops, measured=largest, quantised=quantised
    )
    _Conversion(model, dtype, kept, keep_io, done, quantised=quantised).run()
    infer_shapes(model)
    done.kept = [Skip(label(node), reason) for node, reason in kept.reasons.items()]
    if largest is None:
        done.notes.append(
            f"no calibration data: whether activations stay below {LARGEST[dtype]:.5g}, where {dtype.name.lower()} "
            "ends, was not checked"
        )
    return done


class _Conversion:
    """One run: the values that become half, and the edges between them and what stays."""

    def __init__(
        self, model: ir.Model, dtype: ir.DataType, kept: Keep, keep_io: bool, done: Converted, *, quantised: bool
    ) -> None:
        self._quantised = quantised
        self._scales: dict[ir.Node, ir.Value | None] = {}
        self._model, self._dtype, self._kept, self._keep_io, self._done = model, dtype, kept, keep_io, done
        self._names = Names(model)
        self._half: set[ir.Value] = set()
        self._casts: dict[tuple[ir.Value, bool], ir.Value] = {}
        self._constants: dict[tuple[ir.Value, bool, bool], ir.Value] = {}
        self._handed: dict[ir.Node, list[Carried]] = {}
        self._masks = self._lost = 0

    def run(self) -> None:
        order = list(graphs(self._model))
        nodes = [node for graph in order for node in graph]
        for graph in order:
            self._decide(graph)
        for node in nodes:
            self._connect(node)
        if not self._keep_io:
            for value in self._model.graph.inputs:
                if value in self._half:
                    value.type = ir.TensorType(self._dtype)
        self._give_out()
        for value in self._half:
            value.type = ir.TensorType(self._dtype)
        self._tidy(nodes)
        self._tell()

    # -- which values ----------------------------------------------------------------------------------------------

    def _decide(self, graph: ir.Graph) -> None:
        if graph is self._model.graph and not self._keep_io:
            self._half.update(v for v in graph.inputs if is_float32(v) and not v.is_initializer())
        for node in graph:
            if node in self._kept.reasons or is_onnx(node, "Constant"):
                continue
            if is_onnx(node, *CONTROL_FLOW):
                self._handed[node] = list(self._carried(node))
                for _, value, inner, _ in self._handed[node]:
                    self._half.update(v for v in (value, *inner) if v is not None)
                continue
            signature = self._kept.signatures.get(node)
            if signature is not None:
                self._half.update(
                    v for v, g in zip(node.outputs, signature.outputs, strict=True) if g and is_float32(v)
                )

    def _carried(self, node: ir.Node) -> Iterator[Carried]:
        """What a node with bodies hands on in half."""
        if not control_admits(node, self._model.opset_imports, self._dtype):
            return
        for item in carried(node):
            index, value, inner, given = item
            first = [] if index is None else [node.inputs[index]]
            if all(is_float32(v) for v in (*first, *inner, *given, *([] if value is None else [value]))):
                yield item

    # -- edges -----------------------------------------------------------------------------------------------------

    def _connect(self, node: ir.Node) -> None:
        """Let the node read each input in the type that it takes."""
        if is_onnx(node, "Constant"):
            return
        if is_onnx(node, *CONTROL_FLOW):
            self._connect_bodies(node)
            return
        if self._quantised and is_onnx(node, "QuantizeLinear") and node not in self._kept.reasons:
            self._connect_quantiser(node)
            return
        if self._quantised and is_onnx(node, "DequantizeLinear"):
            self._scales[node] = node.inputs[1]
        signature = None if node in self._kept.reasons else self._kept.signatures.get(node)
        computes = False
        for index, value in enumerate(node.inputs):
            if value is None or not is_float32(value):
                continue
            if signature is not None and signature.free[index] and node not in self._scales:
                continue
            wanted = signature is not None and signature.inputs[index]
            computes |= wanted
            node.replace_input_with(index, self._as(value, wanted, node))
        if signature is not None:
            self._retype(node, signature)
            self._done.nodes += computes or any(v in self._half for v in node.outputs)

    def _connect_quantiser(self, node: ir.Node) -> None:
        """Q takes its input as it comes, with a scale of the same type: a Cast before it would round once more."""
        value, scale = node.inputs[0], node.inputs[1]
        if value is None or scale is None:
            return
        half = value in self._half
        data = array(value)
        if data is not None:  # a constant comes in the type of its scale
            half = True
            node.replace_input_with(0, self._as(value, half, node))
        node.replace_input_with(1, self._as(scale, half, node))
        self._done.nodes += half

    def _connect_bodies(self, node: ir.Node) -> None:
        handed = self._handed.get(node, [])
        read = {index for index, *_ in handed}
        given = {value for *_, values in handed for value in values}
        for index, value in enumerate(node.inputs):
            if value is not None and is_float32(value):
                node.replace_input_with(index, self._as(value, index in read, node))
        for body in bodies(node):
            for position, value in enumerate(body.outputs):
                if is_float32(value):
                    body.outputs[position] = self._as(value, value in given, None, body)

    def _as(self, value: ir.Value, half: bool, reader: ir.Node | None, body: ir.Graph | None = None) -> ir.Value:
        """The value in the wanted type: itself, its Cast, or another constant."""
        data = array(value)
        if data is not None:
            bound = reader is not None and is_onnx(reader, *BOUNDS)
            made = self._constant(value, data, half, bound)
            # What a body gives out must be a value of the body.
            return made if body is None else self._cast_in(body, made, half)
        if half == (value in self._half):
            return value
        key = (value, half)
        producer = value.producer()
        if self._quantised and body is None and not half and producer is not None and is_onnx(producer, LINEAR[1]):
            if key not in self._casts:
                self._casts[key] = self._twin(producer)
            return self._casts[key]
        if key not in self._casts or (body is not None and value.graph is not body):
            cast = self._cast_in(body, value, half) if body is not None and value.graph is not body else None
            if cast is not None:
                return cast
            self._casts[key] = self._cast(value, half)
        return self._casts[key]

    def _cast_node(self, value: ir.Value, half: bool) -> ir.Node:
        kind = self._dtype if half else ir.DataType.FLOAT
        output = ir.Value(
            name=self._names.fresh(f"{value.name}_{kind.name.lower()}"), type=ir.TensorType(kind), shape=value.shape
        )
        self._done.casts += 1
        return ir.node(
            "Cast", [value], {"to": int(kind)}, outputs=[output], name=self._names.fresh(f"{output.name}_Cast")
        )

    def _twin(self, node: ir.Node) -> ir.Value:
        """The same DequantizeLinear, giving float32 to those who read that."""
        value, graph = node.outputs[0], node.graph
        assert isinstance(graph, ir.Graph)
        output = ir.Value(
            name=self._names.fresh(f"{value.name}_float"), type=ir.TensorType(ir.DataType.FLOAT), shape=value.shape
        )
        made = ir.node(
            node.op_type, [node.inputs[0], self._scales[node], *node.inputs[2:]],
            {k: a.value for k, a in node.attributes.items() if k != "output_dtype"},
            outputs=[output], name=self._names.fresh(f"{output.name}_{node.op_type}"),
        )  # fmt: skip
        graph.insert_after(node, made)
        return output

    def _cast(self, value: ir.Value, half: bool) -> ir.Value:
        """A Cast right behind what makes the value."""
        node = self._cast_node(value, half)
        producer, graph = value.producer(), value.graph
        assert isinstance(graph, ir.Graph)
        if producer is not None:
            graph.insert_after(producer, node)
        elif len(graph):
            graph.insert_before(graph[0], node)
        else:
            graph.append(node)
        return node.outputs[0]

    def _cast_in(self, body: ir.Graph, value: ir.Value, half: bool) -> ir.Value:
        """A Cast at the end of a body, of a value that comes from outside it; itself where its type is right."""
        if value.graph is body and value.dtype == (self._dtype if half else ir.DataType.FLOAT):
            return value
        node = self._cast_node(value, half)
        body.append(node)
        return node.outputs[0]

    # -- constants -------------------------------------------------------------------------------------------------

    def _constant(self, value: ir.Value, data: NDArray[np.float32], half: bool, bound: bool) -> ir.Value:
        """A constant in the wanted type, masks brought into the range of the half type."""
        largest = LARGEST[self._dtype]
        masked = is_mask(data, largest)
        key = (value, half, bound and masked)
        if key in self._constants:
            return self._constants[key]
        if masked:
            given, data = data, clipped(data, largest, bound=bound)
            if not half and np.array_equal(data, given):
                return value
            self._masks += 1
        elif not half:
            return value
        kind = self._dtype if half else ir.DataType.FLOAT
        graph = value.graph
        assert isinstance(graph, ir.Graph)
        made = new_initializer(graph, self._names.fresh(f"{value.name}_{kind.name.lower()}"), data, kind)
        made.metadata_props.update(value.metadata_props)
        self._lost += int(np.count_nonzero((data != 0) & (np.asarray(array(made)) == 0))) if half else 0
        self._constants[key] = made
        return made

    def _retype(self, node: ir.Node, signature: Signature) -> None:
        """Let the attribute that gives a result its type give the half type."""
        if signature.attribute is None or not any(v in self._half for v in node.outputs):
            return
        if node in self._scales:  # the type of its scale says it already
            node.attributes.pop(signature.attribute, None)
            return
        if signature.attribute != "value":
            node.attributes[signature.attribute] = ir.AttrInt64(signature.attribute, int(self._dtype))
            return
        filler = node.attributes.get_tensor("value")
        data = np.zeros(1, np.float32) if filler is None else np.asarray(filler.numpy(), np.float32)
        if is_mask(data, LARGEST[self._dtype]):
            data = clipped(data, LARGEST[self._dtype], bound=False)
            self._masks += 1
        node.attributes["value"] = ir.AttrTensor(
            "value", ir.Tensor(data.astype(self._dtype.numpy()), dtype=self._dtype)
        )

    # -- the border, and what is left over -------------------------------------------------------------------------

    def _give_out(self) -> None:
        """Give graph outputs the wanted type; they keep their names."""
        outputs = self._model.graph.outputs
        for position, value in enumerate(outputs):
            if not is_float32(value):
                continue
            made = self._as(value, not self._keep_io, None)
            if made is value:
                continue
            name = value.name
            if made.is_graph_output() or made.producer() is None:
                made = self._cast_in(self._model.graph, made, not self._keep_io)
            outputs[position] = made
            if not any(v is value for v in outputs):
                value.name = self._names.fresh(f"{name}_inner")
                if value.const_value is not None:
                    value.const_value.name = value.name
            made.name = name

    def _tidy(self, nodes: list[ir.Node]) -> None:
        """Casts to the type that is there already go; constants in one type only keep their name."""
        for node in nodes:
            if node in self._scales and not node.outputs[0].uses() and not node.outputs[0].is_graph_output():
                remove_node(node)  # all its readers stay in float32 and have its twin
                continue
            source = node.inputs[0] if is_onnx(node, "Cast") and node.graph is not None else None
            if source is not None and node.attributes.get_int("to", 0) == int(source.dtype or 0):
                bypass(node, source)
        for (value, *_), made in self._constants.items():
            name, graph = str(value.name), made.graph
            if value.uses() or value.is_graph_output() or made.const_value is None or not isinstance(graph, ir.Graph):
                continue
            drop_if_unused(value)
            if name not in graph.initializers:
                graph.initializers.pop(str(made.name))
                made.name = made.const_value.name = name
                graph.register_initializer(made)

    def _tell(self) -> None:
        kind = self._dtype.name.lower()
        if self._masks:
            self._done.notes.append(
                f"{self._masks} constants that stand for infinity, such as attention masks, were brought into the "
                f"range of {kind}"
            )
        if self._lost:
            self._done.notes.append(
                f"warning: {self._lost} numbers of weights are below the smallest one of {kind} and became 0"
            )


def carried(node: ir.Node) -> Iterator[Carried]:
    """What goes through an If, Loop or Scan; all values of one item have one type."""
    inside = list(bodies(node))
    if is_onnx(node, "If"):
        for index, value in enumerate(node.outputs):
            yield None, value, [], [body.outputs[index] for body in inside]
        return
    (body,) = inside
    # A Loop hands its body the number of the iteration and the condition first, and gets the condition back.
    loop = is_onnx(node, "Loop")
    before, after = (2, 1) if loop else (0, 0)
    scanned = 0 if loop else node.attributes.get_int("num_scan_inputs", 0) or 0
    states = len(body.inputs) - before - scanned
    for i, value in enumerate(node.outputs):
        state = i < states
        yield (
            before + i if state else None,
            value,
            [body.inputs[before + i]] if state else [],
            [body.outputs[after + i]],
        )
    for i in range(states, states + scanned):
        yield i, None, [body.inputs[i]], []
