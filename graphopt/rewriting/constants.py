"""The values that are always the same, as arrays, and initializers that a caller could override."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.rewriting.nodes import is_onnx

Float64 = npt.NDArray[np.float64]


_FIRST_IR_WITH_PRIVATE_INITIALIZERS = 4
"""Before IR version 4 every initializer had to be listed as a graph input too."""


def constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor that `value` always holds: an initializer that no caller can override, or a Constant node's.

    None for everything else, also for an initializer that is listed as a graph input: see `freeze_overridable`.
    """
    if value is None or value.is_graph_input():
        return None
    if value.is_initializer():
        return value.const_value
    node = value.producer()
    return constant_node_tensor(node) if node is not None and is_onnx(node, "Constant") else None


def constant_node_tensor(node: ir.Node) -> ir.TensorProtocol | None:
    """The dense tensor of a Constant node; None for a sparse one or one that refers to a function's attribute."""
    if len(node.attributes) != 1 or len(node.outputs) != 1:
        return None
    attribute = next(iter(node.attributes.values()))
    if attribute.is_ref():
        return None
    name = node.outputs[0].name
    match attribute.name:
        case "value":
            # What `as_tensor` returns, without its slow check against the protocol.
            tensor: ir.TensorProtocol = attribute.value
            return tensor
        case "value_float" | "value_floats":
            return ir.Tensor(np.array(attribute.value, dtype=np.float32), name=name)
        case "value_int" | "value_ints":
            return ir.Tensor(np.array(attribute.value, dtype=np.int64), name=name)
        case _:
            return None


def array(value: ir.Value | None) -> npt.NDArray[Any] | None:
    """The constant that `value` holds as a numpy array (memory-mapped where the file is); None where it is none."""
    tensor = constant(value)
    return None if tensor is None or tensor.dtype == ir.DataType.STRING else np.asarray(tensor.numpy())


def float64(value: ir.Value | None) -> Float64 | None:
    """The floating-point constant that `value` holds, in float64; None where it is no such constant."""
    tensor = constant(value)
    if tensor is None or not tensor.dtype.is_floating_point() or tensor.dtype.bitwidth < 16:
        return None
    return np.asarray(tensor.numpy()).astype(np.float64)


def freeze_overridable(model: ir.Model) -> list[str]:
    """Make constants of the initializers that are also graph inputs, as models of IR version 3 have to list them.

    ONNX lets a caller override such an initializer at run time, which is why ONNX Runtime folds nothing into it.

    Returns:
        The names that callers can no longer feed.
    """
    graph = model.graph
    frozen = [v for v in graph.inputs if v.is_initializer()]
    if frozen:
        kept = [v for v in graph.inputs if not v.is_initializer()]
        graph.inputs.clear()
        graph.inputs.extend(kept)
    return [str(v.name) for v in frozen]


def freeze_note(names: list[str]) -> str:
    """The sentence for the report about what `freeze_overridable` did."""
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return (
        f"{len(names)} initializers were also graph inputs that a caller could override ({shown}); "
        "they are constants now (keep_overridable=true leaves them)"
    )


def allow_private_initializers(model: ir.Model) -> str | None:
    """Raise the IR version to 4 where it is older, because a new initializer is no graph input.

    Returns:
        A sentence for the report where the version changed.
    """
    old = model.ir_version
    if old >= _FIRST_IR_WITH_PRIVATE_INITIALIZERS:
        return None
    model.ir_version = _FIRST_IR_WITH_PRIVATE_INITIALIZERS
    return f"IR version {old} -> {model.ir_version}: before 4 every initializer had to be a graph input"
