"""The backend `tvm`: bundles that TVM's runtime alone runs, and models that it refuses by name."""

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

pytest.importorskip("tvm", reason="the extra 'tvm' is not installed")

from graphopt import bundle, jobs, registry
from graphopt.backend import Backend
from graphopt.backends import tvm as backend_file
from graphopt.backends.tvm import TvmBackend
from graphopt.backends.tvm_check import check
from graphopt.errors import DataError, MissingBackendError, ModelError, UsageError
from graphopt.executor import Session
from graphopt.lowering.steps import lower
from graphopt.target import Target

BACKEND = TvmBackend()
TARGET = registry.target("tvm-cpu")
needs_linker = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
needs_cross = pytest.mark.skipif(
    shutil.which("aarch64-linux-gnu-g++") is None, reason="g++-aarch64-linux-gnu is not installed"
)
RNG = np.random.default_rng(0)
FEEDS = {"x": RNG.normal(size=(1, 3, 8, 8)).astype(np.float32)}


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_file, "LOWER_SECONDS", 0.02)


@pytest.fixture
def net() -> ir.Model:
    return graph(
        "(float[n,3,8,8] x) => (float[n,6,8,8] y, float[n,6] pooled)",
        "c = Conv<pads = [1, 1, 1, 1]>(x, w, b)  y = Relu(c)  m = GlobalAveragePool(y)  pooled = Flatten(m)",
        w=(6, 3, 3, 3), b=(6,),
    )  # fmt: skip


def close(model: ir.Model, found: dict[str, np.ndarray], feeds: dict[str, np.ndarray]) -> None:
    expected = Session(model, optimize=False).run(feeds)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5)


def test_it_is_a_backend_and_its_targets_refuse_int8() -> None:
    assert isinstance(BACKEND, Backend) and isinstance(registry.backend("tvm"), TvmBackend)
    for name in ("tvm-cpu", "tvm-x86-64", "tvm-arm64", "tvm-arm64-orin", "tvm-cuda"):
        target = registry.target(name)
        assert target.backend == "tvm" and target.quant is None and "float" in target.quant_refusal


def test_a_session_computes_what_the_model_computes_for_every_batch(net: ir.Model) -> None:
    session = BACKEND.session(net, TARGET)
    for batch in (1, 3):
        feeds = {"x": RNG.normal(size=(batch, 3, 8, 8)).astype(np.float32)}
        close(net, session.run(feeds), feeds)
    with pytest.raises(DataError):
        session.run({"x": np.zeros((1, 4, 8, 8), np.float32)})


