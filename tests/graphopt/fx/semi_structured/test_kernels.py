"""Sparse kernels: what they accept, and that what is handed to them is that. Those of a GPU run where there is one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sparse_models import sparse
from torch import Tensor

from graphopt.fx.semi_structured.kernels import OPERANDS, kernel_for, legal
from graphopt.fx.semi_structured.modules import BlockDiagonal, SparseLinear, SparseLinearInt8

CUDA = torch.cuda.is_available()
needs_cuda = pytest.mark.skipif(not CUDA, reason="no CUDA device: sparse tensor cores cannot be run")


def test_sizes_are_those_of_torch() -> None:
    half, whole = legal("cusparselt", torch.float16), legal("cusparselt", torch.int8)
    assert (half.rows, half.columns, half.tokens) == (16, 16, 8)
    assert (whole.rows, whole.columns, whole.tokens) == (32, 32, 16)
    assert legal("cutlass", torch.bfloat16).columns == 64
    assert legal("dense", torch.float32) == half  # the CPU computes with the padding of a GPU


def test_a_processor_has_no_sparse_kernel() -> None:
    assert kernel_for(torch.device("cpu"), torch.float16) == ("dense", "no CUDA device")


class Library:
    """Stands in for cuSPARSELt: refuses what it refuses, and multiplies what was packed."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def compress(self, weight: Tensor) -> Tensor:
        sizes = legal("cusparselt", weight.dtype)
        assert weight.is_contiguous()
        assert weight.shape[0] % sizes.rows == 0
        assert weight.shape[1] % sizes.columns == 0
        assert int((weight.reshape(-1, 4) != 0).sum(1).max()) <= 2
        return weight

    def multiply(
        self,
        packed: Tensor,
        dense: Tensor,
        bias: Tensor | None = None,
        alpha: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        transpose_result: bool = False,
    ) -> Tensor:
        sizes = legal("cusparselt", packed.dtype)
        assert dense.dtype == packed.dtype
        assert dense.shape[0] == packed.shape[1]
        assert dense.shape[1] % sizes.tokens == 0
        assert dense.is_contiguous() or dense.t().is_contiguous()
        if packed.dtype == torch.int8:
            assert dense.t().is_contiguous()  # INT8 products want the dense operand transposed
            assert out_dtype in {torch.float16, torch.bfloat16}
            assert bias is None
        else:
            assert out_dtype is None
            assert bias is None or (bias.dtype == packed.dtype and bias.shape == packed.shape[:1])
        self.calls.append({"dense": dense, "bias": bias, "transposed": transpose_result})
        product = packed.double() @ dense.double()
        product = product if alpha is None else product * alpha.unsqueeze(1).double()
        product = (product if bias is None else product + bias.unsqueeze(1)).to(out_dtype or packed.dtype)
        return product.t().contiguous() if transpose_result else product


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    made = Library()
    monkeypatch.setattr(torch, "_cslt_compress", made.compress)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", made.multiply)
    return made


