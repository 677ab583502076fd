"""Fixed sizes for the dimensions that a model's inputs leave open: by dimension name, or by the shape of an input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from graphopt.errors import UsageError
from graphopt.files.shape_inference import infer_shapes


def dimension_names(model: ir.Model) -> list[str]:
    """The named dimensions of the graph inputs, in order of appearance."""
    dims = (dim for value in model.graph.inputs for dim in value.shape or ())
    return list(dict.fromkeys(dim.value for dim in dims if isinstance(dim, ir.SymbolicDim) and dim.value))


def fix_sizes(model: ir.Model, dims: Mapping[str, int], shapes: Mapping[str, Sequence[int]]) -> None:
    """Give open dimensions of the inputs a fixed size and infer all shapes again, in place.

    A name is one size wherever it stands: the shape of one input also fixes the dimensions of others that have the same
    names.

    Args:
        model: the model to specialise.
        dims: size by dimension name, each at least 1.
        shapes: shape by input name, sizes of at least 1; a dimension that is fixed already must have that size.

    Raises:
        UsageError: a name that the model does not have, a size below 1, another rank, or two sizes for one dimension.
    """
    present = dimension_names(model)
    for name in dims:
        if name not in present:
            raise UsageError(
                f"the model has no input dimension of this name; it has {', '.join(present) or 'none that is named'}",
                where=f"dimension {name}",
            )
    sizes = {name: _positive(size, f"dimension {name}") for name, size in dims.items()}
    for name, shape in shapes.items():
        value = _input(model, name)
        value.shape = _fitted(value, [_positive(size, f"input {name}") for size in shape], sizes)
    for value in [*model.graph.inputs, *model.graph.outputs]:
        if value.shape is not None:
            value.shape = ir.Shape(
                [sizes.get(dim.value or "", dim) if isinstance(dim, ir.SymbolicDim) else dim for dim in value.shape]
            )
    infer_shapes(model)


def _positive(size: int, where: str) -> int:
    if size < 1:
        raise UsageError(f"size {size} is not a positive number", where=where)
    return size


def _input(model: ir.Model, name: str) -> ir.Value:
    for value in model.graph.inputs:
        if value.name == name:
            return value
    known = ", ".join(str(value.name) for value in model.graph.inputs if not value.is_initializer())
    raise UsageError("the model has no input of this name", where=f"input {name}", hint=f"it has {known or 'none'}")


def _fitted(value: ir.Value, shape: list[int], sizes: dict[str, int]) -> ir.Shape:
    """The shape of an input, checked; what it says about named dimensions is added to `sizes`."""
    where = f"input {value.name}"
    if value.shape is None:
        return ir.Shape(shape)
    if len(value.shape) != len(shape):
        raise UsageError(
            f"its shape {value.shape} has {len(value.shape)} dimensions, {len(shape)} are given",
            where=where,
            hint="give one size for each of them, as in x:1,3,224,224",
        )
    for axis, (dim, size) in enumerate(zip(value.shape, shape, strict=True)):
        if isinstance(dim, int) and dim != size:
            raise UsageError(
                f"dimension {axis} of {value.shape} is {dim} in the model, {size} is given",
                where=where,
                hint=f"give {dim}, or export the model again with this dimension open",
            )
        if isinstance(dim, ir.SymbolicDim) and dim.value and sizes.setdefault(dim.value, size) != size:
            raise UsageError(
                f"dimension {dim.value} is {sizes[dim.value]} elsewhere, {size} is given here",
                where=where,
                hint="a name stands for one size in all inputs",
            )
    return ir.Shape(shape)
