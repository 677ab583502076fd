"""How much each part of a rewrite disturbs the outputs of a model: alone, and among the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
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

    Attributes:
        samples: how many there are.
    """

    def __init__(
        self, model: ir.Model, calibration: Calibration, *, samples: int, threads: int = 1, optimize: bool = True
    ) -> None:
        self._threads = threads
        self._optimize = optimize
        counted = list(calibration.counted(limit=samples))
        self._feeds = [feeds for feeds, _ in counted]
        self.samples = sum(count for _, count in counted)
        with_session = Session(model, optimize=True, threads=threads, shapes=False)
        self._outputs = [with_session.run(feeds) for feeds in self._feeds]
        with_session.close()

    def noise(self, model: ir.Model) -> float:
        """Noise-to-signal power of the worst floating-point output: sum (y - y_ref)^2 / sum y_ref^2; 0 is exact.

        Places where the reference is not finite are left out; a candidate that is not finite elsewhere gives inf.
        """
        session = Session(model, optimize=self._optimize, threads=self._threads, shapes=False)
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
        most: runs at most; see `by_halves`.

    Returns:
        noise-to-signal power by key.
    """
    return by_halves(keys, lambda part: reference.noise(variant(part)), progress, most=most)


def recovered(
    reference: Reference, keys: Sequence[Key], total: float, without: Callable[[Sequence[Key]], ir.Model],
    progress: Progress, *, most: int = 32,
) -> dict[Key, float]:  # fmt: skip
    """By how much the noise of the whole falls where one key's rewrite alone is taken back.

    It differs from the noise of the rewrite alone where errors meet: what only amplifies the errors of others recovers
    much, and one of two layers that round the same tensor recovers nothing without the other.

    Args:
        reference: outputs to compare with.
        keys: parts of the rewrite, in graph order.
        total: noise-to-signal power with all of them.
        without: makes a model in which all but the given parts are rewritten.
        progress: told of every step.
        most: runs at most; see `by_halves`.

    Returns:
        noise-to-signal power by key; negative where taking the rewrite back makes the noise larger.
    """
    return by_halves(keys, lambda part: total - reference.noise(without(part)), progress, most=most)


def by_halves(
    keys: Sequence[Key], effect: Callable[[Sequence[Key]], float], progress: Progress, *, most: int
) -> dict[Key, float]:
    """The effect of each key in at most `most` measurements.

    With more keys than that, neighbours are measured together and share the effect evenly, and the groups with the
    largest effect for a key are halved as long as measurements are left.
    """
    if not keys:
        return {}
    size = -(-len(keys) // most) if len(keys) <= most else -(-2 * len(keys) // most)
    groups = [tuple(keys[start : start + size]) for start in range(0, len(keys), size)]
    found: dict[tuple[Key, ...], float] = {}
    runs = 0
    while groups and runs < most:
        progress.step("sensitivity", runs, min(len(keys), most))
        group = groups.pop(0)
        found[group] = effect(group)
        runs += 1
        if not groups and runs + 2 <= most:
            worst = max(found, key=lambda g: abs(found[g]) / len(g) if len(g) > 1 else -1.0)
            if len(worst) > 1:
                del found[worst]
                groups = [worst[: len(worst) // 2], worst[len(worst) // 2 :]]
    return {key: effect / len(group) for group, effect in found.items() for key in group}
