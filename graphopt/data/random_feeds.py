"""Plausible random inputs for any model: in the range of the tables they index, masks that mask, sizes that fit.

Random inputs are good enough to compare two versions of one model, and no more: activations are not those of real data.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.errors import ModelError
from graphopt.executor import Array

_DATA_MOVEMENT = {
    "Identity", "Unsqueeze", "Squeeze", "Reshape", "Flatten", "Transpose", "Slice", "Expand", "Split", "Concat", "Tile",
    "Pad", "Gather", "Where", "Clip", "Abs", "Max", "Min", "Dropout",
}  # fmt: skip
"""Operators whose results hold values of the same range as what they read."""

_COMPARISONS = {"Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual"}

SIZES = ((64, 8), (64, 64), (224, 512), (320, 2048), (32, 1), (640, 16000))
"""Sizes tried for unknown dimensions: height or width, and any other. The first under which the model runs are taken.
Heights and widths are divisible by the strides of most networks; long sequences are for audio."""


@dataclass
class _Use:
    """What the graph does with an integer input."""

    table: int | None = None
    compared: list[int] = field(default_factory=list)
    becomes_float: bool = False


def random_feeds(model: ir.Model, seed: int, samples: int = 2) -> list[dict[str, Array]]:
    """Feeds for a model, the same for the same seed.

    Unknown dimensions get small sizes, equal where their names are equal; the leading one is taken for the batch.
    Integers stay below the size of the table they index, as far as the graph shows it.

    Args:
        model: the model; its inputs must have known types and ranks.
        seed: of the random numbers.
        samples: how many feeds.

    Raises:
        ModelError: an input whose type or rank the model does not declare, or no size was found that the model accepts.
    """
    inputs = [value for value in model.graph.inputs if value.name not in model.graph.initializers]
    for sizes in SIZES:
        feeds = _feeds(inputs, seed, samples, sizes)
        if not _sizes_are_free(inputs) or not feeds or _runs(model, feeds[0]):
            return feeds
    raise ModelError(
        "no sizes were found for its unknown dimensions under which the model runs",
        where=", ".join(f"input {value.name}" for value in inputs if _sizes_are_free([value])),
        hint="give data with --calib, or fix the dimensions with --dim",
    )


def _feeds(inputs: list[ir.Value], seed: int, samples: int, sizes: tuple[int, int]) -> list[dict[str, Array]]:
    rng = np.random.default_rng(seed)
    uses = {value: _use(value) for value in inputs}
    result = []
    for index in range(samples):
        dims = _Sizes(1 + index % 2, *sizes)
        result.append({value.name or "": _array(value, uses[value], dims, rng) for value in inputs})
    return result


def _sizes_are_free(inputs: list[ir.Value]) -> bool:
    """Whether anything besides a leading batch dimension is to be chosen."""
    return any(
        isinstance(dim, ir.SymbolicDim) and not _is_batch(value.shape, axis)
        for value in inputs
        if value.shape is not None
        for axis, dim in enumerate(value.shape)
    )


def _runs(model: ir.Model, feed: dict[str, Array]) -> bool:
    """Whether the model accepts a feed. The sizes are a guess, so a refusal is an answer and no error."""
    from graphopt.slicing import SlicedSession

    try:
        SlicedSession(model, budget=256 << 20).run_all([feed])
    except ModelError:
        return False
    return True


def _is_batch(shape: ir.Shape, axis: int) -> bool:
    """Whether an unknown dimension counts samples: by its name, by leading, or by following the layers of a state."""
    dim = shape[axis]
    name = dim.value.lower() if isinstance(dim, ir.SymbolicDim) and dim.value else ""
    if "batch" in name or axis == 0:
        return "batch" in name or name in {"", "n", "b", "bs"} or name.startswith("unk__")
    return not name and axis == 1 and len(shape) == 3 and isinstance(shape[0], int)


@dataclass
class _Sizes:
    """Sizes of unknown dimensions; dimensions of one name have one size."""

    batch: int
    spatial: int
    other: int
    named: dict[str, int] = field(default_factory=dict)

    def of(self, shape: ir.Shape, axis: int) -> int:
        dim = shape[axis]
        if isinstance(dim, int):
            return dim
        name = dim.value
        if name is not None and name in self.named:
            return self.named[name]
        lowered = (name or "").lower()
        if _is_batch(shape, axis) or axis == 0:
            size = self.batch
        elif "height" in lowered or "width" in lowered:
            size = self.spatial
        elif any(word in lowered for word in ("seq", "past", "len", "token", "time")):
            size = self.other
        else:
            # Images are what has an unknown size among the last axes of four.
            size = self.spatial if len(shape) >= 4 and axis >= len(shape) - 3 else self.other
        if name is not None:
            self.named[name] = size
        return size


def _array(value: ir.Value, use: _Use, sizes: _Sizes, rng: np.random.Generator) -> Array:
    where = f"input {value.name}"
    if not isinstance(value.type, ir.TensorType):
        raise ModelError(
            f"random values cannot be made for type {value.type}", where=where, hint="give data with --calib"
        )
    if value.shape is None:
        raise ModelError("the model does not declare its rank", where=where, hint="give data with --calib")
    shape = tuple(sizes.of(value.shape, axis) for axis in range(len(value.shape)))
    dtype = value.type.dtype
    is_mask = "mask" in (value.name or "").lower()
    if dtype == ir.DataType.STRING:
        words = np.array(["a", "of", "the", "42", "graph"])
        return np.asarray(rng.choice(words, size=shape))
    if dtype == ir.DataType.BOOL:
        return _mask(shape, rng).astype(bool) if is_mask else np.asarray(rng.random(shape) < 0.5)
    if is_mask:
        return _mask(shape, rng).astype(dtype.numpy())
    if dtype.is_floating_point():
        return np.asarray(rng.standard_normal(shape)).astype(dtype.numpy())
    if dtype.is_integer():
        return _integers(shape, np.dtype(dtype.numpy()), use, rng)
    raise ModelError(f"random values cannot be made for {dtype.name}", where=where, hint="give data with --calib")


def _mask(shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Ones, then zeros, along the last axis: what padding leaves; at least one 1."""
    if not shape or shape[-1] == 0:
        return np.ones(shape)
    lengths = rng.integers(1, shape[-1] + 1, size=(*shape[:-1], 1))
    return (np.arange(shape[-1]) < lengths).astype(np.float64)


