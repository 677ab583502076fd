"""Centring a residual stream, and the norms that need no mean any more.

With C = I - 11^T / n, the projection that takes the mean of the n channels away, and a stream x = sum of writers:

    every writer  w <- C w    (weights along their output axis, biases, tables)    makes    x <- C x = x - mean(x)

    LayerNorm(x) = gamma (C x) / sqrt(|C x|^2 / n + eps) + beta
                 = gamma x' / sqrt(mean(x'^2) + eps) + beta = RMSNorm(x') + beta,        x' = C x

A norm in that form can lose channels exactly, at no cost: see `graphopt.analysis.ops.layer_norm`. Where a written-out
norm subtracts the mean, the subtraction goes. `graphopt.rewriting.streams` tells which tensors can be centred.

Source: the identity is used by SliceGPT (Ashkboos et al., arXiv:2401.15024, section 3.2) for transformers; here it is
decided for any graph. LayerNormalization before opset 23 becomes the operators that runtimes fuse into one.
"""

from __future__ import annotations

import json

import numpy as np
import onnx_ir as ir

from graphopt.analysis import shapes
from graphopt.analysis.centred import centred, standard, uncast
from graphopt.rewriting.constants import Float64, constant, float64
from graphopt.rewriting.edit import drop_if_unused, new_initializer, remove_node, replace_value, sole_use
from graphopt.rewriting.names import Names
from graphopt.rewriting.nodes import FOLDED_FROM, is_onnx, label, mark_origin
from graphopt.rewriting.streams import Place, Stream, is_layer_norm, is_skip_norm

RMS_OPSET = 23
"""The first version of the standard operators with RMSNormalization."""

LAYER_NORM = "graphopt.layer_norm"
"""Key in `metadata_props` of the node that applies gamma: name, width and epsilon of the layer norm that it was of."""


def copied_bytes(stream: Stream) -> dict[str, int]:
    """Constants of a stream that others read as well, and what copies of them would add to the file."""
    found: dict[str, int] = {}
    for (value, _), readers in stream.readers.items():
        tensor = constant(value)
        if tensor is not None and (len(value.uses()) > len(readers) or value.is_graph_output()):
            found[str(value.name)] = tensor.nbytes
    return found


def centre(stream: Stream, names: Names) -> str | None:
    """Centre a stream that is not blocked and rewrite its norms.

    Returns:
        None where it was done; otherwise the reason why it cannot be, and then nothing changed.
    """
    arrays: dict[Place, Float64] = {}
    for place in stream.readers:
        array = float64(place[0])
        if array is None:
            return f"{place[0].name} is not a floating-point weight"
        arrays[place] = without_mean(array, place[1])
    places = [value for value, _ in arrays]
    if len(set(places)) < len(places):
        return f"{next(v.name for v in places if places.count(v) > 1)} would have to be centred along two axes"
    for place, array in arrays.items():
        _store(place, array, stream, names)
    for node in stream.norms:
        if is_layer_norm(node):
            _to_rms(node, names)
        else:
            _drop_subtraction(node)
    return None


def without_mean(array: Float64, axis: int) -> Float64:
    """C w along an axis; 0 for a constant that is the same for all channels (axis -1).

    What is left of equal numbers by rounding of the stored type is 0: a channel that always is the mean is dead.
    """
    if axis < 0:
        return np.zeros_like(array)
    mean = array.mean(axis=axis, keepdims=True)
    rest = array - mean
    return np.where(np.abs(rest) <= 4 * np.finfo(np.float64).eps * np.abs(mean), 0.0, rest)


def _store(place: Place, array: Float64, stream: Stream, names: Names) -> None:
    """Let the readers within the stream read the centred constant; readers elsewhere keep the old one."""
    value, readers = place[0], stream.readers[place]
    tensor = constant(value)
    assert tensor is not None  # centre checked it
    stored = array.astype(tensor.dtype.numpy())
    private = len(value.uses()) > len(readers) or value.is_graph_output() or not value.is_initializer()
    if not private:
        value.const_value = ir.Tensor(stored, dtype=tensor.dtype, name=value.name)
        return
    graph = next(iter(readers))[0].graph
    assert isinstance(graph, ir.Graph)  # streams are followed in graphs
    copy = new_initializer(graph, names.fresh(f"{value.name}_centred"), stored, tensor.dtype)
    mark_origin(copy, [str(value.name)])
    for node, index in readers:
        node.replace_input_with(index, copy)
    drop_if_unused(value)


