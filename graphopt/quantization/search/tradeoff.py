"""Which layers stay in float: those whose noise costs more than their time saves.

What is made small is one sum, in multiples of the time of the model with everything in integers,

    J(S) = ((speedup - 1) work(S) + borders(S)) / work(all) + each |S| + price(noise without S),

over sets S of layers left in float. Borders are tensors between a layer in float and one in integers: each is converted
on its way, so that an island in float costs more than its own work, and neighbours cost less together than apart.

The price of noise has two terms. One is proportional to its power, since a trained model stands near a minimum of its
loss, where a small disturbance costs in proportion to its square. The other counts decibels, up to where they stop to
matter: a layer that alone makes most of the noise is worth its time even where the noise is small. Work is
multiply-accumulates and tensor elements moved, not time, so that a model comes out the same on every machine.

Noise that is spread over many layers stays: leaving out the share s of it costs (speedup - 1) s and gains s of the
first term and -10 log10(1 - s) dB of the second, which is less. Layers without work of their own (the last matrix
behind a pooling) go as soon as they gain a little.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Price:
    """What noise costs, in multiples of the time of the model in integers.

    Attributes:
        speedup: how many times as long the work takes in float.
        each: what a layer in float costs besides its work: kernels that convert, and one exception more to know.
        ruin: noise-to-signal power that costs 1. At 2e-2 (17 dB) the outputs have a cosine of .99 with the float
            model's: one per cent of fidelity, the drop that presets allow.
        decibel: what each dB below `enough` costs: 10 dB are worth half of the time.
        enough: signal to noise in dB beyond which a dB costs a tenth of that.
        exact: signal to noise in dB beyond which nothing is gained.
    """

    speedup: float = 2.5
    each: float = 0.03
    ruin: float = 2e-2
    decibel: float = 0.05
    enough: float = 35.0
    exact: float = 60.0

    def of_noise(self, noise: float) -> float:
        """The price of a noise-to-signal power."""
        if not math.isfinite(noise):
            return math.inf
        reached = -10 * math.log10(noise) if noise > 0 else self.exact
        missing = max(0.0, self.enough - reached)
        fine = max(0.0, self.exact - max(self.enough, reached))
        return noise / self.ruin + self.decibel * (missing + fine / 10)


def kept_in_float(
    noise: Mapping[str, float],
    work: Mapping[str, float],
    total: float,
    without: Callable[[Sequence[str]], float],
    price: Price | None = None,
    *,
    borders: Callable[[Sequence[str]], float] = lambda keys: 0.0,
    runs: int = 32,
) -> list[str]:
    """The layers to leave in float; none where all in integers is best.

    Layers are ranked by noise over work, and the best length of the ranking is sought, first coarsely; then each member
    is tried in integers again, because layers that share a tensor show its noise twice.

    Args:
        noise: of each layer alone, noise-to-signal power at the outputs.
        work: of each layer, in any unit.
        total: noise of all layers together.
        without: measures the noise of all layers but those given.
        price: of noise.
        borders: work of the conversions that these layers in float need among the others, in the unit of `work`.
        runs: measurements at most.

    Returns:
        Their keys, the best ratio first.
    """
    search = _Search(noise, work, without, price or Price(), borders, runs)
    return search.run(total)


class _Search:
    def __init__(
        self,
        noise: Mapping[str, float],
        work: Mapping[str, float],
        without: Callable[[Sequence[str]], float],
        price: Price,
        borders: Callable[[Sequence[str]], float],
        runs: int,
    ) -> None:
        self.work, self.without, self.price, self.borders, self.runs = work, without, price, borders, runs
        self.all_work = sum(work.values()) or 1.0
        self.order = sorted((k for k in noise if noise[k] > 0), key=lambda k: self._time([k]) / noise[k])

    def run(self, total: float) -> list[str]:
        found = self._prefixes(total)
        length = min(found, key=lambda n: found[n])
        return self._thinned(self.order[:length], found[length])

    def _least(self, keys: Sequence[str]) -> float:
        """Their time in float with nothing to convert: no set that holds them takes less."""
        work = sum(self.work[k] for k in keys) / self.all_work
        return self.price.each * len(keys) + (self.price.speedup - 1) * work

    def _time(self, keys: Sequence[str]) -> float:
        return self._least(keys) + self.borders(keys) / self.all_work

    def _cost(self, keys: Sequence[str]) -> float:
        self.runs -= 1
        return self._time(keys) + self.price.of_noise(self.without(keys))

    def _prefixes(self, total: float) -> dict[int, float]:
        """J by the length of the ranking that is left out: at growing lengths, then between the best neighbours."""
        found = {0: self.price.of_noise(total)}
        length = 1
        while length <= len(self.order) and self._least(self.order[:length]) < min(found.values()):
            found[length] = self._cost(self.order[:length])
            longer = max(length + 1, length * 3 // 2)
            length = min(longer, len(self.order)) if length < len(self.order) else longer
        while self.runs > 0:
            best = min(found, key=lambda n: found[n])
            gaps = [(a + b) // 2 for a, b in pairwise(sorted(found)) if best in (a, b) and b - a > 1]
            gaps = [n for n in gaps if self._least(self.order[:n]) < found[best]]
            if not gaps:
                break
            for middle in gaps:
                found[middle] = self._cost(self.order[:middle])
        return found

    def _thinned(self, keys: list[str], cost: float) -> list[str]:
        """Without the members that cost more in float than they gain, the dearest first."""
        for key in sorted(keys, key=lambda k: -self.work[k]):
            if self.runs <= 0:
                break
            fewer = [k for k in keys if k != key]
            trial = self._cost(fewer)
            if trial < cost:
                keys, cost = fewer, trial
        return keys
