"""What operators that move channels, or mix positions, make of numbered channels: the rules behind `flow`.

Every channel of a start tensor has a number, its *label*. A second array, the *meeting*, numbers what a channel met on
its way: the matrix it was multiplied with, the position it was merged with. Channels whose meetings are equal may be
mixed with each other before or after the way alike.

Arrays have the tensor's rank and size 1 along axes on which they do not vary. Symbolic sizes get a prime each: a
Reshape that is right for these sizes is right for all. Nothing is computed from weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.rewriting.constants import array
from graphopt.rewriting.nodes import is_onnx

Integers = npt.NDArray[np.int64]
Shape = tuple[int, ...]

FOREIGN = -1
"""Label of a channel that does not come from the start."""

MOST = 1 << 22
"""Elements of an array of meetings: an operand that would need more ends the way."""


@dataclass(frozen=True)
class Channels:
    """Which channels of the start a tensor holds.

    Attributes:
        labels: number of the channel of the start, or `FOREIGN`.
        meeting: equal numbers met the same factors on their way.
    """

    labels: Integers
    meeting: Integers

    def on(self, axis: int, size: int) -> tuple[Integers, Integers] | None:
        """(size,) labels and (size, ...) meetings of the channels on an axis; None where labels vary on another."""
        labels = np.moveaxis(self.labels, axis, 0)
        if labels.size != labels.shape[0]:
            return None
        meeting = np.moveaxis(self.meeting, axis, 0)
        shape = (size, *meeting.shape[1:])
        return np.broadcast_to(labels.ravel(), size), np.broadcast_to(meeting, shape).reshape(size, -1)


class Sizes:
    """Sizes of tensors, with a prime for every symbol."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {}
        self._primes = _primes()

    def of(self, value: ir.Value | None) -> Shape | None:
        """Shape of a tensor; None where its rank is not known."""
        if value is None or value.shape is None:
            return None
        dims = _dimensions(value, value.shape)
        for d in dims:
            if isinstance(d, str) and d not in self._known:
                self._known[d] = next(self._primes)
        return tuple(d if isinstance(d, int) else self._known[d] for d in dims)

    def reshaped(self, value: ir.Value, before: Shape) -> Shape | None:
        """Shape of what Reshape makes of a tensor: symbols seen for the first time are what keeps the size."""
        if value.shape is None:
            return None
        dims = _dimensions(value, value.shape)
        fresh = [d for d in dict.fromkeys(dims) if isinstance(d, str) and d not in self._known]
        if fresh:
            rest = math.prod(before)
            for d in dims:
                size = d if isinstance(d, int) else self._known.get(d, 1)
                if not size or rest % size:
                    return None
                rest //= size
            *leading, last = fresh
            for name in leading:
                self._known[name] = _least_factor(rest)
                rest //= self._known[name]
            self._known[last] = rest
        return self.of(value)


def _dimensions(value: ir.Value, shape: ir.Shape) -> list[int | str]:
    """Sizes and symbols; a dimension without a name gets one of its own."""
    return [d if isinstance(d, int) else str(d.value or f"{value.name}, {axis}") for axis, d in enumerate(shape)]


Moved = list[tuple[ir.Value, Channels]]
Rule = Callable[[ir.Node, int, Channels, Shape, "Sizes"], Moved | None]
"""(node, index of the input, what the input holds, its shape, sizes) -> what the outputs hold; None: it does more."""


def _both(c: Channels, function: Callable[[Integers], Integers]) -> Channels:
    return Channels(function(c.labels), function(c.meeting))


def _same(node: ir.Node, index: int, c: Channels, before: Shape, sizes: Sizes) -> Moved | None:
    training = node.inputs[2] if len(node.inputs) > 2 else None
    if any(v.uses() for v in node.outputs[1:]) or training is not None:
        return None
    return [(node.outputs[0], c)]


def _reshape(node: ir.Node, index: int, c: Channels, before: Shape, sizes: Sizes) -> Moved | None:
    after = sizes.reshaped(node.outputs[0], before)
    if after is None or not all(before) or not all(after):
        return None
    for inner, outer in _runs(before, after):
        same = math.prod(before[i] for i in inner) == math.prod(after[i] for i in outer)
        if not same and any(a.shape[i] != 1 for a in (c.labels, c.meeting) for i in inner):
            return None
        if len(inner) > 1 and any(c.labels.shape[i] != 1 for i in inner):
            # Positions that are merged with channels tell copies of a channel apart from here on.
            for i in inner:
                if c.labels.shape[i] == 1 and before[i] > 1:
                    c = _met(c, [n if k == i else 1 for k, n in enumerate(before)])
    return [(node.outputs[0], _both(c, lambda a: _varying(_reshaped(a, before, after))))]


