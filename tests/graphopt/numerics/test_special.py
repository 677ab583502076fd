"""Special functions: their values, and that nothing of scipy.special is imported before one is called."""

from __future__ import annotations

import subprocess
import sys

import numpy as np

from graphopt.numerics.special import erf, expit


def test_values() -> None:
    x = np.array([-np.inf, -1.0, 0.0, 1.0, np.inf])
    np.testing.assert_allclose(erf(x), [-1, -0.8427007929497149, 0, 0.8427007929497149, 1], rtol=1e-15)
    np.testing.assert_allclose(expit(x), [0, 1 / (1 + np.e), 0.5, np.e / (1 + np.e), 1], rtol=1e-15)


def test_operator_rules_import_no_scipy_special() -> None:
    program = "import sys, graphopt.analysis.ops; print('scipy.special' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "False\n"
