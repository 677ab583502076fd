"""The backend `ort`: sessions, paired bench, and bundles that run with nothing but their own files."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from text_graph import graph

from graphopt import bundle, calibration, model, registry, timing
from graphopt.backend import Backend
from graphopt.backends import ort as backend_module
from graphopt.backends.ort import OrtBackend
from graphopt.backends.ort_providers import fell_back, settings
from graphopt.errors import DataError, MissingBackendError, ModelError, UsageError
from graphopt.executor import Session
from graphopt.lowering.steps import lower
from graphopt.target import Target, this_architecture

NET = """<ir_version: 8, opset_import: ["" : 17, "ai.onnx.ml" : 3, "com.nobody" : 1]>
g (float[N,3,8,8] x, float shift) => (float[N,4,8,8] "out/y:0", float[N,4,8,8] file)
<float[4,3,3,3] w = {@W@}> {
    c = Conv<pads=[1,1,1,1]>(x, w)  "out/y:0" = Relu(c)  file = Add(c, shift) }""".replace(
    "@W@", ", ".join(f"{v:.3f}" for v in np.random.default_rng(0).normal(size=108))
)
HERE = this_architecture()
TARGET = Target("here", "ort", arch=HERE)
ORT = OrtBackend()


@pytest.fixture
def net() -> ir.Model:
    text = NET.replace('"out/y:0"', "y0")
    found = ir.from_onnx_text(text)
    next(v for n in found.graph for v in n.outputs if v.name == "y0").name = "out/y:0"
    return found


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_module, "LOWER_SECONDS", 0.02)


FEEDS = {
    "x": np.random.default_rng(1).normal(size=(2, 3, 8, 8)).astype(np.float32),
    "shift": np.array(0.5, np.float32),
}


def test_it_is_a_backend_and_the_registry_knows_it_and_its_targets() -> None:
    assert isinstance(ORT, Backend)
    assert isinstance(registry.backend("ort"), OrtBackend)
    cpu, arm = registry.target("cpu"), registry.target("cpu-arm64")
    assert (cpu.arch, cpu.quant and (cpu.quant.activation, cpu.quant.weight)) == ("x86-64", ("uint8", "int8"))
    assert (arm.arch, arm.quant and (arm.quant.activation, arm.quant.weight)) == ("aarch64", ("int8", "int8"))
    for target in registry.targets().values():
        assert target.description


def test_missing_provider_and_foreign_processor_are_told(net: ir.Model) -> None:
    cuda = Target("gpu", "ort", device="gpu", arch="sm_87", providers=("CUDAExecutionProvider", "CPUExecutionProvider"))
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    assert "onnxruntime-gpu" in (ORT.unavailable(cuda) or "")
    with pytest.raises(MissingBackendError, match="pip install onnxruntime-gpu"):
        ORT.session(net, cuda)
    foreign = dataclasses.replace(TARGET, arch="riscv64")
    assert "riscv64" in (ORT.unavailable(foreign) or "")
    with pytest.raises(MissingBackendError):
        ORT.bench([net], foreign, FEEDS)


def test_session_runs(net: ir.Model) -> None:
    got = ORT.session(net, TARGET).run(FEEDS)
    expected = Session(net).run(FEEDS)
    for name, array in expected.items():
        np.testing.assert_allclose(got[name], array, atol=1e-5)


def test_bench_of_a_model_against_itself_and_a_larger_one(net: ir.Model) -> None:
    heavy = ir.from_onnx_text(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N,3,8,8] x, float shift) => (float y) <int64[2] s = {384, 384}, float[1] e = {0.001}> {
            r = Expand(e, s)  a = MatMul(r, r)  b = MatMul(a, r)  c = ReduceSum<keepdims=0>(b)
            d = ReduceSum<keepdims=0>(x)  f = Add(c, d)  y = Mul(f, shift) }"""
    )
    found = ORT.bench([net, net, heavy], TARGET, FEEDS, seconds=0.1)
    assert found.ratios[0] == 1
    assert found.low[0] == found.high[0] == 1
    assert all(a <= b <= c for a, b, c in zip(found.low, found.ratios, found.high, strict=True))
    assert len(found.milliseconds) == 3
    assert min(found.milliseconds) > 0
    assert found.details["shapes"] == {"x": [2, 3, 8, 8], "shift": []}
    assert found.batch is None  # `shift` has no batch axis
    assert found.details["within_noise"][0]


