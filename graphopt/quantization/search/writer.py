"""A choice of formats carried out in a model: equalised or smoothed first where that helps, and rounded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import onnx_ir as ir

from graphopt.base import Context
from graphopt.pipeline.clone import private_clone
from graphopt.quantization.apply import Applied, apply
from graphopt.quantization.formats import Format
from graphopt.quantization.prepared import Prepared
from graphopt.quantization.rounding.bias_correction import correct_if_better
from graphopt.quantization.rounding.choice import notes_of, rounding_for
from graphopt.quantization.rounding.interface import nearest
from graphopt.quantization.scales.conditioning import Way, best_way, carry_out
from graphopt.quantization.static.prepare import to_integer_form
from graphopt.quantization.static.rules import Kind
from graphopt.quantization.static.scheme import StaticOptions, prepare, quick


@dataclass
class Writer:
    """What becomes of options that do not depend on time.

    Attributes:
        ctx: target and data.
        options: of the pass.
        prepared: a clone of the model and what was measured on it; another one once the model is conditioned.
        way: passes that go before the formats.
        conditioned: whether these were sought.
    """

    ctx: Context
    options: StaticOptions
    prepared: Prepared
    way: Way = ()
    conditioned: bool = False

    def condition(self, chosen: Mapping[str, Format]) -> list[str]:
        """Equalise or smooth, where an assignment has int8 layers that gain by it; sought once.

        What layers take does not depend on it, so that it can follow a search for the fastest formats.

        Returns:
            sentences for the report.
        """
        if self.options.prepare == "none" or self.conditioned or not self._has_static_layers(chosen):
            return []
        self.conditioned = True
        scheme = self.prepared.scheme

        def quantise(copy: ir.Model) -> None:
            apply(copy, chosen, self._like(prepare(copy, self.ctx, scheme, quick(self.options))[0]))

        self.way, notes = best_way(self.prepared.model, self.ctx, quantise)
        if self.way:
            copy = private_clone(self.prepared.model)
            carry_out(copy, self.ctx, self.way)
            self.prepared = self._like(prepare(copy, self.ctx, scheme, self.options)[0])
        return notes

    def round(self) -> None:
        """Round weights from now on as the options want it; while formats are timed, the nearest will do."""
        if self.prepared.rounding is nearest:
            self.prepared.rounding = rounding_for(self.options.rounding, self.prepared.model, self.ctx)

    def write(self, model: ir.Model, chosen: Mapping[str, Format]) -> Applied:
        """Carry a choice out in the model that `prepared` was made of, in place."""
        to_integer_form(model)
        if self.way:
            carry_out(model, self.ctx, self.way)
            to_integer_form(model)
        before = private_clone(model)
        self.round()
        done = apply(model, chosen, self.prepared)
        done.notes += notes_of(self.prepared.rounding)
        if self.options.correct_bias and self.ctx.calibration is not None:
            noise = self.prepared.reference.noise
            done.notes += correct_if_better(before, model, self.ctx.calibration, noise, self.ctx.jobs)
        return done

    def _has_static_layers(self, chosen: Mapping[str, Format]) -> bool:
        units = self.prepared.everything.units
        return any(
            format == "int8" and key in units and units[key].rule.kind is Kind.COMPUTE for key, format in chosen.items()
        )

    def _like(self, other: Prepared) -> Prepared:
        """The same with the options of weights."""
        ours = self.prepared
        return replace(other, smooth=ours.smooth, block=ours.block, symmetric=ours.symmetric)
