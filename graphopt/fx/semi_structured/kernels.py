"""Products of a 2:4 matrix with dense ones: on sparse tensor cores, or the dense product of the same padded matrix.

    cusparselt   compute capability 8.0 and newer, where torch was built with cuSPARSELt: float16, bfloat16, int8
    cutlass      compute capability 8.x: the same types
    dense        everywhere: what the others are compared with, and what a machine without them runs

All take the matrix (rows, columns) padded with zeros to the sizes that the kernels accept, and a dense operand
(columns, tokens) that is contiguous or the transpose of a contiguous tensor. The sizes are those of the installed torch
(`torch.sparse.SparseSemiStructuredTensor*`). torch's float32 kernels are left out: they keep 1 of 2, not 2 of 4.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

Kernel = Literal["cusparselt", "cutlass", "dense"]

SPARSE_TYPES = (torch.float16, torch.bfloat16, torch.int8)
"""Types of which sparse tensor cores skip 2 of 4."""


@dataclass(frozen=True)
class Legal:
    """What sizes must be multiples of: rows and columns of the sparse matrix, columns of the dense operand."""

    rows: int
    columns: int
    tokens: int


def legal(kernel: Kernel, dtype: torch.dtype) -> Legal:
    """The sizes a kernel accepts; `dense` is padded as cuSPARSELt wants it, types of no kernel like float16."""
    found = torch.sparse.SparseSemiStructuredTensorCUTLASS if kernel == "cutlass" else (
        torch.sparse.SparseSemiStructuredTensorCUSPARSELT
    )  # fmt: skip
    sizes = found._DTYPE_SHAPE_CONSTRAINTS[dtype if dtype in SPARSE_TYPES else torch.float16]
    return Legal(sizes.sparse_min_rows, sizes.sparse_min_cols, max(sizes.dense_min_rows, sizes.dense_min_cols))


def kernel_for(device: torch.device, dtype: torch.dtype) -> tuple[Kernel, str]:
    """The kernel of a device, and why it is the dense one; '' where it is not.

    A kernel is believed after it computed one small product: builds of torch list kernels that a device then refuses.
    """
    if device.type != "cuda":
        return "dense", "no CUDA device"
    if dtype not in SPARSE_TYPES:
        return "dense", f"no sparse kernel takes 2 of 4 of {_name(dtype)}"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return "dense", f"sparse tensor cores begin with compute capability 8.0, this device has {major}.{minor}"
    candidates: list[Kernel] = ["cusparselt"] if torch.backends.cusparselt.is_available() else []
    candidates += ["cutlass"] if major == 8 else []
    reasons = []
    for kernel in candidates:
        refused = _refused(kernel, device, dtype)
        if refused is None:
            return kernel, ""
        reasons.append(f"{kernel}: {refused}")
    missing = "this build of torch has no cuSPARSELt, and its own kernels need compute capability 8.x"
    return "dense", "; ".join(reasons) or missing


def _refused(kernel: Kernel, device: torch.device, dtype: torch.dtype) -> str | None:
    sizes = legal(kernel, dtype)
    weight = torch.zeros(max(64, sizes.rows), max(128, sizes.columns), dtype=dtype, device=device)
    weight[:, ::2] = 1
    tokens = torch.ones(64, weight.shape[1], dtype=dtype, device=device)
    try:
        if dtype == torch.int8:
            scale = torch.ones(weight.shape[0], device=device)
            result = OPERANDS[kernel](weight).scaled(tokens.t(), scale, torch.float16)
        else:
            result = OPERANDS[kernel](weight).product(tokens.t(), None, features=False)
        wrong = bool((result.float() != weight.shape[1] / 2).any())
    except RuntimeError as error:  # torch raises no narrower one for what a library or a device refuses
        return str(error).partition("\n")[0]
    return "it computed a wrong product" if wrong else None


class Operand(torch.nn.Module, ABC):  # type: ignore[misc]
    """A sparse left operand, (rows, columns), both legal."""

    @abstractmethod
    def product(self, dense: Tensor, bias: Tensor | None, *, features: bool) -> Tensor:
        """(rows, tokens) for (columns, tokens) where `features`, else its transpose, contiguous; bias (rows,) added."""

    @abstractmethod
    def scaled(self, dense: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """int8: (tokens, rows) of `dtype`, every row's sum of int32 times its float32 scale."""


class DenseOperand(Operand):
    """The zeros are multiplied."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)

    def product(self, dense: Tensor, bias: Tensor | None, *, features: bool) -> Tensor:
        """See `Operand`."""
        if features:
            return self.weight @ dense if bias is None else torch.addmm(bias.unsqueeze(1), self.weight, dense)
        return torch.nn.functional.linear(dense.t(), self.weight, bias)

    def scaled(self, dense: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """See `Operand`."""
        # exact: float64 holds every sum of int8 products
        sums = dense.t().double() @ self.weight.t().double()
        return (sums * scale).to(dtype)


class CusparseltOperand(Operand):
    """Values and positions as cuSPARSELt packs them, for this device alone."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("packed", torch._cslt_compress(weight))

    def product(self, dense: Tensor, bias: Tensor | None, *, features: bool) -> Tensor:
        """See `Operand`."""
        return torch._cslt_sparse_mm(self.packed, dense, bias=bias, transpose_result=not features)

    def scaled(self, dense: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """See `Operand`."""
        return torch._cslt_sparse_mm(self.packed, dense, alpha=scale, out_dtype=dtype, transpose_result=True)


class CutlassOperand(Operand):
    """Values and positions as torch's own kernels pack them."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        packed = torch.sparse.SparseSemiStructuredTensorCUTLASS.from_dense(weight)
        self.register_buffer("packed", packed.packed)
        self.register_buffer("places", packed.meta)

    def product(self, dense: Tensor, bias: Tensor | None, *, features: bool) -> Tensor:
        """See `Operand`."""
        if bias is None:
            found = torch._sparse_semi_structured_mm(self.packed, self.places, dense)
        else:
            found = torch._sparse_semi_structured_addmm(bias, self.packed, self.places, dense)
        return found if features else found.t().contiguous()

    def scaled(self, dense: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """See `Operand`."""
        sums = torch._sparse_semi_structured_mm(self.packed, self.places, dense, out_dtype=torch.int32)
        return (sums.t() * scale).to(dtype).contiguous()


OPERANDS: dict[Kernel, Callable[[Tensor], Operand]] = {
    "dense": DenseOperand,
    "cusparselt": CusparseltOperand,
    "cutlass": CutlassOperand,
}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
