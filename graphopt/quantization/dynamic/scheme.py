"""scheme=int8-dynamic: which nodes work on integers whose scales are found as the data arrives, and writing them.

No calibration is needed, so nodes in branch and loop bodies are quantised like any other. Which operators have such a
kernel is the target's matter (`QuantScheme.dynamic`): products are written in standard ONNX (`products`),
recurrent layers as ONNX Runtime's own operator (`recurrent`).
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from graphopt.base import Skip
from graphopt.files.opset import raise_opset
from graphopt.quantization.back.recognised import quantised_already
from graphopt.quantization.dynamic.products import ProductWriter
from graphopt.quantization.dynamic.recurrent import RecurrentWriter, recurrent_reason
from graphopt.quantization.rounding.interface import Rounding, nearest
from graphopt.quantization.static.plan import excluded
from graphopt.rewriting.constants import array, constant
from graphopt.rewriting.nodes import is_onnx, label
from graphopt.rewriting.scopes import graphs
from graphopt.sparsity.marks import is_wrapper
from graphopt.target import QuantScheme

MIN_OPSET = 11
"""DynamicQuantizeLinear is there from here on."""

ONNX_RUNTIME = QuantScheme(dynamic=("MatMul", "Gemm", "LSTM"))
"""What counts where no target is given."""

PRODUCTS = ("MatMul", "Gemm")
RECURRENT = ("LSTM", "GRU", "RNN")
CONVOLUTIONS = ("Conv", "ConvTranspose")

_NO_KERNEL = {
    "Conv": "ONNX Runtime's ConvInteger took 8 to 18 times as long as the convolution in float",
    "ConvTranspose": "no runtime has a transposed convolution of dynamically quantised activations",
    "GRU": "ONNX Runtime has no int8 kernel for GRU",
    "RNN": "ONNX Runtime has no int8 kernel for RNN",
}


def dynamic_layers(
    model: ir.Model, exclude: tuple[str, ...] = (), scheme: QuantScheme | None = None, *, products: bool = False
) -> tuple[dict[str, str], list[Skip]]:
    """Nodes that can work on dynamically quantised activations, bodies included.

    Args:
        model: with inferred types where possible; not changed.
        exclude: globs over node names; matching nodes stay in float.
        scheme: of the target, whose operators count; None: `ONNX_RUNTIME`.
        products: also MatMul of two activations, both of which are then quantised each time.

    Returns:
        the label of each node by its key, the name of its first output, and what was not taken, with the reason.
    """
    ops = (scheme or ONNX_RUNTIME).dynamic
    found: dict[str, str] = {}
    skipped: list[Skip] = []
    for graph in graphs(model):
        for node in graph:
            if not is_onnx(node, *PRODUCTS, *RECURRENT, *CONVOLUTIONS) or not _key(node):
                continue
            key = _key(node)
            reason = excluded(node, exclude) or dynamic_reason(node, ops, products=products)
            if reason is None:
                found[key] = label(node)
            else:
                skipped.append(Skip(label(node), reason))
    return found, skipped


def write_dynamic(
    model: ir.Model,
    keys: Collection[str],
    rounding: Rounding = nearest,
    scheme: QuantScheme | None = None,
    *,
    per_channel: bool | None = None,
) -> list[Skip]:
    """Quantise nodes dynamically, in place; the opset is raised to 11 where it is lower.

    Args:
        model: the model.
        keys: of nodes that `dynamic_layers` found in it, or in a model that it is a clone of.
        rounding: decides how each weight is rounded.
        scheme: of the target; None: `ONNX_RUNTIME`.
        per_channel: one weight scale per output channel; None: as the scheme has it.

    Returns:
        nodes of `keys` that are not as `dynamic_layers` found them, and stay in float, with the reason.

    Raises:
        ModelError: the opset cannot be raised.
    """
    scheme = scheme or ONNX_RUNTIME
    if not keys:
        return []
    raise_opset(model, MIN_OPSET, "DynamicQuantizeLinear")
    channels = scheme.per_channel if per_channel is None else per_channel
    products = ProductWriter(model, rounding, channels)
    recurrent = RecurrentWriter(model, rounding, channels)
    skipped: list[Skip] = []
    wanted = [node for graph in graphs(model) for node in graph if _key(node) in keys]
    for node in wanted:
        reason = dynamic_reason(node, scheme.dynamic, products=True)
        if reason is not None:
            skipped.append(Skip(label(node), reason))
        elif is_onnx(node, *RECURRENT):
            recurrent.write(node)
        else:
            products.write(node)
    products.share_tables()
    return skipped


def dynamic_reason(node: ir.Node, ops: Collection[str], *, products: bool = False) -> str | None:
    """Why a node cannot be quantised dynamically; None where it can.

    Args:
        node: any node of the default domain.
        ops: operator types that the target's runtime takes.
        products: whether MatMul of two activations counts.
    """
    if node.op_type not in ops:
        reason = _NO_KERNEL.get(node.op_type, f"the target has no kernel for {node.op_type} with dynamic scales")
        return reason if ops else "the target quantises no activations as they arrive"
    if is_wrapper(node):
        return "the wrapper of a sparse core: it stays in float"
    specific = recurrent_reason(node) if node.op_type in RECURRENT else product_reason(node, products=products)
    return quantised_already(node) or specific


def product_reason(node: ir.Node, *, products: bool = False) -> str | None:
    """Why a MatMul or Gemm cannot be quantised dynamically; None where it can."""
    if len(node.inputs) < 2 or node.inputs[0] is None or node.inputs[1] is None:
        return "an input is missing"
    left, right = node.inputs[0], node.inputs[1]
    dtype = next((v.dtype for v in (node.outputs[0], left, right) if v.dtype is not None), None)
    if dtype not in (ir.DataType.FLOAT, None):
        return f"computes in {dtype.name.lower()}, and only float32 can be quantised as it arrives" if dtype else None
    if constant(left) is not None:
        return "its constant operand stands on the left, where kernels take no scale per output channel"
    tensor = constant(right)
    if tensor is None:
        return _reason_of_two(node, right, products)
    if tensor.dtype != ir.DataType.FLOAT:
        return f"its weight is {tensor.dtype.name.lower()}, not float32"
    if len(tensor.shape) < 2:
        return "its weight is a vector: there is nothing to gain"
    if 0 in tensor.shape.numpy():
        return "its weight is empty"
    return None if np.isfinite(np.asarray(array(right))).all() else "its weight holds inf or nan"


def _reason_of_two(node: ir.Node, right: ir.Value, products: bool) -> str | None:
    if is_onnx(node, "Gemm") or right.is_initializer() or not products:
        return "its weight is not a constant"
    return None


def _key(node: ir.Node) -> str:
    return next((v.name for v in node.outputs if v.name), "")
