"""Rules that recognise a node as the identity: one function an operator family.

A rule takes the node and the opset and returns the value that the node's first output always equals, or a sentence why
it does not although it looked so, or None where there is nothing to say. To add a rule, write the function and name
its operators in `_RULES`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from graphopt.rewriting.choices import CHOICES
from graphopt.rewriting.constants import array, constant
from graphopt.rewriting.edit import bypass, cannot_replace, remove_node, set_constant, sole_use
from graphopt.rewriting.names import Names
from graphopt.rewriting.nodes import is_onnx, label, mark_origin
from graphopt.sparsity.marks import is_wrapper

Outcome = ir.Value | str | None
Rule = Callable[[ir.Node, int], Outcome]

_RESHAPES = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")


def identity_of(node: ir.Node, opset: int, *, keep_signed_zero: bool = False) -> Outcome:
    """The value that `node` gives out unchanged; a reason where it nearly does; None elsewhere.

    Args:
        node: any node.
        opset: version of the standard operator set.
        keep_signed_zero: do not call x + 0.0 the identity (it turns -0.0 into 0.0).
    """
    if not is_onnx(node, node.op_type) or not node.inputs or node.inputs[0] is None:
        return None
    if node.op_type == "Add" and keep_signed_zero and not _adds_negative_zero(node):
        return None
    rule = _RULES.get(node.op_type)
    return rule(node, opset) if rule else None


def merge_with_producer(node: ir.Node, names: Names) -> bool:
    """Make one node of a Transpose and the Transpose before it, or of two reshapes.

    Transpose q after Transpose p is Transpose [p[q0], p[q1], ...]. A Reshape whose target copies no dimension of its
    input gives the same from any shape of the same elements, so the reshape before it goes; a Squeeze, Unsqueeze or
    Flatten goes where the Reshape before it can make its shape. Only where nothing else reads the tensor between. The
    wrapper of a sparse core stays as it is: other passes know it by its form.

    Returns:
        True where it was done.
    """
    if not is_onnx(node, "Transpose", *_RESHAPES) or is_wrapper(node):
        return False
    if not is_onnx(node, "Transpose", "Reshape"):
        return _into_reshape_before(node, names)
    inner = _before(node, *(_RESHAPES if is_onnx(node, "Reshape") else ("Transpose",)))
    if inner is None or is_wrapper(inner) or not sole_use(inner.outputs[0]):
        return False
    if is_onnx(node, "Transpose"):
        first, second = inner.attributes.get_ints("perm"), node.attributes.get_ints("perm")
        if first is None or second is None or len(first) != len(second):
            return False
        node.attributes["perm"] = ir.AttrInt64s("perm", [first[p] for p in second])
    else:
        target = array(_input(node, 1))
        if target is None or (not target.all() and not node.attributes.get_int("allowzero", 0)):
            return False
    node.replace_input_with(0, inner.inputs[0])
    mark_origin(node, [label(inner)])
    remove_node(inner)
    return True


def _into_reshape_before(node: ir.Node, names: Names) -> bool:
    inner, output = _before(node, "Reshape"), node.outputs[0]
    dims = _dims(output)
    if inner is None or is_wrapper(inner) or dims is None or not isinstance(node.graph, ir.Graph):
        return False
    if not sole_use(inner.outputs[0]):
        return False
    # One open dimension can be left to -1; a dimension of 0 would mean "copy".
    if sum(d is None for d in dims) > 1 or 0 in dims or array(_input(inner, 1)) is None or not dims:
        return False
    shape = output.shape
    if cannot_replace(output, inner.outputs[0]):
        return False
    target = np.array([-1 if d is None else d for d in dims], dtype=np.int64)
    set_constant(inner, 1, target, names, [label(node)])
    bypass(node, inner.outputs[0], origin_of=inner)
    inner.outputs[0].shape = shape
    return True


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _before(node: ir.Node, *op_types: str) -> ir.Node | None:
    """The node of one of these types that makes the first input of `node`, in the same graph."""
    value = _input(node, 0)
    producer = value.producer() if value is not None else None
    if producer is None or producer.graph is not node.graph or not is_onnx(producer, *op_types):
        return None
    return None if any(attribute.is_ref() for attribute in producer.attributes.values()) else producer


def _ints(node: ir.Node, name: str, index: int) -> list[int] | None:
    """A list of integers given as an attribute (older opsets) or as a constant input; None where it is neither."""
    if name in node.attributes:
        return None if node.attributes[name].is_ref() else list(node.attributes[name].as_ints())
    data = array(_input(node, index))
    return None if data is None else [int(d) for d in data.reshape(-1)]


def _dims(value: ir.Value) -> tuple[int | None, ...] | None:
    """The shape, with None for what is not a number; None where the rank is unknown.

    The shape of a graph output is what the file declares, not what was inferred, and exporters leave stale ones: it
    proves nothing.
    """
    return (
        None
        if value.shape is None or value.is_graph_output()
        else tuple(d if isinstance(d, int) else None for d in value.shape)
    )


def _always(node: ir.Node, opset: int) -> Outcome:
    return node.inputs[0]


def _single(node: ir.Node, opset: int) -> Outcome:
    return node.inputs[0] if len(node.inputs) == 1 else None


def _dropout(node: ir.Node, opset: int) -> Outcome:
    training = _input(node, 2)
    if opset < 7:
        return None if node.attributes.get_int("is_test", 0) == 0 else node.inputs[0]
    if training is None:
        return node.inputs[0]
    mode = array(training)
    if mode is None:
        return "its training mode is not constant"
    return "its training mode is on" if mode.any() else node.inputs[0]


def _cast(node: ir.Node, opset: int) -> Outcome:
    source = node.inputs[0]
    to = node.attributes.get_int("to", 0)
    if source is None or not to:
        return None
    if source.dtype == to:
        return source
    inner = _before(node, "Cast")
    origin = inner.inputs[0] if inner is not None else None
    if origin is not None and origin.dtype == to and (origin.dtype, source.dtype) in _LOSSLESS:
        return origin
    return None


_D = ir.DataType
_LOSSLESS = {
    *((_D.FLOAT16, wide) for wide in (_D.FLOAT, _D.DOUBLE)),
    *((_D.BFLOAT16, wide) for wide in (_D.FLOAT, _D.DOUBLE)),
    (_D.FLOAT, _D.DOUBLE),
    *((narrow, _D.INT64) for narrow in (_D.INT8, _D.INT16, _D.INT32, _D.UINT8, _D.UINT16, _D.UINT32)),
    *((narrow, _D.INT32) for narrow in (_D.INT8, _D.INT16, _D.UINT8, _D.UINT16)),
    *((_D.BOOL, wide) for wide in (_D.INT8, _D.UINT8, _D.INT32, _D.INT64, _D.FLOAT16, _D.FLOAT, _D.DOUBLE)),
}
"""Pairs (from, to) where every value of the first type is one of the second."""


def _transpose(node: ir.Node, opset: int) -> Outcome:
    perm = node.attributes.get_ints("perm")
    if perm is None:
        return None
    if list(perm) == sorted(perm):
        return node.inputs[0]
    inner = _before(node, "Transpose")
    first = inner.attributes.get_ints("perm") if inner is not None else None
    if inner is None or first is None or len(first) != len(perm):
        return None
    both = [first[p] for p in perm]
    return inner.inputs[0] if both == sorted(both) else None


def _reshape(node: ir.Node, opset: int) -> Outcome:
    source, target = node.inputs[0], array(_input(node, 1))
    if source is None or target is None or target.ndim != 1:
        return None
    wanted = [int(d) for d in target]
    copy_zero = not node.attributes.get_int("allowzero", 0)
    dims = _dims(source)
    if dims is not None and len(dims) == len(wanted):
        # At most one axis may be left to -1, and the others fix it.
        kept = [w == d or (w == 0 and copy_zero) for w, d in zip(wanted, dims, strict=True)]
        open_axes = [w for w, same in zip(wanted, kept, strict=True) if not same]
        nonzero = all(d != 0 for d in dims)
        if not open_axes or (open_axes == [-1] and nonzero):
            return source
    return None


def _flatten(node: ir.Node, opset: int) -> Outcome:
    source = node.inputs[0]
    dims = _dims(source) if source is not None else None
    return source if dims is not None and len(dims) == 2 and node.attributes.get_int("axis", 1) in (1, -1) else None


def _squeeze(node: ir.Node, opset: int) -> Outcome:
    inner = _before(node, "Unsqueeze" if node.op_type == "Squeeze" else "Squeeze")
    if inner is None:
        return None
    here, there = _ints(node, "axes", 1), _ints(inner, "axes", 1)
    if not here or not there or sorted(here) != sorted(there):
        return None
    return inner.inputs[0]


def _expand(node: ir.Node, opset: int) -> Outcome:
    source, target = node.inputs[0], array(_input(node, 1))
    dims = _dims(source) if source is not None else None
    if source is None or target is None or dims is None or target.size > len(dims):
        return None
    aligned = dims[len(dims) - target.size :]
    return source if all(t in (1, d) for t, d in zip(target.reshape(-1).tolist(), aligned, strict=True)) else None


def _tile(node: ir.Node, opset: int) -> Outcome:
    repeats = array(_input(node, 1))
    return node.inputs[0] if repeats is not None and repeats.ndim == 1 and (repeats == 1).all() else None


def _pad(node: ir.Node, opset: int) -> Outcome:
    pads = _ints(node, "pads", 1)
    return node.inputs[0] if pads and not any(pads) else None


def _slice(node: ir.Node, opset: int) -> Outcome:
    source = node.inputs[0]
    starts, ends = _ints(node, "starts", 1), _ints(node, "ends", 2)
    dims = _dims(source) if source is not None else None
    if starts is None or ends is None or any(starts):
        return None
    axes = _ints(node, "axes", 3)
    if axes is None:
        if _input(node, 3) is not None:
            return None
        axes = list(range(len(starts)))
    if opset >= 10 and _input(node, 4) is not None:
        steps = array(_input(node, 4))
        if steps is None or (steps != 1).any():
            return None
    # INT_MAX is how exporters write "to the end"; no axis is that long.
    for axis, end in zip(axes, ends, strict=True):
        length = dims[axis] if dims is not None and -len(dims) <= axis < len(dims) else None
        if end < 2**31 - 1 and (length is None or end < length):
            return None
    return source


def _split(node: ir.Node, opset: int) -> Outcome:
    return node.inputs[0] if len(node.outputs) == 1 else None


def _clip(node: ir.Node, opset: int) -> Outcome:
    bounded = any(v is not None for v in node.inputs[1:]) or "min" in node.attributes or "max" in node.attributes
    return None if bounded else node.inputs[0]


def _pool(node: ir.Node, opset: int) -> Outcome:
    kernel = node.attributes.get_ints("kernel_shape")
    moved = any(node.attributes.get_ints("pads", ())) or any(s != 1 for s in node.attributes.get_ints("strides", ()))
    return node.inputs[0] if kernel is not None and all(k == 1 for k in kernel) and not moved else None


def _resize(node: ir.Node, opset: int) -> Outcome:
    scales = array(_input(node, 2 if opset >= 11 and node.op_type == "Resize" else 1))
    if scales is None or not scales.size or (scales != 1).any():
        return None
    coordinates = node.attributes.get_string("coordinate_transformation_mode", "half_pixel")
    if coordinates in ("tf_half_pixel_for_nn", "tf_crop_and_resize"):
        return f"{coordinates} moves pixels even at scale 1"
    return node.inputs[0]


def _idempotent(node: ir.Node, opset: int) -> Outcome:
    return node.inputs[0] if _before(node, node.op_type) is not None else None


def _involution(node: ir.Node, opset: int) -> Outcome:
    inner = _before(node, node.op_type)
    return inner.inputs[0] if inner is not None else None


_NEUTRAL = {"Add": 0, "Sub": 0, "Mul": 1, "Div": 1, "Pow": 1}


def _neutral(node: ir.Node, opset: int) -> Outcome:
    sides = (1, 0) if node.op_type in ("Add", "Mul") else (1,)
    for side in sides:
        source, operand = _input(node, 1 - side), _input(node, side)
        tensor = constant(operand)
        # Neutral constants are small; large weights are not read only to find out that they are none.
        if tensor is None or source is None or tensor.size > 65536 or tensor.size == 0:
            continue
        data = array(operand)
        if data is None or not bool((data == _NEUTRAL[node.op_type]).all()):
            continue
        if _broadcasts(source, data.shape):
            return f"its constant of shape {data.shape} may broadcast what it reads to a larger shape"
        return source
    return None


def _broadcasts(source: ir.Value, shape: tuple[int, ...]) -> bool:
    """True unless an elementwise operator with a constant of this shape keeps the shape of `source`."""
    if not shape:
        return False
    dims = _dims(source)
    if dims is None or len(dims) < len(shape):
        return True
    return any(k not in (1, d) for k, d in zip(shape, dims[len(dims) - len(shape) :], strict=True))


def _adds_negative_zero(node: ir.Node) -> bool:
    """x + (-0.0) keeps every bit of x."""
    data = [array(v) for v in node.inputs]
    return any(d is not None and d.dtype.kind == "f" and bool(((d == 0) & np.signbit(d)).all()) for d in data)


_RULES: dict[str, Rule] = {
    "Identity": _always,
    "Dropout": _dropout,
    "Cast": _cast,
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Squeeze": _squeeze,
    "Unsqueeze": _squeeze,
    "Expand": _expand,
    "Tile": _tile,
    "Pad": _pad,
    "Slice": _slice,
    "Split": _split,
    "Clip": _clip,
    "MaxPool": _pool,
    "AveragePool": _pool,
    "Resize": _resize,
    "Upsample": _resize,
    **dict.fromkeys(("Concat", "Sum", "Mean", "Max", "Min"), _single),
    **dict.fromkeys(("Relu", "Abs", "Ceil", "Floor", "Round", "Sign"), _idempotent),
    **dict.fromkeys(("Neg", "Not"), _involution),
    **dict.fromkeys(_NEUTRAL, _neutral),
    **CHOICES,
}
