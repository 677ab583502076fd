"""Weights stored as integers and scales, and computed from them by operators that runtimes fold when they load.

    w = (integers - zero) * scale               Cast, Sub, Mul, and Reshape where blocks cut an axis

The file gets smaller; what runs is the float model, at its speed, whatever the layer: this is the form for layers that
no kernel computes from integers. ONNX Runtime folds Cast and Mul of constants, but keeps DequantizeLinear and runs it
at every call: on a 3x3 convolution of 64 to 128 channels that took 1.15 times as long as floats, on an LSTM of 128
units 1.2 to 1.8 times, Cast and Mul 0.96 to 1.00 times (ONNX Runtime 1.31, one thread).

Two numbers of 4 bits share a byte, in the lower half of the weight and in the upper one. The arithmetic takes them
apart in float32, exactly, with the operators of opset 10: b - (b mod 16) over 16 is the upper one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from graphopt.numerics.bit_packing import pack
from graphopt.quantization.rounding.interface import Rounded, Rounding, WeightGrid
from graphopt.quantization.weights.readers import Array, Reader, Weight
from graphopt.rewriting.edit import drop_if_unused, new_initializer
from graphopt.rewriting.names import Names
from graphopt.rewriting.nodes import is_onnx

NODE_BYTES, NAMES_PER_NODE = 60, 4
"""About what a node and its constant take in a file, and how often the name of the weight stands in them."""

OPSET_MIN = 10
"""Mod is there from here on."""


@dataclass(frozen=True)
class Layout:
    """How integers stand in the file, and the scales that broadcast against them.

    Attributes:
        view: shape in which every block of columns has an axis of its own.
        scale: shape of the scales, which broadcasts to `view`.
    """

    view: tuple[int, ...]
    scale: tuple[int, ...]


def layout(reader: Reader, shape: tuple[int, ...], blocks: int) -> Layout | None:
    """Where the scales of a weight go; None where so many blocks do not cut its axes evenly.

    Args:
        reader: whose weight.
        shape: of the weight.
        blocks: of the columns of a row.
    """
    if reader.rows_first:
        if blocks == 1:
            axes = _row_axes(reader, shape)
            return Layout(shape, (*shape[:axes], *(1,) * (len(shape) - axes)))
        columns = reader.matrices(np.broadcast_to(np.int8(0), shape)).shape[2]
        rows = math.prod(shape) // columns
        return Layout((rows, blocks, columns // blocks), (rows, blocks, 1)) if columns % blocks == 0 else None
    lead: tuple[int, ...] = shape[:-2]
    inner, outer = shape[-2:]
    tail: tuple[int, ...] = ()
    whole = True
    if is_onnx(reader.node, "ConvTranspose"):
        groups = int(reader.node.attributes.get_int("group", 1) or 1)
        whole = groups == 1
        lead = () if whole else (groups,)
        inner, outer, tail = shape[0] // groups, shape[1], shape[2:]
    if inner % blocks:
        return None
    scale = (outer, *(1,) * len(tail))
    if blocks == 1 and whole:
        return Layout(shape, (*lead, 1, *scale))
    return Layout((*lead, blocks, inner // blocks, outer, *tail), (*lead, blocks, 1, *scale))


def _row_axes(reader: Reader, shape: tuple[int, ...]) -> int:
    """How many leading axes count rows."""
    if is_onnx(reader.node, "LSTM", "GRU", "RNN"):
        return 2
    return len(shape) - 1 if is_onnx(reader.node, "MatMul") and reader.transpose is None else 1


def even_block(reader: Reader, shape: tuple[int, ...], block: int | None) -> int | None:
    """The number of columns nearest to `block` that cuts the weight evenly; None: one scale a row.

    Args:
        reader: whose weight.
        shape: of the weight.
        block: wanted; None: one scale a row.
    """
    columns = reader.matrices(np.broadcast_to(np.int8(0), shape)).shape[2]
    if block is None or block >= columns:
        return None
    fitting = [b for b in range(1, columns) if columns % b == 0 and 2 * b >= block and b <= 4 * block]
    fitting = [b for b in fitting if layout(reader, shape, columns // b) is not None]
    return min(fitting, key=lambda b: abs(math.log(b / block)), default=None)


def stored_bytes(weight: Weight, *, bits: int, block: int | None, symmetric: bool) -> int:
    """About how many bytes the integers, scales and nodes of a weight take."""
    reader, shape = weight.readers[0], weight.array.shape
    groups, rows, columns = reader.matrices(np.broadcast_to(np.int8(0), shape)).shape
    own = even_block(reader, shape, block) or columns
    scales = groups * rows * (columns // own) * (4 if symmetric else 5)
    nodes: int = 3 + (4 if bits == 4 else 0) + (0 if symmetric else 2)
    return (
        int(-(-weight.tensor.size * bits // 8))
        + int(scales)
        + nodes * (NODE_BYTES + NAMES_PER_NODE * len(weight.value.name or ""))
    )


def unpack_when_loaded(
    weight: Weight, names: Names, *, bits: int, block: int | None, symmetric: bool, rounding: Rounding
) -> None:
    """Let arithmetic on integers stand for a weight, under its name, for all of its readers.

    Args:
        weight: of an even number of elements where `bits` is 4.
        names: of the model.
        bits: 4 or 8.
        block: columns that share a scale, about; None: one scale a row.
        symmetric: without zero points.
        rounding: called with the key of the first reader.
    """
    reader, like, dtype = weight.readers[0], weight.array, weight.tensor.dtype
    own = even_block(reader, like.shape, block)
    grid = WeightGrid(bits, symmetric, True, own, full=symmetric and bits < 8)
    rounded = rounding(reader.key, reader.matrices(like).astype(np.float64), grid)
    found = layout(reader, like.shape, rounded.scale.shape[2])
    assert found is not None  # `even_block` asked
    build = _Arithmetic(weight.value, names)
    integers = reader.restored(rounded.integers, like).reshape(found.view)
    number = build.integers(integers, bits, symmetric=symmetric)
    if bits == 4 or not symmetric:
        middle = 1 << bits - 1
        zero = np.uint8(middle) if symmetric else _arranged(reader, rounded.zero, found).astype(np.uint8)
        number = build.node("Sub", number, build.cast(build.constant("zero_point", np.asarray(zero))))
    number = build.node("Mul", number, build.constant("scale", _arranged(reader, rounded.scale, found)))
    if found.view != like.shape:
        number = build.node("Reshape", number, build.constant("shape", np.array(like.shape, np.int64)))
    if dtype != ir.DataType.FLOAT:
        number = build.cast(number, dtype)
    build.replace(number, dtype, like.shape)


def dequantised(reader: Reader, rounded: Rounded, like: Array) -> NDArray[np.float32]:
    """The weight that the arithmetic gives."""
    return np.asarray(reader.restored(rounded.dequantised(), like), np.float32)


def _arranged(reader: Reader, numbers: Array, found: Layout) -> Array:
    """Numbers (groups, rows, blocks) in the shape that broadcasts against the integers."""
    return np.ascontiguousarray((numbers if reader.rows_first else numbers.swapaxes(1, 2)).reshape(found.scale))


class _Arithmetic:
    """Nodes, and their constants, that stand in the place of a constant."""

    def __init__(self, old: ir.Value, names: Names) -> None:
        producer = old.producer()
        graph = old.graph if producer is None else producer.graph
        assert isinstance(graph, ir.Graph)
        self._old, self._names, self._graph, self._nodes = old, names, graph, list[ir.Node]()

    def constant(self, what: str, data: Array) -> ir.Value:
        """A new initializer that is named after the weight."""
        name = self._names.fresh(f"{self._old.name}_{what}")
        return new_initializer(self._graph, name, data, ir.DataType.from_numpy(data.dtype))

    def node(self, op_type: str, *inputs: ir.Value, **attributes: int | float) -> ir.Value:
        """The result of an operator."""
        made = ir.node(op_type, list(inputs), attributes, name=self._names.fresh(f"{self._old.name}_{op_type}"))
        made.outputs[0].name = self._names.fresh(f"{made.name}_0")
        self._nodes.append(made)
        return made.outputs[0]

    def cast(self, value: ir.Value, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        """The value in another type."""
        return self.node("Cast", value, to=int(dtype))

    def integers(self, integers: Array, bits: int, *, symmetric: bool) -> ir.Value:
        """Integers as float32 numbers in their shape; symmetric ones of 4 bits are shifted by 8."""
        if bits == 8:
            return self.cast(self.constant("quantized", integers.astype(np.int8 if symmetric else np.uint8)))
        flat = (integers + (8 if symmetric else 0)).reshape(2, -1)
        both = self.cast(self.constant("quantized", pack(flat.T, 4).reshape(-1)))
        lower = self.node("Mod", both, self.constant("base", np.float32(16)), fmod=1)  # type: ignore[arg-type]
        upper = self.node("Mul", self.node("Sub", both, lower), self.constant("step", np.float32(1 / 16)))  # type: ignore[arg-type]
        halves = self.node("Concat", lower, upper, axis=0)
        return self.node("Reshape", halves, self.constant("view", np.array(integers.shape, np.int64)))

    def replace(self, new: ir.Value, dtype: ir.DataType, shape: tuple[int, ...]) -> None:
        """Let the readers of the constant read the arithmetic."""
        old, name = self._old, self._old.name
        old.replace_all_uses_with(new)
        producer = old.producer()
        anchor = producer if producer is not None else self._graph[0]
        self._graph.insert_before(anchor, self._nodes)
        drop_if_unused(old)
        new.name, new.type, new.shape = name, ir.TensorType(dtype), ir.Shape(shape)
