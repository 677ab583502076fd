"""Analyse a small model and prove by execution what the analysis says of it."""

from __future__ import annotations

import onnx_ir as ir

from graphopt.analysis.certificate import certify, choose
from graphopt.analysis.units import Coupling, analyse


def certified(model: ir.Model, seeds: int = 3) -> Coupling:
    """The units of a model, of which random sets of EXACT ones hold their certificate, told from wrong sets."""
    coupling = analyse(model)
    asked = told = 0
    for seed in range(seeds):
        dead = choose(coupling, 0.5, seed)
        if not dead:
            continue
        certificate = certify(model, coupling, dead, seed=seed)
        assert certificate.holds, f"{certificate}, units {sorted(dead)}"
        if certificate.control is not None:
            asked += 1
            told += certificate.control > 1e-3
    assert told >= asked - 1, "pruning other units makes no difference: the test has no power"
    return coupling


def exact(coupling: Coupling) -> int:
    """Number of EXACT units."""
    return sum(unit.exact for unit in coupling.units)


def reasons(coupling: Coupling, parameter: str) -> str:
    """Why axes of a parameter are frozen."""
    return "; ".join(frozen.reason for frozen in coupling.frozen if frozen.tensor == parameter)
