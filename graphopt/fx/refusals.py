"""Why a live module cannot follow its pruned graph: which module, which line of its code, and what to leave out."""

from __future__ import annotations

import linecache
import traceback
from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir
from torch import nn
from torch.nn.utils import parametrize

from graphopt.analysis import shapes
from graphopt.errors import GraphoptError, ModelError, UsageError
from graphopt.fx.attributes import scope
from graphopt.fx.carry_over import ORIGIN
from graphopt.fx.from_torch import SOURCE


def refusal(why: str, globs: Sequence[str] = ()) -> ModelError:
    """The error of a module that cannot follow; `globs` name the parameters that would have to stay."""
    told = ", ".join(f"'{glob}'" for glob in globs) + ("," if len(globs) == 1 else "")
    leave = f"leave it out with exclude=({told}), or " if globs else ""
    return ModelError(
        f"the module cannot follow the pruned graph: {why}",
        where="prune_module",
        hint=f"{leave}take the sizes from tensors in forward",
    )


def of_path(path: str) -> list[str]:
    """Globs of all parameters of a part of a module; none for the whole of it."""
    return [f"{path}.*"] if path else []


def of_error(error: Exception, module: nn.Module, dense: ir.Model, pruned: ir.Model) -> ModelError:
    """The refusal of a module whose code fails with the new sizes."""
    text, path = _place(error, module)
    node = _first_reshaped(dense, pruned, path)
    source = node.meta.get(SOURCE, "") if node is not None else ""
    more = f"; a size that changed is used in {source}" if source and source not in text else ""
    first = next(iter(str(error).splitlines()), type(error).__name__)[:200]
    return refusal(f"{text}{first}{more}", of_path(path or "") or _layers_before(node))


def of_difference(gap: float, dense: ir.Model, pruned: ir.Model) -> ModelError:
    """The refusal of a module that runs with the new sizes and computes something else."""
    why = f"its outputs would differ by {gap:.2g} (relative) from the pruned graph's"
    node = _first_renormalised(dense, pruned) or _first_reshaped(dense, pruned, None)
    if node is None:
        return refusal(why)
    source = node.meta.get(SOURCE, "")
    return refusal(f"{why}; see {source}" if source else why, of_path(scope(node)) or _layers_before(node))


def computed_weights(module: nn.Module) -> dict[str, str]:
    """Paths of the layers whose weights are computed from other parameters, and the call that makes them plain ones."""
    found = {}
    for path, part in module.named_modules():
        if parametrize.is_parametrized(part, "weight"):
            found[path] = "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')"
        elif "weight_v" in part._parameters:
            found[path] = "torch.nn.utils.remove_weight_norm(layer)"
        elif "weight_orig" in part._parameters:
            found[path] = "torch.nn.utils.remove_spectral_norm(layer), or prune.remove(layer, 'weight')"
    return found


def with_computed_weights(error: GraphoptError, module: nn.Module) -> GraphoptError:
    """The error, and where weights are computed, how to make them plain ones, which can be cut and refitted."""
    found = computed_weights(module)
    if not found or type(error) not in {ModelError, UsageError}:
        return error
    names = ", ".join(f"'{path}'" for path in list(found)[:3]) + (", ..." if len(found) > 3 else "")
    calls = "; ".join(dict.fromkeys(found.values()))
    return type(error)(
        f"{error.what} (the weights of {names} are computed from other parameters, and such layers are not refitted)",
        where=error.where,
        hint=f"make them plain weights first: {calls}, and put it on again afterwards. Else {error.hint}",
    )


def _place(error: Exception, module: nn.Module) -> tuple[str, str | None]:
    """The innermost line of the user's code in which an error came up, and the path of the module that it is of."""
    paths = {id(part): path for path, part in module.named_modules()}
    text, found = "", None
    for frame, line in traceback.walk_tb(error.__traceback__):
        code = frame.f_code
        owner = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if code.co_name == "forward" and id(owner) in paths and not type(owner).__module__.startswith("torch.nn."):
            written = linecache.getline(code.co_filename, line).strip()
            place = f"{Path(code.co_filename).name}, line {line}" + (f": {written}" if written else "")
            text, found = f"{type(owner).__name__}.forward ({place}): ", paths[id(owner)]
    return text, found


def _first_reshaped(dense: ir.Model, pruned: ir.Model, path: str | None) -> ir.Node | None:
    """The first node, of one module (None: of any), that cuts a changed axis into pieces or joins pieces to one."""
    after = _by_origin(pruned)
    for node in dense.graph:
        now = after.get(node.meta[ORIGIN])
        if now is None or node.op_type != "Reshape" or (path is not None and scope(node) != path):
            continue
        if shapes.dims(node.outputs[0]) != shapes.dims(now.outputs[0]):
            return node
    return None


def _first_renormalised(dense: ir.Model, pruned: ir.Model) -> ir.Node | None:
    """The first layer norm that became another operator."""
    after = _by_origin(pruned)
    for node in dense.graph:
        now = after.get(node.meta[ORIGIN])
        if node.op_type == "LayerNormalization" and (now is None or now.op_type != node.op_type):
            return node
    return None


def _by_origin(pruned: ir.Model) -> dict[int, ir.Node]:
    return {node.meta[ORIGIN]: node for node in pruned.graph if ORIGIN in node.meta}


def _layers_before(node: ir.Node | None) -> list[str]:
    """Globs of the nearest layers in front of a node: without them its sizes stay."""
    found: dict[str, None] = {}
    pending = [node] if node is not None else []
    seen: set[ir.Node] = set()
    while pending:
        here = pending.pop()
        if here in seen:
            continue
        seen.add(here)
        weights = [v.name or "" for v in here.inputs if v is not None and v.is_initializer() and _rank(v) > 1]
        if weights and here is not node:
            for name in weights:
                found[next(iter(of_path(name.rpartition(".")[0])), name)] = None
            continue
        pending += [p for v in here.inputs if v is not None and (p := v.producer()) is not None]
    return list(found)


def _rank(value: ir.Value) -> int:
    tensor = shapes.constant_tensor(value)
    return 0 if tensor is None else len(tensor.shape)
