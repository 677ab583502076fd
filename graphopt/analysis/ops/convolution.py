"""Conv and ConvTranspose of every kind: plain, depthwise, grouped.

With g groups, the weight's axis 0 is split by group and axis 1 is not: Conv [g o, c, k...] reads along axis 1 and
writes along axis 0, ConvTranspose [g c, o, k...] the other way round. For g = 1 the axis read is tied to the channels
of the input and the axis written names the output's. For g > 1 the split axis is a box of groups and positions, and
either may go (`graphopt.analysis.labels`):

    group     a whole group, and `group` is one less; it reads only what dies with it. Depthwise: these alone
    position  the same position in every group; on the unsplit side, one of its channels

A dead input channel of constant value v adds v * sum(W[:, channel]) to every output, exactly so where no padding mixes
zeros in; v = 0 is exact everywhere.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.analysis import shapes
from graphopt.analysis.dead_values import DeadValues
from graphopt.analysis.folding import fold_constants
from graphopt.analysis.labels import Axes, Factors, Vector
from graphopt.analysis.remove import Removal
from graphopt.analysis.rules import Accepts, CostView, Labeller, OpRule, Product, rule, where


def padded(node: ir.Node) -> bool:
    """True where the convolution may mix padding zeros into its sums."""
    mode = node.attributes.get_string("auto_pad", "NOTSET")
    if mode in {"SAME_UPPER", "SAME_LOWER"}:
        return True
    return mode != "VALID" and any(node.attributes.get_ints("pads", ()) or ())


def groups(node: ir.Node) -> int:
    """Number of groups."""
    return int(node.attributes.get_int("group", 1) or 1)


def weight_shape(node: ir.Node, index: int = 1) -> list[int] | None:
    """Shape of the weight, constant or computed (dequantised, say); None where it is not known."""
    weight = node.inputs[index]
    found = shapes.dims(weight) if weight is not None else None
    sizes = [d for d in found or () if isinstance(d, int)]
    return sizes if found and len(sizes) == len(found) else None


class Convolution(OpRule):
    """What convolutions share.

    Attributes:
        reads, writes: which axis of the weight reads and which writes.
        weight, bias: operands.
        folds: constants of dead units are added to the bias.
    """

    reads: ClassVar[int] = 1
    writes: ClassVar[int] = 0
    weight: ClassVar[int] = 1
    bias: ClassVar[int] = 2
    folds: ClassVar[bool] = True

    def label(self, node: ir.Node, g: Labeller) -> None:
        name = where(node)
        source = node.inputs[0]
        assert source is not None
        size = weight_shape(node, self.weight)
        if size is None:
            g.freeze_node(node, f"{name}: the shape of its weight is not known")
            return
        x = g.operand(node, 0)
        w = g.operand(node, self.weight, {self.reads: "consumer", self.writes: "producer"}, only=(0, 1))
        g.freeze(w, f"{name}: kernel positions are no units", but=(0, 1))
        w = {axis: (g.table.product(factors),) for axis, factors in w.items()}
        passing = self.passing(node, size)
        g.freeze(x, f"{name}: the axis is convolved over", but=(0, 1, *passing))
        count = groups(node)
        inside: Factors = ()
        if count == 1:
            read, out = w.get(self.reads, ()), w.get(self.writes, ())
        else:
            split, whole, inside = self._grouped(name, g, w, size[1], count)
            read, out = (whole, split) if self.reads == 1 else (split, whole)
        if read or 1 in x:
            g.equate(x.get(1, ()), read, f"{name}: its input channels are never removed")
        bias = g.operand(node, self.bias, {0: "producer"}).get(0, ())
        if bias:
            out = g.equate(out, bias, f"{name}: its output channels are never removed")
        g.set(node.outputs[0], {0: x.get(0, ()), 1: out, **{axis: x[axis] for axis in passing if axis in x}})
        if 1 in x and count > 1:
            if self.reads == 1:
                g.sink(node, 0, 1, "anything", f"{name}: a whole group reads only what dies with it")
            else:
                # A dead group has no filters of zeros here: what it reads passes on, to outputs that die with it.
                g.sink(node, 0, 1, "zero", f"{name}: a whole group reads a value that is not zero")
        if 1 in x and (count == 1 or inside):
            self.ends(node, g, constants=count == 1 and self.reads == 1, factors=inside)

    @staticmethod
    def passing(node: ir.Node, size: list[int]) -> list[int]:
        """Spatial axes whose positions are all convolved alone: no unit of one meets another."""
        space = len(size) - 2
        strides = list(node.attributes.get_ints("strides", ()) or [1] * space)
        pads = list(node.attributes.get_ints("pads", ()) or [0] * (2 * space))
        pads = [0] * (2 * space) if node.attributes.get_string("auto_pad", "NOTSET") != "NOTSET" else pads
        if {"output_shape", "output_padding"} & set(node.attributes):
            return []
        alone = ((size[k + 2], strides[k], pads[k], pads[k + space]) == (1, 1, 0, 0) for k in range(space))
        return [k + 2 for k, yes in enumerate(alone) if yes]

    def ends(self, node: ir.Node, g: Labeller, *, constants: bool, factors: Factors) -> None:
        """Record what the input channels may hold where they die."""
        constants &= shapes.constant_tensor(node.inputs[self.weight]) is not None and not padded(node)
        accepts: Accepts = "constant" if constants else "zero"
        beside = " next to padding" if self.reads == 1 and padded(node) else ""
        told = "an unknown value" if constants else f"a value that is not zero{beside}"
        g.sink(node, 0, 1, accepts, f"{where(node)}: reads {told}", factors)

    def _grouped(self, name: str, g: Labeller, w: Axes, inner: int, count: int) -> tuple[Factors, Factors, Factors]:
        """Labels of the activations on the split and on the unsplit side, and of the positions in groups that read."""
        if 0 not in w:
            return (), (), ()
        box = g.table.box(w[0][0].reshape(count, -1), name)
        unsplit = tuple(np.tile(vector, count) for vector in w.get(1, ()))
        whole = (*(np.repeat(vector, inner) for vector in box.get(0, ())), *unsplit)
        return w[0], whole, unsplit if self.reads == 1 else tuple(np.tile(v, count) for v in box.get(1, ()))

    def dead(self, node: ir.Node, d: DeadValues) -> None:
        output, source = node.outputs[0], node.inputs[0]
        if 1 not in d.axes(output):
            return
        size = d.size(output, 1)
        bias = d.operand(node, self.bias, 0)
        constant = shapes.constant_tensor(node.inputs[self.weight]) is not None
        array = None if d.hypothetical else shapes.constant(node.inputs[self.weight])
        if array is None:
            # The filter of a dead unit is zero; a computed one is where what it is computed from says so.
            filters = None if constant else d.operand(node, self.weight, self.writes)
            if not constant and (filters is None or len(filters) != size):
                return
            zero = np.zeros(size) if filters is None else np.where(filters == 0, 0.0, np.nan)
            no_bias = len(node.inputs) <= self.bias or node.inputs[self.bias] is None
            d.set(output, 1, zero if no_bias else zero + (np.nan if bias is None else bias))
            return
        inputs = d.of(source, 1) if source is not None else None
        # kernel[group, out, in, position] and inputs[group, in], the same for both operators
        count = groups(node)
        kernel = array.astype(np.float64).reshape(count, -1, array.shape[1], int(np.prod(array.shape[2:])))
        kernel = kernel if self.reads == 1 else kernel.swapaxes(1, 2)
        read = kernel.shape[2]
        inputs = np.full((count, read), np.nan) if inputs is None else inputs.reshape(count, read)
        constants_pass = self.reads == 1 and not padded(node)
        usable = ~np.isnan(inputs) & ((inputs == 0) | constants_pass)
        known = ~(np.any(kernel, axis=3) & ~usable[:, None, :]).any(axis=2)
        total = np.einsum("goik,gi->go", kernel, np.where(usable, inputs, 0.0))
        result = np.where(known, total, np.nan).ravel()
        d.set(output, 1, result + (0.0 if bias is None else bias))

    def cost(self, node: ir.Node, c: CostView) -> list[Product]:
        positions = node.outputs[0] if self.reads == 1 else node.inputs[0]
        size = weight_shape(node, self.weight)
        spatial = shapes.static_dims(positions) if positions is not None else None
        if spatial is None or size is None:
            return []
        passing = self.passing(node, size)
        fixed = [d for axis, d in enumerate(spatial) if axis != 1 and axis not in passing]
        points, over = float(np.prod(fixed)) * float(np.prod(size[2:])), tuple[Vector, ...]()
        for axis in passing:
            count, labels = c.result(node, axis, spatial[axis])
            points, over = points * count, (*over, *labels)
        first, one = c.axis(node, self.weight, 0, size[0])
        second, two = c.axis(node, self.weight, 1, size[1])
        return [(points * first * second, (*one, *two, *over))]

    def rewrite(self, node: ir.Node, r: Removal) -> None:
        source = node.inputs[0]
        assert source is not None
        count = groups(node)
        if count == 1:
            if self.reads == 1 and self.folds:
                fold_constants(r, node, source, 1, weight=self.weight, bias=self.bias)
            return
        mask = r.operand_mask(node, self.weight, 0)
        left = count if mask is None else int(mask.reshape(count, -1).any(axis=1).sum())
        if left != count:
            node.attributes.add(ir.AttrInt64("group", left))


@rule
class Conv(Convolution):
    """Conv: weight [O, C/g, k...]."""

    ops = ("Conv",)


@rule
class ConvTranspose(Convolution):
    """ConvTranspose: weight [C, O/g, k...]."""

    ops = ("ConvTranspose",)
    reads = 0
    writes = 1


@rule
class DeformConv(Convolution):
    """Convolution that samples its input at offsets: channels as in Conv, offsets in one group only."""

    ops = ("DeformConv",)
    bias = 3
    folds = False

    def label(self, node: ir.Node, g: Labeller) -> None:
        if node.attributes.get_int("offset_group", 1) != 1:
            g.freeze_node(node, f"{where(node)}: groups of channels have offsets of their own")
            return
        super().label(node, g)

    @staticmethod
    def passing(node: ir.Node, size: list[int]) -> list[int]:
        return []  # the offsets lie along them too

    def ends(self, node: ir.Node, g: Labeller, *, constants: bool, factors: Factors) -> None:
        super().ends(node, g, constants=False, factors=factors)
