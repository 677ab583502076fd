"""What converters of ONNX operators to Relax have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

CONTRIB = "com.microsoft"
"""ONNX Runtime's own domain."""

Converter = Callable[[Any, Sequence[Any], Mapping[str, Any], Callable[..., Any]], Any]
"""Takes the block builder, the inputs (None: not given), the attributes, and the importer's own converters by name."""


def number(like: Any, value: float) -> Any:
    """A constant of the type of a tensor."""
    from tvm import relax

    return relax.const(value, str(like.ty.dtype.dtype if hasattr(like.ty.dtype, "dtype") else like.ty.dtype))


def at(inputs: Sequence[Any], index: int) -> Any:
    """An input; None where it is not given."""
    return inputs[index] if index < len(inputs) else None