def test_large_models_are_timed_one_at_a_time(net: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_now = []

    class Counted(Session):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            open_now.append(self)
            assert len(open_now) == 1

        def close(self) -> None:
            open_now.remove(self)
            super().close()

    model.save(net, tmp_path / "net.onnx")
    monkeypatch.setattr("graphopt.backends.ort.TOGETHER", 0)
    monkeypatch.setattr("graphopt.executor.Session", Counted)
    found = ORT.bench([net, tmp_path / "net.onnx"], TARGET, FEEDS, seconds=0.05)
    assert found.rounds == timing.TURNS
    assert found.ratios[0] == 1
    assert len(found.milliseconds) == 2
    assert not open_now


def test_bench_makes_its_own_feeds_and_refuses_different_inputs(net: ir.Model, tmp_path: Path) -> None:
    one = ir.from_onnx_text(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[N,3] x) => (float[N,3] y) { y = Neg(x) }'
    )
    model.save(one, tmp_path / "one.onnx")
    found = ORT.bench([one, tmp_path / "one.onnx"], TARGET, seconds=0.02)
    assert (found.batch, found.rounds > 0) == (1, True)
    with pytest.raises(DataError, match="different inputs"):
        ORT.bench([one, net], TARGET)
    with pytest.raises(DataError, match="x"):
        ORT.bench([one], TARGET, {"x": np.zeros((1, 4), np.float32)})


REPORT = {
    "model": "net.onnx", "pipeline": "fold,prune{macs=0.5}", "seed": 0,
    "accuracy": {"metric": "top1", "before": 0.9, "after": 0.89},
    "passes": ["not for the manifest"],
}  # fmt: skip


def lowered(net: ir.Model, folder: Path, target: Target = TARGET) -> Path:
    files = lower(net, target, folder, report=REPORT, calibration=calibration.load([FEEDS], net)).files
    assert {f.name for f in files} == {"model.onnx", "run.py", "bench.py", "bench.sh", "README.md", "manifest.json"}
    assert {f.name for f in folder.iterdir()} == {f.name for f in files}
    return folder


def run(
    folder: Path, *arguments: object, script: str = "run.py", without: str = "onnx"
) -> subprocess.CompletedProcess[str]:
    # -I: nothing but the installed packages and the bundle's own files; graphopt's absence is checked by the imports
    code = f"import sys, runpy; sys.argv[:] = sys.argv[1:]; sys.path.insert(0, {str(folder)!r})\n"
    code += f"for name in ('graphopt', 'onnx', 'onnx_ir', {without!r}): sys.modules[name] = None\n"
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-I", "-c", code, str(folder / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False, timeout=120)


def test_bundle_runs_alone_elsewhere(net: ir.Model, tmp_path: Path) -> None:
    made = lowered(net, tmp_path / "made")
    moved = made.rename(tmp_path / "moved")
    np.savez(tmp_path / "in.npz", **FEEDS)
    done = run(moved, tmp_path / "in.npz", tmp_path / "out.npz")
    assert done.returncode == 0, done.stderr
    expected = Session(net).run(FEEDS)
    with np.load(tmp_path / "out.npz", allow_pickle=False) as got:
        assert set(got.files) == {"out/y:0", "file"}
        for name, array in expected.items():
            np.testing.assert_allclose(got[name], array, atol=1e-5)
    timed = run(moved, tmp_path / "in.npz", "--seconds", "0.05", script="bench.py")
    assert timed.returncode == 0, timed.stderr
    assert json.loads(timed.stdout)["median_ms"] > 0
    manifest = json.loads((moved / "manifest.json").read_text())
    manifest["measured"]["shapes"]["x"] = [3, 3, 8, 8]
    (moved / "manifest.json").write_text(json.dumps(manifest))
    timed = run(moved, "--seconds", "0.05", script="bench.py")
    assert json.loads(timed.stdout)["shapes"]["x"] == [3, 3, 8, 8]  # as when it was lowered, to compare with


