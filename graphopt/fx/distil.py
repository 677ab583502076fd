"""Distillation without labels: the pruned network learns to answer as the dense one does.

The loss on a batch x, with outputs y of the dense and z of the pruned model, and hidden tensors h and g of both:

    sum over outputs |z - y|^2 / |y - mean y|^2  +  mean over hidden tensors |g - h_K|^2 / |h_K - mean h_K|^2

where K are the channels that are left. Every term is the share of the dense tensor's variance that is missed, so that
nothing needs a weight. For logits it is the limit of the distillation loss at high temperature.
Source: Hinton, Vinyals, Dean, arXiv:1503.02531, section 2.1; hidden tensors: Romero et al., FitNets, arXiv:1412.6550.

Adam with a rate that falls along a cosine. A part of the data is held out; the weights that are best there are kept,
which may be those at the start. Equal data, seed, threads and versions give equal weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from graphopt.errors import DataError, ModelError
from graphopt.executor import Session
from graphopt.fx.extra import torch_threads
from graphopt.fx.to_torch import to_torch, update_weights
from graphopt.progress import Progress

if TYPE_CHECKING:
    from graphopt.calibration import Calibration

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]

HELD_OUT = 0.125
"""Share of the data that chooses among the weights."""

CHECKS = 10
"""How often the held-out part is looked at."""


@dataclass(frozen=True)
class Hidden:
    """A tensor inside both models that should stay alike.

    Attributes:
        name: of the tensor, in both.
        kept: by axis, the dense positions that the pruned tensor still has.
    """

    name: str
    kept: Mapping[int, npt.NDArray[np.intp]] = field(default_factory=dict)

    def of_dense(self, tensor: torch.Tensor) -> torch.Tensor:
        """What the pruned tensor should be."""
        for axis, places in self.kept.items():
            tensor = tensor.index_select(axis, torch.from_numpy(places.astype(np.int64)))
        return tensor


@dataclass(frozen=True)
class Distilled:
    """What came of it: the loss on held-out data, before and at the best step."""

    before: float
    after: float
    best: int
    steps: int


def distil(
    dense: ir.Model,
    pruned: ir.Model,
    calibration: Calibration,
    *,
    steps: int,
    seconds: float = math.inf,
    samples: int | None = None,
    hidden: Sequence[Hidden] = (),
    rate: float = 1e-3,
    batch: int = 64,
    seed: int = 0,
    threads: int = 1,
    progress: Progress | None = None,
) -> Distilled:
    """Train the float parameters of a pruned model to match a dense one, in place.

    Args:
        dense: the teacher; inputs and outputs have the names of the pruned model's.
        pruned: the model to train; only the values of its weights change.
        calibration: unlabelled inputs.
        steps: steps of Adam at most.
        seconds: time at most.
        samples: use at most so many samples.
        hidden: tensors inside that should stay alike as well.
        rate: highest learning rate.
        batch: samples a step, where they can be put together.
        seed: of the order of the samples.
        threads: of torch and ONNX Runtime.
        progress: where to tell.

    Raises:
        ModelError: an operator that `to_torch` does not cover, or no parameter that the outputs depend on.
        DataError: fewer than two batches of data.
    """
    module = to_torch(_with_outputs(pruned, hidden))
    parameters = [p for p in module.parameters() if p.requires_grad]
    outputs = [v.name or "" for v in pruned.graph.outputs]
    if not parameters:
        raise ModelError("the model has no float parameters to train", where="distil", hint="distil before quantising")
    names = [*outputs, *(h.name for h in hidden)]
    with torch_threads(threads), Session(dense, threads=threads, outputs=names) as teacher:
        batches = Batches(calibration, batch, samples, seed)
        loss = _Loss(module, teacher, outputs, hidden)
        with torch.no_grad():
            before = best = loss.mean(batches.held_out)
        kept = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        chosen, done, start = 0, 0, time.perf_counter()
        optimizer = torch.optim.Adam(parameters, lr=rate)
        every = max(1, steps // CHECKS)
        for step, feeds in zip(range(1, steps + 1), batches, strict=False):
            used = max((step - 1) / steps, (time.perf_counter() - start) / seconds)
            if used >= 1:
                break
            for group in optimizer.param_groups:
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * used))
            optimizer.zero_grad()
            loss(feeds).backward()
            optimizer.step()
            done = step
            if progress is not None:
                progress.step("distilling", step, steps)
            if step % every == 0 or step == steps:
                with torch.no_grad():
                    found = loss.mean(batches.held_out)
                if found < best:
                    best, chosen = found, step
                    kept = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    if chosen:
        module.load_state_dict(kept)
        update_weights(pruned, module)
    return Distilled(before, best, chosen, done)


def _with_outputs(model: ir.Model, hidden: Sequence[Hidden]) -> ir.Model:
    """A copy that also gives out the hidden tensors."""
    from graphopt.pipeline.clone import private_clone

    copy = private_clone(model)
    values = {v.name: v for node in copy.graph for v in node.outputs}
    copy.graph.outputs.extend(values[h.name] for h in hidden)
    return copy


class Batches:
    """Batches in a random order without end, and the held-out ones.

    Samples are put together anew for every epoch where all inputs have them along axis 0 in one shape; calls of other
    shapes are taken as they come.
    """

    def __init__(self, calibration: Calibration, size: int, samples: int | None, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._size = size
        calls = [(dict(feeds), count) for feeds, count in calibration.counted(size, samples)]
        rows = _stacked(calls)
        if rows is None:
            if len(calls) < 2:
                raise DataError(
                    "one batch is too little to learn from and to check on",
                    where=calibration.name,
                    hint="give more data",
                )
            order = self._random.permutation(len(calls))
            cut = max(1, round(HELD_OUT * len(calls)))
            self.held_out: list[Feeds] = [calls[i][0] for i in order[:cut]]
            self._calls: list[Feeds] = [calls[i][0] for i in order[cut:]]
            self._rows: dict[str, Array] | None = None
            return
        count = len(next(iter(rows.values())))
        if count < 8:
            raise DataError(
                f"{count} samples are too few to learn from and to check on",
                where=calibration.name,
                hint="give more data",
            )
        order = self._random.permutation(count)
        cut = max(1, round(HELD_OUT * count))
        held = {name: a[order[:cut]] for name, a in rows.items()}
        self.held_out = [{n: a[i : i + 4 * size] for n, a in held.items()} for i in range(0, cut, 4 * size)]
        self._rows = {name: a[order[cut:]] for name, a in rows.items()}

    def __iter__(self) -> Iterator[Feeds]:
        while True:
            if self._rows is None:
                yield from (self._calls[i] for i in self._random.permutation(len(self._calls)))
                continue
            count = len(next(iter(self._rows.values())))
            size = min(self._size, count)
            order = self._random.permutation(count)
            for start in range(0, count - size + 1, size):
                yield {name: a[order[start : start + size]] for name, a in self._rows.items()}


def _stacked(calls: Sequence[tuple[dict[str, Array], int]]) -> dict[str, Array] | None:
    """All samples along axis 0; None where shapes differ, or where calls cannot be cut into samples."""
    (first, _), *_ = calls
    for feeds, count in calls:
        for name, array in feeds.items():
            if array.ndim == 0 or array.shape[0] != count or array.shape[1:] != first[name].shape[1:]:
                return None
    if all(count == 1 for _, count in calls):  # the model takes one sample a call
        return None
    return {name: np.concatenate([feeds[name] for feeds, _ in calls]) for name in first}


class _Loss:
    """The loss at the head of this file."""

    def __init__(self, module: Any, teacher: Session, outputs: Sequence[str], hidden: Sequence[Hidden]) -> None:
        self._module = module
        self._teacher = teacher
        self._outputs = outputs
        self._hidden = {h.name: h for h in hidden}

    def __call__(self, feeds: Feeds) -> torch.Tensor:
        goal = self._teacher.run(feeds)
        found = self._module(*(torch.from_numpy(np.ascontiguousarray(feeds[n])) for n in self._module.meta["inputs"]))
        found = found if isinstance(found, tuple) else (found,)
        total = torch.zeros(())
        share = 1 / max(1, len(self._hidden))
        for name, got in zip([*self._outputs, *self._hidden], found, strict=True):
            if not got.is_floating_point():
                continue
            wanted = torch.from_numpy(goal[name])
            inner = self._hidden.get(name)
            term = _missed(got, wanted if inner is None else inner.of_dense(wanted))
            total = total + (term if inner is None else share * term)
        return total

    def mean(self, batches: Sequence[Feeds]) -> float:
        """Over several batches, weighted alike."""
        return float(np.mean([self(feeds).item() for feeds in batches]))


def _missed(got: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Share of the variance of what is wanted that is missed; a constant is taken by its size."""
    wanted = torch.where(torch.isfinite(wanted), wanted, got.detach())
    variance = (wanted - wanted.mean()).square().mean()
    scale = torch.where(variance > 0, variance, wanted.square().mean()).clamp(min=1e-12)
    return (got - wanted).square().mean() / scale
