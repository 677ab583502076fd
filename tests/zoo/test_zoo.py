"""Every network of the zoo, from either exporter: half of its units are proved, and none that was reached is lost."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from zoo.architecture import Architecture
from zoo.export import EXPORTERS, export
from zoo.measure import analysed, frozen_axes, proof, reach

from zoo import ZOO

EXPECTED = tomllib.loads((Path(__file__).parent / "expected.toml").read_text())
EXPORTED = [(a, exporter) for a in ZOO.values() for exporter in EXPORTERS if exporter not in a.cannot_export]


def case(check: str, architecture: Architecture, exporter: str, *more: str) -> Any:
    """Parameters of a test, marked where the check is known to fail for this network (and exporter)."""
    pending = EXPECTED["pending"][check]
    keys = (" ".join([architecture.name, *names, *more]) for names in ([exporter], []))
    reason = next((pending[key] for key in keys if key in pending), None)
    marks = [pytest.mark.xfail(reason=reason, strict=True)] if reason else []
    return pytest.param(architecture, exporter, *more, id="-".join([architecture.name, exporter, *more]), marks=marks)


@pytest.mark.parametrize(("architecture", "exporter"), [case("reach", a, e) for a, e in EXPORTED])
def test_reach(architecture: Architecture, exporter: str, folder: Path) -> None:
    least = EXPECTED["reach"][architecture.name][exporter]
    assert reach(analysed(architecture, exporter, folder)) >= least


@pytest.mark.parametrize(("architecture", "exporter"), [case("certificate", a, e) for a, e in EXPORTED])
def test_certificate(architecture: Architecture, exporter: str, folder: Path) -> None:
    certificate = proof(architecture, analysed(architecture, exporter, folder))
    assert certificate.units > 0
    assert certificate.holds, certificate
    assert certificate.effect > 1e-3, f"the zeroed units did not matter: {certificate}"
    assert certificate.control is None or certificate.control > 1e-3, f"other units do as well: {certificate}"


@pytest.mark.parametrize(
    ("architecture", "exporter", "axis"), [case("axes", a, e, axis) for a, e in EXPORTED for axis in a.axes]
)
def test_axis_is_prunable(architecture: Architecture, exporter: str, axis: str, folder: Path) -> None:
    assert not frozen_axes(analysed(architecture, exporter, folder), architecture.axes[axis])


@pytest.mark.parametrize(
    ("architecture", "exporter"),
    [pytest.param(a, e, id=f"{a.name}-{e}") for a in ZOO.values() for e in a.cannot_export],
)
def test_what_an_exporter_cannot_do(architecture: Architecture, exporter: str, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=architecture.cannot_export[exporter]):
        export(architecture, exporter, tmp_path / "model.onnx")