def weight(rows: int, columns: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    found = torch.from_numpy(sparse((rows, columns), np.random.default_rng(0)))
    return (found * 40).clamp(-127, 127).to(dtype).to(device) if dtype == torch.int8 else found.to(dtype).to(device)


def parts(outer: bool, layout: str, device: str = "cpu") -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randn(4, 6, 6, generator=generator, dtype=torch.float16).to(device)
    bias = torch.randn(24, generator=generator, dtype=torch.float16).to(device)
    return {"bias": bias, "outer": blocks if outer else None, "layout": layout}


@pytest.mark.parametrize("layout", ["tokens", "pixels"])
@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_cusparselt_gets_what_it_takes(library: Library, layout: str, outer: bool, wrapped: bool) -> None:
    """The layers hand over legal operands, and compute what the dense ones do."""
    generator = torch.Generator().manual_seed(1)
    shape = (2, 5, 36) if layout == "tokens" else (2, 36, 3, 3)
    x = torch.randn(*shape, generator=generator, dtype=torch.float16)
    w = weight(24, 36, torch.float16)
    blocks = torch.randn(9, 4, 4, generator=generator, dtype=torch.float16)
    made = [SparseLinear(w, kernel=kernel, **parts(outer, layout)) for kernel in ("cusparselt", "dense")]
    inner = BlockDiagonal(blocks, layout)(x) if wrapped else None
    got, want = (module(x, inner) for module in made)
    assert len(library.calls) == 1
    # tokens come out as rows where nothing follows, and the bias of what is followed by A is not in the product
    assert library.calls[0]["transposed"] == (layout == "tokens" and not outer)
    assert (library.calls[0]["bias"] is None) == outer
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("tokens", [16, 64])
def test_legal_operands_are_not_copied(library: Library, tokens: int) -> None:
    x = torch.randn(tokens, 64, dtype=torch.float16)
    made = SparseLinear(weight(32, 64, torch.float16), None, None, "tokens", "cusparselt")
    made(x)
    assert library.calls[0]["dense"].data_ptr() == x.data_ptr()
    wrapped = BlockDiagonal(torch.randn(8, 8, 8, dtype=torch.float16), "tokens")(x)
    made(x, wrapped)
    assert library.calls[1]["dense"].data_ptr() == wrapped.data_ptr()


@pytest.mark.parametrize("unsigned", [False, True])
def test_cusparselt_gets_integers_it_takes(library: Library, unsigned: bool) -> None:
    q = torch.randint(0, 256, (3, 7, 60)).to(torch.uint8) if unsigned else torch.randint(-128, 128, (3, 7, 60)).char()
    arguments: Any = (weight(60, 60, torch.int8), torch.full((60,), 1e-3), 3, torch.ones(60), torch.float16, "tokens")
    got, want = (SparseLinearInt8(*arguments, kernel, unsigned=unsigned)(q) for kernel in ("cusparselt", "dense"))
    assert len(library.calls) == 1
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)
    exact = ((q.double() - 3) @ weight(60, 60, torch.int8).double().t()) * 1e-3 + 1
    torch.testing.assert_close(got.double(), exact, rtol=1e-2, atol=1e-1)


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8], ids=str)
def test_a_gpu_has_a_sparse_kernel_that_computes_the_dense_product(dtype: torch.dtype) -> None:
    kernel, reason = kernel_for(torch.device("cuda"), dtype)
    assert kernel != "dense", reason
    w = weight(256, 512, dtype, "cuda")
    if dtype == torch.int8:
        x = torch.randint(-127, 128, (64, 512), device="cuda").to(torch.int8)
        scale = torch.rand(256, device="cuda") * 1e-3
        got, want = (OPERANDS[k](w).scaled(x.t(), scale, torch.float16) for k in (kernel, "dense"))
        torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-3)
        return
    x, bias = torch.randn(64, 512, device="cuda").to(dtype), torch.randn(256, device="cuda").to(dtype)
    for features in (False, True):
        for added in (None, bias):
            for dense in (x.t(), x.t().contiguous()):
                got, want = (OPERANDS[k](w).product(dense, added, features=features) for k in (kernel, "dense"))
                torch.testing.assert_close(got, want, rtol=2e-2, atol=1e-1)


@needs_cuda
@pytest.mark.parametrize("layout", ["tokens", "pixels"])
@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("batch", [1, 7, 64])
def test_layers_on_a_gpu_compute_what_dense_ones_do(layout: str, outer: bool, batch: int) -> None:
    kernel, reason = kernel_for(torch.device("cuda"), torch.float16)
    assert kernel != "dense", reason
    shape = (batch, 5, 36) if layout == "tokens" else (batch, 36, 3, 3)
    x = torch.randn(*shape, device="cuda", dtype=torch.float16)
    wrapped = BlockDiagonal(torch.randn(9, 4, 4, device="cuda", dtype=torch.float16) / 2, layout)(x)
    w, more = weight(24, 36, torch.float16, "cuda"), parts(outer, layout, "cuda")
    got, want = (SparseLinear(w, kernel=k, **more)(x, wrapped) for k in (kernel, "dense"))
    torch.testing.assert_close(got, want, rtol=2e-2, atol=1e-1)
