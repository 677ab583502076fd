"""Kernels that the importer writes itself (Clip, Pad along space, reversals, ..), over tensors in blocks.

Such a kernel is one formula for its elements, and where each channel of the result is made of the same channel of its
operands, the formula holds for blocks: (image, channel, ..) becomes (image, block, .., lane) in it, all else stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tvm_ffi
from tvm import ir, te, tirx

from graphopt.backends.tvm_schedules.blocks import Blocking
from graphopt.backends.tvm_schedules.stages import NotStagesError, Stage, is_const, loads, parse, substitute, variables

Formula = Callable[..., te.Tensor]


def channelwise(
    function: tirx.PrimFunc, shapes: Sequence[Sequence[Any]], result: Sequence[Any], blocking: Blocking
) -> tuple[Formula, list[bool]] | None:
    """The kernel over blocks, and which of its operands it takes in blocks; None where it mixes channels.

    Args:
        function: the kernel; its last parameter is the result.
        shapes: of the operands, as the caller knows them.
        result: shape of the result.
        blocking: of the result's channels.
    """
    try:
        program = parse(function)
    except NotStagesError:
        return None
    if len(program.stages) != 1 or program.stages[0].reduced or len(result) not in (3, 4) or blocking.channels == 1:
        return None
    stage = program.stages[0]
    *operands, written = function.params
    if stage.buffer != written or not all(isinstance(p.ty, tirx.BufferType) for p in operands):
        return None
    in_blocks = [_by_channel(stage, operand) for operand in operands]
    others = [
        not in_block and _reads_channel(stage, operand) for in_block, operand in zip(in_blocks, operands, strict=True)
    ]
    if not any(in_blocks) or any(others) or _channel_elsewhere(stage):
        return None
    sizes = {
        declared: known
        for operand, shape in zip(operands, shapes, strict=True)
        for declared, known in zip(operand.ty.shape, shape, strict=True)
        if isinstance(declared, tirx.Var)
    }
    value = substitute(stage.value, sizes)
    height = result[2] if len(result) == 4 else 1

    def compute(*tensors: te.Tensor) -> te.Tensor:
        given = dict(zip(operands, zip(tensors, in_blocks, strict=True), strict=True))

        def element(image: Any, block: Any, y: Any, x: Any, lane: Any) -> Any:
            def read(load: Any) -> Any:
                tensor, blocked = given[load.source]
                if not blocked:
                    return tensor(*load.indices)
                first, _, *at = _along(load, stage)
                return tensor(first, block, *([0] if len(at) == 1 else []), *at, lane)

            axes = [image, None, y, x] if len(result) == 4 else [image, None, x]
            new = {axis: at for axis, at in zip(stage.axes, axes, strict=True) if at is not None}
            return substitute(tvm_ffi.structural_map(value, (ir.expr.TensorLoad, read)), new)

        shape = (result[0], blocking.blocks, height, result[-1], blocking.block)
        wide = [tirx.const(size, "int64") if isinstance(size, int) else size for size in shape]  # as indices in kernels
        return te.compute(wide, element, name="formula")

    return compute, in_blocks


def _along(load: Any, stage: Stage) -> list[Any]:
    """The indices of a read, with axes of one element named as the result's: FuseOps then sees what is elementwise."""
    pairs = zip(load.indices, load.source.ty.shape, stage.axes, stage.extents, strict=True)
    return [axis if is_const(size, 1) and is_const(extent, 1) else index for index, size, axis, extent in pairs]


def _by_channel(stage: Stage, operand: Any) -> bool:
    """Whether every read of the operand is at the channel of the result, which stands in no other index."""
    reads = [load for load in loads(stage.value) if load.source == operand]
    channel = stage.axes[1]
    return bool(reads) and all(
        len(load.indices) == len(stage.axes)
        and load.indices[1] == channel
        and not any(channel in variables(index) for i, index in enumerate(load.indices) if i != 1)
        for load in reads
    )


def _reads_channel(stage: Stage, operand: Any) -> bool:
    reads = [load for load in loads(stage.value) if load.source == operand]
    return any(stage.axes[1] in variables(index) for load in reads for index in load.indices)


def _channel_elsewhere(stage: Stage) -> bool:
    """Whether the formula asks for the channel outside its reads, in a condition perhaps."""
    without = tvm_ffi.structural_map(stage.value, (ir.expr.TensorLoad, lambda load: tirx.const(0, str(load.ty.dtype))))
    return stage.axes[1] in variables(without)
