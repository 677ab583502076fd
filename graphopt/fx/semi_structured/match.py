"""Finding linear layers in a graph of `to_torch`, with what stands around them: bias, wrappers, quantisation.

    x -> [wrapper B] -> MatMul, FusedMatMul, Gemm, Conv 1x1 with a stored weight -> [wrapper A] -> [Add of a bias]

Wrappers are the forms that `graphopt.sparsity.factors` writes: Reshape, Transpose, MatMul with (blocks, b, b),
Transpose, Reshape, or a 1x1 convolution of as many groups as there are blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from graphopt.fx.semi_structured.modules import Layout
from graphopt.fx.semi_structured.stored import Stored, function_of

MATMUL, GEMM, CONV = function_of("MatMul"), function_of("Gemm"), function_of("Conv")
FUSED = function_of("FusedMatMul", "com.microsoft")
ADD, RESHAPE, TRANSPOSE = function_of("Add"), function_of("Reshape"), function_of("Transpose")
DEQUANTIZE = function_of("DequantizeLinear")


@dataclass(frozen=True)
class Blocks:
    """A wrapper: what it reads, its blocks (g, b, b) applied from the left, its last node, a bias (g b,) in it."""

    source: Node
    blocks: Tensor
    end: Node
    bias: Tensor | None = None


@dataclass(frozen=True)
class Quantised:
    """Integer operands of a product between QDQ pairs.

    Attributes:
        source: integers of the activations, int8 or uint8.
        weight: (outputs, inputs), int8.
        scale: (outputs,) float32: of activations times weights.
        zero_point: of the activations.
        unsigned: uint8 activations.
    """

    source: Node
    weight: Tensor
    scale: Tensor
    zero_point: int
    unsigned: bool


@dataclass(frozen=True)
class Linear:
    """A linear layer.

    Attributes:
        name: of its weight.
        node: the product.
        x: what it reads.
        weight: (outputs, inputs).
        bias: (outputs,), or None.
        layout: where the channels of its batch stand.
        strides: of a convolution.
        inner: wrapper in front of it.
        outer: wrapper behind it.
        end: the last node that it replaces.
        quantised: its integer operands, where it has them.
    """

    name: str
    node: Node
    x: Node
    weight: Tensor
    bias: Tensor | None
    layout: Layout
    strides: tuple[int, ...]
    inner: Blocks | None
    outer: Blocks | None
    end: Node
    quantised: Quantised | None


def linear_layers(module: torch.fx.GraphModule) -> Iterator[Linear | tuple[str, str]]:
    """All products with a stored matrix: what they are, or their name and why they cannot be a sparse layer."""
    stored = Stored(module)
    for node in list(module.graph.nodes):
        found = _product(node, stored)
        if isinstance(found, tuple):
            yield found
        elif found is not None:
            yield _with_surroundings(found, stored)


def _product(node: Node, stored: Stored) -> Linear | tuple[str, str] | None:
    """The layer without anything around it."""
    if node.op != "call_function" or node.target not in {MATMUL, FUSED, GEMM, CONV} or stored.holds(node):
        return None
    x, weight_node = node.args[0], node.args[1]
    weight = stored.value(weight_node)
    if weight is None or stored.holds(x):
        left = stored.value(x)
        turned = left is not None and left.ndim == 2
        return (stored.name(x), "the weight is the left operand") if turned else None
    name = stored.name(weight_node)
    if node.target is CONV:
        reason = _conv_refused(node, weight)
        if reason:
            return None if _grouped(node, stored) else (name, reason)
        matrix, bias = weight.flatten(1), stored.value(node.args[2]) if len(node.args) > 2 else None
        if len(node.args) > 2 and node.args[2] is not None and bias is None:
            return name, "its bias is computed"
        strides = tuple(node.kwargs.get("strides") or (1,) * (weight.ndim - 2))
        return Linear(name, node, x, matrix, bias, "pixels", strides, None, None, node, None)
    if weight.ndim != 2:
        return None  # a batched product, such as a wrapper
    if node.kwargs.get("transA"):
        return name, "its data operand is transposed"
    matrix = weight if node.kwargs.get("transB") else weight.t()
    alpha = node.kwargs.get("alpha", 1.0)
    matrix = matrix if alpha == 1 else matrix * alpha
    bias = None
    if node.target is GEMM and len(node.args) > 2:
        added = stored.value(node.args[2])
        if added is None or not _is_bias(added, matrix.shape[0]):
            return name, "what it adds is no stored bias"
        bias = added.reshape(-1).expand(matrix.shape[0]) * node.kwargs.get("beta", 1.0)
    return Linear(name, node, x, matrix, bias, "tokens", (), None, None, node, None)


def _conv_refused(node: Node, weight: Tensor) -> str | None:
    if int(node.kwargs.get("group") or 1) > 1:
        return "a grouped convolution"
    if any(size != 1 for size in weight.shape[2:]):
        taps = "x".join(str(size) for size in weight.shape[2:])
        return f"torch has no sparse {taps} convolution, and unfolding writes {weight[0, 0].numel()} times its input"
    if any(node.kwargs.get("pads") or ()) or node.kwargs.get("auto_pad", "NOTSET") in {"SAME_UPPER", "SAME_LOWER"}:
        return "a padded 1x1 convolution"
    return None


def _with_surroundings(layer: Linear, stored: Stored) -> Linear:
    inner, outer = _wrapper(layer.x, stored), _outer(layer, stored)
    inner = None if inner is not None and inner.bias is not None else inner
    end = layer.node if outer is None else outer.end
    bias = layer.bias
    if outer is not None and bias is not None:
        bias = (outer.blocks @ bias.reshape(*outer.blocks.shape[:2], 1)).reshape(-1)
    if outer is not None and outer.bias is not None:
        bias = outer.bias if bias is None else bias + outer.bias
    following = _only_user(end)
    added = _added_bias(following, end, layer, stored) if following is not None else None
    if added is not None and following is not None:
        bias, end = added if bias is None else bias + added, following
    quantised = _quantised(layer, stored) if inner is None and outer is None else None
    return Linear(
        layer.name, layer.node, layer.x, layer.weight, bias, layer.layout, layer.strides, inner, outer, end, quantised
    )


def _wrapper(end: Any, stored: Stored) -> Blocks | None:
    """The wrapper whose last node is `end`."""
    if not isinstance(end, Node) or end.op != "call_function":
        return None
    if end.target is CONV:
        return _grouped(end, stored)
    if end.target is not RESHAPE:
        return None
    chain = [end]
    for function in (TRANSPOSE, MATMUL, TRANSPOSE, RESHAPE):
        before = chain[-1].args[0]
        if not _is(before, function):
            return None
        chain.append(before)
    _, last, product, first, cut = chain
    blocks = stored.value(product.args[1])
    flat, blocked = stored.value(end.args[1]), stored.value(cut.args[1])
    if blocks is None or flat is None or blocked is None:
        return None
    rank = flat.numel()
    count, size = blocks.shape[0], blocks.shape[-1]
    lead = [0] * (rank - 1)
    fits = (
        blocks.numel() == count * size * size
        and blocked.tolist() == [*lead, count, size]
        and flat.tolist() == [*lead, count * size]
        and list(first.kwargs.get("perm") or ()) == [rank - 1, *range(rank - 1), rank]
        and list(last.kwargs.get("perm") or ()) == [*range(1, rank), 0, rank]
        and not (end.kwargs.get("allowzero") or cut.kwargs.get("allowzero"))
    )
    return Blocks(cut.args[0], blocks.reshape(count, size, size).transpose(1, 2), end) if fits else None


def _grouped(node: Node, stored: Stored) -> Blocks | None:
    weight, count = stored.value(node.args[1]), int(node.kwargs.get("group") or 1)
    bias = stored.value(node.args[2]) if len(node.args) > 2 else None
    if weight is None or (len(node.args) > 2 and bias is None) or any(size != 1 for size in weight.shape[2:]):
        return None
    size = weight.shape[1]
    moved = any(node.kwargs.get("pads") or ()) or any(s != 1 for s in node.kwargs.get("strides") or ())
    if weight.shape[0] != count * size or size == 1 or count == 1 or moved or "auto_pad" in node.kwargs:
        return None
    return Blocks(node.args[0], weight.reshape(count, size, size), node, bias)


def _outer(layer: Linear, stored: Stored) -> Blocks | None:
    """The wrapper that alone reads a layer."""
    node = layer.node
    for _ in range(5 if layer.layout == "tokens" else 1):
        following = _only_user(node)
        if following is None:
            return None
        node = following
    found = _wrapper(node, stored)
    return found if found is not None and found.source is layer.node else None


def _added_bias(node: Node, end: Node, layer: Linear, stored: Stored) -> Tensor | None:
    if not _is(node, ADD):
        return None
    other = node.args[1] if node.args[0] is end else node.args[0]
    added, outputs = stored.value(other), layer.weight.shape[0]
    if added is None:
        return None
    if layer.layout == "tokens":
        return added if added.ndim == 1 and added.numel() == outputs else None
    spatial = len(layer.strides)
    wanted = [outputs, *[1] * spatial]
    return added.reshape(-1) if list(added.shape) in (wanted, [1, *wanted]) else None


def _quantised(layer: Linear, stored: Stored) -> Quantised | None:
    """The integers behind a layer, where both operands come from DequantizeLinear."""
    weight_node = layer.node.args[1]
    if not (_is(layer.x, DEQUANTIZE) and _is(weight_node, DEQUANTIZE) and stored.holds(weight_node.args[0])):
        return None
    scale, shift = (_parameter(layer.x, index, stored) for index in (1, 2))
    weight_scale, weight_shift = (_parameter(weight_node, index, stored) for index in (1, 2))
    integers = stored.value(weight_node.args[0])
    if scale is None or scale.numel() != 1 or weight_scale is None or integers is None:
        return None
    if integers.dtype != torch.int8 or (weight_shift is not None and bool(weight_shift.any())):
        return None
    if layer.node.kwargs.get("alpha", 1.0) != 1:
        return None
    outputs = layer.weight.shape[0]
    matrix, along = _integer_matrix(layer, integers)
    axis = int(weight_node.kwargs.get("axis", 1)) % integers.ndim
    if weight_scale.numel() not in {1, outputs} or (weight_scale.numel() > 1 and axis != along):
        return None
    kind = None if shift is None else shift.dtype
    if kind not in {None, torch.int8, torch.uint8}:
        return None
    product = (weight_scale.reshape(-1).double() * scale.double().reshape(())).expand(outputs).float()
    zero_point = 0 if shift is None else int(shift.reshape(-1)[0])
    return Quantised(layer.x.args[0], matrix, product, zero_point, unsigned=kind in {None, torch.uint8})


def _integer_matrix(layer: Linear, integers: Tensor) -> tuple[Tensor, int]:
    """(outputs, inputs), and the axis of the outputs in what is stored."""
    if layer.layout == "pixels":
        return integers.flatten(1), 0
    return (integers, 0) if layer.node.kwargs.get("transB") else (integers.t(), 1)


def _parameter(node: Node, index: int, stored: Stored) -> Tensor | None:
    return stored.value(node.args[index]) if len(node.args) > index else None


def _is_bias(value: Tensor, outputs: int) -> bool:
    """One number for all outputs, or one for each, along the last axis."""
    return bool(value.numel() == 1 or (value.numel() == outputs and value.shape[-1] == outputs))


def _is(node: Any, function: Any) -> bool:
    return isinstance(node, Node) and node.op == "call_function" and node.target is function


def _only_user(node: Node) -> Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].op != "output" else None
