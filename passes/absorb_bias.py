"""absorb-bias: what all values of a channel have in common goes into the biases behind it.

    f(z) = f(z - c) + c      f = relu, for 0 <= c <= z; pooling and data movement, for any c
    W f(z) + b = W f(z - c) + (b + W c)

A channel that never falls below c > 0 spends integers on what never changes. c is the least value of the channel on the
calibration data, and no more than its mean less three standard deviations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from graphopt.base import Context, Effect, Pass, PassResult, Skip, option
from graphopt.calibration import Calibration, activations
from graphopt.errors import DataError
from graphopt.files.shape_inference import infer_shapes
from graphopt.rewriting.linear import LINEAR_OPS, Linear, linear_view
from graphopt.rewriting.names import Names
from graphopt.rewriting.nodes import is_onnx, label

Floats = NDArray[np.float64]

DEVIATIONS = 3.0
"""Standard deviations that a channel may fall below its mean before the shift stops being exact (Nagel et al.)."""

WORTH = 0.01
"""Smallest shift, as a share of the channel's greatest value: less frees no integer."""

LEAST_SAMPLES = 32
"""With fewer samples the least value says little about others; a range cut off there hides noise on the data itself."""

_PASSING = ("Relu", "Identity", "Dropout", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Flatten")


@dataclass(frozen=True)
class AbsorbBias(Pass):
    """Move the part of a channel that never changes into the biases of the layers that read it.

    What for: before `quantize`, where biases lift whole channels above zero, as `equalize` can leave them.

    Algebra: W relu(z) + b = W relu(z - c) + (b + W c) wherever z >= c >= 0; through pooling and Flatten too. c of a
    channel is the least of its values on the calibration data, or its mean less three standard deviations if that is
    less. The outputs are those of before, up to rounding, for all inputs on which channels stay above their c.

    Does not fire: where what reads the channel is no layer with a constant weight (an Add, an output of the graph), in
    front of a zero-padded convolution (the padding does not carry the shift), on fewer than 32 samples, in bodies of
    If, Loop and Scan.
    Preserves: structure but for biases that layers get, and names.
    Source: Nagel et al. 2019, arXiv:1906.04721, section 4.1.3.
    """

    name: ClassVar[str] = "absorb-bias"
    effect: ClassVar[Effect] = Effect.LOSSY
    needs_calibration: ClassVar[bool] = True

    samples: int = option(128, "calibration samples for the values of channels", low=1)

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Absorb in the main graph, in place."""
        if ctx.calibration is None:
            raise DataError("no calibration data", where=self.name, hint="give unlabelled samples with --calib")
        infer_shapes(model)
        result = PassResult(changed=False)
        sites = []
        for node in model.graph:
            if is_onnx(node, *LINEAR_OPS):
                found = _site(node, model.graph.opset_imports.get("", 1))
                if isinstance(found, str):
                    result.skipped.append(Skip(label(node), found))
                else:
                    sites.append(found)
        values = _values(model, sites, ctx.calibration, self.samples, ctx.jobs)
        names = Names(model)
        rows: list[dict[str, Any]] = []
        for site in sites:
            seen = values[site.output]
            shift = seen.shift()
            if seen.samples < LEAST_SAMPLES:
                blocked: str | None = f"seen on {seen.samples} samples, and {LEAST_SAMPLES} are needed"
            else:
                blocked = _absorb(site, shift, names) if shift.any() else "no channel of it stays above zero"
            if blocked:
                result.skipped.append(Skip(label(site.writer.node), blocked))
            else:
                rows.append(
                    {
                        "written by": label(site.writer.node),
                        "read by": ", ".join(label(r.node) for r in site.readers),
                        "channels": int(np.count_nonzero(shift)),
                        "largest shift": float(shift.max()),
                    }
                )
        if rows:
            result.changed = True
            result.details["absorbed biases"] = rows
        result.notes.append(f"{len(rows)} of {len(sites)} layers gave a part of their bias to the layers behind them")
        return result


@dataclass(frozen=True)
class _Site:
    """A layer that writes channels, and the layers that read them."""

    writer: Linear
    readers: tuple[Linear, ...]

    @property
    def output(self) -> str:
        """Name of what is written."""
        return str(self.writer.output.name)


def _site(node: ir.Node, opset: int) -> _Site | str:
    writer = linear_view(node, opset=opset)
    if isinstance(writer, str):
        return writer
    readers: list[Linear] = []
    waiting = [writer.output]
    axis = writer.channel_axis(_rank(writer.output))
    while waiting:
        value = waiting.pop()
        if value.is_graph_output():
            return f"'{value.name}' is an output of the graph"
        if not value.shape or axis >= len(value.shape):
            return f"the shape of '{value.name}' is not known"
        for use in value.uses():
            if is_onnx(use.node, *LINEAR_OPS):
                reader = linear_view(use.node, opset=opset)
                if isinstance(reader, str):
                    return f"read by '{label(use.node)}': {reader}"
                if use.idx != 0 or reader.channel_axis(len(value.shape)) != axis or reader.inputs != writer.outputs:
                    return f"'{label(use.node)}' mixes its channels with positions"
                if reason := reader.shift_blocked():
                    return f"read by '{label(use.node)}': {reason}"
                readers.append(reader)
            elif reason := _stops(use.node, value):
                return f"read by '{label(use.node)}': {reason}"
            else:
                waiting.append(use.node.outputs[0])
    return _Site(writer, tuple(readers)) if readers else "nothing reads it"


def _rank(value: ir.Value) -> int:
    return len(value.shape) if value.shape else 0


def _stops(node: ir.Node, value: ir.Value) -> str | None:
    """Why a shift of the channels of `value` is no shift of what the node gives; None where it is."""
    if not is_onnx(node, *_PASSING):
        return f"a shift does not pass {node.op_type}"
    if any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
        return "its second output is in use"
    padded = any(node.attributes.get_ints("pads", ())) or node.attributes.get_int("ceil_mode", 0) != 0
    if is_onnx(node, "AveragePool") and (padded or node.attributes.get_string("auto_pad", "NOTSET") != "NOTSET"):
        return "it averages over padding"
    if is_onnx(node, "Flatten"):
        shape = tuple(value.shape or ())
        if node.attributes.get_int("axis", 1) != 1 or any(d != 1 for d in shape[2:]):
            return "it mixes channels with positions"
    return None


@dataclass
class _Values:
    """Least value, sum and sum of squares of each channel, as the data goes by."""

    least: Floats
    greatest: Floats
    total: Floats
    squares: Floats
    count: int = 0
    samples: int = 0

    @classmethod
    def of(cls, channels: int) -> _Values:
        return cls(np.full(channels, np.inf), np.full(channels, -np.inf), np.zeros(channels), np.zeros(channels))

    def update(self, rows: Floats, samples: int) -> None:
        """Take more values, (channels, positions of all samples)."""
        if rows.shape[1]:
            self.samples += samples
            np.minimum(self.least, rows.min(axis=1), out=self.least)
            np.maximum(self.greatest, rows.max(axis=1), out=self.greatest)
            self.total += rows.sum(axis=1)
            self.squares += np.square(rows).sum(axis=1)
            self.count += rows.shape[1]

    def shift(self) -> Floats:
        """What can be taken off each channel, (channels,); 0 where it is not worth it."""
        if not self.count or not np.isfinite(self.squares).all():
            return np.zeros_like(self.total)
        mean = self.total / self.count
        deviation = np.sqrt(np.maximum(self.squares / self.count - np.square(mean), 0))
        shift = np.maximum(np.minimum(self.least, mean - DEVIATIONS * deviation), 0)
        return np.where(shift > WORTH * self.greatest, shift, 0)


def _values(
    model: ir.Model, sites: Sequence[_Site], calibration: Calibration, samples: int, threads: int
) -> dict[str, _Values]:
    writers = {site.output: site.writer for site in sites}
    found = {name: _Values.of(writer.outputs) for name, writer in writers.items()}
    for tensors in activations(model, list(found), calibration, limit=samples, threads=threads):
        for name, tensor in tensors.items():
            axis = writers[name].channel_axis(tensor.ndim)
            rows = np.moveaxis(tensor, axis, 0).reshape(tensor.shape[axis], -1).astype(np.float64)
            found[name].update(rows, samples=len(tensor))
    return found


def _absorb(site: _Site, shift: Floats, names: Names) -> str | None:
    """Move `shift` from the writer to the readers; the reason where that cannot be, and then nothing changed."""
    one = np.ones_like(shift)
    for reader in site.readers:
        if reason := reader.before_blocked(one, shift):
            return f"read by '{label(reader.node)}': {reason}"
    origin = [label(site.writer.node)]
    if reason := site.writer.fold_after(one, -shift, names, origin):
        return reason
    for reader in site.readers:
        reason = reader.fold_before(one, shift, names, origin)
        assert reason is None  # before_blocked said so
    return None
