"""Known sizes leave the graph; modules run call by call on the CPU and as recorded graphs of kernels on a GPU."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from sparse_models import make_factorised
from text_graph import graph

from graphopt.executor import Session
from graphopt.fx.operators.common import ints, number
from graphopt.fx.semi_structured.known import with_known_sizes
from graphopt.fx.semi_structured.lower import Lowered, lower
from graphopt.fx.semi_structured.replay import KEPT, Recording, Runner

CPU = torch.device("cpu")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: nothing can be recorded")


def reshaping() -> ir.Model:
    """Sizes are taken from the input, computed with, and used."""
    return graph(
        "(float[n,t,32] x) => (float[n,m] y)",
        """s = Shape(x)  n = Gather<axis=0>(s, zero)  rest = Concat<axis=0>(n, minus)
        h = MatMul(x, w)  flat = Reshape(h, rest)  k = Size(x)  f = Cast<to=1>(k)  y = Div(flat, f)""",
        w=(32, 32), zero=np.array([0]), minus=np.array([-1]),
    )  # fmt: skip


def names(module: torch.fx.GraphModule) -> set[str]:
    return {getattr(node.target, "__name__", str(node.target)) for node in module.graph.nodes}


def test_known_sizes_leave_the_graph() -> None:
    model = reshaping()
    make_factorised(model, "in", 8)
    module = lower(model, CPU, None).module
    x = torch.randn(3, 4, 32)
    with torch.no_grad():
        sized = with_known_sizes(module, (x,))
        assert {"shape", "gather", "cast"} <= names(module)
        assert not {"shape", "gather", "cast"} & names(sized)
        torch.testing.assert_close(sized(x), module(x), rtol=0, atol=0)
        other = torch.randn(3, 4, 32)
        torch.testing.assert_close(sized(other), module(other), rtol=0, atol=0)
    mine = [p.data_ptr() for p in sized.state_dict().values()]
    assert {p.data_ptr() for n, p in module.state_dict().items() if "sparse" in n} <= set(mine)  # weights are shared


def test_sizes_are_read_from_the_host() -> None:
    far = torch.empty(2, dtype=torch.int64, device="meta")  # reading this one raises
    far.on_host = torch.tensor([3, 4])  # type: ignore[attr-defined]
    assert (ints(far), number(far)) == ([3, 4], 3)
    module = lower(reshaping(), CPU, None).module
    sized = with_known_sizes(module, (torch.randn(3, 4, 32),))
    read = [b for name, b in sized.named_buffers() if b.dtype == torch.int64]
    assert read
    assert all(torch.equal(b.on_host, b) for b in read)


def test_a_runner_takes_any_sizes_and_keeps_some() -> None:
    model = reshaping()
    runner = Runner(lower(model, CPU, None))
    for count in range(1, KEPT + 3):
        x = np.random.default_rng(count).normal(size=(count, 2, 32)).astype(np.float32)
        want = Session(model).run({"x": x})["y"]
        for _ in range(2):
            np.testing.assert_allclose(runner(torch.from_numpy(x))[0].numpy(), want, atol=1e-6)
    assert len(runner._sized) == KEPT
    assert runner.describe() == "densely on the CPU: no CUDA device"


class Device:
    """Stands in for CUDA: what is recorded is the call itself, and `waits` makes it wait for the device."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.waits, self.mode, self.recorded = False, 0, 0
        nothing: Any = contextlib.nullcontext
        for name, stand_in in {
            "Stream": lambda device: self,
            "current_stream": lambda device: self,
            "stream": lambda stream: nothing(),
            "synchronize": lambda device: None,
            "get_sync_debug_mode": lambda: self.mode,
            "set_sync_debug_mode": self.debug,
            "CUDAGraph": lambda: self,
            "graph": lambda graph, stream: nothing(),
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)

    def wait_stream(self, other: object) -> None:
        assert other is self

    def debug(self, mode: str | int) -> None:
        self.mode = 2 if mode == "error" else int(mode)
        if self.mode and self.waits:
            raise RuntimeError("called a synchronizing CUDA operation\nand more")

    def replay(self) -> None:
        self.recorded += 1


