"""A float model and what was measured on it once, so that any number of quantised variants of it cost little."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import onnx_ir as ir

from graphopt.calibration import Calibration
from graphopt.errors import DataError
from graphopt.numerics.histogram import Histogram
from graphopt.numerics.rounding import Affine, Grid
from graphopt.pipeline.clone import private_clone
from graphopt.quantization.dynamic.scheme import dynamic_layers
from graphopt.quantization.ranges.ranging import unfit
from graphopt.quantization.rounding.interface import Rounding, nearest
from graphopt.quantization.scales.inserted import Ahead, find_scales
from graphopt.quantization.search.sensitivity import Reference
from graphopt.quantization.static.emit import Emitter
from graphopt.quantization.static.plan import Plan, name_of, plan
from graphopt.target import QuantScheme, WeightKernels

SAMPLES = 16
"""Calibration samples on which variants are compared with the float model."""


@dataclass
class Prepared:
    """What variants of one model have in common.

    Attributes:
        model: in float, in the form that has integer kernels (`static.prepare`); variants are clones.
        scheme: number types of the target.
        per_channel: one weight scale per output channel.
        exclude: globs over names of nodes that stay in float.
        calibration: the data; None where there is none, and then nothing has a static scale.
        threads: of the runtime.
        optimize: variants run as the runtime would optimise them, and not node by node.
        histograms: of the tensors that may get a scale.
        activations: scale and zero point by tensor.
        compared: the same by each rule in question; the one in use is among them.
        rule: how ranges were made of histograms.
        outputs: keys of sparse products whose output is quantised for its own sake.
        rounding: makes weights integers.
        smooth: scales may be put in front of layers with dynamic scales.
        weights: how the target reads weights that alone are quantised.
        block: columns of them that share a scale; None: what is best for their form.
        symmetric: whether they have no zero points; None: with 8 bits they have none.
    """

    model: ir.Model
    scheme: QuantScheme
    per_channel: bool
    exclude: tuple[str, ...] = ()
    calibration: Calibration | None = None
    threads: int = 1
    optimize: bool = True
    histograms: Mapping[str, Histogram] = field(default_factory=dict)
    activations: dict[str, Affine] = field(default_factory=dict)
    compared: Mapping[str, dict[str, Affine]] = field(default_factory=dict)
    rule: str = ""
    outputs: tuple[str, ...] = ()
    rounding: Rounding = nearest
    smooth: bool = True
    weights: WeightKernels = field(default_factory=WeightKernels)
    block: int | None = None
    symmetric: bool | None = None

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

    @cached_property
    def ahead(self) -> dict[str, Ahead]:
        """Scales that are worth a multiplication in front of layers with dynamic scales; none without data."""
        if self.calibration is None or not self.smooth:
            return {}
        keys, _ = dynamic_layers(self.model, self.exclude, self.scheme)
        return find_scales(self.model, keys, self.calibration, self.scheme, threads=self.threads)

    @cached_property
    def reference(self) -> Reference:
        """The outputs of the float model on a few samples.

        Raises:
            DataError: there is no calibration data.
        """
        if self.calibration is None:
            raise DataError("no calibration data", where="quantize", hint="give unlabelled samples with --calib")
        return Reference(self.model, self.calibration, samples=SAMPLES, threads=self.threads, optimize=self.optimize)

    @property
    def grid(self) -> Grid:
        """The integers of activations."""
        return Grid.of(self.scheme.activation, symmetric=self.scheme.symmetric_activation)

    def unfit_units(self) -> dict[str, str]:
        """Units of `everything` that read or write a tensor without a scale, and why it has none."""
        roots = self.everything.roots
        wrong = {name: reason for name, histogram in self.histograms.items() if (reason := unfit(histogram))}
        known = {*self.histograms, *self.activations}
        wrong |= {name: "has no scale: it was not measured" for name in roots.values() if name not in known}
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
        """The plan without the units that stay in float; see `graphopt.quantization.static.plan.plan`.

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
