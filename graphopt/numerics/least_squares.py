"""Linear least squares from second moments, with a ridge towards given weights that held-out moments choose.

Observations x (dimension d) and targets y (dimension e) enter only through their centred moments
S = Cov(x), C = Cov(y, x) and the means. The affine map that minimises

    E |y - W x - b|^2 + lam |W - W0|_F^2        is        W = (C + lam W0) (S + lam I)^-1,    b = mean_y - W mean_x,

(normal equations; the ridge towards W0 is Tikhonov regularisation with a prior mean). With lam relative to the mean of
diag(S), lam -> 0 is plain least squares and lam -> inf keeps W0 and corrects the mean alone. How far moments can be
trusted depends on how many independent observations are behind them, which the caller of a streaming pass does not
know: `fit` tries several lam on each half of the stream and keeps the one that the other half likes best.

All computations in float64; numpy arrays on the CPU and torch tensors on their device alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from array_api_compat import array_namespace

RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Candidates for lam / mean(diag S)."""

DEFAULT_RIDGE = 1e-3
"""Used where nothing is held out and there are `ENOUGH` observations per column."""

CAREFUL_RIDGE = 1.0
"""Used where nothing is held out and there are fewer."""

ENOUGH = 10


@dataclass(frozen=True)
class Sample:
    """Centred second moments of a stream of pairs (x, y), divided by n.

    Attributes:
        n: number of observations.
        mean_x, mean_y: (d,), (e,).
        covariance: (d, d), Cov(x).
        cross: (e, d), Cov(y, x).
        variance_y: (e,).
    """

    n: int
    mean_x: Any
    mean_y: Any
    covariance: Any
    cross: Any
    variance_y: Any

    def keep(self, columns: Any) -> Sample:
        """The same stream with only some components of x."""
        return Sample(
            self.n,
            self.mean_x[columns],
            self.mean_y,
            self.covariance[columns, :][:, columns],
            self.cross[:, columns],
            self.variance_y,
        )


@dataclass(frozen=True)
class Fit:
    """A fitted affine map y ~ W x + b.

    Attributes:
        weight: (e, d).
        bias: (e,).
        ridge: the lam / mean(diag S) taken; inf where W0 was kept.
        error: mean squared residual per output on the fitted moments, (e,).
    """

    weight: Any
    bias: Any
    ridge: float
    error: Any


def solve(covariance: Any, cross: Any, prior: Any, ridge: float) -> Any:
    """W = (C + lam W0)(S + lam I)^-1 with lam = ridge * mean(diag S).

    Args:
        covariance: S, (d, d), symmetric positive semidefinite.
        cross: C, (e, d).
        prior: W0, (e, d).
        ridge: relative ridge, positive; inf returns the prior.

    Returns:
        (e, d) float64.
    """
    xp = array_namespace(covariance)
    if ridge == float("inf"):
        return xp.astype(prior, xp.float64)
    d = int(covariance.shape[0])
    lam = ridge * scale(covariance)
    system = covariance + lam * xp.eye(d, dtype=xp.float64, device=covariance.device)
    right = cross + lam * prior
    return xp.linalg.solve(system, right.T).T


def scale(covariance: Any) -> float:
    """Mean of the diagonal, the unit of the ridge; 1 for an all-zero matrix, so that the ridge stays positive."""
    xp = array_namespace(covariance)
    mean = float(xp.mean(xp.linalg.diagonal(covariance)))
    return mean if mean > 0 else 1.0


def residual(sample: Sample, weight: Any) -> Any:
    """Mean squared error of y ~ W x + b per output with the best b: Var(y) - 2 W C^T + W S W^T, (e,); not below 0."""
    xp = array_namespace(weight)
    inner = xp.sum(weight * (weight @ sample.covariance - 2 * sample.cross), axis=1)
    raw = sample.variance_y + inner
    return xp.where(raw > 0, raw, xp.zeros_like(raw))


def shifted_residual(sample: Sample, weight: Any, bias: Any) -> Any:
    """Mean squared error of y ~ W x + b per output for this very b, (e,)."""
    drift = sample.mean_y - weight @ sample.mean_x - bias
    return residual(sample, weight) + drift * drift


def fit(
    whole: Sample,
    prior: Any,
    halves: tuple[Sample, Sample] | None = None,
    ridges: tuple[float, ...] = RIDGES,
) -> Fit:
    """Fit y ~ W x + b.

    Args:
        whole: moments of the whole stream.
        prior: W0, (e, d).
        halves: the stream split into two parts of different samples, to choose the ridge by two-fold validation; None:
            `DEFAULT_RIDGE` or `CAREFUL_RIDGE` is taken.
        ridges: candidates; keeping the prior (and correcting the mean) is always one more.
    """
    if halves is not None:
        ridge = _validated(halves, prior, ridges)
    else:
        ridge = DEFAULT_RIDGE if whole.n >= ENOUGH * int(whole.covariance.shape[0]) else CAREFUL_RIDGE
    weight = solve(whole.covariance, whole.cross, prior, ridge)
    bias = whole.mean_y - weight @ whole.mean_x
    return Fit(weight, bias, ridge, residual(whole, weight))


def _validated(halves: tuple[Sample, Sample], prior: Any, ridges: tuple[float, ...]) -> float:
    xp = array_namespace(prior)
    best, least = float("inf"), float("inf")
    for ridge in (*ridges, float("inf")):
        error = 0.0
        for train, test in (halves, halves[::-1]):
            weight = solve(train.covariance, train.cross, prior, ridge)
            bias = train.mean_y - weight @ train.mean_x
            error += float(xp.sum(shifted_residual(test, weight, bias)))
        # strictly better only: of equals the smaller ridge stays, and NaN never wins
        if error < least:
            best, least = ridge, error
    return best
