"""Normalisations, in evaluation mode: statistics of batches are those stored."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from graphopt.fx.operators import operator


def _per_channel(v: Tensor, rank: int) -> Tensor:
    return v.reshape(-1, *[1] * (rank - 2))


@operator("BatchNormalization", since=7, fixed=(3, 4), ignored=("momentum", "spatial", "training_mode"))
def batch_normalization(
    x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, *, epsilon: float = 1e-5
) -> Tensor:
    """(x - mean) / sqrt(variance + epsilon) scale + bias, by channel."""
    factor = scale * torch.rsqrt(variance + epsilon)
    return x * _per_channel(factor, x.ndim) + _per_channel(bias - mean * factor, x.ndim)


@operator("InstanceNormalization")
def instance_normalization(x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    """Every channel of every sample by its own mean and deviation."""
    axes = tuple(range(2, x.ndim))
    centred = x - x.mean(axes, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(axes, keepdim=True) + epsilon)
    return normed * _per_channel(scale, x.ndim) + _per_channel(bias, x.ndim)


@operator("GroupNormalization", since=21, ignored=("stash_type",))
def group_normalization(x: Tensor, scale: Tensor, bias: Tensor, *, num_groups: int, epsilon: float = 1e-5) -> Tensor:
    """Groups of channels by their mean and deviation; scale and bias by channel."""
    return functional.group_norm(x, num_groups, scale, bias, epsilon)


@operator("GroupNormalization", since=18, until=20)
def group_normalization_18(x: Tensor, scale: Tensor, bias: Tensor, *, num_groups: int, epsilon: float = 1e-5) -> Tensor:
    """Opset 18 has scale and bias by group."""
    normed = functional.group_norm(x, num_groups, None, None, epsilon)
    each = x.shape[1] // num_groups
    return normed * _per_channel(scale.repeat_interleave(each), x.ndim) + _per_channel(
        bias.repeat_interleave(each), x.ndim
    )


def _statistics(x: Tensor, axis: int, epsilon: float, *, centre: bool) -> tuple[Tensor, Tensor, Tensor]:
    axes = tuple(range(axis % x.ndim, x.ndim))
    mean = x.mean(axes, keepdim=True) if centre else torch.zeros((), dtype=x.dtype, device=x.device)
    centred = x - mean
    inverse = torch.rsqrt(centred.square().mean(axes, keepdim=True) + epsilon)
    return centred * inverse, mean, inverse


@operator("LayerNormalization", outputs=3, ignored=("stash_type",))
def layer_normalization(
    x: Tensor, scale: Tensor, bias: Tensor | None = None, *, axis: int = -1, epsilon: float = 1e-5
) -> Any:
    """Normalised over the axes from `axis` on; then the mean and the inverse deviation."""
    normed, mean, inverse = _statistics(x, axis, epsilon, centre=True)
    y = normed * scale
    return (y if bias is None else y + bias), mean, inverse


@operator("RMSNormalization", since=23, outputs=2, ignored=("stash_type",))
@operator("SimplifiedLayerNormalization", outputs=2, ignored=("stash_type",))
def rms_normalization(x: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-5) -> Any:
    """x over its root mean square over the axes from `axis` on; then the inverse of that."""
    normed, _, inverse = _statistics(x, axis, epsilon, centre=False)
    return normed * scale, inverse


@operator("SkipLayerNormalization", domain="com.microsoft", outputs=4)
def skip_layer_normalization(
    x: Tensor,
    skip: Tensor,
    gamma: Tensor,
    beta: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    epsilon: float = 1e-12,
) -> Any:
    """Layer normalisation of a sum; then mean, inverse deviation and the sum."""
    summed = x + skip if bias is None else x + skip + bias
    y, mean, inverse = layer_normalization(summed, gamma, beta, epsilon=epsilon)
    return y, mean, inverse, summed


@operator("SkipSimplifiedLayerNormalization", domain="com.microsoft", outputs=4)
def skip_rms_normalization(
    x: Tensor, skip: Tensor, gamma: Tensor, bias: Tensor | None = None, *, epsilon: float = 1e-5
) -> Any:
    """RMS normalisation of a sum; then an unused mean, the inverse root mean square and the sum."""
    summed = x + skip if bias is None else x + skip + bias
    y, inverse = rms_normalization(summed, gamma, epsilon=epsilon)
    return y, torch.zeros_like(inverse), inverse, summed


@operator("LpNormalization")
def lp_normalization(x: Tensor, *, axis: int = -1, p: int = 2) -> Tensor:
    """x over its p-norm along an axis; 0 where the norm is 0."""
    norm = torch.linalg.vector_norm(x, p, axis, keepdim=True)
    return torch.where(norm == 0, torch.zeros_like(x), x / norm)


@operator("MeanVarianceNormalization")
def mean_variance_normalization(x: Tensor, *, axes: Any = (0, 2, 3)) -> Tensor:
    """(x - mean) / deviation over axes; the constant is that of the standard's function body."""
    mean = x.mean(tuple(axes), keepdim=True)
    deviation = torch.sqrt((x * x).mean(tuple(axes), keepdim=True) - mean * mean)
    return (x - mean) / (deviation + 1e-9)


@operator("LRN")
def local_response_normalization(
    x: Tensor, *, size: int, alpha: float = 0.0001, beta: float = 0.75, bias: float = 1.0
) -> Tensor:
    """x over a power of the sum of squares of neighbouring channels."""
    squares = x.square().flatten(2).unsqueeze(1)
    padded = functional.pad(squares, (0, 0, math.floor((size - 1) / 2), math.ceil((size - 1) / 2)))
    sums = functional.avg_pool2d(padded, (size, 1), 1) * size
    return x / (bias + alpha / size * sums.reshape(x.shape)) ** beta
