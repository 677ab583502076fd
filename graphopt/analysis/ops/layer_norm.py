"""LayerNormalization and RMSNormalization as single operators, with or without the residual sum before them.

Both judge the positions of the axes from `axis` on together, n in the dense model, k after the removal. A dead unit is
zero at every writer of its axis, so it adds nothing to a sum, and statistics of the k that stay can be corrected.

RMS:    y = gamma x / sqrt(S / n + eps)                                S = sum of squares, over k as over n
          = (gamma sqrt(n / k)) x / sqrt(S / k + eps n / k)            gamma' and eps' absorb it: nothing is added

Layer:  y = gamma (x - m) / sqrt(v + eps) + beta. The zeros of the dead enter m and v, and a dead position gives
        beta - gamma m / sqrt(v + eps), so its gamma and beta belong to the unit: zero with the rest of it, they make
        the position zero. What is left is padded with zeros to n positions, normalised as before, and cut again:
        runtimes keep their fused kernel, and the pads cost little beside it. Once the writers of the stream are
        centred the RMS form holds, which needs no pads (`graphopt.rewriting.centring`).

Source: Zhang & Sennrich, arXiv:1910.07467, for RMS; the corrections follow from the definitions.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.analysis import shapes
from graphopt.analysis.dead_values import DeadValues, Floats, elementwise_value
from graphopt.analysis.labels import Axes
from graphopt.analysis.padding import cannot_pad, own_axis, pad_to_dense, shortened, spans
from graphopt.analysis.remove import Removal
from graphopt.analysis.rules import Labeller, OpRule, Role, rule, where


class _Norm(OpRule):
    """What the norms share: where the operands stand, labels, dead values of the residual sum.

    Attributes:
        addends: operands that are added before the norm; the first is as large as the result.
        gain, shift: gamma and beta.
        gain_role: see `Role`.
        sum_output: index of the output that gives the residual sum.
    """

    addends: ClassVar[tuple[int, ...]] = (0,)
    gain: ClassVar[int] = 1
    shift: ClassVar[int | None] = None
    gain_role: ClassVar[Role] = "follower"
    sum_output: ClassVar[int | None] = None

    def label(self, node: ir.Node, g: Labeller) -> None:
        name = where(node)
        rank = _rank(node)
        if rank is None:
            g.freeze_node(node, f"{name}: the rank of an operand is unknown")
            return
        first = _first(node, rank)
        addends = {index: g.operand(node, index, role="producer") for index in self._addends(node)}
        parameters = {
            index: g.operand(node, index, role=self.gain_role if index == self.gain else "producer")
            for index in self._parameters(node)
        }
        labels = _sum_labels(node, g, addends, rank)
        for axis in range(first, rank):
            for index, own in parameters.items():
                if spans(node, index, axis, rank) and (axis in labels or own):
                    theirs = own.get(own_axis(node, index, axis, rank), ())
                    labels[axis] = g.equate(labels.get(axis, ()), theirs, f"{name}: its channels are never removed")
            for index, own in addends.items():
                if own_axis(node, index, axis, rank) in own:
                    reason = f"{name}: normalises a value that is not zero"
                    g.sink(node, index, own_axis(node, index, axis, rank), "zero", reason)
        refused = self._refused(node)
        if refused is not None:
            g.freeze(labels, f"{name}: {refused}", only=range(first, rank))
        for index, output in enumerate(node.outputs):
            if output.name:  # a mean or deviation: one number for all positions of the axes
                statistic = index not in {0, self.sum_output}
                g.set(output, {axis: f for axis, f in labels.items() if axis < first or not statistic})

    def _addends(self, node: ir.Node) -> list[int]:
        return [i for i in self.addends if i < len(node.inputs) and node.inputs[i] is not None]

    def _parameters(self, node: ir.Node) -> list[int]:
        wanted = (self.gain, self.shift)
        return [i for i in wanted if i is not None and i < len(node.inputs) and node.inputs[i] is not None]

    def _refused(self, node: ir.Node) -> str | None:
        """Why the axes keep their lengths; None where they do not."""
        return None

    def dead(self, node: ir.Node, d: DeadValues) -> None:
        output = node.outputs[0]
        rank = len(shapes.dims(output) or ())
        there = self.sum_output is not None and self.sum_output < len(node.outputs)
        given = node.outputs[self.sum_output or 0] if there else None
        for axis in d.axes(output):
            total = np.zeros(d.size(output, axis))
            for index in self._addends(node):
                total = total + elementwise_value(node, index, output, axis, d)
            if given is not None and given.name:
                d.set(given, axis, total)
            if axis >= _first(node, rank):
                gain, shift = (self._parameter(node, index, axis, d) for index in (self.gain, self.shift))
                d.set(output, axis, self._normalised(total, gain, shift))

    @abstractmethod
    def _normalised(self, x: Floats, gain: Floats, shift: Floats) -> Floats:
        """Dead values of the result along an axis that is normalised, given those of the sum and the parameters."""

    def _parameter(self, node: ir.Node, index: int | None, axis: int, d: DeadValues) -> Floats:
        """A parameter along an axis of the result; one that is not there is 0."""
        if index is None or index not in self._parameters(node):
            return np.zeros(d.size(node.outputs[0], axis))
        return elementwise_value(node, index, node.outputs[0], axis, d)


def _rank(node: ir.Node) -> int | None:
    """Rank of the result; None where that of an operand is unknown."""
    known = [shapes.dims(value) for value in node.inputs if value is not None]
    return None if not known or any(shape is None for shape in known) else len(known[0] or ())


def _first(node: ir.Node, rank: int) -> int:
    """The first axis that is normalised."""
    return int(node.attributes.get_int("axis", -1) or 0) % max(rank, 1)


def _sum_labels(node: ir.Node, g: Labeller, addends: dict[int, Axes], rank: int) -> Axes:
    """Labels of a sum with broadcasting."""
    total: Axes = {}
    for axis in range(rank):
        sides = [addends[i].get(own_axis(node, i, axis, rank), ()) for i in addends if spans(node, i, axis, rank)]
        if any(sides):
            total[axis] = next(side for side in sides if side)
            for side in sides:
                if side is not total[axis]:
                    total[axis] = g.equate(total[axis], side, f"{where(node)}: an operand is never shortened")
    return total


class _RootMeanSquare(_Norm):
    """gamma' = gamma sqrt(n / k), eps' = eps n / k."""

    def _normalised(self, x: Floats, gain: Floats, shift: Floats) -> Floats:
        return np.where((x == 0) | (gain == 0), 0.0, np.nan)

    def rewrite(self, node: ir.Node, r: Removal) -> None:
        rank = len(shapes.dims(node.outputs[0]) or ())
        left = shortened(node, range(_first(node, rank), rank), r)
        ratio = math.prod(before / after for before, after in left.values())
        if ratio == 1:
            return
        epsilon = node.attributes.get_float("epsilon", 1e-5)
        node.attributes.add(ir.AttrFloat32("epsilon", float(epsilon or 0.0) * ratio))
        if not r.change_operand(node, self.gain, lambda gamma: gamma * np.sqrt(ratio)):
            r.multiply_output(node, float(np.sqrt(ratio)))


@rule
class RMSNormalization(_RootMeanSquare):
    """y = gamma x / sqrt(mean(x^2) + epsilon), opset 23."""

    ops = ("RMSNormalization",)


@rule
class SimplifiedLayerNormalization(_RootMeanSquare):
    """The same, as ONNX Runtime calls it; it stands in the standard domain of files that ONNX Runtime wrote."""

    ops = ("SimplifiedLayerNormalization",)


@rule
class ContribSimplifiedLayerNormalization(_RootMeanSquare):
    """The same in ONNX Runtime's own domain."""

    ops = ("SimplifiedLayerNormalization",)
    domain = "com.microsoft"


