"""Products and look-ups whose weights stay integers while they are computed: MatMulNBits and GatherBlockQuantized.

    y = x W + b,   W[k, n] = (B[n, k] - zero[n, k // block]) scale[n, k // block]        com.microsoft, ONNX Runtime

B is packed row by row of outputs, K padded to whole blocks. `accuracy_level=4` lets the kernel make int8 of x, block by
block, as it arrives: 0.5 % of the result's norm, and several times faster than the default, which multiplies in float.
A table that a Gather and a product share is stored once: GatherBlockQuantized takes the same bytes in rows.
Source: ONNX Runtime, docs/ContribOperators.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.numerics.bit_packing import pack
from graphopt.quantization.rounding.interface import Rounding, WeightGrid
from graphopt.quantization.weights.readers import Array, Reader, Weight
from graphopt.rewriting.constants import array
from graphopt.rewriting.edit import drop_if_unused, new_initializer
from graphopt.rewriting.names import Names
from graphopt.rewriting.nodes import is_onnx
from graphopt.target import WeightKernels

DOMAIN = "com.microsoft"
SMALLEST_BLOCK, LARGEST_BLOCK = 16, 256
MOST_PADDING = 1 / 8
"""Share of the columns that padding to whole blocks may add before blocks get smaller."""


def kernel_block(columns: int, wanted: int) -> int:
    """The largest power of two from 16 to 256, at most `wanted`, that pads columns by an eighth at most; else 16."""
    block = LARGEST_BLOCK
    while block > SMALLEST_BLOCK and (block > wanted or -columns % block > MOST_PADDING * columns):
        block //= 2
    return block


def kernel_reason(weight: Weight, kernels: WeightKernels, bits: int, block: int) -> str | None:
    """Why no kernel computes from a weight's integers, or none that gains; None where one does.

    Args:
        weight: all of its readers are asked.
        kernels: of the target.
        bits: 4 or 8.
        block: columns that share a scale (`kernel_block`).
    """
    if kernels.form != "MatMulNBits":
        return "the target has no kernel that computes from blocks of integers"
    shape = weight.array.shape
    if weight.tensor.dtype != ir.DataType.FLOAT:
        return f"the kernels compute in float32, not {weight.tensor.dtype.name.lower()}"
    if len(shape) != 2:
        return f"the kernels take matrices, and its weight has {len(shape)} axes"
    lookups = [r for r in weight.readers if is_onnx(r.node, "Gather")]
    products = [r for r in weight.readers if r not in lookups]
    for reader in products:
        reason = _no_product(reader)
        if reason:
            return reason
    if len({reader.rows_first for reader in weight.readers}) > 1:
        return "one of its readers takes it transposed"
    columns = shape[1] if weight.readers[0].rows_first else shape[0]
    if products:
        rows = shape[0] if weight.readers[0].rows_first else shape[1]
        least = kernels.inputs if block >= kernels.block else kernels.inputs_small_block
        if columns < least or rows < kernels.outputs:
            return (
                f"products of less than {least} to {kernels.outputs} channels are faster in float than from such blocks"
            )
        if lookups and columns % block:
            return f"rows of {columns} are no whole blocks of {block}, which a look-up and a product could share"
    elif weight.tensor.nbytes < kernels.table:
        return f"a table below {kernels.table} bytes is looked up faster in float"
    elif bits == 4 and columns % 2:
        return f"rows of {columns} numbers of 4 bits are no whole bytes"
    return None


def _no_product(reader: Reader) -> str | None:
    """Why a reader cannot become MatMulNBits."""
    node = reader.node
    if not is_onnx(node, "MatMul", "Gemm"):
        return f"no kernel computes {node.op_type} from integer weights and float activations"
    if reader.index != 1:
        return "the kernels take constants on the right of a product"
    if is_onnx(node, "Gemm"):
        if node.attributes.get_int("transA", 0):
            return "the kernels take no transposed activations"
        return None if _gemm_bias(node) is not None else "its bias is not one constant per output channel"
    rank = node.inputs[0].shape if node.inputs[0] is not None else None
    if rank is None or len(rank) < 2:
        return "its input is no matrix, or has an unknown rank"
    return None


def _gemm_bias(node: ir.Node) -> Array | float | None:
    """beta times the constant that a Gemm adds, per output or one for all; 0 where it adds none; None: no such."""
    value = node.inputs[2] if len(node.inputs) > 2 else None
    if value is None:
        return 0.0
    data = array(value)
    if data is None or (data.ndim > 1 and data.size != data.shape[-1]):
        return None
    return np.asarray(data, np.float32).reshape(-1) * np.float32(node.attributes.get_float("beta", 1.0))


def compute_from_blocks(
    model: ir.Model,
    weight: Weight,
    names: Names,
    *,
    bits: int,
    block: int,
    symmetric: bool,
    rounding: Rounding,
) -> None:
    """Let kernels that read integers stand for all readers of a weight; `kernel_reason` found nothing against it.

    Args:
        model: the weight is its.
        weight: float32, (rows, columns) or (columns, rows).
        names: of the model.
        bits: 4 or 8.
        block: power of two from 16 to 256.
        symmetric: without zero points.
        rounding: called with the key of the first reader.
    """
    reader, like = weight.readers[0], weight.array
    grid = WeightGrid(bits, symmetric, True, block, full=symmetric and bits < 8)
    rounded = rounding(reader.key, reader.matrices(like).astype(np.float64), grid)
    middle = (1 << bits - 1) if symmetric else 0
    integers = rounded.integers[0] + middle
    rows, columns = integers.shape
    home = _home(weight.value)
    stem = weight.value.name

    def stored(what: str, data: Array) -> ir.Value:
        return new_initializer(home, names.fresh(f"{stem}_{what}"), data, ir.DataType.from_numpy(data.dtype))

    products = [r for r in weight.readers if not is_onnx(r.node, "Gather")]
    if products:
        padding = np.repeat(rounded.zero[0][:, -1:] + middle, -columns % block, axis=1)
        data = pack(np.concatenate([integers, padding], axis=1).reshape(rows, -1, block), bits)
    else:
        data = pack(integers, bits)
    parts = _Parts(
        stored("quantized", data),
        stored("scale", rounded.scale[0]),
        None if symmetric else stored("zero_point", pack(rounded.zero[0], bits)),
    )
    own = {"bits": bits, "block_size": block}
    for found in products:
        _product(found, parts, names, rows, {"K": columns, "N": rows, "accuracy_level": 4, **own})
    lookups = [r for r in weight.readers if r not in products]
    if lookups and products:
        parts = _in_rows(parts, lookups[0].node, names, stored("rows", np.array([0, -1], np.int64)))
    for found in lookups:
        _look_up(found, parts, names, {"gather_axis": 0, "quantize_axis": 1, **own})
    for t in {r.transpose for r in products if r.transpose is not None}:
        if not t.outputs[0].uses() and t.graph is not None:
            t.graph.remove(t, safe=True)
    for value in (weight.value, parts.scale):
        drop_if_unused(value)
    model.graph.opset_imports.setdefault(DOMAIN, 1)


@dataclass(frozen=True)
class _Parts:
    data: ir.Value
    scale: ir.Value
    zero: ir.Value | None


def _home(value: ir.Value) -> ir.Graph:
    producer = value.producer()
    graph = value.graph if producer is None else producer.graph
    assert isinstance(graph, ir.Graph)
    return graph


def _product(reader: Reader, parts: _Parts, names: Names, rows: int, attributes: dict[str, int]) -> None:
    node = reader.node
    inputs = [node.inputs[0], parts.data, parts.scale, parts.zero]
    if is_onnx(node, "Gemm"):
        bias = _gemm_bias(node)
        alpha = node.attributes.get_float("alpha", 1.0)
        assert node.graph is not None and bias is not None and isinstance(node.graph, ir.Graph)
        if alpha != 1:
            scale = np.asarray(array(parts.scale)) * np.float32(alpha)
            name = names.fresh(f"{parts.scale.name}_alpha")
            inputs[2] = new_initializer(node.graph, name, scale, ir.DataType.FLOAT)
        if np.any(bias):
            name = names.fresh(f"{parts.data.name}_bias")
            data = np.array(np.broadcast_to(bias, rows), np.float32)
            inputs += [None, new_initializer(node.graph, name, data, ir.DataType.FLOAT)]
    if inputs[-1] is None:
        inputs = inputs[:-1]
    _replace(node, ir.node("MatMulNBits", inputs, attributes, domain=DOMAIN, name=node.name))


def _in_rows(parts: _Parts, before: ir.Node, names: Names, shape: ir.Value) -> _Parts:
    """The same bytes without an axis of blocks, as a look-up takes them; runtimes fold it when they load."""
    rows = ir.node("Reshape", [parts.data, shape], name=names.fresh(f"{parts.data.name}_rows"))
    rows.outputs[0].name = names.fresh(f"{rows.name}_0")
    home = parts.data.graph
    assert isinstance(home, ir.Graph) and before is not None
    home.insert_before(home[0], rows)
    return _Parts(rows.outputs[0], parts.scale, parts.zero)


def _look_up(reader: Reader, parts: _Parts, names: Names, attributes: dict[str, int]) -> None:
    node = reader.node
    inputs = [parts.data, node.inputs[1], parts.scale, *([parts.zero] if parts.zero is not None else [])]
    _replace(node, ir.node("GatherBlockQuantized", inputs, attributes, domain=DOMAIN, name=node.name))


def _replace(node: ir.Node, new: ir.Node) -> None:
    """Put a node in the place of another one; constants that nobody reads any more go."""
    assert node.graph is not None
    old, inputs = list(node.outputs), list(node.inputs)
    new.metadata_props.update(node.metadata_props)
    ir.convenience.replace_nodes_and_values(node.graph, node, [node], [new], old, list(new.outputs))
    for value in inputs[1:]:
        drop_if_unused(value)