def _drop_subtraction(node: ir.Node) -> None:
    """d = x - mean(x) of a mean-free x is x."""
    found = centred(node.outputs[0])
    source = node.inputs[0]
    assert found is not None
    assert source is not None
    means = [node.inputs[1]]
    replace_value(node.outputs[0], source)
    remove_node(node)
    while means:  # the mean, and casts of it, unless another Sub still reads it
        value = means.pop()
        producer = value.producer() if value is not None else None
        if value is None or producer is None or value.uses() or value.is_graph_output():
            continue
        means += [v for v in producer.inputs if v is not source and is_onnx(producer, "Cast", "Identity")]
        remove_node(producer)


def _to_rms(node: ir.Node, names: Names) -> None:
    """Put the RMS form of a layer norm in its place, under its name."""
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    build = _Builder(graph, node, names)
    gamma, beta = _parameter(node, 2 if is_skip_norm(node) else 1), _parameter(node, 3 if is_skip_norm(node) else 2)
    epsilon = float(node.attributes.get_float("epsilon", 1e-12 if is_skip_norm(node) else 1e-5) or 0.0)
    if is_skip_norm(node):
        result = build.skip(gamma, epsilon)
    elif graph.opset_imports.get("", 1) >= RMS_OPSET:
        result = build.single(gamma, epsilon)
    else:
        result = build.written_out(gamma, epsilon)
    old, stash = node.outputs[0], int(node.attributes.get_int("stash_type", 1) or 1)
    gain = result.producer()
    assert gain is not None
    shape = shapes.dims(old)
    if shape is not None and not is_skip_norm(node):
        gain.metadata_props[LAYER_NORM] = json.dumps([label(node), shape[-1], epsilon, stash])
        gain.meta[LAYER_NORM] = (dict(node.meta), dict(node.metadata_props))
    shift = float64(beta)
    if beta is not None and (shift is None or shift.any()):
        result = build.node("Add", [result, beta], "shifted")
    name = str(old.name)
    given_out = old.is_graph_output()
    replace_value(old, result)
    if not given_out:
        old.name, result.name = names.fresh(f"{name}_layer"), name
    remove_node(node)


def restore_layer_norms(graph: ir.Graph, names: Names) -> int:
    """Write norms that still have all their channels as LayerNormalization again, which has one operator everywhere.

    On a stream that is free of its mean both give the same. Sums with a norm in one operator stay.

    Returns:
        How many stay RMS norms, because channels of their stream are gone.
    """
    kept = 0
    for gain in list(graph):
        told = gain.metadata_props.pop(LAYER_NORM, None)
        if told is None:
            continue
        name, width, epsilon, stash = json.loads(told)
        gamma = next((v for v in gain.inputs[:2] if constant(v) is not None), None)
        source = gain.inputs[0] if is_onnx(gain, "RMSNormalization") else _normalised_by(gain, name)
        tensor = constant(gamma)
        if gamma is None or source is None or tensor is None or tensor.shape[-1] != width:
            kept += 1
            continue
        use = sole_use(gain.outputs[0])
        add = use.node if use is not None and is_onnx(use.node, "Add") and name in _origins(use.node) else None
        beta = next((v for v in add.inputs if constant(v) is not None), None) if add is not None else None
        last = add if add is not None and beta is not None else gain
        inputs = [source, gamma] if beta is None else [source, gamma, beta]
        given = {"axis": -1, "epsilon": epsilon, "stash_type": stash}
        norm = ir.node("LayerNormalization", inputs, given, name=names.fresh(name))
        graph.insert_before(last, norm)
        meta, properties = gain.meta.get(LAYER_NORM, ({}, {}))
        norm.meta.update(meta)
        norm.metadata_props.update(properties)
        old, new = last.outputs[0], norm.outputs[0]
        new.name, new.type, new.shape = names.fresh(f"{old.name}_layer"), old.type, old.shape
        given_out, wanted = old.is_graph_output(), old.name
        replace_value(old, new)
        if not given_out:
            old.name, new.name = new.name, wanted
        _remove_unread(last)
    return kept


def _origins(node: ir.Node) -> list[str]:
    return node.metadata_props.get(FOLDED_FROM, "").split(",")


def _normalised_by(gain: ir.Node, name: str) -> ir.Value | None:
    """x of gamma (x / root), as `_Builder.written_out` writes it."""
    quotient = standard(uncast(next((v for v in gain.inputs if constant(v) is None), None)), "Div")
    source = quotient.inputs[0] if quotient is not None else None
    wide = standard(source, "Cast")
    return wide.inputs[0] if wide is not None and name in _origins(wide) else source


def _remove_unread(node: ir.Node) -> None:
    """Remove a node nobody reads, and what only it read."""
    pending = [node]
    while pending:
        last = pending.pop()
        if last.graph is None or any(v.uses() or v.is_graph_output() for v in last.outputs):
            continue
        above = [v.producer() for v in last.inputs if v is not None]
        remove_node(last)
        pending += [p for p in above if p is not None]


