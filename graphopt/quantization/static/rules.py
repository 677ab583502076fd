"""Which operators can work on integers, and where their quantised inputs and outputs stand: placement rules as data.

A rule says where QuantizeLinear/DequantizeLinear must stand around an operator for a runtime to replace the group by
one integer kernel. The rules were read off ONNX Runtime's optimised graphs (a test does it again for every
row); a target narrows the table by `QuantScheme.ops`. An operator outside the table stays in float, without
Q/DQ around it: a pair that no kernel absorbs costs time and accuracy for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """How the output of an integer kernel relates to its input."""

    COMPUTE = "compute"
    """Multiplies and accumulates in int32. These are what quantisation is for; the rest only connects them."""
    RESCALE = "rescale"
    """Reads and writes integers with a scale of its own per tensor."""
    MOVE = "move"
    """Moves or selects integers: input and output share one scale, so the kernel of the integer type does it."""


@dataclass(frozen=True)
class Rule:
    """The placement rule of one operator type.

    Attributes:
        kind: see `Kind`.
        data: indices of the inputs that may be activations; None: all inputs.
        weight: index of the input that may be a constant weight.
        bias: index of the optional bias, int32 in units of input scale times weight scale.
        channel_axis: axis of the weight that counts output channels; None where an attribute decides.
        needs_output: True where an integer kernel exists with a quantised output only.
        integers_only: True where the pair around the operator is not absorbed, and the operator itself must be written
            on the integer tensor (allowed by ONNX for all data movement).
    """

    kind: Kind
    data: tuple[int, ...] | None = (0,)
    weight: int | None = None
    bias: int | None = None
    channel_axis: int | None = None
    needs_output: bool = True
    integers_only: bool = False


MOVE = Rule(Kind.MOVE)
RESCALE = Rule(Kind.RESCALE)

RULES: dict[str, Rule] = {
    "Conv": Rule(Kind.COMPUTE, weight=1, bias=2, channel_axis=0),
    "ConvTranspose": Rule(Kind.COMPUTE, weight=1, bias=2, channel_axis=1),
    "Gemm": Rule(Kind.COMPUTE, weight=1, bias=2, needs_output=False),
    "MatMul": Rule(Kind.COMPUTE, data=(0, 1), weight=1, channel_axis=1, needs_output=False),
    "Add": Rule(Kind.RESCALE, data=None),
    "Mul": Rule(Kind.RESCALE, data=None),
    "Concat": Rule(Kind.RESCALE, data=None),
    "AveragePool": RESCALE,
    "GlobalAveragePool": RESCALE,
    "LeakyRelu": RESCALE,
    "Sigmoid": RESCALE,
    "MaxPool": MOVE,
    "Reshape": MOVE,
    "Flatten": MOVE,
    "Transpose": MOVE,
    "Squeeze": MOVE,
    "Unsqueeze": MOVE,
    "Slice": MOVE,
    "Split": MOVE,
    "Gather": MOVE,
    "Expand": MOVE,
    "Tile": MOVE,
    "DepthToSpace": MOVE,
    "Resize": MOVE,
    "Pad": Rule(Kind.MOVE, integers_only=True),
}
"""Placement rules by operator type of the default domain."""

CPU_OPS = tuple(op for op in RULES if op != "ConvTranspose")
"""What ONNX Runtime's CPU provider executes on integers; the default of targets that list no operators.

ConvTranspose has no integer kernel there. Softmax has one, and is left out of the table on purpose: its output steps of
1/255 erase attention weights below that.
"""

ABSORBED = ("Relu", "Clip")
"""Activations that a quantised output makes superfluous: the lowest integer stands for 0."""
