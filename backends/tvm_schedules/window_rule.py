"""The schedule of windows (`windows.py`): a tile of results in registers, and what is fused behind computed on it.

    for n, block groups, row groups, column groups:          (parallel where it is worth it)
        sums = 0                                              blocks x rows x columns vectors, in registers
        for chunks of channels, window rows, window columns, channels:
            for blocks, rows, columns of the tile:            unrolled
                sums += broadcast(x) * w                      vector
        for blocks, rows, columns of the tile:                unrolled
            y = bias, sum, activation, .. of sums             vector

Weights of a block are read once for every tile and stay in a cache; a tile of 8 or more sums hides the latency of
multiply-adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from tvm import s_tir, tirx

from graphopt.backends.tvm_schedules.machine import PARALLEL_ELEMENTS, PARALLEL_SUMS, Machine
from graphopt.backends.tvm_schedules.stages import constant
from graphopt.backends.tvm_schedules.windows import TILE

# Steps of a window that are written out, so that neighbouring columns share what they load.
_WRITTEN_OUT = 160


def window_rule(function: tirx.PrimFunc, machine: Machine) -> s_tir.Schedule | None:
    """Schedule a function with one window in it; None for any other."""
    schedule = s_tir.Schedule(function)
    blocks = schedule.get_child_blocks(schedule.get_sblock("root"))
    windows = [block for block in blocks if TILE in schedule.get(block).annotations]
    if len(windows) != 1:
        return None
    window = windows[0]
    tile = [int(size) for size in schedule.get(window).annotations[TILE]]
    schedule.unannotate(window, TILE)
    inputs = [block for block in schedule.get_producers(window) if _name(schedule, block) == "padded"]
    result = _fused_behind(schedule, blocks, window, inputs)

    parallel = machine.cores > 1 and _steps(schedule, schedule.get_loops(window)) >= PARALLEL_SUMS
    outer, inner, reduction = _tiled(schedule, window, tile)
    schedule.reorder(*outer, *reduction, *inner)
    schedule.set_scope(window, 0, "local")
    schedule.reverse_compute_at(result, outer[-1], preserve_unit_loops=True)
    for block in inputs:
        _copy(schedule, block, machine)
    _unrolled(schedule, schedule.get_loops(result)[len(outer) :])
    _unrolled(schedule, inner)
    steps = tile[0] * tile[1] * tile[2]
    for loop in reversed(reduction):
        extent = schedule.get(loop).extent
        steps *= int(extent) if isinstance(extent, int | tirx.IntImm) else _WRITTEN_OUT + 1
        if steps > _WRITTEN_OUT or len(reduction) > 2:
            break
        schedule.unroll(loop)
    if parallel:
        schedule.parallel(schedule.fuse(*outer[:3]))
    start = schedule.decompose_reduction(window, reduction[0])
    _unrolled(schedule, schedule.get_loops(start)[-4:])
    return schedule


def _name(schedule: s_tir.Schedule, block: Any) -> str:
    return str(schedule.get(block).name_hint)


def _fused_behind(schedule: s_tir.Schedule, blocks: Sequence[Any], window: Any, inputs: Sequence[Any]) -> Any:
    """Bring all but the window and its input into one block behind the window: the one that writes the output."""
    kept = {_name(schedule, block) for block in (window, *inputs)}
    behind = [block for block in blocks if _name(schedule, block) not in kept]
    if not behind:
        return schedule.cache_write(window, 0, "global")
    for block in behind[:-1]:
        schedule.compute_inline(block)
    return behind[-1]


def _tiled(schedule: s_tir.Schedule, window: Any, tile: Sequence[int]) -> tuple[list[Any], list[Any], list[Any]]:
    """The loops of the window: over tiles, within a tile (the last one a vector), over what is summed."""
    image, block, row, column, lane, *reduction = schedule.get_loops(window)
    splits = [schedule.split(loop, [None, size]) for loop, size in zip((block, row, column), tile, strict=True)]
    return [image, *(s[0] for s in splits)], [*(s[1] for s in splits), lane], reduction


def _unrolled(schedule: s_tir.Schedule, loops: Sequence[Any]) -> None:
    for loop in loops[:-1]:
        schedule.unroll(loop)
    schedule.vectorize(loops[-1])


def _copy(schedule: s_tir.Schedule, block: Any, machine: Machine) -> None:
    """The padded copy of the input: whole vectors where channels are in blocks."""
    loops = schedule.get_loops(block)
    if len(loops) == 5:
        schedule.vectorize(loops[-1])
    if machine.cores > 1 and _steps(schedule, loops) >= PARALLEL_ELEMENTS:
        schedule.parallel(schedule.fuse(*loops[:3]))


def _steps(schedule: s_tir.Schedule, loops: Sequence[Any]) -> float:
    """How often the body of nested loops runs; without end where a size is open."""
    sizes = [constant(schedule.get(loop).extent) for loop in loops]
    return prod(float("inf") if size is None else size for size in sizes)
