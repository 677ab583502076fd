"""Biases that take back what quantisation does to the mean of a layer's output.

    b' = b + E[y - y_quantised]        per channel, over samples and positions

(Nagel et al., arXiv:1906.04721, section 4.2, the empirical form.) Layers are taken in the order of execution, each with
the corrections before it in place, so that what a layer gets wrong because of its inputs is not corrected twice. Two
walks stand side by side, one through the float model and one through the quantised one; the data streams through both.

Without data the means of the inputs have to do: a layer that computes with V instead of W is off by (V - W) E[x], the
analytic form of the same section (`expected_shift`).

A bias stays what it was: float, or int32 on the grid of the accumulator. Where there is no bias to change, nothing is
added here, because a node more would cost time; `graphopt.rewriting.layers.give_biases` gives a Conv or Gemm its own
before anything is quantised.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from graphopt.base import Skip
from graphopt.numerics.moments import Moments
from graphopt.parallel import Workers
from graphopt.pipeline.clone import private_clone
from graphopt.pruning.walk import Walk
from graphopt.rewriting.constants import array, constant
from graphopt.rewriting.layers import Layer, layers_of

if TYPE_CHECKING:
    from graphopt.calibration import Calibration

Floats = NDArray[np.float64]

SAMPLES = 256
"""Enough for a mean: its error is a sixteenth of the deviation of single samples, of which each has many positions."""

BIAS_INDEX = {
    "Conv": 2, "ConvTranspose": 2, "Gemm": 2, "FusedConv": 2, "FusedGemm": 2, "MatMulNBits": 5,
    "DynamicQuantizeMatMul": 4, "MatMulIntegerToFloat": 6,
}  # fmt: skip
"""Where operators take a bias, one number a channel."""


@dataclass(frozen=True)
class Bias:
    """A bias in a quantised model.

    Attributes:
        value: the initializer.
        scale: of its integers, () or (channels,); None for floats.
    """

    value: ir.Value
    scale: NDArray[np.float32] | None

    @property
    def size(self) -> int:
        """How many numbers."""
        return int(self._data.size)

    def add(self, shift: Floats) -> None:
        """Add to the numbers; (channels,). Integers move by the nearest number of steps, and never overflow."""
        data, tensor = self._data, constant(self.value)
        assert tensor is not None  # bias_of checked it
        if self.scale is None:
            moved = (data.astype(np.float64) + shift.reshape(data.shape)).astype(data.dtype)
        else:
            info = np.iinfo(data.dtype)
            steps = np.rint(shift / self.scale.astype(np.float64)).reshape(data.shape)
            moved = np.clip(data.astype(np.float64) + steps, info.min, info.max).astype(data.dtype)
        self.value.const_value = ir.Tensor(moved, dtype=tensor.dtype, name=self.value.name)

    @property
    def _data(self) -> NDArray[Any]:
        tensor = constant(self.value)
        assert tensor is not None  # bias_of checked it
        return np.asarray(tensor.numpy())


@dataclass(frozen=True)
class Corrected:
    """What came of it.

    Attributes:
        layers: by key, the largest correction relative to the deviation of the layer's output.
        skipped: layers whose mean is off and stays so.
    """

    layers: dict[str, float]
    skipped: list[Skip]


def correct_biases(
    reference: ir.Model, model: ir.Model, calibration: Calibration, *, samples: int | None = SAMPLES, jobs: int = 1
) -> Corrected:
    """Correct the biases of a quantised model in place.

    Args:
        reference: the float model; the tensors of both have the same names.
        model: the quantised one.
        calibration: the data.
        samples: at most; None: all.
        jobs: threads.
    """
    places = {node: i for i, node in enumerate(model.graph)}
    values = {v.name: v for node in places for v in node.outputs}
    done: dict[str, float] = {}
    skipped: list[Skip] = []
    found: list[tuple[int, Layer, Bias]] = []
    for layer in layers_of(reference)[0].values():
        value = values.get(layer.output)
        bias = "its output is not in the quantised model" if value is None else bias_of(value, layer.linear.outputs)
        if isinstance(bias, str):
            skipped.append(Skip(layer.label, bias))
            continue
        assert value is not None  # it has a bias
        found.append((places[_source(value)], layer, bias))
    found.sort(key=lambda item: item[0])
    nodes, nodes_before = list(places), list(reference.graph)
    place_before = {node: i for i, node in enumerate(nodes_before)}
    with Workers(jobs) as workers:
        before, after = (Walk(each, calibration, limit=samples, run=workers.map) for each in (reference, model))
        for number, (place, layer, bias) in enumerate(found):
            if place:
                after.advance(nodes[place - 1])
            first = min(place_before[each.linear.node] for _, each, _ in found[number:])
            if first:
                before.advance(nodes_before[first - 1])
            shift, deviation = _shift(before, after, layer)
            if not np.isfinite(shift).all():
                skipped.append(Skip(layer.label, "its output is not finite on the calibration data"))
                continue
            bias.add(shift)
            done[layer.key] = float(np.max(np.abs(shift) / np.where(deviation > 0, deviation, 1.0), initial=0.0))
    return Corrected(done, skipped)


def correct_if_better(
    reference: ir.Model, model: ir.Model, calibration: Calibration, noise: Callable[[ir.Model], float], jobs: int = 1
) -> list[str]:
    """Correct biases in place where that brings the outputs closer to the float model's.

    Args:
        reference, model, calibration, jobs: as for `correct_biases`.
        noise: how far a model's outputs are off, relative to their power.

    Returns:
        sentences for the report.
    """
    trial = private_clone(model)
    done = correct_biases(reference, trial, calibration, jobs=jobs)
    if not done.layers:
        return ["no layer has a bias that could be corrected"]
    before, after = noise(model), noise(trial)
    told = f"noise of the outputs {before:.3g} of their power before, {after:.3g} after"
    if not after < before:
        return [f"biases stay as they are: corrected, they would bring the outputs no closer ({told})"]
    for name, value in trial.graph.initializers.items():
        model.graph.initializers[name].const_value = value.const_value
    return [f"biases of {len(done.layers)} layers corrected by the mean error of their outputs: {told}"]


def bias_of(value: ir.Value, channels: int) -> Bias | str:
    """The bias that was added last to a tensor, or why there is none that can be changed.

    Args:
        value: the output of a layer, or what QuantizeLinear and DequantizeLinear make of it.
        channels: of the layer.
    """
    node = _source(value)
    operands: list[ir.Value | None] = []
    if node.op_type == "Add":
        operands = list(node.inputs)
    elif node.op_type in BIAS_INDEX and BIAS_INDEX[node.op_type] < len(node.inputs):
        operands = [node.inputs[BIAS_INDEX[node.op_type]]]
    for operand in operands:
        found = _constant_bias(operand)
        if found is not None and found.size == channels:
            if len(list(found.value.uses())) > 1:
                return "its bias is shared"
            return found
    return "it has no bias of its own"


def _constant_bias(operand: ir.Value | None) -> Bias | None:
    if operand is None:
        return None
    producer = operand.producer()
    if producer is not None and producer.op_type == "DequantizeLinear":
        integers, scale = producer.inputs[0], array(producer.inputs[1])
        alone = len(list(operand.uses())) == 1
        if integers is None or scale is None or not integers.is_initializer() or not alone:
            return None
        return Bias(integers, np.asarray(scale, np.float32).reshape(-1) if scale.ndim else scale)
    return Bias(operand, None) if operand.is_initializer() and constant(operand) is not None else None


def _source(value: ir.Value) -> ir.Node:
    """The node that computes a tensor, in front of a pair of QuantizeLinear and DequantizeLinear."""
    node = value.producer()
    assert node is not None  # layers are computed
    while node.op_type in {"DequantizeLinear", "QuantizeLinear"}:
        source = node.inputs[0].producer() if node.inputs[0] is not None else None
        if source is None:
            break
        node = source
    return node


def _shift(before: Walk, after: Walk, layer: Layer) -> tuple[Floats, Floats]:
    """Mean of the float output minus that of the quantised one, and the deviation of the float output; (channels,)."""
    wanted, found = Moments(), Moments()
    for one, other in zip(before.stream([layer.output]), after.stream([layer.output]), strict=True):
        for moments, tensors in ((wanted, one), (found, other)):
            y = np.asarray(tensors[layer.output])
            axis = layer.channel_axis(y.ndim)
            with np.errstate(all="ignore"):  # what is not finite is found before it is used
                moments.update(np.moveaxis(y, axis, -1).reshape(-1, y.shape[axis]))
    channels = layer.linear.outputs
    if not wanted.n or not found.n:
        return np.zeros(channels), np.ones(channels)
    return np.asarray(wanted.mean - found.mean), np.asarray(np.sqrt(wanted.variance))


def expected_shift(weight: Floats, rounded: Floats, means: Floats) -> Floats:
    """What has to be added to a bias where the means of the inputs are known: (W - V) E[x], without any data.

    Args:
        weight, rounded: W and V, (groups, rows, columns).
        means: E[x], (groups, columns); of a convolution the mean of a channel for each of its kernel positions (exact
            but for the zeros of its padding).

    Returns:
        (groups * rows,).
    """
    gap = np.asarray(weight, np.float64) - rounded
    return np.asarray(np.einsum("grc,gc->gr", gap, means).reshape(-1))
