"""The road to a bundle, with a backend whose every step can be seen."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import pytest
from text_graph import graph

from graphopt import bundle, calibration, registry
from graphopt.backend import Artefacts, Backend
from graphopt.errors import MissingBackendError, ModelError, UsageError, VerificationError
from graphopt.executor import Session
from graphopt.lowering.steps import lower
from graphopt.model import save
from graphopt.target import Target

TARGET = Target("box", "box")
FEEDS = {"x": np.arange(6, dtype=np.float32).reshape(2, 3)}


class Scaled:
    """A runtime that is wrong by a factor."""

    def __init__(self, path: Path, factor: float) -> None:
        self._session, self._factor = Session(path), factor

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        return {name: (array * self._factor).astype(array.dtype) for name, array in self._session.run(feeds).items()}


class Box:
    """A backend in memory."""

    name: ClassVar[str] = "box"

    def __init__(self, *, factor: float = 1.0, elsewhere: str | None = None, tool: str | None = None) -> None:
        self.factor, self.elsewhere, self.tool = factor, elsewhere, tool
        self.seen: list[Any] = []

    def unavailable(self, target: Target) -> str | None:
        return self.elsewhere

    def missing(self, target: Target) -> str | None:
        return self.tool

    def session(self, model: Any, target: Target, *, threads: int = 1) -> Scaled:
        return Scaled(model, self.factor)

    def bench(self, *_: Any, **__: Any) -> Any:
        raise AssertionError

    def lower(
        self, model: ir.Model, target: Target, folder: Path, *, feeds: Any = None, tune: float | None = None,
        fast: bool = False, style: str = "plain",
    ) -> Artefacts:  # fmt: skip
        assert list(folder.iterdir()) == []
        self.seen.append((sorted(n.op_type for n in model.graph), feeds, tune, fast, style))
        save(model, folder / "net.onnx")
        return Artefacts(
            "net.onnx", ("./run", "--quiet"), ("./bench",), {"net.onnx": "the net"}, needs=("a box",),
            guide="Open the box.", measured={"latency_ms": 1.5, "inputs": "random", "threads": 1, "ratio_to_ort": 2.0},
            limits=("never tried",), warnings=("slow",), versions={"box": "3"}, details={"lid": "closed"},
        )  # fmt: skip

    def open(self, bundle: bundle.Bundle, *, threads: int = 1) -> Scaled:
        return Scaled(bundle.model, self.factor)

    def stand_in(self, bundle: bundle.Bundle, *, threads: int = 1) -> tuple[Scaled, str] | None:
        return (Scaled(bundle.model, self.factor), "a stand-in") if self.elsewhere != "nowhere" else None


@pytest.fixture
def net() -> ir.Model:
    return graph("(float[N,3] x) => (float[N,3] y)", "a = Identity(x) y = Neg(a)")


def use(monkeypatch: pytest.MonkeyPatch, box: Box) -> Box:
    monkeypatch.setattr("graphopt.registry.backend", lambda name: box)
    return box


def test_a_bundle_has_the_same_form_for_every_backend(
    net: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = use(monkeypatch, Box())
    assert isinstance(box, Backend)
    target = dataclasses.replace(TARGET, limits=("of the target",), options={"depth": 3})
    data = calibration.load([FEEDS], net)
    made = lower(net, target, tmp_path / "b", source={"name": "n.onnx", "sha256": "0" * 64}, calibration=data)
    manifest = made.manifest
    assert {f.name for f in made.files} == {"net.onnx", "bench.sh", "README.md", "manifest.json"}
    assert made.target == target
    assert manifest["schema"] == bundle.SCHEMA == 2
    assert manifest["limits"] == ["of the target", "never tried"]
    assert manifest["lid"] == "closed"
    assert manifest["versions"]["box"] == "3"
    assert manifest["versions"]["graphopt"]
    assert manifest["calibration"]["sha256"] == data.fingerprint()
    assert manifest["verified"] is None
    assert len(box.seen[0][1]["x"]) == 1  # one sample, to time it with
    readme = (made.folder / "README.md").read_text()
    for told in (
        "`n.onnx` for box", "Open the box.", "./run --quiet in.npz out.npz", "- a box",
        "| input | `x` | float32 | [N, 3] |", "| `net.onnx` | the net |", "1.5 ms", "ratio_to_ort: 2", "not compared",
        "- slow", "- never tried",
    ):  # fmt: skip
        assert told in readme


def test_a_backend_that_wants_it_gets_the_model_before_it_was_prepared(
    net: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Comparing(Box):
        def lower(
            self, model: ir.Model, target: Target, folder: Path, *, feeds: Any = None, reference: Any = None, **_: Any
        ) -> Artefacts:
            assert [n.op_type for n in model.graph] == ["Neg"]
            assert [n.op_type for n in reference.graph] == ["Identity", "Neg"]
            return super().lower(model, target, folder, feeds=feeds)

    use(monkeypatch, Comparing())
    lower(net, dataclasses.replace(TARGET, prepare="fold"), tmp_path / "b")
    with pytest.raises(UsageError, match="no such option"):
        lower(net, TARGET, tmp_path / "c", options={"reference": "x"})


def test_bench_sh_finds_its_folder_from_anywhere(
    net: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, Box())
    folder = lower(net, TARGET, tmp_path / "a b").folder
    (folder / "bench").write_text('#!/bin/sh\necho "$0 $*"\n')
    (folder / "bench").chmod(0o755)
    done = subprocess.run(["sh", "a b/bench.sh", "in.npz"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == f"{folder}/bench in.npz\n"


def test_a_target_prepares_the_model_on_a_copy(net: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    box = use(monkeypatch, Box())
    made = lower(net, dataclasses.replace(TARGET, prepare="fold"), tmp_path / "b", verify=True)
    assert box.seen[0][0] == ["Neg"]
    assert [n.op_type for n in net.graph] == ["Identity", "Neg"]
    step = made.manifest["pipeline"]["prepare"][0]
    assert (step["pass"], step["status"], step["nodes"], step["relative"]) == ("fold", "applied", [2, 1], 0)
    assert made.manifest["verified"]["ran"].startswith("the bundle")
    with pytest.raises(UsageError, match="no-such-pass"):
        lower(net, dataclasses.replace(TARGET, prepare="no-such-pass"), tmp_path / "c")


def test_verify_writes_the_difference_or_nothing(
    net: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, Box(factor=1.01))
    with pytest.raises(VerificationError, match=r"'y' of the bundle differs by 0\.01") as caught:
        lower(net, TARGET, tmp_path / "b", verify=True)
    assert caught.value.exit_code == 4
    assert list(tmp_path.iterdir()) == []
    found = lower(net, TARGET, tmp_path / "b", verify=True, tolerance=0.02, calibration=calibration.load([FEEDS], net))
    verified = found.manifest["verified"]
    assert verified["relative"] == pytest.approx(0.01, rel=1e-3)
    assert (verified["inputs"], verified["feeds"], verified["tolerance"]) == ("calibration", 2, 0.02)
    assert "0.01 relative (cosine similarity 1)" in (found.folder / "README.md").read_text()


def test_half_products_of_the_target_are_allowed_for(
    net: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, Box(factor=1.005))
    with pytest.raises(VerificationError):
        lower(net, TARGET, tmp_path / "b", verify=True)
    assert lower(net, dataclasses.replace(TARGET, dtype="float16"), tmp_path / "b", verify=True).manifest["verified"]


def test_what_cannot_run_here_is_verified_by_what_stands_in(
    net: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, Box(elsewhere="another planet"))
    made = lower(net, TARGET, tmp_path / "b", verify=True).manifest
    assert made["verified"]["ran"] == "a stand-in"
    assert "another planet" in made["limits"][0]
    use(monkeypatch, Box(elsewhere="nowhere"))
    with pytest.raises(MissingBackendError, match="cannot be verified here: nowhere"):
        lower(net, TARGET, tmp_path / "c", verify=True)
    assert not (tmp_path / "c").exists()


def test_missing_tools_and_quantised_models_are_refused_before_the_work(
    net: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = use(monkeypatch, Box(tool="no compiler (apt install g++)"))
    with pytest.raises(MissingBackendError, match=r"apt install g\+\+") as caught:
        lower(net, TARGET, tmp_path / "b")
    assert caught.value.exit_code == 6
    box.tool = None
    quantised = graph(
        "(float[N,3] x) => (float[N,3] y) <float s = {0.1}, uint8 z = {0}>",
        "[quiet] q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z)",
    )
    with pytest.raises(ModelError, match=r"node quiet \(QuantizeLinear\).*too slow.*dequantize"):
        lower(quantised, dataclasses.replace(TARGET, quant_refusal="too slow"), tmp_path / "b")
    assert box.seen == []
    lower(quantised, TARGET, tmp_path / "b")


def test_options_of_a_backend(net: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    box = use(monkeypatch, Box())
    lower(net, TARGET, tmp_path / "b", options={"tune": 60, "fast": "yes", "compress": False})
    assert box.seen[-1][2:] == (60.0, True, "plain")
    for options, expected in (
        ({"compress": True}, "compress: backend 'box' has no such option.*tune, fast, style"),
        ({"tune": "soon"}, "tune: 'soon' is no float"),
        ({"style": 3}, "style: 3 is no str"),
        ({"fast": "maybe"}, "fast: 'maybe' is no bool"),
    ):
        with pytest.raises(UsageError, match=expected):
            lower(net, TARGET, tmp_path / "b", options=options)


def test_what_an_earlier_bundle_left_goes_and_what_the_user_changed_stays(
    net: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, Box())
    folder = tmp_path / "b"

    def old(stage: Path) -> dict[str, Any]:
        for name in ("gone.so", "edited.txt"):
            (stage / name).write_text(name)
        form = {key: kind() for key, kind in bundle.FORM.items()}
        return {"target": bundle.target_table(TARGET), "model": "gone.so", **form}

    bundle.write(folder, old)
    (folder / "edited.txt").write_text("mine")
    lower(net, TARGET, folder)
    assert {p.name for p in folder.iterdir()} == {"net.onnx", "bench.sh", "README.md", "manifest.json", "edited.txt"}


def test_every_target_can_be_prepared_for() -> None:
    from graphopt.spec import parse

    for target in registry.targets().values():
        parse(target.prepare)


def test_older_bundles_are_told_apart(net: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Box())
    path = lower(net, TARGET, tmp_path / "b").folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for schema, hint in ((1, "lower the model again$"), (3, "the version that made the bundle$")):
        path.write_text(json.dumps(manifest | {"schema": schema}))
        with pytest.raises(ModelError, match=f"schema {schema}.*reads 2; .*{hint}"):
            bundle.read(tmp_path / "b")
