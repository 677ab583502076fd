"""Layers that read scaled channels, as matrices, with the ranges of what they read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from graphopt.analysis import shapes
from graphopt.calibration import Calibration
from graphopt.data.activations import activations
from graphopt.numerics.equalization import Classes
from graphopt.numerics.smoothing import ChannelRange, SmoothedLayer
from graphopt.quantization.scales.groups import ScaleGroups
from graphopt.quantization.scales.homogeneity import contracted_axis
from graphopt.quantization.scales.rules import LAYERS
from graphopt.quantization.scales.walk import ScaledOperand
from graphopt.rewriting.constants import float64
from graphopt.rewriting.nodes import is_onnx, label


@dataclass(frozen=True)
class Reader:
    """A layer that contracts scaled channels.

    Attributes:
        operand: its weight.
        source: name of the tensor that it reads.
        axis: of its channels there.
        scale: (channels,) numbers of their scales.
    """

    operand: ScaledOperand
    source: str
    axis: int
    scale: NDArray[np.int64]

    def layer(self, read: ChannelRange) -> SmoothedLayer:
        """The layer as a matrix, (channels, outputs)."""
        weight = float64(self.operand.value)
        assert weight is not None
        own = next(a for a, size in enumerate(self.operand.multiply.shape) if size != 1)
        # Positions of a kernel belong to the output whose scale they share.
        rows = np.moveaxis(weight, own, 0)
        return SmoothedLayer(rows.reshape(len(rows), -1), read, self.scale)


def readers_of(found: ScaleGroups, group: Classes) -> list[Reader] | str:
    """The layers that read a group of channels; or why their error cannot be estimated."""
    readers = []
    for operand in found.operands:
        if not np.isin(operand.multiply, group).any():
            continue
        node = operand.node
        source = node.inputs[0]
        shape = shapes.dims(source) if source is not None else None
        if not is_onnx(node, *LAYERS) or sum(size != 1 for size in operand.multiply.shape) != 1:
            return f"'{label(node)}' reads it channel by channel"
        if is_onnx(node, "Conv", "ConvTranspose") or len(operand.multiply.shape) != 2:
            return f"'{label(node)}' reads it, which is no matrix"
        if source is None or shape is None:
            return f"'{label(node)}' reads a tensor of unknown rank"
        axis = contracted_axis(node, len(shape))
        readers.append(Reader(operand, str(source.name), axis, operand.multiply.ravel()))
    return readers or "nothing reads it with a weight"


def channel_ranges(
    model: ir.Model, readers: list[Reader], calibration: Calibration, *, samples: int, threads: int
) -> dict[str, ChannelRange]:
    """Ranges of what layers read, by tensor, from a stream of the calibration data."""
    found = {r.source: ChannelRange(len(r.scale)) for r in readers}
    axes = {r.source: r.axis for r in readers}
    for tensors in activations(model, list(found), calibration, limit=samples, threads=threads):
        for name, values in tensors.items():
            found[name].update(values, axes[name])
    return found
