"""The metric of a layer: the second moments of its inputs, damped, its inverse root, and the error of a weight in it.

A linear layer y = W x sees inputs with second moments H = E[x x^T] (their covariance, where a bias absorbs the mean).
Replacing W by V costs E|W x - V x|^2 = tr((W - V) H (W - V)^T): solvers for sparse and for rounded weights
minimise that.
"""

from __future__ import annotations

from typing import Any

from array_api_compat import array_namespace

DAMPING = 0.01
"""Added to the diagonal, relative to its mean: inputs that never vary, or always together, stay invertible."""

SMALL = 64
"""Triangles up to this size are inverted at once."""


def damped(second: Any, damping: float = DAMPING) -> Any:
    """H + damping * mean(diag H) I.

    Args:
        second: (n, n), symmetric positive semidefinite.
        damping: relative.

    Raises:
        ValueError: not finite, or all zero.
    """
    xp = array_namespace(second)
    if not bool(xp.all(xp.isfinite(second))):
        raise ValueError("the moments of its inputs are not finite")
    mean = float(xp.mean(xp.linalg.diagonal(second)))
    if mean <= 0:
        raise ValueError("its inputs are all zero on the calibration data")
    size = int(second.shape[0])
    return second + damping * mean * xp.eye(size, dtype=second.dtype, device=second.device)


def error(weight: Any, other: Any, metric: Any) -> float:
    """tr((W - V) H (W - V)^T), summed in float64."""
    xp = array_namespace(weight)
    gap = weight - other
    return float(xp.sum(xp.astype(gap * (gap @ metric), xp.float64)))


def relative_error(weight: Any, other: Any, metric: Any) -> float:
    """`error` relative to the layer's own signal tr(W H W^T); 0 for a layer without any."""
    signal = error(weight, 0 * weight, metric)
    return error(weight, other, metric) / signal if signal > 0 else 0.0


def check_weight(weight: Any) -> None:
    """Refuse what no solver can improve.

    Raises:
        ValueError: not finite, or all zero.
    """
    xp = array_namespace(weight)
    if not bool(xp.all(xp.isfinite(weight))):
        raise ValueError("its weights are not finite")
    if not bool(xp.any(weight != 0)):
        raise ValueError("its weights are all zero")


def check_metric(metric: Any, columns: int) -> None:
    """Refuse moments that measure nothing, or another layer.

    Args:
        metric: H, (n, n).
        columns: n of the weight.

    Raises:
        ValueError: of another shape, not finite, or an input without any moment.
    """
    xp = array_namespace(metric)
    shape = tuple(int(size) for size in metric.shape)
    if shape != (columns, columns):
        raise ValueError(f"the moments of its inputs have shape {shape}, its weights {columns} columns")
    if not bool(xp.all(xp.isfinite(metric))):
        raise ValueError("the moments of its inputs are not finite")
    if not bool(xp.all(xp.linalg.diagonal(metric) > 0)):
        raise ValueError("the moments of its inputs are not positive definite: damp them")


def inverse_root(metric: Any) -> Any:
    """The upper triangular U with U^T U = H^-1, float64: H = R R^T with R upper triangular, U = R^-1.

    Raises:
        ValueError: H is not positive definite.
    """
    xp = array_namespace(metric)
    flipped = xp.flip(xp.astype(metric, xp.float64))
    try:
        lower = xp.linalg.cholesky(flipped)
    except (ValueError, RuntimeError) as error:  # numpy's LinAlgError, torch's
        raise ValueError("the moments of its inputs are not positive definite: damp them") from error
    return _inverse(xp.flip(lower))


def _inverse(upper: Any) -> Any:
    """R^-1 of an upper triangular R, by halves: [[P, Q], [0, R]]^-1 = [[P^-1, -P^-1 Q R^-1], [0, R^-1]]."""
    xp = array_namespace(upper)
    n = int(upper.shape[0])
    if n <= SMALL:
        return xp.triu(xp.linalg.inv(upper))
    half = n // 2
    made = xp.zeros_like(upper)
    made[:half, :half] = first = _inverse(upper[:half, :half])
    made[half:, half:] = second = _inverse(upper[half:, half:])
    made[:half, half:] = -(first @ upper[:half, half:]) @ second
    return made
