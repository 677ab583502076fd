"""How each operator is computed over tensors in blocks: one rule an operator, by its name in Relax.

A rule gets the graph that is being rewritten and the call, and gives the result in blocks, or None where the operator
in this form has none (an element type, a layout, a mode without a kernel): then it stays what it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from tvm import relax, tirx, topi
from tvm.ir import GenericConst

from graphopt.backends.tvm_schedules.blocked_formulas import channelwise
from graphopt.backends.tvm_schedules.blocks import Blocked, Blocking, known, sizes_of
from graphopt.backends.tvm_schedules.machine import Machine
from graphopt.backends.tvm_schedules.transposed import Axis, interleaved, phase_weights, window_of
from graphopt.backends.tvm_schedules.windows import Groups, Window, chunk_of, convolution, pooling

# FuseOps adds elementwise operators to kernels of this pattern.
_FUSES_BEHIND = {"op_pattern": 4}


class Graph(Protocol):
    """What rules ask of the graph that is being rewritten (`blocked_graph.py`)."""

    machine: Machine

    def emit(self, expr: relax.Expr) -> relax.Var: ...  # noqa: D102
    def call_te(self, function: Any, *args: Any, **options: Any) -> relax.Expr: ...  # noqa: D102
    def block(self, channels: int) -> int: ...  # noqa: D102
    def kernel(self, name: Any) -> tirx.PrimFunc: ...  # noqa: D102
    def in_blocks(self, expr: relax.Expr) -> Blocked | None: ...  # noqa: D102
    def packed(self, expr: relax.Expr) -> Blocked: ...  # noqa: D102
    def visit_expr(self, expr: relax.Expr) -> relax.Expr: ...  # noqa: D102


Conversion = Callable[[Graph, relax.Call], Blocked | None]


def converted(graph: Graph, call: relax.Call) -> Blocked | None:
    """The result of `call` in blocks, bound in the graph; None where it stays as it is."""
    rule = RULES.get(str(getattr(call.op, "name", "")))
    sizes = sizes_of(call)
    if rule is None or len(sizes) < 2 or not isinstance(sizes[1], int) or str(call.ty.dtype) != "float32":
        return None
    return rule(graph, call)


def _convolution(graph: Graph, call: relax.Call) -> Blocked | None:
    data, values = call.args[0], _weights(call)
    if values is None:
        return None
    channels = sizes_of(call)[1]
    groups = Groups(int(call.attrs.groups), sizes_of(data)[1], Blocking(channels, graph.block(channels)))
    window = _window(call.attrs, values.shape[2:])
    return Blocked(_convolved(graph, data, values, window, groups), groups.outputs, data.ty.ndim)


def _weights(call: relax.Call) -> np.ndarray | None:
    """The weights of a convolution over two axes; None where they are computed, or not in ONNX's layout."""
    weights = call.args[1]
    if not isinstance(weights, GenericConst) or not _plain_layout(call, "kernel_layout"):
        return None
    values: np.ndarray = weights.value.numpy()
    return values[:, :, None] if values.ndim == 3 else values


def _convolved(graph: Graph, data: relax.Expr, values: np.ndarray, window: Window, groups: Groups) -> relax.Var:
    source = graph.packed(data) if groups.depthwise else graph.in_blocks(data)
    if source is not None:
        blocking, operand = source.blocking, source.expr
    else:
        blocking, operand = None, graph.visit_expr(data)
        if data.ty.ndim == 3:
            operand = graph.emit(relax.op.expand_dims(operand, 2))
    packed = relax.const(groups.pack_weights(values, chunk_of(groups, blocking)))
    compute = convolution(window, groups, blocking, graph.machine)
    result = graph.call_te(compute, operand, packed, primfunc_name_hint="conv", primfunc_attrs=_FUSES_BEHIND)
    return graph.emit(result)


