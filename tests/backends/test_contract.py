"""What every target's bundle has in common: one small model is lowered to all of them."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from graphopt import bundle, registry
from graphopt.backends import ort, ort_format, torch_cuda, tvm
from graphopt.errors import MissingBackendError
from graphopt.jobs import lower, run
from graphopt.lowering.verified import allowed_difference
from graphopt.spec import parse
from graphopt.target import Target

BATCH = "N"
NET = """<ir_version: 9, opset_import: ["" : 17]> net (float[N,4,8,8] x) => (float[N,5] y)
<float[8,4,3,3] w = {@W@}, float[8,5] v = {@V@}> {
    c = Conv<pads = [1, 1, 1, 1]>(x, w)
    r = Relu(c)
    p = GlobalAveragePool(r)
    f = Flatten(p)
    y = MatMul(f, v) }"""

KEYS = {
    "schema", "target", "source", "model", "inputs", "outputs", "opset", "ir_version", "run", "bench", "about", "needs",
    "guide", "session", "pipeline", "calibration", "versions", "measured", "verified", "report", "limits", "warnings",
    "files",
}  # fmt: skip
"""Of every manifest (`graphopt.lowering.describe`)."""

WRITTEN = {"manifest.json", "README.md", "bench.sh"}
"""In every bundle, beside model and runner."""

NOT_THE_SAME_TWICE = {"measured", "verified", "files"}
"""Keys of a manifest with times in them, or hashes of what holds these."""

TIMES = {"README.md"}
"""Files that tell times."""

TOOLS = {"tvm": "extra 'tvm'", "torch": "extra 'torch'"}
"""Backends that need a package beside graphopt's own, and what brings it."""

TARGETS = list(registry.targets())
OF_EACH_KIND = list({(t.backend, t.artefacts): t.name for t in registry.targets().values()}.values())


def numbers(count: int, seed: int) -> str:
    return ", ".join(f"{value:.3f}" for value in np.random.default_rng(seed).normal(size=count))


def small_model(target: Target) -> ir.Model:
    """With an open batch where the target takes one."""
    text = NET.replace("@W@", numbers(288, 0)).replace("@V@", numbers(40, 1))
    return ir.from_onnx_text(text.replace("[N,", "[2,") if target.static_shapes else text)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (ort, torch_cuda, tvm):
        monkeypatch.setattr(module, "LOWER_SECONDS", 0.02)


def require_tools(target: Target) -> None:
    reason = registry.backend(target.backend).missing(target)
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("name", TARGETS)
def test_the_bundle_of_every_target(name: str, tmp_path: Path) -> None:
    target = registry.target(name)
    require_tools(target)
    model, feeds = small_model(target), np.random.default_rng(2).normal(size=(4, 4, 8, 8)).astype(np.float32)
    samples = [{"x": feeds[:2]}, {"x": feeds[2:]}] if target.static_shapes else [{"x": row[None]} for row in feeds]
    path = tmp_path / "net.onnx"
    ir.save(model, path)
    made = lower(path, target, tmp_path / "b", calib=samples, verify=True)
    manifest = made.manifest

    on_disk = {p.relative_to(made.folder).as_posix() for p in made.folder.rglob("*") if p.is_file()}
    assert on_disk == {*manifest["files"], "manifest.json"}
    assert on_disk >= WRITTEN | {manifest["model"]}
    assert on_disk - {*manifest["about"], *WRITTEN} == set(), "files that README.md does not explain"
    assert set(manifest["about"]) <= on_disk
    assert any(word in on_disk for word in manifest["run"]), "the runner is a file of the bundle"
    assert subprocess.run(["sh", "-n", str(made.folder / "bench.sh")], check=False).returncode == 0

    assert set(manifest) >= KEYS
    assert (manifest["schema"], manifest["target"]["name"]) == (bundle.SCHEMA, name)
    assert manifest["source"] == {"name": "net.onnx", "sha256": bundle.sha256(path)}
    batch = 2 if target.static_shapes else BATCH
    assert manifest["inputs"] == [{"name": "x", "dtype": "float32", "shape": [batch, 4, 8, 8]}]
    assert manifest["outputs"] == [{"name": "y", "dtype": "float32", "shape": [batch, 5]}]
    assert manifest["calibration"]["samples"] == 4
    assert len(manifest["calibration"]["sha256"]) == 64
    assert {"graphopt", "onnx", "onnxruntime"} <= set(manifest["versions"])
    done = [step["pass"].partition("{")[0] for step in manifest["pipeline"]["prepare"]]
    assert done == [made_pass.name for made_pass in parse(target.prepare)]
    assert manifest["limits"] or manifest["measured"], "what was not run here is said"

    verified = manifest["verified"]
    assert verified["ran"] and verified["reference"].startswith("ONNX Runtime")
    assert (verified["inputs"], verified["feeds"]) == ("calibration", len(samples))
    assert 0 <= verified["to_prepared"] <= allowed_difference(model, target).relative

    readme = (made.folder / "README.md").read_text(encoding="utf-8")
    for told in (name, "in.npz out.npz", "bench.sh", "`x`", verified["ran"], *manifest["limits"], *manifest["needs"]):
        assert told in readme, f"README.md does not tell: {told}"

    if registry.backend(target.backend).unavailable(target) is None:
        assert manifest["measured"]["latency_ms"] > 0
        assert run(made.folder, samples[0])["y"].shape == (len(samples[0]["x"]), 5)
    else:
        assert manifest["measured"] is None
        with pytest.raises(MissingBackendError, match=r"run\.py"):
            run(made.folder, samples[0])


@pytest.mark.parametrize("name", OF_EACH_KIND)
def test_a_bundle_made_twice_is_the_same(name: str, tmp_path: Path) -> None:
    target = registry.target(name)
    require_tools(target)
    one, two = (lower(small_model(target), target, tmp_path / which) for which in "ab")
    assert set(one.manifest["files"]) == set(two.manifest["files"])
    limits = one.manifest["limits"]
    said_to_differ = {ort_format.MODEL} if ort_format.DIFFERS in limits else set()
    if tvm.DIFFERS in limits:
        said_to_differ = {"model.so"}
    for file, entry in one.manifest["files"].items():
        if file not in TIMES | said_to_differ:
            assert two.manifest["files"][file] == entry, f"{file} differs"
    for key in one.manifest.keys() - NOT_THE_SAME_TWICE:
        assert one.manifest[key] == two.manifest[key], f"{key} differs"


@pytest.mark.parametrize("name", [t.name for t in registry.targets().values() if t.backend in TOOLS])
def test_a_target_without_its_tools_says_what_to_install(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = registry.target(name)
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    with pytest.raises(MissingBackendError) as caught:
        lower(small_model(target), target, tmp_path / "b")
    assert caught.value.exit_code == 6
    assert TOOLS[target.backend] in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", OF_EACH_KIND)
@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_whatever_stops_it_leaves_nothing(
    name: str, stop: BaseException | type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = registry.target(name)
    require_tools(target)

    def interrupted(*_: object) -> None:
        raise stop

    monkeypatch.setattr("graphopt.lowering.steps.write_readme", interrupted)
    with pytest.raises((KeyboardInterrupt, bundle.GraphoptError)):
        lower(small_model(target), target, tmp_path / "b")
    assert list(tmp_path.iterdir()) == []
