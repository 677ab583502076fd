"""Reductions and pooling.

A reduced axis ends here: zeros add nothing to a sum (or a norm), so a dead unit of value 0 may leave it; a mean over n
positions of which k stay is the mean over k times k / n. A maximum sees zeros, so its axis keeps its length.

In a written-out normalisation the factor goes where runtimes still recognise it (RMS norm):

    gamma x / sqrt(k/n M + eps) = (gamma sqrt(n/k)) x / sqrt(M + eps n/k)       M = mean over k of x^2

and a variance is corrected for the dead positions, each of which holds 0 - m, m being what is subtracted (layer norm):

    var = k/n (mean over k of (x - m)^2 + (n/k - 1) m^2)
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.analysis import shapes
from graphopt.analysis.centred import reduced_axes, variance_of
from graphopt.analysis.dead_values import DeadValues
from graphopt.analysis.remove import Removal
from graphopt.analysis.rules import Labeller, OpRule, rule, where
from graphopt.rewriting.edit import sole_use
from graphopt.rewriting.nodes import is_onnx

_SUMS = ("ReduceSum", "ReduceSumSquare", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceMean")
_OTHERS = ("ReduceMax", "ReduceMin", "ReduceProd", "ReduceLogSumExp", "ArgMax", "ArgMin")


@rule
class Reduce(OpRule):
    """Reductions over axes given by attribute or input."""

    ops = (*_SUMS, *_OTHERS)

    def label(self, node: ir.Node, g: Labeller) -> None:
        name = where(node)
        source = node.inputs[0]
        found = reduced_axes(node)
        if found is None or source is None:
            g.freeze_node(node, f"{name}: its axes are computed")
            return
        axes, keep = found
        x = g.operand(node, 0)
        whole = source.dtype is not None and source.dtype.is_integer()
        if node.op_type == "ReduceMean" and whole:
            g.freeze(x, f"{name}: a mean of integers is rounded", only=axes)
        elif node.op_type in _SUMS:
            shifted = variance_of(node)  # what is asked to be zero then is the tensor before the shift, see `rewrite`
            for axis in axes:
                if axis in x:
                    g.sink(shifted or node, 0, axis, "zero", f"{name}: sums a value that is not zero")
        else:
            g.freeze(x, f"{name}: all positions of the axis are compared", only=axes)
        left = [axis for axis in range(len(shapes.dims(source) or ())) if keep or axis not in axes]
        g.set(node.outputs[0], {left.index(a): f for a, f in x.items() if a not in axes})

    def dead(self, node: ir.Node, d: DeadValues) -> None:
        found = reduced_axes(node)
        source = node.inputs[0]
        if found is None or source is None:
            return
        axes, keep = found
        left = [axis for axis in range(len(shapes.dims(source) or ())) if keep or axis not in axes]
        for axis in d.axes(node.outputs[0]):
            values = d.operand(node, 0, left[axis])
            if values is None:
                continue
            if node.op_type in {"ReduceMean", "ReduceMax", "ReduceMin"}:
                d.set(node.outputs[0], axis, values)
            elif node.op_type in {"ReduceSum", "ReduceSumSquare", "ReduceL1", "ReduceL2"}:
                d.set(node.outputs[0], axis, np.where(values == 0, 0.0, np.nan))

    def rewrite(self, node: ir.Node, r: Removal) -> None:
        found = reduced_axes(node)
        source = node.inputs[0]
        if node.op_type != "ReduceMean" or found is None or source is None:
            return
        before = after = 1
        for axis in found[0]:
            size = r.size(source, axis)
            if size is not None:
                before, after = before * size, after * r.operand_count(node, 0, axis)
        if after == before:
            return
        if not _into_norm(node, before / after, r):
            r.multiply_output(node, after / before)
        shifted = variance_of(node)
        mean = shifted.inputs[1] if shifted is not None else None
        if mean is not None:
            stem = f"{mean.name}_of_removed"
            if mean.dtype != source.dtype and source.dtype is not None:
                mean = r.cast_before(node, mean, source.dtype)
            square = r.compute_before(node, "Mul", [mean, mean], stem)
            r.add_to_output(node, r.compute_before(node, "Mul", [square, before / after - 1], stem))


def _into_norm(mean: ir.Node, ratio: float, r: Removal) -> bool:
    """Let epsilon and gamma of a written-out RMS norm take over the factor 1 / ratio of its mean; False: there is none.

    The pattern is mean + epsilon -> root -> quotient or reciprocal and product -> gain, each read by the next alone.
    """
    add = _reader(mean, "Add")
    if add is None:
        return False
    epsilon = 1 - next(i for i, v in enumerate(add.inputs) if v is mean.outputs[0])
    root = _reader(add, "Sqrt")
    quotient = _divided_by(root) if root is not None else None
    gain = _reader(quotient, "Mul", "Cast") if quotient is not None else None
    if gain is not None and gain.op_type == "Cast":
        gain = _reader(gain, "Mul")
    if gain is None or shapes.scalar(add.inputs[epsilon]) is None:
        return False
    factors = [i for i, v in enumerate(gain.inputs) if shapes.constant_tensor(v) is not None]
    if not factors:
        return False
    r.change_operand(add, epsilon, lambda array: array * ratio)
    r.change_operand(gain, factors[0], lambda array: array * np.sqrt(ratio))
    return True


def _divided_by(root: ir.Node) -> ir.Node | None:
    """What divides by the result of a node, by a quotient or by a product with 1 / root."""
    division = _reader(root, "Div", "Reciprocal")
    if division is None or division.op_type == "Reciprocal":
        return None if division is None else _reader(division, "Mul")
    if division.inputs[1] is not root.outputs[0]:
        return None
    return _reader(division, "Mul") if shapes.constant_tensor(division.inputs[0]) is not None else division


def _reader(node: ir.Node, *op_types: str) -> ir.Node | None:
    """The one reader of a node's result, where it is one of these operators."""
    use = sole_use(node.outputs[0])
    return use.node if use is not None and is_onnx(use.node, *op_types) else None


@rule
class Pool(OpRule):
    """Pooling over the spatial axes: batch and channels pass."""

    ops = (
        *("MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"),
        *("MaxRoiPool", "RoiAlign"),
    )

    def label(self, node: ir.Node, g: Labeller) -> None:
        name = where(node)
        x = g.operand(node, 0)
        g.freeze(x, f"{name}: the axis is pooled over", but=(0, 1))
        if len(node.outputs) > 1 and node.outputs[1].uses():
            g.freeze(x, f"{name}: its indices count every channel")
        for index in range(1, len(node.inputs)):
            g.freeze(g.operand(node, index), f"{name}: regions are no units")
        passing = (1,) if node.op_type in {"MaxRoiPool", "RoiAlign"} else (0, 1)
        g.freeze(x, f"{name}: regions choose the sample", only=[axis for axis in (0,) if axis not in passing])
        g.set(node.outputs[0], {axis: x[axis] for axis in passing if axis in x})

    def dead(self, node: ir.Node, d: DeadValues) -> None:
        output = node.outputs[0]
        if 1 not in d.axes(output):
            return
        values = d.operand(node, 0, 1)
        if values is None:
            return
        same = node.op_type in {"MaxPool", "GlobalMaxPool", "GlobalAveragePool"} or (
            node.op_type == "AveragePool" and not node.attributes.get_int("count_include_pad", 0)
        )
        d.set(output, 1, values if same else np.where(values == 0, 0.0, np.nan))
