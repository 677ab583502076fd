"""The backend `torch`: the module of a GPU, dense on this processor; what needs the GPU says that it is missing."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from click.testing import CliRunner
from sparse_models import make_factorised
from text_graph import graph

from graphopt import bundle, calibration, jobs, model, registry
from graphopt.backend import Backend
from graphopt.backends import torch_cuda
from graphopt.backends.torch_cuda import TorchBackend, on_cpu
from graphopt.cli import cli
from graphopt.errors import DataError, MissingBackendError, ModelError
from graphopt.executor import Session
from graphopt.lowering.steps import lower

BACKEND = TorchBackend()
CUDA, CPU = registry.target("torch-cuda"), registry.target("torch-cpu")
no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the target cannot run here")
FEEDS = {"x": np.random.default_rng(1).normal(size=(2, 5, 32)).astype(np.float32)}


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_cuda, "LOWER_SECONDS", 0.02)


@pytest.fixture
def net() -> ir.Model:
    made = graph(
        "(float[n,t,32] x) => (float[n,t,32] y, int64[k] sizes)",
        "h = MatMul(x, u)  i = Add(h, b)  r = Relu(i)  y = MatMul(r, v)  sizes = Shape(y)",
        u=(32, 64), b=(64,), v=(64, 32),
    )  # fmt: skip
    make_factorised(made, "in", 16)
    return made


def test_it_is_a_backend_and_its_targets_are_data() -> None:
    assert isinstance(BACKEND, Backend)
    assert isinstance(registry.backend("torch"), TorchBackend)
    assert (CUDA.dtype, CUDA.sparsity_2_4, CUDA.channel_multiple) == ("float16", True, 16)
    assert registry.target("torch-cuda-bf16").dtype == "bfloat16"
    assert (CPU.dtype, CPU.sparsity_2_4) == ("model", False)
    assert BACKEND.unavailable(CPU) is None
    # what lowering pads to is what the target's table asks of pruned widths
    from graphopt.fx.semi_structured.kernels import legal

    assert CUDA.channel_multiple == legal("cusparselt", torch.float16).rows


@no_cuda
def test_without_the_device_it_refuses_and_names_what_runs(net: ir.Model) -> None:
    assert "no CUDA device" in (BACKEND.unavailable(CUDA) or "")
    for call in (lambda: BACKEND.session(net, CUDA), lambda: BACKEND.bench([net], CUDA)):
        with pytest.raises(MissingBackendError, match="torch-cpu runs the same module"):
            call()


def test_without_torch_it_says_what_to_install(net: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("graphopt.fx.semi_structured")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    target = registry.target("torch-cpu")
    for call in (
        lambda: TorchBackend().bench([net], target),
        lambda: TorchBackend().lower(net, target, tmp_path / "b"),
    ):
        with pytest.raises(MissingBackendError, match=r"torch-cpu.*torch"):
            call()


def test_a_session_on_the_cpu_equals_the_runtime(net: ir.Model) -> None:
    session = BACKEND.session(net, CPU)
    for size in ((2, 5, 32), (1, 1, 32), (7, 3, 32)):
        feeds = {"x": np.random.default_rng(size[0]).normal(size=size).astype(np.float32)}
        got, want = session.run(feeds), Session(net).run(feeds)
        np.testing.assert_allclose(got["y"], want["y"], atol=1e-6)
        np.testing.assert_array_equal(got["sizes"], want["sizes"])
        assert {name: array.dtype for name, array in got.items()} == {n: a.dtype for n, a in want.items()}


def test_half_precision_outputs_have_the_declared_type(net: ir.Model) -> None:
    got = BACKEND.session(net, dataclasses.replace(CPU, dtype="bfloat16")).run(FEEDS)
    want = Session(net).run(FEEDS)
    assert (got["y"].dtype, got["sizes"].dtype) == (np.float32, np.int64)
    assert not np.array_equal(got["y"], want["y"])
    np.testing.assert_allclose(got["y"], want["y"], atol=0.05 * np.abs(want["y"]).max())


def test_feeds_are_checked(net: ir.Model) -> None:
    session = BACKEND.session(net, CPU)
    with pytest.raises(DataError, match="x"):
        session.run({})
    with pytest.raises(DataError, match="float64"):
        session.run({"x": FEEDS["x"].astype(np.float64)})
    with pytest.raises(DataError, match="shape"):
        session.run({"x": FEEDS["x"][..., :7]})


def test_strings_and_unknown_operators_are_refused() -> None:
    text = ir.from_onnx_text(
        '<ir_version: 8, opset_import: ["" : 17]> g (string[n] x) => (string[n] y) { y = Identity(x) }'
    )
    with pytest.raises(ModelError, match="torch has no strings"):
        BACKEND.session(text, CPU)
    strange = graph("(float[n] x) => (float[n] y)", "y = com.nobody.Strange(x)", imports='"com.nobody" : 1')
    with pytest.raises(ModelError, match="Strange"):
        BACKEND.lower(strange, CUDA, Path("nowhere"))


def test_bench_runs_in_pairs_and_says_how(net: ir.Model) -> None:
    found = BACKEND.bench([net, net], CPU, FEEDS, seconds=0.05)
    assert found.ratios[0] == 1
    assert min(found.milliseconds) > 0
    assert found.batch == 2
    assert found.details["device"] == "cpu"
    line = "densely on the CPU: no CUDA device; 0 of 2 linear layers on sparse tensor cores; 2 dense: no CUDA device"
    assert found.details["runs"] == [line] * 2
    assert [row["wrappers"] for row in found.details["layers"][0]] == [("in 16",)] * 2


def lowered(net: ir.Model, folder: Path) -> Path:
    report = {"pipeline": "armor", "model": "net.onnx"}
    files = lower(net, CUDA, folder, report=report, calibration=calibration.load([FEEDS], net)).files
    assert {f.name for f in files} == {"model.onnx", "run.py", "bench.sh", "README.md", "manifest.json"}
    return folder


def test_a_bundle_holds_the_model_and_its_layers(net: ir.Model, tmp_path: Path) -> None:
    found = bundle.read(lowered(net, tmp_path / "made"))
    assert found.target == CUDA
    assert found.manifest["session"] == {"device": "gpu", "dtype": "float16"}
    assert [row["layer"] for row in found.manifest["layers"]] == ["u", "v"]
    assert (found.manifest["measured"] is None) == (not torch.cuda.is_available())
    assert found.manifest["pipeline"]["optimize"] == "armor"
    script = (tmp_path / "made" / "bench.sh").read_text()
    assert 'exec graphopt bench "$here"/model.onnx --target torch-cuda' in script
    np.testing.assert_array_equal(Session(model.load(found.model)).run(FEEDS)["y"], Session(net).run(FEEDS)["y"])


def python(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(folder / "run.py"), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=environment)


@no_cuda
def test_its_runner_runs_densely_and_says_so(net: ir.Model, tmp_path: Path) -> None:
    folder = lowered(net, tmp_path / "made")
    np.savez(tmp_path / "in.npz", **FEEDS)
    done = python(folder, tmp_path / "in.npz", tmp_path / "out.npz")
    assert done.returncode == 0, done.stderr
    assert "no CUDA device" in done.stderr
    assert "densely on the CPU" in done.stderr
    with np.load(tmp_path / "out.npz", allow_pickle=False) as got:
        np.testing.assert_allclose(got["y"], Session(net).run(FEEDS)["y"], atol=1e-6)
    demanded = python(folder, tmp_path / "in.npz", tmp_path / "other.npz", "--device", "cuda")
    assert demanded.returncode == 6
    assert "no CUDA device" in demanded.stderr
    assert not (tmp_path / "other.npz").exists()


@no_cuda
def test_the_command_line_demands_the_device(net: ir.Model, tmp_path: Path) -> None:
    path, folder = tmp_path / "net.onnx", tmp_path / "made"
    model.save(net, path)
    runner = CliRunner()
    assert runner.invoke(cli, ["lower", str(path), "--target", "torch-cuda", "-o", str(folder)]).exit_code == 0
    with pytest.raises(MissingBackendError, match="no CUDA device"):
        jobs.run(folder, FEEDS)
    with pytest.raises(MissingBackendError, match="torch-cpu"):
        jobs.bench([path], "torch-cuda")
    bench = ["bench", str(path), "--target", "torch-cpu", "--seconds", "0.1"]
    done = runner.invoke(cli, [*bench, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["details"]["device"] == "cpu"
    assert "densely on the CPU: no CUDA device" in runner.invoke(cli, bench).stdout


def test_the_same_target_without_its_device() -> None:
    there = on_cpu(CUDA)
    assert (there.device, there.dtype, there.backend) == ("cpu", "model", "torch")


@needs_cuda
def test_on_a_gpu_a_session_runs_sparse_and_close_to_the_runtime(net: ir.Model) -> None:
    session = BACKEND.session(net, CUDA)
    assert {fate.runs for fate in session.runner.lowered.fates} <= {"cusparselt", "cutlass"}
    for _ in range(2):
        got, want = session.run(FEEDS), Session(net).run(FEEDS)
        np.testing.assert_allclose(got["y"], want["y"], atol=2e-2 * np.abs(want["y"]).max())
    assert session.runner.describe() == "as a recorded graph of kernels"
    found = BACKEND.bench([net, net], CUDA, FEEDS, seconds=0.1)
    assert found.details["device"] != "cpu"
