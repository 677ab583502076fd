"""exp, log, tanh, sigmoid and erf of float32 as arithmetic: LLVM would call libm once for each element of a vector.

All are exact to 3 units in the last place over the whole range, infinities, NaN and zeros included; the tests measure
it. Only of sigmoid, results below the normal numbers are 0. None of it uses an instruction that a processor with
float32 vectors could lack.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

from tvm import ir, tirx

_LOG2_E = math.log2(math.e)
# ln 2 = high + low, where high has so few digits that n * high is exact for every exponent n.
_LN2_HIGH = 0.693359375
_LN2_LOW = math.log(2.0) - _LN2_HIGH
# float32 numbers of this size have no digits behind the point: adding it rounds to an integer, in the low bits.
_ROUNDING = 12582912.0
_ROUNDING_BITS = 0x4B400000
_SUBNORMAL_BELOW = 2.0**-126
_LARGEST = (2.0 - 2.0**-23) * 2.0**127
_SQRT_HALF_BITS = 0x3F3504F3

# 1/k!: what is left of exp at |r| <= ln(2)/2 behind the 7th power is 5e-9 of it.
_EXP = [1.0 / math.factorial(k) for k in range(8)]
# Odd coefficients of 2 artanh(s) = log((1+s)/(1-s)), |s| <= 3 - 2 sqrt(2): the next term is 2e-10.
_LOG = [2.0 / (2 * k + 1) for k in range(6)]
# erf(x)/x in powers of x*x for |x| <= 1, relative error 1.2e-9; -log(erfc(x)) in powers of x for 1 <= x <= 4, error of
# erf 1.1e-9. Least squares on Chebyshev points, reweighted towards the largest error (Lawson).
_ERF = [1.1283791065216064, -0.3761262595653534, 0.1128358542919159, -0.026853816583752632, 0.005188334733247757,
        -0.0008010247838683426, 7.854026625864208e-05]  # fmt: skip
_ERFC = [0.00034151258296333253, 1.127089262008667, 0.6381447315216064, 0.10310681909322739, -0.021838096901774406,
         0.0029476669151335955, -0.0001863800862338394]  # fmt: skip


@functools.cache
def install() -> None:
    """Tell TVM's code generation for processors to use these formulas; once a process is enough.

    TVM asks at the end of its lowering, where loops are vectors already. Earlier, its simplifier would see through the
    roundings, which are no identities of real numbers.
    """
    for name, formula in _FORMULAS.items():
        before = ir.Op.get(f"tirx.{name}").get_attr("llvm.FLowerIntrinsic")
        tirx.register_intrin_lowering(f"tirx.{name}", target="llvm", f=_rule(formula, before), level=99)


def _rule(formula: Callable[..., Any], before: Callable[[Any], Any] | None) -> Callable[[Any], Any]:
    """The formula for float32; for other types, and where it has none, what TVM did before."""

    def rule(call: Any) -> Any:
        value = formula(*call.args) if _dtype(call).split("x")[0] == "float32" else None
        if value is not None:
            return value
        return call if before is None else before(call)

    return rule


def exp(x: Any) -> Any:
    """e**x = 2**n e**r, n = round(x / ln 2), r = x - n ln 2."""

    def scaled(r: Any, n: Any) -> Any:
        # Two steps, for results beyond the exponents of normal numbers.
        power = _polynomial(_EXP, r)
        return _named(n >> _i(1, n), lambda half: power * _power_of_two(half) * _power_of_two(n - half))

    return _clamped(x, -104.0, 89.0, lambda a: _reduced(a, scaled))


def sigmoid(x: Any) -> Any:
    """1 / (1 + e**-x)."""
    return _f(1.0, x) / (_f(1.0, x) + exp(_f(0.0, x) - x))


def tanh(x: Any) -> Any:
    """m / (m + 2), m = e**2x - 1; from |x| = 9.1 on it is 1.

    m = 2**n (e**r - 1) + (2**n - 1) loses no digits near 0.
    """

    def minus_one(r: Any, n: Any) -> Any:
        return _named(_power_of_two(n), lambda s: s * (r * _polynomial(_EXP[1:], r)) + (s - _f(1.0, x)))

    return _clamped(
        x, -9.1, 9.1, lambda a: _named(_reduced(a * _f(2.0, x), minus_one), lambda m: m / (m + _f(2.0, x)))
    )  # fmt: skip


def erf(x: Any) -> Any:
    """x P(x*x) up to |x| = 1, then 1 - e**-Q(|x|) with the sign of x; from |x| = 4 on it is 1.

    Short, because TVM writes out what a name stands for wherever it simplifies: no names within names, no bounds where
    the range of Q is known.
    """
    absolute = _i(0x7FFFFFFF, x)

    def both(a: Any, magnitude: Any) -> Any:
        near = a * _polynomial(_ERF, tirx.min(magnitude * magnitude, _f(1.0, x)))
        inner = _f(0.0, x) - _polynomial(_ERFC, tirx.min(magnitude, _f(4.0, x)))
        far = _f(1.0, x) - _reduced(inner, lambda r, n: _polynomial(_EXP, r) * _power_of_two(n))
        signed = tirx.reinterpret(_dtype(x), _bits(far) | (_bits(a) & _i(-0x80000000, x)))
        return tirx.Select(magnitude > _f(1.0, x), signed, near)

    def formula(a: Any) -> Any:
        return _named(tirx.reinterpret(_dtype(x), _bits(a) & absolute), lambda magnitude: both(a, magnitude))

    return _named(x, formula)


def log(x: Any) -> Any:
    """ln x = e ln 2 + 2 artanh((m - 1) / (m + 1)), x = m 2**e, sqrt(1/2) <= m < sqrt(2)."""

    def combined(m: Any, e: Any) -> Any:
        def series(s: Any) -> Any:
            low = _named(s * s, lambda square: s * _polynomial(_LOG, square)) + e * _f(_LN2_LOW, x)
            return e * _f(_LN2_HIGH, x) + low

        return _named((m - _f(1.0, x)) / (m + _f(1.0, x)), series)

    def split(a: Any, above: Any, tiny: Any) -> Any:
        # Exponents are counted from sqrt(1/2), so that the mantissa lies around 1.
        exponent = tirx.Cast(_dtype(x), above >> _i(23, x)) - tirx.Select(tiny, _f(23.0, x), _f(0.0, x))
        mantissa = tirx.reinterpret(_dtype(x), (above & _i(0x007FFFFF, x)) + _i(_SQRT_HALF_BITS, x))
        value = _named(mantissa, lambda m: _named(exponent, lambda e: combined(m, e)))
        positive = tirx.Select(a > _f(_LARGEST, x), a, value)
        is_zero = (_bits(a) & _i(0x7FFFFFFF, x)) <= _i(0, x)
        other = tirx.Select(a < _f(0.0, x), _f(math.nan, x), tirx.Select(is_zero, _f(-math.inf, x), a))
        return tirx.Select(a > _f(0.0, x), positive, other)

    def formula(a: Any) -> Any:
        tiny = a < _f(_SUBNORMAL_BELOW, x)
        normal = tirx.Select(tiny, a * _f(2.0**23, x), a)
        return _named(_bits(normal) - _i(_SQRT_HALF_BITS, x), lambda above: split(a, above, tiny))

    return _named(x, formula)


def power(x: Any, exponent: Any) -> Any:
    """x**2 and x**3 as products; others stay calls."""
    number = exponent.value if isinstance(exponent, tirx.Broadcast) else exponent
    if isinstance(number, tirx.FloatImm) and float(number.value) in (2.0, 3.0):
        return _named(x, lambda a: a * a if float(number.value) == 2.0 else a * a * a)
    return None


def _reduced(x: Any, formula: Callable[[Any, Any], Any]) -> Any:
    """`formula(r, n)` for x = n ln 2 + r, n an integer."""

    def split(shifted: Any, whole: Any) -> Any:
        remainder = x - whole * _f(_LN2_HIGH, x) - whole * _f(_LN2_LOW, x)
        bits = _bits(shifted) - _i(_ROUNDING_BITS, x)
        return _named(remainder, lambda r: _named(bits, lambda n: formula(r, n)))

    shifted = x * _f(_LOG2_E, x) + _f(_ROUNDING, x)
    return _named(shifted, lambda s: _named(s - _f(_ROUNDING, x), lambda whole: split(s, whole)))


def _power_of_two(n: Any) -> Any:
    return tirx.reinterpret(_like("float32", n), (n + _i(127, n)) << _i(23, n))


def _bits(x: Any) -> Any:
    return tirx.reinterpret(_like("int32", x), x)


def _clamped(x: Any, low: float, high: float, body: Callable[[Any], Any]) -> Any:
    """`body` of x within bounds; NaN, which compares with nothing, stays."""

    def bounded(a: Any) -> Any:
        return tirx.Select(a > _f(high, x), _f(high, x), tirx.Select(a < _f(low, x), _f(low, x), a))

    return _named(x, lambda a: _named(bounded(a), body))


def _polynomial(coefficients: Sequence[float], x: Any) -> Any:
    """c0 + c1 x + c2 x**2 + ..., as multiply-adds from the last."""
    value = _f(coefficients[-1], x)
    for coefficient in reversed(coefficients[:-1]):
        value = value * x + _f(coefficient, x)
    return value


def _named(value: Any, body: Callable[[Any], Any]) -> Any:
    """`body(value)` with the value computed once."""
    var = tirx.Var("x", _dtype(value))
    return tirx.Let(var, value, body(var))


def _dtype(value: Any) -> str:
    return str(value.ty.dtype)


def _like(scalar: str, x: Any) -> str:
    """A type with as many lanes as `x`."""
    _, *lanes = _dtype(x).split("x")
    return "x".join([scalar, *lanes])


def _f(value: float, x: Any) -> Any:
    return tirx.const(value, _like("float32", x))


def _i(value: int, x: Any) -> Any:
    return tirx.const(value, _like("int32", x))


_FORMULAS: dict[str, Callable[..., Any]] = {
    "exp": exp, "sigmoid": sigmoid, "tanh": tanh, "erf": erf, "log": log, "pow": power,
}  # fmt: skip
