"""The shapes of one node's results, from what is known of its operands by now.

onnx infers a whole graph at once. Where one result had to be told, all that stands behind it would have to wait for
another run, and deep networks have such a place in every block.
"""

from __future__ import annotations

import onnx_ir as ir

from graphopt.files.integers import integers

Result = tuple[ir.TypeProtocol, list[int | str | None]]
"""Type and dimensions."""


class Contradiction(Exception):
    """The operands of a node do not fit together: where it is computed, it fails."""


def results(node: ir.Node, opset: int) -> list[Result | None]:
    """What onnx infers for the results of a node of the standard domain; None for one of which it tells no shape.

    Args:
        node: the node; operands without a type tell nothing, and neither do operands that do not fit.
        opset: version of the standard operator set.
    """
    try:
        return fitting_results(node, opset)
    except Contradiction:
        return [None] * len(node.outputs)  # for the inference of the whole graph to say


def fitting_results(node: ir.Node, opset: int) -> list[Result | None]:
    """The same as `results`.

    Raises:
        Contradiction: its operands do not fit together.
    """
    import onnx

    unknown: list[Result | None] = [None] * len(node.outputs)
    if node.domain not in {"", "ai.onnx"} or any(_is_graph(attribute) for attribute in node.attributes.values()):
        return unknown
    types, data = {}, {}
    for value in node.inputs:
        if value is None or not value.name:
            continue
        if value.type is None or value.shape is None:
            return unknown
        types[value.name] = ir.serde.serialize_value(value).type
        numbers = integers(value) if value.dtype == ir.DataType.INT64 and len(value.shape) < 2 else None
        if numbers is not None:
            data[value.name] = ir.serde.serialize_tensor(ir.tensor(numbers, name=value.name))
    try:
        schema = onnx.defs.get_schema(node.op_type, opset, "")
        inferred = onnx.shape_inference.infer_node_outputs(schema, ir.to_proto(node), types, data)
    except onnx.shape_inference.InferenceError as error:
        raise Contradiction(" ".join(str(error).split())) from error
    except (onnx.defs.SchemaError, onnx.checker.ValidationError, RuntimeError):
        return unknown  # an operator that onnx does not know
    return [_told(inferred.get(value.name or "")) for value in node.outputs]


def _told(proto: object) -> Result | None:
    import onnx

    if not isinstance(proto, onnx.TypeProto):
        return None
    kind, shape = ir.serde.deserialize_type_proto_for_type(proto), ir.serde.deserialize_type_proto_for_shape(proto)
    return None if kind is None or shape is None else (kind, [d if isinstance(d, int) else d.value for d in shape])


def _is_graph(attribute: ir.Attr) -> bool:
    return attribute.is_ref() or attribute.type in {ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS}
