"""`graphopt.prune_module`: what `prune` decides about a module's ONNX graph, done to the live module.

The module is exported, the graph pruned, and what the pruned graph holds is written back: parameters and buffers
become smaller ones with the refitted values, sizes in attributes follow, the optimiser's moments are cut alike. Then
the module is run beside the pruned graph. Where it cannot follow (a size is written into its code, a layer norm lost
channels), it is left exactly as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from graphopt.errors import GraphoptError, ModelError
from graphopt.fx.extra import require_torch
from graphopt.fx.from_torch import Exported, arguments, as_array, evaluation_mode, export, leaves

if TYPE_CHECKING:
    import torch

    from graphopt.fx.carry_over import Carried
    from graphopt.report.data import Report


@dataclass(frozen=True)
class PrunedModule:
    """A pruned module.

    Attributes:
        module: the module that was given, smaller.
        model: the pruned ONNX model that it equals.
        report: what the pass did.
        kept: by parameter and buffer, the positions of every axis that are left.
    """

    module: torch.nn.Module
    model: ir.Model
    report: Report
    kept: dict[str, list[np.ndarray[Any, Any]]]


def prune_module(
    module: torch.nn.Module,
    example_inputs: Any,
    *,
    dynamic_shapes: Any = "batch",
    calib: Any = None,
    target: Any = None,
    seed: int = 0,
    jobs: int = 1,
    optimizer: torch.optim.Optimizer | None = None,
    **options: Any,
) -> PrunedModule:
    """Prune a live module in place, so that it can be trained on.

    Args:
        module: any module that `graphopt.from_torch` takes; on failure it stays as it was.
        example_inputs: see `graphopt.from_torch`.
        dynamic_shapes: see `graphopt.from_torch`; by default the batch is symbolic.
        calib: unlabelled inputs: a tensor, a tuple of tensors in the order of the inputs, or whatever
            `graphopt.calibration.load` takes.
        target: as of `graphopt.optimize`.
        seed: of random choices.
        jobs: threads.
        optimizer: an optimiser of the module's parameters; gets the new ones, and moments that are cut alike.
        **options: those of the pass `prune` (`graphopt passes prune`), with `center=False` and `gather=False`, and the
            features that layer and RMS norms normalise over excluded: a module keeps its code. Without any, only what
            is dead already goes (`shrink`), which changes nothing that the module computes.

    Raises:
        MissingBackendError: torch is not installed.
        ModelError: the module cannot follow the graph; says why, and what to exclude.
        GraphoptError: as of `graphopt.optimize`.
    """
    require_torch("prune_module")
    from graphopt import registry
    from graphopt.analysis.grouped import keep_groups_whole
    from graphopt.api import optimize
    from graphopt.fx.attributes import norm_parameters
    from graphopt.fx.carry_over import carry_over, number_nodes
    from graphopt.fx.refusals import of_path, refusal, with_computed_weights

    exported = export(module, example_inputs, dynamic_shapes)
    dense = exported.model
    number_nodes(dense)
    keep_groups_whole(dense)
    if options:
        # a module keeps the norms and shuffles that it is written with, norms over the features they are written for
        options = {
            "center": False,
            "gather": False,
            **options,
            "exclude": (*options.get("exclude", ()), *norm_parameters(module)),
        }
    chosen = registry.pass_class("prune" if options else "shrink")(**options)
    data = _calibration(calib, [v.name or "" for v in dense.graph.inputs])
    try:
        result = optimize(dense, [chosen], calib=data, target=target, seed=seed, jobs=jobs, bench=False, units=False)
    except GraphoptError as error:
        raise with_computed_weights(error, module) from error.__cause__
    sizes = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    carried = carry_over(dense, result.model, exported.moved, sizes)
    if carried.problems:
        why, name = carried.problems[0]
        raise with_computed_weights(refusal(why, of_path(name.rpartition(".")[0]) or [name]), module)
    undo = _snapshot(module)
    try:
        replaced = _write(module, carried)
        _settle(module, exported, result.model, example_inputs)
        if optimizer is not None:
            _follow(optimizer, module, replaced, carried)
    except GraphoptError as error:
        undo()
        raise with_computed_weights(error, module) from error.__cause__
    return PrunedModule(module, result.model, result.report, carried.kept)


def _calibration(calib: Any, names: list[str]) -> Any:
    import torch

    if isinstance(calib, torch.Tensor):
        calib = (calib,)
    if isinstance(calib, tuple) and all(isinstance(t, torch.Tensor) for t in calib):
        return {name: as_array(t) for name, t in zip(names, calib, strict=True)}
    return calib


def _snapshot(module: torch.nn.Module) -> Callable[[], None]:
    """A function that puts every parameter, buffer and attribute back to what it is now."""
    held = [(part, dict(vars(part)), dict(part._parameters), dict(part._buffers)) for part in module.modules()]

    def undo() -> None:
        for part, attributes, parameters, buffers in held:
            vars(part).update(attributes)
            for now, before in ((part._parameters, parameters), (part._buffers, buffers)):
                now.clear()
                now.update(before)
            if "_flat_weights_names" in attributes:
                part._flat_weights = [getattr(part, name) for name in part._flat_weights_names]

    return undo


Replaced = dict[Any, tuple[Any, str]]
"""Old parameter -> (new parameter, its name)."""


def _write(module: torch.nn.Module, carried: Carried) -> Replaced:
    """Put new parameters and buffers in the place of the old ones; a tied one everywhere it is used."""
    import torch

    state = module.state_dict(keep_vars=True)
    new: dict[int, tuple[Any, str]] = {}
    for name, array in carried.values.items():
        old = state[name]
        tensor = torch.from_numpy(np.ascontiguousarray(array)).to(old.device, old.dtype)
        made = torch.nn.Parameter(tensor, old.requires_grad) if isinstance(old, torch.nn.Parameter) else tensor
        new[id(old)] = (made, name)
    replaced: Replaced = {}
    for part in module.modules():
        for name, old in [*part._parameters.items(), *part._buffers.items()]:
            if id(old) in new:
                setattr(part, name, new[id(old)][0])
                replaced[old] = new[id(old)]
    for weight, array in carried.biases.items():
        _add_bias(module, weight, array)
    return replaced


def _add_bias(module: torch.nn.Module, weight: str, array: Any) -> None:
    """A layer adds what its removed inputs contributed; one without a bias gets one."""
    import torch

    from graphopt.fx.refusals import of_path, refusal

    path, _, leaf = weight.rpartition(".")
    try:
        layer = module.get_submodule(path)
    except AttributeError:
        raise refusal(f"'{weight}' got a bias and belongs to no module", [weight]) from None
    if leaf != "weight" or "bias" not in layer._parameters:
        raise refusal(
            f"'{weight}' got a bias, and {type(layer).__name__} has no place for it", of_path(path) or [weight]
        )
    like = layer.weight
    added = torch.from_numpy(np.ascontiguousarray(array)).to(like.device, like.dtype)
    if layer.bias is None:
        layer.bias = torch.nn.Parameter(added, like.requires_grad)
    else:
        with torch.no_grad():
            layer.bias += added


def _settle(module: torch.nn.Module, exported: Exported, pruned: ir.Model, example_inputs: Any) -> None:
    """Set sizes in attributes so that the module computes what the pruned model does.

    Raises:
        ModelError: no setting does.
    """
    import torch

    from graphopt.executor import Session
    from graphopt.fx.attributes import contradiction, fix_own, settings
    from graphopt.fx.refusals import of_difference, of_error, of_path, refusal

    args, kwargs = arguments(example_inputs)
    tensors = [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    names = [v.name or "" for v in pruned.graph.inputs]
    with Session(pruned) as session:
        wanted = list(session.run({n: as_array(t) for n, t in zip(names, tensors, strict=True)}).values())
    fix_own(module, pruned)
    impossible = contradiction(module)
    if impossible is not None:
        why, path = impossible
        raise refusal(why, of_path(path))
    first: ModelError | None = None
    for _ in settings(module, exported.model, pruned):
        try:
            with evaluation_mode(module), torch.no_grad():
                outputs = [leaf for leaf in leaves(module(*args, **kwargs)) if isinstance(leaf, torch.Tensor)]
        except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
            first = first or of_error(error, module, exported.model, pruned)
            continue
        gap = _gap([as_array(t) for t in outputs], wanted)
        if gap <= _TOLERANCE:
            return
        first = first or of_difference(gap, exported.model, pruned)
    raise first or refusal("no setting of its sizes was tried")


_TOLERANCE = 1e-4
"""Relative difference of outputs that counts as rounding, as for exact passes."""


def _gap(found: Iterable[Any], wanted: Iterable[Any]) -> float:
    worst = 0.0
    for got, goal in zip(found, wanted, strict=True):
        if got.shape != goal.shape:
            return float("inf")
        difference = float(np.linalg.norm(np.subtract(got, goal, dtype=np.float64)))
        worst = max(worst, difference / max(float(np.linalg.norm(goal.astype(np.float64))), 1e-6))
    return worst


def _follow(optimizer: torch.optim.Optimizer, module: torch.nn.Module, replaced: Replaced, carried: Carried) -> None:
    """Give an optimiser the new parameters; what it remembers of the old ones is cut in the same way."""
    import torch

    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    added = [p for p in module.parameters() if id(p) not in owned and not any(p is new for new, _ in replaced.values())]
    for group in optimizer.param_groups:
        for place, old in enumerate(group["params"]):
            if old not in replaced:
                continue
            new, name = replaced[old]
            group["params"][place] = new
            if old in optimizer.state:
                box = np.ix_(*carried.kept[name]) if old.ndim else ()
                state = optimizer.state.pop(old)
                optimizer.state[new] = {
                    key: value[box].clone() if isinstance(value, torch.Tensor) and value.shape == old.shape else value
                    for key, value in state.items()
                }
    if added:
        optimizer.param_groups[0]["params"].extend(added)
