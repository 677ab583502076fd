"""Bundles for phones: their files run here beside the model, reports and runners are in them, refusals name a way."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from text_graph import graph

from graphopt import bundle, jobs, registry
from graphopt.backend import Backend
from graphopt.backends import ort_format, ort_mobile_qnn
from graphopt.backends.ort_mobile import FILES, OrtMobileBackend
from graphopt.errors import MissingBackendError, ModelError, UsageError
from graphopt.executor import Session

BACKEND = OrtMobileBackend()
TARGETS = ("android", "android-nnapi", "android-qnn", "android-xnnpack", "ios")
FEEDS = {"x": np.random.default_rng(1).normal(size=(1, 3, 8, 8)).astype(np.float32)}
QNN = os.environ.get("GRAPHOPT_QNN_PYTHON")
"""A Python that has onnxruntime-qnn, for the tests that compile for Hexagon."""


def network(batch: str = "1") -> ir.Model:
    return graph(
        f"(float[{batch},3,8,8] x) => (float[{batch},4,8,8] y)",
        "a = Conv<pads=[1,1,1,1]>(x, w, b)  r = Relu(a)  s = Shape(r)  t = Reshape(r, s)  y = Erf(t)",
        w=(4, 3, 3, 3), b=(4,),
    )  # fmt: skip


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_it_is_a_backend_and_its_targets_are_data() -> None:
    assert isinstance(BACKEND, Backend)
    assert isinstance(registry.backend("ort-mobile"), OrtMobileBackend)
    for name in TARGETS:
        assert registry.target(name).backend == "ort-mobile"
    # one file for XNNPACK and for the processor's own kernels
    assert registry.target("android").quant is not None
    assert registry.target("android").quant.activation == registry.target("android-xnnpack").quant.activation  # type: ignore[union-attr]


def test_bundles_hold_the_model_the_runners_and_what_delegates_take(target: str, tmp_path: Path) -> None:
    made = jobs.lower(network(), target, tmp_path / "b", verify=True)
    assert bundle.read(made.folder).target == registry.target(target)
    names = {path.name for path in made.folder.iterdir()}
    assert set(FILES) | {"settings.h", "bench.sh", "delegates.json", "delegates.txt", "README.md"} <= names
    onnx_file = target in ("android-qnn", "android-xnnpack")
    assert made.model.name == ("model.onnx" if onnx_file else "model.ort")
    assert ("required_operators.config" in names) is not onnx_file
    if not onnx_file:
        operators = (made.folder / "required_operators.config").read_text()
        assert "ai.onnx;13;" in operators and "Erf" in operators and "/tmp" not in operators
    assert made.manifest["verified"]["relative"] < 1e-5
    found = json.loads((made.folder / "delegates.json").read_text())
    assert list(found) == list(registry.target(target).delegates) == list(made.manifest["delegates"])
    text = (made.folder / "delegates.txt").read_text()
    for name, report in found.items():
        assert report["title"] in text
        # the shape was folded away first: nothing computes it any more
        assert not any("computes the shape" in r for refused in report["refused"] for r in refused["reasons"]), name
    assert set(made.manifest["about"]) >= names - {"manifest.json", "README.md"}
    assert f'#define PROVIDER "{made.manifest["provider"]}"' in (made.folder / "settings.h").read_text()
    assert subprocess.run(["sh", "-n", made.folder / "bench.sh"], check=False).returncode == 0


def test_the_python_runner_runs_the_file(target: str, tmp_path: Path) -> None:
    made = jobs.lower(network(), target, tmp_path / "b")
    np.savez(tmp_path / "in.npz", **FEEDS)
    command = [sys.executable, made.folder / "run.py", tmp_path / "in.npz", tmp_path / "out.npz"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "out.npz") as got:
        np.testing.assert_allclose(got["y"], Session(network()).run(FEEDS)["y"], atol=1e-5)


def test_free_sizes_are_refused_by_name_where_the_delegate_takes_none(target: str, tmp_path: Path) -> None:
    model = network(batch="N")
    if registry.target(target).static_shapes:
        with pytest.raises(ModelError, match=r"N of input 'x' is free; fix it: --dim N=SIZE"):
            jobs.lower(model, target, tmp_path / "b")
        assert list(tmp_path.iterdir()) == []
    else:
        jobs.lower(model, target, tmp_path / "b")
    jobs.lower(model, target, tmp_path / "c", dim={"N": 2})


def test_no_phone_is_here(target: str, tmp_path: Path) -> None:
    made = jobs.lower(network(), target, tmp_path / "b")
    np.savez(tmp_path / "in.npz", **FEEDS)
    with pytest.raises(MissingBackendError, match="needs a phone"):
        jobs.run(tmp_path / "b", tmp_path / "in.npz")
    with pytest.raises(MissingBackendError, match=r"bench\.sh"):
        jobs.bench([network()], target)
    assert made.manifest["measured"] is None


def test_options_of_hexagon_belong_to_its_target(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no Hexagon"):
        jobs.lower(network(), "android", tmp_path / "b", context=True)


def test_without_the_compiler_the_bundle_says_so_and_a_context_is_refused(tmp_path: Path) -> None:
    without = shutil.which("python3", path="/usr/bin")
    try:
        import onnxruntime_qnn  # noqa: F401
    except ImportError:
        made = jobs.lower(network(), "android-qnn", tmp_path / "b")
        assert made.manifest["hexagon"] == {"checked": False}
        assert "onnxruntime-qnn is not installed" in (made.folder / "README.md").read_text()
        with pytest.raises(MissingBackendError, match="pip install onnxruntime-qnn"):
            jobs.lower(network(), "android-qnn", tmp_path / "c", context=True)
    if without is not None:
        with pytest.raises(MissingBackendError, match="Qualcomm's compiler is not installed"):
            jobs.lower(network(), "android-qnn", tmp_path / "c", qnn_python=without)
    with pytest.raises(MissingBackendError, match="there is no /nowhere"):
        jobs.lower(network(), "android-qnn", tmp_path / "c", qnn_python="/nowhere")


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "it died of signal 11"),
        ("import sys; print('first', file=sys.stderr); sys.exit('QNN_COMMON_ERROR_MEM_ALLOC')", "MEM_ALLOC"),
        ("import time; time.sleep(60)", "did not finish within 1 s"),
    ],
)
def test_a_compiler_that_dies_takes_nothing_with_it(
    script: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!{sys.executable}\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(ort_mobile_qnn, "SECONDS", 1)
    with pytest.raises(ModelError, match=expected):
        jobs.lower(network(), "android-qnn", tmp_path / "b", qnn_python=str(python))
    assert not (tmp_path / "b").exists()


@pytest.mark.skipif(QNN is None, reason="GRAPHOPT_QNN_PYTHON names no Python with onnxruntime-qnn")
def test_models_are_compiled_for_hexagon(tmp_path: Path) -> None:
    model = graph("(float[1,3,8,8] x) => (float[1,4,8,8] y)", "a = Conv(x, w)  y = Relu(a)", w=(4, 3, 1, 1))
    made = jobs.lower(model, "android-qnn", tmp_path / "b", qnn_python=QNN, context=True)
    assert made.manifest["hexagon"]["checked"] and made.manifest["hexagon"]["left"] == []
    assert {"context.onnx", "context_qnn.bin"} <= {path.name for path in made.folder.iterdir()}
    assert "licence" in (made.folder / "README.md").read_text()
    assert made.manifest["versions"]["onnxruntime-qnn"]


def ort_root() -> Path:
    """ONNX Runtime's C++ headers and library; GRAPHOPT_ORT_ROOT names where else than in the system they are."""
    root = Path(os.environ.get("GRAPHOPT_ORT_ROOT", "/usr"))
    if not any(root.glob("include/**/onnxruntime_cxx_api.h")):
        pytest.skip("no headers of ONNX Runtime (apt install libonnxruntime-dev, or set GRAPHOPT_ORT_ROOT)")
    for tool in ("cmake", "g++"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool}")
    return root