@rule
class SkipSimplifiedLayerNormalization(_RootMeanSquare):
    """RMS norm of input + skip + bias; the fourth output is that sum."""

    ops = ("SkipSimplifiedLayerNormalization",)
    domain = "com.microsoft"
    addends = (0, 1, 3)
    gain = 2
    sum_output = 3


class _Layer(_Norm):
    """Pads, normalises over the dense n, cuts."""

    shift = 2
    gain_role = "producer"

    def _normalised(self, x: Floats, gain: Floats, shift: Floats) -> Floats:
        return np.where(gain == 0, shift, np.nan)

    def _refused(self, node: ir.Node) -> str | None:
        return cannot_pad(node)

    def rewrite(self, node: ir.Node, r: Removal) -> None:
        rank = len(shapes.dims(node.outputs[0]) or ())
        results = (0,) if self.sum_output is None else (0, self.sum_output)
        operands = (*self._addends(node), *self._parameters(node))
        pad_to_dense(node, range(_first(node, rank), rank), operands, r, results)


@rule
class LayerNormalization(_Layer):
    """y = gamma (x - mean) / sqrt(variance + epsilon) + beta over the axes from `axis` on."""

    ops = ("LayerNormalization",)


@rule
class SkipLayerNormalization(_Layer):
    """Layer norm of input + skip + bias; the fourth output is that sum."""

    ops = ("SkipLayerNormalization",)
    domain = "com.microsoft"
    addends = (0, 1, 4)
    gain = 2
    shift = 3
    sum_output = 3
