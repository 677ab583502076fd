"""Sizes that modules keep in attributes: torch's own by their parameters, others by what changed in the graph."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from graphopt.analysis import shapes
from graphopt.fx.carry_over import ORIGIN
from graphopt.fx.from_torch import MODULE

MOST_TRIALS = 64


def scope(node: ir.Node) -> str:
    """Path of the module that a node of an exported model belongs to."""
    return node.metadata_props.get(MODULE, "")


def fix_own(module: nn.Module, pruned: ir.Model) -> None:
    """Bring the size attributes of torch's own layers in line with their parameters, in place."""
    groups = _groups(pruned)
    for path, part in module.named_modules():
        weight = _weight(part)
        shape = tuple(weight.shape) if isinstance(weight, torch.Tensor) else ()
        if isinstance(part, nn.modules.conv._ConvTransposeNd):
            part.groups = groups.get(path, part.groups)
            part.in_channels, part.out_channels = shape[0], shape[1] * part.groups
        elif isinstance(part, nn.modules.conv._ConvNd):
            part.groups = groups.get(path, part.groups)
            part.out_channels, part.in_channels = shape[0], shape[1] * part.groups
        elif isinstance(part, nn.Linear):
            part.out_features, part.in_features = shape
        elif isinstance(part, nn.modules.batchnorm._NormBase):
            held = weight if weight is not None else part.running_mean
            part.num_features = part.num_features if held is None else held.shape[0]
        elif isinstance(part, (nn.LayerNorm, nn.RMSNorm)) and shape:
            part.normalized_shape = shape
        elif isinstance(part, nn.GroupNorm) and shape:
            part.num_channels, part.num_groups = shape[0], groups.get(path, part.num_groups)
        elif isinstance(part, nn.Embedding):
            part.num_embeddings, part.embedding_dim = shape
        elif isinstance(part, nn.PReLU):
            part.num_parameters = shape[0]
        elif isinstance(part, nn.RNNBase):
            part.input_size, part.hidden_size = part.weight_ih_l0.shape[1], part.weight_hh_l0.shape[1]
        elif isinstance(part, nn.MultiheadAttention) and part.in_proj_weight is not None:
            part.embed_dim = part.kdim = part.vdim = part.in_proj_weight.shape[1]
            part.head_dim = part.embed_dim // part.num_heads


def _weight(part: nn.Module) -> Any:
    """The weight, or what hooks compute it from before each run: until the next one the attribute is the old one."""
    held = part._parameters
    return held.get("weight_orig", held.get("weight_v", getattr(part, "weight", None)))


def contradiction(module: nn.Module) -> tuple[str, str] | None:
    """A layer of torch's that cannot have the sizes that its parameters have now: why, and its path."""
    for path, part in module.named_modules():
        if isinstance(part, nn.RNNBase):
            states = {w.shape[1] for name, w in part.named_parameters() if name.startswith("weight_hh")}
            if len(states) > 1:
                return (
                    f"layers or directions of '{path}' would have states of {sorted(states)}, and it has one size",
                    path,
                )
        if isinstance(part, nn.MultiheadAttention) and part.in_proj_weight is not None:
            inner, width = part.in_proj_weight.shape
            if inner != 3 * width or part.out_proj.weight.shape != (width, width):
                return f"heads of '{path}' would be smaller than its width {width} divided by their number", path
    return None


def norm_parameters(module: nn.Module) -> tuple[str, ...]:
    """Parameters of norms over features, as `exclude` takes them: without channels they would be other norms."""
    norms = {path: part for path, part in module.named_modules() if isinstance(part, (nn.LayerNorm, nn.RMSNorm))}
    return tuple(
        f"{path}.{name}" if path else name for path, part in norms.items() for name, _ in part.named_parameters()
    )


def _groups(pruned: ir.Model) -> dict[str, int]:
    """By path: groups of convolutions and of group normalisations, which are exported as instance normalisations."""
    found = {}
    for node in pruned.graph:
        path = scope(node)
        if node.op_type in {"Conv", "ConvTranspose"}:
            found[path] = node.attributes.get_int("group", 1) or 1
        elif node.op_type == "GroupNormalization":
            found[path] = node.attributes.get_int("num_groups", 1) or 1
        elif node.op_type == "InstanceNormalization":
            size = shapes.sizes(node.inputs[1])
            found[path] = size[0] if size else 1
    return found


def settings(module: nn.Module, dense: ir.Model, pruned: ir.Model) -> Iterator[None]:
    """Set the sizes that other modules keep in whole-number attributes, one guess after the other.

    A size that changed in the part of the graph that a module computes is looked for among its attributes. Where one
    number stands for a size that changed and for one that did not (4 heads of size 4), only running the module tells:
    attributes of the same name in modules of the same class are decided alike, and the caller goes on to the next guess
    until the module computes what it should. The first guess changes whatever could have changed.
    """
    changes = _changes(dense, pruned)
    places: list[tuple[nn.Module, str, list[int], tuple[type, str]]] = []
    for path, part in module.named_modules():
        if type(part).__module__.startswith("torch.nn."):
            continue
        for name, value in vars(part).items():
            if not isinstance(value, int) or isinstance(value, bool):
                continue
            became = changes.get(path, {}).get(value)
            if became:
                places.append((part, name, [*sorted(became, reverse=True), value], (type(part), name)))
    kinds = list(dict.fromkeys(kind for *_, kind in places))
    widths = [max(len(o) for _, _, o, k in places if k == kind) for kind in kinds]
    for trial in itertools.islice(itertools.product(*(range(w) for w in widths)), MOST_TRIALS):
        chosen = dict(zip(kinds, trial, strict=True))
        for part, name, options, kind in places:
            setattr(part, name, options[min(chosen[kind], len(options) - 1)])
        yield


def _changes(dense: ir.Model, pruned: ir.Model) -> dict[str, dict[int, set[int]]]:
    """By module path: sizes before, and what became of them. The products of changed neighbours count as sizes too."""
    after = {node.meta[ORIGIN]: node for node in pruned.graph if ORIGIN in node.meta}
    found: dict[str, dict[int, set[int]]] = {}
    for node in dense.graph:
        now = after.get(node.meta[ORIGIN])
        if now is None:
            continue
        pairs: list[tuple[Any, Any]] = [*zip(node.outputs, now.outputs, strict=True), *zip(node.inputs, now.inputs)]  # noqa: B905
        for old, new in pairs:
            before, sizes = (shapes.dims(v) if v is not None else None for v in (old, new))
            if before is None or sizes is None or len(before) != len(sizes):
                continue
            for was, size in zip(before, sizes, strict=True):
                if isinstance(was, int) and isinstance(size, int) and was != size:
                    path = scope(node)
                    for length in range(path.count(".") + 2):
                        prefix = ".".join(path.split(".")[:length])
                        found.setdefault(prefix, {}).setdefault(was, set()).add(size)
    return found
