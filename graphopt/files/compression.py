"""Weights with many zeros, stored as values and positions, and brought back when the model is loaded.

In the file a call of a function of `graphopt.files.unpacking` stands for the weight, under the weight's own name, so
that any ONNX runtime reads the file. `decompress` is the exact inverse of `compress`: names, order, types and every bit
of every weight are what they were.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.errors import ModelError
from graphopt.files import unpacking
from graphopt.files.opset import opset_of
from graphopt.files.stored import Storage, StoredTensor
from graphopt.files.weights import model_tensors
from graphopt.numerics.packing import LARGEST_GROUP, Array, Choice, Form, Groups, Mask, choose, pack, unpack
from graphopt.rewriting.names import Names

LEAST_SAVING = 4096
"""Bytes that a weight must save: more than what a call and its function add to a file."""
LEAST_SHARE = 0.1
"""Share of its bytes that a weight must save: to unpack it costs time whenever the model is loaded."""

IR_VERSION = "graphopt.ir_version"
"""Key in the model's metadata: the IR version before functions needed a newer one."""
STORAGE = "graphopt.storage"
"""Key in `model.meta`: how the weights of the file were stored, a `Storage`."""

_TYPES = {
    *(ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16),
    *(ir.DataType.INT8, ir.DataType.INT16, ir.DataType.INT32, ir.DataType.INT64),
    *(ir.DataType.UINT8, ir.DataType.UINT16, ir.DataType.UINT32, ir.DataType.UINT64),
}
"""Types that ONNX Runtime unpacks."""


def compress(model: ir.Model) -> Storage:
    """Put calls of unpacking functions in the place of weights that become smaller by it, in place.

    What is stored is computed anew whenever it is read, one weight at a time.

    Args:
        model: a clone of its own; weights may be shared with others.
    """
    before = _bytes(model)
    kept: Counter[str] = Counter()
    opset = opset_of(model)
    if opset < unpacking.OPSET_MIN:
        note = f"opset {opset} cannot take bits apart, {unpacking.OPSET_MIN} can: export the model with a newer one"
        return Storage(before, before, notes=[note])
    chosen: dict[str, Choice] = {}
    for value in model.graph.initializers.values():
        assert value.name
        found = _choice(value)
        if isinstance(found, Choice):
            chosen[value.name] = found
        else:
            kept[found] += 1
    if not chosen:
        note = f"none has enough equal elements (at least {LEAST_SHARE:.0%} and {LEAST_SAVING} bytes must be saved)"
        return Storage(before, before, kept=dict(kept), notes=[note])
    names, calls, rows = Names(model), [], []
    everything = list(model.graph.initializers.values())
    model.graph.initializers.clear()
    for value in everything:
        choice = chosen.get(value.name or "")
        if choice is None:
            model.graph.register_initializer(value)
            continue
        rows.append(_row(value, choice))
        call, parts = _call(value, choice, names)
        calls.append(call)
        for part in parts:
            model.graph.register_initializer(part)
    model.graph.insert_before(model.graph[0], calls)
    for name in sorted({call.op_type for call in calls}):
        made = unpacking.function(name, opset)
        model.functions[made.identifier()] = made
    model.opset_imports[unpacking.DOMAIN] = unpacking.VERSION
    return Storage(before, _bytes(model), rows, dict(kept), _raise_ir(model))


def _bytes(model: ir.Model) -> int:
    return sum({id(t): t.nbytes for _, t in model_tensors(model) if t.dtype != ir.DataType.STRING}.values())


def _choice(value: ir.Value) -> Choice | str:
    """How a weight is stored, or why it stays as it is."""
    tensor = value.const_value
    assert tensor is not None
    if value.is_graph_input():
        return "callers may override it"
    if value.is_graph_output():
        return "it is an output"
    if tensor.dtype not in _TYPES:
        return f"runtimes do not unpack {tensor.dtype.name.lower()}"
    if tensor.nbytes <= LEAST_SAVING:
        return "it is small"
    return choose(tensor.numpy(), LEAST_SAVING, LEAST_SHARE) or "too few of its elements are equal"


def _row(value: ir.Value, choice: Choice) -> StoredTensor:
    tensor = value.const_value
    assert tensor is not None
    return StoredTensor(
        name=value.name or "",
        dtype=tensor.dtype.numpy().name,
        shape=list(tensor.shape.numpy()),
        form=str(choice.form),
        before=tensor.nbytes,
        after=choice.nbytes,
        share=choice.nbytes / tensor.nbytes,
        share_of_float16=choice.nbytes / (2 * tensor.size),
    )


