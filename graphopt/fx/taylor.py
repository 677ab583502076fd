"""What it harms to remove a unit, by the curvature of the divergence from the dense model's own outputs; no labels.

Let p(. | x) be the distribution that the dense model's outputs stand for: categories behind a softmax, coins behind a
sigmoid, else a normal distribution around the output with the output's own variance. Removing a unit u replaces its
values v at every place that reads them by their mean m (a refit puts the mean into the bias; without one, m = 0). To
second order in that step the divergence KL(p_dense | p_pruned) has no gradient at the dense model, where it is least,
and its Hessian is the Fisher information F = E[g g^T], g = d log p(s | x) with s drawn from p(. | x). So

    KL ~ 1/2 step^T F step = 1/2 E_x E_s [ ( sum over uses and positions of (m - v) d log p(s | x) / d v )^2 ].

d/dv counts only what flows through that use. E[g] = 0 and samples are drawn independently, so that for a batch of B
samples E[(sum_b g_b)^2] = sum_b E[g_b^2]: one backward pass a batch estimates the sum for all units at once.

Source: Amari, Natural gradient, 1998; Theis et al., arXiv:1801.05787 (Fisher pruning), here with samples drawn from the
model instead of labels, which makes it the true and not the empirical Fisher information (Kunstner et al.,
arXiv:1905.12558), and centred.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from graphopt.analysis import shapes
from graphopt.analysis.rules import node_key
from graphopt.analysis.units import Coupling
from graphopt.calibration import Calibration
from graphopt.errors import ModelError
from graphopt.fx.extra import torch_threads
from graphopt.fx.to_torch import to_torch

Floats = npt.NDArray[np.float64]

BATCH = 8
"""Samples a backward pass. Smaller ones are slower, and make more independent estimates."""

MEANS = 8
"""Batches that the means are taken from."""


@dataclass(frozen=True)
class _Use:
    """A place where units are read: the tensor (an extra output of the model), an axis, unit ids by position."""

    name: str
    axis: int
    units: tuple[npt.NDArray[np.int64], ...]


def taylor_scores(
    model: ir.Model,
    coupling: Coupling,
    calibration: Calibration,
    *,
    centred: bool = True,
    samples: int | None = None,
    seed: int = 0,
    threads: int = 1,
) -> Floats:
    """Score every unit of a model; see the head of this file.

    Args:
        model: the dense model that `coupling` belongs to; not changed.
        coupling: its analysis.
        calibration: unlabelled inputs.
        centred: units are replaced by their means (True) or by zero.
        samples: calibration samples to use at most.
        seed: of the draws from the model's distribution.
        threads: of torch.

    Returns:
        By unit id, the divergence in nats per sample that removing the unit alone causes; entry 0 is no unit.

    Raises:
        MissingBackendError: torch is not installed.
        ModelError: an operator that `to_torch` does not cover, or no float output.
    """
    copy, uses = _with_uses(model, coupling)
    kinds = [_kind(value) for value in model.graph.outputs]
    if not any(kinds):
        raise ModelError("it has no float output", where="score=taylor", hint="choose another score")
    module = to_torch(copy)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    scores, count = np.zeros(len(coupling.units) + 1), 0
    random = torch.Generator().manual_seed(seed)
    means = _means(module, uses, calibration, samples, len(kinds)) if centred else [0.0] * len(uses)
    with torch_threads(threads):
        for feeds, size in calibration.counted(min(BATCH, calibration.batch_size), samples):
            found = _run(module, feeds, gradients=True)
            likelihood = sum(
                (_log_likelihood(y, kind, random) for y, kind in zip(found, kinds, strict=False) if kind),
                torch.zeros(()),
            )
            tensors = found[len(kinds) :]
            gradients = torch.autograd.grad(likelihood, tensors, allow_unused=True)
            step = np.zeros(len(scores))
            for use, v, g, mean in zip(uses, tensors, gradients, means, strict=True):
                if g is not None:
                    rest = [a for a in range(v.ndim) if a != use.axis]
                    change = ((mean - v.detach()) * g).sum(rest).double().numpy()
                    for vector in use.units:
                        np.add.at(step, vector, change)
            scores += 0.5 * step**2
            count += size
    scores[0] = 0
    return scores / max(1, count)


def _with_uses(model: ir.Model, coupling: Coupling) -> tuple[ir.Model, list[_Use]]:
    """A copy in which every use of units reads its own copy of the tensor, which the model also gives out."""
    from graphopt.pipeline.clone import private_clone
    from graphopt.rewriting.names import Names

    copy = private_clone(model)
    names = Names(copy)
    nodes = {node_key(node): node for node in copy.graph}
    uses: list[_Use] = []
    places: dict[tuple[str, int], str] = {}
    for sink in coupling.sinks:
        node = nodes.get(sink.node)
        operand = node.inputs[sink.index] if node is not None else None
        units = coupling.axis_units(sink.value, sink.axis)
        if node is None or operand is None or not units or shapes.constant_tensor(operand) is not None:
            continue
        if operand.dtype is not None and not operand.dtype.is_floating_point():
            continue
        place = (sink.node, sink.index)
        if place not in places:
            places[place] = names.fresh(f"{sink.value}_use")
            own = ir.node("Identity", [operand], name=places[place])
            own.outputs[0].name, own.outputs[0].type = places[place], operand.type
            own.outputs[0].shape = operand.shape
            node.prepend(own)
            node.replace_input_with(sink.index, own.outputs[0])
            copy.graph.outputs.append(own.outputs[0])
        use = _Use(places[place], sink.axis, units)
        if not any(u.name == use.name and u.axis == use.axis for u in uses):
            uses.append(use)
    # one output for each use, in order, also where a tensor is cut along two axes
    values = {v.name: v for v in copy.graph.outputs}
    del copy.graph.outputs[len(model.graph.outputs) :]
    copy.graph.outputs.extend(values[use.name] for use in uses)
    return copy, uses


def _run(module: Any, feeds: Any, *, gradients: bool) -> list[torch.Tensor]:
    # copied: samples may be read-only, which torch cannot hold
    inputs = [torch.from_numpy(np.array(feeds[name], order="C")) for name in module.meta["inputs"]]
    for tensor in inputs:
        if gradients and tensor.is_floating_point():
            tensor.requires_grad_()
    found = module(*inputs)
    return list(found) if isinstance(found, tuple) else [found]


def _means(
    module: Any, uses: Sequence[_Use], calibration: Calibration, samples: int | None, outputs: int
) -> list[torch.Tensor]:
    """Mean by position of each use's axis, shaped to broadcast against the tensor."""
    sums: list[torch.Tensor | None] = [None] * len(uses)
    counts = [0] * len(uses)
    shaped: list[list[int]] = [[] for _ in uses]
    with torch.no_grad():
        for number, (feeds, _) in enumerate(calibration.counted(calibration.batch_size, samples)):
            if number == MEANS:
                break
            for place, (use, v) in enumerate(zip(uses, _run(module, feeds, gradients=False)[outputs:], strict=True)):
                total = v.sum([a for a in range(v.ndim) if a != use.axis], dtype=torch.float64)
                before = sums[place]
                sums[place] = total if before is None else before + total
                counts[place] += v.numel() // v.shape[use.axis]
                shaped[place] = [-1 if a == use.axis else 1 for a in range(v.ndim)]
    return [
        (total / count).float().reshape(shape) if total is not None else torch.zeros(())
        for total, count, shape in zip(sums, counts, shaped, strict=True)
    ]


