"""fold-pad: a Pad of the spatial axes goes into the padding of the convolutions and pools that read it.

Conv(pad 0)                = Conv with wider padding: that is what it pads with
MaxPool(pad -inf)          = MaxPool with wider padding; so is a pad of c where nothing in x is below c and every
                             window holds at least one value of x
AveragePool(pad 0)         = AveragePool with wider padding that counts it (count_include_pad)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from graphopt.base import Context, Effect, Pass, PassResult, Skip
from graphopt.rewriting.constants import array, constant
from graphopt.rewriting.edit import bypass
from graphopt.rewriting.nodes import is_onnx, label, mark_origin
from graphopt.rewriting.scopes import scopes
from graphopt.rewriting.windows import Ints, Windows, store_windows, windows

_NOT_NEGATIVE = ("Relu", "Sigmoid", "HardSigmoid", "Abs", "Exp", "Softmax", "Softplus", "ReduceL2", "Sqrt")
"""Operators that give nothing below zero (and NaN only for NaN)."""


@dataclass(frozen=True)
class FoldPad(Pass):
    """Fold Pad into the Conv, MaxPool or AveragePool that reads it; all its readers must take it.

    Algebra: padding commutes with nothing, it is the same thing twice: see the file. `auto_pad` of a reader is written
    as numbers where it is VALID; SAME counts the padded input, and is written as numbers where its size is known.

    Does not fire: where the mode is not constant, on batch and channel axes, on negative pads (a crop), with another
    value than the reader pads with, where the tensor is given out or read by anything else, where a pool rounds up
    (`ceil_mode`), gives indices, or has padding of its own that it does not count.
    Preserves: names. Source: the operator specifications of ONNX.
    """

    name: ClassVar[str] = "fold-pad"
    effect: ClassVar[Effect] = Effect.EXACT

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Fold every Pad that a convolution or pool reads."""
        result = PassResult(changed=False)
        count = 0
        for graph, opset in scopes(model):
            for node in tuple(graph):
                if node.graph is not graph or not is_onnx(node, "Pad"):
                    continue
                if not any(is_onnx(use.node, *_READERS) and use.idx == 0 for use in node.outputs[0].uses()):
                    continue
                reason = _fold(node, opset)
                if reason:
                    result.skipped.append(Skip(label(node), reason))
                else:
                    count += 1
        if count:
            result.changed = True
            result.notes.append(f"{count} Pad folded into convolutions and pools")
        return result


@dataclass(frozen=True)
class _Pad:
    """What a Pad adds before and after each spatial axis, and the value."""

    begins: Ints
    ends: Ints
    value: float


def _fold(node: ir.Node, opset: int) -> str | None:
    pad = _pad_of(node, opset)
    if isinstance(pad, str):
        return pad
    value, source = node.outputs[0], node.inputs[0]
    if value.is_graph_output() or source is None:
        return "its result is given out"
    new: list[tuple[ir.Node, Windows]] = []
    for use in value.uses():
        reader = use.node
        if use.idx != 0 or not is_onnx(reader, *_READERS):
            return f"{reader.op_type} reads it too"
        if reader.graph is not node.graph:
            return f"the {reader.op_type} that reads it is inside a body"
        found = _wider(reader, pad, source, opset)
        if isinstance(found, str):
            return f"{reader.op_type} reads it: {found}"
        new.append((reader, found))
    for reader, wider in new:
        store_windows(reader, wider)
        if is_onnx(reader, "AveragePool"):
            reader.attributes["count_include_pad"] = ir.AttrInt64("count_include_pad", 1)
        mark_origin(reader, [label(node)])
    return bypass(node, source)


def _pad_of(node: ir.Node, opset: int) -> _Pad | str:
    if any(a.is_ref() for a in node.attributes.values()):
        return "an attribute of it is given by the caller of the function"
    mode = node.attributes.get_string("mode", "constant")
    if mode != "constant":
        return f"it pads by mode={mode}"
    fill: float | None = 0.0
    pads: NDArray[Any] | None
    if opset < 11:
        pads = np.array(node.attributes.get_ints("pads", node.attributes.get_ints("paddings", ())))
        fill, axes = node.attributes.get_float("value", 0.0), None
    else:
        pads, axes = array(node.inputs[1]) if len(node.inputs) > 1 else None, None
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            filled = array(node.inputs[2])
            fill = None if filled is None or filled.size != 1 else float(filled.reshape(-1)[0])
        if len(node.inputs) > 3 and node.inputs[3] is not None:
            axes = array(node.inputs[3])
            if axes is None:
                return "its axes are not constant"
    if pads is None or fill is None:
        return "how much it pads, or with what, is not constant"
    numbers = [int(p) for p in pads]
    half = len(numbers) // 2
    rank = half if axes is None else _rank(node)
    if rank is None:
        return "its rank is not known"
    begins, ends = [0] * rank, [0] * rank
    for position, axis in enumerate(range(rank) if axes is None else (int(a) % rank for a in axes)):
        begins[axis], ends[axis] = numbers[position], numbers[position + half]
    if any((*begins[:2], *ends[:2])):
        return "it pads the batch or the channels"
    if any(p < 0 for p in (*begins, *ends)):
        return "it crops"
    return _Pad(tuple(begins[2:]), tuple(ends[2:]), fill)


