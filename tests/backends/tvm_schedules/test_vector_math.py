"""Functions of a real number: against float64, over the whole range of float32."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy import special

tvm = pytest.importorskip("tvm", reason="needs TVM: pip install 'graphopt[tvm]'")

MOST_ULP = 3.0
COUNT = 1 << 18

FUNCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "exp": np.exp, "tanh": np.tanh, "sigmoid": special.expit, "erf": special.erf, "log": np.log,
}  # fmt: skip


def _arguments() -> np.ndarray:
    """Every exponent and sign, what is special, and the range where results are neither 0 nor infinite."""
    everything = np.linspace(0, 2**32 - 1, COUNT // 2).astype(np.uint32).view(np.float32)
    special_cases = np.array([0, -0.0, np.inf, -np.inf, np.nan, 1e-40, -1e-40, 1], np.float32)
    return np.concatenate([special_cases, everything, np.linspace(-104, 90, COUNT // 2 - 8).astype(np.float32)])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_exact_to_three_units_in_the_last_place(name: str) -> None:
    from tvm import te, tirx

    from graphopt.backends.tvm_schedules import schedule

    argument = te.placeholder((COUNT,), name="x")
    result = te.compute((COUNT,), lambda i: getattr(tirx, name)(argument[i]), name="y")
    target = tvm.target.Target({"kind": "llvm", "mcpu": "haswell", "num-cores": 1})
    module = schedule(tvm.IRModule({"main": te.create_prim_func([argument, result])}), target)
    assert module["main"].attrs["tirx.is_scheduled"]
    x = _arguments()
    y = tvm.runtime.tensor(np.zeros(COUNT, np.float32))
    tvm.compile(module, target=target)["main"](tvm.runtime.tensor(x), y)
    with np.errstate(all="ignore"):
        expected = FUNCTIONS[name](x.astype(np.float64))
        rounded = expected.astype(np.float32)
    found = y.numpy()
    np.testing.assert_array_equal(np.isnan(found), np.isnan(rounded))
    np.testing.assert_array_equal(np.isinf(found), np.isinf(rounded))
    normal = np.isfinite(rounded) & (np.abs(rounded) >= np.finfo(np.float32).tiny)
    ulp = np.abs(found[normal] - expected[normal]) / np.spacing(np.abs(rounded[normal]))
    assert ulp.max() < MOST_ULP
    below = np.isfinite(rounded) & ~normal
    assert np.abs(found[below] - expected[below]).max(initial=0.0) <= np.finfo(np.float32).tiny
    assert (np.signbit(found) == np.signbit(rounded))[np.isfinite(rounded) & (x != 0)].all()
