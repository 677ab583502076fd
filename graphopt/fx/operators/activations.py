"""Activation functions, softmax and its relatives."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from graphopt.fx.operators import add, operator

for _name, _function in {
    "Relu": functional.relu,
    "Sigmoid": torch.sigmoid,
    "Softsign": functional.softsign,
    "Tanh": torch.tanh,
    "Mish": functional.mish,
}.items():
    add(_name, _function, ignored=("consumed_inputs",))
add("QuickGelu", lambda x, *, alpha=1.702: x * torch.sigmoid(alpha * x), domain="com.microsoft")
for _domain, _first in (("", 20), ("com.microsoft", 1)):
    add("Gelu", lambda x, *, approximate="none": functional.gelu(x, approximate=approximate), _domain, _first)
add("BiasGelu", lambda x, bias: functional.gelu(x + bias), domain="com.microsoft")
add(
    "FastGelu",
    lambda x, bias=None: functional.gelu(x if bias is None else x + bias, approximate="tanh"),
    domain="com.microsoft",
)


@operator("Softplus")
def softplus(x: Tensor) -> Tensor:
    """ln(1 + e^x), also where torch's would switch to x."""
    return torch.logaddexp(x, torch.zeros_like(x))


@operator("LeakyRelu")
def leaky_relu(x: Tensor, *, alpha: float = 0.01) -> Tensor:
    """x, or alpha x below 0."""
    return functional.leaky_relu(x, alpha)


@operator("PRelu", since=7)
def prelu(x: Tensor, slope: Tensor) -> Tensor:
    """x, or slope x below 0; the slope broadcasts."""
    return torch.where(x < 0, slope * x, x)


@operator("Elu")
def elu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """x, or alpha (e^x - 1) below 0."""
    return functional.elu(x, alpha)


@operator("Celu")
def celu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """x, or alpha (e^(x / alpha) - 1) below 0."""
    return functional.celu(x, alpha)


@operator("Selu")
def selu(x: Tensor, *, alpha: float = 1.67326319217681884765625, gamma: float = 1.05070102214813232421875) -> Tensor:
    """gamma x, or gamma alpha (e^x - 1) below 0."""
    return gamma * functional.elu(x, alpha)


@operator("ThresholdedRelu")
def thresholded_relu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """x above alpha, else 0."""
    return torch.where(x > alpha, x, torch.zeros_like(x))


@operator("Shrink")
def shrink(x: Tensor, *, bias: float = 0.0, lambd: float = 0.5) -> Tensor:
    """x pulled towards 0 by bias, and 0 within lambd of it."""
    low = torch.where(x < -lambd, x + bias, torch.zeros_like(x))
    return torch.where(x > lambd, x - bias, low)


@operator("HardSigmoid")
def hard_sigmoid(x: Tensor, *, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    """alpha x + beta between 0 and 1."""
    return torch.clamp(alpha * x + beta, 0.0, 1.0)


@operator("HardSwish")
def hard_swish(x: Tensor) -> Tensor:
    """x times its hard sigmoid of slope 1/6."""
    return x * torch.clamp(x / 6 + 0.5, 0.0, 1.0)


@operator("Swish")
def swish(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """x sigmoid(alpha x)."""
    return x * torch.sigmoid(alpha * x)


def _along_rest(function: Any) -> Any:
    """Before opset 13: over all axes from `axis` on."""

    def flattened(x: Tensor, *, axis: int = 1) -> Tensor:
        rows = math.prod(x.shape[: axis % x.ndim] if axis % x.ndim else ())
        return function(x.reshape(rows, -1), dim=1).reshape(x.shape)

    return flattened


def _along(function: Any) -> Any:
    return lambda x, *, axis=-1: function(x, dim=axis)


def _one_hot_of_largest(x: Tensor, dim: int) -> Tensor:
    return functional.one_hot(x.argmax(dim), x.shape[dim]).movedim(-1, dim).to(x.dtype)


for _name, _function in {
    "Softmax": torch.softmax,
    "LogSoftmax": torch.log_softmax,
    "Hardmax": _one_hot_of_largest,
}.items():
    add(_name, _along_rest(_function), until=12)
    add(_name, _along(_function), since=13)
