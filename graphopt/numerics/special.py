"""Functions of scipy.special, which takes a third of a second to import: imported at the first call."""

from __future__ import annotations

from typing import Any

import numpy as np

Floats = np.ndarray[Any, np.dtype[np.float64]]


def erf(x: Floats) -> Floats:
    """Error function, element by element, in float64."""
    from scipy import special

    return np.asarray(special.erf(x), dtype=np.float64)


def expit(x: Floats) -> Floats:
    """Logistic function 1 / (1 + exp(-x)), element by element, in float64."""
    from scipy import special

    return np.asarray(special.expit(x), dtype=np.float64)
