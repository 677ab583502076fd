"""Models and data as callers give them: files or objects, checked against each other."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from graphopt.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from graphopt.data.feeds import InputSpec

    Array = np.ndarray[Any, Any]


def opened(
    model: ir.Model | str | os.PathLike[str],
    dim: Mapping[str, int] | None,
    input_shape: Mapping[str, Sequence[int]] | None = None,
) -> ir.Model:
    """The model itself; a copy of its own where open input dimensions are fixed.

    Raises:
        ModelError, UsageError: it is invalid, or has no such dimension or input.
    """
    from graphopt.files.input_sizes import fix_sizes
    from graphopt.model import load

    loaded = load(model) if isinstance(model, (str, os.PathLike)) else model
    if dim or input_shape:
        from graphopt.pipeline.clone import private_clone

        loaded = private_clone(loaded)
        fix_sizes(loaded, dim or {}, input_shape or {})
    return loaded


def called(model: ir.Model | str | os.PathLike[str], otherwise: str) -> str:
    """What messages call a model: its file, where it is one."""
    return os.fspath(model) if isinstance(model, (str, os.PathLike)) else otherwise


def check_same_inputs(models: Sequence[ir.Model], names: Sequence[str]) -> None:
    """Models that shall run on the same data must take the same.

    A dimension that one of them leaves open fits any size; whether it does is seen when they run.

    Raises:
        DataError: the inputs that have no default differ in name, type or fixed size.
    """
    from graphopt.data.feeds import input_specs

    first, *others = ({s.name: s for s in input_specs(model) if s.required} for model in models)
    for name, other in zip(names[1:], others, strict=True):
        if first.keys() == other.keys() and all(_fit(first[key], other[key]) for key in first):
            continue
        takes = [
            f"{model} takes {', '.join(f'{s.name} {s}' for s in specs.values()) or 'nothing'}"
            for model, specs in ((names[0], first), (name, other))
        ]
        raise DataError(f"the inputs differ: {', '.join(takes)}", hint="give models that take the same inputs")


def _fit(a: InputSpec, b: InputSpec) -> bool:
    if a.dtype != b.dtype:
        return False
    if a.shape is None or b.shape is None:
        return True
    return len(a.shape) == len(b.shape) and all(
        x == y or not (isinstance(x, int) and isinstance(y, int)) for x, y in zip(a.shape, b.shape, strict=True)
    )


def one_batch(calib: Any, model: ir.Model, batch: int) -> dict[str, Array]:
    """The first samples of some data, for one call of a model.

    Raises:
        DataError: there are none, or they do not fit.
    """
    from graphopt import calibration

    feeds = next(iter(calibration.load(calib, model).batches(batch_size=batch, limit=batch)), None)
    if feeds is None:
        raise DataError("there are no samples", where="calib", hint="give at least one")
    return feeds
