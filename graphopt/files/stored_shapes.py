"""Which shapes of intermediate tensors a file tells: those that its readers do not find themselves.

A reader that knows the shapes of what a standard operator reads knows those of its results, so only such shapes need
to stand in the file as say more than onnx's inference of one node: sizes that a Reshape takes from a computed tensor,
results of operators of other domains, two unknown sizes that are equal. From the inputs on, node after node, a reader
arrives at all that was known when the file was written.

One run of onnx's inference tells it for all nodes of a graph: over a model of the same nodes in which each reads graph
inputs with the stored shapes and none the result of another.
"""

from __future__ import annotations

from collections import ChainMap, Counter
from collections.abc import Iterable, Iterator, MutableMapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx
    from google.protobuf.message import Message  # type: ignore[import-untyped]

    Scope = MutableMapping[str, Message]


SMALL = 4096
"""Tensors up to this many bytes are copied for inference; none of those that it reads is larger."""


def strip_value_info(proto: onnx.ModelProto) -> None:
    """Remove shapes of intermediate tensors from a message, in nested graphs and functions too."""
    for graph in _with_bodies(proto.graph):
        del graph.value_info[:]
    _strip_functions(proto)


def keep_needed(proto: onnx.ModelProto) -> None:
    """Of the shapes in a message, leave those that its readers do not find themselves, in nested graphs too.

    Neither those of constants, which say it themselves, nor anything in functions, whose bodies have other shapes at
    every call.
    """
    _strip_functions(proto)
    graphs = list(_with_bodies(proto.graph))
    for graph in graphs:
        results = {name for node in graph.node if node.op_type != "Constant" for name in node.output}
        _keep(graph, [v.name in results and v.type.tensor_type.HasField("shape") for v in graph.value_info])
    if any(graph.value_info for graph in graphs):
        _forget_lonely_names(graphs)
        _drop_found(proto)