def _call(value: ir.Value, choice: Choice, names: Names) -> tuple[ir.Node, list[ir.Value]]:
    """The call that gives a weight, and the initializers that it reads."""
    tensor, form = value.const_value, choice.form
    assert tensor is not None
    shape = tuple(int(d) for d in tensor.shape.numpy())
    if isinstance(form, Groups):
        op, count = f"Groups{form.bits}", int(np.prod(form.stored_shape(shape), dtype=np.int64))
        layout, coded = form.stored_shape(shape), -(-count * form.bits // 8)
        attributes = _group_attributes(form, shape, choice.fill, tensor.dtype)
    else:
        op, count = "Mask", tensor.size
        layout, coded, attributes = (1 + choice.count,), -(-count // 8), {}
    values = _part(
        names.fresh(f"{value.name}.values"), lambda: pack(tensor.numpy(), choice)[0], tensor.dtype, layout, tensor
    )
    places = _part(
        names.fresh(f"{value.name}.places"), lambda: pack(tensor.numpy(), choice)[1], ir.DataType.UINT8, (coded,), None
    )
    own = {"count": [count], "shape": list(shape), **attributes}
    node = ir.node(op, [values, places], own, domain=unpacking.DOMAIN, name=names.fresh(f"{value.name}.unpack"))
    dense = node.outputs[0]
    value.replace_all_uses_with(dense)
    dense.name, dense.type, dense.shape = value.name, ir.TensorType(tensor.dtype), ir.Shape(shape)
    return node, [values, places]


def _group_attributes(form: Groups, shape: tuple[int, ...], fill: Any, dtype: ir.DataType) -> dict[str, Any]:
    along = [1] * len(shape)
    along[form.axis] = -1
    return {
        "axis": form.axis,
        "keep": form.keep,
        "of": form.of,
        "kept": form.kept(shape[form.axis]),
        "along": along,
        "fill": ir.Tensor(np.asarray(fill).reshape(1), dtype=dtype),
    }


def _part(
    name: str, make: Callable[[], Array], dtype: ir.DataType, shape: tuple[int, ...], of: ir.TensorProtocol | None
) -> ir.Value:
    """An initializer that is computed when it is written; it keeps what is noted about the weight."""
    tensor = ir.LazyTensor(
        lambda: ir.Tensor(make(), dtype=dtype),
        dtype=dtype,
        shape=ir.Shape(shape),
        name=name,
        doc_string=of.doc_string if of is not None else None,
        metadata_props=dict(of.metadata_props) if of is not None else None,
    )
    return ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(dtype), const_value=tensor)


def _raise_ir(model: ir.Model) -> list[str]:
    old = model.ir_version
    if old >= unpacking.IR_MIN:
        return []
    model.metadata_props[IR_VERSION] = str(old)
    model.ir_version = unpacking.IR_MIN
    return [f"IR version {old} -> {unpacking.IR_MIN} in the file: functions need it"]


# -- back ------------------------------------------------------------------------------------------------------------


def decompress(model: ir.Model) -> None:
    """Put weights in the place of the calls of unpacking functions, in place; `model.meta` tells how they were stored.

    Raises:
        ModelError: a call or a function is not as `compress` writes it, or its positions and sizes contradict it.
    """
    functions = [key for key in model.functions if key[0] == unpacking.DOMAIN]
    calls = [node for node in model.graph.all_nodes() if node.domain == unpacking.DOMAIN]
    if not functions and not calls:
        return
    for key in functions:
        if not unpacking.is_ours(model.functions[key], opset_of(model)):
            raise ModelError(
                "it is not the function that this version of graphopt writes",
                where=f"function {key[0]}::{key[1]}",
                hint="save the model in full with the version that wrote it",
            )
    stored = _bytes(model)
    weights = {call: _weight(call, model) for call in calls}
    rows = [row for row, _ in weights.values()]
    first = {call.inputs[0]: (call, value) for call, (_, value) in weights.items()}
    dropped = {call.inputs[1] for call in calls}
    everything = list(model.graph.initializers.values())
    model.graph.initializers.clear()
    for value in everything:
        if value in first:
            call, weight = first[value]
            call.outputs[0].replace_all_uses_with(weight)
            model.graph.register_initializer(weight)
        elif value not in dropped:
            model.graph.register_initializer(value)
    model.graph.remove(calls, safe=True)
    for key in functions:
        del model.functions[key]
    model.opset_imports.pop(unpacking.DOMAIN, None)
    _restore_ir(model)
    model.meta[STORAGE] = Storage(_bytes(model), stored, rows)


def _weight(call: ir.Node, model: ir.Model) -> tuple[StoredTensor, ir.Value]:
    """The weight that a call gives."""
    where = f"node {call.name or call.outputs[0].name} ({call.op_type})"
    if call.op_identifier() not in model.functions or call.graph is not model.graph:
        raise ModelError("it unpacks no weight of the graph", where=where)
    if len(call.inputs) != 2 or len(call.outputs) != 1 or call.outputs[0].is_graph_output():
        raise ModelError("it does not unpack one weight of two parts", where=where)
    values, places = (_stored(operand, where) for operand in call.inputs)
    if values.dtype not in _TYPES or places.dtype != ir.DataType.UINT8:
        raise ModelError(f"it reads {values.dtype.name} values and {places.dtype.name} positions", where=where)
    shape = tuple(_ints(call, "shape", where))
    form, fill = _form(call, shape, values.dtype, where)
    packed = places.numpy()
    try:
        array = unpack(values.numpy(), packed, form, shape, fill)
    except ValueError as error:
        raise ModelError(str(error), where=where, hint="the file is damaged; copy or export it again") from error
    count = array.size if isinstance(form, Mask) else values.size
    if _ints(call, "count", where) != [count]:
        raise ModelError(f"its count is {_ints(call, 'count', where)}, not {count}", where=where)
    name = call.outputs[0].name
    tensor = ir.Tensor(
        array,
        dtype=values.dtype,
        name=name,
        doc_string=values.doc_string,
        metadata_props=dict(values.metadata_props),
    )
    weight = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(values.dtype), const_value=tensor)
    choice = Choice(form, fill, 0, values.nbytes + places.nbytes)
    return _row(weight, choice), weight


