"""Write a quantisation plan into a model: QuantizeLinear/DequantizeLinear pairs, integer weights, int32 biases.

Everything is standard ONNX: per-tensor scales on activations, one scale per output channel on weights (opset 13), a
DequantizeLinear of its own for every parameter. A tensor gets one pair whoever reads it, and a weight that several
nodes read is stored once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from graphopt.errors import ModelError
from graphopt.numerics.rounding import (
    Affine,
    Grid,
    affine,
    least_weight_scale,
    quantise,
    quantise_bias,
    sqnr_db,
)
from graphopt.quantization.rounding.interface import Rounded, Rounding, WeightGrid, nearest
from graphopt.quantization.rounding.matrices import from_matrices, to_matrices
from graphopt.quantization.static.plan import Plan, Unit, name_of
from graphopt.quantization.weights.tied import Stored, share
from graphopt.rewriting.constants import array
from graphopt.rewriting.edit import drop_if_unused, new_initializer, remove_node
from graphopt.rewriting.names import Names
from graphopt.target import QuantScheme

Array = NDArray[Any]


@dataclass
class Emitter:
    """Writes one plan into one model (or a clone of it).

    Args:
        model: changed in place.
        plan: which nodes and tensors.
        activations: quantisation parameters by root tensor name.
        scheme: integer types of the target.
        per_channel: one weight scale per output channel.
        rounding: makes weights integers.

    Attributes:
        weight_sqnr: SQNR of the weight in dB by unit key, filled by `run`.
    """

    model: ir.Model
    plan: Plan
    activations: dict[str, Affine]
    scheme: QuantScheme
    per_channel: bool
    rounding: Rounding = nearest
    weight_sqnr: dict[str, float] = field(default_factory=dict)

    def run(self) -> None:
        """Rewrite the model."""
        graph = self.model.graph
        self._names = Names(self.model)
        self._values = {name_of(v): v for v in graph.inputs}
        for node in graph:
            self._values.update((v.name, v) for v in node.outputs if v.name)
        self._params: dict[str, tuple[ir.Value, ir.Value]] = {}
        self._dequantised: dict[str, ir.Value] = {}
        self._stands_for: dict[ir.Value | None, str] = {}
        self._tables: list[Stored] = []
        self._constants: dict[tuple[ir.Value, int | None, bytes], ir.Value] = {}
        for key, unit in self.plan.units.items():
            origin = self._values[key].producer()
            if origin is None:
                raise ModelError("the node of the plan is not in the model", where=unit.label)
            self._inputs(origin, unit)
            if unit.rule.integers_only:
                self._write_on_integers(origin, unit)
            elif unit.quantise_output:
                for name in unit.carriers:
                    self._publish(name)
        share(self.model, self._tables)
        for value in self._dequantised.values():
            # Its readers were all written on integers.
            idle = value.producer()
            if idle is not None and not value.uses() and not value.is_graph_output():
                remove_node(idle)

    # -- activations -------------------------------------------------------------------------------------------------

    def _root_params(self, name: str) -> Affine:
        return self.activations[self.plan.roots[name]]

    def _param_values(self, root: str) -> tuple[ir.Value, ir.Value]:
        if root not in self._params:
            params = self.activations[root]
            self._params[root] = self._store(root, params)
        return self._params[root]

    def _store(self, stem: str, params: Affine) -> tuple[ir.Value, ir.Value]:
        """Scale and zero point as initialisers."""
        graph = self.model.graph
        kind = ir.DataType.from_numpy(params.zero_point.dtype)
        scale = new_initializer(graph, self._names.fresh(f"{stem}_scale"), params.scale, ir.DataType.FLOAT)
        zero = new_initializer(graph, self._names.fresh(f"{stem}_zero_point"), params.zero_point, kind)
        return scale, zero

    def _pair(self, value: ir.Value) -> tuple[ir.Node, ir.Node]:
        """Q and DQ behind `value`, in the graph but without readers yet."""
        name = name_of(value)
        scale, zero = self._param_values(self.plan.roots[name])
        quantize = ir.node(
            "QuantizeLinear", [value, scale, zero], name=self._names.fresh(f"{name}_QuantizeLinear"),
            outputs=[self._like(value, f"{name}_quantized", zero.dtype)],
        )  # fmt: skip
        dequantize = self._dequantize(quantize.outputs[0], scale, zero, value)
        producer = value.producer()
        if producer is None:
            self.model.graph.insert_before(self.model.graph[0], [quantize, dequantize])
        else:
            self.model.graph.insert_after(producer, [quantize, dequantize])
        return quantize, dequantize

    def _dequantize(self, q: ir.Value, scale: ir.Value, zero: ir.Value | None, like: ir.Value) -> ir.Node:
        name = name_of(like)
        return ir.node(
            "DequantizeLinear", [q, scale] if zero is None else [q, scale, zero],
            name=self._names.fresh(f"{name}_DequantizeLinear"),
            outputs=[self._like(like, f"{name}_dequantized", ir.DataType.FLOAT)],
        )  # fmt: skip

    def _like(self, value: ir.Value, name: str, dtype: ir.DataType | None) -> ir.Value:
        kind = None if dtype is None else ir.TensorType(dtype)
        return ir.Value(name=self._names.fresh(name), type=kind, shape=value.shape)

    def _publish(self, name: str) -> None:
        """Put a pair behind an integer kernel's output; every reader gets the dequantised tensor."""
        value = self._values[name]
        readers = [(use.node, use.idx) for use in value.uses()]
        _, dequantize = self._pair(value)
        self._hand_over(value, dequantize.outputs[0], readers)
        self._dequantised_by(name, dequantize)

    def _hand_over(self, old: ir.Value, new: ir.Value, readers: list[tuple[ir.Node, int]]) -> None:
        """Let `readers`, and the graph's output list, take `new` for `old`; an output keeps its name."""
        for reader, index in readers:
            reader.replace_input_with(index, new)
        outputs = self.model.graph.outputs
        for position, value in enumerate(outputs):
            if value is old:
                name = name_of(old)
                outputs[position] = new
                old.name = self._names.fresh(f"{name}_float")
                new.name = name

    def _inputs(self, node: ir.Node, unit: Unit) -> None:
        first: Affine | None = None
        for index in unit.data:
            value = node.inputs[index]
            name = self._original(value)
            if name not in self._dequantised:
                self._dequantised_by(name, self._pair(self._values[name])[1])
            node.replace_input_with(index, self._dequantised[name])
            first = self._root_params(name) if first is None else first
        for index in unit.constants:
            self._constant_operand(node, index)
        if unit.weight is not None and first is not None:
            self._weight_and_bias(node, unit, first)

    def _original(self, value: ir.Value | None) -> str:
        """The name that the plan knows a tensor by, also after its readers were handed the dequantised one."""
        return self._stands_for[value] if value in self._stands_for else name_of(value)

    def _dequantised_by(self, name: str, node: ir.Node) -> None:
        """Let readers of a tensor that are still to come read the result of a DequantizeLinear."""
        self._dequantised[name] = node.outputs[0]
        self._stands_for[node.outputs[0]] = name

    # -- data movement written on integers -----------------------------------------------------------------------------

    def _write_on_integers(self, node: ir.Node, unit: Unit) -> None:
        """Move the node in front of the DequantizeLinear that it reads: x, DQ, op becomes x, op, DQ."""
        source = node.inputs[unit.data[0]]
        before = source.producer() if source is not None else None
        integers = before.inputs[0] if before is not None else None
        output = node.outputs[0]
        name = name_of(output)
        root = self.plan.roots[name]
        scale, zero = self._param_values(root)
        inputs = list(node.inputs)
        inputs[unit.data[0]] = integers
        if node.op_type == "Pad" and node.attributes.get_string("mode", "constant") == "constant":
            inputs[2:3] = [zero]
        moved = ir.node(
            node.op_type, inputs, name=node.name, metadata_props=dict(node.metadata_props),
            outputs=[self._like(output, f"{name}_quantized", zero.dtype)],
        )  # fmt: skip
        moved.attributes.update(node.attributes)
        dequantize = self._dequantize(moved.outputs[0], scale, zero, output)
        self.model.graph.insert_after(node, [moved, dequantize])
        readers = [(use.node, use.idx) for use in output.uses()]
        self._hand_over(output, dequantize.outputs[0], readers)
        self._dequantised_by(name, dequantize)
        remove_node(node)

    # -- constants -----------------------------------------------------------------------------------------------------

    def _constant_operand(self, node: ir.Node, index: int) -> None:
        """A constant operand of Add, Mul or Concat: integers of the activation type, one scale."""
        value = node.inputs[index]
        data = np.asarray(array(value), np.float32)
        grid = Grid.of(self.scheme.activation, symmetric=self.scheme.symmetric_activation)
        params = affine(float(data.min(initial=0.0)), float(data.max(initial=0.0)), grid)
        self._replace_constant(node, index, quantise(data, params), params)

    def _replace_constant(self, node: ir.Node, index: int, data: Array, params: Affine) -> ir.Value:
        old = node.inputs[index]
        assert old is not None
        # Rounding may decide for each layer, so that a shared weight is stored once where the integers agree.
        key = (old, params.axis, params.scale.tobytes() + sha256(data.tobytes()).digest())
        if key not in self._constants:
            self._constants[key] = self._stored_constant(old, data, params, node)
        new = self._constants[key]
        node.replace_input_with(index, new)
        drop_if_unused(old)
        return new

    def _stored_constant(self, old: ir.Value | None, data: Array, params: Affine, before: ir.Node) -> ir.Value:
        """Integers, scale, zero point and their DequantizeLinear, in front of the first node that reads them."""
        stem = name_of(old)
        kind = ir.DataType.from_numpy(data.dtype)
        integers = new_initializer(self.model.graph, self._names.fresh(f"{stem}_quantized"), data, kind)
        scale, zero = self._store(stem, params)
        attributes: dict[str, int] = {} if params.axis is None else {"axis": params.axis}
        name = self._names.fresh(f"{stem}_dequantized")
        out = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(data.shape))
        node = ir.node(
            "DequantizeLinear", [integers, scale, zero], attributes,
            name=self._names.fresh(f"{stem}_DequantizeLinear"), outputs=[out],
        )  # fmt: skip
        self.model.graph.insert_before(before, node)
        return out

    # -- weights -------------------------------------------------------------------------------------------------------

    def _weight_and_bias(self, node: ir.Node, unit: Unit, activation: Affine) -> None:
        if unit.weight is None:
            return
        old = node.inputs[unit.weight]
        weight = np.asarray(array(old), np.float32)
        if not np.isfinite(weight).all():
            raise ModelError("its weight holds inf or nan", where=unit.label, hint="exclude the node")
        alpha, beta = _gemm_factors(node)
        weight = weight * np.float32(alpha)
        axis = self._axis(node, unit, weight)
        bias_node, bias_index = self._bias_place(node, unit)
        if self.scheme.bias == "float":
            self._scale_bias(node, unit, beta)
            bias_node = None
        matrices = to_matrices(node, unit.weight, weight)
        bias = None
        floor: Array | float = 0.0
        if bias_node is not None:
            raw = np.asarray(array(bias_node.inputs[bias_index]), np.float64).reshape(-1) * beta
            bias = np.broadcast_to(raw, matrices.shape[0] * matrices.shape[1])
            floor = least_weight_scale(bias, activation.scale)
        found = self._rounded(unit.key, matrices, floor, per_channel=axis is not None)
        kind = np.dtype(self.scheme.weight)
        middle = Grid.of(kind, symmetric=True).middle
        integers = from_matrices(node, unit.weight, found.integers + middle, weight).astype(kind)
        scale = found.scale.reshape(() if axis is None else -1)
        params = Affine(scale, np.full(scale.shape, middle, kind), axis)
        stored = self._replace_constant(node, unit.weight, integers, params).producer()
        if axis == middle == 0 and alpha == 1 and old is not None and stored is not None:
            numbers, scales = stored.inputs[:2]
            assert numbers is not None and scales is not None
            self._tables.append(Stored(old, numbers, scales, rows=0))
        if bias is not None and bias_node is not None:
            steps, scale = quantise_bias(bias, activation.scale, params.scale)
            bias_params = Affine(scale, np.zeros(scale.shape, np.int32), None if scale.ndim == 0 else 0)
            self._replace_constant(bias_node, bias_index, steps, bias_params)

    def _rounded(self, key: str, matrices: Array, floor: Array | float, *, per_channel: bool) -> Rounded:
        """A weight on its grid; `floor` holds the smallest scales by output channel, or 0."""
        by_row = per_channel and np.ndim(floor) > 0
        least = np.reshape(floor, (*matrices.shape[:2], 1)) if by_row else float(np.max(floor, initial=0.0))
        found = self.rounding(key, matrices, WeightGrid(per_channel=per_channel), least)
        self.weight_sqnr[key] = sqnr_db(matrices, found.dequantised())
        return found

    def _scale_bias(self, node: ir.Node, unit: Unit, beta: float) -> None:
        """Put a Gemm's beta into the bias, which stays in float."""
        if unit.bias is None or beta == 1:
            return
        old = node.inputs[unit.bias]
        data = np.asarray(array(old), np.float32) * np.float32(beta)
        name = self._names.fresh(f"{name_of(old)}_scaled")
        node.replace_input_with(unit.bias, new_initializer(self.model.graph, name, data, ir.DataType.FLOAT))
        drop_if_unused(old)

    def _axis(self, node: ir.Node, unit: Unit, weight: Array) -> int | None:
        """The axis of per-channel scales; None where the kernel takes one scale only."""
        if not self.per_channel or (self.scheme.per_channel_ops and node.op_type not in self.scheme.per_channel_ops):
            return None
        if node.op_type == "MatMul" and (unit.weight != 1 or weight.ndim != 2):
            return None
        if node.op_type == "ConvTranspose" and node.attributes.get_int("group", 1) != 1:
            return None
        return _channel_axis(node, unit)

    def _bias_place(self, node: ir.Node, unit: Unit) -> tuple[ir.Node | None, int]:
        if unit.bias is not None:
            return node, unit.bias
        adder = self._values[unit.bias_add].producer() if unit.bias_add else None
        if adder is None or not _becomes_gemm(node):
            return None, 0
        index = next(i for i, v in enumerate(adder.inputs) if v is not node.outputs[0])
        return adder, index


def _channel_axis(node: ir.Node, unit: Unit) -> int:
    """The axis of the weight that counts output channels."""
    if node.op_type == "Gemm":
        return 0 if node.attributes.get_int("transB", 0) else 1
    return unit.rule.channel_axis or 0


def _gemm_factors(node: ir.Node) -> tuple[float, float]:
    """alpha and beta of a Gemm, which go into its weight and bias; the node is left with 1 and 1."""
    if node.op_type != "Gemm":
        return 1.0, 1.0
    alpha, beta = node.attributes.get_float("alpha", 1.0), node.attributes.get_float("beta", 1.0)
    for name in ("alpha", "beta"):
        node.attributes.pop(name, None)
    return float(alpha), float(beta)


def _becomes_gemm(node: ir.Node) -> bool:
    """Whether ONNX Runtime turns MatMul + Add into Gemm: for matrices and for static shapes.

    A Gemm is executed on integers only if its bias is int32; a MatMul + Add that stays as it is keeps a float bias.
    """
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    if shape is None:
        return False
    return len(shape) == 2 or all(isinstance(d, int) for d in shape)