def _with_bodies(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and every graph in attributes of its nodes; equal graphs give an equal order."""
    yield graph
    yield from _bodies(graph.node)


def _bodies(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.GraphProto]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _with_bodies(attribute.g)
            for body in attribute.graphs:
                yield from _with_bodies(body)


def _strip_functions(proto: onnx.ModelProto) -> None:
    for function in proto.functions:
        del function.value_info[:]
        for body in _bodies(function.node):
            del body.value_info[:]


def _keep(graph: onnx.GraphProto, kept: list[bool]) -> None:
    for index in reversed(range(len(kept))):
        if not kept[index]:
            del graph.value_info[index]


def _forget_lonely_names(graphs: list[onnx.GraphProto]) -> None:
    """Take away the name of an unknown size that occurs once: only that two sizes are equal is worth telling."""
    infos = [v for graph in graphs for v in (*graph.input, *graph.output, *graph.value_info)]
    count = Counter(d.dim_param for v in infos for d in v.type.tensor_type.shape.dim)
    for graph in graphs:
        for value in graph.value_info:
            for dim in value.type.tensor_type.shape.dim:
                if dim.dim_param and count[dim.dim_param] == 1:
                    dim.ClearField("dim_param")


def _drop_found(proto: onnx.ModelProto) -> None:
    kept = [(graph, _needed(proto, graph, outer)) for graph, outer in _scopes(proto.graph, {}) if graph.value_info]
    for graph, needed in kept:
        _keep(graph, needed)


def _scopes(graph: onnx.GraphProto, outer: Scope) -> Iterator[tuple[onnx.GraphProto, Scope]]:
    """A graph and all below it, each with what is known of the values around it."""
    yield graph, outer
    inside: Scope | None = None
    for node in graph.node:
        for attribute in node.attribute:
            for body in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                if inside is None:
                    inside = ChainMap(_known(graph), outer)
                yield from _scopes(body, inside)


def _known(graph: onnx.GraphProto) -> MutableMapping[str, Message]:
    """What is told of each value of a graph: its tensor, the Constant node that makes it, or type and shape."""
    known: MutableMapping[str, Message] = {v.name: v for v in (*graph.output, *graph.value_info, *graph.input)}
    known.update((tensor.name, tensor) for tensor in graph.initializer)
    known.update((node.output[0], node) for node in graph.node if node.op_type == "Constant" and node.output)
    return known


def _needed(proto: onnx.ModelProto, graph: onnx.GraphProto, outer: Scope) -> list[bool]:
    """For each stored shape of a graph, whether its readers do not find it."""
    import onnx

    cut, mark = _cut(proto, graph, outer)
    names = {d.dim_param for v in cut.graph.input for d in v.type.tensor_type.shape.dim}
    try:
        inferred = onnx.shape_inference.infer_shapes(cut, check_type=False, strict_mode=False, data_prop=False)
    except Exception:
        # onnx raises several unrelated types. It is a matter of size only: the file tells all then.
        return [True] * len(graph.value_info)
    found = {v.name: v for v in inferred.graph.value_info}
    others = [found.get(mark + value.name) for value in graph.value_info]
    pairs = zip(others, graph.value_info, strict=True)
    return [other is None or not _says(other, value, names) for other, value in pairs]


def _says(found: onnx.ValueInfoProto, stored: onnx.ValueInfoProto, names: set[str]) -> bool:
    """Whether what inference found is all that is stored; other names than `names` are its own inventions."""
    if found.type.tensor_type.elem_type != stored.type.tensor_type.elem_type:
        return False
    if not found.type.tensor_type.HasField("shape"):
        return False
    known, wanted = _dims(found), _dims(stored)
    if len(known) != len(wanted):
        return False
    return all(
        two is None or (one == two and (one in names or not isinstance(one, str)))
        for one, two in zip(known, wanted, strict=True)
    )


def _dims(info: onnx.ValueInfoProto) -> list[int | str | None]:
    return [d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in info.type.tensor_type.shape.dim]


def _cut(proto: onnx.ModelProto, graph: onnx.GraphProto, outer: Scope) -> tuple[onnx.ModelProto, str]:
    """A model of the nodes of a graph, each of which reads constants and graph inputs only, without large tensors.

    Returns:
        The model, and what stands before the name of each result in it.
    """
    import onnx

    known = ChainMap(_known(graph), outer)
    read = dict.fromkeys(_read(graph.node))
    # Longer than every name, so no result is called like something that is read.
    mark = "'" * (1 + max(map(len, read), default=0))
    cut = onnx.ModelProto(ir_version=proto.ir_version, opset_import=proto.opset_import)
    for name in read:
        match known.get(name):
            case onnx.NodeProto() as node:
                _copy_node(node, cut.graph.node.add())
            case onnx.TensorProto() as tensor:
                _copy_tensor(tensor, cut.graph.initializer.add())
            case onnx.ValueInfoProto() as value:
                cut.graph.input.append(value)
    for node in graph.node:
        if node.op_type != "Constant":
            copy = cut.graph.node.add()
            _copy_node(node, copy)
            for index, name in enumerate(copy.output):
                if name:
                    copy.output[index] = mark + name
    return cut, mark


def _read(nodes: Iterable[onnx.NodeProto]) -> Iterator[str]:
    """Names that nodes and the bodies in them read, in an order that only depends on them."""
    for node in nodes:
        yield from node.input
    for body in _bodies(nodes):
        for node in body.node:
            yield from node.input
        for value in body.output:
            yield value.name


def _copy_node(node: onnx.NodeProto, copy: onnx.NodeProto) -> None:
    copy.op_type, copy.domain = node.op_type, node.domain
    copy.input.extend(node.input)
    copy.output.extend(node.output)
    for attribute in node.attribute:
        _copy_attribute(attribute, copy.attribute.add())


def _copy_attribute(attribute: onnx.AttributeProto, copy: onnx.AttributeProto) -> None:
    if not (attribute.HasField("g") or attribute.HasField("t") or attribute.graphs or attribute.tensors):
        copy.CopyFrom(attribute)
        return
    copy.name, copy.type = attribute.name, attribute.type
    if attribute.HasField("g"):
        _copy_body(attribute.g, copy.g)
    for body in attribute.graphs:
        _copy_body(body, copy.graphs.add())
    if attribute.HasField("t"):
        _copy_tensor(attribute.t, copy.t)
    for tensor in attribute.tensors:
        _copy_tensor(tensor, copy.tensors.add())


def _copy_body(body: onnx.GraphProto, copy: onnx.GraphProto) -> None:
    copy.name = body.name
    copy.input.extend(body.input)
    copy.output.extend(body.output)
    for tensor in body.initializer:
        _copy_tensor(tensor, copy.initializer.add())
    for node in body.node:
        _copy_node(node, copy.node.add())


def _copy_tensor(tensor: onnx.TensorProto, copy: onnx.TensorProto) -> None:
    import onnx

    if tensor.ByteSize() <= SMALL:
        copy.CopyFrom(tensor)
        return
    copy.name, copy.data_type, copy.data_location = tensor.name, tensor.data_type, onnx.TensorProto.EXTERNAL
    copy.dims.extend(tensor.dims)
