"""Reading and writing by indices, and tensors that are made from sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphopt.fx.operators import add, operator
from graphopt.fx.operators.common import ints, number, torch_type

add("NonZero", lambda x: torch.nonzero(x).t())


def _wrapped(indices: Tensor, size: int) -> Tensor:
    """Negative indices count from the end."""
    return torch.where(indices < 0, indices + size, indices).long()


@operator("Gather", fixed=(1,))
def gather(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    """Slices of an axis, in the shape of the indices."""
    along = axis % x.ndim
    picked = x.index_select(along, _wrapped(indices.reshape(-1), x.shape[along]))
    return picked.reshape([*x.shape[:along], *indices.shape, *x.shape[along + 1 :]])


@operator("GatherElements", fixed=(1,))
def gather_elements(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    """One element for each index."""
    return torch.gather(x, axis, _wrapped(indices, x.shape[axis]))


@operator("GatherND", fixed=(1,))
def gather_nd(x: Tensor, indices: Tensor, *, batch_dims: int = 0) -> Tensor:
    """Slices at index tuples, which stand along the last axis."""
    depth = indices.shape[-1]
    batch = x.shape[:batch_dims]
    flat = x.reshape(-1, *x.shape[batch_dims:])
    each = indices.reshape(flat.shape[0], -1, depth)
    rows = torch.arange(flat.shape[0], device=x.device).reshape(-1, 1)
    places = [_wrapped(each[..., k], flat.shape[1 + k]) for k in range(depth)]
    found = flat[(rows, *places)]
    return found.reshape([*batch, *indices.shape[batch_dims:-1], *x.shape[batch_dims + depth :]])


_REDUCE = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


@operator("ScatterElements", "Scatter", fixed=(1,))
def scatter_elements(x: Tensor, indices: Tensor, updates: Tensor, *, axis: int = 0, reduction: str = "none") -> Tensor:
    """x with elements replaced, or combined with what stands there."""
    places = _wrapped(indices, x.shape[axis])
    if reduction == "none":
        return x.scatter(axis, places, updates)
    return x.scatter_reduce(axis, places, updates, _REDUCE[reduction])


@operator("ScatterND", fixed=(1,))
def scatter_nd(x: Tensor, indices: Tensor, updates: Tensor, *, reduction: str = "none") -> Tensor:
    """x with slices at index tuples replaced, or combined with what stands there."""
    depth = indices.shape[-1]
    flat = x.reshape(-1, *x.shape[depth:])
    place = torch.zeros(indices.shape[:-1], dtype=torch.int64, device=x.device)
    for k in range(depth):
        place = place * x.shape[k] + _wrapped(indices[..., k], x.shape[k])
    rows = place.reshape(-1)
    new = updates.reshape(rows.shape[0], *flat.shape[1:])
    if reduction == "none":
        return flat.index_put((rows,), new).reshape(x.shape)
    spread = rows.reshape(-1, *[1] * (flat.ndim - 1)).expand_as(new)
    return flat.scatter_reduce(0, spread, new, _REDUCE[reduction]).reshape(x.shape)


@operator("OneHot", fixed=(0, 1, 2))
def one_hot(indices: Tensor, depth: Tensor, values: Tensor, *, axis: int = -1) -> Tensor:
    """`values[1]` where the class is the index, else `values[0]`; nothing outside the classes."""
    size = int(number(depth))
    wrapped = _wrapped(indices, size)
    hits = wrapped.unsqueeze(-1) == torch.arange(size, device=indices.device)
    return torch.where(hits, values[1], values[0]).movedim(-1, axis)


@operator("Range", fixed=(0, 1, 2))
def numbers(start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    """From start to limit by delta."""
    return torch.arange(number(start), number(limit), number(delta), dtype=start.dtype, device=start.device)


@operator("ConstantOfShape", fixed=(0,))
def constant_of_shape(sizes: Tensor, *, value: Any = None) -> Tensor:
    """A tensor of one value, given as ([number], type); float zeros by default."""
    (fill,), kind = ([0.0], torch.float32) if value is None else value
    return torch.full(ints(sizes), fill, dtype=kind, device=sizes.device)


@operator("EyeLike")
def eye_like(x: Tensor, *, dtype: int | None = None, k: int = 0) -> Tensor:
    """Ones on the k-th diagonal."""
    kind = x.dtype if dtype is None else torch_type(dtype) or x.dtype
    rows = torch.arange(x.shape[0], device=x.device).reshape(-1, 1)
    return (torch.arange(x.shape[1], device=x.device) == rows + k).to(kind)