def _transposed(graph: Graph, call: relax.Call) -> Blocked | None:
    data, values = call.args[0], _weights(call)
    if values is None:
        return None
    channels = sizes_of(call)[1]
    window = _window(call.attrs, values.shape[2:])
    rows, columns = (
        Axis((kernel - 1) * dilation + 1, stride, padding, size, source)
        for kernel, dilation, stride, padding, size, source in zip(
            window.kernel,
            window.dilation,
            window.strides,
            window.padding[:2],
            _spatial(call),
            _spatial(data),
            strict=True,
        )
    )
    outputs = Blocking(channels, graph.block(channels))
    groups = Groups(int(call.attrs.groups), sizes_of(data)[1], outputs, rows.stride * columns.stride)
    phases = phase_weights(values, groups.groups, window.dilation, rows, columns)
    result = _convolved(graph, data, phases, window_of(rows, columns), groups)
    if groups.phases > 1:
        result = graph.emit(graph.call_te(interleaved(outputs.blocks, rows, columns), result, primfunc_name_hint="lay"))
    return Blocked(result, outputs, data.ty.ndim)


def _prelu(graph: Graph, call: relax.Call) -> Blocked | None:
    source = graph.in_blocks(call.args[0])
    slope = call.args[1]
    if source is None or source.rank < 3 or int(call.attrs.axis) != 1 or not isinstance(slope, GenericConst):
        return None
    values = slope.value.numpy().reshape(1, -1, 1, 1)
    wide = np.broadcast_to(values, (1, source.blocking.channels, 1, 1))
    zero = relax.const(np.zeros((), values.dtype))
    below = graph.emit(relax.op.minimum(source.expr, zero))
    scaled = graph.emit(relax.op.multiply(below, relax.const(source.blocking.pack_array(wide, 1))))
    above = graph.emit(relax.op.maximum(source.expr, zero))
    return Blocked(graph.emit(relax.op.add(above, scaled)), source.blocking, source.rank)


def _pooling(kind: str) -> Conversion:
    def rule(graph: Graph, call: relax.Call) -> Blocked | None:
        if not _plain_layout(call):
            return None
        source, attrs = graph.packed(call.args[0]), call.attrs
        window = _window(attrs, [int(size) for size in attrs.pool_size])
        if attrs.ceil_mode:
            height, width = _spatial(call)
            if kind == "avg" and attrs.count_include_pad:
                return None  # counts padding, but not what rounding up adds to it
            window = window.reaching(_spatial(call.args[0]), (height, width))
        compute = pooling(window, source.blocking, kind, bool(attrs.count_include_pad), graph.machine)
        result = graph.call_te(compute, source.expr, primfunc_name_hint=f"{kind}_pool", primfunc_attrs=_FUSES_BEHIND)
        return Blocked(graph.emit(result), source.blocking, source.rank)

    return rule


def _mean(graph: Graph, call: relax.Call) -> Blocked | None:
    source = graph.in_blocks(call.args[0])
    if source is None or call.attrs.axis is None:
        return None
    rank = source.rank
    axes = sorted(int(axis) % rank for axis in call.attrs.axis)
    if axes != list(range(2, rank)):
        return None
    return _whole_image(graph, source, rank if call.attrs.keepdims else 2)


def _global_average(graph: Graph, call: relax.Call) -> Blocked | None:
    source = graph.in_blocks(call.args[0])
    size = call.attrs.output_size
    if source is None or size is None or any(int(s) != 1 for s in size) or not _plain_layout(call):
        return None
    return _whole_image(graph, source, source.rank)


def _whole_image(graph: Graph, source: Blocked, rank: int) -> Blocked:
    height, width = (known(size) for size in source.expr.ty.shape.values[2:4])
    window = Window((height, width), (1, 1), (1, 1), (0, 0, 0, 0))
    compute = pooling(window, source.blocking, "avg", True, graph.machine)
    result = graph.call_te(compute, source.expr, primfunc_name_hint="global_avg", primfunc_attrs=_FUSES_BEHIND)
    return Blocked(graph.emit(result), source.blocking, rank)


