"""Streaming first and second moments: O(d^2) memory, whatever the number of observations.

Shifted sums (Chan, Golub & LeVeque, The American Statistician 37, 1983): with s the mean of the first chunk, the sums
S1 = sum (x - s)  and  S2 = sum (x - s)(x - s)^T  are kept in float64;  mean = s + S1/n,  cov = S2/n - (S1/n)(S1/n)^T.
The cancellation that ruins plain sums of squares is of the order (mean - s)^2 / variance here: harmless, since s is
already an estimate of the mean. To merge, one stream's sums are moved to the other's shift; with g = s_b - s_a
    S1 = S1a + S1b + n_b g,    S2 = S2a + S2b + S1b g^T + g S1b^T + n_b g g^T.

Precision: the product of one chunk is taken in the chunk's own dtype (float32 data: one float32 GEMM, many times faster
than float64), chunks are added in float64. A chunk of r rows adds a relative error of about sqrt(r) * 6e-8, measured
against sqrt(S2_ii S2_jj); chunks are cut to 16384 rows, so it stays under 1e-5. `exact=True` computes in float64
throughout.

Written against the array namespace of the input: numpy arrays on the CPU, torch tensors on their device.
"""

from __future__ import annotations

from typing import Any

from array_api_compat import array_namespace

CHUNK = 16384
"""Observations per product: bounds the float32 rounding error and the memory of the shifted copy."""


class Moments:
    """Number, mean and second moments of a stream of d-dimensional observations, with an optional second stream.

    Args:
        full: keep the (d, d) matrix; False: only its diagonal.
        exact: compute in float64 throughout (see the module's head).

    The second stream, y of dimension e, is seen alongside: `cross` is then the (e, d) matrix C_yx.
    """

    def __init__(self, *, full: bool = False, exact: bool = False) -> None:
        self.full = full
        self.exact = exact
        self.n = 0
        self._x: _Sums | None = None
        self._y: _Sums | None = None
        self._yx: Any = None

    def update(self, x: Any, y: Any = None, *, axis: int = -1) -> None:
        """Add observations.

        Args:
            x: (n, d) with `axis=-1`, or (d, n) with `axis=0`, which costs no transposition for channels-first data.
            y: the second stream of the same observations, laid out alike; given always or never.
            axis: where the d channels stand.

        Raises:
            ValueError: the shapes disagree with each other or with what came before.
        """
        if axis not in {0, -1, 1} or len(x.shape) != 2:
            raise ValueError(
                f"observations must be a matrix with channels on axis 0 or 1, not {tuple(x.shape)}, axis {axis}"
            )
        a = x.T if axis == 0 else x
        b = None if y is None else (y.T if axis == 0 else y)
        if self.n and (b is None) != (self._y is None):
            raise ValueError("the second stream must be given always or never")
        if b is not None and (len(b.shape) != 2 or b.shape[0] != a.shape[0]):
            raise ValueError(f"the streams hold {a.shape[0]} and {b.shape[0]} observations")
        for start in range(0, int(a.shape[0]), CHUNK):
            part = slice(start, min(start + CHUNK, int(a.shape[0])))
            self._chunk(a[part, :], None if b is None else b[part, :])

    def _chunk(self, a: Any, b: Any) -> None:
        xp = array_namespace(a)
        a = self._floats(xp, a)
        if self._x is None:
            self._x = _Sums(xp, a, full=self.full)
        shifted = self._x.add(xp, a)
        if b is not None:
            b = self._floats(xp, b)
            if self._y is None:
                self._y = _Sums(xp, b, full=False)
                shape = (int(b.shape[1]), int(a.shape[1]))
                self._yx = xp.zeros(shape, dtype=xp.float64, device=self._x.device)
            dtype = a.dtype if a.dtype == xp.float64 else b.dtype
            other = self._y.add(xp, b)
            self._yx = self._yx + xp.astype(xp.astype(other, dtype).T @ xp.astype(shifted, dtype), xp.float64)
        self.n += int(a.shape[0])

    def _floats(self, xp: Any, a: Any) -> Any:
        if self.exact:
            return xp.astype(a, xp.float64)
        # compared, not looked up: a numpy dtype equals its scalar type without sharing its hash
        kept = a.dtype == xp.float32 or a.dtype == xp.float64  # noqa: PLR1714
        return a if kept else xp.astype(a, xp.float32)

    @property
    def dim(self) -> int:
        """Channels of the first stream."""
        return int(self._seen(self._x).shift.shape[0])

    @property
    def mean(self) -> Any:
        """(d,) float64."""
        return self._seen(self._x).mean(self.n)

    @property
    def variance(self) -> Any:
        """(d,) float64, per channel, divided by n."""
        return self._seen(self._x).variance(self.n)

    @property
    def covariance(self) -> Any:
        """(d, d) float64, centred, divided by n.

        Raises:
            ValueError: `full=False`.
        """
        sums = self._seen(self._x)
        if not self.full:
            raise ValueError("the covariance matrix was not asked for: use Moments(full=True)")
        drift = sums.first / self.n
        return sums.second / self.n - drift[:, None] * drift[None, :]

    @property
    def second(self) -> Any:
        """Uncentred second moments E[x x^T], (d, d), or E[x^2], (d,), with `full=False`; float64."""
        mean = self.mean
        return self.covariance + mean[:, None] * mean[None, :] if self.full else self.variance + mean * mean

    @property
    def mean_y(self) -> Any:
        """(e,) float64, mean of the second stream."""
        return self._seen(self._y).mean(self.n)

    @property
    def variance_y(self) -> Any:
        """(e,) float64, variance of the second stream."""
        return self._seen(self._y).variance(self.n)

    @property
    def cross(self) -> Any:
        """C_yx = E[(y - mean_y)(x - mean_x)^T], (e, d) float64."""
        x, y = self._seen(self._x), self._seen(self._y)
        return self._yx / self.n - (y.first / self.n)[:, None] * (x.first / self.n)[None, :]

    def merge(self, other: Moments) -> None:
        """Add what `other` has seen; `other` is left as it is.

        Raises:
            ValueError: the two keep different things or have different dimensions.
        """
        if other.n == 0:
            return
        if self.full != other.full:
            raise ValueError("cannot merge full and diagonal moments")
        if self.n == 0:
            self.n = other.n
            self._x, self._y = _copy(other._x), _copy(other._y)
            self._yx = None if other._yx is None else other._yx + 0.0
            return
        mine, theirs = self._seen(self._x), self._seen(other._x)
        if (self._y is None) != (other._y is None) or mine.shift.shape != theirs.shift.shape:
            raise ValueError("cannot merge moments of different streams")
        # move the other's sums to this one's shift: exact algebra, the shifts differ by less than a deviation
        gap_x = theirs.shift - mine.shift
        if self._y is not None and other._y is not None:
            gap_y = other._y.shift - self._y.shift
            moved = other._yx + other._y.first[:, None] * gap_x[None, :] + gap_y[:, None] * theirs.first[None, :]
            self._yx = self._yx + moved + other.n * gap_y[:, None] * gap_x[None, :]
            self._y.absorb(other._y, other.n)
        mine.absorb(theirs, other.n)
        self.n += other.n

    def _seen(self, sums: _Sums | None) -> _Sums:
        if sums is None or self.n == 0:
            raise ValueError("no observations yet" if self.n == 0 else "there is no second stream")
        return sums


