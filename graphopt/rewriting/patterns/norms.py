"""Normalisations: what a mean and a variance are divided out of.

    d = x - mean(x),  v = mean(d^2),  y = d / sqrt(v + epsilon) gamma + beta

Over the last axes this is LayerNormalization, over all axes behind the channels InstanceNormalization, and without the
mean RMSNormalization. Models of 16 bits compute it in float32, between two Casts: `stash_type` says the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.rewriting.constants import array, constant
from graphopt.rewriting.edit import sole_use
from graphopt.rewriting.formulas import Inverse, Pattern, Root
from graphopt.rewriting.found import Found, Free
from graphopt.rewriting.match import CastTo, Parameter, Reduce, Tensor
from graphopt.rewriting.nodes import is_onnx
from graphopt.rewriting.recognise import Plan, Rule, Written

x = Tensor("x")
gamma, beta = Parameter("gamma"), Parameter("beta")
_EPSILON = Free("epsilon")
_WIDE = CastTo(x, ir.DataType.FLOAT)


def _inverse_deviation(centred: Pattern) -> Pattern:
    return Inverse(Root(Reduce("ReduceMean", centred**2) + _EPSILON))


def _centred(data: Pattern) -> Pattern:
    return data - Reduce("ReduceMean", data)


def _affine(norm: Pattern) -> Iterator[Pattern]:
    """With scale and shift, with one of them, with none: longest first."""
    yield norm * gamma + beta
    yield norm * gamma
    yield norm


def _layer_norms() -> Iterator[Pattern]:
    for data in (x, _WIDE):
        inverse = _inverse_deviation(_centred(data))
        # As Keras has it: scale and shift of the normalisation and of the affine map behind it multiplied out.
        yield data * inverse * gamma + (beta - Reduce("ReduceMean", data) * inverse * gamma)
        norm = _centred(data) * inverse
        yield from _affine(norm if data is x else CastTo(norm))


def _rms_norms() -> Iterator[Pattern]:
    for data in (x, _WIDE):
        norm = data * _inverse_deviation(data)
        yield from (norm * gamma, norm) if data is x else (CastTo(norm) * gamma, CastTo(norm * gamma), CastTo(norm))


def _last_axes(found: Found, result: ir.Value) -> tuple[int, tuple[int, ...]] | str | None:
    """The first of the axes that are reduced, which go to the last, and their sizes."""
    shape, axes = found.values["x"].shape, found.axes["axes"]
    if shape is None or result.dtype != found.values["x"].dtype:
        return "its shape or type is not known" if shape is None else None
    first = 0 if axes is None else axes[0]
    if axes is not None and axes != tuple(range(first, len(shape))):
        return None
    sizes = tuple(size for size in shape[first:] if isinstance(size, int))
    return (first, sizes) if len(sizes) == len(shape) - first else "a size of what it normalises is not known"


def _fitted(value: ir.Value | None, sizes: tuple[int, ...], default: float) -> ir.Value | npt.NDArray[Any] | str | None:
    """A parameter in the shape that the operator takes; None where it differs along other axes."""
    stored = array(value)
    if value is None or stored is None:
        return np.full(sizes, default)
    if stored.shape == sizes:
        return value
    if len(tuple(value.uses())) > 1:
        return "its scale or shift has another shape, and something else reads it"
    inner: tuple[int, ...] = stored.shape[max(0, stored.ndim - len(sizes)) :]
    if int(np.prod(inner)) != stored.size:
        return None
    if any(have not in (1, wanted) for have, wanted in zip(inner[::-1], sizes[::-1], strict=False)):
        return None
    return np.broadcast_to(stored.reshape(inner), sizes)


def _of_last_axes(takes_shift: bool) -> Plan:
    """LayerNormalization or RMSNormalization with what was found."""

    def plan(found: Found, result: ir.Value) -> Written | str | None:
        place = _last_axes(found, result)
        if place is None or isinstance(place, str):
            return place
        first, sizes = place
        parameters = [_fitted(found.values.get("gamma"), sizes, 1.0)]
        if takes_shift and "beta" in found.values:
            parameters.append(_fitted(found.values["beta"], sizes, 0.0))
        inputs: list[ir.Value | npt.NDArray[Any]] = [found.values["x"]]
        for parameter in parameters:
            if parameter is None or isinstance(parameter, str):
                return parameter
            inputs.append(parameter)
        rank = len(found.values["x"].shape or ())
        axis = -1 if first == rank - 1 else first
        return Written(tuple(inputs), {"axis": axis, "epsilon": found.numbers["epsilon"]})

    return plan


def _instance_norm(found: Found, result: ir.Value) -> Written | str | None:
    data, axes = found.values["x"], found.axes["axes"]
    if data.shape is None or axes is None or len(data.shape) < 3 or axes != tuple(range(2, len(data.shape))):
        return None
    if len(data.shape) == 3 and "gamma" not in found.values:
        return None
    channels = data.shape[1]
    if not isinstance(channels, int):
        return "the number of its channels is not known"
    inputs: list[ir.Value | npt.NDArray[Any]] = [data]
    for name, default in (("gamma", 1.0), ("beta", 0.0)):
        stored = array(found.values.get(name))
        if stored is None:
            inputs.append(np.full(channels, default))
        elif stored.size in (1, channels) and _per_channel(stored, len(data.shape)):
            inputs.append(np.broadcast_to(stored.ravel(), (channels,)))
        else:
            return None
    return Written(tuple(inputs), {"epsilon": found.numbers["epsilon"]})


def _per_channel(stored: npt.NDArray[Any], rank: int) -> bool:
    full = (1,) * (rank - stored.ndim) + stored.shape
    return len(full) == rank and all(size == 1 for axis, size in enumerate(full) if axis != 1)


_SMALL = 1 << 14
"""Elements up to which one operator is faster than a mean, a difference and a fused normalisation of that."""


def _faster_apart(found: Found, result: ir.Value) -> str:
    """With a scale and no shift, ONNX Runtime makes SimplifiedLayerNormalization of what follows the mean."""
    if "beta" in found.values or not ("gamma" in found.values or _scaled_behind(result)):
        return ""
    sizes = [size if isinstance(size, int) else None for size in result.shape or (None,)]
    known = [size for size in sizes if size is not None]
    if len(known) == len(sizes) and math.prod(known) <= _SMALL:
        return ""
    return "with a scale, no shift and many or unknown elements, runtimes fuse its parts to something faster"


def _scaled_behind(result: ir.Value) -> bool:
    """Whether what was found without a scale is the beginning of the formula with one."""
    use = sole_use(result)
    return use is not None and is_onnx(use.node, "Mul") and constant(use.node.inputs[1 - use.idx]) is not None


LAYER_NORM = Rule(
    "LayerNormalization",
    17,
    tuple(_layer_norms()),
    _of_last_axes(takes_shift=True),
    single=True,
    slower=_faster_apart,
)
INSTANCE_NORM = Rule(
    "InstanceNormalization",
    6,
    tuple(_affine(_centred(x) * _inverse_deviation(_centred(x)))),
    _instance_norm,
    single=True,
)
RMS_NORM = Rule("RMSNormalization", 23, tuple(_rms_norms()), _of_last_axes(takes_shift=False), single=True)

RULES = (LAYER_NORM, INSTANCE_NORM, RMS_NORM)
"""In the order in which they are tried at a node."""
