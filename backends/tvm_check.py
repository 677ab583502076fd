"""What TVM's ONNX importer does not take, found before anything is compiled.

Which operators it knows is asked of the installed package. What it knows and gets wrong is told by `TRAPS`, read in its
source (apache-tvm 0.27.0, relax/frontend/onnx/onnx_frontend.py): it looks at names of operators, never at their
domains, and drops attributes that it does not know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from graphopt.backends import tvm_operators
from graphopt.backends.tvm_operators import ONNX_DOMAINS, qualified
from graphopt.errors import ModelError
from graphopt.rewriting.constants import array
from graphopt.rewriting.nodes import label

if TYPE_CHECKING:
    import onnx_ir as ir

CONTRIB = frozenset({"BiasGelu", "FastGelu", "Gelu"})
"""Operators of com.microsoft whose converters in TVM follow ONNX Runtime's signatures."""

FOREIGN = frozenset({"AllClassNMS", "Attention", "BiasGelu", "EmbedLayerNormalization", "FastGelu", "MatMulInteger16"})
"""Names in the importer's table that are no operators of the standard, or not with the signature of the standard."""

DIRECT = frozenset({"Constant", "If"})
"""Operators that it takes without a converter."""

TYPES = frozenset(
    {f"{kind}{bits}" for kind in ("INT", "UINT") for bits in (8, 16, 32, 64)}
    | {"FLOAT", "FLOAT16", "DOUBLE", "BFLOAT16", "BOOL"}
)
"""Types of tensors that it reads; of 4-bit ones it takes the packed bytes for the tensor."""

ELSEWHERE = "lower it to a target of ONNX Runtime, such as cpu"
DEQUANTISE = "take the model back to floats with `graphopt optimize --passes dequantize`"
HINTS = {
    **dict.fromkeys(("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "MatMulNBits"), DEQUANTISE),
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"), DEQUANTISE),
    "Loop": f"export the model with the loop unrolled, or {ELSEWHERE}",
    "Scan": f"export the model with the loop unrolled, or {ELSEWHERE}",
    "LSTM": "fix the length of the sequence (--dim or --input-shape), so that its steps can be written out",
    "GRU": "fix the length of the sequence (--dim or --input-shape), so that its steps can be written out",
    "RNN": "fix the length of the sequence (--dim or --input-shape), so that its steps can be written out",
}
"""What to do about an operator; others: `ELSEWHERE`."""


def check(model: ir.Model) -> None:
    """Refuse a model that the importer does not take.

    Raises:
        ModelError: names the first node or tensor that it does not take, why, how many more there are, and what to do.
    """
    found = list(problems(model))
    if not found:
        return
    where, what, hint = found[0]
    more = f" ({len(found) - 1} more like it)" if len(found) > 1 else ""
    raise ModelError(what + more, where=where, hint=hint)


def problems(model: ir.Model) -> Iterator[tuple[str, str, str]]:
    """Everything that the importer does not take: where, what, and what to do about it."""
    from tvm.relax.frontend.onnx.onnx_frontend import _get_convert_map

    known = frozenset(_get_convert_map()) | DIRECT
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.dtype is not None and value.dtype.name not in TYPES:
            yield f"tensor {value.name!r}", f"TVM has no tensors of type {value.dtype.name}", ELSEWHERE
    for graph in model.graphs():
        for name, value in graph.initializers.items():
            if value.dtype is not None and value.dtype.name not in TYPES:
                hint = DEQUANTISE if "4" in value.dtype.name else ELSEWHERE
                yield f"tensor {name!r}", f"TVM reads no tensors of type {value.dtype.name}", hint
        for node in graph:
            reason = refusal(node, known)
            if reason is not None:
                yield label(node), reason, HINTS.get(node.op_type, ELSEWHERE)


def refusal(node: ir.Node, known: frozenset[str]) -> str | None:
    """Why the importer does not take a node, or would get it wrong; None where it takes it.

    Args:
        node: of any graph of the model.
        known: names of operators that the importer has.
    """
    op = node.op_type
    foreign = node.domain not in ONNX_DOMAINS
    written = qualified(node.domain, op) in tvm_operators.CONVERTERS
    if not written and foreign and not (node.domain == "com.microsoft" and op in CONTRIB & known):
        return f"TVM's importer has no operator {op} of {node.domain}"
    if not written and not foreign and (op not in known or op in FOREIGN):
        return f"TVM's importer has no operator {op}"
    for name, attribute in node.attributes.items():
        if isinstance(attribute.value, (list, tuple)) and not attribute.value:
            return f"TVM's importer cannot read the empty attribute {name!r}"
    if written:
        return tvm_operators.refusal(node)
    trap = TRAPS.get(op)
    return None if foreign or trap is None else trap(node)


def _blocked(node: ir.Node) -> str | None:
    return "TVM has no scales for blocks of a row" if node.attributes.get_int("block_size", 0) else None


def _one_output(node: ir.Node) -> str | None:
    extra = [v for v in node.outputs[1:] if v.uses() or v.is_graph_output()]
    return f"TVM computes only its first output, and {extra[0].name!r} is read" if extra else None


def _resize(node: ir.Node) -> str | None:
    attributes = node.attributes
    if attributes.get_int("antialias", 0):
        return "TVM's Resize does not filter against aliasing"
    if "axes" in attributes or attributes.get_string("keep_aspect_ratio_policy", "stretch") != "stretch":
        return "TVM's Resize has neither axes nor a policy for the aspect ratio"
    scales = array(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else None
    if scales is not None and scales.size and any(scales[:2] != 1):
        return "TVM's Resize scales the axes behind the channels only"
    return None


TRAPS: dict[str, Callable[[ir.Node], str | None]] = {
    "QuantizeLinear": _blocked,
    "DequantizeLinear": _blocked,
    "LayerNormalization": _one_output,
    "MaxPool": _one_output,
    "Dropout": _one_output,
    "Resize": _resize,
}