def _reshaped(a: Integers, before: tuple[int, ...], after: tuple[int, ...]) -> Integers:
    """Reshape an array that has size 1 where it does not vary, run of axes by run of axes of equal products."""
    full: list[int] = []
    target: list[int] = []
    for inner, outer in _runs(before, after):
        varies = any(a.shape[i] != 1 for i in inner)
        full += [before[i] if varies else 1 for i in inner]
        target += [after[i] if varies else 1 for i in outer]
    return np.broadcast_to(a, full).reshape(target)


def _varying(a: Integers) -> Integers:
    """The same array with size 1 along every axis on which it does not vary."""
    for axis in range(a.ndim):
        first = a.take([0], axis) if a.shape[axis] else a
        a = first if (a == first).all() else a
    return a


def _runs(before: Shape, after: Shape) -> list[tuple[list[int], list[int]]]:
    """Short runs of axes with equal products: (2, 12, 5), (2, 3, 4, 5) -> ([0], [0]), ([1], [1, 2]), ([2], [3]).

    Equal axes in front and runs from the end come first; what is between them is one run, of unequal products where a
    size is not known (it is right at run time, or the Reshape would fail).
    """
    lead = 0
    while lead < min(len(before), len(after)) and before[lead] == after[lead]:
        lead += 1
    runs: list[tuple[list[int], list[int]]] = []
    i, j = len(before), len(after)
    while i > lead and j > lead:
        k, m = i - 1, j - 1
        while (left := math.prod(before[k:i])) != (right := math.prod(after[m:j])):
            if left < right and k > lead:
                k -= 1
            elif left > right and m > lead:
                m -= 1
            else:
                break
        if left != right:
            break
        runs.insert(0, (list(range(k, i)), list(range(m, j))))
        i, j = k, m
    between = [(list(range(lead, i)), list(range(lead, j)))] if i > lead or j > lead else []
    return [*(([axis], [axis]) for axis in range(lead)), *between, *runs]


def _transpose(node: ir.Node, index: int, c: Channels, before: Shape, sizes: Sizes) -> Moved | None:
    perm = node.attributes.get_ints("perm", None) or list(reversed(range(len(before))))
    return [(node.outputs[0], _both(c, lambda a: a.transpose(perm)))]


def _split(node: ir.Node, index: int, c: Channels, before: Shape, sizes: Sizes) -> Moved | None:
    axis = node.attributes.get_int("axis", 0)
    found, start = [], 0
    for output in node.outputs:
        shape = sizes.of(output)
        if shape is None:
            return None
        stop = start + shape[axis]
        part = slice(start, stop)
        found.append((output, _taken(c, axis, part)))
        start = stop
    return found if start == before[axis] else None


def _taken(c: Channels, axis: int, part: slice) -> Channels:
    index = (slice(None),) * (axis % c.labels.ndim) + (part,)
    return _both(c, lambda a: a if a.shape[axis] == 1 else a[index])


def _slice(node: ir.Node, index: int, c: Channels, before: Shape, sizes: Sizes) -> Moved | None:
    given = [array(v) if v is not None else None for v in node.inputs[1:5]]
    if len(given) < 2 or given[0] is None or given[1] is None:
        return None
    starts, stops = given[0].tolist(), given[1].tolist()
    axes = given[2].tolist() if len(given) > 2 and given[2] is not None else list(range(len(starts)))
    steps = given[3].tolist() if len(given) > 3 and given[3] is not None else [1] * len(starts)
    for start, stop, axis, step in zip(starts, stops, axes, steps, strict=True):
        if step < 0:
            return None
        c = _taken(c, axis, slice(start, stop, step))
    return [(node.outputs[0], c)]


def _gather(node: ir.Node, index: int, c: Channels, before: Shape, sizes: Sizes) -> Moved | None:
    indices, axis = array(node.inputs[1]), node.attributes.get_int("axis", 0) % len(before)
    if indices is None:
        return None

    def take(a: Integers) -> Integers:
        if a.shape[axis] != 1:
            return np.take(a, indices, axis)
        return a.reshape(*a.shape[:axis], *(1,) * indices.ndim, *a.shape[axis + 1 :])

    return [(node.outputs[0], _both(c, take))]


def _expand(node: ir.Node, index: int, c: Channels, before: Shape, sizes: Sizes) -> Moved | None:
    after = sizes.of(node.outputs[0])
    if after is None or len(after) < len(before):
        return None
    # New positions along an axis of size 1 hold the same channels: size 1 says just that.
    return [(node.outputs[0], _both(c, lambda a: a.reshape((1,) * (len(after) - a.ndim) + a.shape)))]


def _concat(node: ir.Node, index: int, c: Channels, before: Shape, sizes: Sizes) -> Moved | None:
    axis = node.attributes.get_int("axis", 0) % len(before)
    each = [sizes.of(v) for v in node.inputs]
    if any(shape is None for shape in each):
        return None
    lengths = [shape[axis] for shape in each if shape is not None]
    start, total = sum(lengths[:index]), sum(lengths)

    def placed(a: Integers) -> Integers:
        wide = list(a.shape)
        wide[axis] = total
        made = np.full(wide, FOREIGN, np.int64)
        made[(slice(None),) * axis + (slice(start, start + before[axis]),)] = a
        return made

    return [(node.outputs[0], _both(c, placed))]