def test_the_runner_in_cpp_computes_what_the_model_does(tmp_path: Path) -> None:
    root = ort_root()
    made = jobs.lower(network(), "android", tmp_path / "b")
    for command in (
        ["cmake", "-S", made.folder, "-B", tmp_path / "build", f"-DORT_ROOT={root}"],
        ["cmake", "--build", tmp_path / "build"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    np.savez(tmp_path / "in.npz", **FEEDS)
    np.savez(tmp_path / "wrong.npz", x=FEEDS["x"].astype(np.float64))

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        command = [tmp_path / "build" / "runner", *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=made.folder, timeout=60)

    done = run(tmp_path / "in.npz", tmp_path / "out.npz")
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "out.npz") as got:
        np.testing.assert_allclose(got["y"], Session(network()).run(FEEDS)["y"], atol=1e-5)
    timed = run(tmp_path / "in.npz", "--bench", "0.01")
    assert json.loads(timed.stdout)["median_ms"] > 0
    for words, expected in (
        ((tmp_path / "wrong.npz", tmp_path / "no.npz"), "input 'x' has type f8, the model wants f4"),
        ((tmp_path / "none.npz", tmp_path / "no.npz"), "cannot be opened"),
        ((tmp_path / "in.npz", tmp_path / "no.npz", "--provider", "NNAPI"), "on Android alone"),
        ((tmp_path / "in.npz",), "usage"),
    ):
        refused = run(*words)
        assert refused.returncode in (1, 2) and expected in refused.stderr
    assert not (tmp_path / "no.npz").exists()


def test_ios_refuses_quantised_models_by_node(tmp_path: Path) -> None:
    model = graph(
        "(float[1,4] x) => (float[1,4] y)",
        "q = QuantizeLinear(x, s, z)  y = DequantizeLinear(q, s, z)",
        s=np.float32(0.1), z=np.uint8(0),
    )  # fmt: skip
    with pytest.raises(ModelError, match=r"QuantizeLinear\).*CoreML provider takes no"):
        jobs.lower(model, "ios", tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_the_delegate_hardly_takes_is_told(tmp_path: Path) -> None:
    refused = graph("(float[1,4] x) => (float[1,4] y)", "y = Hardmax(x)")
    warnings = jobs.lower(refused, "android-nnapi", tmp_path / "a").manifest["warnings"]
    assert any("NNAPI takes 0%" in text and "delegates.txt" in text for text in warnings)
    assert not jobs.lower(refused, "android", tmp_path / "b").manifest["warnings"]
    assert not jobs.lower(network(), "android-nnapi", tmp_path / "c").manifest["warnings"]


def test_weights_beyond_the_format_are_refused_before_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort_format, "LARGEST", 100)
    with pytest.raises(ModelError, match=r"\.ort files end at 2 GB; quantise it, or lower it with --target cpu-arm64"):
        jobs.lower(network(), "android", tmp_path / "b")
    assert list(tmp_path.iterdir()) == []
