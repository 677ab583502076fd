"""The C++ runner of TVM bundles, built here from the bundle's own files, against ONNX Runtime and run.py."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from text_graph import graph

pytest.importorskip("tvm", reason="the extra 'tvm' is not installed")
import tvm_ffi

from graphopt import registry
from graphopt.backends import tvm as backend_file
from graphopt.backends.tvm_cpp import literal
from graphopt.executor import Session
from graphopt.lowering.steps import lower

PACKAGES = Path(tvm_ffi.__file__).parents[1]
RNG = np.random.default_rng(0)
NET = graph(
    "(float[n,3,8,8] x, int64[n] at, bool keep) => (float[n,6,8,8] y, bool[n] large, float[n,6] kept)",
    "c = Conv<pads = [1, 1, 1, 1]>(x, w, b)  y = Relu(c)  m = GlobalAveragePool(y)  p = Flatten(m)"
    "  large = Greater(at, one)  kept = Where(keep, p, zero)",
    w=(6, 3, 3, 3), b=(6,), one=np.int64(1), zero=np.float32(0),
)  # fmt: skip


def feeds(batch: int) -> dict[str, np.ndarray]:
    return {
        "x": RNG.normal(size=(batch, 3, 8, 8)).astype(np.float32),
        "at": np.arange(batch),
        "keep": np.array(True),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle, and in `build` the runner as its CMakeLists.txt builds it."""
    for tool in ("cmake", "g++"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} (apt install {tool})")
    if not (PACKAGES / "tvm_ffi" / "include" / "tvm" / "ffi" / "function.h").is_file():
        pytest.skip("apache-tvm-ffi came without its headers")
    made = tmp_path_factory.mktemp("tvm") / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend_file, "LOWER_SECONDS", 0.02)
        lower(NET, registry.target("tvm-cpu"), made)
    for command in (
        ["cmake", "-S", ".", "-B", "build", f"-DTVM_ROOT={PACKAGES}", "-DCMAKE_CXX_FLAGS=-Wall -Wextra -Werror"],
        ["cmake", "--build", "build"],
    ):
        done = subprocess.run(command, cwd=made, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return made


def run(folder: Path, *words: object) -> subprocess.CompletedProcess[str]:
    command = ["build/runner", *map(str, words)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("batch", [1, 3])
def test_it_computes_what_the_model_does_and_what_run_py_computes(folder: Path, tmp_path: Path, batch: int) -> None:
    given = feeds(batch)
    np.savez(tmp_path / "in.npz", **given)
    done = run(folder, tmp_path / "in.npz", tmp_path / "out.npz", "--threads", 2)
    assert done.returncode == 0, done.stderr
    other = [sys.executable, folder / "run.py", tmp_path / "in.npz", tmp_path / "other.npz"]
    subprocess.run(other, check=True)
    expected = Session(NET, optimize=False).run(given)
    with np.load(tmp_path / "out.npz") as found, np.load(tmp_path / "other.npz") as same:
        assert set(found.files) == set(same.files) == expected.keys()
        for name, value in expected.items():
            assert found[name].dtype == value.dtype
            np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5)
            np.testing.assert_array_equal(found[name], same[name])


def test_it_times_the_model(folder: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", **feeds(1))
    timed = json.loads(run(folder, tmp_path / "in.npz", "--bench", "0.01").stdout)
    assert timed["median_ms"] > 0 and timed["runs"] >= 10


def test_what_does_not_fit_is_refused_in_one_line(folder: Path, tmp_path: Path) -> None:
    good = feeds(2)
    cases = (
        ({**good, "x": good["x"].astype(np.float64)}, (), "input 'x' has type f8, the model wants f4"),
        ({**good, "x": good["x"][:, :2]}, (), "input 'x' has another shape"),
        ({"x": good["x"]}, (), "no array 'at'"),
        ({**good, "at": np.arange(3)}, (), "param=at"),  # the runtime's own words: n is 2 and 3
        (good, ("--model", "none.so"), "none.so: no such file"),
        (good, ("--model", "README.md"), "README.md: "),
        (good, ("--threads", "0"), "usage"),
        (good, ("--fast", "1"), "unknown option --fast"),
    )
    for arrays, words, expected in cases:
        np.savez(tmp_path / "in.npz", **arrays)
        refused = run(folder, tmp_path / "in.npz", tmp_path / "no.npz", *words)
        assert refused.returncode in (1, 2) and expected in refused.stderr, refused.stderr
        assert len(refused.stderr.splitlines()) == 1, refused.stderr
    assert not (tmp_path / "no.npz").exists()


def test_the_readme_tells_how_it_is_built_here_and_for_another_machine(folder: Path, tmp_path: Path) -> None:
    text = (folder / "README.md").read_text()
    assert "cmake -B build -DTVM_ROOT=$PWD/tvm &&" in text
    assert "| `main.cc` | runs the model in C++" in text
    assert not re.search(r"\{\w+\}", text)


def test_bundles_for_arm_hold_it_and_those_for_gpus_do_not(tmp_path: Path) -> None:
    if shutil.which("aarch64-linux-gnu-g++") is None:
        pytest.skip("g++-aarch64-linux-gnu is not installed")
    small = graph("(float[1,4] x) => (float[1,4] y)", "y = Relu(x)")
    lower(small, registry.target("tvm-arm64"), tmp_path / "arm")
    text = (tmp_path / "arm" / "README.md").read_text()
    assert "-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ && cmake" in text and "manylinux_2_28_aarch64" in text
    lower(small, registry.target("tvm-cuda"), tmp_path / "gpu")
    assert not (tmp_path / "gpu" / "main.cc").exists()


def test_names_survive_as_literals_of_cpp(tmp_path: Path) -> None:
    names = ['a"b\\c', "é/ü:0", "tab\there", "what??/", "7\x017", ""]
    if shutil.which("g++") is None:
        pytest.skip("no g++ (apt install g++)")
    lines = "".join(f"  puts({literal(name)});\n" for name in names)
    (tmp_path / "names.cc").write_text(f"#include <cstdio>\nint main() {{\n{lines}}}\n")
    subprocess.run(shlex.split("g++ -std=c++17 -trigraphs -o names names.cc"), cwd=tmp_path, check=True)
    told = subprocess.run([tmp_path / "names"], capture_output=True, check=True).stdout.decode()
    assert told.split("\n")[:-1] == names