def test_manifest_says_what_is_in_the_bundle(net: ir.Model, tmp_path: Path) -> None:
    found = bundle.read(lowered(net, tmp_path / "b"))
    assert found.target == TARGET
    assert found.model == tmp_path / "b" / "model.onnx"
    manifest = found.manifest
    assert manifest["inputs"] == [
        {"name": "x", "dtype": "float32", "shape": ["N", 3, 8, 8]},
        {"name": "shift", "dtype": "float32", "shape": []},
    ]
    assert manifest["pipeline"] == {"optimize": "fold,prune{macs=0.5}", "prepare": []}
    assert manifest["report"]["accuracy"] == {"metric": "top1", "before": 0.9, "after": 0.89}
    assert "passes" not in manifest["report"]
    assert manifest["measured"]["latency_ms"] > 0
    assert manifest["measured"]["inputs"] == "real"
    assert manifest["measured"]["processor"]
    assert manifest["opset"] == {"": 17}  # imports that nothing uses are gone
    assert net.opset_imports["com.nobody"] == 1  # from the bundle, not from the model
    assert found.manifest["versions"]["onnxruntime"]


def test_a_foreign_target_is_lowered_without_numbers(net: ir.Model, tmp_path: Path) -> None:
    found = bundle.read(lowered(net, tmp_path / "b", dataclasses.replace(TARGET, arch="riscv64")))
    assert found.manifest["measured"] is None


@pytest.mark.parametrize("file", ["model.onnx", "run.py"])
def test_tampered_bundle_is_refused(net: ir.Model, tmp_path: Path, file: str) -> None:
    made = lowered(net, tmp_path / "b")
    content = bytearray((made / file).read_bytes())
    content[len(content) // 2] ^= 1
    (made / file).write_bytes(content)
    with pytest.raises(ModelError, match=file.replace(".", r"\.")) as caught:
        bundle.read(made)
    assert caught.value.exit_code == 3
    if file == "model.onnx":
        np.savez(tmp_path / "in.npz", **FEEDS)
        refused = run(made, tmp_path / "in.npz", tmp_path / "out.npz")
        assert refused.returncode == 3
        assert "model.onnx" in refused.stderr
        assert not (tmp_path / "out.npz").exists()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda m: m.update(schema=99), "schema 99"),
        (lambda m: m["files"].update({"../x": {"sha256": "0"}}), "outside"),
        (lambda m: m["files"].update({"/etc/passwd": {"sha256": "0"}}), "outside"),
        (lambda m: m["files"].update({"gone": {"sha256": "0"}}), "missing"),
        (lambda m: m.pop("model"), "no model file"),
        (lambda m: m.update(model="other.onnx"), "no model file"),
        (lambda m: m["target"].update(backend=3), "backend"),
        (lambda m: m.pop("target"), "backend"),
        (lambda m: m.update(session=[]), "lacks 'session'"),
    ],
)
def test_hostile_manifests_are_refused(net: ir.Model, tmp_path: Path, change: object, expected: str) -> None:
    made = lowered(net, tmp_path / "b")
    manifest = json.loads((made / "manifest.json").read_text())
    change(manifest)  # type: ignore[operator]
    (made / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ModelError, match=expected):
        bundle.read(made)


