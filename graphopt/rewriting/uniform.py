"""Tensors that hold one number everywhere, as ConstantOfShape makes them: read, and made with another number."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.rewriting.constants import constant
from graphopt.rewriting.editor import Editor
from graphopt.rewriting.nodes import is_onnx

_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_SMALL = 4096
"""Bytes up to which a stored tensor is looked through: larger ones are weights."""
_MOVES = ("Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose", "Expand")
"""They give a uniform tensor another shape."""


def uniform(value: ir.Value | None) -> float | None:
    """The number that a floating-point tensor holds everywhere; None where it may hold others."""
    found = _maker(value)
    tensor = constant(value) if found is None else _number(found)
    if tensor is None or tensor.dtype not in _FLOATS or tensor.nbytes > _SMALL or tensor.size == 0:
        return None
    numbers = np.asarray(tensor.numpy()).reshape(-1)
    return float(numbers[0]) if (numbers == numbers[0]).all() else None


def _maker(value: ir.Value | None) -> ir.Node | None:
    """The ConstantOfShape that `value` comes from."""
    while value is not None:
        node = value.producer()
        if node is None or any(attribute.is_ref() for attribute in node.attributes.values()):
            return None
        if is_onnx(node, "ConstantOfShape"):
            return node
        if not is_onnx(node, *_MOVES):
            return None
        value = node.inputs[0]
    return None


def _number(node: ir.Node) -> ir.TensorProtocol:
    attribute = node.attributes.get("value")
    return ir.Tensor(np.zeros(1, np.float32)) if attribute is None else attribute.as_tensor()


class Uniforms:
    """Makes tensors of one number, equal ones of a graph once.

    Args:
        editor: of the run of a pass.
    """

    def __init__(self, editor: Editor) -> None:
        self._editor = editor
        self._made: dict[tuple[ir.Value, ir.DataType, bytes], ir.Value] = {}

    def like(self, old: ir.Value | None, before: ir.Node, number: float, wanted: str) -> ir.Value | str:
        """A tensor in the shape and type of a uniform one, or why there is none.

        Args:
            old: a tensor that `uniform` knows.
            before: the node that will read it.
            number: what it holds, rounded to its type.
            wanted: its name, where that is free.
        """
        tensor = constant(old)
        if old is not None and tensor is not None:
            data = _rounded(number, tensor.dtype)
            shape = tuple(int(d) for d in tensor.shape.numpy())
            return data if isinstance(data, str) else self._editor.constant(before, wanted, np.full(shape, data[0]))
        node = old.producer() if old is not None else None
        if old is None or node is None or not is_onnx(node, "ConstantOfShape") or node.inputs[0] is None:
            return "a weight is reshaped before it is read"
        return self._filled(node.inputs[0], _number(node).dtype, old.shape, before, number, wanted)

    def vector(self, length: int, dtype: ir.DataType, before: ir.Node, number: float, wanted: str) -> ir.Value | str:
        """A vector of one number."""
        shape = self._editor.sizes(before, f"{wanted}_shape", [length])
        return self._filled(shape, dtype, ir.Shape([length]), before, number, wanted)

    def _filled(
        self, shape: ir.Value, dtype: ir.DataType, dims: ir.Shape | None, before: ir.Node, number: float, wanted: str
    ) -> ir.Value | str:
        data = _rounded(number, dtype)
        if isinstance(data, str):
            return data
        graph, maker = before.graph, shape.producer()
        if not isinstance(graph, ir.Graph) or not (shape.graph is graph or (maker and maker.graph is graph)):
            return "the shape of a weight is given outside this body"
        key = (shape, dtype, data.tobytes())
        known = self._made.get(key)
        if known is None or known.graph is not graph:
            name = self._editor.fresh(wanted)
            node = ir.node(
                "ConstantOfShape", [shape], {"value": ir.Tensor(data, dtype=dtype)}, num_outputs=1, name=name
            )
            output = node.outputs[0]
            output.name, output.type, output.shape = name, ir.TensorType(dtype), dims
            # In front of all that may read it.
            if maker is None:
                graph.insert_before(graph[0], node)
            else:
                graph.insert_after(maker, node)
            self._made[key] = output
        return self._made[key]


def _rounded(number: float, dtype: ir.DataType) -> npt.NDArray[Any] | str:
    """One number in a type, or why it does not fit."""
    with np.errstate(over="ignore"):
        data = np.array([number]).astype(dtype.numpy())
    return data if np.isfinite(data.astype(np.float64)).all() else f"its number would not be finite in {dtype.name}"
