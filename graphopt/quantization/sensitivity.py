"""How much each part of a rewrite disturbs the outputs of a model: alone, and among the others."""

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


@dataclass(frozen=True)
class Rule:
    """When parts of a rewrite are left out because of the noise they make; see `culprits`.

    Attributes:
        accurate: noise-to-signal power up to which nothing is left out (1e-3 is 30 dB).
        gain: by what factor leaving parts out must lower the noise.
        poor: noise-to-signal power above which getting below it is worth it even without that gain (1e-2 is 20 dB).
        share: the fraction of the work that may be left out.
    """

    accurate: float = 1e-3
    gain: float = 10.0
    poor: float = 1e-2
    share: float = 0.25


def culprits(
    noise: Mapping[Key, float],
    work: Mapping[Key, float],
    total: float,
    without: Callable[[Sequence[Key]], float],
    rule: Rule,
) -> list[Key]:
    """The fewest parts, worst first, that must be left out to make the rest accurate; none where that does not pay.

    Candidates are the parts in order of the noise they make alone, as long as their work fits into `rule.share`. The
    shortest run of them is sought (by bisection; noise falls as parts are left out) that lowers the noise by
    `rule.gain`; where none does and the noise is above `rule.poor`, the shortest that brings it below. Otherwise the
    noise is spread over many parts, and leaving some out would cost speed for little. A run that was found goes on as
    long as the next candidate makes more noise than all parts after it together.

    Args:
        noise: of each part alone.
        work: of each part, in any unit.
        total: noise of all parts together.
        without: measures the noise of all parts but those given.
        rule: the thresholds.
    """
    if total <= rule.accurate:
        return []
    budget = rule.share * sum(work.values())
    order: list[Key] = []
    for key in sorted(noise, key=lambda key: -noise[key]):
        if noise[key] > 0 and work[key] <= budget:
            budget -= work[key]
            order.append(key)
    measured: dict[int, float] = {0: total}

    def noise_without(count: int) -> float:
        if count not in measured:
            measured[count] = without(order[:count])
        return measured[count]

    for target in (total / rule.gain, rule.poor):
        if target < total and order and noise_without(len(order)) <= target:
            low, high = 0, len(order)
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (low, middle) if noise_without(middle) <= target else (middle, high)
            while high < len(order) and noise[order[high]] > _rest(noise, order[: high + 1]):
                high += 1
            return order[:high]
    return []


def _rest(noise: Mapping[Key, float], left_out: Sequence[Key]) -> float:
    gone = set(left_out)
    return sum(power for key, power in noise.items() if key not in gone)
