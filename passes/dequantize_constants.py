"""dequantize-constants: weights that are stored as integers, written as the floats they stand for.

    (q - z) s        s, z: one number, one per position of an axis, or one per block along it

What for: targets and tools that know no DequantizeLinear. The file grows by what the integers had saved, which is why
`fold` does this on request only (`fold{dequantize=true}`). Activations keep their rounding: `dequantize` drops it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.base import Context, Effect, Pass, PassResult, Skip
from graphopt.rewriting.constants import Float64, constant
from graphopt.rewriting.edit import cannot_replace, new_initializer, remove_node, replace_value
from graphopt.rewriting.names import Names
from graphopt.rewriting.nodes import is_onnx, label, mark_origin
from graphopt.rewriting.row_blocks import Rows, rounded
from graphopt.rewriting.scopes import scopes
from graphopt.rewriting.weight_pass import finish


@dataclass(frozen=True)
class DequantizeConstants(Pass):
    """Compute DequantizeLinear of constants: integer weights become the floats that they stand for.

    Algebra: (q - z) s in float64, rounded once to the type of the scale, per tensor, per axis and per block.

    Does not fire: where integers, scale or zero point are computed, on outputs of the graph. A weight that several
    nodes dequantise becomes floats once for each of them (`merge-common-subexpressions` before makes that one).
    Preserves: every value but the integers, which go where nobody reads them.
    Source: the operator specification of ONNX.
    """

    name: ClassVar[str] = "dequantize-constants"
    effect: ClassVar[Effect] = Effect.EXACT

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Dequantise every constant of `model`."""
        result = PassResult(changed=False)
        names = Names(model)
        count = 0
        for graph, _ in scopes(model):
            for node in tuple(graph):
                if not is_onnx(node, "DequantizeLinear") or constant(node.inputs[0]) is None:
                    continue
                reason = _dequantize(node, graph, names)
                if reason:
                    result.skipped.append(Skip(label(node), reason))
                else:
                    count += 1
        if count:
            finish(model, result, f"{count} integer constants written as the floats that they stand for")
        return result


def _dequantize(node: ir.Node, graph: ir.Graph, names: Names) -> str | None:
    tensors = [constant(v) if v is not None else None for v in node.inputs]
    if any(v is not None and t is None for v, t in zip(node.inputs, tensors, strict=True)):
        return "its scale or zero point is not constant"
    if any(a.is_ref() for a in node.attributes.values()):
        return "an attribute of it is given by the caller of the function"
    quantised, scale = tensors[0], tensors[1]
    assert quantised is not None and scale is not None
    offset = tensors[2] if len(tensors) > 2 else None
    output = node.outputs[0]
    integers = np.asarray(quantised.numpy())
    factor = np.asarray(scale.numpy()).astype(np.float64)
    zero = np.zeros_like(factor) if offset is None else np.asarray(offset.numpy()).astype(np.float64)
    axis, block = node.attributes.get_int("axis", 1), node.attributes.get_int("block_size", 0)
    zeros, factors = (_spread(numbers, integers.shape, axis, block) for numbers in (zero, factor))
    if zeros is None or factors is None:
        return f"scale or zero point of shape {factor.shape} do not fit {integers.shape} along axis {axis}"
    if output.is_graph_output():
        return "its result is a graph output"
    dtype = scale.dtype
    wanted = node.attributes.get_int("output_dtype", 0)
    if wanted:
        dtype = ir.DataType(wanted)
    source = node.inputs[0]
    name = str(source.name).removesuffix("_quantized") if source is not None else str(output.name)
    floats = rounded(
        integers.shape, dtype.numpy(), lambda rows: (integers[rows].astype(np.float64) - zeros(rows)) * factors(rows)
    )
    value = new_initializer(graph, names.fresh(name), floats, dtype)
    mark_origin(value, [label(node)])
    reason = cannot_replace(output, value)
    if reason:
        return reason
    replace_value(output, value)
    remove_node(node)
    return None


def _spread(numbers: Float64, shape: tuple[int, ...], axis: int, block: int) -> Callable[[Rows], Float64] | None:
    """For rows of an array of `shape`: `numbers`, one, one per position of `axis` or one per block, to broadcast there.

    None where they do not fit.
    """
    if numbers.size == 1 and not block:
        return lambda rows: numbers.reshape(())
    if not -len(shape) <= axis < len(shape):
        return None
    axis %= len(shape)
    if block:
        wanted = tuple(-(-length // block) if a == axis else length for a, length in enumerate(shape))
        if numbers.shape != wanted:
            return None
        index = np.arange(shape[axis]) // block
        return lambda rows: numbers[index[rows]] if axis == 0 else np.take(numbers[rows], index, axis=axis)
    if numbers.shape != (shape[axis],):
        return None
    spread = np.broadcast_to(numbers.reshape([-1 if a == axis else 1 for a in range(len(shape))]), shape)
    return lambda rows: spread[rows]
