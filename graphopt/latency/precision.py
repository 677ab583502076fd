"""A model in the number format that it will be deployed in, for timing: the scales are made up, the kernels real."""

from __future__ import annotations

import onnx_ir as ir

from graphopt.numerics.rounding import Grid, affine
from graphopt.pipeline.clone import private_clone
from graphopt.quantization.static.emit import Emitter
from graphopt.quantization.static.plan import plan
from graphopt.quantization.static.prepare import to_integer_form
from graphopt.target import Target, int8_scheme

RANGE = 8.0
"""Of every activation, from its negative or, behind an operator that has none below, from 0."""

POSITIVE = ("Relu", "Clip", "Sigmoid", "HardSigmoid", "Softmax", "Abs")
"""Operators whose result begins at 0, so that a quantised output absorbs them."""


def as_int8(model: ir.Model, target: Target) -> ir.Model:
    """A clone quantised as the target wants it, with invented ranges: as fast as the real one, and as good as noise.

    Raises:
        UsageError: the target does not execute int8.
    """
    scheme = int8_scheme(target, "precision=int8", "leave the option out")
    copy = private_clone(model)
    to_integer_form(copy)
    planned = plan(copy, scheme)
    grid = Grid.of(scheme.activation, symmetric=scheme.symmetric_activation)
    positive = {v.name for node in copy.graph if node.op_type in POSITIVE for v in node.outputs}
    ranges = {name: affine(0.0 if name in positive else -RANGE, RANGE, grid) for name in planned.ranged}
    Emitter(copy, planned, ranges, scheme, scheme.per_channel).run()
    return copy