def _elementwise(graph: Graph, call: relax.Call) -> Blocked | None:
    source = graph.in_blocks(call.args[0])
    if source is None or source.rank < 3:
        return None
    result = relax.Call(call.op, [source.expr, *call.args[1:]], call.attrs)
    return Blocked(graph.emit(result), source.blocking, source.rank)


def _broadcast(graph: Graph, call: relax.Call) -> Blocked | None:
    sizes, rank = sizes_of(call), len(sizes_of(call))
    if rank not in (3, 4):
        return None
    present = [graph.in_blocks(arg) for arg in call.args]
    leading = next(
        (p for p, arg in zip(present, call.args, strict=True) if p is not None and _same(sizes_of(arg), sizes)), None
    )
    if leading is None:
        return None
    operands = [_operand(graph, arg, leading.blocking, rank) for arg in call.args]
    if any(operand is None for operand in operands):
        return None
    return Blocked(graph.emit(relax.Call(call.op, operands, call.attrs)), leading.blocking, rank)


def _operand(graph: Graph, expr: relax.Expr, blocking: Blocking, rank: int) -> relax.Expr | None:
    """An operand of an elementwise operator so that it broadcasts over blocks."""
    sizes = sizes_of(expr)
    if expr.ty.ndim != len(sizes) or expr.ty.ndim > rank:
        return None
    present = graph.in_blocks(expr)
    if present is not None and present.rank == rank and present.blocking == blocking:
        return present.expr
    full = [1] * (rank - len(sizes)) + sizes
    in_four = full if rank == 4 else [*full[:2], 1, full[2]]
    if isinstance(expr, GenericConst):
        values = expr.value.numpy().reshape(in_four)
        in_five = values[..., None] if in_four[1] == 1 else blocking.pack_array(values, 1)
        return relax.const(np.ascontiguousarray(in_five))
    if in_four[1] == 1:
        return graph.emit(relax.op.reshape(graph.visit_expr(expr), [*in_four, 1]))
    if len(sizes) != rank or in_four[1] != blocking.channels:
        return None
    packed = graph.packed(expr)
    return packed.expr if packed.blocking == blocking else None


def _kernel(graph: Graph, call: relax.Call) -> Blocked | None:
    operands = list(call.args[1].fields) if isinstance(call.args[1], relax.Tuple) else []
    present = [graph.in_blocks(operand) for operand in operands]
    sizes = sizes_of(call)
    if len(call.args) > 2 or not any(present):
        return None
    blocking = Blocking(sizes[1], graph.block(sizes[1]))
    formula = channelwise(graph.kernel(call.args[0]), [sizes_of(o) for o in operands], sizes, blocking)
    if formula is None:
        return None
    compute, in_blocks = formula
    arguments = [
        graph.packed(operand).expr if blocked else graph.visit_expr(operand)
        for operand, blocked in zip(operands, in_blocks, strict=True)
    ]
    name = str(call.args[0].name_hint)
    return Blocked(graph.emit(graph.call_te(compute, *arguments, primfunc_name_hint=name)), blocking, len(sizes))


def _strided_slice(graph: Graph, call: relax.Call) -> Blocked | None:
    source = graph.in_blocks(call.args[0])
    if source is None or source.rank != 4:
        return None
    axes = [int(known(axis)) % 4 for axis in call.args[1]]
    if 1 in axes:
        return None
    result = relax.Call(call.op, [source.expr, *call.args[1:]], call.attrs)
    return Blocked(graph.emit(result), source.blocking, 4)


def _concat(graph: Graph, call: relax.Call) -> Blocked | None:
    fields = call.args[0].fields if isinstance(call.args[0], relax.Tuple) else []
    parts = [graph.in_blocks(field) for field in fields]
    rank = len(sizes_of(call))
    if not parts or any(part is None or part.rank != rank for part in parts) or rank not in (3, 4):
        return None
    channels = sizes_of(call)[1]
    blocking = Blocking(channels, graph.block(channels))
    axis = int(call.attrs.axis) % rank
    present = [part for part in parts if part is not None]
    if any(part.blocking.block != blocking.block for part in present):
        return None
    if axis == 1 and any(part.blocking.channels % blocking.block for part in present[:-1]):
        return None
    in_five = axis + 1 if rank == 3 and axis == 2 else axis
    result = relax.op.concat([part.expr for part in present], in_five)
    return Blocked(graph.emit(result), blocking, rank)


