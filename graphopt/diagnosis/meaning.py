"""Tensors of B that have the name of a tensor of A and another meaning: told by their values, on a few samples.

*Undone*: channels that were scaled and are scaled back, a stream that was centred. Their readers come out `UNDONE`
times worse on A's values than in B itself, which no error of a layer does.

*Later*: a convolution that kept its name and computes the norm and the activation behind it as well, of a tool that
notes no provenance. B's tensor is off, and close to what A computes there a few nodes later.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import onnx_ir as ir

from graphopt.calibration import Calibration
from graphopt.data.activations import submodel
from graphopt.diagnosis.matching import READABLE, Pair, shapes_fit
from graphopt.diagnosis.running import PROBED
from graphopt.diagnosis.sums import Both, Sums
from graphopt.rewriting.edit import sole_use
from graphopt.verify import SLICE_BYTES, Runner

UNDONE = 10.0
"""Noise power of a layer on A's values over its noise power in B, from which the layer undoes something; see above."""

POOR_DB = 20.0
"""A layer that adds an error above this (1 % noise power) is bad by itself."""

GAIN_DB = 10.0
"""A later tensor of A that is closer by this is what B computes."""

STEPS = 4
"""Nodes that a tool folds into one at most: a norm in several, an activation."""


def undone(sums: Mapping[Pair, Both], read: Mapping[Pair, Sequence[Pair]]) -> dict[Pair, str]:
    """Tensors by which B means something else: their readers are right in B, and wrong on A's values."""
    found: dict[Pair, str] = {}
    for pair, both in sums.items():
        added, total = both.added.error(), both.total.error()
        if added.sqnr_db > POOR_DB or both.added.noise <= UNDONE * both.total.noise:
            continue
        for source in read[pair]:
            off = sums[source].total.error().sqnr_db
            # Only a tensor that is further off than what is computed from it can have been undone there.
            if off < total.sqnr_db - 10 * math.log10(UNDONE):
                found[source] = (
                    f"{source.b.name} of B holds other values ({off:.1f} dB), and what computes {pair.name} "
                    f"({total.sqnr_db:.1f} dB) undoes that: it means something else"
                )
    return found


def later(
    a: ir.Model, b: ir.Model, sums: Mapping[Pair, Both], calibration: Calibration, threads: int
) -> dict[Pair, Pair]:
    """For tensors of B that are off: the pair with a later tensor of A that they are close to, where there is one.

    That tensor of A may have another counterpart already.
    """
    off = {
        pair: candidates
        for pair, both in sums.items()
        if both.total.error().sqnr_db < POOR_DB and (candidates := list(_behind(pair)))
    }
    feeds = next(calibration.batches(1, 1))
    found = {}
    suspects = list(off)
    for start in range(0, len(suspects), PROBED):
        part = suspects[start : start + PROBED]
        wanted = [str(value.name) for pair in part for value in (pair.a, *off[pair])]
        first = Runner(submodel(a, list(dict.fromkeys(wanted))), threads, SLICE_BYTES).run_all([feeds])[0]
        second = Runner(submodel(b, [str(p.b.name) for p in part]), threads, SLICE_BYTES).run_all([feeds])[0]
        for pair in part:
            quality = {}
            for value in (pair.a, *off[pair]):
                x, y = first[str(value.name)], second[str(pair.b.name)]
                if x.shape == y.shape:
                    quality[value] = Sums()
                    quality[value].add(x, y)
            decibel = {value: total.error().sqnr_db for value, total in quality.items()}
            best = max(decibel, key=lambda value: decibel[value])
            if decibel[best] > max(decibel[pair.a], 0.0) + GAIN_DB:
                found[pair] = Pair(best, pair.b, "value")
    return found


def _behind(pair: Pair) -> Iterator[ir.Value]:
    """The tensors of A that are computed from this one alone, next ones first."""
    value = pair.a
    for _ in range(STEPS):
        use = sole_use(value)
        if use is None or len(use.node.outputs) != 1:
            return
        value = use.node.outputs[0]
        if shapes_fit(value.shape, pair.b.shape) and value.dtype in (None, *READABLE):
            yield value