def _kind(value: ir.Value) -> str:
    """What an output stands for: the operator that makes probabilities of it, "" where it is not float."""
    if value.dtype is not None and not value.dtype.is_floating_point():
        return ""
    node = value.producer()
    if node is None or node.op_type not in {"Softmax", "LogSoftmax", "Sigmoid"}:
        return "normal"
    axis = node.attributes.get_int("axis", -1 if shapes.opset(node) >= 13 else 1)
    return f"{node.op_type} {axis}"


def _log_likelihood(y: torch.Tensor, kind: str, random: torch.Generator) -> torch.Tensor:
    """Log-likelihood of a draw from the distribution that an output stands for, up to what has no gradient."""
    op, *axis = kind.split()
    if op == "normal":
        noise = torch.randn(y.shape, generator=random, dtype=torch.float32).to(y.dtype)
        deviation = y.detach().std(correction=0).clamp(min=1e-12)
        return (noise * y).sum() / deviation
    if op == "Sigmoid":
        p = y.detach()
        coin = torch.rand(y.shape, generator=random, dtype=torch.float32) < p
        return torch.where(coin, y, 1 - y).clamp(min=1e-12).log().sum()
    rows = y.movedim(int(axis[0]), -1)
    rows = rows.reshape(-1, rows.shape[-1])
    probabilities = rows.detach() if op == "Softmax" else rows.detach().exp()
    drawn = torch.multinomial(probabilities.float(), 1, generator=random)
    picked = rows.gather(1, drawn)
    return (picked.clamp(min=1e-12).log() if op == "Softmax" else picked).sum()
