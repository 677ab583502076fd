"""Which operators a positive scale per channel passes: f(x / s) = f(x) / s, as data.

An operator outside these tables takes no scale: the channels in front of it keep theirs, for that reason.
"""

from __future__ import annotations

from graphopt.sparsity.moves import RULES as MOVES

ELEMENTWISE = frozenset({"Relu", "LeakyRelu", "PRelu", "Abs", "Neg", "Identity", "Dropout", "Cast", "Clip"})
"""f(c x) = c f(x) for c > 0, element by element; Clip and Cast under conditions (`refusal`)."""

SUMS = {"Add": None, "Sub": None, "Sum": None, "Mean": None, "Max": None, "Min": None, "Where": (1, 2)}
"""f(c x, c y) = c f(x, y) for c > 0: all operands have one scale, also constant ones. Operator -> which; None: all."""

PRODUCTS = frozenset({"Mul", "Div"})
"""Linear in the first operand, and Mul in the second, while the other keeps its scale."""

LAYERS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
"""Take a scale into the weight and give out another."""

MOVEMENT = frozenset(
    {"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Split", "Slice", "Gather", "Expand"} & MOVES.keys()
)
"""Elements change places; scales go with them."""

SPATIAL = frozenset(
    {
        "MaxPool", "AveragePool", "LpPool", "GlobalMaxPool", "GlobalAveragePool", "GlobalLpPool", "Resize", "Upsample",
    }
)  # fmt: skip
"""Work on each channel (axis 1) by itself, homogeneously."""

REDUCTIONS = frozenset({"ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2"})
"""f(c x) = c f(x) for c > 0 along the axes that they reduce."""

SCALE_FREE = frozenset({"Shape", "Size", "Sign"})
"""f(x / s) = f(x)."""

NORMS = {
    ("", "LayerNormalization"): (1, 2, -1),
    ("", "RMSNormalization"): (1, None, -1),
    ("", "SimplifiedLayerNormalization"): (1, None, -1),
    ("", "InstanceNormalization"): (1, 2, 1),
    ("", "GroupNormalization"): (1, 2, 1),
    ("com.microsoft", "SkipLayerNormalization"): (2, 3, -1),
    ("com.microsoft", "SkipSimplifiedLayerNormalization"): (2, None, -1),
}
"""Norms with a scale and a shift per channel in their first result: (scale, shift, axis of the channels). What they
read keeps its scale."""