def test_what_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no bundle"):
        bundle.read(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        bundle.read(tmp_path)


def test_the_runner_refuses_inputs_that_do_not_fit(net: ir.Model, tmp_path: Path) -> None:
    made = lowered(net, tmp_path / "b")
    np.savez(tmp_path / "missing.npz", x=FEEDS["x"])
    np.savez(tmp_path / "shape.npz", x=FEEDS["x"][:, :2], shift=FEEDS["shift"])
    np.savez(tmp_path / "dtype.npz", x=FEEDS["x"].astype(np.float64), shift=FEEDS["shift"])
    told = {"missing": "'shift'", "shape": "[2, 2, 8, 8]", "dtype": "float32, got float64"}
    for name, expected in told.items():
        done = run(made, tmp_path / f"{name}.npz", tmp_path / "out.npz")
        assert done.returncode == 3
        assert expected in done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "out.npz").exists()


def test_the_runner_tells_of_arrays_that_are_no_input(net: ir.Model, tmp_path: Path) -> None:
    made = lowered(net, tmp_path / "b")
    np.savez(tmp_path / "in.npz", **FEEDS, labels=FEEDS["shift"])
    done = run(made, tmp_path / "in.npz", tmp_path / "out.npz")
    assert done.returncode == 0
    assert "no such input: labels" in done.stderr


def test_the_runner_says_in_one_line_what_it_cannot_read(net: ir.Model, tmp_path: Path) -> None:
    made = lowered(net, tmp_path / "b")
    (tmp_path / "junk.npz").write_bytes(b"no archive")
    np.save(tmp_path / "one.npy", FEEDS["x"])
    for name in ("absent.npz", "junk.npz", "one.npy"):
        done = run(made, tmp_path / name, tmp_path / "out.npz")
        assert done.returncode == 3
        assert name in done.stderr and done.stderr.count("\n") == 1
    for name in ("model.onnx", "manifest.json"):
        (made / name).unlink()
        done = run(made, tmp_path / "junk.npz", tmp_path / "out.npz")
        assert done.returncode == 3
        assert name in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("package", ["numpy", "onnxruntime"])
def test_the_runner_says_in_one_line_what_is_not_installed(net: ir.Model, tmp_path: Path, package: str) -> None:
    done = run(lowered(net, tmp_path / "b"), "in.npz", "out.npz", without=package)
    assert done.returncode == 6
    assert package in done.stderr and done.stderr.count("\n") == 1


def test_an_existing_folder_keeps_its_other_files_and_gets_the_new_bundle(net: ir.Model, tmp_path: Path) -> None:
    made = lowered(net, tmp_path / "b")
    (made / "report.html").write_text("mine")
    net.graph.initializers["w"].const_value = ir.tensor(np.zeros((4, 3, 3, 3), np.float32), name="w")
    lower(net, TARGET, made)
    assert (made / "report.html").read_text() == "mine"
    again = bundle.read(made)
    assert again.manifest["pipeline"]["optimize"] is None
    assert not Session(again.model).run(FEEDS)["out/y:0"].any()
    assert [p.name for p in tmp_path.iterdir()] == ["b"]  # no temporary folder is left


def test_failure_leaves_nothing(net: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    capped = dataclasses.replace(TARGET, opset_max=16)
    with pytest.raises(ModelError, match="opset 17"):
        lower(net, capped, tmp_path / "b")
    with pytest.raises(ModelError, match="IR version 8"):
        lower(net, dataclasses.replace(TARGET, ir_max=7), tmp_path / "b")

    def fail(*_: object, **__: object) -> None:
        raise ModelError("no")

    monkeypatch.setattr(model, "save", fail)
    with pytest.raises(ModelError):
        lower(net, TARGET, tmp_path / "b")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        lower(net, TARGET, tmp_path / "file")


@pytest.mark.data
def test_real_model_lowered_and_run(data_dir: Path, tmp_path: Path) -> None:
    network = model.load(data_dir / "models" / "silero_vad_v5_if.onnx")
    with np.load(data_dir / "inputs" / "silero_vad_v5_if.npz") as raw:
        feeds = {k.partition("|")[2]: raw[k] for k in raw.files if k.startswith("3|")}
    lower(network, TARGET, tmp_path / "b", calibration=calibration.load([feeds], network), verify=True)
    np.savez(tmp_path / "in.npz", **feeds)
    done = run(tmp_path / "b", tmp_path / "in.npz", tmp_path / "out.npz")
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "out.npz") as got:
        for name, array in Session(network).run(feeds).items():
            np.testing.assert_allclose(got[name], array, atol=1e-4)