def on(device: str, model: ir.Model) -> Lowered:
    return dataclasses.replace(lower(model, CPU, None), device=torch.device(device))


def test_sizes_are_recorded_once_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    device, model = Device(monkeypatch), reshaping()
    runner = Runner(on("cuda", model))
    x = torch.randn(3, 4, 32)
    runner(x)
    first = runner.ready((x,))
    assert isinstance(first, Recording)
    assert first.inputs[0].data_ptr() != x.data_ptr()  # a recording reads its own tensor
    assert device.recorded == 2  # once to compare, once for the call
    other = torch.randn(3, 4, 32)
    runner(other)
    assert runner.ready((other,)) is first
    assert torch.equal(first.inputs[0], other)
    assert runner.describe() == "as a recorded graph of kernels"
    assert device.mode == 0


def test_a_call_that_waits_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    device, model = Device(monkeypatch), reshaping()
    device.waits = True
    runner = Runner(on("cuda", model))
    x = np.random.default_rng(0).normal(size=(3, 4, 32)).astype(np.float32)
    np.testing.assert_allclose(runner(torch.from_numpy(x))[0].numpy(), Session(model).run({"x": x})["y"], atol=1e-6)
    assert device.recorded == 0
    assert runner.describe().endswith("not as a recorded graph: called a synchronizing CUDA operation")


def test_a_replay_that_differs_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    device, model = Device(monkeypatch), reshaping()
    runner = Runner(on("cuda", model))
    monkeypatch.setattr(Recording, "replay", lambda self, inputs: tuple(2 * y for y in self.outputs))
    x = np.random.default_rng(0).normal(size=(3, 4, 32)).astype(np.float32)
    np.testing.assert_allclose(runner(torch.from_numpy(x))[0].numpy(), Session(model).run({"x": x})["y"], atol=1e-6)
    assert runner.describe().endswith("its replay computed something else")
    assert device.mode == 0


@needs_cuda
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wrappers", ["in", "out", "both"])
def test_a_gpu_replays_sparse_layers(kind: torch.dtype, wrappers: str) -> None:
    model = graph(
        "(float[n,t,64] x) => (float[n,m] y)",
        """h = MatMul(x, w)  i = Add(h, b)  r = Relu(i)  j = MatMul(r, v)
        s = Shape(x)  n = Gather<axis=0>(s, zero)  rest = Concat<axis=0>(n, minus)  y = Reshape(j, rest)""",
        w=(64, 128), b=(128,), v=(128, 64), zero=np.array([0]), minus=np.array([-1]),
    )  # fmt: skip
    make_factorised(model, wrappers, 16)
    lowered = lower(model, torch.device("cuda"), kind)
    assert [fate.runs for fate in lowered.fates] != ["dense"] * 2, lowered.fates
    runner = Runner(lowered)
    for count in (1, 5, 1, 5):
        x = np.random.default_rng(count).normal(size=(count, 3, 64)).astype(np.float32)
        want = Session(model).run({"x": x})["y"]
        got = runner(torch.from_numpy(x).cuda())[0].float().cpu().numpy()
        np.testing.assert_allclose(got, want, atol=4e-2 * float(np.abs(want).max()))
    assert not runner.not_recorded
    assert all(isinstance(each, Recording) for each in runner._sized.values())


@needs_cuda
def test_what_waits_for_the_device_is_not_recorded_and_says_so() -> None:
    model = graph("(float[n] x) => (int64[1,m] y)", "y = NonZero(x)")
    runner = Runner(lower(model, torch.device("cuda"), torch.float16))
    for values in ([0.0, 1, 2], [1.0, 1, 0]):
        x = np.array(values, np.float32)
        np.testing.assert_array_equal(
            runner(torch.from_numpy(x).cuda())[0].cpu().numpy(), Session(model).run({"x": x})["y"]
        )
    assert len(runner.not_recorded) == 1
    assert "call by call" in runner.describe()