def _integers(shape: tuple[int, ...], dtype: np.dtype[Any], use: _Use, rng: np.random.Generator) -> Array:
    info = np.iinfo(dtype) if dtype.kind in "iu" else None
    highest = int(info.max) if info is not None else 7
    if use.table is not None:
        low, high = 0, use.table
    elif use.compared:
        # A mode or a rate that the graph compares with constants: one of those is a value it knows.
        return np.asarray(rng.choice(np.array(use.compared), size=shape)).astype(dtype)
    elif use.becomes_float and info is not None:
        low, high = (max(int(info.min), -128), 128) if dtype == np.int8 else (0, 256)
    else:
        low, high = 0, 8
    return rng.integers(low, max(min(high, highest + 1), low + 1), size=shape).astype(dtype)


def _use(value: ir.Value) -> _Use:
    """Follow an integer input through the operators that keep its values, to where it is used."""
    use = _Use()
    if value.dtype is None or not value.dtype.is_integer():
        return use
    seen = {value}
    pending = [value]
    while pending:
        current = pending.pop()
        for node, position in current.uses():
            bound = _table_size(node, position)
            if bound is not None:
                use.table = bound if use.table is None else min(use.table, bound)
                continue
            if node.op_type in _COMPARISONS:
                use.compared += _constants(node, position)
            if node.op_type == "Cast":
                target = node.attributes.get("to")
                kind = ir.DataType(target.as_int()) if target is not None and not target.is_ref() else None
                use.becomes_float |= kind is not None and kind.is_floating_point()
            if node.op_type in _DATA_MOVEMENT or node.op_type == "Cast":
                for output in node.outputs:
                    if output not in seen:
                        seen.add(output)
                        pending.append(output)
    return use


def _table_size(node: ir.Node, position: int) -> int | None:
    """How many entries the table has that an operand indexes; None where it indexes nothing of known size."""
    data = node.inputs[0] if node.inputs else None
    if node.op_type in {"Gather", "GatherElements"} and position == 1 and data is not None and data.shape is not None:
        axis = node.attributes.get("axis")
        dim = data.shape[axis.as_int() if axis is not None and not axis.is_ref() else 0]
        return dim if isinstance(dim, int) and dim > 0 else None
    if node.op_type == "GatherND" and position == 1 and data is not None and data.shape is not None:
        sizes = [dim for dim in data.shape if isinstance(dim, int)]
        return min(sizes) if sizes and len(sizes) == len(data.shape) else None
    if node.op_type == "OneHot" and position == 0:
        return next(_scalars(node.inputs[1]), None)
    return None


def _constants(node: ir.Node, position: int) -> list[int]:
    return [int(number) for index, other in enumerate(node.inputs) if index != position for number in _scalars(other)]


def _scalars(value: ir.Value | None) -> Iterator[int]:
    """The number in a constant of one element, stored as an initialiser or as a Constant node."""
    if value is None:
        return
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is not None and tensor.size == 1 and tensor.dtype.is_integer():
        yield int(tensor.numpy().item())
