"""A linear node as a matrix product with the columns of its input, whatever operator it is.

    y[rows of group g, positions] = W_g @ columns_g(x) + b          W_g: (outputs, inputs * kernel) of group g

Conv takes the values under its kernel (im2col, `graphopt.numerics.patches`). ConvTranspose is a convolution of its
input with zeros between the pixels, by the mirrored kernel. Gemm and MatMul take the input as it is. The columns of one
channel are neighbours: column `c * kernel + k` belongs to channel c of the group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.numerics.patches import Window, channel_columns, patch_chunks, spread
from graphopt.rewriting.constants import constant
from graphopt.rewriting.edit import new_initializer
from graphopt.rewriting.linear import Linear, linear_view
from graphopt.rewriting.names import Names
from graphopt.rewriting.nodes import is_onnx

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Layer:
    """A linear node with constant weights of its own.

    Attributes:
        linear: node, bias holder and channel counts.
        window: geometry of the (equivalent) convolution; None for Gemm and MatMul.
        stuffing: zeros-between-pixels stride of a ConvTranspose; () for the others.
    """

    linear: Linear
    window: Window | None
    stuffing: tuple[int, ...] = ()

    @property
    def key(self) -> str:
        """Name of the node's first output, as in `graphopt.analysis`."""
        return self.linear.node.outputs[0].name or ""

    @property
    def label(self) -> str:
        """How messages name it."""
        return self.linear.node.name or self.key

    @property
    def source(self) -> str:
        """Name of the input tensor."""
        return self.linear.input.name or ""

    @property
    def output(self) -> str:
        """Name of the output tensor, after the bias."""
        return self.linear.output.name or ""

    @property
    def groups(self) -> int:
        """Number of groups."""
        return self.linear.groups

    @cached_property
    def kernel(self) -> int:
        """Columns per input channel."""
        return int(np.prod(self.window.kernel)) if self.window is not None else 1

    @property
    def width(self) -> int:
        """Columns of one group."""
        return self.linear.inputs // self.groups * self.kernel

    @property
    def has_bias(self) -> bool:
        """False for a MatMul that no Add follows; the other operators can take a bias at no cost."""
        return self.linear.add is not None or not is_onnx(self.linear.node, "MatMul")

    @property
    def bias_operand(self) -> ir.Value | None:
        """What the bias is read from; None where there is none."""
        holder, index = self.linear.add or self.linear.node, self.linear.bias_index
        return holder.inputs[index] if index < len(holder.inputs) else None

    def channel_axis(self, rank: int) -> int:
        """Channel axis of x or y."""
        return self.linear.channel_axis(rank)

    @property
    def _transposed(self) -> bool:
        return is_onnx(self.linear.node, "Gemm") and self.linear.node.attributes.get_int("transB", 0) != 0

    # -- weights ---------------------------------------------------------------------------------------------------

    def weight(self) -> Float64:
        """(groups, outputs per group, columns), float64; the product's factor is in it."""
        data = _array(self.linear.node.inputs[1]).astype(np.float64)
        n = self.linear
        if self.window is None:
            matrix = data if self._transposed else data.T
            return n.factor * matrix[None]
        if not self.stuffing:
            return data.reshape(n.groups, n.outputs // n.groups, -1)
        rest = data.shape[2:]
        blocks = data.reshape(n.groups, n.inputs // n.groups, n.outputs // n.groups, *rest).swapaxes(1, 2)
        return _mirrored(blocks, len(rest)).reshape(n.groups, n.outputs // n.groups, -1)

    def bias(self) -> Float64:
        """(outputs,), float64."""
        holder, value = self.linear.add or self.linear.node, self.bias_operand
        if value is None:
            return np.zeros(self.linear.outputs)
        beta = holder.attributes.get_float("beta", 1.0) if is_onnx(holder, "Gemm") else 1.0
        return beta * np.broadcast_to(_array(value).astype(np.float64).reshape(-1), self.linear.outputs)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the weights."""
        return _array(self.linear.node.inputs[1]).dtype

    def fits(self, array: Float64) -> bool:
        """Whether numbers stay finite in the type of the weights."""
        with np.errstate(over="ignore"):
            return bool(np.isfinite(array.astype(self.dtype).astype(np.float64)).all())

    def store(self, weight: Float64, bias: Float64) -> None:
        """Write weights back, under their names; a Conv or Gemm without a bias gets one where it is not zero.

        Args:
            weight: as `weight` returns it.
            bias: (outputs,); must be zero where `has_bias` is False.
        """
        n, old = self.linear, _array(self.linear.node.inputs[1])
        if self.window is None:
            matrix = weight[0] / n.factor
            data = matrix if self._transposed else matrix.T
        elif not self.stuffing:
            data = weight.reshape(old.shape)
        else:
            rest = old.shape[2:]
            blocks = weight.reshape(n.groups, n.outputs // n.groups, n.inputs // n.groups, *rest)
            data = _mirrored(blocks, len(rest)).swapaxes(1, 2).reshape(old.shape)
        _replace(n.node.inputs[1], data)
        holder, value = n.add or n.node, self.bias_operand
        if value is not None:
            if is_onnx(holder, "Gemm"):
                holder.attributes.pop("beta", None)
            shape = _array(value).shape
            _replace(value, bias.reshape((*(1,) * (len(shape) - 1), -1)) if shape else bias)
        elif bias.any() and self.has_bias:
            self.add_bias(bias)

    def add_bias(self, bias: Float64) -> None:
        """Give a Conv or Gemm without a bias one, (outputs,), of the weight's type."""
        node = self.linear.node
        graph = node.graph
        weight = constant(node.inputs[1])
        assert isinstance(graph, ir.Graph) and weight is not None
        names = Names(ir.Model(graph, ir_version=10))
        value = new_initializer(graph, names.fresh(f"{self.label}_bias"), bias, weight.dtype)
        node.resize_inputs(self.linear.bias_index + 1)
        node.replace_input_with(self.linear.bias_index, value)

    # -- data ------------------------------------------------------------------------------------------------------

    def positions(self, y: Array) -> int:
        """Positions per channel of an output array, samples included."""
        return int(y.size) // int(y.shape[self.channel_axis(y.ndim)])

    def columns(self, x: Array, y: Array, group: int, thin: int = 1) -> Iterator[tuple[Array, Array]]:
        """Columns of an input and the rows of an output (or of any tensor of its shape) that belong to them.

        Args:
            x: the node's input.
            y: a tensor of the output's shape.
            group: which group.
            thin: about one position in `thin` is taken, on a regular grid.

        Yields:
            (columns, n) and (outputs per group, n), chunk by chunk.
        """
        per_group = self.linear.outputs // self.groups
        rows = slice(group * per_group, (group + 1) * per_group)
        if self.window is None:
            step = max(1, thin)
            flat_x, flat_y = x.reshape(-1, x.shape[-1])[::step], y.reshape(-1, y.shape[-1])[::step]
            yield flat_x.T, flat_y.T[rows]
            return
        rank = len(self.window.kernel)
        step = max(1, int(thin ** (1 / rank) + 1e-9))
        window, grid = self.window, (slice(None), rows, *(slice(None, None, step),) * rank)
        if self.stuffing:
            x = _stuffed(x, self.stuffing)
        if step > 1:
            pads = window.padding(tuple(x.shape[2:]))
            window = Window(
                window.kernel,
                tuple(s * step for s in window.strides),
                window.dilations,
                (*(p[0] for p in pads), *(p[1] for p in pads)),
                window.groups,
            )
        picked = y[grid]
        for part, columns in patch_chunks(x, window, group):
            yield columns, channel_columns(picked[part])

    def pulled_back(self, y: Array, shape: tuple[int, ...]) -> Array:
        """The transposed map, without the bias: <layer(x) - bias, y> = <x, pulled_back(y)>.

        Args:
            y: a tensor of the output's shape.
            shape: of the input.
        """
        weight = self.weight().astype(y.dtype)
        if self.window is None:
            return np.asarray((y.reshape(-1, y.shape[-1]) @ weight[0]).reshape(shape))
        per_in, per_out = self.linear.inputs // self.groups, self.linear.outputs // self.groups
        extent = shape[2:]
        if self.stuffing:
            extent = tuple((n - 1) * s + 1 for n, s in zip(extent, self.stuffing, strict=True))
        out = np.empty((shape[0], shape[1], *extent), y.dtype)
        for group in range(self.groups):
            rows = channel_columns(y[:, group * per_out : (group + 1) * per_out])
            part = spread(weight[group].T @ rows, self.window, (shape[0], per_in, *extent))
            out[:, group * per_in : (group + 1) * per_in] = part
        real: tuple[slice, ...] = (slice(None), slice(None), *(slice(None, None, s) for s in self.stuffing))
        return np.asarray(out[real])


def layer_of(node: ir.Node, opset: int) -> Layer | str:
    """View a node as a layer, or the reason why it is none."""
    linear = linear_view(node, opset=opset)
    if isinstance(linear, str):
        return linear
    if not node.inputs[1] or not node.inputs[1].is_initializer():
        return "its weight is no initializer"
    holder = linear.add or node
    bias = holder.inputs[linear.bias_index] if linear.bias_index < len(holder.inputs) else None
    if bias is not None:
        data = constant(bias)
        if data is None or not bias.is_initializer() or len(list(bias.uses())) > 1 or data.size != linear.outputs:
            return "its bias is shared, computed or one number for all outputs"
    if not is_onnx(node, "Conv", "ConvTranspose"):
        return Layer(linear, None)
    window = _window(node)
    if isinstance(window, str):
        return window
    return Layer(linear, window, _stuffing(node, window) if is_onnx(node, "ConvTranspose") else ())


def layers_of(model: ir.Model) -> tuple[dict[str, Layer], dict[str, str]]:
    """Linear nodes of the main graph by key, and those that cannot be viewed, with the reason."""
    opset = model.graph.opset_imports.get("", model.graph.opset_imports.get("ai.onnx", 13))
    layers: dict[str, Layer] = {}
    refused: dict[str, str] = {}
    for node in model.graph:
        if is_onnx(node, "Conv", "ConvTranspose", "Gemm", "MatMul"):
            found = layer_of(node, opset)
            key = next((v.name for v in node.outputs if v.name), "")
            if isinstance(found, str):
                refused[key] = found
            else:
                layers[key] = found
    return layers, refused


def give_biases(model: ir.Model) -> list[Layer]:
    """Give every layer that can have a bias one, of zeros where it had none; returns the layers that got theirs now.

    Done before the coupling analysis, so that a bias that a refit needs is sliced with the units of its layer.
    """
    layers, _ = layers_of(model)
    bare = [layer for layer in layers.values() if layer.has_bias and layer.bias_operand is None]
    for layer in bare:
        layer.add_bias(np.zeros(layer.linear.outputs))
    return bare


def drop_zero_biases(layers: list[Layer]) -> None:
    """Take the biases away again that are still zero."""
    for layer in layers:
        node, value = layer.linear.node, layer.bias_operand
        if value is not None and not _array(value).any():
            node.replace_input_with(layer.linear.bias_index, None)
            node.resize_inputs(layer.linear.bias_index)
            if node.graph is not None and value.name and not value.uses():
                node.graph.initializers.pop(value.name)


def _window(node: ir.Node) -> Window | str:
    weight = constant(node.inputs[1])
    assert weight is not None  # linear_view checked it
    kernel = tuple(int(k) for k in weight.shape.numpy()[2:])
    rank = len(kernel)
    attributes = node.attributes
    dilations = tuple(attributes.get_ints("dilations", ()) or (1,) * rank)
    strides = tuple(attributes.get_ints("strides", ()) or (1,) * rank)
    pads = tuple(attributes.get_ints("pads", ()) or (0,) * (2 * rank))
    auto = attributes.get_string("auto_pad", "NOTSET")
    group = int(attributes.get_int("group", 1) or 1)
    if not is_onnx(node, "ConvTranspose"):
        return Window(kernel, strides, dilations, pads if auto == "NOTSET" else (), group, auto)  # type: ignore[arg-type]
    if auto not in {"NOTSET", "VALID"} or "output_shape" in attributes:
        return "its padding follows from a wanted output shape"
    extra = tuple(attributes.get_ints("output_padding", ()) or (0,) * rank)
    reach = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
    begin = [r - p for r, p in zip(reach, pads[:rank], strict=True)]
    end = [r - p + e for r, p, e in zip(reach, pads[rank:], extra, strict=True)]
    if min((*begin, *end)) < 0:
        return "its padding is larger than its kernel"
    return Window(kernel, (1,) * rank, dilations, (*begin, *end), group)


def _stuffing(node: ir.Node, window: Window) -> tuple[int, ...]:
    return tuple(node.attributes.get_ints("strides", ()) or (1,) * len(window.kernel))


def _stuffed(x: Array, strides: tuple[int, ...]) -> Array:
    """x with stride - 1 zeros between neighbouring pixels."""
    extent = tuple((n - 1) * s + 1 for n, s in zip(x.shape[2:], strides, strict=True))
    out = np.zeros((*x.shape[:2], *extent), x.dtype)
    out[(slice(None), slice(None), *(slice(None, None, s) for s in strides))] = x
    return out


def _mirrored(weight: Float64, rank: int) -> Float64:
    return np.flip(weight, axis=tuple(range(weight.ndim - rank, weight.ndim)))


def _array(value: ir.Value | None) -> Array:
    tensor = constant(value)
    assert tensor is not None  # layer_of checked it
    return np.asarray(tensor.numpy())


def _replace(value: ir.Value | None, data: Float64) -> None:
    tensor = constant(value)
    assert value is not None and tensor is not None
    new = np.array(data.astype(tensor.dtype.numpy()), order="C")
    value.const_value = ir.Tensor(new, dtype=tensor.dtype, name=value.name)
    value.shape = value.const_value.shape
