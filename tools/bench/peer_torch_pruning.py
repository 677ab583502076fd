"""Networks of the zoo through torch-pruning: PYTHON tools/bench/peer_torch_pruning.py NETWORK ...

Run by coverage.py with the interpreter of an environment that holds torch and torch-pruning. Prints a line of JSON a
network: the share of the parameters that left at half the width, and the largest change of the outputs that taking a
group made after its producers had been zeroed (0 if the tool is exact), or the error.

The tool is given what it asks its users for: which layers make outputs (found by trial), the number of heads of each
projection, and head sizes that are put right after every step, as its own examples do.
"""

from __future__ import annotations

import copy
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "models"))

import torch
import torch_pruning as tp
from torch import nn
from zoo.architecture import Architecture

from zoo import ZOO

ROOTS = (nn.modules.conv._ConvNd, nn.Linear, nn.LSTM)
PROJECTIONS = {"qkv": 3, "c_attn": 3, "query": 1, "key": 1, "value": 1, "q_proj": 1, "k_proj": 1, "v_proj": 1}
PROJECTIONS |= {"q": 1, "k": 1, "v": 1}


def outputs(module: nn.Module, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    result = module(*inputs)
    return list(result) if isinstance(result, tuple) else [result]


def relative(before: list[torch.Tensor], after: list[torch.Tensor], scale: list[torch.Tensor]) -> float:
    """Largest relative difference, measured as our certificates do."""
    worst = 0.0
    for x, y, dense in zip(before, after, scale, strict=True):
        if x.shape != y.shape:
            raise ValueError(f"an output changes its shape from {tuple(x.shape)} to {tuple(y.shape)}")
        worst = max(worst, float((x - y).norm() / torch.maximum(x.norm(), dense.norm()).clamp_min(1e-30)))
    return worst


def shapes_after_pruning(module: nn.Module, name: str, inputs: Sequence[torch.Tensor]) -> list[Any] | None:
    """Shapes of the outputs when one channel of a layer is taken; None where that fails."""
    trial = copy.deepcopy(module)
    layer = trial.get_submodule(name)
    try:
        graph = tp.DependencyGraph().build_dependency(trial, example_inputs=tuple(inputs))
        take = graph.get_pruner_of_module(layer).prune_out_channels
        graph.get_pruning_group(layer, take, idxs=[0]).prune()
        return [y.shape for y in outputs(trial, inputs)]
    except Exception:  # whatever goes wrong here goes wrong in the real run too, where it is reported
        return None


def layers_of_outputs(module: nn.Module, inputs: Sequence[torch.Tensor]) -> list[nn.Module]:
    """Layers whose channels are channels of an output."""
    dense = [y.shape for y in outputs(module, inputs)]
    names = [name for name, layer in module.named_modules() if isinstance(layer, ROOTS)]
    return [
        module.get_submodule(name) for name in names if shapes_after_pruning(module, name, inputs) not in (None, dense)
    ]


def heads(module: nn.Module) -> dict[nn.Module, int]:
    """How many heads each projection of each attention has."""
    found = {}
    for part in module.modules():
        for name, times in PROJECTIONS.items():
            layer = getattr(part, name, None)
            if hasattr(part, "heads") and isinstance(layer, nn.Linear):
                groups = getattr(part, "groups", part.heads) if name in {"k_proj", "v_proj"} else part.heads
                found[layer] = times * groups
    return found


def put_head_sizes_right(module: nn.Module, counts: dict[nn.Module, int]) -> None:
    for part in module.modules():
        for name in PROJECTIONS:
            layer = getattr(part, name, None)
            if hasattr(part, "head_size") and layer in counts:
                part.head_size = layer.out_features // counts[layer]


@torch.no_grad()
def zero(group: Any, graph: Any) -> None:
    """Zero what makes the channels of a group: weights and biases, and the affine part of normalisations."""
    for dependency, indices in group:
        layer, target = dependency.target.module, dependency.handler
        if isinstance(layer, nn.Parameter):
            layer.data.transpose(0, dependency.target.pruning_dim)[indices] = 0
        elif isinstance(layer, nn.MultiheadAttention):
            rows = [index + block * layer.embed_dim for block in range(3) for index in indices]
            layer.in_proj_weight[rows], layer.in_proj_bias[rows] = 0, 0
            layer.out_proj.weight[indices], layer.out_proj.bias[indices] = 0, 0
        elif isinstance(layer, nn.LSTM) and graph.is_out_channel_pruning_fn(target):
            rows = [index + gate * layer.hidden_size for gate in range(4) for index in indices]
            for parameter in layer.parameters():
                parameter[rows] = 0
        elif isinstance(layer, nn.Embedding):
            layer.weight[:, indices] = 0
        elif isinstance(layer, nn.PReLU):
            continue
        elif getattr(layer, "weight", None) is not None and graph.is_out_channel_pruning_fn(target):
            turned = isinstance(layer, nn.modules.conv._ConvTransposeNd) and layer.groups == 1
            layer.weight.data.transpose(0, 1 if turned else 0)[indices] = 0
            if layer.bias is not None:
                layer.bias[indices] = 0


def prune(architecture: Architecture) -> dict[str, Any]:
    """Half the width of a network, group by group."""
    module, inputs = architecture.module(), architecture.example()
    dense = [y.detach() for y in outputs(module, inputs)]
    count = sum(parameter.numel() for parameter in module.parameters())
    counts = heads(module)
    pruner = tp.pruner.BasePruner(
        module,
        tuple(inputs),
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=0.5,
        ignored_layers=layers_of_outputs(module, inputs),
        num_heads=counts,
        root_module_types=list(ROOTS),
        output_transform=lambda y: sum(x.sum() for x in y) if isinstance(y, tuple) else y,
    )
    worst = 0.0
    for group in pruner.step(interactive=True):
        zero(group, pruner.DG)
        with torch.no_grad():
            before = outputs(module, inputs)
        group.prune()
        put_head_sizes_right(module, counts)
        with torch.no_grad():
            worst = max(worst, relative(before, outputs(module, inputs), dense))
    left = sum(parameter.numel() for parameter in module.parameters())
    return {"removed": 1 - left / count, "difference": worst}


def main(names: list[str]) -> None:
    warnings.simplefilter("ignore")
    for name in names:
        try:
            found = prune(ZOO[name])
        except Exception as error:  # a tool that fails on a network is a finding, not an end
            found = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps({"network": name, **found}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