GPU = registry.target("gpu")


def test_a_gpu_bundle_is_half_precise_and_set_up_for_both_providers(net: ir.Model, tmp_path: Path) -> None:
    made = lower(net, GPU, tmp_path / "b", verify=True, options={"sizes": "N=1:4:8"})
    assert [(v["name"], v["dtype"]) for v in made.manifest["inputs"]] == [("x", "float32"), ("shift", "float32")]
    weights = model.load(made.model).graph.initializers["w"]
    assert weights.dtype == ir.DataType.FLOAT16
    assert 0 < made.manifest["verified"]["relative"] < 0.01
    options = made.manifest["session"]["provider_options"]
    tensorrt = options["TensorrtExecutionProvider"]
    assert tensorrt["trt_fp16_enable"] == "1"
    assert "trt_int8_enable" not in tensorrt
    assert tensorrt["trt_profile_max_shapes"] == "x:8x3x8x8"
    assert tensorrt["trt_engine_cache_path"].startswith("./")
    assert "CUDAExecutionProvider" in options
    assert "prepare" in made.manifest["pipeline"]
    assert model.load(made.model).graph.outputs[0].dtype == ir.DataType.FLOAT


def test_a_gpu_runner_without_a_gpu_refuses_unless_told_otherwise(net: ir.Model, tmp_path: Path) -> None:
    if ORT.unavailable(GPU) is None:
        pytest.skip("this machine has one")
    made = lower(net, GPU, tmp_path / "b")
    assert any("sizes=N=LEAST:USUAL:LARGEST" in limit for limit in made.manifest["limits"])
    np.savez(tmp_path / "in.npz", **FEEDS)
    refused = run(made.folder, tmp_path / "in.npz", tmp_path / "out.npz")
    assert refused.returncode == 6
    assert "TensorrtExecutionProvider" in refused.stderr
    done = run(made.folder, tmp_path / "in.npz", tmp_path / "out.npz", "--provider", "CPUExecutionProvider")
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "out.npz") as got:
        np.testing.assert_allclose(got["file"], Session(net).run(FEEDS)["file"], rtol=1e-2, atol=1e-2)


def test_a_quantised_model_keeps_its_integers_on_a_gpu() -> None:
    net = graph(
        "(float[N,4] x) => (float[N,4] y)", "q = QuantizeLinear(x, s, z)\nd = DequantizeLinear(q, s, z)\ny = Relu(d)",
        s=np.array(0.1, np.float32), z=np.array(0, np.int8),
    )  # fmt: skip
    found = settings(net, GPU, None, bundled=False)["TensorrtExecutionProvider"]
    assert found == {"trt_int8_enable": "1"}
    with pytest.raises(UsageError, match="builds for ranges"):
        settings(net, TARGET, "N=1:2:3", bundled=True)


def test_a_provider_that_did_not_start_is_told() -> None:
    class Fallen:
        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    assert "lacks their libraries" in (fell_back(Fallen(), GPU) or "")
    assert fell_back(Fallen(), TARGET) is None


def test_the_own_format_is_written_where_it_is_wanted(net: ir.Model, tmp_path: Path) -> None:
    plain = lower(net, TARGET, tmp_path / "plain")
    assert not (plain.folder / "model.ort").exists()
    asked = lower(net, TARGET, tmp_path / "asked", options={"ort": "yes"})
    by_target = lower(net, registry.target("cpu-arm64"), tmp_path / "board")
    for made in (asked, by_target):
        assert {"model.ort", "required_operators.config"} <= made.manifest["files"].keys()
        assert "minimal build" in (made.folder / "README.md").read_text()
