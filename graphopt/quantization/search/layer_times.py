"""What each layer of a model takes while the model runs, in any number format and with whatever was fused to it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from graphopt.latency.profile import Profile, profile
from graphopt.rewriting.constants import constant
from graphopt.rewriting.edit import sole_use
from graphopt.rewriting.nodes import label

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FUSED = 4
"""Operators behind a layer that a runtime may compute in its kernel: bias, sum, activation, quantisation."""


def layer_times(
    model: ir.Model, layers: Mapping[str, str], feeds: Mapping[str, NDArray[np.generic]], *, threads: int = 1
) -> tuple[dict[str, float], float]:
    """Seconds of layers in one run on the CPU, conversions that belong to them included.

    A layer is known by its node's name or by its output, which writers of number formats keep. What the runtime fused
    behind a layer counts for it: the kernel may carry the name of the last operator in it.

    Args:
        model: float, or quantised in any way; is not changed.
        layers: names of nodes by key, the name of their first output.
        feeds: one call.
        threads: of one operator.

    Returns:
        seconds by key, 0 for layers that vanished; and seconds of all kernels.

    Raises:
        ModelError: the runtime refuses the model.
    """
    measured = profile(model, feeds, threads=threads)
    return _by_layer(model, layers, measured), measured.total


def _by_layer(model: ir.Model, layers: Mapping[str, str], measured: Profile) -> dict[str, float]:
    names = {name: key for key, name in layers.items()}
    owners: dict[ir.Node, str] = {}
    for node in model.graph:
        key = next((v.name for v in node.outputs if v.name in layers), None) or names.get(label(node))
        if key is not None:
            owners[node] = key
    for node in list(owners):
        _claim_parameters(node, owners)
    times = dict.fromkeys(layers, 0.0)
    for node, key in owners.items():
        times[key] += measured.nodes.get(_first(node), 0.0)
    for node, key in list(owners.items()):
        for follower in _behind(node, owners.keys()):
            seconds = measured.nodes.get(_first(follower), 0.0)
            if times[key] == 0.0 and seconds > 0:
                owners[follower] = key
                times[key] += seconds
                break
    return times


def _claim_parameters(node: ir.Node, owners: dict[ir.Node, str]) -> None:
    """Nodes that only make a constant operand of a layer: DequantizeLinear of its weight."""
    for value in node.inputs:
        maker = value.producer() if value is not None else None
        if maker is not None and maker not in owners and all(constant(v) is not None for v in maker.inputs if v):
            owners[maker] = owners[node]


def _behind(node: ir.Node, taken: Collection[ir.Node]) -> list[ir.Node]:
    """The chain of nodes behind a layer that no layer claims."""
    chain: list[ir.Node] = []
    while len(chain) < FUSED and node.outputs:
        use = sole_use(node.outputs[0])
        if use is None or use.node in taken:
            break
        node = use.node
        chain.append(node)
    return chain


def _first(node: ir.Node) -> str:
    return next((str(v.name) for v in node.outputs if v.name), "")


def runs_on_this_cpu(target: Any) -> bool:
    """Whether times measured with ONNX Runtime on this machine's processor are those of the target."""
    from graphopt import registry

    here = target.backend == "ort" and tuple(target.providers) == ("CPUExecutionProvider",)
    return here and registry.unavailable(target) is None