def _rank(node: ir.Node) -> int | None:
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    return None if shape is None else len(shape)


def _wider(reader: ir.Node, pad: _Pad, source: ir.Value, opset: int) -> Windows | str:
    """The windows of `reader` on what the Pad reads, or why there are none."""
    if any(a.is_ref() for a in reader.attributes.values()):
        return "an attribute of it is given by the caller of the function"
    kernel = _kernel(reader)
    if len(kernel) != len(pad.begins):
        return "its kernel is not known"
    own = windows(reader, kernel)
    if isinstance(own, str):
        return own
    begins = tuple(a + b for a, b in zip(own.begins, pad.begins, strict=True))
    ends = tuple(a + b for a, b in zip(own.ends, pad.ends, strict=True))
    new = replace(own, begins=begins, ends=ends)
    return _REASONS[reader.op_type](reader, pad, source, opset, own, new) or new


def _kernel(reader: ir.Node) -> Ints:
    """Spatial sizes of a reader's kernel; () where they are not known."""
    if "kernel_shape" in reader.attributes:
        return tuple(reader.attributes.get_ints("kernel_shape", ()))
    weight = reader.inputs[1] if len(reader.inputs) > 1 else None
    tensor = constant(weight)
    if tensor is not None:
        return tuple(int(d) for d in tensor.shape.numpy())[2:]
    shape = weight.shape if weight is not None else None
    sizes = [] if shape is None else [d for d in list(shape)[2:] if isinstance(d, int)]
    return tuple(sizes)


def _conv_blocked(reader: ir.Node, pad: _Pad, source: ir.Value, opset: int, own: Windows, new: Windows) -> str | None:
    return None if pad.value == 0 else f"a convolution pads with 0, not with {pad.value:g}"


def _pool_blocked(reader: ir.Node, opset: int, new: Windows) -> str | None:
    if reader.attributes.get_int("ceil_mode", 0):
        return "it rounds its size up, and windows may lie in the padding"
    axes = zip(new.kernel, new.begins, new.ends, strict=True)
    if any(max(b, e) >= k for k, b, e in axes):
        return "its padding would be as wide as its kernel"
    return None


def _max_blocked(reader: ir.Node, pad: _Pad, source: ir.Value, opset: int, own: Windows, new: Windows) -> str | None:
    if any(v.uses() or v.is_graph_output() for v in reader.outputs[1:]):
        return "its indices are in use"
    dtype = source.dtype
    if dtype is None or not dtype.is_floating_point():
        return "what it reads is not known to be floating-point"
    if any(d != 1 for d in new.dilations):
        return "with its dilation a window may see the padding alone"
    if pad.value != -np.inf and not (pad.value <= 0 and _not_negative(source)):
        return f"what it reads may be less than {pad.value:g}"
    return _pool_blocked(reader, opset, new)


def _average_blocked(
    reader: ir.Node, pad: _Pad, source: ir.Value, opset: int, own: Windows, new: Windows
) -> str | None:
    if pad.value != 0:
        return f"an average pool pads with 0, not with {pad.value:g}"
    if opset < 7:
        return f"opset {opset} has no count_include_pad (7 or newer)"
    if own.padded and not reader.attributes.get_int("count_include_pad", 0):
        return "it does not count its own padding"
    return _pool_blocked(reader, opset, new)


_REASONS = {"Conv": _conv_blocked, "MaxPool": _max_blocked, "AveragePool": _average_blocked}
_READERS = tuple(_REASONS)


def _not_negative(value: ir.Value) -> bool:
    """Whether a tensor is known to hold nothing below zero."""
    node = value.producer()
    if node is None:
        return False
    if is_onnx(node, "Clip"):
        least = node.attributes.get_float("min", None)
        bound = array(node.inputs[1]) if len(node.inputs) > 1 else None
        return (least is not None and least >= 0) or (
            bound is not None and bound.size == 1 and bool((bound >= 0).all())
        )
    if is_onnx(node, "MaxPool", "AveragePool", "Identity", "Dropout") and node.inputs[0] is not None:
        return _not_negative(node.inputs[0])
    return is_onnx(node, *_NOT_NEGATIVE)
