"""How much each part of a rewrite alone disturbs the outputs of a model, measured on a few calibration samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from graphopt.calibration import Calibration
from graphopt.executor import Session
from graphopt.progress import Progress

Array = NDArray[Any]
Key = TypeVar("Key", bound=Hashable)


class Reference:
    """The outputs of the untouched model on a few samples, and how far other models are from them.

    Args:
        model: the reference.
        calibration: the data.
        samples: how many samples to use.
        threads: of the runtime.
        optimize: run candidates as the runtime would optimise them (integer kernels) or node by node.
    """

    def __init__(
        self, model: ir.Model, calibration: Calibration, *, samples: int, threads: int = 1, optimize: bool = True
    ) -> None:
        self._threads = threads
        self._optimize = optimize
        self._feeds = list(calibration.batches(limit=samples))
        with_session = Session(model, optimize=True, threads=threads)
        self._outputs = [with_session.run(feeds) for feeds in self._feeds]
        with_session.close()

    def noise(self, model: ir.Model) -> float:
        """Noise-to-signal power of the worst floating-point output: sum (y - y_ref)^2 / sum y_ref^2; 0 is exact.

        Places where the reference is not finite are left out; a candidate that is not finite elsewhere gives inf.
        """
        session = Session(model, optimize=self._optimize, threads=self._threads)
        power: dict[str, list[float]] = {}
        for feeds, expected in zip(self._feeds, self._outputs, strict=True):
            for name, found in session.run(feeds).items():
                want = expected[name]
                if want.dtype.kind != "f":
                    continue
                keep = np.isfinite(want)
                difference = found[keep].astype(np.float64) - want[keep].astype(np.float64)
                sums = power.setdefault(name, [0.0, 0.0])
                sums[0] += float(np.sum(np.square(difference)))
                sums[1] += float(np.sum(np.square(want[keep], dtype=np.float64)))
        session.close()
        return max((_ratio(*sums) for sums in power.values()), default=0.0)


def _ratio(noise: float, signal: float) -> float:
    if not math.isfinite(noise):
        return math.inf
    if noise == 0:
        return 0.0
    return noise / signal if signal > 0 else math.inf


def decibel(noise: float) -> float:
    """Signal-to-noise ratio in dB of a noise-to-signal power; inf for no noise."""
    if noise <= 0:
        return math.inf
    return -10 * math.log10(noise) if math.isfinite(noise) else -math.inf


def measure(
    reference: Reference, keys: Sequence[Key], variant: Callable[[Sequence[Key]], ir.Model], progress: Progress,
    *, most: int = 128,
) -> dict[Key, float]:  # fmt: skip
    """The noise of each key's rewrite alone.

    Args:
        reference: outputs to compare with.
        keys: parts of the rewrite, in graph order.
        variant: makes a model in which only the given parts are rewritten.
        progress: told of every step.
        most: runs at most; with more keys, neighbours are measured together and share the noise evenly.

    Returns:
        noise-to-signal power by key.
    """
    size = -(-len(keys) // most) if keys else 1
    noise: dict[Key, float] = {}
    for start in range(0, len(keys), size):
        group = keys[start : start + size]
        progress.step("sensitivity", start, len(keys))
        together = reference.noise(variant(group))
        noise.update((key, together / len(group)) for key in group)
    return noise


@dataclass(frozen=True)
class Rule:
    """When a part of a rewrite is left out because of the noise it makes; see `dominant`.

    Attributes:
        accurate: total noise-to-signal power up to which nothing is left out (1e-3 is 30 dB).
        gain: by what factor leaving parts out must lower the total.
        share: the fraction of all parts that may be left out; two always may.
    """

    accurate: float = 1e-3
    gain: float = 10.0
    share: float = 0.15


def dominant(noise: Mapping[Key, float], rule: Rule) -> list[Key]:
    """The few parts that cause nearly all of the noise, worst first; none where noise is small or spread out.

    Noise powers of parts rewritten one at a time add up to that of all together as long as they are small and
    independent, so the sum stands for the total. The fewest parts are taken whose absence lowers it by `rule.gain`; if
    more than `rule.share` of the parts would be needed, the noise has no culprits, and leaving out layers would cost
    speed for little.
    """
    order = sorted(noise, key=lambda key: -noise[key])
    total = sum(noise.values())
    most = max(2, int(rule.share * len(order)))
    if total <= rule.accurate:
        return []
    for count in range(1, min(most, len(order)) + 1):
        if sum(noise[key] for key in order[count:]) <= total / rule.gain:
            return order[:count]
    return []
