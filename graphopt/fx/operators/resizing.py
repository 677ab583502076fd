"""Resize and Upsample: every axis on its own, as a matrix of weights from old to new positions.

An output position p stands at the source coordinate f(p) (`coordinate_transformation_mode`); its value is the sum of
the source's positions around it, weighted by a kernel: the nearest one, a triangle (linear), Keys' cubic of parameter
a. With `antialias` the kernel is stretched by 1/scale where the image shrinks. Outside the image the border repeats, or
counts for nothing with `exclude_outside`. Source: the operator's definition in the ONNX standard.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.fx.operators import operator
from graphopt.fx.operators.common import host, ints, positive_axes

Kernel = Callable[[Tensor], Tensor]


def _coordinates(mode: str, size: int, new: int, scale: float, roi: tuple[float, float]) -> Tensor:
    # single precision, as runtimes compute it: which neighbour is nearest is decided by the last bit
    p = torch.arange(new, dtype=torch.float32)
    if mode == "asymmetric":
        return p / scale
    if mode == "align_corners":
        return p * (size - 1) / (new - 1) if new > 1 else torch.zeros(new)
    if mode == "pytorch_half_pixel" and new == 1:
        return torch.zeros(1)
    if mode == "tf_half_pixel_for_nn":
        return (p + 0.5) / scale
    if mode == "tf_crop_and_resize":
        start, end = roi
        if new > 1:
            return start * (size - 1) + p * (end - start) * (size - 1) / (new - 1)
        return torch.full((1,), 0.5 * (start + end) * (size - 1))
    if mode == "half_pixel_symmetric":
        adjusted = new / (scale * size)
        return size / 2 * (1 - adjusted) + (p + 0.5) / scale - 0.5
    return (p + 0.5) / scale - 0.5


def _nearest(x: Tensor, mode: str) -> Tensor:
    return {
        "round_prefer_floor": torch.ceil(x - 0.5),
        "round_prefer_ceil": torch.floor(x + 0.5),
        "floor": torch.floor(x),
        "ceil": torch.ceil(x),
    }[mode]


def _linear(t: Tensor) -> Tensor:
    return (1 - t.abs()).clamp(min=0)


def _cubic(a: float) -> Kernel:
    def kernel(t: Tensor) -> Tensor:
        t = t.abs()
        near = ((a + 2) * t - (a + 3)) * t * t + 1
        far = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
        return torch.where(t <= 1, near, torch.where(t < 2, far, torch.zeros_like(t)))

    return kernel


def _matrix(x: Tensor, size: int, kernel: Kernel, support: int, stretch: float, exclude_outside: bool) -> Tensor:
    """Weights [new, size] of source positions for the coordinates x."""
    reach = math.ceil(support * stretch)
    first = torch.floor(x).long() - reach
    places = first.unsqueeze(1) + torch.arange(2 * reach + 2)
    weights = kernel((places - x.double().unsqueeze(1)) / stretch)
    inside = (places >= 0) & (places < size)
    if exclude_outside:
        weights = weights * inside
    weights = weights / weights.sum(1, keepdim=True)
    return torch.zeros(len(x), size, dtype=torch.float64).scatter_add(1, places.clamp(0, size - 1), weights)


@operator("Resize", since=11, fixed=(1, 2, 3))
def resize(
    x: Tensor,
    roi: Tensor | None = None,
    scales: Tensor | None = None,
    sizes: Tensor | None = None,
    *,
    antialias: int = 0,
    axes: Sequence[int] | None = None,
    coordinate_transformation_mode: str = "half_pixel",
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    keep_aspect_ratio_policy: str = "stretch",
    mode: str = "nearest",
    nearest_mode: str = "round_prefer_floor",
) -> Tensor:
    """Other sizes along some axes."""
    along = positive_axes(list(axes), x.ndim) if axes is not None else list(range(x.ndim))
    old = [x.shape[axis] for axis in along]
    if sizes is not None and sizes.numel():
        new = ints(sizes)
        factors = [n / o for n, o in zip(new, old, strict=True)]
        if keep_aspect_ratio_policy != "stretch":
            same = min(factors) if keep_aspect_ratio_policy == "not_larger" else max(factors)
            factors, new = [same] * len(old), [math.floor(same * o + 0.5) for o in old]
    else:
        assert scales is not None
        scales = host(scales)
        factors = [float(s) for s in scales.tolist()]
        new = ints((torch.tensor(old, dtype=torch.float32) * scales.float().cpu()).floor())
    regions: list[Any] = [(0.0, 1.0)] * len(along)
    if roi is not None and roi.numel():
        numbers = host(roi).tolist()
        regions = list(zip(numbers[: len(along)], numbers[len(along) :], strict=True))
    outside: Tensor | None = None
    crop = coordinate_transformation_mode == "tf_crop_and_resize"
    for axis, size, count, factor, region in zip(along, old, new, factors, regions, strict=True):
        if count == size and factor == 1 and not crop:
            continue
        at = _coordinates(coordinate_transformation_mode, size, count, factor, region)
        if mode == "nearest":
            places = _nearest(at, nearest_mode).clamp(0, size - 1).long()
            x = x.index_select(axis, places.to(x.device))
        else:
            kernel, support = (_linear, 1) if mode == "linear" else (_cubic(cubic_coeff_a), 2)
            stretch = max(1.0, 1 / factor) if antialias else 1.0
            matrix = _matrix(at, size, kernel, support, stretch, bool(exclude_outside))
            x = torch.matmul(x.movedim(axis, -1), matrix.t().to(x.device, x.dtype)).movedim(-1, axis)
        if crop:
            beyond = ((at < 0) | (at > size - 1)).to(x.device).reshape([-1 if a == axis else 1 for a in range(x.ndim)])
            outside = beyond if outside is None else outside | beyond
    if outside is not None:
        x = torch.where(outside, torch.as_tensor(extrapolation_value, dtype=x.dtype, device=x.device), x)
    return x


@operator("Resize", since=10, until=10, fixed=(1,))
@operator("Upsample", since=9, until=9, fixed=(1,))
def resize_10(x: Tensor, scales: Tensor, *, mode: str = "nearest") -> Tensor:
    """Before opset 11: coordinates p / scale, rounded down."""
    return resize(x, None, scales, mode=mode, coordinate_transformation_mode="asymmetric", nearest_mode="floor")


@operator("Upsample", since=7, until=8)
def upsample_7(x: Tensor, *, scales: Sequence[float], mode: str = "nearest") -> Tensor:
    """As `resize_10`, with the scales as an attribute."""
    return resize_10(x, torch.tensor(scales), mode=mode)
