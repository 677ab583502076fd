"""Parameters that a graph only moves around before it uses them: transposed weights, gates cut apart and joined anew.

Exporters write a linear layer as MatMul by Transpose(W), and an LSTM with the gates of its weights in another order.
Passes want the operand itself as a stored tensor. `store_moved` stores it, and remembers the moves: the same moves
carried out on numbers of positions tell which element of which parameter stands where.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis import shapes

Array = npt.NDArray[Any]
Move = Callable[..., Array]


@dataclass(frozen=True)
class Moved:
    """A stored tensor that holds elements of parameters, moved and nothing else.

    Attributes:
        move: the last move, a function of the arrays of `sources`.
        sources: names of parameters, or tensors that are moved themselves.
    """

    move: Move
    sources: tuple[Moved | str, ...]

    def parameters(self) -> Iterator[str]:
        """Names of the parameters it holds elements of."""
        for source in self.sources:
            if isinstance(source, str):
                yield source
            else:
                yield from source.parameters()

    def evaluate(self, arrays: Mapping[str, Array]) -> Array:
        """Carry out the moves on arrays of the parameters' shapes."""
        return self.move(*(arrays[s] if isinstance(s, str) else s.evaluate(arrays) for s in self.sources))


def _same(node: ir.Node, given: Sequence[Array]) -> Move | None:
    return lambda x: x


def _cast(node: ir.Node, given: Sequence[Array]) -> Move | None:
    """A cast to the type that it has already."""
    source = node.inputs[0]
    same = source is not None and source.dtype is not None and source.dtype == node.outputs[0].dtype
    return (lambda x: x) if same else None


def _transpose(node: ir.Node, given: Sequence[Array]) -> Move | None:
    order = node.attributes.get_ints("perm") or None
    return lambda x: np.transpose(x, order)


def _reshape(node: ir.Node, given: Sequence[Array]) -> Move | None:
    result = shapes.dims(node.outputs[0])
    if result is None or not all(isinstance(d, int) for d in result):
        return None
    sizes = [d for d in result if isinstance(d, int)]
    return lambda x: x.reshape(sizes)


def _slice(node: ir.Node, given: Sequence[Array]) -> Move | None:
    starts, ends = given[0].ravel(), given[1].ravel()
    axes = given[2].ravel() if len(given) > 2 else np.arange(len(starts))
    steps = given[3].ravel() if len(given) > 3 else np.ones(len(starts), np.int64)
    if (steps < 0).any():
        return None
    cuts = [(int(a), slice(int(b), int(e), int(s))) for a, b, e, s in zip(axes, starts, ends, steps, strict=True)]

    def move(x: Array) -> Array:
        whole = [slice(None)] * x.ndim
        for axis, cut in cuts:
            whole[axis] = cut
        return x[tuple(whole)]

    return move


def _concat(node: ir.Node, given: Sequence[Array]) -> Move | None:
    axis = node.attributes.get_int("axis", 0)
    return lambda *parts: np.concatenate(parts, axis)


def _gather(node: ir.Node, given: Sequence[Array]) -> Move | None:
    axis = node.attributes.get_int("axis", 0)
    return lambda x: np.take(x, given[0], axis)


_MOVES: dict[str, Callable[[ir.Node, Sequence[Array]], Move | None]] = {
    "Identity": _same,
    "Cast": _cast,
    "CastLike": _cast,
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Squeeze": _reshape,
    "Unsqueeze": _reshape,
    "Flatten": _reshape,
    "Slice": _slice,
    "Concat": _concat,
    "Gather": _gather,
}


def store_moved(model: ir.Model) -> dict[str, Moved]:
    """Replace moved parameters by stored tensors, in place.

    A tensor that holds all elements of one parameter, each once, gets the name of the parameter. A parameter that is
    also used elsewhere (tied weights) is left alone, so that nothing is stored twice. Shapes must have been inferred.

    Args:
        model: every float initializer of its main graph counts as a parameter.

    Returns:
        What was stored, by name.
    """
    graph = model.graph
    moved: dict[ir.Value, Moved] = {}
    cones: dict[ir.Value, set[ir.Node]] = {}
    for node in graph:
        found = _moved(node, moved)
        if found is not None:
            moved[node.outputs[0]] = found
            own = [cones.get(v, set()) for v in node.inputs if v is not None]
            cones[node.outputs[0]] = set.union({node}, *own)
    stored: dict[str, Moved] = {}
    for value, found in moved.items():
        readers = [use.node for use in value.uses()]
        inside = all(reader.outputs[0] in moved for reader in readers) and not value.is_graph_output()
        sources = [graph.initializers[name] for name in dict.fromkeys(found.parameters())]
        private = all(use.node in cones[value] for source in sources for use in source.uses())
        if inside or not private or value.is_graph_output() or any(s.is_graph_output() for s in sources):
            continue
        arrays = {s.name or "": _array(s) for s in sources}
        result = np.ascontiguousarray(found.evaluate(arrays))
        name = value.name or ""
        if len(sources) == 1 and _whole(found, arrays):
            name = sources[0].name or name
        _replace(graph, value, result, name, cones[value], sources)
        stored[name] = found
    return stored


def _moved(node: ir.Node, moved: Mapping[ir.Value, Moved]) -> Moved | None:
    """The node's output as moved parameters; None where it is anything else."""
    make = _MOVES.get(node.op_type) if node.domain in {"", "ai.onnx"} else None
    if make is None or len(node.outputs) != 1:
        return None
    inputs = [v for v in node.inputs if v is not None]
    data = inputs if node.op_type == "Concat" else inputs[:1]
    if not data or not all(v in moved or _is_parameter(v) for v in data):
        return None
    constants = [] if node.op_type in {"Concat", "CastLike"} else [shapes.constant(v) for v in inputs[1:]]
    given = [array for array in constants if array is not None]
    if len(given) < len(constants):
        return None
    move = make(node, given)
    return None if move is None else Moved(move, tuple(moved.get(v, v.name or "") for v in data))


def _is_parameter(value: ir.Value) -> bool:
    return value.is_initializer() and value.dtype is not None and value.dtype.is_floating_point()


def _array(value: ir.Value) -> Array:
    array = shapes.constant(value)
    assert array is not None
    return array


def numbered(shape: Sequence[int]) -> npt.NDArray[np.int64]:
    """The number of every position of a tensor, counted row by row."""
    return np.arange(math.prod(shape), dtype=np.int64).reshape(tuple(shape))


def _whole(found: Moved, arrays: Mapping[str, Array]) -> bool:
    """True where every element of the one parameter comes out once."""
    ((name, array),) = arrays.items()
    places = found.evaluate({name: numbered(array.shape)}).ravel()
    return places.size == array.size and len(np.unique(places)) == array.size


def _replace(
    graph: ir.Graph, value: ir.Value, array: Array, name: str, cone: set[ir.Node], sources: Sequence[ir.Value]
) -> None:
    uses = list(value.uses())
    before = [node for node in graph if node in cone]
    own = value.name or name
    for node in reversed(before):
        if node is value.producer():
            value.name = f"{own}_moved"
    fresh = ir.Value(name=name, const_value=ir.Tensor(array, name=name), type=value.type, shape=ir.Shape(array.shape))
    for use in uses:
        use.node.replace_input_with(use.idx, fresh)
    graph.remove([node for node in before if not any(u.node not in cone for v in node.outputs for u in v.uses())],
                 safe=True)  # fmt: skip
    for source in sources:
        del graph.initializers[source.name or ""]
    graph.register_initializer(fresh)
