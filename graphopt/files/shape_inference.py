"""Shapes and types: inferred from scratch with onnx's shape inference, without ever copying a weight.

Weights above `SMALL` bytes are replaced by references before the model is serialised for the C++ inference; values that
shapes depend on (Reshape targets, Slice bounds, ...) are far smaller and take part in data propagation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import onnx_ir as ir

from graphopt.errors import ModelError
from graphopt.files.body_shapes import BodyInputs, repeat_constants
from graphopt.files.contrib_shapes import stand_in
from graphopt.files.integers import dimensions
from graphopt.files.node_shapes import Result, results
from graphopt.files.reshape_targets import as_read, is_open, known_operands, result_dims
from graphopt.files.weights import all_graphs, reference, with_placeholders
from graphopt.rewriting.edit import new_initializer
from graphopt.rewriting.names import Names

if TYPE_CHECKING:
    import onnx

SMALL = 4096
"""Tensors up to this many bytes take part in shape inference by value."""
ROUNDS = 5
"""Inferences after the first: what one result tells the next one follows in the next round."""


def infer_shapes(model: ir.Model) -> None:
    """Forget the shapes of all intermediate tensors and infer them again, in place.

    Named dimensions stay named; a dimension that nothing determines becomes unknown. What stands behind an operator
    that neither onnx nor `graphopt.files.contrib_shapes` knows stays without a shape. Declared types and shapes of
    graph inputs and outputs are kept, and refined where inference knows more.

    Raises:
        ModelError: the graph contradicts itself.
    """
    _infer_told(model)


def _infer_told(model: ir.Model) -> ir.Model:
    """Infer all shapes in place, and give the model without weights that inference saw in the end."""
    light = with_placeholders(model, _without_data, _without_data)
    repeat_constants(light, SMALL)
    for value in _intermediate_values(light):
        value.shape = None
        value.type = None
    _infer(model, light)
    names = Names(light)
    for _ in range(ROUNDS):
        if not _tell(model, light, names):
            break
        _infer(model, light)
    inputs = BodyInputs(model, light)
    for _ in range(ROUNDS):
        # What bodies suppose of their inputs may be taken back: no constants are made from it.
        told = _tell(model, light)
        if not (inputs.step() or told):
            break
        _infer(model, light)
    if inputs.open:
        inputs.withdraw()
        _infer(model, light)
    return light


def annotated(model: ir.Model) -> ir.Model:
    """A clone whose intermediate values have freshly inferred types and shapes, for a file or a runtime.

    Unlike after `infer_shapes`, unknown dimensions that are equal have one name ("unk__7"): that two tensors have the
    same shape is what fusions ask. Weights are shared, and what graphs declare of their outputs stays as it is. Where
    the graph contradicts itself nothing is known of its values: whether a model is valid is for `graphopt.model.check`
    to say.
    """
    clone = model.clone()
    try:
        _infer(clone, _infer_told(clone), invented=True)
    except ModelError:
        for value in _intermediate_values(clone):
            value.shape = None
            value.type = None
    for graph, original in zip(all_graphs(clone), all_graphs(model), strict=True):
        for value, declared in zip(graph.outputs, original.outputs, strict=True):
            value.shape = declared.shape
            value.type = declared.type
    return clone


def _tell(model: ir.Model, light: ir.Model, names: Names | None = None) -> bool:
    """Tell inference what is known of results that it left open; False if that is nothing new.

    Args:
        model: what is known so far.
        light: the model that inference sees, changed in place.
        names: of constants that take the place of known sizes; None: only shapes are told.
    """
    changed = False
    for node, twin in zip(model.graph.all_nodes(), light.graph.all_nodes(), strict=True):
        if not any(is_open(output) for output in node.outputs):
            continue
        for index, array in known_operands(node) if names is not None else ():
            operand, graph = twin.inputs[index], twin.graph
            if names is not None and operand is not None and operand.producer() is not None:
                assert isinstance(graph, ir.Graph)
                constant = new_initializer(graph, names.fresh(f"{operand.name}_known"), array, ir.DataType.INT64)
                twin.replace_input_with(index, constant)
                changed = True
        # What is supposed of bodies may be taken back: what follows from it is left to the whole inference.
        opset = model.opset_imports.get("", 0) if names is not None else 0
        for value, other, told in zip(node.outputs, twin.outputs, _results(node, opset), strict=True):
            shape = None if told is None else _completed(value, told[1])
            if told is not None and shape is not None and shape != value.shape:
                for each in (value, other):
                    each.type, each.shape = told[0], ir.Shape(shape)
                changed = True
    return changed


def _results(node: ir.Node, opset: int) -> list[Result | None]:
    """What is known of the results of a node by itself: of the first what we tell, else what onnx does (not at 0)."""
    found: list[Result | None] = results(node, opset) if opset else [None] * len(node.outputs)
    dims, source = _dims(node), node.inputs[0] if node.inputs else None
    kind = node.outputs[0].type or (source.type if source is not None else None)
    if dims is not None and kind is not None:
        made = found[0][1] if found[0] is not None and len(found[0][1]) == len(dims) else [None] * len(dims)
        found[0] = (kind, [other if one is None else one for one, other in zip(dims, made, strict=True)])
    return found


def _completed(value: ir.Value, dims: Sequence[int | str | None]) -> ir.Shape | None:
    """The shape of a value with what is told of it where it was open; None where that does not fit or is nothing."""
    known = dimensions(value) or [None] * len(dims)
    if len(known) != len(dims) or all(d is None for d in dims):
        return None
    return ir.Shape([one if one is not None else other for one, other in zip(known, dims, strict=True)])


def _dims(node: ir.Node) -> list[int | str | None] | None:
    """What its operands and its readers tell of the dimensions of a node's first result."""
    made, read = result_dims(node), as_read(node.outputs[0])
    if made is None or read is None or len(made) != len(read):
        return made if read is None else read if made is None else None
    return [other if one is None else one for one, other in zip(made, read, strict=True)]


