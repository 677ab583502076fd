"""Layers around a sparse operand: block-diagonal wrappers, padding, bias, int8 scales, and how a batch is laid out.

Between its parts a layer holds its batch as (channels, tokens): so a wrapper, one batched product of (blocks, b, b)
with (blocks, b, tokens), writes what the sparse kernel reads, and nothing is transposed or copied in between. Tokens
(..., channels) enter as a transposed view; images (n, channels, ...) have that layout at n = 1.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from graphopt.fx.semi_structured.kernels import OPERANDS, Kernel, legal

Layout = Literal["tokens", "pixels"]
"""Where channels stand in a batch: the last axis, or axis 1."""


def features(x: Tensor, layout: Layout) -> Tensor:
    """(channels, tokens) of a batch; a view where the layout allows it."""
    return x.reshape(-1, x.shape[-1]).t() if layout == "tokens" else x.transpose(0, 1).reshape(x.shape[1], -1)


class BlockDiagonal(torch.nn.Module):  # type: ignore[misc]
    """Blocks applied to the channels of a batch: (..., g b) -> (g b, tokens), with blocks (g, b, b)."""

    def __init__(self, blocks: Tensor, layout: Layout) -> None:
        super().__init__()
        self.register_buffer("blocks", blocks.contiguous())
        self.layout = layout

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        count, size = self.blocks.shape[:2]
        cut = features(x.to(self.blocks.dtype), self.layout).reshape(count, size, -1)
        return torch.bmm(self.blocks, cut).reshape(count * size, -1)


class SparseLinear(torch.nn.Module):  # type: ignore[misc]
    """y = A (S x) + bias with a 2:4 matrix S, and A block-diagonal or absent.

    Args:
        weight: (outputs, inputs), 2:4 along the inputs, of the type to compute in, on the device to run on.
        bias: (outputs,) of the same type.
        outer: (blocks, b, b), A.
        layout: of the batch.
        kernel: what computes S x.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, outer: Tensor | None, layout: Layout, kernel: Kernel
    ) -> None:
        super().__init__()
        sizes = legal(kernel, weight.dtype)
        self.rows, self.columns = weight.shape
        self.multiple, self.layout = sizes.tokens, layout
        self.operand = OPERANDS[kernel](_padded(weight, sizes.rows, sizes.columns))
        self.width = self.columns + -self.columns % sizes.columns
        self.dtype = weight.dtype
        inner = bias if outer is None else None  # A comes between S and the bias
        self.register_buffer("inner_bias", None if inner is None else pad(inner, (0, -self.rows % sizes.rows)))
        self.register_buffer("outer_bias", None if outer is None else bias)
        self.register_buffer("outer", None if outer is None else outer.contiguous())

    def forward(self, batch: Tensor, wrapped: Tensor | None = None) -> Tensor:
        """The layer's output.

        Args:
            batch: whose axes, but for the channels, the output takes over.
            wrapped: what S is multiplied with, (inputs, tokens) as `BlockDiagonal` makes it; None: the batch itself.
        """
        dense = features(batch, self.layout) if wrapped is None else wrapped
        tokens = dense.shape[1]
        dense = _widened(dense.to(self.dtype), self.width, self.multiple)
        as_features = self.layout == "pixels" or self.outer is not None
        y = self.operand.product(dense, self.inner_bias, features=as_features)
        if self.outer is not None:
            y = self._outer(y[: self.rows, :tokens])
        elif as_features:
            y = y[: self.rows, :tokens]
        else:
            y = y[:tokens, : self.rows]
        if self.layout == "tokens":
            return y.reshape(*batch.shape[:-1], self.rows)
        return y.reshape(self.rows, batch.shape[0], *batch.shape[2:]).transpose(0, 1)

    def _outer(self, y: Tensor) -> Tensor:
        """A y + bias, written in the layout of the batch by the product itself: (tokens, outputs), or its transpose."""
        count, size = self.outer.shape[:2]
        cut = y.reshape(count, size, -1)
        if self.layout == "pixels":
            result = torch.bmm(self.outer, cut).reshape(count * size, -1)
            return result if self.outer_bias is None else result + self.outer_bias.unsqueeze(1)
        result = torch.empty(cut.shape[2], count * size, dtype=y.dtype, device=y.device)
        turned = result.view(-1, count, size).transpose(0, 1)
        torch.bmm(cut.transpose(1, 2), self.outer.transpose(1, 2), out=turned)
        return result if self.outer_bias is None else result.add_(self.outer_bias)


class SparseLinearInt8(torch.nn.Module):  # type: ignore[misc]
    """y = s_x diag(s_w) S (q - z) + bias with int8 S: sums of int32, scales and zero point in the epilogue.

    A zero point and the offset of uint8 activations go into the bias: S (q - z) = S q - z S 1.

    Args:
        weight: (outputs, inputs), int8, 2:4 along the inputs.
        scale: (outputs,) float32, s_x s_w.
        zero_point: z, of the integers that arrive.
        bias: (outputs,) float32.
        dtype: of the output.
        layout: of the batch.
        kernel: what computes S q.
    """

    def __init__(
        self, weight: Tensor, scale: Tensor, zero_point: int, bias: Tensor | None, dtype: torch.dtype, layout: Layout,
        kernel: Kernel, *, unsigned: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        sizes = legal(kernel, torch.int8)
        self.rows, self.columns = weight.shape
        self.multiple, self.layout, self.dtype, self.unsigned = sizes.tokens, layout, dtype, unsigned
        self.width = sizes.columns
        self.operand = OPERANDS[kernel](_padded(weight, sizes.rows, sizes.columns))
        self.register_buffer("scale", pad(scale, (0, -self.rows % sizes.rows)))
        shift = (zero_point - (128 if unsigned else 0)) * weight.double().sum(1) * scale.double()
        whole = -shift if bias is None else bias.double() - shift
        self.register_buffer("bias", whole.to(dtype) if bool(whole.any()) else None)

    def forward(self, q: Tensor) -> Tensor:
        """The layer's output for quantised activations, int8 or uint8."""
        signed = (q.to(torch.int16) - 128).to(torch.int8) if self.unsigned else q
        last = signed if self.layout == "tokens" else signed.movedim(1, -1)
        rows = last.reshape(-1, self.columns)
        tokens = rows.shape[0]
        # int8 kernels want the dense operand transposed: tokens in rows
        rows = _padded(rows, self.multiple, self.width)
        y = self.operand.scaled(rows.t(), self.scale, self.dtype)[:tokens, : self.rows]
        y = y if self.bias is None else y + self.bias
        y = y.reshape(*last.shape[:-1], self.rows)
        return y if self.layout == "tokens" else y.movedim(-1, 1)


def _padded(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """Zeros behind both axes, to multiples; contiguous."""
    return pad(matrix, (0, -matrix.shape[1] % columns, 0, -matrix.shape[0] % rows)).contiguous()


def _widened(dense: Tensor, width: int, multiple: int) -> Tensor:
    """(inputs, tokens) with zeros up to the operand's width and a legal number of tokens; a view where it is legal."""
    more, extra = width - dense.shape[0], -dense.shape[1] % multiple
    if more or extra:
        return pad(dense, (0, extra, 0, more)).contiguous()
    return dense if dense.is_contiguous() or dense.t().is_contiguous() else dense.contiguous()
