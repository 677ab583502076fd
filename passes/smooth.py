"""smooth: outliers of activations moved into the weights that read them.

    x W = (x / s) (s W),    s_j = max|x_j|^alpha / max|W_j|^(1 - alpha)

What writes x, the scale and shift of a norm or a layer, is divided by s (`quantization.scales.groups`), so that
the graph stays as it is. For each group of channels alpha is the one of 0.3, 0.4, ..., 0.8 with which integers lose
least at the outputs of the layers that read it (`graphopt.numerics.smoothing`); none where that is no less than before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.base import Context, Effect, Pass, PassResult, Skip, option
from graphopt.errors import DataError
from graphopt.quantization.scales.groups import ScaleGroups, scale_groups
from graphopt.quantization.scales.rules import LAYERS
from graphopt.quantization.scales.scaling import apply_scales, log_limit
from graphopt.rewriting.names import Names
from graphopt.rewriting.nodes import is_onnx, label
from graphopt.rewriting.prepare import prepare
from graphopt.target import int8_scheme

if TYPE_CHECKING:
    from graphopt.numerics.smoothing import ChannelRange, Smoothing
    from graphopt.quantization.scales.readers import Reader
    from graphopt.target import QuantScheme


@dataclass(frozen=True)
class Smooth(Pass):
    """Move outlier channels of activations into the weights of the MatMul and Gemm that read them.

    What for: before `quantize`, where a few channels of a transformer are much larger than the others and take the
    steps of the integers.

    Algebra: x W = (x / s)(s W) for a positive diagonal s; s_j = max|x_j|^alpha / max|W_j|^(1 - alpha) over all that
    reads channel j. What writes x is divided: the scale and shift of a layer or RMS norm, or a layer, also through what
    scales pass (see `equalize`). Alpha is searched for each group of channels: least estimated error of the int8
    outputs on the calibration data, the grids being the target's.

    Does not fire: where scales stop (see `equalize`), on channels that convolutions or factors read, where a weight
    with one step for all outputs writes them, and where the estimated error would not shrink by a decibel. Preserves:
    structure, names, and with `power_of_two` the outputs bit for bit unless a number leaves the range of its type.
    Source: Xiao et al. 2022, SmoothQuant, arXiv:2211.10438.
    """

    name: ClassVar[str] = "smooth"
    effect: ClassVar[Effect] = Effect.EXACT
    needs_calibration: ClassVar[bool] = True

    power_of_two: bool = option(True, "round scales to powers of two: the outputs stay equal bit for bit")
    limit: float = option(2.0**20, "bound of a scale and of its inverse; 16 at most for 16-bit weights", low=1)
    samples: int = option(128, "calibration samples for the ranges", low=1)

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Smooth the main graph in place."""
        from graphopt.files.shape_inference import infer_shapes
        from graphopt.quantization.scales.readers import channel_ranges

        scheme = int8_scheme(ctx.target, "smooth")
        if ctx.calibration is None:
            raise DataError("no calibration data", where="smooth", hint="give unlabelled samples with --calib")
        result = PassResult(changed=False, notes=prepare(model))
        result.changed = bool(result.notes)
        infer_shapes(model)
        found = scale_groups(model.graph)
        groups, result.skipped = _smoothable(found, scheme.per_channel)
        result.skipped = [*(Skip(node, reason) for node, reason in found.frozen.items()), *result.skipped]
        every = [reader for readers in groups.values() for reader in readers]
        ranges = channel_ranges(model, every, ctx.calibration, samples=self.samples, threads=ctx.jobs)
        logs = np.zeros(1 + max((int(group.max()) for group in found.groups), default=0))
        rows: list[dict[str, Any]] = []
        for number, readers in groups.items():
            names = ", ".join(dict.fromkeys(label(r.operand.node) for r in readers))
            best = self._search(readers, ranges, len(logs), scheme)
            if isinstance(best, str):
                result.skipped.append(Skip(names, best))
                continue
            logs += best.logs
            gain = round(10 * float(np.log10(best.before / best.after)), 1)
            row = {"read by": names, "channels": len(found.groups[number]), "alpha": best.alpha, "gain dB": gain}
            rows.append(row)
        if rows:
            apply_scales(found, np.exp2(logs), Names(model))
            result.changed = True
            result.details["smoothed channels"] = rows
        result.notes.append(f"{len(rows)} of {len(groups)} groups of channels smoothed")
        return result

    def _search(
        self, readers: list[Reader], ranges: dict[str, ChannelRange], count: int, scheme: QuantScheme
    ) -> Smoothing | str:
        """The best scales of a group; or why it has none."""
        from graphopt.numerics.rounding import Grid
        from graphopt.numerics.smoothing import smoothed

        if any(ranges[r.source].nonfinite for r in readers):
            return "reads inf or nan on the calibration data"
        best = smoothed(
            [r.layer(ranges[r.source]) for r in readers],
            count,
            Grid.of(scheme.activation, symmetric=scheme.symmetric_activation),
            Grid.of(scheme.weight, symmetric=True),
            per_channel=scheme.per_channel,
            limit=log_limit([r.operand for r in readers], self.limit),
            whole=self.power_of_two,
        )
        return "no alpha lessens the estimated error much" if best.alpha is None else best


def _smoothable(found: ScaleGroups, per_channel: bool) -> tuple[dict[int, list[Reader]], list[Skip]]:
    """The layers that read each group that can be smoothed, by its number; and why others cannot."""
    from graphopt.quantization.scales.readers import readers_of

    groups: dict[int, list[Reader]] = {}
    skipped = []
    for number, group in enumerate(found.groups):
        writers = dict.fromkeys(o.node for o in found.operands if o.weight and np.isin(o.divide, group).any())
        readers = readers_of(found, group)
        if not isinstance(readers, str) and not per_channel and any(is_onnx(node, *LAYERS) for node in writers):
            readers = "its weight has one step for all channels, which scales would spread"
        if isinstance(readers, str):
            skipped += [Skip(label(node), readers) for node in writers]
        else:
            groups[number] = readers
    return groups, skipped
