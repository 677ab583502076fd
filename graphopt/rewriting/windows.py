"""How convolutions and pools slide their windows: padding as numbers, whatever attribute it was given by.

Along one axis, with padding b before and e after, a kernel of k taps at distance d and stride s:

    size of y = floor((size of x + b + e - d (k - 1) - 1) / s) + 1        tap t of position o reads x[s o - b + t d]

`auto_pad` SAME asks for ceil(size of x / s) positions: b + e = d (k - 1) where s = 1, else it depends on the size.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

Ints = tuple[int, ...]


@dataclass(frozen=True)
class Windows:
    """Kernel, strides, dilations and padding of a node, one number per spatial axis each."""

    kernel: Ints
    strides: Ints
    dilations: Ints
    begins: Ints
    ends: Ints

    @property
    def excess(self) -> Ints:
        """b + e - d (k - 1) per axis: by how much y would be larger than x at stride 1."""
        return tuple(
            b + e - d * (k - 1) for k, d, b, e in zip(self.kernel, self.dilations, self.begins, self.ends, strict=True)
        )

    @property
    def padded(self) -> bool:
        """Whether anything is padded."""
        return any((*self.begins, *self.ends))

    @property
    def pointwise(self) -> bool:
        """Whether each position of y reads one position of x, and none of the padding."""
        return all(k == 1 for k in self.kernel) and not self.padded


def windows(node: ir.Node, kernel: Ints) -> Windows | str:
    """Geometry of a Conv or pool, or why its padding is not known.

    Args:
        node: Conv, MaxPool, AveragePool, LpPool or ConvTranspose.
        kernel: spatial sizes of the kernel.
    """
    ones = (1,) * len(kernel)
    strides = tuple(node.attributes.get_ints("strides", ones))
    dilations = tuple(node.attributes.get_ints("dilations", ones))
    pads = tuple(node.attributes.get_ints("pads", (0,) * 2 * len(kernel)))
    if not len(strides) == len(dilations) == len(kernel) or len(pads) != 2 * len(kernel):
        return "its strides, dilations or pads do not fit its kernel"
    auto = node.attributes.get_string("auto_pad", "NOTSET")
    if auto == "VALID":
        pads = (0,) * 2 * len(kernel)
    elif auto.startswith("SAME"):
        totals = _same(node, kernel, strides, dilations)
        if totals is None:
            return f"auto_pad={auto} on an input whose size is not known"
        less, more = tuple(t // 2 for t in totals), tuple(t - t // 2 for t in totals)
        pads = (*less, *more) if auto == "SAME_UPPER" else (*more, *less)
    return Windows(tuple(kernel), strides, dilations, pads[: len(kernel)], pads[len(kernel) :])


def _same(node: ir.Node, kernel: Ints, strides: Ints, dilations: Ints) -> Ints | None:
    """Padding b + e per axis that SAME stands for; None where it depends on a size that is not known."""
    source = node.inputs[0]
    sizes = tuple(source.shape)[2:] if source is not None and source.shape is not None else (None,) * len(kernel)
    if len(sizes) != len(kernel):
        return None
    totals = []
    for size, k, s, d in zip(sizes, kernel, strides, dilations, strict=True):
        reach = d * (k - 1)
        if s == 1:
            totals.append(reach)
        elif isinstance(size, int):
            totals.append(max(0, (-(-size // s) - 1) * s + reach + 1 - size))
        else:
            return None
    return tuple(totals)


def store_windows(node: ir.Node, new: Windows) -> None:
    """Write strides and padding as attributes of `node`, in numbers; its kernel and dilations stay."""
    for name, numbers, neutral in (
        ("strides", new.strides, 1),
        ("pads", (*new.begins, *new.ends), 0),
    ):
        node.attributes.pop(name, None)
        if any(n != neutral for n in numbers):
            node.attributes[name] = ir.AttrInt64s(name, numbers)
    node.attributes.pop("auto_pad", None)
