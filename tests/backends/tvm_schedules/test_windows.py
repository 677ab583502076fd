"""Convolutions, pooling and what stands between them, computed over channels in blocks: against ONNX Runtime."""

from __future__ import annotations

import numpy as np
import pytest
from text_graph import graph
from tvm_kernels import Kernels, assembly, compared, scheduled, x86

tvm = pytest.importorskip("tvm", reason="needs TVM: pip install 'graphopt[tvm]'")

TOLERANCE = 1e-5

# Size of x, size of w, attributes.
CONVOLUTIONS = {
    "plain": ((1, 16, 9, 16), (32, 16, 3, 3), "pads=[1,1,1,1]"),
    "odd channels, uneven padding, strides": ((1, 7, 11, 13), (17, 7, 3, 2), "pads=[2,0,1,3], strides=[2,3]"),
    "dilated, ragged tiles": ((2, 20, 10, 23), (12, 20, 3, 3), "pads=[2,1,0,2], dilations=[2,1]"),
    "one channel in and out": ((1, 1, 5, 5), (1, 1, 3, 3), "pads=[1,1,1,1]"),
    "kernel larger than the input": ((1, 3, 2, 1), (5, 3, 5, 7), "pads=[2,3,2,3]"),
    "pointwise": ((1, 24, 7, 7), (48, 24, 1, 1), ""),
    "depthwise": ((1, 19, 9, 10), (19, 1, 3, 3), "group=19, pads=[1,1,1,1], strides=[2,1]"),
    "depthwise, two each": ((1, 6, 8, 8), (12, 1, 3, 3), "group=6, pads=[1,1,1,1]"),
    "groups within a block": ((1, 6, 8, 9), (9, 2, 3, 3), "group=3, pads=[1,1,1,1]"),
    "groups across blocks": ((1, 24, 8, 8), (36, 8, 1, 1), "group=3"),
    "along time": ((2, 10, 31), (18, 10, 5), "pads=[4,0], strides=[2]"),
}


def _feeds(*shape: int) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(0).normal(size=shape).astype(np.float32)}


def _exact(kernels: Kernels) -> None:
    assert kernels.error < TOLERANCE
    assert kernels.failures == []


