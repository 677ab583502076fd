"""Which shapes of layers the kernels of a target take that skip zeros, and from which size on they gain.

The rules are data of the target (`graphopt.target.SparseKernels`). `sparsify` and `armor` leave alone what breaks one;
`graphopt.sparsity.eligibility` tells it of models that are sparse already.
"""

from __future__ import annotations

from dataclasses import dataclass

from graphopt.target import SparseKernels


@dataclass(frozen=True)
class Shape:
    """A linear layer as kernels see it.

    Attributes:
        inputs, outputs: channels of one group.
        positions: of its kernel; 1 for a matrix product.
        groups: of a convolution.
        convolution: it slides a kernel over its input.
        transposed: ConvTranspose.
    """

    inputs: int
    outputs: int
    positions: int = 1
    groups: int = 1
    convolution: bool = False
    transposed: bool = False


@dataclass(frozen=True)
class Objection:
    """Why a layer is not executed sparsely.

    Attributes:
        rule: its name, by which a target gives the source.
        reason: one sentence for the report.
    """

    rule: str
    reason: str


def too_small(shape: Shape, kernels: SparseKernels, fewest: int = 1) -> Objection | None:
    """Why a layer would not become faster; None where it may.

    Args:
        shape: of the layer.
        kernels: of the target.
        fewest: input channels that the pattern needs, whatever the kernels.
    """
    inputs = shape.inputs * shape.positions if kernels.kernel_positions else shape.inputs
    if shape.inputs < fewest:
        return Objection("size", f"{shape.inputs} input channels are fewer than {fewest}")
    if inputs < kernels.inputs:
        times = f" x {shape.positions} positions" if inputs > shape.inputs else ""
        return Objection("size", f"{shape.inputs} input channels{times} are fewer than {kernels.inputs}")
    if shape.outputs < kernels.outputs:
        return Objection("size", f"{shape.outputs} output channels are fewer than {kernels.outputs}")
    return None


def not_taken(shape: Shape, kernels: SparseKernels) -> Objection | None:
    """Why the kernels do not take a layer of any size; None where they do."""
    if shape.transposed:
        return Objection("transposed", "kernels that skip zeros do not transpose a convolution")
    if shape.convolution and not kernels.convolutions:
        return Objection("convolution", "the target's kernels that skip zeros take no convolutions")
    if shape.groups > 1 and not kernels.grouped:
        return Objection("grouped", "the target's kernels that skip zeros take no grouped convolutions")
    multiples = (("input", shape.inputs, kernels.input_multiple), ("output", shape.outputs, kernels.output_multiple))
    for side, channels, multiple in multiples:
        if channels % multiple:
            reason = f"{channels} {side} channels are no multiple of {multiple}, as the target's kernels want"
            return Objection("multiple", reason)
    return None
