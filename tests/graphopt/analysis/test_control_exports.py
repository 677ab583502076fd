"""If, Loop and Scan as torch exports them: by scripting, torch.cond and scan."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from graphopt.analysis.certificate import certify, choose
from graphopt.analysis.units import analyse
from graphopt.model import load

torch = pytest.importorskip("torch")
nn = torch.nn


class Repeat(nn.Module):
    """A recurrent cell in a Python loop over a number of steps that the input tells."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.step, self.leave = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        h = torch.relu(self.enter(x[0]))
        for t in range(x.shape[0]):
            h = torch.tanh(self.step(h) + self.enter(x[t]))
        return self.leave(h)


class Branch(nn.Module):
    """Two layers of which the input chooses one."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.a, self.b, self.leave = nn.Linear(5, 6), nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        h = torch.relu(self.enter(x))
        h = torch.cond(x.sum() > 0, lambda h: torch.relu(self.a(h)), lambda h: torch.tanh(self.b(h)), (h,))
        return self.leave(h)


class Scanned(nn.Module):
    """The cell of `Repeat`, scanned."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.step, self.leave = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        from torch._higher_order_ops.scan import scan

        def cell(h, i):
            h = torch.tanh(self.step(h) + i)
            return h, h.clone()

        z = self.enter(x)
        return self.leave(scan(cell, torch.zeros_like(z[0]), z, dim=0)[1])


@pytest.mark.parametrize(
    ("network", "shape", "operator", "units"),
    [(Repeat, (4, 2, 5), "Loop", 8), (Branch, (2, 5), "If", 6 + 8), (Scanned, (4, 2, 5), "Scan", 8)],
)
def test_exports_with_bodies(network: Any, shape: tuple[int, ...], operator: str, units: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, x, path = network().eval(), torch.randn(shape), tmp_path / "m.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if operator == "Loop":
            axes = {"x": {0: "steps", 1: "n"}}
            scripted = torch.jit.script(module)
            torch.onnx.export(scripted, (x,), path, dynamo=False, input_names=["x"], dynamic_axes=axes)
        else:
            torch.onnx.export(module, (x,), path, dynamo=True, input_names=["x"], external_data=False, verbose=False)
    model = load(path)
    assert any(node.op_type == operator for node in model.graph)
    coupling = analyse(model)
    assert len(coupling.units) == units
    assert all(unit.exact for unit in coupling.units)
    certificate = certify(model, coupling, choose(coupling, 0.5, 1))
    assert certificate.holds
    assert certificate.control is not None and certificate.control > 1e-3
