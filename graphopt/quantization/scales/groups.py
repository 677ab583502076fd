"""Channels along which positive scales commute: x / s behind what writes x, w s in what reads it, and nothing changes.

Every tensor carries labels of scales, one integer a position, with size 1 along axes on which they do not vary; label 0
is the scale that is always one. One walk over the graph states what each operator demands, as equations between labels
(`graphopt.analysis.labels`): a sum has one scale on all operands, movement carries labels along, a layer takes the
labels of its input into its weight and gives out new ones, and whatever is not positively homogeneous freezes what it
reads. The solved labels are the scales; constants on the way, biases and addends, are divided with what they are added
to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.analysis.labels import Solution
from graphopt.numerics.equalization import Classes
from graphopt.quantization.scales import rules
from graphopt.quantization.scales.homogeneity import refusal
from graphopt.quantization.scales.operators import HANDLERS, WRITERS, norm
from graphopt.quantization.scales.walk import ScaledOperand, ScaleWalk
from graphopt.rewriting.nodes import is_onnx, label
from graphopt.rewriting.scopes import bodies


@dataclass(frozen=True)
class ScaleGroups:
    """All scales of a graph.

    Attributes:
        operands: what they stand on, in the order of the graph; scales are numbered from 1.
        groups: the scales that belong together: those of the channels of one tensor.
        frozen: layer -> why channels that it writes keep their scale.
    """

    operands: tuple[ScaledOperand, ...]
    groups: tuple[Classes, ...]
    frozen: dict[str, str]


def scale_groups(graph: ir.Graph) -> ScaleGroups:
    """Find the scales of a graph; shapes must have been inferred, and nothing is changed."""
    walk = ScaleWalk()
    for node in graph:
        _visit(walk, node)
    for output in graph.outputs:
        walk.freeze(output, f"output '{output.name}' of the graph")
    walk.tie_shared()
    solution = walk.table.solve()
    numbers = solution.monomials.max(axis=1)
    solved = [ScaledOperand(o.node, o.index, numbers[o.divide], numbers[o.multiply], o.weight) for o in walk.operands]
    operands = tuple(o for o in solved if o.divide.any() or o.multiply.any())
    return ScaleGroups(operands, _groups(operands), _frozen(walk, solution))


def _visit(walk: ScaleWalk, node: ir.Node) -> None:
    for body in bodies(node):
        for inner in body.all_nodes():
            walk.freeze_inputs(inner, f"{node.op_type} '{label(node)}' reads it in a body")
    reads = [i for i, v in enumerate(node.inputs) if v is not None and v in walk.labels]
    channels = rules.NORMS.get(("" if node.domain == "ai.onnx" else node.domain, node.op_type))
    reason = None
    if channels is not None:
        reason = "takes the scales of all channels away together"
        norm(walk, node, *channels)
    elif not is_onnx(node, *HANDLERS):
        reason = "is not positively homogeneous"
    elif reads or node.op_type in WRITERS:
        reason = refusal(node)
        if reason is None and any(walk.sizes.of(v) is None for v in (*node.inputs, *node.outputs) if v is not None):
            reason = "has operands of unknown rank"
        if reason is None and not HANDLERS[node.op_type](walk, node, reads):
            reason = "mixes channels in a way that is not followed"
    if reason is not None:
        walk.freeze_inputs(node, f"{node.op_type} '{label(node)}' {reason}")


def _frozen(walk: ScaleWalk, solution: Solution) -> dict[str, str]:
    """Layers whose channels keep their scale, all or some, with up to two reasons."""
    found = {}
    for node, written in walk.written:
        stuck = ~solution.monomials[written].any(axis=1)
        if stuck.any():
            part = "" if stuck.all() else f"{int(stuck.sum())} of {written.size} channels: "
            found[label(node)] = part + "; ".join(solution.why((written,))[:2])
    return found


def _groups(operands: Sequence[ScaledOperand]) -> tuple[Classes, ...]:
    """Scales that stand on one side of a weight belong together."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    both = [side for o in operands if o.weight for side in (o.divide, o.multiply)]
    sides: list[Classes] = [np.unique(side[side != 0]) for side in both]
    pairs = [np.stack([side[:-1], side[1:]]) for side in sides if len(side) > 1]
    count = 1 + max((int(side.max()) for side in sides if len(side)), default=0)
    edges = np.concatenate([np.zeros((2, 0), np.int64), *pairs], axis=1)
    graph = coo_array((np.ones(edges.shape[1], np.int8), tuple(edges)), shape=(count, count))
    _, component = connected_components(graph, directed=False)
    used = np.unique(np.concatenate([np.zeros(0, np.int64), *sides]))
    return tuple(used[component[used] == c] for c in dict.fromkeys(component[used].tolist()))
