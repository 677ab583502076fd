"""The wrappers of factorised layers as they stand in a graph: written, read back, changed, taken out.

    Gemm, MatMul    x -> Reshape (..., blocks, b) -> Transpose -> MatMul with (blocks, b, b) -> Transpose -> Reshape
    Conv            a 1x1 convolution with as many groups as there are blocks (it commutes with zero padding: no bias)

They are known by their marks (`graphopt.sparsity.marks`) and read by their structure, so that a wrapper that another
tool rewrote is left alone instead of being misread.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.rewriting.constants import array, float64
from graphopt.rewriting.edit import new_initializer, remove_node, replace_value, set_constant, sole_use
from graphopt.rewriting.names import Names
from graphopt.rewriting.nodes import is_onnx, label, mark_origin
from graphopt.rewriting.scopes import graphs
from graphopt.sparsity.marks import Role, is_wrapper, layers_of, mark, role_of, unmark

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Site:
    """Where wrappers of one layer are written.

    Attributes:
        graph: of the layer.
        names: of the model.
        label: of the layer's node, for names and provenance.
        key: of the layer, for marks and names of values.
        dtype: of the blocks.
        rank: of what the wrapper reads.
        spatial: number of spatial axes; None where channels are the last axis.
    """

    graph: ir.Graph
    names: Names
    label: str
    key: str
    dtype: ir.DataType
    rank: int
    spatial: int | None

    def nodes(self, x: ir.Value, blocks: Floats, side: Role, bias: Floats | None = None) -> list[ir.Node]:
        """Nodes that apply blocks (count, b, b) to the channels of x, and then add a bias; not in the graph yet."""
        if self.spatial is not None:
            return [self._convolution(x, blocks, side, bias)]
        made = self._products(x, blocks, side)
        if bias is not None:
            made.append(self._node("Add", [made[-1].outputs[0], self._constant(f"{side}_bias", bias)], side, "add"))
        return made

    def _convolution(self, x: ir.Value, blocks: Floats, side: Role, bias: Floats | None) -> ir.Node:
        count, size = blocks.shape[:2]
        kernel = (1,) * (self.spatial or 0)
        inputs = [x, self._constant(f"{side}_blocks", blocks.reshape(count * size, size, *kernel))]
        if bias is not None:
            inputs.append(self._constant(f"{side}_bias", bias))
        return self._node("Conv", inputs, side, "", group=count, kernel_shape=kernel)

    def _products(self, x: ir.Value, blocks: Floats, side: Role) -> list[ir.Node]:
        (count, size), rank = blocks.shape[:2], self.rank
        lead = list(range(rank - 1))
        blocked = self._integers(f"{side}_blocked", [0] * len(lead) + [count, size])
        flat = self._integers(f"{side}_flat", [0] * len(lead) + [count * size])
        turned = blocks.swapaxes(1, 2).reshape(count, *(1,) * (rank - 2), size, size)
        cut = self._node("Reshape", [x, blocked], side, "cut")
        first = self._node("Transpose", [cut.outputs[0]], side, "first", perm=_to_front(rank))
        product = self._node("MatMul", [first.outputs[0], self._constant(f"{side}_blocks", turned)], side, "")
        last = self._node("Transpose", [product.outputs[0]], side, "last", perm=_to_back(rank))
        return [cut, first, product, last, self._node("Reshape", [last.outputs[0], flat], side, "joined")]

    def _node(self, op: str, inputs: list[ir.Value], side: Role, part: str, **attributes: object) -> ir.Node:
        name = f"{side}_{part}" if part else side
        node = ir.node(op, inputs, attributes=attributes or None)  # type: ignore[arg-type]
        node.name = self.names.fresh(f"{self.label}_{name}")
        node.outputs[0].name = self.names.fresh(f"{self.key}_{name}")
        node.outputs[0].type = ir.TensorType(self.dtype)
        mark_origin(node, [self.label])
        mark(node, side, [self.key])
        return node

    def _constant(self, name: str, data: Floats) -> ir.Value:
        return new_initializer(self.graph, self.names.fresh(f"{self.key}_{name}"), data, self.dtype)

    def _integers(self, name: str, data: list[int]) -> ir.Value:
        return new_initializer(self.graph, self.names.fresh(f"{self.key}_{name}"), np.array(data), ir.DataType.INT64)


def _to_front(rank: int) -> list[int]:
    """(..., blocks, b) to (blocks, ..., b), for an x of this rank."""
    return [rank - 1, *range(rank - 1), rank]


def _to_back(rank: int) -> list[int]:
    """(blocks, ..., b) to (..., blocks, b)."""
    return [*range(1, rank), 0, rank]


@dataclass(frozen=True)
class Wrapper:
    """A wrapper in a graph.

    Attributes:
        role: "in" (B) or "out" (A).
        layers: keys of the layers that it belongs to.
        nodes: from the one that reads `source` to the one that writes the product.
        product: the node with the blocks: Conv or MatMul.
        adder: the Add of a constant, one number a channel, behind an outer wrapper; None where there is none.
    """

    role: Role
    layers: tuple[str, ...]
    nodes: tuple[ir.Node, ...]
    product: ir.Node
    adder: ir.Node | None = None

    @property
    def label(self) -> str:
        """How messages name it."""
        return label(self.product)

    @property
    def source(self) -> ir.Value:
        """What it reads."""
        value = self.nodes[0].inputs[0]
        assert value is not None  # `read_wrapper` checked it
        return value

    @property
    def product_output(self) -> ir.Value:
        """What it writes, before the bias of an `adder`."""
        return self.nodes[-1].outputs[0]

    @property
    def output(self) -> ir.Value:
        """What it writes."""
        return self.adder.outputs[0] if self.adder is not None else self.product_output

    @property
    def convolution(self) -> bool:
        """True where channels are axis 1, False where they are the last axis."""
        return is_onnx(self.product, "Conv")

    @property
    def blocks(self) -> Floats:
        """(count, b, b), float64."""
        data = float64(self.product.inputs[1])
        assert data is not None  # `read_wrapper` checked it
        size = data.shape[1] if self.convolution else data.shape[-1]
        cut = data.reshape(-1, size, size)
        return cut if self.convolution else cut.swapaxes(1, 2)

    @property
    def bias(self) -> Floats | None:
        """(outputs,); None where there is none."""
        value = None
        if self.adder is not None:
            value = next(v for v in self.adder.inputs if v is not self.product_output)
        elif self.convolution and len(self.product.inputs) > 2:
            value = self.product.inputs[2]
        data = float64(value)
        if data is None:
            return None
        count, size = self.blocks.shape[:2]
        return np.broadcast_to(data.reshape(-1), count * size)

    def store(self, blocks: Floats, names: Names, origin: Iterable[str]) -> None:
        """Put other blocks in the place of the old ones, of whatever size; they cover the same channels."""
        count, size = blocks.shape[:2]
        origin = list(origin)
        old = array(self.product.inputs[1])
        assert old is not None  # `read_wrapper` checked it
        if self.convolution:
            set_constant(self.product, 1, blocks.reshape(count * size, size, *old.shape[2:]), names, origin)
            self.product.attributes["group"] = ir.AttrInt64("group", count)
            return
        turned = blocks.swapaxes(1, 2).reshape(count, *old.shape[1:-2], size, size)
        set_constant(self.product, 1, turned, names, origin)
        lead = [0] * (old.ndim - 2)
        set_constant(self.nodes[0], 1, np.array([*lead, count, size]), names, origin)
        for node in self.nodes[:-1]:
            node.outputs[0].shape = None

    def remove(self, origin_of: ir.Node | None = None, *, bias: bool = False) -> None:
        """Take it out: its readers read what it read.

        Args:
            origin_of: the node that took over the work.
            bias: an `adder` goes too; else it stays, an ordinary bias from here on.
        """
        name, nodes = self.label, [*self.nodes]
        if self.adder is not None:
            unmark(self.adder)
            nodes += [self.adder] if bias else []
        replace_value(nodes[-1].outputs[0], self.source)
        if origin_of is not None:
            mark_origin(origin_of, [name])
        for node in reversed(nodes):
            remove_node(node)


def read_wrappers(model: ir.Model) -> tuple[list[Wrapper], dict[str, str]]:
    """The wrappers of a model in graph order, and by label the marked nodes that have not the form of one."""
    found: list[Wrapper] = []
    refused: dict[str, str] = {}
    for graph in graphs(model):
        for node in graph:
            if is_wrapper(node) and is_onnx(node, "Conv", "MatMul"):
                wrapper = read_wrapper(node)
                if wrapper is None:
                    refused[label(node)] = "it has not the form of a wrapper any more"
                else:
                    found.append(wrapper)
    return found, refused


def read_wrapper(product: ir.Node) -> Wrapper | None:
    """The wrapper around a marked Conv or MatMul."""
    role = role_of(product)
    blocks = float64(product.inputs[1] if len(product.inputs) > 1 else None)
    if role not in ("in", "out") or blocks is None or product.inputs[0] is None:
        return None
    if is_onnx(product, "Conv"):
        return Wrapper(role, layers_of(product), (product,), product) if _is_pointwise(product, blocks) else None
    if blocks.ndim < 3 or blocks.shape[-1] != blocks.shape[-2] or any(d != 1 for d in blocks.shape[1:-2]):
        return None
    nodes = _chain(product, blocks.ndim - 1, blocks.shape[0], blocks.shape[-1])
    if nodes is None:
        return None
    adder = _adder(nodes[-1], blocks.shape[0] * blocks.shape[-1]) if role == "out" else None
    return Wrapper(role, layers_of(product), tuple(nodes), product, adder)


def wrapper_reading(node: ir.Node | None) -> Wrapper | None:
    """The wrapper whose first node this is."""
    if node is None or not is_wrapper(node):
        return None
    product = node
    if is_onnx(node, "Reshape"):
        use = sole_use(node.outputs[0])
        use = sole_use(use.node.outputs[0]) if use is not None and is_onnx(use.node, "Transpose") else None
        if use is None:
            return None
        product = use.node
    found = read_wrapper(product) if is_onnx(product, "Conv", "MatMul") else None
    return found if found is not None and found.nodes[0] is node else None


def wrapper_writing(value: ir.Value) -> Wrapper | None:
    """The outer wrapper whose output, bias included, a tensor is."""
    node = value.producer()
    if node is not None and is_onnx(node, "Add"):
        before = [v.producer() for v in node.inputs if v is not None]
        node = next((n for n in before if n is not None and is_wrapper(n)), node)
    if node is not None and is_wrapper(node) and is_onnx(node, "Reshape"):
        turned = node.inputs[0].producer() if node.inputs[0] is not None else None
        product = turned.inputs[0].producer() if turned is not None and turned.inputs[0] is not None else None
        node = product or node
    if node is None or role_of(node) != "out" or not is_onnx(node, "Conv", "MatMul"):
        return None
    found = read_wrapper(node)
    return found if found is not None and found.output is value else None


def _is_pointwise(node: ir.Node, weight: Floats) -> bool:
    a = node.attributes
    plain = all(int(k) == 1 for k in weight.shape[2:]) and weight.ndim > 2
    plain = plain and all(int(s) == 1 for s in a.get_ints("strides", ()) or ())
    plain = plain and not any(a.get_ints("pads", ()) or ())
    square = a.get_int("group", 1) * weight.shape[1] == weight.shape[0]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return plain and square and (bias is None or float64(bias) is not None)


def _chain(product: ir.Node, rank: int, count: int, size: int) -> list[ir.Node] | None:
    """Reshape, Transpose, the product, Transpose, Reshape; None where one is missing or read elsewhere too."""
    first = product.inputs[0].producer() if product.inputs[0] is not None else None
    cut = first.inputs[0].producer() if first is not None and first.inputs and first.inputs[0] is not None else None
    use = sole_use(product.outputs[0])
    last = use.node if use is not None else None
    use = sole_use(last.outputs[0]) if last is not None else None
    joined = use.node if use is not None else None
    if first is None or cut is None or last is None or joined is None:
        return None
    if not (is_onnx(cut, "Reshape") and is_onnx(joined, "Reshape")):
        return None
    if not (is_onnx(first, "Transpose") and is_onnx(last, "Transpose")):
        return None
    if list(first.attributes.get_ints("perm", ())) != _to_front(rank):
        return None
    if list(last.attributes.get_ints("perm", ())) != _to_back(rank):
        return None
    if not (_sizes(cut)[-2:] == [count, size] and _sizes(joined)[-1:] == [count * size]):
        return None
    if len(_sizes(cut)) != rank + 1 or len(_sizes(joined)) != rank:
        return None
    if sole_use(cut.outputs[0]) is None or sole_use(first.outputs[0]) is None:
        return None
    return [cut, first, product, last, joined]


def _sizes(reshape: ir.Node) -> list[int]:
    target = array(reshape.inputs[1]) if len(reshape.inputs) > 1 else None
    return [] if target is None else [int(n) for n in target.reshape(-1)]


def _adder(last: ir.Node, channels: int) -> ir.Node | None:
    use = sole_use(last.outputs[0])
    if use is None or not is_onnx(use.node, "Add"):
        return None
    data = float64(use.node.inputs[1 - use.idx])
    if data is None or data.shape not in ((channels,), (1,), ()):
        return None
    adder: ir.Node = use.node
    return adder
