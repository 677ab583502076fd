"""Facts about shapes and constants of values, read from an onnx_ir graph: sizes, constant arrays, reshape blocks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.files.integers import entries, integers, product_of

Dim = int | str | None
"""A known size, the name of a symbolic one, or None where nothing is known."""


def opset(node: ir.Node) -> int:
    """Version of the operator set that a node of the main graph belongs to."""
    imports = node.graph.opset_imports if node.graph is not None else {}
    return node.version or imports.get(node.domain, imports.get("", 13))


def dims(value: ir.Value) -> tuple[Dim, ...] | None:
    """Shape of a value; None where even the rank is unknown. A constant's own shape wins over the annotation."""
    tensor = constant_tensor(value)
    shape = tensor.shape if tensor is not None else value.shape
    if shape is None:
        return None
    return tuple(d if isinstance(d, int) else d.value for d in shape)


def static_dims(value: ir.Value) -> list[int] | None:
    """Shape with every symbolic dimension counted as 1; None where the rank or an unnamed dimension is unknown."""
    shape = dims(value)
    if shape is None or any(d is None for d in shape):
        return None
    return [d if isinstance(d, int) else 1 for d in shape]


def constant_tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor behind an initializer or the output of a Constant node; None for anything computed."""
    if value is None:
        return None
    node = value.producer()
    if node is None:
        return value.const_value if value.is_initializer() else None
    if node.op_type != "Constant" or node.domain not in {"", "ai.onnx"}:
        return None
    attribute = node.attributes.get("value")
    if attribute is not None:
        return attribute.as_tensor()
    for name in ("value_int", "value_ints", "value_float", "value_floats"):
        attribute = node.attributes.get(name)
        if attribute is not None:
            kind = np.int64 if "int" in name else np.float32
            return ir.tensor(np.asarray(attribute.value, dtype=kind), name=value.name)
    return None


def sizes(value: ir.Value | None) -> list[int] | None:
    """Shape of a constant value; None for anything computed."""
    tensor = constant_tensor(value)
    return None if tensor is None else [int(d) for d in tensor.shape.numpy()]


def constant(value: ir.Value | None) -> npt.NDArray[np.generic] | None:
    """The array of a constant value; None for anything computed."""
    tensor = constant_tensor(value)
    return None if tensor is None else tensor.numpy()


def ints(value: ir.Value | None) -> list[int] | None:
    """An integer tensor as a flat list; None where it is absent or depends on more than known sizes."""
    array = integer_array(value)
    return None if array is None else [int(i) for i in array.ravel()]


def integer_array(value: ir.Value | None) -> npt.NDArray[np.int64] | None:
    """A constant integer tensor, or one that is computed from nothing but constants and known sizes."""
    array = constant(value)
    return integers(value) if array is None else array.astype(np.int64)


def elements(value: ir.Value | None) -> list[Dim] | None:
    """Elements of an integer vector, known or not; None where it is absent or not even their number is known."""
    array = constant(value)
    if array is not None:
        return [int(i) for i in array.ravel()]
    found = entries(value)
    return None if found is None else [e if isinstance(e, int | str) else None for e in found.ravel()]


def scalar(value: ir.Value | None) -> float | None:
    """A constant with one element as a float; None otherwise."""
    array = constant(value)
    return float(array.ravel()[0]) if array is not None and array.size == 1 and array.dtype.kind in "fiub" else None


def is_tied(value: ir.Value) -> bool:
    """True for a constant with several axes longer than 1, which is labelled once for all its uses (see `Use`)."""
    return sum(size > 1 for size in sizes(value) or ()) > 1


def set_constant(value: ir.Value, array: npt.NDArray[np.generic]) -> None:
    """Replace the array of an initializer or Constant node, keeping its name."""
    tensor = ir.Tensor(array, name=value.name)
    node = value.producer()
    if node is None:
        value.const_value = tensor
    else:
        node.attributes.clear()
        node.attributes.add(ir.AttrTensor("value", tensor))
    value.shape = ir.Shape(array.shape)


def _prefixes(shape: Sequence[Dim], side: str) -> list[tuple[object, ...]]:
    """Product of the first k dimensions for every k, as a comparable key; unknown dimensions equal nothing.

    `side` tells the two shapes of a comparison apart, so that their unknown dimensions differ too.
    """
    number, symbols = 1, []
    keys: list[tuple[object, ...]] = [(1,)]
    for position, dim in enumerate(shape):
        if dim is None:
            symbols.append(f"?{side}{position}")
        else:
            factor, names = product_of([dim])
            number *= factor
            symbols += names
        keys.append((number, *sorted(symbols)))
    return keys


def reshape_blocks(source: Sequence[Dim], result: Sequence[Dim]) -> list[tuple[range, range]]:
    """Cut a reshape into independent blocks of axes with equal products, as fine as the sizes prove.

    Returns:
        Pairs (axes of the source, axes of the result), in order, covering both. Blocks are matched from the front and,
        for what an unknown size hides, from the back.
    """
    front = _common(_prefixes(source, "before"), _prefixes(result, "after"))
    back = _common(_prefixes(source[::-1], "before"), _prefixes(result[::-1], "after"))
    cuts = sorted({*front, *((len(source) - i, len(result) - j) for i, j in back), (len(source), len(result))})
    chain: list[tuple[int, int]] = []
    for cut in cuts:  # keep only cuts that advance on both sides: a chain, never a crossing
        if not chain or (cut[0] >= chain[-1][0] and cut[1] >= chain[-1][1]):
            chain.append(cut)
    return [(range(a, c), range(b, d)) for (a, b), (c, d) in pairwise(chain) if c > a or d > b]


def _common(left: list[tuple[object, ...]], right: list[tuple[object, ...]]) -> list[tuple[int, int]]:
    """First positions at which both sides have the same product."""
    first_right: dict[tuple[object, ...], int] = {}
    for j, key in enumerate(right):
        first_right.setdefault(key, j)
    seen: set[tuple[object, ...]] = set()
    cuts = []
    for i, key in enumerate(left):
        if key in first_right and key not in seen:
            seen.add(key)
            cuts.append((i, first_right[key]))
    return cuts
