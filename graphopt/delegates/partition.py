"""Cutting a graph into the parts that a delegate gets, as ONNX Runtime cuts it.

A part must be convex: no path leaves it and comes back, else neither it nor what stands between could run first. ONNX
Runtime goes through the nodes in the order of execution, breadth first, and grows one part: a node that is taken joins
it; one that is not, and reads a result of the part, waits until the part is closed. The part is closed when nothing
else is left to go on with.
Source: onnxruntime/core/providers/partitioning_utils.cc, `CreateSupportedPartitionNodeGroups`; read 2026-11.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import groupby

from graphopt.delegates.units import Unit


def partition(
    units: Sequence[Unit],
    parents: Mapping[Unit, Collection[Unit]],
    taken: Callable[[Unit], bool],
    worthless: Collection[str] = (),
) -> list[list[Unit]]:
    """The parts that are taken, each in the order of execution.

    Args:
        units: all of the graph.
        parents: what each reads.
        taken: whether the delegate takes a unit.
        worthless: operators that are no part by themselves.
    """
    children: dict[Unit, list[Unit]] = {unit: [] for unit in units}
    for unit in units:
        for parent in parents[unit]:
            children[parent].append(unit)
    waiting = {unit: len(parents[unit]) for unit in units}
    ready = deque(unit for unit in units if not waiting[unit])
    later: deque[Unit] = deque()
    parts: list[list[Unit]] = []
    part: list[Unit] = []
    border: set[Unit] = set()
    while ready or later:
        if not ready:
            if part:
                parts.append(part)
            part, border = [], set()
            ready, later = later, deque()
            continue
        unit = ready.popleft()
        if taken(unit):
            part.append(unit)
            border.discard(unit)
            border.update(children[unit])
        elif unit in border:
            later.append(unit)
            continue
        for child in children[unit]:
            waiting[child] -= 1
            if not waiting[child]:
                ready.append(child)
    if part:
        parts.append(part)
    return [found for found in parts if len(found) > 1 or found[0].op not in worthless]


def runs(units: Sequence[Unit], taken: Callable[[Unit], bool]) -> list[list[Unit]]:
    """Units that follow each other in the order of execution and are all taken, as TensorRT's parser cuts a graph.

    Source: onnx-tensorrt, ModelImporter.cpp, `supportsModel`.
    """
    return [list(group) for good, group in groupby(units, taken) if good]
