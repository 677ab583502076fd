"""A float model and what was measured on it once, so that any number of quantised variants of it cost little."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import onnx_ir as ir

from graphopt.numerics.histogram import Histogram
from graphopt.numerics.rounding import Affine, Grid
from graphopt.pipeline.clone import private_clone
from graphopt.quantization.emit import Emitter
from graphopt.quantization.plan import Plan, name_of, plan
from graphopt.quantization.ranging import unfit
from graphopt.quantization.rounding import Rounding, nearest
from graphopt.target import QuantScheme


@dataclass
class Prepared:
    """What variants of one model have in common.

    Attributes:
        model: in float, in the form that has integer kernels (`graphopt.quantization.prepare`); variants are clones.
        scheme: number types of the target.
        per_channel: one weight scale per output channel.
        exclude: globs over names of nodes that stay in float.
        histograms: of the tensors that may get a scale; empty where nothing was measured.
        activations: scale and zero point by tensor.
        rounding: makes weights integers.
    """

    model: ir.Model
    scheme: QuantScheme
    per_channel: bool
    exclude: tuple[str, ...] = ()
    histograms: Mapping[str, Histogram] = field(default_factory=dict)
    activations: dict[str, Affine] = field(default_factory=dict)
    rounding: Rounding = nearest

    @cached_property
    def everything(self) -> Plan:
        """The plan of all that has integer kernels."""
        return plan(self.model, self.scheme, exclude=self.exclude)

    @cached_property
    def widest(self) -> Plan:
        """The same with the outputs of sparse products: all tensors that may get a scale."""
        if not self.scheme.sparse_outputs:
            return self.everything
        return plan(self.model, self.scheme, exclude=self.exclude, outputs=None)

    @property
    def grid(self) -> Grid:
        """The integers of activations."""
        return Grid.of(self.scheme.activation, symmetric=self.scheme.symmetric_activation)

    def unfit_units(self) -> dict[str, str]:
        """Units of `everything` that read or write a tensor that no scale fits, and which."""
        roots = self.everything.roots
        wrong = {name: reason for name, histogram in self.histograms.items() if (reason := unfit(histogram))}
        nodes = {name_of(node.outputs[0]): node for node in self.model.graph if node.outputs}
        found = {}
        for key, unit in self.everything.units.items():
            tensors = [name_of(nodes[key].inputs[index]) for index in unit.data]
            tensors += unit.carriers if unit.quantise_output else ()
            bad = next((root for name in tensors if (root := roots.get(name, name)) in wrong), None)
            if bad is not None:
                found[key] = f"tensor {bad} {wrong[bad]}"
        return found

    def planned(
        self, in_float: Collection[str], outputs: Collection[str] | None = (), model: ir.Model | None = None
    ) -> Plan:
        """The plan without the units that stay in float; see `graphopt.quantization.plan.plan`.

        A tensor that became a root because the data movement before it is in float now has its source's range.

        Args:
            in_float: keys of units.
            outputs: keys of sparse products whose output is quantised for its own sake.
            model: a clone in which nodes that stay out of the plan were rewritten; None: `self.model`.
        """
        known = None if model is None else self.everything.units
        chosen = plan(
            model or self.model, self.scheme, exclude=self.exclude, in_float=in_float, outputs=outputs, known=known
        )
        for name in chosen.ranged:
            if name not in self.activations:
                self.activations[name] = self.activations[self.everything.roots[name]]
        return chosen

    def variant(self, chosen: Plan) -> ir.Model:
        """A clone of the model in which a plan is carried out."""
        copy = private_clone(self.model)
        self.write(copy, chosen)
        return copy

    def write(self, model: ir.Model, chosen: Plan) -> Emitter:
        """Carry a plan out in `model`, which is `self.model` or a clone of it."""
        emitter = Emitter(model, chosen, self.activations, self.scheme, self.per_channel, self.rounding)
        emitter.run()
        return emitter
