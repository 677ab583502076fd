"""Operator rules, one family a file. Importing this package registers them all."""

from graphopt.analysis.ops import (  # noqa: F401
    attention_operators,
    contraction,
    control,
    convolution,
    elementwise,
    frozen,
    fused,
    indexing,
    joining,
    layer_norm,
    layout,
    linear,
    normalization,
    quantized,
    recurrent,
    reduction,
    resizing,
    shaping,
    slicing,
)
