"""Running a lowered module: on CUDA as a recorded graph of kernels for each set of input sizes, else call by call.

A recording has inputs and outputs at fixed addresses and may not wait for the device. Before one is made, the module
runs on a stream of its own, so that libraries make their handles and workspaces, the last time with torch refusing to
synchronise: what would break a recording is met there, harmlessly, and told. Such sizes then run call by call.
Source: torch.cuda.graphs; NVIDIA's guide to CUDA graphs in PyTorch.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphopt.fx.from_torch import as_tensor
from graphopt.fx.semi_structured.known import with_known_sizes
from graphopt.fx.semi_structured.lower import Lowered

WARM_UP = 3
KEPT = 8
"""Sets of input sizes whose recordings are kept; each holds memory for all that it computes."""

Sizes = tuple[tuple[tuple[int, ...], str], ...]


@dataclass(frozen=True)
class Recording:
    """A graph of kernels between fixed inputs and outputs."""

    graph: Any
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    def replay(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Outputs, which the next replay overwrites."""
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given, non_blocking=True)
        self.graph.replay()
        return self.outputs


class Runner:
    """A lowered module, ready to run.

    Args:
        lowered: the module.
        record: record graphs of kernels where the device has them.
    """

    def __init__(self, lowered: Lowered, *, record: bool = True) -> None:
        self.lowered = lowered
        self._record = record and lowered.device.type == "cuda"
        self._sized: OrderedDict[Sizes, Recording | Lowered] = OrderedDict()
        self.not_recorded: dict[Sizes, str] = {}

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Outputs for inputs on the device; valid until the next call."""
        ready = self.ready(inputs)
        return ready.replay(inputs) if isinstance(ready, Recording) else ready(*inputs)

    def ready(self, inputs: tuple[Tensor, ...]) -> Recording | Lowered:
        """What runs inputs of these sizes; made at the first call."""
        sizes: Sizes = tuple((tuple(x.shape), str(x.dtype)) for x in inputs)
        if sizes in self._sized:
            self._sized.move_to_end(sizes)
            return self._sized[sizes]
        while len(self._sized) >= KEPT:
            self._sized.popitem(last=False)
        self._sized[sizes] = self._prepared(sizes, inputs)
        return self._sized[sizes]

    def _prepared(self, sizes: Sizes, inputs: tuple[Tensor, ...]) -> Recording | Lowered:
        with self.lowered.modes():
            sized = with_known_sizes(self.lowered.module, inputs)
        fixed = Lowered(
            sized, self.lowered.inputs, self.lowered.outputs, self.lowered.device, self.lowered.dtype, ()
        )  # fmt: skip
        if not self._record:
            return fixed
        try:
            recording = record(fixed, inputs, fixed.device)
        except RuntimeError as error:  # torch's only type for what a stream refuses
            torch.cuda.synchronize(fixed.device)
            self.not_recorded[sizes] = str(error).partition("\n")[0]
            return fixed
        if not _agree(fixed(*inputs), recording.replay(inputs)):
            self.not_recorded[sizes] = "its replay computed something else"
            return fixed
        return recording

    def describe(self) -> str:
        """How it runs, one line."""
        if self.lowered.device.type != "cuda":
            return "densely on the CPU: no CUDA device"
        if self.not_recorded:
            return f"call by call, not as a recorded graph: {next(reversed(self.not_recorded.values()))}"
        return "as a recorded graph of kernels" if self._record else "call by call"


def record(call: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...], device: torch.device) -> Recording:
    """Record one call on a CUDA device.

    Args:
        call: makes tensors of tensors.
        inputs: to call it with; recordings are for these sizes.
        device: of the inputs.

    Raises:
        RuntimeError: something waits for the device or the host.
    """
    static = tuple(x.clone() for x in inputs)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            call(*static)
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call(*static)
        finally:
            torch.cuda.set_sync_debug_mode(before)
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        outputs = call(*static)
    return Recording(graph, static, outputs)


def _agree(called: tuple[Tensor, ...], replayed: tuple[Tensor, ...]) -> bool:
    """Up to what kernels of another choice may differ in; NaN where the other is NaN."""
    pairs = zip(called, replayed, strict=True)
    return all(torch.allclose(a.double(), b.double(), rtol=1e-2, atol=_noise(a), equal_nan=True) for a, b in pairs)


def _noise(value: Tensor) -> float:
    finite = value.double()[value.isfinite()].abs()
    return 1e-3 * float(finite.max()) if finite.numel() else 0.0


def to_device(feeds: Mapping[str, np.ndarray[Any, Any]], lowered: Lowered) -> tuple[Tensor, ...]:
    """The inputs of a module, in its order, on its device."""
    return tuple(as_tensor(np.array(feeds[name])).to(lowered.device) for name in lowered.inputs)
