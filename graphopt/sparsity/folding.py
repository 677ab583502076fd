"""Wrappers of factorised layers folded into what stands next to them, where that is exact.

With x the input of a core S in W = A S B, y its output, M the product of what is left after the fold:

    x = scale n + shift,  B x       B' = B diag(scale), the shift through S into the bias        `fold_affine`
    x = V z + c,          B x       V' = B V, c' = B c: a dense layer in front takes B           `fold_backwards`
    x = A' z,             B x       A'' = B A': of two wrappers between two cores one stays      `fold_backwards`
    y = A s + c,          V y       V' = V A: a dense layer behind takes A                       `fold_forwards`
    B or A diagonal                 into the columns or rows of S, whose zeros stay              `fold_diagonal`

Between the wrapper and its neighbour channels may be moved and positions mixed, as attention does with values (`flow`).
A sparse neighbour never takes a wrapper into its weight: its zeros would be filled.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from graphopt.base import Skip
from graphopt.files.opset import opset_of
from graphopt.rewriting.constants import float64
from graphopt.rewriting.edit import cannot_replace, set_constant, sole_use
from graphopt.rewriting.layers import Layer, layer_of
from graphopt.rewriting.linear import linear_view
from graphopt.rewriting.names import Names
from graphopt.rewriting.nodes import is_onnx, label, mark_origin
from graphopt.sparsity.affine import affine_in_front
from graphopt.sparsity.flow import Leaf, follow, origins
from graphopt.sparsity.found import holds_any_pattern
from graphopt.sparsity.marks import declared_pattern, is_wrapper, role_of
from graphopt.sparsity.mixing import Mixing, taken_in, through
from graphopt.sparsity.moves import Sizes
from graphopt.sparsity.wrappers import Floats, Wrapper, read_wrappers, wrapper_reading, wrapper_writing

WORST = 1e4
"""Condition number of a block beyond which a bias is not taken through its inverse."""


@dataclass
class Folding:
    """One run over the wrappers of a model.

    Attributes:
        model: with inferred shapes; changed in place.
        rows: for the report: wrapper, and what took it.
        skipped: wrappers that stay, with the reason.
    """

    model: ir.Model
    rows: list[dict[str, str]] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)

    def run(self) -> None:
        """Fold until nothing folds any more."""
        self._names, self._sizes = Names(self.model), Sizes()
        while True:
            wrappers, refused = read_wrappers(self.model)
            before = len(self.rows)
            reasons: list[Skip] = [Skip(name, reason) for name, reason in refused.items()]
            for wrapper in wrappers:
                if wrapper.product.graph is None:
                    continue  # went with one that it equals
                reason = self._fold(wrapper)
                if reason:
                    reasons.append(Skip(wrapper.label, reason))
            if len(self.rows) == before:
                self.skipped = reasons
                return

    def _fold(self, wrapper: Wrapper) -> str | None:
        if not self._diagonal(wrapper):
            return None
        if wrapper.role == "out":
            return self._forwards(wrapper)
        self._affine(wrapper)
        return self._backwards(wrapper)

    def _done(self, wrapper: Wrapper, into: str) -> None:
        self.rows.append({"wrapper": wrapper.label, "side": wrapper.role, "folded into": into})

    # -- diagonal wrappers -------------------------------------------------------------------------------------------

    def _diagonal(self, w: Wrapper) -> str | None:
        """Fold a diagonal wrapper into its cores; the reason where it is none."""
        blocks = w.blocks
        if (blocks * (1 - np.eye(blocks.shape[1]))).any():
            return "its blocks are not diagonal"
        scale, bias = np.einsum("kii->ki", blocks).reshape(-1), w.bias
        inner, zero = w.role == "in", np.zeros(1)
        if inner:
            cores = self._cores_behind(w) if bias is None else "it has a bias of its own"
        else:
            producer = w.source.producer()
            alone = producer is not None and sole_use(w.source) is not None
            cores = [producer] if producer is not None and alone else "its core is read elsewhere too"
        if isinstance(cores, str):
            return cores
        views = []
        for core in cores:
            view = linear_view(core, opset=self._opset)
            reason = view if isinstance(view, str) else view.before_blocked(scale, zero) if inner else None
            if isinstance(view, str) or reason:
                return reason
            views.append(view)
        reason = cannot_replace(w.product_output, w.source)
        shift = bias if bias is not None and w.adder is None else zero
        for view in views if not reason else ():
            fold = view.fold_before if inner else view.fold_after
            reason = fold(scale, zero if inner else shift, self._names, [w.label])
        if reason:
            return reason
        self._done(w, ", ".join(label(view.node) for view in views))
        w.remove()
        return None

    def _cores_behind(self, w: Wrapper) -> list[ir.Node] | str:
        cores = [use.node for use in w.output.uses()]
        if w.output.is_graph_output() or any(role_of(core) != "core" for core in cores):
            return "it is read by more than cores"
        return cores

    # -- scales and shifts in front ----------------------------------------------------------------------------------

    def _affine(self, w: Wrapper) -> None:
        """Take a constant Mul, Add or the affine of a norm in front into all wrappers that read it."""
        while w.product.graph is not None:
            node = w.source.producer()
            if node is None or is_wrapper(node) or not self._fold_affine(node, w):
                return

    def _fold_affine(self, node: ir.Node, w: Wrapper) -> bool:
        found = affine_in_front(node, w)
        if found is None or node.outputs[0].is_graph_output():
            return False
        readers = [reader for use in node.outputs[0].uses() if (reader := wrapper_reading(use.node)) is not None]
        if len(readers) != len(list(node.outputs[0].uses())) or any(r.role != "in" for r in readers):
            return False
        if found.shift.any() and not self._takes_shift(readers, found.shift):
            return False
        for reader in readers:
            blocks = reader.blocks
            scaled = blocks * found.scale.reshape(len(blocks), 1, -1)
            reader.store(scaled, self._names, [label(node)])
        found.remove(self._names)
        self.rows.append({"wrapper": label(node), "side": "in", "folded into": ", ".join(r.label for r in readers)})
        return True

    def _takes_shift(self, readers: list[Wrapper], shift: Floats) -> bool:
        """Fold a constant in front of wrappers into the biases of their cores; False where one cannot take it."""
        views = []
        for reader in readers:
            cores = self._cores_behind(reader)
            moved = np.einsum("kab,kb->ka", reader.blocks, shift.reshape(len(reader.blocks), -1)).reshape(-1)
            for core in [] if isinstance(cores, str) else cores:
                layer = layer_of(core, self._opset)
                if isinstance(layer, str) or not layer.has_bias or layer.linear.before_blocked(np.ones(1), moved):
                    return False
                views.append((layer.linear, moved))
            if isinstance(cores, str):
                return False
        for linear, moved in views:
            linear.fold_before(np.ones(1), moved, self._names, [])
        return True

    # -- an inner wrapper into what is in front ------------------------------------------------------------------------

    def _backwards(self, w: Wrapper) -> str | None:
        if w.bias is not None:
            return "it has a bias of its own"
        reason = "no linear layer stands in front of it"
        for value in origins(w.source):
            node = value.producer()
            front = wrapper_writing(value)
            layer = None if front is not None or node is None else self._layer_ending(value)
            if front is None and layer is None:
                continue
            reason = self._into_front(w, value, front, layer)
            if not reason:
                return None
        return reason

    def _into_front(self, w: Wrapper, value: ir.Value, front: Wrapper | None, layer: Layer | str | None) -> str:
        if isinstance(layer, str):
            return f"{_name(value)} in front of it: {layer}"
        axis = self._axis(value, front, layer)
        leaves = follow(value, axis, self._sizes) if axis is not None else "the rank of what it reads is not known"
        if isinstance(leaves, str):
            return leaves
        mixing, readers = self._asked(leaves)
        if isinstance(mixing, str):
            return mixing
        if w.label not in readers:
            return f"{_name(value)} in front of it does not reach it by movement alone"
        blocked = next((r for x in readers.values() if (r := cannot_replace(x.output, x.source))), None)
        if blocked:
            return blocked
        if front is not None:
            reason = self._into_wrapper(front, mixing, list(readers))
        else:
            assert layer is not None
            reason = self._into_layer(layer, mixing, list(readers))
        if reason:
            return reason
        for reader in readers.values():
            self._done(reader, front.label if front is not None else layer.label if layer is not None else "")
            reader.remove()
        return ""

    def _asked(self, leaves: Iterable[Leaf]) -> tuple[Mixing | str, dict[str, Wrapper]]:
        """What all inner wrappers behind a tensor ask for together, or why they do not agree."""
        mixing, others = Mixing(), []
        readers: dict[str, Wrapper] = {}
        for leaf in leaves:
            reader = wrapper_reading(leaf.node) if leaf.node is not None and leaf.index == 0 else None
            if reader is None or reader.role != "in":
                others.append(leaf)
                continue
            if reader.bias is not None:
                return f"{reader.label} reads the same and has a bias of its own", {}
            rank = len(leaf.channels.labels.shape)
            blocks = reader.blocks
            reason = mixing.add(leaf.channels, 1 if reader.convolution else rank - 1, blocks)
            if reason:
                return reason if not readers else f"{reason} ({reader.label} reads the same)", {}
            readers[reader.label] = reader
        for leaf in others:
            if mixing.touches(leaf.channels):
                return f"{_reader(leaf)} reads the same without a wrapper", {}
        return mixing, readers

    def _into_wrapper(self, front: Wrapper, mixing: Mixing, origin: list[str]) -> str | None:
        blocks = mixing.times(front.blocks)
        if isinstance(blocks, str):
            return f"{front.label} in front of it: {blocks}"
        bias = front.bias
        front.store(blocks, self._names, origin)
        if bias is not None:
            self._store_bias(front, mixing.apply(bias[:, None])[:, 0], origin)
        return None

    def _store_bias(self, w: Wrapper, bias: Floats, origin: Iterable[str]) -> None:
        holder = w.adder or w.product
        index = 2 if w.adder is None else next(i for i, v in enumerate(w.adder.inputs) if v is not w.product_output)
        set_constant(holder, index, bias, self._names, origin)

    def _into_layer(self, layer: Layer, mixing: Mixing, origin: list[str]) -> str | None:
        reason = _sparse(layer.linear.node)
        if reason:
            return f"{layer.label} in front of it {reason}"
        per_group = layer.linear.outputs // layer.groups
        if not mixing.within(per_group):
            return f"its blocks reach over the groups of {layer.label} in front of it"
        weight = layer.weight()
        mixed = mixing.apply(weight.reshape(layer.linear.outputs, -1)).reshape(weight.shape)
        bias = mixing.apply(layer.bias()[:, None])[:, 0]
        if not (layer.fits(mixed) and layer.fits(bias)):
            return f"{layer.label} in front of it would overflow"
        layer.store(mixed, bias)
        mark_origin(layer.linear.node, origin)
        return None

    # -- an outer wrapper into what is behind ------------------------------------------------------------------------

    def _forwards(self, w: Wrapper) -> str | None:
        axis = self._axis(w.output, w, None)
        if axis is None:
            return "the rank of what it writes is not known"
        leaves = follow(w.output, axis, self._sizes)
        if isinstance(leaves, str):
            return leaves
        if not leaves:
            return "nothing reads it"
        taken: list[tuple[Layer, Floats]] = []
        for leaf in leaves:
            found = self._takes(leaf, w.blocks)
            if isinstance(found, str):
                return found
            if any(layer.key == found[0].key for layer, _ in taken):
                return f"{found[0].label} behind it reads it twice"
            taken.append(found)
        bias = w.bias
        through_core = None if bias is None or not bias.any() else through(w.blocks, bias, WORST)
        if isinstance(through_core, str):
            return through_core
        core = self._core_of(w)
        if isinstance(core, str):
            return core
        room = w.adder is None or not is_onnx(core.linear.node, "MatMul")
        blocked = cannot_replace(w.output if room else w.product_output, w.source)
        if blocked:
            return blocked
        for layer, weight in taken:
            layer.store(weight, layer.bias())
            mark_origin(layer.linear.node, [w.label])
        if through_core is not None:
            if room:
                core.store(core.weight(), core.bias() + through_core)
            else:
                self._store_bias(w, through_core, [w.label])
        self._done(w, ", ".join(layer.label for layer, _ in taken))
        w.remove(core.linear.node, bias=room)
        return None

    def _core_of(self, w: Wrapper) -> Layer | str:
        node = w.source.producer()
        if node is None or sole_use(w.source) is None:
            return "its core is read elsewhere too"
        return layer_of(node, self._opset)

    def _takes(self, leaf: Leaf, blocks: Floats) -> tuple[Layer, Floats] | str:
        """A dense layer behind and its weight with the wrapper in it, or why it cannot take it."""
        if leaf.node is None or leaf.index != 0 or is_wrapper(leaf.node):
            return f"{_reader(leaf)} reads it"
        layer = layer_of(leaf.node, self._opset)
        if isinstance(layer, str):
            return f"{_reader(leaf)} reads it: {layer}"
        reason = _sparse(leaf.node)
        if reason:
            return f"{layer.label} behind it {reason}"
        axis = layer.channel_axis(leaf.channels.labels.ndim)
        weight = layer.weight()
        per_group = layer.linear.inputs // layer.groups
        mixed = taken_in(leaf.channels, axis, blocks, weight.reshape(*weight.shape[:2], per_group, -1))
        if isinstance(mixed, str):
            return f"{layer.label} behind it: {mixed}"
        made = mixed.reshape(weight.shape)
        return (layer, made) if layer.fits(made) else f"{layer.label} behind it would overflow"

    # -- layers ------------------------------------------------------------------------------------------------------

    @property
    def _opset(self) -> int:
        return opset_of(self.model)

    def _layer_ending(self, value: ir.Value) -> Layer | str | None:
        """The linear layer whose output, bias included, a tensor is; None where there is none."""
        node = value.producer()
        if node is not None and is_onnx(node, "Add"):
            products = [v.producer() for v in node.inputs if v is not None]
            node = next((p for p in products if p is not None and is_onnx(p, "MatMul")), node)
        if node is None or not is_onnx(node, "Conv", "ConvTranspose", "Gemm", "MatMul"):
            return None
        if is_onnx(node, "MatMul") and float64(node.inputs[1]) is None:
            return None
        layer = layer_of(node, self._opset)
        return layer if isinstance(layer, str) or layer.linear.output is value else None

    @staticmethod
    def _axis(value: ir.Value, front: Wrapper | None, layer: Layer | None) -> int | None:
        if value.shape is None:
            return None
        if front is not None:
            return 1 if front.convolution else len(value.shape) - 1
        return layer.channel_axis(len(value.shape)) if layer is not None else None


def _sparse(node: ir.Node) -> str | None:
    if role_of(node) == "core" or declared_pattern(node) is not None or holds_any_pattern(node):
        return "is sparse, and would lose its zeros"
    return None


def _reader(leaf: Leaf) -> str:
    return "the caller" if leaf.node is None else f"{leaf.node.op_type} {leaf.node.name or ''}".rstrip()


def _name(value: ir.Value) -> str:
    node = value.producer()
    return label(node) if node is not None else str(value.name)