# -- mixing of positions ---------------------------------------------------------------------------------------------


def _product(node: ir.Node, index: int, c: Channels, before: Shape, sizes: Sizes) -> Moved | None:
    """P V, or V P: positions are contracted, channels stay."""
    other = sizes.of(node.inputs[1 - index])
    contracted = -2 if index == 1 else -1
    if len(before) < 2 or other is None or len(other) < 2 or node.inputs[0] is node.inputs[1]:
        return None
    if c.labels.shape[contracted] != 1 or c.meeting.shape[contracted] != 1:
        return None  # a layer, or scores: the channels themselves are contracted
    return [(node.outputs[0], _met(c, (*other[:-2], 1, 1)))]


def _scaled(node: ir.Node, index: int, c: Channels, before: Shape, sizes: Sizes) -> Moved | None:
    """x g, x / g with any g: channels that met the same numbers of g may be mixed."""
    other = sizes.of(node.inputs[1 - index])
    if other is None or node.inputs[0] is node.inputs[1] or math.prod(other) * c.meeting.size > MOST:
        return None
    return [(node.outputs[0], _met(c, other))]


def _met(c: Channels, shape: Sequence[int]) -> Channels:
    rank = max(c.labels.ndim, len(shape))
    labels, meeting = (a.reshape((1,) * (rank - a.ndim) + a.shape) for a in (c.labels, c.meeting))
    total = math.prod(shape)
    numbers = np.arange(total, dtype=np.int64).reshape((1,) * (rank - len(shape)) + tuple(shape))
    _, dense = np.unique(meeting * total + numbers, return_inverse=True)
    return Channels(labels, dense.reshape(np.broadcast_shapes(meeting.shape, numbers.shape)))


def _spatial(node: ir.Node, index: int, c: Channels, before: Shape, sizes: Sizes) -> Moved | None:
    """Pooling by means, resizing, zero padding: each channel by itself, all of them alike."""
    after = sizes.of(node.outputs[0])
    if after is None or len(after) != len(before) or after[1] != before[1]:
        return None
    if any(n != 1 for a in (c.labels, c.meeting) for n in a.shape[2:]):
        return None
    if is_onnx(node, "Pad"):
        fill = array(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else np.zeros(1)
        if node.attributes.get_string("mode", "constant") == "constant" and (fill is None or fill.any()):
            return None
    return [(node.outputs[0], c)]


def _mean(node: ir.Node, index: int, c: Channels, before: Shape, sizes: Sizes) -> Moved | None:
    given = array(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] is not None else None
    axes = given.tolist() if given is not None else node.attributes.get_ints("axes", None)
    if not axes or (len(node.inputs) > 1 and given is None):
        return None
    axes = [int(a) % len(before) for a in axes]
    if any(a.shape[axis] != 1 for a in (c.labels, c.meeting) for axis in axes):
        return None
    keep = node.attributes.get_int("keepdims", 1)
    return [(node.outputs[0], c if keep else _both(c, lambda a: a.squeeze(tuple(axes))))]


RULES: dict[str, tuple[Rule, tuple[int, ...] | None]] = {
    "Identity": (_same, (0,)),
    "Dropout": (_same, (0,)),
    "Reshape": (_reshape, (0,)),
    "Flatten": (_reshape, (0,)),
    "Squeeze": (_reshape, (0,)),
    "Unsqueeze": (_reshape, (0,)),
    "Transpose": (_transpose, (0,)),
    "Split": (_split, (0,)),
    "Slice": (_slice, (0,)),
    "Gather": (_gather, (0,)),
    "Expand": (_expand, (0,)),
    "Concat": (_concat, None),
    "MatMul": (_product, (0, 1)),
    "Mul": (_scaled, (0, 1)),
    "Div": (_scaled, (0,)),
    "AveragePool": (_spatial, (0,)),
    "GlobalAveragePool": (_spatial, (0,)),
    "Resize": (_spatial, (0,)),
    "Pad": (_spatial, (0,)),
    "ReduceMean": (_mean, (0,)),
    "ReduceSum": (_mean, (0,)),
}
"""Operator -> what it makes of labels, and the inputs through which channels may come; None: all."""


def _primes() -> Iterator[int]:
    """101, 103, 107, ...: sizes of symbols, hardly ever one that a model writes down."""
    return (n for n in count(101) if all(n % p for p in range(2, math.isqrt(n) + 1)))


def _least_factor(number: int) -> int:
    return next((p for p in range(2, math.isqrt(number) + 1) if number % p == 0), number)
