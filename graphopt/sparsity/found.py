"""Which weights of a model are sparse, by looking: the pattern that really holds along the input channels.

Weights in float and weights in integers behind a DequantizeLinear are read alike (an integer at the zero point is a
zero). Groups run along the input channels with the kernel position fixed, as kernels that skip zeros want them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.numerics.sparsity.patterns import Pattern
from graphopt.rewriting.constants import constant
from graphopt.rewriting.nodes import is_onnx, label
from graphopt.rewriting.scopes import graphs
from graphopt.sparsity.marks import Role, declared_pattern, layers_of, role_of

SIZES = (4, 8, 16)
"""Sizes of groups that are looked for, beside the one that a pass declared."""

CHUNK = 1 << 22
"""Elements that are counted at once: a weight with a full group in its first rows is not read to its end."""


@dataclass(frozen=True)
class FoundWeight:
    """The weight of one Conv, Gemm or MatMul.

    Attributes:
        node: the linear node.
        weight: the initializer that holds it: floats, or the integers in front of a DequantizeLinear.
        inputs: input channels (of one group of a convolution).
        outputs: output channels.
        most: for each size M of groups, how many nonzeros the fullest group has; sizes that do not fit are left out.
        declared: the pattern that a pass gave it.
        role: part of a factorised layer that the node is; None for an ordinary layer.
        wrappers: for a core, the nodes of its wrappers, in graph order.
    """

    node: ir.Node
    weight: ir.Value
    inputs: int
    outputs: int
    most: Mapping[int, int]
    declared: Pattern | None
    role: Role | None
    wrappers: tuple[ir.Node, ...] = ()

    @property
    def label(self) -> str:
        """How messages name the node."""
        return label(self.node)

    @property
    def quantised(self) -> bool:
        """True where the weight is stored as integers."""
        return self.weight.dtype is not None and self.weight.dtype.is_integer()

    def holds(self, pattern: Pattern) -> bool:
        """No group has more than N nonzeros; False for a share of the whole and for layers narrower than a group."""
        return pattern.of in self.most and self.most[pattern.of] <= pattern.keep

    @property
    def pattern(self) -> Pattern | None:
        """What holds: the declared pattern, else the strictest N:M of the smallest M of `SIZES` with N <= M / 2."""
        if self.declared is not None and self.holds(self.declared):
            return self.declared
        for size in SIZES:
            if size in self.most and self.most[size] <= size // 2:
                keep = max(1, self.most[size])
                return Pattern(keep, size, keep / size)
        return None

    @property
    def broken(self) -> bool:
        """A pattern of groups was declared and does not hold (any more)."""
        return self.declared is not None and bool(self.declared.of) and not self.holds(self.declared)


def sparse_weights(model: ir.Model, *, declared_only: bool = False) -> list[FoundWeight]:
    """The weights of Conv, Gemm and MatMul, bodies included, in graph order.

    Args:
        model: any model; not changed.
        declared_only: only nodes that a pass marked (nothing is read of the weights of others).
    """
    wrappers = _wrappers(model)
    found = []
    for graph in graphs(model):
        for node in graph:
            if not is_onnx(node, "Conv", "Gemm", "MatMul"):
                continue
            declared, role = declared_pattern(node), role_of(node)
            if declared_only and declared is None and role is None:
                continue
            stored = _stored(node)
            if stored is None:
                continue
            weight, array, zero = stored
            rows = _along_inputs(node, array)
            if rows is None:
                continue
            sizes = sorted({*SIZES, *([declared.of] if declared is not None and declared.of else [])})
            mine = [w for name in layers_of(node) for w in wrappers.get(name, ())] if role == "core" else []
            found.append(
                FoundWeight(
                    node, weight, rows.shape[-1], _outputs(node, array),
                    fullest_groups(rows, sizes, zero), declared, role, tuple(mine),
                )
            )  # fmt: skip
    return found


def holds_any_pattern(node: ir.Node) -> bool:
    """Whether at most half of the weights of every group of some size are nonzero, whoever zeroed the others."""
    stored = _stored(node)
    rows = _along_inputs(node, stored[1]) if stored is not None else None
    most = {} if stored is None or rows is None else fullest_groups(rows, list(SIZES), stored[2])
    return any(count <= size // 2 for size, count in most.items())


def broken_patterns(model: ir.Model) -> dict[str, str]:
    """Layers whose declared pattern does not hold any more: label -> pattern."""
    return {w.label: str(w.declared) for w in sparse_weights(model, declared_only=True) if w.broken}


def lost_patterns(before: ir.Model, after: ir.Model) -> list[str]:
    """What to tell about a pass that broke patterns, one sentence for each pattern.

    Removing input channels moves the weights behind them into other groups, and a refit fills zeros.
    """
    broken = broken_patterns(after)
    known = broken_patterns(before) if broken else {}
    lost: dict[str, list[str]] = {}
    for name, pattern in broken.items():
        if name not in known:
            lost.setdefault(pattern, []).append(name)
    return [
        f"warning: the pattern {pattern} no longer holds in {len(names)} layers ({', '.join(names[:5])}"
        f"{', ...' if len(names) > 5 else ''}): put sparsify or armor behind this pass "
        "(behind merge-factors, where layers are factorised)"
        for pattern, names in lost.items()
    ]


def fullest_groups(rows: npt.NDArray[Any], sizes: list[int], zero: int = 0) -> dict[int, int]:
    """For each size M, how many nonzeros the fullest group of M neighbours on the last axis has.

    Args:
        rows: (..., channels); the last group of a row may be shorter.
        sizes: M; those larger than the row are left out.
        zero: the number that stands for zero.
    """
    width = rows.shape[-1]
    most = {size: 0 for size in sizes if size <= width}
    if not rows.size:
        return most
    lead = rows.reshape(-1, width) if rows.flags.c_contiguous else rows
    step = max(1, CHUNK * len(lead) // rows.size)
    for start in range(0, len(lead), step):
        filled = (lead[start : start + step] != zero).reshape(-1, width)
        most = {size: seen if seen == size else max(seen, _fullest(filled, size)) for size, seen in most.items()}
        if all(count == size for size, count in most.items()):
            break
    return most


def _fullest(filled: npt.NDArray[np.bool_], size: int) -> int:
    short = -filled.shape[1] % size
    padded = np.pad(filled, ((0, 0), (0, short))) if short else filled
    return int(padded.reshape(len(padded), -1, size).sum(axis=-1).max(initial=0))


def _stored(node: ir.Node) -> tuple[ir.Value, npt.NDArray[Any], int] | None:
    """The initializer of a node's weight, its array, and the number that stands for zero."""
    value = node.inputs[1] if len(node.inputs) > 1 else None
    zero = 0
    producer = value.producer() if value is not None else None
    if producer is not None and is_onnx(producer, "DequantizeLinear"):
        value = producer.inputs[0]
        point = constant(producer.inputs[2]) if len(producer.inputs) > 2 else None
        if point is not None:
            points = np.unique(np.asarray(point.numpy()).astype(np.int64))
            if len(points) != 1:
                return None  # a zero point for each channel: no integer means zero everywhere
            zero = int(points[0])
    tensor = constant(value)
    if value is None or tensor is None or tensor.dtype == ir.DataType.STRING:
        return None
    return value, np.asarray(tensor.numpy()), zero


def _along_inputs(node: ir.Node, weight: npt.NDArray[Any]) -> npt.NDArray[Any] | None:
    """A weight with its input channels last; None for one that is no matrix and no kernel."""
    if is_onnx(node, "Conv"):
        return np.moveaxis(weight, 1, -1) if weight.ndim > 2 else None
    if weight.ndim != 2:
        return None
    return weight if _transposed(node) else weight.T


def _outputs(node: ir.Node, weight: npt.NDArray[Any]) -> int:
    return int(weight.shape[0 if is_onnx(node, "Conv") or _transposed(node) else -1])


def _transposed(node: ir.Node) -> bool:
    return is_onnx(node, "Gemm") and node.attributes.get_int("transB", 0) != 0


def _wrappers(model: ir.Model) -> dict[str, list[ir.Node]]:
    """Nodes of wrappers by the layer that they belong to."""
    found: dict[str, list[ir.Node]] = {}
    for graph in graphs(model):
        for node in graph:
            if role_of(node) in ("in", "out"):
                for name in layers_of(node):
                    found.setdefault(name, []).append(node)
    return found
