"""Products with weights: Conv, ConvTranspose, Gemm, MatMul, Einsum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from graphopt.fx.operators import add, operator
from graphopt.fx.operators.common import pad_spatial, window_pads

add("MatMul", torch.matmul)
add("Einsum", lambda *inputs, equation: torch.einsum(equation.replace(" ", ""), *inputs))
add("Det", torch.linalg.det)

_CONV = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_CONV_TRANSPOSE = {1: functional.conv_transpose1d, 2: functional.conv_transpose2d, 3: functional.conv_transpose3d}


@operator("Gemm", since=7)
def gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    """alpha A B + beta C."""
    product = (a.t() if transA else a) @ (b.t() if transB else b)
    product = product if alpha == 1 else alpha * product
    return product if c is None else product + (c if beta == 1 else beta * c)


@operator("FusedMatMul", domain="com.microsoft")
def fused_matmul(
    a: Tensor,
    b: Tensor,
    *,
    alpha: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    """alpha A B, the last two axes transposed first where asked."""
    return alpha * torch.matmul(a.mT if transA else a, b.mT if transB else b)


@operator("Conv")
def conv(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Convolution over 1 to 3 spatial axes."""
    rank = x.ndim - 2
    steps, spread = list(strides or [1] * rank), list(dilations or [1] * rank)
    begin, end = window_pads(auto_pad, pads, x.shape[2:], w.shape[2:], steps, spread)
    return _CONV[rank](pad_spatial(x, begin, end), w, b, steps, 0, spread, group)


@operator("ConvTranspose")
def conv_transpose(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    output_padding: Sequence[int] | None = None,
    output_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Transposed convolution: the full one, of which the pads are cut away."""
    rank = x.ndim - 2
    steps, spread = list(strides or [1] * rank), list(dilations or [1] * rank)
    extra = list(output_padding or [0] * rank)
    reach = [d * (k - 1) + 1 for d, k in zip(spread, w.shape[2:], strict=True)]
    full = [(n - 1) * s + r + e for n, s, r, e in zip(x.shape[2:], steps, reach, extra, strict=True)]
    if output_shape is not None or auto_pad in {"SAME_UPPER", "SAME_LOWER"}:
        wanted = (
            list(output_shape[-rank:]) if output_shape else [n * s for n, s in zip(x.shape[2:], steps, strict=True)]
        )
        cut = [f - size for f, size in zip(full, wanted, strict=True)]
        begin = [c // 2 if auto_pad == "SAME_UPPER" else c - c // 2 for c in cut]
    else:
        given = [0] * (2 * rank) if auto_pad == "VALID" or not pads else list(pads)
        begin = given[:rank]
        wanted = [f - p - q for f, p, q in zip(full, given[:rank], given[rank:], strict=True)]
    # torch wants the extra rows smaller than the stride; what is beyond the data is the bias alone
    y: Any = _CONV_TRANSPOSE[rank](x, w, None, steps, 0, 0, group, spread)
    missing = [max(0, b + size - have) for b, size, have in zip(begin, wanted, y.shape[2:], strict=True)]
    before = [max(0, -b) for b in begin]
    y = pad_spatial(y, before, missing)
    for axis, (start, size) in enumerate(zip(begin, wanted, strict=True), 2):
        y = y.narrow(axis, max(0, start), size)
    return y if b is None else y + b.reshape(-1, *[1] * rank)