def _stored(operand: ir.Value | None, where: str) -> ir.TensorProtocol:
    if operand is None or operand.const_value is None or not operand.is_initializer() or operand.is_graph_input():
        raise ModelError("it does not read constants", where=where)
    if len(operand.uses()) != 1 or operand.is_graph_output():
        raise ModelError(f"{operand.name!r} is read by others, too", where=where)
    return operand.const_value


def _form(call: ir.Node, shape: tuple[int, ...], dtype: ir.DataType, where: str) -> tuple[Form, Any]:
    """Where values stand, and what stands everywhere else; every attribute must be as `compress` writes it."""
    if call.op_type == "Mask":
        given = {"count", "shape"}
        found: tuple[Form, Any] = (Mask(), None)
    else:
        axis, keep, of = (_int(call, name, where) for name in ("axis", "keep", "of"))
        if not (0 <= axis < len(shape) and 0 < keep < of <= LARGEST_GROUP and min(shape) > 0):
            raise ModelError(f"{keep}:{of} along axis {axis} is no pattern of shape {list(shape)}", where=where)
        form, fill = Groups(keep, of, axis), _fill(call, dtype, where)
        expected = _group_attributes(form, shape, fill, dtype)
        given = {"count", "shape", *expected}
        same = _int(call, "kept", where) == expected["kept"] and _ints(call, "along", where) == expected["along"]
        if not same or f"Groups{form.bits}" != call.op_type:
            raise ModelError(f"its attributes are not those of {form} of shape {list(shape)}", where=where)
        found = form, fill
    if set(call.attributes) != given:
        raise ModelError(f"its attributes are {', '.join(sorted(call.attributes))}", where=where)
    return found


def _fill(call: ir.Node, dtype: ir.DataType, where: str) -> Any:
    attribute = call.attributes.get("fill")
    if attribute is None or attribute.is_ref() or attribute.type != ir.AttributeType.TENSOR:
        raise ModelError("its filler is no tensor", where=where)
    tensor = attribute.as_tensor()
    if tensor.dtype != dtype or tensor.shape.numpy() != (1,):
        raise ModelError("its filler is not one element of the type of its values", where=where)
    return tensor.numpy()[0]


def _int(call: ir.Node, name: str, where: str) -> int:
    attribute = call.attributes.get(name)
    if attribute is None or attribute.is_ref() or attribute.type != ir.AttributeType.INT:
        raise ModelError(f"its attribute {name} is no integer", where=where)
    return int(attribute.as_int())


def _ints(call: ir.Node, name: str, where: str) -> list[int]:
    attribute = call.attributes.get(name)
    if attribute is None or attribute.is_ref() or attribute.type != ir.AttributeType.INTS:
        raise ModelError(f"its attribute {name} is no list of integers", where=where)
    return [int(number) for number in attribute.as_ints()]


def _restore_ir(model: ir.Model) -> None:
    text = model.metadata_props.pop(IR_VERSION, None)
    if text is None:
        return
    if text not in {str(version) for version in range(3, unpacking.IR_MIN)}:
        raise ModelError(f"metadata {IR_VERSION} is {text[:40]!r}, not an older IR version")
    model.ir_version = int(text)


def storage_of(model: ir.Model) -> Storage | None:
    """How the weights were stored in the file that the model was loaded from; None where in full."""
    found = model.meta.get(STORAGE)
    return found if isinstance(found, Storage) else None
