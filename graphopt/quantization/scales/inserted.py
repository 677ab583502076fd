"""Smoothing where nothing can absorb the scales: a multiplication in front of the layers that are quantised.

    x W = (x * 1/s) (s W)        one Mul for all layers that read x; s are powers of two, so that no bit changes

What writes x often cannot be divided by s, because others read x too: the residual sums of a transformer, an activation
function. One multiplication for each number of x costs little beside the products, and where a few channels are much
larger than the others it gives integers the accuracy that these take from them. (Scales that cost nothing are the pass
`smooth`'s, which should go before.)
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from graphopt.calibration import Calibration
from graphopt.data.activations import activations
from graphopt.numerics.rounding import Grid
from graphopt.numerics.smoothing import ChannelRange, SmoothedLayer, Smoothing, smoothed
from graphopt.rewriting.constants import array
from graphopt.rewriting.edit import new_initializer, sole_use
from graphopt.rewriting.names import Names
from graphopt.rewriting.nodes import is_onnx
from graphopt.target import QuantScheme

GAIN_DB = 3.0
"""What the estimated error of the layers must gain at least, in decibels: the multiplication takes time."""

COMMON = 0.75
"""Share of the channels whose magnitudes count as no smaller than they are together. A channel that was small on some
samples need not be on others, and were it enlarged to what outliers become, it would take the steps of all when it is
not: only what stands out is made smaller."""

LIMIT = 20.0
"""Bound of the base-2 logarithm of a scale."""


@dataclass(frozen=True)
class Ahead:
    """A multiplication that is worth its time in front of the layers that read a tensor.

    Attributes:
        tensor: what it multiplies.
        scale: (channels,) powers of two; x is divided by them.
        alpha: share of the outliers that the weights take (`graphopt.numerics.smoothing`).
        gain: of the estimated error of the layers' int8 outputs, in decibels.
    """

    tensor: str
    scale: NDArray[np.float64]
    alpha: float
    gain: float


def find_scales(
    model: ir.Model,
    keys: Collection[str],
    calibration: Calibration,
    scheme: QuantScheme,
    *,
    samples: int = 128,
    threads: int = 1,
) -> dict[str, Ahead]:
    """Scales for MatMul and Gemm nodes of the main graph, by tensor, where integers lose much less with them.

    Args:
        model: in float; not changed.
        keys: of the layers that may be quantised (names of their first outputs).
        calibration: the data.
        scheme: of the target, for the grids.
        samples: of the data, at most.
        threads: of the runtime.
    """
    groups = _groups(model.graph, keys)
    ranges = {str(x.name): ChannelRange(len(_rows(nodes[0]))) for x, nodes in groups.items()}
    for tensors in activations(model, list(ranges), calibration, limit=samples, threads=threads):
        for name, values in tensors.items():
            ranges[name].update(values, values.ndim - 1)
    found = {}
    for x, nodes in groups.items():
        name = str(x.name)
        best = _search(nodes, ranges[name], scheme)
        gain = 10 * float(np.log10(best.before / best.after)) if best.alpha is not None else 0.0
        if best.alpha is not None and gain >= GAIN_DB:
            found[name] = Ahead(name, np.exp2(best.logs[1:]), best.alpha, gain)
    return found


def insert_scales(model: ir.Model, keys: Collection[str], found: Mapping[str, Ahead]) -> list[str]:
    """Put the multiplications in front of layers, in place.

    Args:
        model: in float, the one that was searched or a clone of it. It computes the same afterwards, bit for bit unless
            a weight leaves the range of its type.
        keys: of the layers that are quantised; others read what they read before.
        found: what `find_scales` found.

    Returns:
        the tensors that are multiplied.
    """
    names, done = Names(model), []
    for x, nodes in _groups(model.graph, keys).items():
        ahead = found.get(str(x.name))
        if ahead is not None and all(len(_rows(node)) == len(ahead.scale) for node in nodes):
            _insert(x, nodes, ahead.scale, names)
            done.append(ahead.tensor)
    return done


def told(found: Iterable[Ahead]) -> str:
    """A sentence for the report."""
    gains = sorted(ahead.gain for ahead in found)
    return (
        f"inputs multiplied by powers of two, so that weights take their outliers: {len(gains)}; their layers lose "
        f"{gains[0]:.1f} to {gains[-1]:.1f} dB less (prepare=none leaves that out)"
    )


def _groups(graph: ir.Graph, keys: Collection[str]) -> dict[ir.Value, list[ir.Node]]:
    """The layers of `keys` by the tensor they read, where their weights are matrices of their own."""
    groups: dict[ir.Value, list[ir.Node]] = {}
    for node in graph:
        if not is_onnx(node, "MatMul", "Gemm") or node.outputs[0].name not in keys:
            continue
        x, weight = node.inputs[0], node.inputs[1]
        data = array(weight) if weight is not None and weight.is_initializer() else None
        if x is None or data is None or data.ndim != 2 or data.dtype != np.float32 or weight is None:
            continue
        if sole_use(weight) and not node.attributes.get_int("transA", 0) and np.isfinite(data).all() and data.size:
            groups.setdefault(x, []).append(node)
    return groups


def _rows(node: ir.Node) -> NDArray[Any]:
    """The weight as (inputs, outputs)."""
    data = np.asarray(array(node.inputs[1]))
    return data.T if node.attributes.get_int("transB", 0) else data


def _search(nodes: list[ir.Node], read: ChannelRange, scheme: QuantScheme) -> Smoothing:
    channels = len(read.low)
    nothing = Smoothing(None, np.zeros(channels + 1), 0.0, 0.0)
    if read.nonfinite:
        return nothing
    cautious, numbers = _cautious(read), np.arange(1, channels + 1)
    return smoothed(
        [SmoothedLayer(_rows(node).astype(np.float64), cautious, numbers) for node in nodes],
        channels + 1,
        Grid.of(scheme.activation, symmetric=scheme.symmetric_activation),
        Grid.of(scheme.weight, symmetric=True),
        per_channel=scheme.per_channel,
        limit=LIMIT,
        whole=True,
    )


def _cautious(read: ChannelRange) -> ChannelRange:
    """The same with no channel smaller than the quantile `COMMON` of all."""
    least = np.quantile(read.magnitude, COMMON)
    small, upwards = read.magnitude < least, read.high >= -read.low
    found = copy(read)
    found.high = np.where(small & upwards, least, read.high)
    found.low = np.where(small & ~upwards, -least, read.low)
    return found


def _insert(x: ir.Value, nodes: list[ir.Node], scale: NDArray[np.float64], names: Names) -> None:
    graph = nodes[0].graph
    assert isinstance(graph, ir.Graph)
    factor = new_initializer(graph, names.fresh(f"{x.name}_smoothing"), 1 / scale, ir.DataType.FLOAT)
    scaled = ir.Value(name=names.fresh(f"{x.name}_smoothed"), type=ir.TensorType(ir.DataType.FLOAT), shape=x.shape)
    graph.insert_before(
        nodes[0], ir.node("Mul", [x, factor], outputs=[scaled], name=names.fresh(f"{x.name}_smoothing_Mul"))
    )
    for node in nodes:
        weight = node.inputs[1]
        assert weight is not None
        rows = (_rows(node) * scale[:, None]).astype(np.float32)
        data = np.ascontiguousarray(rows.T if node.attributes.get_int("transB", 0) else rows)
        weight.const_value = ir.Tensor(data, name=weight.name)
        node.replace_input_with(0, scaled)
