"""What small tensors of sizes hold, as far as shapes tell: exporters compute Reshape targets, Slice bounds and pads.

Such a tensor is followed back to constants and to the shapes of other tensors. An element is a number, the name of a
symbolic dimension, or unknown (None); data movement is carried out on arrays of such elements, arithmetic on numbers.
What is told holds for every input of the model.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Entry = int | float | str | None
Entries = npt.NDArray[np.object_]
LARGEST = 1024
"""Tensors with more elements are no sizes."""


def entries(value: ir.Value | None) -> Entries | None:
    """The elements of a tensor, in its shape; None where not even their number is known."""
    return _Follower().follow(value)


def integers(value: ir.Value | None) -> npt.NDArray[np.int64] | None:
    """The same where every element is an integer; None elsewhere."""
    found = entries(value)
    if found is None or not all(type(entry) is int for entry in found.ravel()):
        return None
    return found.astype(np.int64)


def dimensions(value: ir.Value) -> list[int | str | None] | None:
    """Dimensions of a tensor; None where its rank is unknown."""
    if value.shape is None:
        return None
    return [d if isinstance(d, int) else d.value for d in value.shape]


class _Follower:
    """Follows one tensor back, every tensor on the way once."""

    def __init__(self) -> None:
        self._known: dict[ir.Value, Entries | None] = {}

    def follow(self, value: ir.Value | None) -> Entries | None:
        if value is None:
            return None
        if value not in self._known:
            self._known[value] = None  # what leads back to itself is not known
            self._known[value] = self._fitting(value)
        return self._known[value]

    def _fitting(self, value: ir.Value) -> Entries | None:
        found = self._found(value)
        if found is None:  # the number of elements is worth knowing too
            sizes = None if value.shape is None else value.shape.numpy() if value.shape.is_static() else None
            if sizes is None or len(sizes) > 1 or math.prod(sizes) > LARGEST or not _holds_integers(value):
                return None
            return np.full(sizes, None, dtype=object)
        return found if found.size <= LARGEST else None

    def _found(self, value: ir.Value) -> Entries | None:
        constant = ir.convenience.get_const_tensor(value)
        if constant is not None:
            if constant.size > LARGEST or not (constant.dtype.is_integer() or constant.dtype.is_floating_point()):
                return _booleans(constant) if constant.dtype == ir.DataType.BOOL and constant.size <= LARGEST else None
            return _objects(constant.numpy())
        node = value.producer()
        if node is None or node.domain not in {"", "ai.onnx"} or value.is_graph_input():
            return None
        if node.op_type == "Shape":
            return _shape(node)
        if node.op_type == "Size":
            return _size(node)
        rule = _RULES.get(node.op_type)
        if rule is None:
            return None
        operands = [self.follow(v) for v in node.inputs]
        if any(found is None and v is not None for found, v in zip(operands, node.inputs, strict=True)):
            return None
        try:
            return rule(node, operands, value)
        except (ValueError, IndexError, TypeError, ZeroDivisionError, OverflowError):
            return None  # operands that do not fit together: for the checker of models to say


def _holds_integers(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_integer()


def _objects(array: npt.NDArray[Any]) -> Entries:
    found = np.empty(array.shape, dtype=object)
    found[...] = array.tolist()
    return found


def _booleans(tensor: ir.TensorProtocol) -> Entries:
    return _objects(tensor.numpy().astype(np.int64))


def _shape(node: ir.Node) -> Entries | None:
    source = node.inputs[0]
    found = dimensions(source) if source is not None else None
    if found is None:
        return None
    start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", None)
    return np.array(found, dtype=object)[start:end]


def _size(node: ir.Node) -> Entries | None:
    source = node.inputs[0]
    found = dimensions(source) if source is not None else None
    if found is None or not all(isinstance(dim, int) for dim in found):
        return None
    return _objects(np.array(math.prod(int(dim) for dim in found if dim is not None)))


# Operators -----------------------------------------------------------------------------------------------------------

Rule = Callable[[ir.Node, Sequence[Any], ir.Value], Entries | None]


def _numbers(array: Entries | None) -> list[int] | None:
    """Elements that are all numbers, as integers."""
    if array is None or not all(isinstance(entry, int) for entry in array.ravel()):
        return None
    return [int(entry) for entry in array.ravel()]


def _given(node: ir.Node, operands: Sequence[Any], index: int, attribute: str) -> list[int] | None:
    """Integers from an attribute or, in newer operator sets, an operand."""
    found = node.attributes.get_ints(attribute, None)
    if found is not None:
        return list(found)
    return _numbers(operands[index]) if index < len(operands) else None


def _pointwise(function: Callable[..., Entry]) -> Rule:
    """A function of numbers; anything unknown makes the result unknown."""

    def of_numbers(*given: Entry) -> Entry:
        return function(*given) if all(isinstance(entry, int | float) for entry in given) else None

    return _broadcast(of_numbers)


def _broadcast(function: Callable[..., Entry]) -> Rule:
    def apply(node: ir.Node, operands: Sequence[Any], value: ir.Value) -> Entries:
        return np.asarray(np.frompyfunc(function, len(operands), 1)(*operands), dtype=object)

    return apply


def _folded(function: Callable[[Any, Any], Any]) -> Rule:
    """A function of two numbers over any number of operands."""
    pair = _pointwise(function)

    def apply(node: ir.Node, operands: Sequence[Any], value: ir.Value) -> Entries | None:
        result: Any = operands[0]
        for other in operands[1:]:
            result = pair(node, [result, other], value)
        return np.asarray(result, dtype=object)

    return apply


def _times(one: Entry, other: Entry) -> Entry:
    """A product, of symbolic sizes too: "12*batch"."""
    if isinstance(one, int | float) and isinstance(other, int | float):
        return one * other
    if one is None or other is None or isinstance(one, float) or isinstance(other, float) or 0 in (one, other):
        return 0 if 0 in (one, other) else one if other == 1 else other if one == 1 else None
    return product(*product_of([one, other]))


def product_of(dims: Iterable[int | str]) -> tuple[int, list[str]]:
    """A product of dimensions as its number and its symbolic factors, sorted: "12*batch" has one of each."""
    number, names = 1, []
    for dim in dims:
        parts = str(dim).split("*")
        known = all(part.isidentifier() or part.isdecimal() for part in parts)
        for part in parts if known else [str(dim)]:
            if part.lstrip("-").isdecimal():
                number *= int(part)
            else:
                names.append(part)
    return number, sorted(names)


def product(number: int, names: Sequence[str]) -> int | str:
    """The dimension that `product_of` takes apart."""
    return "*".join([*([str(number)] if number != 1 else []), *names]) if names else number


def _quotient(one: Any, other: Any) -> Any:
    """Integers are divided towards zero."""
    if isinstance(one, int) and isinstance(other, int):
        return abs(one) // abs(other) * (1 if (one < 0) == (other < 0) else -1)
    return one / other


def _equal(one: Entry, other: Entry) -> Entry:
    """Sizes are not negative, so that a symbolic one is not -1."""
    if isinstance(one, str) or isinstance(other, str):
        numbers = [entry for entry in (one, other) if isinstance(entry, int | float)]
        return 1 if one == other else 0 if numbers and numbers[0] < 0 else None
    return None if one is None or other is None else int(one == other)


def _where(condition: Entry, one: Entry, other: Entry) -> Entry:
    if condition is None:
        return one if one == other else None
    return one if condition else other


def _cast(node: ir.Node, operands: Sequence[Any], value: ir.Value) -> Entries:
    whole = not ir.DataType(node.attributes.get_int("to", 1)).is_floating_point()
    kind = int if whole else float
    return np.asarray(
        np.frompyfunc(lambda entry: kind(entry) if isinstance(entry, int | float) else entry, 1, 1)(operands[0]),
        dtype=object,
    )


def _gather(node: ir.Node, operands: Sequence[Any], value: ir.Value) -> Entries | None:
    places = _numbers(operands[1])
    if places is None:
        return None
    axis = int(node.attributes.get_int("axis", 0) or 0)
    index = np.asarray(places, dtype=np.int64).reshape(operands[1].shape)
    return np.asarray(np.take(operands[0], index, axis=axis), dtype=object)


def _concat(node: ir.Node, operands: Sequence[Any], value: ir.Value) -> Entries:
    return np.concatenate(operands, axis=int(node.attributes.get_int("axis", 0) or 0))


def _squeeze(node: ir.Node, operands: Sequence[Any], value: ir.Value) -> Entries | None:
    axes = _given(node, operands, 1, "axes")
    if axes is None and len(operands) > 1:
        return None
    return np.asarray(np.squeeze(operands[0], None if axes is None else tuple(axes)), dtype=object)


def _unsqueeze(node: ir.Node, operands: Sequence[Any], value: ir.Value) -> Entries | None:
    axes = _given(node, operands, 1, "axes")
    return None if axes is None else np.expand_dims(operands[0], tuple(axes))


def _reshape(node: ir.Node, operands: Sequence[Any], value: ir.Value) -> Entries | None:
    data: Entries = operands[0]
    target = _numbers(operands[1])
    if target is None:
        return None
    if not node.attributes.get_int("allowzero", 0):
        target = [size or data.shape[place] for place, size in enumerate(target)]
    return data.reshape(target)


def _transpose(node: ir.Node, operands: Sequence[Any], value: ir.Value) -> Entries:
    order = node.attributes.get_ints("perm", None)
    return np.transpose(operands[0], None if order is None else list(order))


def _slice(node: ir.Node, operands: Sequence[Any], value: ir.Value) -> Entries | None:
    data: Entries = operands[0]
    starts, ends = _given(node, operands, 1, "starts"), _given(node, operands, 2, "ends")
    if starts is None or ends is None:
        return None
    axes = _given(node, operands, 3, "axes") or list(range(len(starts)))
    steps = (_numbers(operands[4]) if len(operands) > 4 and operands[4] is not None else None) or [1] * len(starts)
    cuts = [slice(None)] * data.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        past = step < 0 and end < -data.shape[axis]
        cuts[axis] = slice(start, None if past else end, step)
    return data[tuple(cuts)]


def _split(node: ir.Node, operands: Sequence[Any], value: ir.Value) -> Entries | None:
    axis = int(node.attributes.get_int("axis", 0) or 0)
    sizes, whole = _given(node, operands, 1, "split"), operands[0].shape[axis]
    if sizes is None:
        each = -(-whole // len(node.outputs))
        sizes = [min(each, whole - each * k) for k in range(len(node.outputs))]
    parts = np.split(operands[0], np.cumsum(sizes)[:-1], axis=axis)
    return parts[next(k for k, output in enumerate(node.outputs) if output is value)]


def _filled(node: ir.Node, operands: Sequence[Any], value: ir.Value) -> Entries | None:
    sizes = _numbers(operands[0])
    if sizes is None or math.prod(sizes) > LARGEST:
        return None
    given = node.attributes.get("value")
    fill = given.as_tensor().numpy().ravel()[0].item() if given is not None else 0.0
    return np.full(sizes, int(fill) if isinstance(fill, bool) else fill, dtype=object)


def _expanded(node: ir.Node, operands: Sequence[Any], value: ir.Value) -> Entries | None:
    sizes = _numbers(operands[1])
    if sizes is None or math.prod(sizes) > LARGEST:
        return None
    return np.array(np.broadcast_to(operands[0], np.broadcast_shapes(operands[0].shape, tuple(sizes))), dtype=object)


def _range(node: ir.Node, operands: Sequence[Any], value: ir.Value) -> Entries | None:
    numbers = [_numbers(operand) for operand in operands]
    if any(found is None for found in numbers):
        return None
    start, limit, step = (found[0] for found in numbers if found is not None)
    count = max(-(-(limit - start) // step), 0)
    return _objects(start + step * np.arange(count)) if count <= LARGEST else None


def _product(node: ir.Node, operands: Sequence[Any], value: ir.Value) -> Entries | None:
    numbers = _numbers(operands[0])
    if numbers is None or operands[0].ndim > 1:
        return None
    kept = bool(node.attributes.get_int("keepdims", 1)) and operands[0].ndim
    return np.full((1,) if kept else (), math.prod(numbers), dtype=object)


def _same(node: ir.Node, operands: Sequence[Any], value: ir.Value) -> Entries:
    same: Entries = operands[0]
    return same


_RULES: dict[str, Rule] = {
    "Identity": _same,
    "Cast": _cast,
    "Gather": _gather,
    "Concat": _concat,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Reshape": _reshape,
    "Transpose": _transpose,
    "Slice": _slice,
    "Split": _split,
    "ConstantOfShape": _filled,
    "Expand": _expanded,
    "Range": _range,
    "ReduceProd": _product,
    "Mul": _broadcast(_times),
    "Equal": _broadcast(_equal),
    "Where": _broadcast(_where),
    "Add": _pointwise(operator.add),
    "Sub": _pointwise(operator.sub),
    "Div": _pointwise(_quotient),
    "Mod": _pointwise(operator.mod),
    "Neg": _pointwise(operator.neg),
    "Abs": _pointwise(abs),
    "Floor": _pointwise(lambda x: float(math.floor(x))),
    "Ceil": _pointwise(lambda x: float(math.ceil(x))),
    "Max": _folded(max),
    "Min": _folded(min),
    "Less": _pointwise(lambda x, y: int(x < y)),
    "Greater": _pointwise(lambda x, y: int(x > y)),
    "LessOrEqual": _pointwise(lambda x, y: int(x <= y)),
    "GreaterOrEqual": _pointwise(lambda x, y: int(x >= y)),
    "And": _pointwise(lambda x, y: int(bool(x) and bool(y))),
    "Or": _pointwise(lambda x, y: int(bool(x) or bool(y))),
    "Not": _pointwise(lambda x: int(not x)),
}