def _infer(model: ir.Model, light: ir.Model, *, invented: bool = False) -> None:
    """Run onnx's inference on a model without weights and bring what it finds into the model.

    Args:
        model: what is annotated, in place.
        light: the same model without weights.
        invented: keep the names that onnx invents for unknown dimensions.
    """
    import onnx

    proto = ir.to_proto(light)
    stand_in(proto)
    try:
        inferred = onnx.shape_inference.infer_shapes(proto, check_type=False, strict_mode=False, data_prop=True)
    except Exception as error:
        # onnx raises several unrelated types here; all mean that the graph contradicts itself.
        reason = " ".join(str(error).split())
        raise ModelError(f"its shapes cannot be inferred ({reason[:300]})") from error
    for graph, light_graph in zip(all_graphs(model), all_graphs(light), strict=True):
        for value, light_value in zip(_produced(graph), _produced(light_graph), strict=True):
            if not value.is_graph_output() or graph is not model.graph:
                value.shape = light_value.shape
                value.type = light_value.type
    _copy_inferred(model, inferred, _Names(model, invented))


def _without_data(tensor: ir.TensorProtocol) -> ir.TensorProtocol | None:
    if tensor.dtype == ir.DataType.STRING:
        return None
    if tensor.nbytes > SMALL:
        return reference(tensor, "weights", 0)
    # A small external tensor takes part by value, so it is read.
    return ir.Tensor(tensor.numpy(), name=tensor.name) if isinstance(tensor, ir.ExternalTensor) else None


def _produced(graph: ir.Graph) -> Iterator[ir.Value]:
    for node in graph:
        yield from node.outputs


def _intermediate_values(model: ir.Model) -> Iterator[ir.Value]:
    """What inference must find out: every node output that the main graph does not declare."""
    for graph in all_graphs(model):
        for value in _produced(graph):
            if graph is not model.graph or not value.is_graph_output():
                yield value


class _Names:
    """Tells the dimension names of the model from the placeholders that onnx invents ("unk__7").

    Invented ones are no names of the user's and are numbered anew in every run: they become unknown dimensions.
    """

    def __init__(self, model: ir.Model, invented: bool) -> None:
        self._keep = invented
        declared = [*model.graph.inputs, *model.graph.outputs]
        self._own = {dim.value for v in declared for dim in v.shape or () if isinstance(dim, ir.SymbolicDim)}

    def cleaned(self, shape: ir.Shape) -> ir.Shape:
        return shape if self._keep else ir.Shape([None if self._invented(dim) else dim for dim in shape])

    def _invented(self, dim: int | ir.SymbolicDim) -> bool:
        if not isinstance(dim, ir.SymbolicDim) or dim.value in self._own:
            return False
        return dim.value is None or dim.value.startswith("unk__")


def _copy_inferred(model: ir.Model, proto: onnx.ModelProto, names: _Names) -> None:
    _copy_graph(model.graph, proto.graph, names)
    functions = {(f.domain, f.name, f.overload): f for f in proto.functions}
    for key, function in model.functions.items():
        if key in functions:
            _copy_infos(function.graph, functions[key].value_info, names)
            _copy_subgraphs(function.graph, functions[key].node, names)


def _copy_graph(graph: ir.Graph, proto: onnx.GraphProto, names: _Names) -> None:
    _copy_infos(graph, [*proto.value_info, *proto.output], names)
    _copy_subgraphs(graph, proto.node, names)


def _copy_subgraphs(graph: ir.Graph, nodes: Iterable[onnx.NodeProto], names: _Names) -> None:
    for node, node_proto in zip(graph, nodes, strict=True):
        for attribute in node_proto.attribute:
            ours = node.attributes.get(attribute.name)
            if ours is None or ours.is_ref():
                continue
            if attribute.type == attribute.GRAPH:
                _copy_graph(ours.as_graph(), attribute.g, names)
            elif attribute.type == attribute.GRAPHS:
                for subgraph, subproto in zip(ours.as_graphs(), attribute.graphs, strict=True):
                    _copy_graph(subgraph, subproto, names)


def _copy_infos(graph: ir.Graph, infos: Iterable[onnx.ValueInfoProto], names: _Names) -> None:
    values = {value.name: value for value in _produced(graph)}
    for info in infos:
        value = values.get(info.name)
        if value is None or not info.HasField("type"):
            continue
        kind = ir.serde.deserialize_type_proto_for_type(info.type)
        if kind is not None:
            value.type = kind
        shape = ir.serde.deserialize_type_proto_for_shape(info.type)
        if shape is not None:
            value.shape = names.cleaned(shape)
