"""Where Transposes of one permutation stand best: a minimum cut.

Every operator that can work on permuted tensors (`graphopt.rewriting.permuted`) is free to do so; all others are not. A
tensor whose maker and readers do not agree costs one Transpose. For a permutation p,

    y = Transpose_p(x)             offers y permuted for nothing: its maker counts as permuted
    z = Transpose_p^-1(t)          takes t permuted for nothing: it counts as a permuted reader
    any other Transpose            takes and offers both, because it can be changed to do so

A Transpose whose input and output both lie in the region has one of these roles; the tensor on its other side counts it
as plain, which never promises too much.

The assignment with the fewest Transposes is the minimum cut between the fixed permuted and the fixed plain ones; of
several the one that changes least is the one nearest to the former. Source: Kolmogorov, Zabih 2004, for energies of
binary labels as cuts; a tensor is a hyperedge that is paid once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from graphopt.rewriting.edit import Usage
from graphopt.rewriting.layout import permutation
from graphopt.rewriting.nodes import is_onnx
from graphopt.rewriting.permuted import moving_inputs, permutable

PERMUTED, PLAIN = 0, 1
"""The two terminals of the cut."""
_INFINITE = 1 << 20


@dataclass
class Region:
    """Operators that are connected by tensors and can work permuted, with the tensors at and between them.

    Attributes:
        perm: the permutation.
        tensors: members of every tensor: indices of operators, offset by 2, and the terminals.
        operators: the operators, in the order they were reached.
        takers: self-inverse Transposes that count as readers.
        makers: Transposes that count as makers.
    """

    perm: tuple[int, ...]
    operators: dict[ir.Node, int] = field(default_factory=dict)
    takers: set[ir.Node] = field(default_factory=set)
    makers: set[ir.Node] = field(default_factory=set)
    tensors: dict[ir.Value, set[int]] = field(default_factory=dict)


def region(start: ir.Node, perm: tuple[int, ...], opset: int) -> Region:
    """Everything that a Transpose with this permutation could move through, forwards and backwards."""
    found = Region(perm, makers={start})
    pending = list(start.outputs)
    while pending:
        value = pending.pop()
        if value in found.tensors:
            continue
        members, reached = _members(value, found, opset)
        found.tensors[value] = members
        for node in reached:
            pending += [v for k in moving_inputs(node) if (v := node.inputs[k]) is not None]
            pending += [output for output in node.outputs if output.name]
    return found


def _members(value: ir.Value, found: Region, opset: int) -> tuple[set[int], list[ir.Node]]:
    members: set[int] = set()
    reached: list[ir.Node] = []
    inverse = tuple(int(k) for k in np.argsort(found.perm))

    def add(node: ir.Node) -> bool:
        if node not in found.operators:
            if not permutable(node, len(found.perm), opset):
                return False
            found.operators[node] = len(found.operators) + 2
            reached.append(node)
        members.add(found.operators[node])
        return True

    maker = value.producer()
    graph = maker.graph if maker is not None else value.graph
    made = _permutation(maker)
    if made == found.perm and maker is not None and maker not in found.takers:
        found.makers.add(maker)
        members.add(PERMUTED)
    elif made in (found.perm, inverse) or ((made is None or len(made) != len(inverse)) and not (maker and add(maker))):
        members.add(PLAIN)
    if value.is_graph_output():
        members.add(PLAIN)
    for use in value.uses():
        taken = _permutation(use.node)
        if use.node.graph is not graph or use.node.graph is None:
            members.add(PLAIN)
        elif taken == inverse and use.node not in found.makers:
            found.takers.add(use.node)
            members.add(PERMUTED)
        elif taken in (inverse, found.perm) or (taken is None and not (_moves(use) and add(use.node))):
            members.add(PLAIN)
    return members, reached


def _moves(use: Usage) -> bool:
    return use.idx in moving_inputs(use.node)


def _permutation(node: ir.Node | None) -> tuple[int, ...] | None:
    if node is None or not is_onnx(node, "Transpose") or any(a.is_ref() for a in node.attributes.values()):
        return None
    perm = permutation(node)
    return None if perm is None else tuple(perm)


def best(found: Region) -> tuple[set[ir.Node], int]:
    """The operators that should work permuted, and how many Transposes that saves (0: none, and no operators)."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import breadth_first_order, maximum_flow

    now = sum(PERMUTED in members and len(members) > 1 for members in found.tensors.values())
    edges: dict[tuple[int, int], int] = {}
    size = 2 + len(found.operators)
    for members in found.tensors.values():
        if len(members) < 2:
            continue
        one, other = size, size + 1
        size += 2
        edges[one, other] = 1
        for member in members:
            edges[member, one] = edges[other, member] = _INFINITE
    # A region is connected: one Transpose stays as long as anything in it has to be plain.
    if not now or not edges or (now == 1 and any(PLAIN in members for members in found.tensors.values())):
        return set(), 0
    rows, columns = zip(*edges, strict=True)
    capacity = csr_array((np.array(list(edges.values()), dtype=np.int32), (rows, columns)), shape=(size, size))
    flow = maximum_flow(capacity, PERMUTED, PLAIN)
    saved = now - int(flow.flow_value)
    if saved <= 0:
        return set(), 0
    rest = csr_array(capacity - flow.flow)
    rest.data[rest.data < 0] = 0
    rest.eliminate_zeros()
    reached = set(breadth_first_order(rest, PERMUTED, return_predecessors=False).tolist())
    return {node for node, index in found.operators.items() if index in reached}, saved


def elements(value: ir.Value) -> int:
    """How many elements a tensor has, symbolic dimensions counted as one."""
    return int(np.prod([d for d in value.shape or () if isinstance(d, int)], dtype=np.int64))


def composed(first: Sequence[int], second: Sequence[int]) -> list[int]:
    """The permutation of Transpose_second after Transpose_first."""
    return [first[k] for k in second]


def needed(found: Region, chosen: set[ir.Node]) -> Mapping[str, int]:
    """Elements that the Transposes of this permutation move now and with `chosen` permuted, to be compared."""
    labels: dict[int, bool] = {PERMUTED: True, PLAIN: False}
    labels.update({index: node in chosen for node, index in found.operators.items()})
    moved: dict[str, int] = defaultdict(int)
    for value, members in found.tensors.items():
        if PERMUTED in members and len(members) > 1:
            moved["now"] += elements(value)
        if len({labels[m] for m in members}) > 1:
            moved["then"] += elements(value)
    return moved
