"""BatchNormalization, InstanceNormalization, groups, and the operators that judge a whole axis together (softmax).

Batch and instance normalisation work channel by channel: the channel keeps its labels and takes its scale, bias and
statistics along. An operator that mixes positions of an axis freezes that axis. Norms over the last axis are in
`graphopt.analysis.ops.layer_norm`.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.analysis import shapes
from graphopt.analysis.dead_values import DeadValues
from graphopt.analysis.grouped import WHOLE, spread, spread_operand, take_result, written_norm
from graphopt.analysis.labels import Factors
from graphopt.analysis.remove import Removal
from graphopt.analysis.rules import Labeller, OpRule, Role, rule, where


class _ChannelNorm(OpRule):
    """Axis 1 carries scale, bias and statistics."""

    roles: tuple[Role, ...] = ()

    def label(self, node: ir.Node, g: Labeller) -> None:
        name = where(node)
        x = g.operand(node, 0)
        channels = x.get(1, ())
        for index, role in enumerate(self.roles, start=1):
            own = self._vector(node, g, index, role)
            if own or channels:
                channels = g.equate(channels, own, f"{name}: its channels are never removed")
        g.set(node.outputs[0], {**x, 1: channels})

    @staticmethod
    def _vector(node: ir.Node, g: Labeller, index: int, role: Role) -> Factors:
        """Labels of a parameter by channel; what BatchNormalization before opset 9 has by position stays whole."""
        axes = g.operand(node, index, role=role)
        if set(axes) - {0}:
            g.freeze(axes, f"{where(node)}: normalises each position by itself", but=(0,))
            g.freeze(g.operand(node, 0), f"{where(node)}: normalises each position by itself", but=(0, 1))
        return axes.get(0, ())


@rule
class BatchNormalization(_ChannelNorm):
    """Y = scale (X - mean) / sqrt(var + epsilon) + B, per channel."""

    ops = ("BatchNormalization",)
    roles = ("producer", "producer", "follower", "follower")

    def label(self, node: ir.Node, g: Labeller) -> None:
        # Before opset 14 more than one output meant training.
        if node.attributes.get_int("training_mode", 0) or len(node.outputs) > 1:
            g.freeze_node(node, f"{where(node)}: in training mode its statistics come from the batch")
            return
        super().label(node, g)

    def dead(self, node: ir.Node, d: DeadValues) -> None:
        output = node.outputs[0]
        for axis in d.axes(output):
            if axis != 1:
                continue
            x, scale, bias, mean, variance = (d.operand(node, i, 1 if i == 0 else 0) for i in range(5))
            if scale is None or bias is None or mean is None or variance is None:
                continue
            x = np.full(d.size(output, 1), np.nan) if x is None else x
            epsilon = node.attributes.get_float("epsilon", 1e-5)
            with np.errstate(invalid="ignore", divide="ignore"):  # a variance below -epsilon: not a number, not exact
                normal = np.where(scale == 0, 0.0, scale * (x - mean) / np.sqrt(variance + epsilon))
            d.set(output, 1, normal + bias)


@rule
class InstanceNormalization(_ChannelNorm):
    """Each channel of each sample normalised over its positions: a constant channel becomes its bias.

    Exporters write group normalisation as a reshape of each group to one channel, this operator, the reshape back and
    a gain for each true channel: see `graphopt.analysis.grouped`.
    """

    ops = ("InstanceNormalization",)
    roles = ("producer", "producer")

    def label(self, node: ir.Node, g: Labeller) -> None:
        x = g.operand(node, 0)
        g.freeze(x, f"{where(node)}: the axis is normalised over", but=(0, 1))
        if written_norm(node) is not None:
            for index in (1, 2):
                g.freeze(g.operand(node, index), f"{where(node)}: an entry goes with the last channel of its group")
            g.set(node.outputs[0], {0: x.get(0, ())})
            return
        super().label(node, g)
        g.set(node.outputs[0], {axis: f for axis, f in g.of(node.outputs[0]).items() if axis < 2})

    def dead(self, node: ir.Node, d: DeadValues) -> None:
        output = node.outputs[0]
        if 1 in d.axes(output):
            x, scale, bias = d.operand(node, 0, 1), d.operand(node, 1, 0), d.operand(node, 2, 0)
            if scale is not None and bias is not None:
                constant = (scale == 0) if x is None else (scale == 0) | ~np.isnan(x)
                d.set(output, 1, np.where(constant, bias, np.nan))


@rule
class AxisTogether(OpRule):
    """Softmax and its kin: one axis is judged together and keeps its length; the other axes pass."""

    ops = ("Softmax", "LogSoftmax", "Hardmax", "CumSum")

    def label(self, node: ir.Node, g: Labeller) -> None:
        x = g.operand(node, 0)
        rank = len(shapes.dims(node.inputs[0]) or ()) if node.inputs[0] is not None else 0
        if node.op_type == "CumSum":
            axis = shapes.scalar(node.inputs[1])
            together = [int(axis) % rank] if axis is not None and rank else list(x)
        else:
            old = shapes.opset(node) < 13
            axis = node.attributes.get_int("axis", 1 if old else -1) or 0
            first = int(axis) % rank if rank else 0
            together = list(range(first, rank)) if old else [first]
        g.freeze(x, f"{where(node)}: all positions of the axis are judged together", only=together)
        g.set(node.outputs[0], {a: f for a, f in x.items() if a not in together})

    def dead(self, node: ir.Node, d: DeadValues) -> None:
        if node.op_type != "CumSum":
            return
        for axis in d.axes(node.outputs[0]):
            values = d.operand(node, 0, axis)
            if values is not None:
                d.set(node.outputs[0], axis, np.where(values == 0, 0.0, np.nan))


@rule
class GroupNormalization(OpRule):
    """Each group of channels of each sample normalised together: channels with a scale of their own go one by one.

    See `graphopt.analysis.grouped`. Before opset 21 scale and bias
    are per group: whole groups go, and `num_groups` shrinks; a group that holds one constant becomes its bias.
    """

    ops = ("GroupNormalization",)

    @staticmethod
    def _groups(node: ir.Node) -> int:
        return int(node.attributes.get_int("num_groups", 1) or 1)

    def _single(self, node: ir.Node) -> bool:
        """Whether each channel has a scale of its own, and may go by itself."""
        if WHOLE in node.metadata_props:
            return False
        sizes, shape = shapes.sizes(node.inputs[1]), shapes.dims(node.outputs[0])
        return sizes is not None and shape is not None and sizes == [shape[1]] and sizes != [self._groups(node)]

    def label(self, node: ir.Node, g: Labeller) -> None:
        name = where(node)
        x = g.operand(node, 0)
        g.freeze(x, f"{name}: the axis is normalised over", but=(0, 1))
        if 1 not in x:
            for index in (1, 2):
                g.freeze(g.operand(node, index), f"{name}: its channels are never removed")
            g.set(node.outputs[0], {0: x.get(0, ())})
            return
        channels, count = g.table.product(x[1]), self._groups(node)
        rows = channels.reshape(count, -1)
        if self._single(node):
            g.sink(node, 0, 1, "zero", f"{name}: normalises a value that is not zero")
        else:
            g.table.equate(rows, rows[:, :1], f"{name}: shares a group with a channel that is never removed")
        if count == 1 and not self._single(node):
            g.freeze(x, f"{name}: all channels are normalised together", only=(1,))
        for index in (1, 2):
            own = g.operand(node, index, role="producer").get(0, ())
            wide = rows[:, 0] if own and len(own[0]) == count else channels
            g.equate((wide,), own, f"{name}: its scales are never shortened")
        g.set(node.outputs[0], {0: x.get(0, ()), 1: (channels,)})

    def dead(self, node: ir.Node, d: DeadValues) -> None:
        output = node.outputs[0]
        scale, bias = d.operand(node, 1, 0), d.operand(node, 2, 0)
        if 1 not in d.axes(output) or scale is None or bias is None:
            return
        size = d.size(output, 1)
        if self._single(node):
            d.set(output, 1, np.where(scale == 0, bias, np.nan))
            return
        x = d.operand(node, 0, 1)
        rows = np.full(size, np.nan) if x is None else x
        rows = rows.reshape(self._groups(node), -1)
        uniform = np.repeat((rows == rows[:, :1]).all(axis=1), rows.shape[1])
        scale, bias = (np.repeat(v, size // len(v)) for v in (scale, bias))
        d.set(output, 1, np.where(uniform | (scale == 0), bias, np.nan))

    def rewrite(self, node: ir.Node, r: Removal) -> None:
        mask = r.mask(node.outputs[0], 1)
        if mask is None:
            return
        plan = spread(mask, self._groups(node))
        if not plan.whole:
            for index in (1, 2):  # first: a result that is cut leaves its name, which the node is known by
                r.change_operand(node, index, lambda array: np.append(array, 0.0)[plan.index])
        spread_operand(node, plan, r)
        node.attributes.add(ir.AttrInt64("num_groups", int(plan.groups.sum())))
        take_result(node, plan, r)


@rule
class LpNormalization(OpRule):
    """x / ||x||_p along one axis: zeros add nothing to the norm and stay zero."""

    ops = ("LpNormalization",)

    def label(self, node: ir.Node, g: Labeller) -> None:
        x = g.operand(node, 0)
        axis = self._axis(node)
        if axis is None:
            g.freeze_node(node, f"{where(node)}: the rank of its input is unknown")
            return
        if axis in x:
            g.sink(node, 0, axis, "zero", f"{where(node)}: sums a value that is not zero")
        g.set(node.outputs[0], x)

    @staticmethod
    def _axis(node: ir.Node) -> int | None:
        source = node.inputs[0]
        shape = shapes.dims(source) if source is not None else None
        return None if not shape else int(node.attributes.get_int("axis", -1) or 0) % len(shape)

    def dead(self, node: ir.Node, d: DeadValues) -> None:
        for axis in d.axes(node.outputs[0]):
            values = d.operand(node, 0, axis)
            if values is not None and axis == self._axis(node):
                d.set(node.outputs[0], axis, np.where(values == 0, 0.0, np.nan))


@rule
class MeanVarianceNormalization(OpRule):
    """(x - mean) / deviation over `axes`, by default all but the channels: the other axes pass. Zeros become 0 / 0."""

    ops = ("MeanVarianceNormalization",)

    def label(self, node: ir.Node, g: Labeller) -> None:
        x = g.operand(node, 0)
        source = node.inputs[0]
        shape = shapes.dims(source) if source is not None else None
        if shape is None:
            g.freeze_node(node, f"{where(node)}: the rank of its input is unknown")
            return
        together = {axis % max(len(shape), 1) for axis in node.attributes.get_ints("axes", (0, 2, 3))}
        g.freeze(x, f"{where(node)}: all positions of the axis are normalised together", only=together)
        g.set(node.outputs[0], {axis: f for axis, f in x.items() if axis not in together})


@rule
class AcrossChannels(OpRule):
    """LRN mixes neighbouring channels: the channel axis keeps its length."""

    ops = ("LRN",)

    def label(self, node: ir.Node, g: Labeller) -> None:
        g.freeze_node(node, f"{where(node)}: channels are normalised together")