@needs_linker
def test_a_bundle_runs_by_the_runtime_alone(net: ir.Model, tmp_path: Path) -> None:
    made = lower(net, TARGET, tmp_path / "b", verify=True)
    assert {"model.so", "run.py", "bench.py", "README.md"} <= made.manifest["files"].keys()
    assert made.manifest["verified"]["relative"] < 1e-5
    assert made.manifest["measured"]["ratio_to_onnxruntime"] > 0
    close(net, jobs.run(tmp_path / "b", FEEDS), FEEDS)
    np.savez(tmp_path / "in.npz", **FEEDS)
    checked = (
        "import sys, runpy\nsys.argv = ['run.py', 'in.npz', 'out.npz']\n"
        "runpy.run_path('b/run.py', run_name='__main__')\n"
        "assert not {'tvm', 'onnxruntime', 'graphopt'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", checked], cwd=tmp_path, check=True)
    with np.load(tmp_path / "out.npz") as found:
        close(net, dict(found), FEEDS)
    np.savez(tmp_path / "in.npz", x=np.zeros((1, 3, 8, 9), np.float32))
    wrong = subprocess.run([sys.executable, "-c", checked], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert wrong.returncode == 3 and "wants shape" in wrong.stderr


@needs_linker
def test_a_build_that_is_slower_than_onnx_runtime_says_so(
    net: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: dict[str, object] = {"latency_ms": 2.0, "inputs": "random", "threads": 1}
    measured |= {"onnxruntime_ms": 1.0, "ratio_to_onnxruntime": 2.0, "ratio_quartiles": [1.9, 2.1]}
    monkeypatch.setattr(TvmBackend, "_measure", lambda *_: measured)
    warned = lower(net, TARGET, tmp_path / "b").manifest["warnings"]
    assert len(warned) == 1 and "2.00 times" in warned[0]
    monkeypatch.setattr(TvmBackend, "_measure", lambda *_: {**measured, "ratio_quartiles": [0.9, 2.1]})
    assert not lower(net, TARGET, tmp_path / "c").manifest["warnings"]


@needs_cross
def test_code_for_arm_is_linked_for_arm_and_compared_here(net: ir.Model, tmp_path: Path) -> None:
    made = lower(net, registry.target("tvm-arm64"), tmp_path / "b", verify=True)
    header = (tmp_path / "b" / "model.so").read_bytes()[:20]
    assert header[:4] == b"\x7fELF" and int.from_bytes(header[18:20], "little") == 0xB7  # EM_AARCH64
    assert "this machine's processor" in made.manifest["verified"]["ran"]
    assert made.manifest["measured"] is None
    with pytest.raises(MissingBackendError, match="aarch64"):
        jobs.run(tmp_path / "b", FEEDS)
    with pytest.raises(UsageError, match="measured on the processor"):
        lower(net, registry.target("tvm-arm64"), tmp_path / "c", options={"tune": 1.0})
    assert not (tmp_path / "c").exists()


@needs_cross
def test_kernels_for_a_gpu_lie_beside_the_library_as_source(net: ir.Model, tmp_path: Path) -> None:
    made = lower(net, registry.target("tvm-cuda"), tmp_path / "b")
    source = (tmp_path / "b" / "kernels.cu").read_text()
    told = made.manifest["cuda"]
    assert told["kernels"] == source.count('extern "C" __global__') > 0 and told["arch"] == "sm_87"
    assert told["checked"].startswith("compiled" if shutil.which("nvcc") else "not compiled")


def test_a_missing_linker_is_named_with_its_package(net: ir.Model, tmp_path: Path) -> None:
    target = Target("far", "tvm", options={"linker": "no-such-g++", "package": "no-such"})
    with pytest.raises(MissingBackendError, match="apt install no-such"):
        lower(net, target, tmp_path / "b")
    assert not list(tmp_path.iterdir())


def test_options_and_processors_that_nobody_knows_are_refused(net: ir.Model, tmp_path: Path) -> None:
    for options, said in (({"procesor": "x"}, "procesor"), ({"processor": "8086"}, "8086")):
        with pytest.raises(UsageError, match=said):
            lower(net, Target("odd", "tvm", options=options), tmp_path / "b")


def test_an_open_dimension_that_tvm_loses_is_named(tmp_path: Path) -> None:
    model = graph(
        "(int64[b,t] ids) => (float[b,t,4] y)",
        "s = Shape<start = 1, end = 2>(ids)  n = Squeeze(s, zero)  r = Range(n, nought, step)  p = Gather(q, r)"
        "  e = Gather(v, ids)  y = Add(e, p)",
        zero=np.array([0]), nought=np.array(0), step=np.array(-1), q=(16, 4), v=(9, 4),
    )  # fmt: skip
    with pytest.raises(ModelError, match=r"'t' of the inputs.*--dim t=N"):
        lower(model, TARGET, tmp_path / "b")
    lower_with = jobs.lower(model, "tvm-cpu", tmp_path / "b", dim={"t": 5}, verify=True)
    assert lower_with.manifest["verified"]["relative"] < 1e-6


def test_a_quantised_model_is_refused_with_the_way_out(tmp_path: Path) -> None:
    model = graph(
        "(float[2,4] x) => (float[2,4] y)", "q = QuantizeLinear(x, s)  y = DequantizeLinear(q, s)", s=np.float32(0.1)
    )
    with pytest.raises(ModelError, match="dequantize"):
        lower(model, TARGET, tmp_path / "b")


@pytest.mark.parametrize(
    ("types", "body", "node", "said"),
    [
        ("(float[2,4,4] x) => (float[2] y)", "y = Det(x)", "Det", "no operator Det"),
        ("(float[1,1,4,4] x) => (float[1,1,2,2] y)", "y = Resize<antialias = 1>(x, , , sizes)", "Resize", "aliasing"),
        ("(float[2,4] x) => (float[2,4] y, float[2,1] m)", "y, m = LayerNormalization(x, g)", "LayerN", "first output"),
    ],
)  # fmt: skip
def test_what_the_importer_lacks_or_gets_wrong_is_refused_by_node(types: str, body: str, node: str, said: str) -> None:
    model = graph(types, body, **{k: v for k, v in {"sizes": np.array([1, 1, 2, 2]), "g": (4,)}.items() if k in body})
    with pytest.raises(ModelError, match=said) as caught:
        check(model)
    assert caught.value.where is not None and node in caught.value.where and caught.value.hint


def test_an_operator_of_another_domain_is_no_operator_of_the_standard() -> None:
    model = graph("(float[2,4] x) => (float[2,4] y)", "y = Relu(x)")
    (node,) = model.graph
    node.domain = "my.domain"
    with pytest.raises(ModelError, match=r"no operator Relu of my\.domain"):
        check(model)


def test_a_damaged_library_is_no_model(net: ir.Model, tmp_path: Path) -> None:
    path = tmp_path / "model.so"
    path.write_bytes(b"no library")
    from graphopt.backends.tvm_session import loaded

    with pytest.raises(ModelError, match="cannot be loaded"):
        loaded(path)


@needs_linker
def test_a_search_is_kept_used_and_not_repeated(net: ir.Model, tmp_path: Path) -> None:
    pytest.importorskip("xgboost", reason="the extra 'tvm' is not installed")
    from graphopt.backends.tvm_tune import missing_for_tuning

    if (reason := missing_for_tuning()) is not None:
        pytest.skip(reason)
    options = {"tune": 0.01, "database": str(tmp_path / "db")}
    fixed = {"dim": {"n": 1}}
    first = jobs.lower(net, "tvm-cpu", tmp_path / "a", verify=True, **fixed, **options).manifest
    assert first["tuning"]["searched"] == first["tuning"]["kernels"] > 0
    records = (tmp_path / "db" / "database_tuning_record.json").read_bytes()
    again = jobs.lower(net, "tvm-cpu", tmp_path / "b", **fixed, **options).manifest
    assert (again["tuning"]["searched"], again["tuning"]["trials"]) == (0, 0)
    assert (tmp_path / "db" / "database_tuning_record.json").read_bytes() == records
    assert json.loads((tmp_path / "db" / "searched.json").read_text())
    assert bundle.read(tmp_path / "b").manifest["tuning"]["database"] == str(tmp_path / "db")


def test_the_broken_ffi_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from graphopt.backends import tvm_tune

    monkeypatch.setattr(tvm_tune.importlib.metadata, "version", lambda _: "0.1.15.post2")
    with pytest.raises(MissingBackendError, match=r"apache-tvm-ffi==0\.1\.14\.post1"):
        tvm_tune.require_tuning()


def test_help_does_not_import_tvm() -> None:
    code = "import sys; import graphopt.backends.tvm; assert not {'tvm', 'tvm_ffi'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ.copy())


def test_operators_that_the_importer_lacks_are_written_out_by_their_definitions() -> None:
    model = graph(
        "(float[2,3,4,8] x, float[2,4,4] c, float[2,4,4] s) => (float[2,3,4,8] y)", "y = RotaryEmbedding(x, c, s)",
        opset=23,
    )  # fmt: skip
    feeds = {
        name: RNG.normal(size=size).astype(np.float32)
        for name, size in {"x": (2, 3, 4, 8), "c": (2, 4, 4), "s": (2, 4, 4)}.items()
    }
    close(model, BACKEND.session(model, TARGET).run(feeds), feeds)


@needs_linker
def test_kernels_without_a_schedule_are_named(net: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from graphopt.backends import tvm_schedules

    taken = lower(net, TARGET, tmp_path / "with").manifest
    monkeypatch.setattr(tvm_schedules, "RULES", {})
    left = lower(net, TARGET, tmp_path / "without").manifest
    assert "plain_loops" not in taken and set(left["plain_loops"].values()) == {"no rule takes it"}
    assert any("plain loops" in limit for limit in left["limits"])


def test_describing_targets_imports_no_compiler() -> None:
    script = (
        "import sys; from graphopt import jobs, registry\n"
        "for name in registry.targets(): jobs.describe_target(name)\n"
        "print('tvm' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
