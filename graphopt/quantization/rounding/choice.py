"""Which rounding the option `rounding` stands for.

auto is what measurements say pays (tools/bench/rounding.py): where weights alone are integers, or have fewer than 8
bits, their rounding is most of the error, and it is solved for. Of int8 weights with one scale a channel beside int8
activations, the rounding of activations is the larger error, and no method was better than the nearest beyond chance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from graphopt.errors import DataError
from graphopt.pipeline.clone import private_clone
from graphopt.quantization.rounding.interface import Floats, Rounded, Rounding, WeightGrid, nearest
from graphopt.quantization.rounding.solved import unmeasured

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphopt.base import Context

RoundingChoice = Literal["auto", "nearest", "gptq", "descent"]

SAMPLES = 256
"""Calibration samples that moments are taken of: each has many positions."""

Write = Callable[["ir.Model", Rounding], object]
"""Quantises a model, in place."""


def rounding_for(choice: RoundingChoice, model: ir.Model, ctx: Context) -> Rounding:
    """The rounding of a choice, each layer by itself.

    Args:
        choice: the option.
        model: in float, as it will be quantised; a clone is kept.
        ctx: its calibration data counts.

    Raises:
        DataError: the choice needs calibration data and there is none.
    """
    from graphopt.quantization.rounding.second_order import SecondOrder

    if choice == "nearest":
        return nearest
    if ctx.calibration is None:
        _needs_data(choice)
        return _Coarse(unmeasured)
    method = "descent" if choice == "auto" else choice
    found = SecondOrder(model, ctx.calibration, method, samples=SAMPLES, jobs=ctx.jobs)
    return _Coarse(found) if choice == "auto" else found


def rounding_front_to_back(choice: RoundingChoice, model: ir.Model, ctx: Context, write: Write) -> Rounding:
    """The rounding of a choice where weights alone are quantised: later layers make up for the earlier ones.

    Args:
        choice: the option.
        model: in float, as it will be quantised; clones are kept.
        ctx: its calibration data counts.
        write: quantises a model; it is tried on a clone, so that what will be asked for is known.

    Raises:
        DataError: as `rounding_for`.
    """
    from graphopt.quantization.rounding.front_to_back import FrontToBack, Requests

    if choice == "nearest" or ctx.calibration is None:
        return rounding_for(choice, model, ctx)
    asked = Requests()
    write(private_clone(model), asked)
    method = "descent" if choice == "auto" else choice
    return FrontToBack(model, ctx.calibration, asked, method, samples=SAMPLES, jobs=ctx.jobs)


def notes_of(rounding: Rounding) -> list[str]:
    """What a rounding has to say once everything is rounded, for the report."""
    return list(getattr(rounding, "notes", ()))


class _Coarse:
    """A rounding for coarse grids; on the others the nearest is as good."""

    def __init__(self, rounding: Rounding) -> None:
        self._rounding = rounding

    @property
    def notes(self) -> list[str]:
        """Those of the rounding of coarse grids."""
        return notes_of(self._rounding)

    def __call__(self, key: str, weight: Floats, grid: WeightGrid, least_scale: Floats | float = 0.0) -> Rounded:
        chosen = nearest if grid.bits >= 8 and grid.block is None else self._rounding
        return chosen(key, weight, grid, least_scale)


def _needs_data(choice: RoundingChoice) -> None:
    if choice != "auto":
        raise DataError(
            f"rounding={choice} needs calibration data",
            where="quantize",
            hint="give unlabelled samples with --calib, or take rounding=nearest",
        )
