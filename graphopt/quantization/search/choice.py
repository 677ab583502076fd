"""Which format each class of layers gets: a descent on measured time ratios, from the best of a few usual mixtures.

What is fast on a processor is not told by counting operations: one int8 kernel takes a third of the float one's time
and its neighbour eighteen times as long. So classes of layers (`classes`) change format in turn,
whole models are timed beside the best one so far, and a change stays where it was shown to be faster. The time to beat
is that of the model in float, on every shape of the data: sequences of 16 tokens may lose what 256 tokens gain.

Nothing here runs a model; how mixtures are timed is given (`Compare`), so that the search can be tested with any clock.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from graphopt.quantization.formats import Format

Key = TypeVar("Key", bound=Hashable)

Mixture = Mapping[str, Format]
"""The format of each class of layers, by the name of the class."""

FLOAT: Format = "float"

GAIN = 0.01
"""A change must be shown to save this share of the time: two sessions of one model differ by nearly as much."""

QUIETER = 4.0
"""A change that costs no time is made where it lowers the noise of its class by this factor, 6 dB."""

ROUNDS = 4
"""Rounds of the descent at most; each tries all classes."""

AT_ONCE = 5
"""Changes that are timed beside each other; between such parts the time is looked at."""

HOPELESS = 1.1
"""A change that made the model slower than this is not tried again in later rounds."""


@dataclass(frozen=True)
class Ratio:
    """Time over a reference's, for each shape of the data: medians and their 95 % intervals."""

    values: tuple[float, ...]
    lows: tuple[float, ...]
    highs: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Geometric mean over the shapes."""
        return math.exp(sum(map(math.log, self.values)) / len(self.values))

    @property
    def certainly_below(self) -> float:
        """The upper end of the interval of `mean`; half widths of independent measurements add up as squares."""
        widths = [math.log(high / value) for value, high in zip(self.values, self.highs, strict=True)]
        return self.mean * math.exp(math.sqrt(sum(w * w for w in widths)) / len(widths))

    def over(self, other: Ratio) -> tuple[float, ...]:
        """Ratios to another model that was timed against the same reference, shape by shape."""
        return tuple(a / b for a, b in zip(self.values, other.values, strict=True))

    def shown_above(self, bound: float) -> bool:
        """Whether the time of some shape is above the bound beyond its noise."""
        return max(self.lows) > bound

    def __str__(self) -> str:
        return "/".join(f"{value:.2f}" for value in self.values)


Compare = Callable[[Mixture, Sequence[Mixture]], Sequence[Ratio]]
"""Times of mixtures over the time of the first, measured in turn."""


@dataclass(frozen=True)
class Trial:
    """One change of one class that was timed.

    Attributes:
        group: the class.
        before, format: the format that it had, and that it was given.
        ratio: time of the whole model over that before the change.
        of_float: the same over that of the model in float, shape by shape.
    """

    group: str
    before: Format
    format: Format
    ratio: Ratio
    of_float: tuple[float, ...]


@dataclass
class Search:
    """What a search found.

    Attributes:
        found: mixtures to try, the fastest first, each with its time over float's: those that seemed faster than float.
        starts: the usual mixtures, by name, and their times over that of float.
        trials: every change that was timed.
        stopped: True where time ran out.
    """

    found: list[tuple[dict[str, Format], float]] = field(default_factory=list)
    starts: dict[str, Ratio] = field(default_factory=dict)
    trials: list[Trial] = field(default_factory=list)
    stopped: bool = False


def search(
    formats: Mapping[str, Sequence[Format]],
    base: Mixture,
    starts: Mapping[str, Mixture],
    compare: Compare,
    noise: Callable[[str, Format], float],
    *,
    bound: float,
    expired: Callable[[], bool] = lambda: False,
) -> Search:
    """Find the fastest mixture of formats.

    The descent begins at the fastest start, and at float as well where no start is faster than float. In each round all
    changes of one class are timed beside the mixture so far. Those shown to be faster, and those that are as fast and
    quieter, are made together where that is faster than the best of them alone.

    Args:
        formats: what each class may be, "float" among them.
        base: the model in float: what every class is there. Operators that follow their neighbours are "int8" in it,
            which changes nothing as long as no layer is.
        starts: usual mixtures, by name; classes they leave out are as in `base`.
        compare: times mixtures.
        noise: noise-to-signal power at the outputs of one class in one format; asked for where times are equal.
        bound: the largest ratio to float's time that a shape may have.
        expired: asked between measurements; True stops the search with what was found.
    """
    result = Search()
    in_float = dict(base)
    layers = [name for name, format in base.items() if format == FLOAT]

    def changes(mixture: Mixture) -> bool:
        return any(mixture[name] != FLOAT for name in layers)

    mixtures = {name: {**in_float, **mixture} for name, mixture in starts.items()}
    mixtures = {name: m for name, m in _distinct(mixtures).items() if changes(m)}
    if not mixtures:
        return result
    result.starts = dict(zip(mixtures, compare(in_float, list(mixtures.values())), strict=True))
    order = sorted(mixtures, key=lambda name: _score(result.starts[name].values, bound))
    best = _Descent(formats, in_float, noise, compare, bound, expired, result)
    scored = [best.run(mixtures[order[0]], result.starts[order[0]].values)]
    if _score(scored[0][1], bound) >= 1 - GAIN and not expired():
        scored.append(best.run(in_float, (1.0,) * len(scored[0][1])))
    scored += [(mixtures[name], result.starts[name].values) for name in order]
    scored.sort(key=lambda pair: _score(pair[1], bound))
    faster = {i: m for i, (m, ratios) in enumerate(scored) if _score(ratios, bound) < 1 - GAIN and changes(m)}
    result.found = [(mixture, _score(scored[i][1], bound)) for i, mixture in _distinct(faster).items()]
    return result


@dataclass
class _Descent:
    formats: Mapping[str, Sequence[Format]]
    in_float: Mixture
    noise: Callable[[str, Format], float]
    compare: Compare
    bound: float
    expired: Callable[[], bool]
    result: Search

    def run(self, mixture: dict[str, Format], ratios: tuple[float, ...]) -> tuple[dict[str, Format], tuple[float, ...]]:
        """Descend from a mixture whose times over float's are known; returns the end of it and its times."""
        hopeless: set[tuple[str, Format]] = set()
        for _ in range(ROUNDS):
            moves = [
                (group, to)
                for group, allowed in self.formats.items()
                for to in allowed
                if to != mixture[group] and (group, to) not in hopeless
            ]
            if not moves:
                break
            trials: list[Trial] = []
            for start in range(0, len(moves), AT_ONCE):
                if self.expired():
                    self.result.stopped = True
                    break
                trials += self._timed(mixture, moves[start : start + AT_ONCE])
            self.result.trials += trials
            hopeless |= {(t.group, t.format) for t in trials if t.ratio.mean > HOPELESS}
            good = self._improvements(trials, ratios)
            better = self._confirmed(mixture, good) if good else None
            if better is None:
                break
            mixture, ratios = better
        return mixture, ratios

    def _timed(self, mixture: dict[str, Format], moves: Sequence[tuple[str, Format]]) -> list[Trial]:
        changed = [{**mixture, group: to} for group, to in moves]
        base, *timed = self.compare(mixture, [self.in_float, *changed])
        return [Trial(g, mixture[g], to, r, r.over(base)) for (g, to), r in zip(moves, timed, strict=True)]

    def _improvements(self, trials: Sequence[Trial], ratios: tuple[float, ...]) -> list[Trial]:
        """The best change of each class that is shown to be faster, or as fast and quieter; the fastest first."""
        good: dict[str, Trial] = {}
        for trial in sorted(trials, key=lambda t: t.ratio.mean):
            worst = max(trial.of_float)
            # On the way from a mixture that is too slow for some shape, a step need not be fast enough yet.
            if worst > self.bound and worst > max(ratios):
                continue
            if trial.group not in good and (self._faster(trial) or self._quieter(trial)):
                good[trial.group] = trial
        return list(good.values())

    def _faster(self, trial: Trial) -> bool:
        return trial.ratio.certainly_below < 1 - GAIN / 2 and trial.ratio.mean < 1 - GAIN

    def _quieter(self, trial: Trial) -> bool:
        if trial.ratio.mean > 1 or trial.before == FLOAT:
            return False
        after = 0.0 if trial.format == FLOAT else self.noise(trial.group, trial.format)
        return after * QUIETER < self.noise(trial.group, trial.before)

    def _confirmed(
        self, mixture: dict[str, Format], good: Sequence[Trial]
    ) -> tuple[dict[str, Format], tuple[float, ...]] | None:
        """All changes at once, or the best alone where together they are slower: kernels meet at layers' borders.

        Both are timed anew, because the best of many measurements was also the luckiest. None where neither is better.
        """
        best = {**mixture, good[0].group: good[0].format}
        everything = {**mixture, **{t.group: t.format for t in good}}
        tried = _distinct({"all": everything, "best": best})
        base, *timed = self.compare(mixture, [self.in_float, *tried.values()])
        bound = 1 if any(self._faster(trial) for trial in good) else 1 + GAIN
        found = [
            (m, ratio.over(base))
            for m, ratio in zip(tried.values(), timed, strict=True)
            if ratio.certainly_below < bound
        ]
        return min(found, key=lambda pair: _score(pair[1], self.bound), default=None)


def _score(ratios: Sequence[float], bound: float) -> float:
    """What the search makes small: the mean over shapes; mixtures too slow on some shape come behind all others."""
    worst = max(ratios)
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) if worst <= bound else 1 + worst


def _distinct(mixtures: Mapping[Key, dict[str, Format]]) -> dict[Key, dict[str, Format]]:
    """The first of equal mixtures."""
    found: dict[Key, dict[str, Format]] = {}
    for name, mixture in mixtures.items():
        if mixture not in found.values():
            found[name] = mixture
    return found