def _parameter(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


class _Builder:
    """New nodes before a norm, named after it."""

    def __init__(self, graph: ir.Graph, norm: ir.Node, names: Names) -> None:
        self._graph, self._norm, self._names = graph, norm, names
        self._stem = label(norm)

    def node(
        self,
        op_type: str,
        inputs: list[ir.Value | None],
        part: str,
        domain: str = "",
        outputs: int = 1,
        **attributes: int | float | list[int],
    ) -> ir.Value:
        """The first result of a new node, typed as the norm's."""
        name = self._names.fresh(f"{self._stem}_{part}")
        made = ir.node(op_type, inputs, attributes, domain=domain, num_outputs=outputs, name=name)
        made.outputs[0].name = name
        made.outputs[0].type, made.outputs[0].shape = self._norm.outputs[0].type, self._norm.outputs[0].shape
        mark_origin(made, [self._stem])
        self._graph.insert_before(self._norm, made)
        return made.outputs[0]

    def number(self, value: float, part: str, dtype: ir.DataType) -> ir.Value:
        """A scalar constant."""
        return new_initializer(self._graph, self._names.fresh(f"{self._stem}_{part}"), np.asarray(value), dtype)

    def single(self, gamma: ir.Value | None, epsilon: float) -> ir.Value:
        """RMSNormalization."""
        stash = int(self._norm.attributes.get_int("stash_type", 1) or 1)
        inputs = [self._norm.inputs[0], gamma]
        return self.node("RMSNormalization", inputs, "rms", axis=-1, epsilon=epsilon, stash_type=stash)

    def skip(self, gamma: ir.Value | None, epsilon: float) -> ir.Value:
        """SkipSimplifiedLayerNormalization, which has its bias at another place."""
        norm = self._norm
        bias = _parameter(norm, 4)
        inputs = [norm.inputs[0], norm.inputs[1], gamma, *([] if bias is None else [bias])]
        count = 4 if len(norm.outputs) > 3 else 1
        result = self.node(
            "SkipSimplifiedLayerNormalization", inputs, "rms", "com.microsoft", outputs=count, epsilon=epsilon
        )
        if count == 4 and norm.outputs[3].name:
            made = result.producer()
            assert made is not None
            total, name = made.outputs[3], norm.outputs[3].name
            total.name = self._names.fresh(f"{self._stem}_sum")
            total.type, total.shape = norm.outputs[3].type, norm.outputs[3].shape
            given_out = norm.outputs[3].is_graph_output()
            replace_value(norm.outputs[3], total)
            if not given_out:
                norm.outputs[3].name, total.name = self._names.fresh(f"{name}_layer"), name
        return result

    def written_out(self, gamma: ir.Value | None, epsilon: float) -> ir.Value:
        """gamma (x / sqrt(mean(x^2) + eps)), in the form that runtimes fuse, in the precision of LayerNormalization."""
        source = self._norm.inputs[0]
        assert source is not None
        dtype = source.dtype or ir.DataType.FLOAT
        stash = ir.DataType(self._norm.attributes.get_int("stash_type", 1) or 1)
        wide = stash if dtype in {ir.DataType.FLOAT16, ir.DataType.BFLOAT16} else dtype
        x = source if wide == dtype else self._cast(source, wide, "wide")
        square = self._typed(self.node("Pow", [x, self.number(2.0, "exponent", wide)], "square"), wide)
        mean = self._typed(self._mean(square), wide, reduced=True)
        shifted = self.node("Add", [mean, self.number(epsilon, "epsilon", wide)], "shifted_mean")
        root = self._typed(self.node("Sqrt", [self._typed(shifted, wide, reduced=True)], "root"), wide, reduced=True)
        quotient = self._typed(self.node("Div", [x, root], "normal"), wide)
        if wide != dtype:
            quotient = self._cast(quotient, dtype, "narrow")
        return self.node("Mul", [quotient, gamma], "scaled")

    def _mean(self, square: ir.Value) -> ir.Value:
        if self._graph.opset_imports.get("", 1) < 18:
            return self.node("ReduceMean", [square], "mean", axes=[-1], keepdims=1)
        axes = new_initializer(
            self._graph, self._names.fresh(f"{self._stem}_axes"), np.asarray([-1]), ir.DataType.INT64
        )
        return self.node("ReduceMean", [square, axes], "mean", keepdims=1)

    def _cast(self, value: ir.Value, dtype: ir.DataType, part: str) -> ir.Value:
        return self._typed(self.node("Cast", [value], part, to=int(dtype)), dtype)

    def _typed(self, value: ir.Value, dtype: ir.DataType, *, reduced: bool = False) -> ir.Value:
        """Tell a new value's type, and that its last axis has size 1."""
        value.type = ir.TensorType(dtype)
        if reduced and value.shape is not None:
            value.shape = ir.Shape([*list(value.shape)[:-1], 1])
        return value
