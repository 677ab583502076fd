"""Write matrix products on integers whose activations are quantised as they arrive (standard ONNX, opset 11).

    x^, s_x, z_x = DynamicQuantizeLinear(x)                       uint8, the extremes of x at run time
    y            = float((x^ - z_x) @ w^) * (s_x * s_w) + b       MatMulInteger, Cast, Mul, Mul, Add

ONNX Runtime makes one kernel of this form: DynamicQuantizeMatMul where the product is the only reader of x^, and
MatMulIntegerToFloat where several products read it, either with the bias in it. A tensor is quantised once in each
graph, however many products read it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from graphopt.quantization.rounding.interface import Rounding, WeightGrid
from graphopt.quantization.weights.tied import Stored, share
from graphopt.rewriting.constants import array
from graphopt.rewriting.edit import drop_if_unused, new_initializer, remove_node, replace_value, sole_use
from graphopt.rewriting.names import Names
from graphopt.rewriting.nodes import is_onnx

Attributes = Mapping[str, Any] | None


class Quantised(NamedTuple):
    """A tensor as integers: (integers - zero) * scale."""

    integers: ir.Value
    scale: ir.Value
    zero: ir.Value | None


@dataclass
class ProductWriter:
    """Rewrites products of one model; what they share, a tensor or a weight, is quantised once.

    Args:
        model: changed in place.
        rounding: what decides how weights are rounded.
        per_channel: one weight scale per output channel.
    """

    model: ir.Model
    rounding: Rounding
    per_channel: bool = True

    def __post_init__(self) -> None:
        self._names = Names(self.model)
        self._activations: dict[tuple[ir.Graph, ir.Value], Quantised] = {}
        self._weights: dict[tuple[ir.Value, bool, float], Quantised] = {}

    def write(self, node: ir.Node) -> None:
        """Replace a MatMul or Gemm that `graphopt.quantization.dynamic.scheme.product_reason` has nothing against."""
        if is_onnx(node, "Gemm"):
            self._gemm(node)
        else:
            self._matmul(node)

    def share_tables(self) -> None:
        """Let look-ups read the integers of weights that are tables, too (`graphopt.quantization.weights.tied`)."""
        share(
            self.model,
            [
                Stored(weight, found.integers, found.scale, int(transposed))
                for (weight, transposed, factor), found in self._weights.items()
                if factor == 1 and weight.uses()
            ],
        )

    def _matmul(self, node: ir.Node) -> None:
        x, weight = node.inputs
        assert x is not None and weight is not None
        left = self._activation(node, x)
        constant = array(weight) is not None
        right = self._weight(node, weight) if constant else self._activation(node, weight)
        product, made = self._product(node, left, right)
        _graph(node).insert_before(node, made)
        if constant:
            self._flat_bias(node)
        take_over(node, [product])

    def _gemm(self, node: ir.Node) -> None:
        attributes = node.attributes
        x, weight = node.inputs[0], node.inputs[1]
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        assert x is not None and weight is not None
        made: list[ir.Node] = []
        if attributes.get_int("transA", 0):
            turned = self._node("Transpose", [x], node, "turned", {"perm": [1, 0]})
            _graph(node).insert_before(node, turned)
            x = turned.outputs[0]
        left = self._activation(node, x)
        alpha = float(attributes.get_float("alpha", 1.0))
        right = self._weight(node, weight, transposed=bool(attributes.get_int("transB", 0)), factor=alpha)
        product, made = self._product(node, left, right)
        if bias is not None:
            term, before = self._gemm_bias(node, bias, float(attributes.get_float("beta", 1.0)))
            total = self._node("Add", [product, term], node, "biased")
            made = [*made, *before, total]
            product = total.outputs[0]
        _graph(node).insert_before(node, made)
        take_over(node, [product])

    def _gemm_bias(self, node: ir.Node, bias: ir.Value, beta: float) -> tuple[ir.Value, list[ir.Node]]:
        """beta times C, one number per column where C is constant and may be stored so."""
        data = array(bias)
        if data is None:
            if beta == 1:
                return bias, []
            factor = self._constant(node, "beta", np.asarray(beta, np.float32))
            scaled = self._node("Mul", [bias, factor], node, "scaled_bias")
            return scaled.outputs[0], [scaled]
        flat = data.reshape(-1) if data.ndim == 2 and data.shape[0] == 1 else data
        if beta == 1 and flat.shape == data.shape:
            return bias, []
        return self._constant(node, "bias", np.asarray(flat, np.float32) * np.float32(beta)), []

    def _product(self, node: ir.Node, left: Quantised, right: Quantised) -> tuple[ir.Value, list[ir.Node]]:
        """The nodes between the integers and the float result, in order."""
        zeros = [left.zero] if right.zero is None else [left.zero, right.zero]
        product = self._node("MatMulInteger", [left.integers, right.integers, *zeros], node, "int32")
        product.name = node.name or product.name
        product.metadata_props.update(node.metadata_props)
        wide = self._node("Cast", [product.outputs[0]], node, "float", {"to": int(ir.DataType.FLOAT)})
        scale = self._node("Mul", [left.scale, right.scale], node, "scale")
        scaled = self._node("Mul", [wide.outputs[0], scale.outputs[0]], node, "scaled")
        return scaled.outputs[0], [product, wide, scale, scaled]

    def _activation(self, node: ir.Node, x: ir.Value) -> Quantised:
        graph = _graph(node)
        if (graph, x) not in self._activations:
            name = str(x.name)
            kinds = (("quantized", ir.DataType.UINT8), ("scale", ir.DataType.FLOAT), ("zero_point", ir.DataType.UINT8))
            outputs = [
                ir.Value(
                    name=self._names.fresh(f"{name}_{part}"),
                    type=ir.TensorType(kind),
                    shape=x.shape if part == "quantized" else ir.Shape(()),
                )
                for part, kind in kinds
            ]
            quantize = ir.node(
                "DynamicQuantizeLinear", [x], outputs=outputs, name=self._names.fresh(f"{name}_DynamicQuantizeLinear")
            )
            producer = x.producer()
            if producer is not None and producer.graph is graph:
                graph.insert_after(producer, quantize)
            else:
                graph.insert_before(graph[0], quantize)
            self._activations[graph, x] = Quantised(*outputs)
        return self._activations[graph, x]

    def _weight(self, node: ir.Node, weight: ir.Value, *, transposed: bool = False, factor: float = 1.0) -> Quantised:
        """Integers of shape (..., inputs, outputs); stored in the main graph, where every body sees them."""
        key = (weight, transposed, factor)
        if key not in self._weights:
            data = np.asarray(array(weight), np.float64) * factor
            matrices = data if transposed else data.swapaxes(-1, -2)
            stacked = matrices.reshape(-1, *matrices.shape[-2:])
            # Kernels take one scale a column for a single matrix, and one scale for several.
            grid = WeightGrid(per_channel=self.per_channel and data.ndim == 2)
            rounded = self.rounding(str(node.outputs[0].name), stacked, grid)
            integers = rounded.integers.reshape(matrices.shape).swapaxes(-1, -2).astype(np.int8)
            scale = rounded.scale.reshape(-1) if grid.per_channel else rounded.scale.reshape(())
            graph, stem = self.model.graph, str(weight.name)
            self._weights[key] = Quantised(
                new_initializer(graph, self._names.fresh(f"{stem}_quantized"), integers, ir.DataType.INT8),
                new_initializer(graph, self._names.fresh(f"{stem}_scale"), scale, ir.DataType.FLOAT),
                None,
            )
        return self._weights[key]

    def _flat_bias(self, node: ir.Node) -> None:
        """Write the bias (1, ..., 1, outputs) of an Add behind a MatMul as (outputs,), which kernels take in."""
        use, shape = sole_use(node.outputs[0]), node.outputs[0].shape
        if use is None or not is_onnx(use.node, "Add"):
            return
        index = 1 - use.idx
        old = use.node.inputs[index]
        data = array(old)
        if data is None or data.ndim < 2 or data.size != data.shape[-1] or shape is None or data.ndim > len(shape):
            return
        use.node.replace_input_with(index, self._constant(node, "bias", data.reshape(-1)))
        drop_if_unused(old)

    def _constant(self, node: ir.Node, what: str, data: NDArray[Any]) -> ir.Value:
        name = self._names.fresh(f"{node.outputs[0].name}_{what}")
        return new_initializer(self.model.graph, name, data, ir.DataType.FLOAT)

    def _node(
        self, op: str, inputs: Sequence[ir.Value | None], like: ir.Node, what: str, attributes: Attributes = None
    ) -> ir.Node:
        """A node whose names derive from those of `like`."""
        stem = str(like.outputs[0].name)
        kind = ir.DataType.INT32 if op == "MatMulInteger" else ir.DataType.FLOAT
        output = ir.Value(name=self._names.fresh(f"{stem}_{what}"), type=ir.TensorType(kind))
        return ir.node(op, inputs, attributes, outputs=[output], name=self._names.fresh(f"{like.name or stem}_{op}"))


def _graph(node: ir.Node) -> ir.Graph:
    assert isinstance(node.graph, ir.Graph)
    return node.graph


def take_over(node: ir.Node, results: Sequence[ir.Value]) -> None:
    """Let readers of a node's outputs read `results`, under the names the outputs had, and remove the node."""
    for old, result in zip(node.outputs, results, strict=True):
        if not old.name:
            continue
        name, given_out = old.name, old.is_graph_output()
        replace_value(old, result)
        if not given_out:
            old.name, result.name = f"{name}_replaced", name
    remove_node(node)
