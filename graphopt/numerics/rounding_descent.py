"""Coordinate descent on the integers of a rounded weight, and the scales that fit them best.

The loss of levels V = (Q - Z) S in place of W is f(V) = tr((W - V) H (W - V)^T), a quadratic in every row (the local
objective of AdaRound, Nagel et al., arXiv:2004.10568, equation 13). With all other numbers of a row held, it is a
parabola in v_j with its minimum at c_j / H_jj (`graphopt.numerics.sweeps`), so the best level is the one nearest to
that: no relaxation, no learning rate, and no step raises f. With the integers held, it is a parabola in the scale of a
block b as well: with the counts p = q - z of the block and G = (W - V) H,

    s <- s + (G_b . p) / (p H_bb p^T)            summed over all rows where they share the scale

Both take turns until a pass gains little. Weights of zero stay zero. Arrays are numpy or torch.
"""

from __future__ import annotations

from typing import Any

from array_api_compat import array_namespace

from graphopt.numerics.levels import Levels
from graphopt.numerics.metric import check_metric
from graphopt.numerics.sweeps import sweep, total

SWEEPS = 12
"""Passes over all columns, at most."""

TOLERANCE = 1e-3
"""A pass that gains less than this share of the loss is the last one."""


def descend(
    weight: Any,
    metric: Any,
    levels: Levels,
    steps: Any,
    *,
    rescale: bool = True,
    least_scale: Any = 0.0,
    sweeps: int = SWEEPS,
    tolerance: float = TOLERANCE,
) -> tuple[Any, Levels]:
    """Lower the loss of a rounded weight.

    Args:
        weight: W, (m, n), finite.
        metric: H, (n, n), positive definite.
        levels: of the start.
        steps: integers to start from, (m, n), as floats.
        rescale: move scales too.
        least_scale: their lower bound, a number or (m, 1).
        sweeps: at most so many passes.
        tolerance: see `TOLERANCE`.

    Returns:
        integers, and levels with their scales; never of a larger loss than the start.

    Raises:
        ValueError: the metric is of another size or not finite, or has a diagonal that is not positive.
    """
    xp = array_namespace(weight)
    check_metric(metric, int(weight.shape[1]))
    metric = xp.astype(metric, weight.dtype)
    stays = weight.T != 0
    gap = weight - levels.values(steps)
    gradient = gap @ metric
    least = total(gap * gradient)
    for _ in range(sweeps):
        moved = levels.scaled(_scales(levels, steps, gradient, metric, least_scale)) if rescale else levels
        core = moved.values(steps)
        gradient = (weight - core) @ metric if rescale else gradient

        def best(wanted: Any, old: Any, j: int, levels: Levels = moved) -> Any:
            found = levels.column(j).nearest(wanted[0, :] / metric[j, j])
            return xp.where(stays[j, :], found, old[0, :])[None, :]

        sweep(core, gradient, metric, best)
        after = moved.steps(core)
        gap = weight - moved.values(after)
        gradient = gap @ metric
        now = total(gap * gradient)
        if not now < least:
            break
        gained, steps, levels, least = least - now, after, moved, now
        if gained < tolerance * least:
            break
    return steps, levels


def _scales(levels: Levels, steps: Any, gradient: Any, metric: Any, least: Any) -> Any:
    """Scales that fit the integers best, block after block; `gradient` is left as it is."""
    xp = array_namespace(steps)
    counts, n = levels.counts(steps), int(steps.shape[1])
    scale, gradient = levels.scale + 0.0, gradient + 0.0
    for b in range(int(scale.shape[1])):
        here = slice(b * levels.block, min((b + 1) * levels.block, n))
        part = counts[:, here]
        slope = xp.sum(gradient[:, here] * part, axis=1, keepdims=True)
        curve = xp.sum((part @ metric[here, here]) * part, axis=1, keepdims=True)
        if int(scale.shape[0]) == 1:
            slope, curve = xp.sum(slope, axis=0, keepdims=True), xp.sum(curve, axis=0, keepdims=True)
        old = scale[:, b : b + 1]
        flat = curve <= 0
        new = old + xp.where(flat, xp.zeros_like(slope), slope) / xp.where(flat, xp.ones_like(curve), curve)
        # towards the minimum of a parabola and no further: a scale keeps its sign and its lower bound
        size = xp.abs(old)
        sign = old / size
        bound = xp.maximum(0.1 * size, 0 * size + least)
        new = sign * xp.maximum(new * sign, bound)
        scale[:, b : b + 1] = new
        if here.stop < n:
            gradient[:, here.stop :] -= ((new - old) * part) @ metric[here, here.stop :]
    return scale