@pytest.mark.parametrize(("x", "w", "attributes"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolution(x: tuple[int, ...], w: tuple[int, ...], attributes: str) -> None:
    sizes, rank = ",".join(map(str, x)), len(x)
    listed = f" <{attributes}>" if attributes else ""
    model = graph(
        f"(float[{sizes}] x) => (float[{','.join('abcd'[:rank])}] y)",
        f"c = Conv{listed}(x, w, b)\n y = Relu(c)", w=w, b=(w[0],),
    )  # fmt: skip
    kernels = compared(model, _feeds(*x))
    _exact(kernels)
    assert any("conv" in name and "relu" in name for name in kernels.names), "the activation is computed at the tile"
    assert not any("conv" in name for name in kernels.unscheduled)


def test_transposed_convolution_in_phases() -> None:
    model = graph(
        "(float[1,6,5,7] x) => (float[a,b,c,d] y)",
        "c = ConvTranspose <strides=[2,3], pads=[1,0,2,1], output_padding=[1,0], group=2> (x, w, b)\n y = Relu(c)",
        w=(6, 5, 3, 5), b=(10,),
    )  # fmt: skip
    _exact(compared(model, _feeds(1, 6, 5, 7)))


def test_transposed_convolution_of_stride_one_is_one_kernel() -> None:
    model = graph(
        "(float[1,9,4,7] x) => (float[a,b,c,d] y)",
        "y = ConvTranspose <pads=[2,1,2,1], dilations=[2,1], group=9> (x, w)",
        w=(9, 1, 3, 3),
    )  # fmt: skip
    kernels = compared(model, _feeds(1, 9, 4, 7))
    _exact(kernels)
    assert not any("lay" in name for name in kernels.names)


def test_residual_block_stays_in_blocks() -> None:
    model = graph(
        "(float[1,16,8,8] x) => (float[a,b,c,d] y)",
        """a = Conv <pads=[1,1,1,1]> (x, w, b)  r = Clip(a, low, high)
           d = Conv <pads=[1,1,1,1], group=16> (r, v)  n = BatchNormalization(d, s, b, m, p)
           e = Add(n, a)  f = HardSwish(e)  g = GlobalAveragePool(f)  h = Sigmoid(g)  y = Mul(f, h)""",
        w=(16, 16, 3, 3), b=(16,), v=(16, 1, 3, 3), s=(16,), m=(16,), p=np.full(16, 0.7, np.float32),
        low=np.float32(0), high=np.float32(6),
    )  # fmt: skip
    kernels = compared(model, _feeds(1, 16, 8, 8))
    _exact(kernels)
    assert sum("unpack" in name for name in kernels.names) == 1, "only the output leaves the blocks"
    assert not any(name.startswith("fused_unpack") and "pack1" in name for name in kernels.names)


@pytest.mark.parametrize(
    "pool",
    [
        "MaxPool <kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1], ceil_mode=1>",
        "AveragePool <kernel_shape=[3,2], strides=[1,2], pads=[1,0,1,1]>",
        "AveragePool <kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1], count_include_pad=1>",
        "AveragePool <kernel_shape=[2,2], strides=[2,2], ceil_mode=1>",
        "GlobalAveragePool",
    ],
)
def test_pooling(pool: str) -> None:
    model = graph("(float[2,18,9,11] x) => (float[a,b,c,d] y)", f"y = {pool}(x)")
    _exact(compared(model, _feeds(2, 18, 9, 11)))


def test_channels_that_do_not_fill_blocks_meet_in_a_concat() -> None:
    model = graph(
        "(float[1,5,6,6] x) => (float[a,b,c,d] y)",
        """a = Conv(x, w)  b = Conv(x, v)  c = Concat <axis=1> (a, a)  d = Concat <axis=1> (b, b, a)
           e = Conv(c, u)  f = Conv(d, t)  y = Concat <axis=3> (e, f)""",
        w=(16, 5, 1, 1), v=(3, 5, 1, 1), u=(4, 32, 1, 1), t=(4, 22, 1, 1),
    )  # fmt: skip
    _exact(compared(model, _feeds(1, 5, 6, 6)))


@pytest.mark.parametrize("batch", [1, 3])
def test_open_batch_and_image(batch: int) -> None:
    model = graph(
        "(float[N,3,H,W] x) => (float[a,b,c,d] y)",
        "a = Conv <pads=[1,1,1,1], strides=[2,2]> (x, w)  b = Relu(a)  y = Conv <pads=[0,1,1,0], group=8> (b, v)",
        w=(8, 3, 3, 3), v=(8, 1, 2, 2),
    )  # fmt: skip
    _exact(compared(model, _feeds(batch, 3, 17, 30)))


def test_padding_along_space_stays_in_blocks_and_along_channels_does_not() -> None:
    model = graph(
        "(float[1,8,6,6] x) => (float[a,b,c,d] y)",
        "a = Conv(x, w)  b = Pad(a, space)  c = Conv(b, w)  d = Pad(c, channels)  y = Conv(d, v)",
        w=(8, 8, 1, 1), v=(4, 12, 1, 1), space=np.array([0, 0, 1, 2, 0, 0, 0, 1]),
        channels=np.array([0, 1, 0, 0, 0, 3, 0, 0]),
    )  # fmt: skip
    kernels = compared(model, _feeds(1, 8, 6, 6))
    _exact(kernels)
    assert any(name.startswith("pad") for name in kernels.names), "the padding along space, alone"


@pytest.mark.parametrize(("size", "shared"), [(20, False), (60, True)])
def test_cores_share_a_kernel_that_is_worth_it(size: int, shared: bool) -> None:
    model = graph(
        f"(float[1,8,{size},{size}] x) => (float[a,b,c,d] y)", "y = Conv <pads=[1,1,1,1]> (x, w)", w=(16, 8, 3, 3)
    )  # fmt: skip
    kernels = compared(model, _feeds(1, 8, size, size), x86(cores=2))
    _exact(kernels)
    module, _ = scheduled(model, x86(cores=2))
    assert ("T.parallel" in module.script()) == shared


@pytest.mark.parametrize(
    ("target", "multiply_add"),
    [
        ({"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a78ae"}, r"fmla\tv\d+\.4s"),
        ({"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "haswell"}, r"vfmadd\d+ps\t.*%ymm"),
        ({"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "skylake-avx512"}, r"vfmadd\d+ps\t.*%zmm"),
    ],
)
def test_vectors_of_the_target(target: dict[str, str], multiply_add: str) -> None:
    import re

    model = graph("(float[1,32,16,16] x) => (float[a,b,c,d] y)", "y = Conv <pads=[1,1,1,1]> (x, w)", w=(32, 32, 3, 3))
    device = tvm.target.Target({**target, "num-cores": 1})
    code = assembly(scheduled(model, device)[0], device)
    # A tile of 8 or more sums, each added to once in the innermost loop.
    assert len(re.findall(multiply_add, code)) >= 8
