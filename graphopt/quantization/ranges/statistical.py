"""Ranges of activations without data: what the model itself tells of its tensors.

A normalisation says what leaves it: mean beta and deviation gamma in every channel; BatchNormalization also knows what
enters it. From there, and from the inputs, of which something must be assumed, means and variances are carried through
the other operators (`graphopt.numerics.normal`): a linear layer gives  mean W m + b  and  variance (W o W) v. A tensor
ranges over some deviations around its mean. Elements are taken to be independent, which they are not, so that far
behind the last normalisation a range may be off by a factor: nothing of this replaces calibration data.

Source: Nagel et al. 2019 (arXiv:1906.04721) for ranges from normalisations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from graphopt.numerics.normal import CARRIED, Normal, linear, union
from graphopt.rewriting.constants import array, constant
from graphopt.rewriting.layers import Layer, layers_of
from graphopt.rewriting.nodes import is_onnx

Floats = NDArray[np.float64]

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE, ir.DataType.BFLOAT16)


@dataclass
class Statistics:
    """What is known of the tensors of the main graph.

    Attributes:
        normals: by name.
        measured: how many tensors a normalisation tells, rather than an assumption about the inputs.
    """

    normals: dict[str, Normal] = field(default_factory=dict)
    measured: int = 0


def statistics(model: ir.Model, inputs: Normal) -> Statistics:
    """Means, variances and intervals of the tensors that statistics reach.

    Args:
        model: with inferred shapes; not changed.
        inputs: what to assume of its floating-point inputs.
    """
    layers, _ = layers_of(model)
    found = Statistics({str(v.name): inputs for v in model.graph.inputs if v.dtype in FLOATS and v.name})
    for node in model.graph:
        if not node.outputs or not node.outputs[0].name or not is_onnx(node, node.op_type):
            continue
        name = node.outputs[0].name
        layer = layers.get(name)
        if layer is not None:
            _layer(layer, found)
        elif name in found.normals:
            continue  # the sum of a product and its bias: the layer told it
        elif node.op_type in NORMALISED:
            out = NORMALISED[node.op_type](node, found)
            if out is not None:
                found.normals[name] = out
                found.measured += 1
        elif (rule := RULES.get(node.op_type)) is not None:
            out = rule(node, [_operand(v, found) for v in node.inputs])
            if out is not None:
                # the parts of a Split are alike
                found.normals.update((v.name, out) for v in node.outputs if v.name)
    return found


def _operand(value: ir.Value | None, found: Statistics) -> Normal | None:
    """What is known of an operand; a constant is its own mean."""
    if value is None:
        return None
    if constant(value) is None:
        return found.normals.get(value.name or "")
    data = array(value)
    if data is None or data.dtype.kind != "f" or data.size == 0:
        return None
    exact = np.asarray(data, np.float64)
    return Normal(exact, np.zeros_like(exact), exact, exact)


def _layer(layer: Layer, found: Statistics) -> None:
    """The output of a layer, and the product before its bias."""
    x, node = found.normals.get(layer.source), layer.linear.node
    rank = _rank(node.outputs[0]) or _rank(layer.linear.input)
    if x is None or rank is None:
        return
    given = x.along(layer.channel_axis(rank), layer.linear.inputs, rank)
    # a transposed convolution reads zeros between the pixels
    share = 1 / math.prod(layer.stuffing or (1,))
    given = Normal(given.mean * share, given.variance * share, given.low, given.high)
    y = linear(layer.weight(), np.zeros(layer.linear.outputs), given, layer.kernel)
    shape = [1] * rank
    shape[layer.channel_axis(rank)] = -1
    bias = layer.bias().reshape(shape)
    y = y.each(lambda a: a.reshape(shape))
    summed = y.plus(Normal(bias, np.zeros_like(bias), bias, bias))
    # a MatMul has its bias in an Add behind it
    found.normals[layer.key] = y if layer.linear.add is not None and is_onnx(node, "MatMul") else summed
    found.normals[layer.output] = summed


def _rank(value: ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else len(value.shape)


# -- normalisations ------------------------------------------------------------------------------------------------


def _channels(node: ir.Node, index: int) -> Floats | None:
    """A per-channel parameter as (1, C, 1, ...)."""
    rank, data = _rank(node.outputs[0]) or _rank(node.inputs[0]), array(node.inputs[index])
    if rank is None or rank < 2 or data is None or data.ndim != 1:
        return None
    return np.asarray(data, np.float64).reshape(1, -1, *(1,) * (rank - 2))


def _batch_norm(node: ir.Node, found: Statistics) -> Normal | None:
    gamma, beta, mean, variance = (_channels(node, i) for i in (1, 2, 3, 4))
    if mean is not None and variance is not None and node.inputs[0] is not None and node.inputs[0].name:
        found.normals[node.inputs[0].name] = Normal.of(mean, variance)
    return None if gamma is None or beta is None else Normal.of(beta, gamma**2)


def _channel_norm(node: ir.Node, found: Statistics) -> Normal | None:
    gamma, beta = _channels(node, 1), _channels(node, 2)
    return None if gamma is None or beta is None else Normal.of(beta, gamma**2)


def _last_axes_norm(node: ir.Node, found: Statistics) -> Normal | None:
    """LayerNormalization and its kin: the parameters stand on the last axes."""
    gamma = array(node.inputs[1])
    beta = array(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else np.zeros(1)
    if gamma is None or beta is None:
        return None
    return Normal.of(np.asarray(beta, np.float64), np.square(np.asarray(gamma, np.float64)))


NORMALISED: dict[str, Callable[[ir.Node, Statistics], Normal | None]] = {
    "BatchNormalization": _batch_norm,
    "InstanceNormalization": _channel_norm,
    "GroupNormalization": _channel_norm,
    "LayerNormalization": _last_axes_norm,
    "RMSNormalization": _last_axes_norm,
}
"""What leaves these does not depend on what enters."""

# -- other operators -----------------------------------------------------------------------------------------------

Operands = list[Normal | None]
Rule = Callable[[ir.Node, Operands], Normal | None]


def _pointwise(f: Callable[[Floats], Floats], bounds: tuple[float, float] | None = None) -> Rule:
    """A function of one operand; with `bounds`, what is known of its result even where nothing is of the operand."""

    def rule(node: ir.Node, x: Operands) -> Normal | None:
        if x[0] is None:
            return None if bounds is None else Normal.uniform(*bounds)
        return x[0].through(f)

    return rule


def _clip(node: ir.Node, x: Operands) -> Normal | None:
    low, high = (
        float(x[i].mean.reshape(-1)[0]) if len(x) > i and x[i] is not None else end  # type: ignore[union-attr]
        for i, end in ((1, -math.inf), (2, math.inf))
    )
    return None if x[0] is None else x[0].through(lambda a: np.clip(a, low, high))


def _leaky(node: ir.Node, x: Operands) -> Normal | None:
    slope = node.attributes.get_float("alpha", 0.01)
    return None if x[0] is None else x[0].through(lambda a: np.where(a > 0, a, slope * a))


def _softmax(node: ir.Node, x: Operands) -> Normal | None:
    """Positive, with sum 1 over an axis; of its length, where it is known, follows the mean."""
    shape = node.outputs[0].shape
    length = shape[node.attributes.get_int("axis", -1) or -1] if shape else None
    mean = 1 / length if isinstance(length, int) and length > 0 else 0.1
    return Normal(np.asarray(mean), np.asarray(mean**2), np.asarray(0.0), np.asarray(1.0))


def _add(node: ir.Node, x: Operands) -> Normal | None:
    return None if x[0] is None or x[1] is None else x[0].plus(x[1])


def _sub(node: ir.Node, x: Operands) -> Normal | None:
    return None if x[0] is None or x[1] is None else x[0].plus(_scaled(x[1], -1.0))


def _scaled(x: Normal, factor: float) -> Normal:
    ends = np.stack([x.low * factor, x.high * factor])
    return Normal(x.mean * factor, x.variance * factor**2, ends.min(axis=0), ends.max(axis=0))


def _mul(node: ir.Node, x: Operands) -> Normal | None:
    return None if x[0] is None or x[1] is None else x[0].times(x[1])


def _div(node: ir.Node, x: Operands) -> Normal | None:
    if x[0] is None or x[1] is None or x[1].variance.any() or not x[1].mean.all():
        return None
    return x[0].times(Normal(1 / x[1].mean, x[1].variance, 1 / x[1].mean, 1 / x[1].mean))


def _same(node: ir.Node, x: Operands) -> Normal | None:
    return x[0]


def _moved(node: ir.Node, x: Operands) -> Normal | None:
    """Which element goes where is not followed: any may be anywhere."""
    return None if x[0] is None else x[0].mixed()


def _transpose(node: ir.Node, x: Operands) -> Normal | None:
    order, rank = node.attributes.get_ints("perm", None), _rank(node.outputs[0])
    if x[0] is None or rank is None:
        return None
    axes = list(order) if order else list(range(rank))[::-1]
    return x[0].each(lambda a: a.reshape((1,) * (rank - a.ndim) + a.shape).transpose(axes))


def _padded(node: ir.Node, x: Operands) -> Normal | None:
    return None if x[0] is None else union([x[0], Normal.uniform(0, 0)])


def _joined(node: ir.Node, x: Operands) -> Normal | None:
    known = [each for each in x if each is not None]
    return union(known) if known and len(known) == len(x) else None


def _looked_up(node: ir.Node, x: Operands) -> Normal | None:
    """Rows of a table are what its columns hold; elements of an activation may be any."""
    if x[0] is None:
        return None
    table = x[0].mean
    if x[0].variance.any() or table.ndim != 2 or node.attributes.get_int("axis", 0) != 0:
        return x[0].mixed()
    return Normal(table.mean(axis=0), table.var(axis=0), table.min(axis=0), table.max(axis=0))


def _product(node: ir.Node, x: Operands) -> Normal | None:
    """A product of two activations; behind Softmax it is an average of what stands right."""
    if x[1] is None:
        return None
    producer = node.inputs[0].producer() if node.inputs[0] is not None else None
    if producer is not None and is_onnx(producer, "Softmax"):
        return x[1].mixed()
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    length = shape[-1] if shape else None
    if x[0] is None or not isinstance(length, int):
        return None
    one = x[0].mixed().times(x[1].mixed())
    return Normal.of(one.mean * length, one.variance * length, CARRIED)


RULES: dict[str, Rule] = {
    "Relu": _pointwise(lambda a: np.maximum(a, 0)),
    "Sigmoid": _pointwise(lambda a: 1 / (1 + np.exp(-np.clip(a, -80, 80))), (0.0, 1.0)),
    "HardSigmoid": _pointwise(lambda a: np.clip(a * 0.2 + 0.5, 0, 1), (0.0, 1.0)),
    "Tanh": _pointwise(np.tanh, (-1.0, 1.0)),
    "Abs": _pointwise(np.abs),
    "Neg": _pointwise(np.negative),
    "HardSwish": _pointwise(lambda a: a * np.clip(a / 6 + 0.5, 0, 1)),
    "Gelu": _pointwise(lambda a: a / (1 + np.exp(-np.clip(1.702 * a, -80, 80)))),
    "Softplus": _pointwise(lambda a: np.logaddexp(a, 0)),
    "Clip": _clip,
    "LeakyRelu": _leaky,
    "Softmax": _softmax,
    "Add": _add,
    "Sub": _sub,
    "Mul": _mul,
    "Div": _div,
    "MatMul": _product,
    "Transpose": _transpose,
    "Pad": _padded,
    "Concat": _joined,
    "Gather": _looked_up,
    **dict.fromkeys(("Identity", "Dropout", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"), _same),
    **dict.fromkeys(
        (
            "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Split", "Expand", "Tile", "DepthToSpace",
            "SpaceToDepth", "Resize", "Upsample", "ReduceMean", "ReduceMax",
        ),
        _moved,
    ),
}  # fmt: skip
"""Pooling leaves what it reads: neighbours are too much alike for averages to narrow it."""