def _resize(graph: Graph, call: relax.Call) -> Blocked | None:
    source = graph.in_blocks(call.args[0])
    if source is None or not _plain_layout(call, "layout"):
        return None
    attrs = call.attrs

    def compute(data: Any, size: Any) -> Any:
        return topi.image.resize2d(
            data, attrs.roi, size, f"NCHW{source.blocking.block}c", attrs.method, attrs.coordinate_transformation_mode,
            attrs.rounding_method, attrs.cubic_alpha, attrs.cubic_exclude, attrs.extrapolation_value,
        )  # fmt: skip

    result = graph.call_te(compute, source.expr, call.args[1], primfunc_name_hint="resize")
    return Blocked(graph.emit(result), source.blocking, 4)


def _window(attrs: Any, kernel: Any) -> Window:
    """The window of a convolution or of pooling over one or two axes."""

    def pair(values: Any) -> tuple[int, int]:
        return (1, int(values[0])) if len(values) == 1 else (int(values[0]), int(values[1]))

    padding = [int(p) for p in attrs.padding]
    if len(padding) == 2:
        padding = [0, padding[0], 0, padding[1]]
    top, left, bottom, right = padding
    return Window(pair(kernel), pair(attrs.strides), pair(attrs.dilation), (top, left, bottom, right))


def _spatial(expr: relax.Expr) -> tuple[Any, Any]:
    height, width = [1, *sizes_of(expr)[2:]][-2:]
    return height, width


def _plain_layout(call: relax.Call, *more: str) -> bool:
    """Whether an operator has the layout of ONNX, channels before space."""
    names = {"data_layout", "out_layout", "layout", *more}
    layouts = [str(getattr(call.attrs, name)) for name in names if getattr(call.attrs, name, None)]
    return all(layout in ("NCHW", "NCW", "OIHW", "OIW", "IOHW", "IOW") for layout in layouts)


def _same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(
        x == y if isinstance(x, int) and isinstance(y, int) else str(x) == str(y) for x, y in zip(a, b, strict=True)
    )


_UNARY = (
    "abs", "ceil", "clip", "cos", "erf", "exp", "floor", "log", "negative", "round", "rsqrt", "sigmoid", "sign", "sin",
    "sqrt", "square", "tanh", "nn.gelu", "nn.gelu_tanh", "nn.leakyrelu", "nn.relu", "nn.silu", "nn.softplus",
)  # fmt: skip
_BINARY = ("add", "subtract", "multiply", "divide", "maximum", "minimum", "power")

RULES: dict[str, Conversion] = {
    "relax.call_tir": _kernel,
    "relax.nn.conv1d": _convolution,
    "relax.nn.conv2d": _convolution,
    "relax.nn.conv1d_transpose": _transposed,
    "relax.nn.conv2d_transpose": _transposed,
    "relax.nn.prelu": _prelu,
    "relax.nn.max_pool1d": _pooling("max"),
    "relax.nn.max_pool2d": _pooling("max"),
    "relax.nn.avg_pool1d": _pooling("avg"),
    "relax.nn.avg_pool2d": _pooling("avg"),
    "relax.nn.adaptive_avg_pool1d": _global_average,
    "relax.nn.adaptive_avg_pool2d": _global_average,
    "relax.mean": _mean,
    "relax.concat": _concat,
    "relax.strided_slice": _strided_slice,
    "relax.image.resize2d": _resize,
    **{f"relax.{name}": _elementwise for name in _UNARY},
    **{f"relax.{name}": _broadcast for name in _BINARY},
}
"""Operator -> rule."""