class _Sums:
    """Shifted sums of one stream; float64."""

    def __init__(self, xp: Any, a: Any, *, full: bool) -> None:
        from array_api_compat import device

        self.full = full
        self.device = device(a)
        # rounded to the data's dtype, so that subtracting it from equal values gives exact zeros
        self.shift = xp.astype(xp.astype(xp.mean(xp.astype(a, xp.float64), axis=0), a.dtype), xp.float64)
        d = int(a.shape[1])
        self.first = xp.zeros((d,), dtype=xp.float64, device=self.device)
        self.second = xp.zeros((d, d) if full else (d,), dtype=xp.float64, device=self.device)

    def add(self, xp: Any, a: Any) -> Any:
        """Add a chunk; returns it shifted."""
        if int(a.shape[1]) != int(self.shift.shape[0]):
            raise ValueError(f"{int(a.shape[1])} channels after {int(self.shift.shape[0])}")
        shifted = a - xp.astype(self.shift, a.dtype)[None, :]
        ones = xp.ones((1, int(a.shape[0])), dtype=a.dtype, device=self.device)
        self.first = self.first + xp.astype((ones @ shifted)[0, :], xp.float64)
        product = shifted.T @ shifted if self.full else (ones @ (shifted * shifted))[0, :]
        self.second = self.second + xp.astype(product, xp.float64)
        return shifted

    def mean(self, n: int) -> Any:
        return self.shift + self.first / n

    def variance(self, n: int) -> Any:
        xp = array_namespace(self.second)
        squares = xp.linalg.diagonal(self.second) if self.full else self.second
        drift = self.first / n
        raw = squares / n - drift * drift
        return xp.where(raw > 0, raw, xp.zeros_like(raw))

    def absorb(self, other: _Sums, n: int) -> None:
        gap = other.shift - self.shift
        if self.full:
            mixed = other.first[:, None] * gap[None, :]
            self.second = self.second + other.second + mixed + mixed.T + n * gap[:, None] * gap[None, :]
        else:
            self.second = self.second + other.second + 2 * gap * other.first + n * gap * gap
        self.first = self.first + other.first + n * gap


def _copy(sums: _Sums | None) -> _Sums | None:
    if sums is None:
        return None
    copy = object.__new__(_Sums)
    copy.__dict__.update({k: v + 0.0 if k in {"shift", "first", "second"} else v for k, v in sums.__dict__.items()})
    return copy
