"""One view of Conv, ConvTranspose, Gemm and MatMul (+ Add): y = W x + b, with channels on both sides.

Per output channel o and input channel i (with kernel positions k summed over the window):

    y_o = sum_i,k W_oik x_ik + b_o
    a_o y_o + c_o        =  y with  W'_oik = a_o W_oik,  b'_o = a_o b_o + c_o            `fold_after`
    y(a_i x_i + c_i)     =  y with  W'_oik = W_oik a_i,  b'_o = b_o + sum_i,k W_oik c_i  `fold_before`

The second sum holds at a pixel only if every kernel position meets a true input there. Zero padding is inserted after
the shift, so at the border it does not see c; a transposed convolution meets another subset of the kernel at every
phase. There only c = 0 is exact: `shift_blocked` says so.

All sums are taken in float64 and rounded once to the dtype of the weight. `Linear` changes nothing until the result is
known to be finite and to keep the precision of that dtype (a float16 weight times 1e-5 would become subnormal).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.errors import ModelError
from graphopt.rewriting.constants import Float64, array, constant, float64
from graphopt.rewriting.edit import new_initializer, replace_value, set_constant, sole_use
from graphopt.rewriting.large_weights import LARGE, carried, scaled
from graphopt.rewriting.names import Names
from graphopt.rewriting.nodes import is_onnx, label, mark_origin
from graphopt.rewriting.precision import misfit, misfit_of_bias
from graphopt.rewriting.row_blocks import row_blocks

LINEAR_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True)
class Linear:
    """A linear node whose weight may be changed. Made by `linear_view`.

    Attributes:
        node: the Conv, ConvTranspose, Gemm or MatMul.
        add: the Add that holds the bias of a MatMul; None where there is none, and for the other operators.
        bias_index: which input of `add` (MatMul) or `node` (others) is the bias.
        output: y, after the bias.
        groups, inputs, outputs: channel counts, whole, not per group.
        factor: what the product is multiplied by before the bias is added (Gemm's alpha).
    """

    node: ir.Node
    add: ir.Node | None
    bias_index: int
    output: ir.Value
    groups: int
    inputs: int
    outputs: int
    factor: float = 1.0

    @property
    def input(self) -> ir.Value:
        """x."""
        value = self.node.inputs[0]
        assert value is not None  # linear_view checked it
        return value

    def channel_axis(self, rank: int) -> int:
        """The axis of a tensor of this rank, x or y, along which channels run."""
        return rank - 1 if is_onnx(self.node, "MatMul") else 1

    @property
    def weight_size(self) -> int:
        """Numbers in the weight."""
        return math.prod(_weight_shape(self.node))

    @property
    def kernel(self) -> tuple[int, ...]:
        """Spatial sizes of a convolution's kernel; () for Gemm and MatMul."""
        return _weight_shape(self.node)[2:]

    def matrices(self) -> Float64:
        """W in float64, (groups, outputs per group, inputs per group, kernel positions); Gemm's alpha is in it.

        A new array, in any memory order.
        """
        weight = self._weight()
        weight *= self.factor
        return weight

    def add_to(self, total: Float64, sign: float) -> None:
        """Add W times `sign` to `total`, which is as `matrices` gives it, with no second array in float64."""
        data = array(self.node.inputs[1])
        assert data is not None  # linear_view checked it
        for group, own in zip(total, self._laid_out(data), strict=True):
            for rows in row_blocks(own.shape):
                group[rows] += sign * (own[rows].astype(np.float64) * self.factor)

    def bias(self) -> Float64:
        """b in float64, (outputs,); Gemm's beta is in it, and it is zero where there is none."""
        return self._bias()

    def replace(self, weight: Float64, bias: Float64, names: Names, origin: Iterable[str]) -> str | None:
        """Make the node compute another map with the same kernel; groups and channel counts may differ.

        Args:
            weight: as `matrices` returns it.
            bias: (outputs,).
            names: of the model, for a new bias.
            origin: provenance.

        Returns:
            None where it was done, otherwise the reason why it cannot be, and then nothing changed.
        """
        reason = misfit(weight, bias, self._dtype)
        if reason:
            return reason
        if is_onnx(self.node, "Conv", "ConvTranspose"):
            self.node.attributes["group"] = ir.AttrInt64("group", weight.shape[0])
            if weight.shape[0] == 1:
                self.node.attributes.pop("group")
        self.node.attributes.pop("alpha", None)
        return self._store(weight, bias, names, origin)

    def shift_blocked(self) -> str | None:
        """Why a constant added to x is not a constant added to y; None where it is."""
        node = self.node
        if is_onnx(node, "Gemm", "MatMul"):
            return None
        kernel = _weight_shape(node)[2:]
        if is_onnx(node, "ConvTranspose"):
            plain = all(k == 1 for k in kernel) and not any(node.attributes.get_ints("pads", ()))
            plain = plain and all(s == 1 for s in node.attributes.get_ints("strides", ()))
            plain = plain and not any(node.attributes.get_ints("output_padding", ()))
            plain = plain and "output_shape" not in node.attributes
            return None if plain else "a shift before a transposed convolution is not constant after it"
        auto = node.attributes.get_string("auto_pad", "NOTSET")
        padded = any(node.attributes.get_ints("pads", ())) if auto == "NOTSET" else auto != "VALID"
        if padded and not (auto.startswith("SAME") and all(k == 1 for k in kernel)):
            return "the convolution is zero-padded, and at the border the padding does not carry the shift"
        return None

    def fold_after(self, scale: Float64, shift: Float64, names: Names, origin: Iterable[str]) -> str | None:
        """Make the node compute scale * y + shift.

        Args:
            scale, shift: one number per output channel, or one for all.
            names: of the model, for a new bias.
            origin: provenance.

        Returns:
            None where it was done, otherwise the reason why it cannot be, and then nothing changed.
        """
        scale, shift = np.broadcast_to(scale, self.outputs), np.broadcast_to(shift, self.outputs)
        bias = self._bias() * scale + shift
        if self._is_large:
            return self._store_large(scale, self._output_axis, bias, names, origin)
        return self._store(self._weight() * scale.reshape(self.groups, -1, 1, 1), bias, names, origin)

    def fold_before(self, scale: Float64, shift: Float64, names: Names, origin: Iterable[str]) -> str | None:
        """Make the node compute y(scale * x + shift); arguments (per input channel) and result as in `fold_after`."""
        reason = self.before_blocked(scale, shift)
        if self._is_large and not reason:
            scale = np.broadcast_to(scale, self.inputs)
            return self._store_large(scale, 1 - self._output_axis, self._shifted(shift), names, origin)
        return reason or self._store(*self._folded_before(scale, shift), names, origin)

    def before_blocked(self, scale: Float64, shift: Float64) -> str | None:
        """Why `fold_before` would refuse; None where it would not. Changes nothing."""
        blocked = self.shift_blocked() if shift.any() else None
        if self._is_large and not blocked:
            found = scaled(self._tensor, np.broadcast_to(scale, self.inputs), 1 - self._output_axis, self._output_axis)
            return found if isinstance(found, str) else misfit_of_bias(self._shifted(shift), self._dtype)
        return blocked or misfit(*self._folded_before(scale, shift), self._dtype)

    def _folded_before(self, scale: Float64, shift: Float64) -> tuple[Float64, Float64]:
        scale, shift = np.broadcast_to(scale, self.inputs), np.broadcast_to(shift, self.inputs)
        old = self._weight()
        carried = (old * shift.reshape(self.groups, 1, -1, 1)).sum(axis=(2, 3)).ravel()
        return old * scale.reshape(self.groups, 1, -1, 1), self._bias() + self.factor * carried

    # -- storage: the weight as (groups, outputs per group, inputs per group, kernel positions) ------------------------

    def _weight(self) -> Float64:
        data = float64(self.node.inputs[1])
        assert data is not None  # linear_view checked it
        return self._laid_out(data)

    def _laid_out(self, data: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """A view of the weight as it is stored."""
        match self.node.op_type:
            case "Conv":
                return data.reshape(self.groups, self.outputs // self.groups, self.inputs // self.groups, -1)
            case "ConvTranspose":
                inner = data.reshape(self.groups, self.inputs // self.groups, self.outputs // self.groups, -1)
                return inner.swapaxes(1, 2)
            case _:
                return (data if self._transposed else data.T)[None, :, :, None]

    @property
    def _tensor(self) -> ir.TensorProtocol:
        tensor = constant(self.node.inputs[1])
        assert tensor is not None  # linear_view checked it
        return tensor

    @property
    def _dtype(self) -> ir.DataType:
        return self._tensor.dtype

    # -- large weights: scaled in pieces, when they are read ----------------------------------------------------------

    @property
    def _is_large(self) -> bool:
        weight = self.node.inputs[1]
        return self._tensor.nbytes >= LARGE and self.groups == 1 and weight is not None and weight.is_initializer()

    @property
    def _output_axis(self) -> int:
        return 0 if self._transposed or is_onnx(self.node, "Conv") else 1

    def _shifted(self, shift: Float64) -> Float64:
        """The bias where `shift` is added to the inputs."""
        moved = carried(self._tensor, np.broadcast_to(shift, self.inputs), self._output_axis) if shift.any() else 0.0
        return self._bias() + self.factor * moved

    def _store_large(self, scale: Float64, axis: int, bias: Float64, names: Names, origin: Iterable[str]) -> str | None:
        weight, origin = self.node.inputs[1], list(origin)
        found = scaled(self._tensor, scale, axis, self._output_axis)
        reason = found if isinstance(found, str) else misfit_of_bias(bias, self._dtype)
        if reason or isinstance(found, str) or weight is None:
            return reason
        weight.const_value = found
        for changed in (self.node, weight):
            mark_origin(changed, origin)
        self._store_bias(bias, self._dtype, names, origin)
        return None

    # -- layouts ------------------------------------------------------------------------------------------------------

    @property
    def _transposed(self) -> bool:
        return is_onnx(self.node, "Gemm") and self.node.attributes.get_int("transB", 0) != 0

    def _stored(self, weight: Float64) -> Float64:
        groups, outputs, inputs, _ = weight.shape
        if self.node.op_type == "Conv":
            return weight.reshape(groups * outputs, inputs, *self.kernel)
        if self.node.op_type == "ConvTranspose":
            return weight.swapaxes(1, 2).reshape(groups * inputs, outputs, *self.kernel)
        return weight[0, :, :, 0] if self._transposed else weight[0, :, :, 0].T

    def _bias(self) -> Float64:
        holder = self.add or self.node
        value = holder.inputs[self.bias_index] if self.bias_index < len(holder.inputs) else None
        data = float64(value)
        if data is None:
            return np.zeros(self.outputs)
        beta = self.node.attributes.get_float("beta", 1.0) if is_onnx(self.node, "Gemm") else 1.0
        return beta * np.broadcast_to(data.reshape(-1), self.outputs)

    def _store(self, weight: Float64, bias: Float64, names: Names, origin: Iterable[str]) -> str | None:
        dtype = self._dtype
        reason = misfit(weight, bias, dtype)
        if reason:
            return reason
        origin = list(origin)
        mark_origin(self.node, origin)
        set_constant(self.node, 1, self._stored(weight), names, origin)
        self._store_bias(bias, dtype, names, origin)
        return None

    def _store_bias(self, bias: Float64, dtype: ir.DataType, names: Names, origin: list[str]) -> None:
        holder = self.add or self.node
        if self.bias_index < len(holder.inputs) and holder.inputs[self.bias_index] is not None:
            if is_onnx(self.node, "Gemm"):
                self.node.attributes.pop("beta", None)
            set_constant(holder, self.bias_index, bias, names, origin)
            return
        if not bias.any():
            return
        graph = self.node.graph
        if not isinstance(graph, ir.Graph):
            raise ModelError("nodes of model-local functions cannot hold initializers", where=label(self.node))
        weight_name = str(self.node.inputs[1].name if self.node.inputs[1] else "")
        stem = weight_name.removesuffix("weight")
        value = new_initializer(
            graph, names.fresh(f"{stem}bias" if stem != weight_name else f"{weight_name}_bias"), bias, dtype
        )
        mark_origin(value, origin)
        if is_onnx(self.node, "MatMul"):
            product = self.node.outputs[0]
            total = ir.Value(name=names.fresh(f"{product.name}_biased"))
            # Readers move first: afterwards the Add itself reads the product.
            renamed = product.is_graph_output()
            replace_value(product, total)
            if renamed:
                product.name = names.fresh(f"{total.name}_product")
            add = ir.Node("", "Add", [product, value], outputs=[total], name=names.fresh(f"{label(self.node)}_bias"))
            mark_origin(add, origin)
            graph.insert_after(self.node, add)
        else:
            if is_onnx(self.node, "Gemm"):
                self.node.attributes.pop("beta", None)
            self.node.resize_inputs(max(len(self.node.inputs), self.bias_index + 1))
            self.node.replace_input_with(self.bias_index, value)


def linear_view(node: ir.Node, *, opset: int, shared: bool = False) -> Linear | str:
    """View `node` as a linear map with a weight of its own.

    Args:
        node: any node.
        opset: version of the standard operator set that the model imports.
        shared: the view is only read, so that the weight may have other readers.

    Returns:
        The view, or the reason why there is none.
    """
    if not is_onnx(node, *LINEAR_OPS):
        return f"{node.op_type} is not a linear operator"
    if opset < 7:
        return f"opset {opset} is too old (7 or newer)"
    if any(attribute.is_ref() for attribute in node.attributes.values()):
        return "an attribute of it is given by the caller of the function"
    if len(node.inputs) < 2 or node.inputs[0] is None or node.inputs[1] is None:
        return "an input is missing"
    weight = node.inputs[1]
    tensor = constant(weight)
    if tensor is None:
        overridable = weight.is_graph_input() and weight.is_initializer()
        return "its weight " + ("can be overridden by the caller" if overridable else "is not constant")
    if not tensor.dtype.is_floating_point() or tensor.dtype.bitwidth < 16:
        return f"its weight has dtype {tensor.dtype.name}"
    if not shared and not sole_use(weight):
        return "its weight is shared or given out, and would have to be duplicated"
    shape = _weight_shape(node)
    if math.prod(shape) == 0:
        return "its weight is empty"
    if is_onnx(node, "Conv", "ConvTranspose"):
        return _view_convolution(node, shape)
    if len(shape) != 2:
        return f"its weight has {len(shape)} axes, not 2"
    return _view_gemm(node, shape) if is_onnx(node, "Gemm") else _view_matmul(node, shape)


def linear_giving(value: ir.Value, *, opset: int, shared: bool = False) -> Linear | str | None:
    """The linear operator whose result, after the bias, `value` is; None where there is none."""
    node = value.producer()
    if node is not None and is_onnx(node, "Add"):
        above = (v.producer() for v in node.inputs if v is not None)
        node = next((n for n in above if n is not None and is_onnx(n, "MatMul")), None)
    if node is None or not is_onnx(node, *LINEAR_OPS):
        return None
    found = linear_view(node, opset=opset, shared=shared)
    return None if isinstance(found, Linear) and found.output is not value else found


def _weight_shape(node: ir.Node) -> tuple[int, ...]:
    tensor = constant(node.inputs[1])
    assert tensor is not None  # callers checked it
    return tuple(int(d) for d in tensor.shape.numpy())


def _view_convolution(node: ir.Node, shape: tuple[int, ...]) -> Linear | str:
    groups = node.attributes.get_int("group", 1)
    if len(shape) < 3 or groups < 1 or shape[0] % groups:
        return f"weight of shape {shape} does not fit group={groups}"
    transposed = node.op_type == "ConvTranspose"
    inputs, outputs = (shape[0], shape[1] * groups) if transposed else (shape[1] * groups, shape[0])
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None:
        data = float64(bias)
        if data is None or data.shape != (outputs,):
            return f"its bias is not a constant of {outputs} numbers"
    return Linear(node, None, 2, node.outputs[0], groups, inputs, outputs)


def _view_gemm(node: ir.Node, shape: tuple[int, ...]) -> Linear | str:
    outputs, inputs = shape if node.attributes.get_int("transB", 0) else shape[::-1]
    if node.attributes.get_int("transA", 0):
        return "Gemm with transA has its channels on the other axis"
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None:
        data = float64(bias)
        if data is None or data.size not in (1, outputs) or data.shape[-1:] not in ((), (1,), (outputs,)):
            return "its bias is not one constant per output channel"
    return Linear(node, None, 2, node.outputs[0], 1, inputs, outputs, node.attributes.get_float("alpha", 1.0))


def _view_matmul(node: ir.Node, shape: tuple[int, ...]) -> Linear | str:
    inputs, outputs = shape
    product = node.outputs[0]
    use = sole_use(product)
    if use and is_onnx(use.node, "Add") and use.node.graph is node.graph:
        other = 1 - use.idx
        # Only what may be a bias is read: a table as large as the tensor is none.
        tensor = constant(use.node.inputs[other])
        data = float64(use.node.inputs[other]) if tensor is not None and tensor.size in (1, outputs) else None
        rank = None if product.shape is None else len(product.shape)
        fits = data is not None and data.size in (1, outputs) and data.shape[-1:] in ((), (1,), (outputs,))
        # An Add of higher rank than the product would add axes to it; rank 1 and 0 never do.
        if fits and data is not None and (data.ndim < 2 or (rank is not None and data.ndim <= rank)):
            return Linear(node, use.node, other, use.node.outputs[0], 1, inputs, outputs)
    return Linear(node, None, 2, product, 1, inputs, outputs)
