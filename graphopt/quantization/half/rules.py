"""What stays in float32 when a model becomes float16 or bfloat16, and why: data, and the few rules that use it.

float16 has 11 bits and ends at 65504, bfloat16 has 8 and the range of float32. Products of a layer are accumulated in
float32 by every kernel that is worth using; what is listed here is what leaves these bounds or adds up by itself.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from graphopt.quantization.half.types import is_float32
from graphopt.rewriting.constants import array
from graphopt.rewriting.nodes import is_onnx

SUMS = "it adds up many numbers in the type that it reads: sums lose digits and leave the range"
ANGLES = "its argument needs absolute precision: above 2048 float16 does not even hold the integers"
GROWS = "it leaves the range, or loses the digits, of 16 bits on ordinary arguments"

FLOAT32_OPS: dict[str, str] = {
    **dict.fromkeys(
        ("ReduceSum", "ReduceMean", "ReduceSumSquare", "ReduceL1", "ReduceL2", "ReduceProd", "ReduceLogSum",
         "ReduceLogSumExp", "CumSum", "CumProd", "MeanVarianceNormalization", "LpNormalization", "GroupNormalization",
         "LRN", "LpPool", "GlobalLpPool", "Det"), SUMS),
    **dict.fromkeys(("Sin", "Cos", "Tan", "Mod", "Range", "GridSample", "AffineGrid", "NonMaxSuppression"), ANGLES),
    **dict.fromkeys(("Exp", "Pow", "Reciprocal", "Sinh", "Cosh", "Gamma", "Log"), GROWS),
    **dict.fromkeys(("DFT", "STFT", "MelWeightMatrix", "HannWindow", "HammingWindow", "BlackmanWindow"),
                    "spectra spread over more powers of two than 16 bits hold"),
}  # fmt: skip
"""Operators of the standard domain. Softmax, LayerNormalization, RMSNormalization and BatchNormalization are not among
them: their kernels subtract the maximum or compute in float32 inside (`stash_type`), and attributes such as `epsilon`
are float32 in any case. GroupNormalization is, because runtimes without a kernel expand it into sums of the input's
type."""

SCATTERING = ("ScatterND", "ScatterElements")
"""With a `reduction` they add up, too."""

AFTER_SUMS = ("Add", "Sub", "Mul", "Div", "Max", "Min", "Clip", "Sqrt", "Reciprocal", "Pow", "Log", "Neg", "Abs")
"""What stays in float32 behind what does, as long as it reads nothing else but constants: the rest of a norm."""

CHEAP = (
    *AFTER_SUMS, "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Gather", "Expand",
    "Tile", "Concat", "Identity", "Where", "Relu", "Floor", "Ceil", "Round", "Sign", "Pad", "Dropout",
)  # fmt: skip
"""What gains nothing from half types between two operators in float32."""

SHAPING = ("Reshape", "Squeeze", "Unsqueeze", "Expand", "Tile", "Transpose", "Identity", "Sqrt", "Flatten")
"""What a number that must not vanish may pass on its way to a division."""

DIVISIONS = ("Div", "Reciprocal", "Log", "Pow")

BOUNDS = ("Clip", "Min", "Max")
"""Operators whose constants are bounds: the largest number of the type stands for any larger one."""

MASK = 1e30
"""A constant that reaches this stands for infinity."""

WEIGHT_LOSS = 2.0**-7
"""A constant that loses more than this in half (relative error of its norm) keeps its node in float32."""

INTEGERS = (ir.DataType.INT32, ir.DataType.INT64, ir.DataType.UINT32, ir.DataType.UINT64)


def is_mask(data: NDArray[np.float32], largest: float) -> bool:
    """Whether the numbers beyond `largest` only mean "never": enormous ones, or one negative number throughout."""
    beyond = data[np.abs(data) > largest]
    if not beyond.size:
        return False
    return bool((np.abs(beyond) >= MASK).all() or (beyond[0] < 0 and (beyond == beyond[0]).all()))


def clipped(data: NDArray[np.float32], largest: float, *, bound: bool) -> NDArray[np.float32]:
    """Masks within the range of the half type; infinities stay.

    Half of the range is kept free for what is added to a mask; a `bound` is compared with and takes the whole.
    """
    limit = largest if bound else largest / 2
    inside = np.where(np.abs(data) > largest, np.copysign(np.float32(limit), data), data)
    return np.where(np.isinf(data), data, inside).astype(np.float32)


def positional(nodes: Iterable[ir.Node]) -> dict[ir.Node, str]:
    """Arithmetic on positions and lengths: integers cast to float32, and what is computed from these alone.

    Ends at bounded functions (Sin, Cos, Sigmoid, ...), at comparisons and casts, and at layers with a weight matrix.
    """
    found: dict[ir.Node, str] = {}
    values: set[ir.Value] = set()
    ends = ("Sin", "Cos", "Sigmoid", "Tanh", "Softmax", "Conv", "Gemm", "ConvTranspose", "LSTM", "GRU", "RNN")
    for node in nodes:
        inputs = [v for v in node.inputs if v is not None]
        if is_onnx(node, "Cast"):
            hit = inputs[0].dtype in INTEGERS and is_float32(node.outputs[0])
        else:
            floats = [v for v in inputs if is_float32(v) and array(v) is None]
            hit = bool(floats) and all(v in values for v in floats) and not _is_layer(node)
        if is_onnx(node, "Range") and is_float32(node.outputs[0]):
            hit = True
        if hit:
            found[node] = "it computes with positions or counts: float16 holds integers up to 2048"
            if not is_onnx(node, *ends):
                values.update(v for v in node.outputs if is_float32(v))
    return found


def _is_layer(node: ir.Node) -> bool:
    """Whether a node multiplies by a constant matrix, or is one of the layers that do."""
    if is_onnx(node, "MatMul"):
        weights = [w for w in (array(v) for v in node.inputs) if w is not None]
        return any(w.ndim >= 2 and min(w.shape[-2:]) > 1 for w in weights)
    return is_onnx(node, "Conv", "Gemm", "ConvTranspose", "LSTM", "GRU", "RNN")
