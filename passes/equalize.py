"""equalize: the ranges of channels made alike, by scales that commute with everything between two layers.

    W2 f(W1 x + b1) = (W2 S) f(S^-1 W1 x + S^-1 b1),    S = diag(s), s > 0, f(c x) = c f(x) for c > 0

With r1_i and r2_i the largest magnitudes in row i of W1 and column i of W2, s_i = sqrt(r1_i / r2_i) makes them equal.
A scale may stand on any number of layers that write a channel and that read it: those of a residual stream, of a
concatenation, of heads (`quantization.scales.groups`). With powers of two every product and every sum keeps its
mantissa, so that the outputs are equal bit for bit; ranges are then up to sqrt(2) off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from graphopt.base import Context, Effect, Pass, PassResult, Skip, option
from graphopt.numerics.equalization import Magnitudes, equalised
from graphopt.quantization.scales.groups import ScaleGroups, scale_groups
from graphopt.quantization.scales.scaling import apply_scales, log_limit
from graphopt.quantization.scales.walk import ScaledOperand
from graphopt.rewriting.constants import float64
from graphopt.rewriting.names import Names
from graphopt.rewriting.nodes import label
from graphopt.rewriting.prepare import prepare


@dataclass(frozen=True)
class Equalize(Pass):
    """Make the ranges of channels alike by scales between layers, so that one integer step suits all channels.

    What for: before `quantize`, where single channels are much larger or smaller than the others. Needs no data.

    Algebra: W2 f(W1 x + b1) = (W2 S) f(S^-1 W1 x + S^-1 b1) for a positive diagonal S and a positively homogeneous f;
    s_i = sqrt(r1_i / r2_i) with the largest magnitudes r1_i of what writes channel i and r2_i of what reads it. Scales
    go through Relu, LeakyRelu, PRelu, pooling, data movement, sums, products with what keeps its own scale (gates,
    attention), and into and out of Conv, ConvTranspose, Gemm, MatMul, BatchNormalization, factors and tables of
    embeddings; the scale of a norm writes channels too. Layers are settled sweep by sweep until nothing moves.

    Does not fire: through operators that are not positively homogeneous (Sigmoid, Gelu, Softmax, a Clip with bounds
    other than 0, as in ReLU6), on inputs and outputs of the graph, in and across bodies of If, Loop and Scan, on
    weights that are not constant or that something else reads. Each layer whose channels keep their scale is listed
    with the reason. Preserves: structure, names, zeros, and with `power_of_two` the outputs bit for bit unless a number
    leaves the range of its type.
    Source: Nagel et al. 2019, arXiv:1906.04721, section 4.1.
    """

    name: ClassVar[str] = "equalize"
    effect: ClassVar[Effect] = Effect.EXACT

    power_of_two: bool = option(True, "round scales to powers of two: the outputs stay equal bit for bit")
    limit: float = option(2.0**20, "bound of a scale and of its inverse; 16 at most for 16-bit weights", low=1)

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Equalise the main graph in place."""
        from graphopt.files.shape_inference import infer_shapes

        result = PassResult(changed=False, notes=prepare(model))
        result.changed = bool(result.notes)
        infer_shapes(model)
        found = scale_groups(model.graph)
        result.skipped = [Skip(node, reason) for node, reason in found.frozen.items()]
        weights = [o for o in found.operands if o.weight]
        magnitudes, offsets = (
            [Magnitudes.of(_data(o), o.divide, o.multiply) for o in found.operands if o.weight == weight]
            for weight in (True, False)
        )
        logs = equalised(
            magnitudes, found.groups, offsets, limit=log_limit(weights, self.limit), whole=self.power_of_two
        )
        if not logs.any():
            result.notes.append("no channels whose ranges differ and could be made alike")
            return result
        changed = apply_scales(found, np.exp2(logs), Names(model))
        result.changed = True
        result.details["equalised channels"] = _rows(found, logs)
        result.notes.append(
            f"{np.count_nonzero(logs)} channels scaled by 2^{logs.min():.3g} to 2^{logs.max():.3g} "
            f"in {changed} constants"
        )
        return result


def _data(operand: ScaledOperand) -> NDArray[np.float64]:
    found = float64(operand.value)
    assert found is not None
    return found


def _rows(found: ScaleGroups, logs: NDArray[np.float64]) -> list[dict[str, Any]]:
    """A row for each group of channels whose scales changed."""
    rows: list[dict[str, Any]] = []
    for group in found.groups:
        if not logs[group].any():
            continue
        weights = [o for o in found.operands if o.weight]
        writers = dict.fromkeys(label(o.node) for o in weights if np.isin(o.divide, group).any())
        readers = dict.fromkeys(label(o.node) for o in weights if np.isin(o.multiply, group).any())
        rows.append(
            {
                "written by": ", ".join(writers),
                "read by": ", ".join(readers),
                "channels": len(group),
                "smallest scale": float(np.exp2(logs[group].min())),
                "largest scale": float(np.exp2(logs[group].max())),
            }
        )
    return rows
