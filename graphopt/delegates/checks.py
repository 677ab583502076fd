"""Conditions of operators that a table cannot write as types, ranks, constants and attributes, by name.

Each is a function of a `Unit` that returns what is wrong, in words that go on with "is refused because", or None.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from graphopt.analysis import shapes
from graphopt.delegates.units import Unit

Check = Callable[[Unit], str | None]
CHECKS: dict[str, Check] = {}
"""All checks by the name that tables use."""


def check(name: str) -> Callable[[Check], Check]:
    """Register a check under `name`."""

    def register(function: Check) -> Check:
        CHECKS[name] = function
        return function

    return register


def sizes(unit: Unit, name: str) -> tuple[shapes.Dim, ...] | None:
    """Shape of an operand; None where it is left out or not even its rank is known."""
    value = unit.operand(name)
    return None if value is None else shapes.dims(value)


def attribute(unit: Unit, name: str, default: Any = None) -> Any:
    """Value of an attribute, else `default`."""
    found = unit.node.attributes.get(name)
    return default if found is None else found.value


@check("one-output")
def one_output(unit: Unit) -> str | None:
    """Further results (the mask of Dropout, the indices of MaxPool) are not read."""
    read = [v for v in unit.node.outputs[1:] if v is not None and v.name]
    return f"its output {read[0].name} is not available" if read else None


@check("two-inputs")
def two_inputs(unit: Unit) -> str | None:
    """Exactly two operands."""
    count = len([v for v in unit.node.inputs if v is not None])
    return None if count == 2 else f"it has {count} operands, not 2"


@check("dilated-not-grouped")
def dilated_not_grouped(unit: Unit) -> str | None:
    """No dilation where a convolution has groups of several channels."""
    dilations = attribute(unit, "dilations", (1,))
    weight = sizes(unit, "W")
    grouped = attribute(unit, "group", 1) != 1 and weight is not None and weight[1] != 1
    return "it is grouped and dilated" if grouped and any(d != 1 for d in tuple(dilations)) else None


@check("one-or-all-groups")
def one_or_all_groups(unit: Unit) -> str | None:
    """A convolution is dense or depthwise."""
    group, data = attribute(unit, "group", 1), sizes(unit, "X")
    if group == 1 or (data is not None and data[1] == group):
        return None
    return f"it has {group} groups of several channels"


@check("bias-vector")
def bias_vector(unit: Unit) -> str | None:
    """The addend of Gemm is a vector with an entry for each output channel."""
    bias, weight = sizes(unit, "C"), sizes(unit, "B")
    if bias is None or weight is None:
        return None
    channels = weight[0 if attribute(unit, "transB", 0) else 1]
    good = bool(bias) and bias[-1] == channels and all(d == 1 for d in bias[:-1])
    return None if good else f"its C has shape {list(bias)}, not [{channels}]"


@check("bias-vector-alone")
def bias_vector_alone(unit: Unit) -> str | None:
    """Gemm has an addend, and it is a vector with an entry for each output channel."""
    bias, weight = sizes(unit, "C"), sizes(unit, "B")
    if bias is None:
        return "it has no C"
    channels = None if weight is None else weight[0 if attribute(unit, "transB", 0) else 1]
    return None if channels is None or bias == (channels,) else f"its C has shape {list(bias)}, not [{channels}]"


@check("window")
def window(unit: Unit) -> str | None:
    """A pool over more than one position."""
    kernel = attribute(unit, "kernel_shape", ())
    return "its window is a single position" if kernel and all(side == 1 for side in kernel) else None


@check("bias-broadcast")
def bias_broadcast(unit: Unit) -> str | None:
    """The addend of Gemm is a scalar, a vector or one row."""
    bias, weight = sizes(unit, "C"), sizes(unit, "B")
    if bias is None or weight is None:
        return None
    channels = weight[0 if attribute(unit, "transB", 0) else 1]
    good = bias in ((), (1,), (channels,), (1, channels))
    return None if good else f"its C has shape {list(bias)}, not [], [1], [{channels}] or [1, {channels}]"


@check("constant-or-transposed")
def constant_or_transposed(unit: Unit) -> str | None:
    """A computed second operand of Gemm stands transposed."""
    if shapes.constant_tensor(unit.operand("B")) is not None or attribute(unit, "transB", 0):
        return None
    return "its B is computed and transB is 0"


@check("relu6-or-relu1")
def relu6_or_relu1(unit: Unit) -> str | None:
    """Clip to [0, 6] or [-1, 1] alone."""
    low, high = _bounds(unit)
    return None if (low, high) in ((0, 6), (-1, 1)) else f"it clips to [{low:g}, {high:g}], not [0, 6] or [-1, 1]"


def _bounds(unit: Unit) -> tuple[float, float]:
    found = []
    for name, free in (("min", -np.inf), ("max", np.inf)):
        value = unit.operand(name)
        number = shapes.scalar(value) if value is not None else attribute(unit, name, free)
        found.append(float("nan") if number is None else float(number))
    return found[0], found[1]


@check("no-zero-size")
def no_zero_size(unit: Unit) -> str | None:
    """Reshape whose new shape has no 0 that means an empty axis."""
    shape = shapes.ints(unit.operand("shape"))
    return (
        "its shape has a 0 and allowzero is set" if shape and 0 in shape and attribute(unit, "allowzero", 0) else None
    )


@check("spatial-resize")
def spatial_resize(unit: Unit) -> str | None:
    """Resize that leaves samples and channels as they are."""
    before, after = sizes(unit, "X"), sizes(unit, "Y")
    pairs = list(zip(before[:2], after[:2], strict=True)) if before and after else []
    changed = any(isinstance(b, int) and isinstance(a, int) and a != b for b, a in pairs)
    return "it resizes samples or channels" if changed and len(before or ()) > 2 else None


@check("constant-scales-or-sizes")
def constant_scales_or_sizes(unit: Unit) -> str | None:
    """Resize by constants."""
    given = [v for v in (unit.operand("scales"), unit.operand("sizes")) if v is not None]
    known = [v for v in given if shapes.constant_tensor(v) is not None]
    return None if known and len(known) == len(given) else "its scales or sizes are computed"


@check("nearest-asymmetric-floor")
def nearest_asymmetric_floor(unit: Unit) -> str | None:
    """Resize to the nearest takes the pixel below, counted from the corner."""
    if attribute(unit, "mode", "nearest") != "nearest":
        return None
    kind = attribute(unit, "coordinate_transformation_mode", "half_pixel")
    rounding = attribute(unit, "nearest_mode", "round_prefer_floor")
    good = kind == "asymmetric" and rounding == "floor"
    return None if good else f"it takes the nearest by {kind} and {rounding}, not asymmetric and floor"


@check("whole-scales")
def whole_scales(unit: Unit) -> str | None:
    """Resize that makes every side a whole number of times as long."""
    before, after = sizes(unit, "X"), sizes(unit, "Y")
    pairs = list(zip(before or (), after or (), strict=True)) if before and after else []
    broken = [(b, a) for b, a in pairs if isinstance(b, int) and isinstance(a, int) and (not b or a % b)]
    return f"it makes {broken[0][0]} to {broken[0][1]}, which is no multiple" if broken else None


@check("no-output-padding")
def no_output_padding(unit: Unit) -> str | None:
    """ConvTranspose whose output has the size that strides and pads give it."""
    padding = attribute(unit, "output_padding", ())
    if any(padding):
        return f"its output_padding is {list(padding)}"
    return "it has an output_shape" if attribute(unit, "output_shape") is not None else None


@check("quantised-output")
def quantised_output(unit: Unit) -> str | None:
    """Computed in integers only where its output is quantised too."""
    value = unit.node.inputs[0]
    made = value.producer() if value is not None else None
    if unit.quantised or made is None or made.op_type != "DequantizeLinear":
        return None
    return "its inputs are dequantised and its output is not quantised"


@check("even-split")
def even_split(unit: Unit) -> str | None:
    """Parts of equal length that cover the axis."""
    lengths = shapes.ints(unit.operand("split"))
    if lengths is None:
        given = attribute(unit, "split")
        lengths = [int(i) for i in given] if isinstance(given, (tuple, list)) else None
    if lengths is not None and len(set(lengths)) > 1:
        return f"it splits into unequal parts {lengths}"
    data, axis = sizes(unit, "input"), attribute(unit, "axis", 0)
    length = data[axis] if data is not None and isinstance(axis, int) else None
    if isinstance(length, int) and length % len(unit.node.outputs):
        return f"it splits {length} entries into {len(unit.node.outputs)} parts"
    return None


@check("not-empty")
def not_empty(unit: Unit) -> str | None:
    """No result without entries."""
    for value in unit.node.outputs:
        if 0 in (shapes.dims(value) or ()):
            return f"its output {value.name} is empty"
    return None


@check("vector-index")
def vector_index(unit: Unit) -> str | None:
    """Indices of Gather are no scalar."""
    return "its indices are a scalar" if sizes(unit, "indices") == () else None


@check("int32-or-constant-index")
def int32_or_constant_index(unit: Unit) -> str | None:
    """Indices of Gather are constant where they are not int32."""
    value = unit.operand("indices")
    if value is None or shapes.constant_tensor(value) is not None:
        return None
    kind = value.dtype.name if value.dtype is not None else "unknown"
    return None if kind == "INT32" else f"its indices are computed in {kind.lower()}, not int32"


@check("nonnegative-pads")
def nonnegative_pads(unit: Unit) -> str | None:
    """Pad that cuts nothing off."""
    pads = shapes.ints(unit.operand("pads"))
    return f"it cuts off, by pads {pads}" if pads and min(pads) < 0 else None


@check("pads-last-two")
def pads_last_two(unit: Unit) -> str | None:
    """Pad of the last two axes alone."""
    pads, data, axes = shapes.ints(unit.operand("pads")), sizes(unit, "data"), shapes.ints(unit.operand("axes"))
    if pads is None or data is None:
        return None
    half = len(pads) // 2
    padded = {(axes[i] if axes else i) % len(data) for i in range(half) if pads[i] or pads[i + half]}
    other = sorted(padded - {len(data) - 2, len(data) - 1})
    return f"it pads axis {other[0]}" if other else None


@check("slope-per-channel")
def slope_per_channel(unit: Unit) -> str | None:
    """Slope of PRelu is one number, or one a channel in the shape [C, 1, 1]."""
    slope = sizes(unit, "slope")
    if slope is None or all(d == 1 for d in slope) or (len(slope) == 3 and slope[1:] == (1, 1)):
        return None
    return f"its slope has shape {list(slope)}, not [C, 1, 1]"


@check("last-axis")
def last_axis(unit: Unit) -> str | None:
    """Its axis is the last one."""
    data = shapes.dims(unit.node.inputs[0]) if unit.node.inputs[0] is not None else None
    default = 1 if unit.node.op_type == "Softmax" and shapes.opset(unit.node) < 13 else -1
    axis = attribute(unit, "axis", default)
    if data is None or axis in (-1, len(data) - 1):
        return None
    return f"it works along axis {axis} of {len(data)}"


@check("vector-matrix")
def vector_matrix(unit: Unit) -> str | None:
    """A product by one constant matrix."""
    weight = sizes(unit, "B")
    return None if weight is None or len(weight) <= 2 else f"its B has {len(weight)} axes"


@check("same-scale")
def same_scale(unit: Unit) -> str | None:
    """Input and output have one scale and zero point, so that integers pass unchanged."""
    before = unit.parameters(_first_name(unit))
    after = unit.parameters(_output_name(unit))
    if before is None or after is None or _equal(before, after):
        return None
    return "its input and output have different scales or zero points"


@check("scale-1/256")
def scale_256(unit: Unit) -> str | None:
    """The output has scale 1/256 and zero point 0."""
    after = unit.parameters(_output_name(unit))
    if after is None or after[0] is None:
        return None
    zero = 0 if after[1] is None else after[1]
    good = np.all(np.asarray(after[0]) == np.float32(1 / 256)) and not np.any(zero)
    return None if good else "its output has not scale 1/256 and zero point 0"


def _first_name(unit: Unit) -> str:
    return "0"


def _output_name(unit: Unit) -> str:
    from graphopt.delegates.units import _names

    return next(iter(_names(unit.node.op_type, unit.node.domain, shapes.opset(unit.node))[1]), "")


def _equal(one: tuple[Any, Any], other: tuple[Any, Any]) -> bool:
    return all(np.array_equal(0 if a is None else a, 0 if b is None else b) for a, b in zip(one, other, strict=True))
