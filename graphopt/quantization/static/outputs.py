"""Which more tensors can be quantised before that costs too much: measured, cheapest first.

A quantised output that no integer kernel reads is a rounding that only some kernels ask for (those that skip zeros
write integers). Transformers have outputs with outliers: a single one can cost more than all other roundings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

Key = TypeVar("Key")

MORE_NOISE = 1.26
"""By what factor the noise at the outputs may grow: 1 dB."""


def affordable(keys: Sequence[Key], total: float, noise_with: Callable[[Sequence[Key]], float]) -> list[Key]:
    """The candidates that together leave the noise below `MORE_NOISE` times what it is without them.

    Each is measured with everything else quantised. They join in the order of what they add, as long as the sum of that
    fits; where more comes together than the sum, the dearer half goes, until it fits.

    Args:
        keys: candidates.
        total: noise-to-signal power without any of them.
        noise_with: measures it with some of them.

    Returns:
        the chosen ones, in the order of `keys`.
    """
    limit = MORE_NOISE * total
    added = {key: max(0.0, noise_with([key]) - total) for key in keys}
    chosen: list[Key] = []
    spent = total
    for key in sorted(keys, key=lambda key: added[key]):
        spent += added[key]
        if spent > limit:
            break
        chosen.append(key)
    while chosen and noise_with(chosen) > limit:
        chosen = chosen[: len(chosen) // 2]
    return [key for key in keys if key in set(chosen)]
