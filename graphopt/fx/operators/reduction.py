"""Reductions over axes, running sums, the largest elements and their places."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from graphopt.fx.operators import add, operator
from graphopt.fx.operators.common import ints, number, positive_axes

Axes = tuple[int, ...]


def _product(x: Tensor, axes: Axes, keep: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


def _largest(x: Tensor, axes: Axes, keep: bool) -> Tensor:
    return x.amax(axes, keep)


def _smallest(x: Tensor, axes: Axes, keep: bool) -> Tensor:
    return x.amin(axes, keep)


def _mean(x: Tensor, axes: Axes, keep: bool) -> Tensor:
    return x.mean(axes, keep) if x.is_floating_point() else x.double().mean(axes, keep).to(x.dtype)


_REDUCTIONS: dict[str, Callable[[Tensor, Axes, bool], Tensor]] = {
    "ReduceSum": lambda x, axes, keep: x.sum(axes, keep, dtype=x.dtype),
    "ReduceMean": _mean,
    "ReduceMax": _largest,
    "ReduceMin": _smallest,
    "ReduceProd": _product,
    "ReduceL1": lambda x, axes, keep: x.abs().sum(axes, keep, dtype=x.dtype),
    "ReduceL2": lambda x, axes, keep: torch.linalg.vector_norm(x, 2, axes, keep),
    "ReduceLogSum": lambda x, axes, keep: x.sum(axes, keep).log(),
    "ReduceLogSumExp": torch.logsumexp,
    "ReduceSumSquare": lambda x, axes, keep: x.square().sum(axes, keep, dtype=x.dtype),
}


def _reduction(function: Callable[[Tensor, Axes, bool], Tensor]) -> Callable[..., Tensor]:
    def reduce(x: Tensor, axes: Any = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
        chosen = [] if axes is None else ints(axes)
        if not chosen and noop_with_empty_axes:
            return x
        return function(x, tuple(positive_axes(chosen, x.ndim)) or tuple(range(x.ndim)), bool(keepdims))

    return reduce


for _name, _function in _REDUCTIONS.items():
    add(_name, _reduction(_function))


def _place(largest: bool) -> Callable[..., Tensor]:
    def place(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
        wanted = x.amax(axis, keepdim=True) if largest else x.amin(axis, keepdim=True)
        hits = (x == wanted).to(torch.uint8)  # argmax of it is the first hit; of the mirrored one the last
        found = hits.flip(axis).argmax(axis, keepdim=bool(keepdims)) if select_last_index else None
        return x.shape[axis] - 1 - found if found is not None else hits.argmax(axis, keepdim=bool(keepdims))

    return place


add("ArgMax", _place(largest=True))
add("ArgMin", _place(largest=False))


@operator("CumSum")
def cumulative_sum(x: Tensor, axis: Tensor, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    """Running sums along an axis; `exclusive` leaves out the element itself, `reverse` starts at the end."""
    along = int(number(axis))
    x = x.flip(along) if reverse else x
    sums = x.cumsum(along, dtype=x.dtype)
    sums = sums - x if exclusive else sums
    return sums.flip(along) if reverse else sums


@operator("TopK", outputs=2)
def top_k(x: Tensor, k: Any, *, axis: int = -1, largest: int = 1, sorted: int = 1) -> Any:
    """The k largest (smallest) elements along an axis, the first of equals first, and their places."""
    values, places = torch.sort(x, dim=axis, descending=bool(largest), stable=True)
    count = int(number(k))
    return values.narrow(axis, 0, count), places.narrow(axis, 0, count)
