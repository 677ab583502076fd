"""Bundles for arm64 run there: their own runner, in an emulated arm64 system, on real inputs, beside this machine.

`make test-arm64` prepares the system (tools/arm64/prepare.sh) and names its folder in GRAPHOPT_ARM64; elsewhere these
tests are skipped. What runs under emulation is correct or not; how fast it is there says nothing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import graphopt
from graphopt import jobs
from graphopt.executor import Session

TARGETS = ("cpu-arm64", "android", "tvm-arm64")
MODELS = ("resnet20_cifar10", "minilm_l6", "gtcrn", "yunet_n_dynamic", "ultraface_rfb320", "dnsmos_sig_bak_ovr")
Feeds = dict[str, np.ndarray[Any, Any]]


@pytest.fixture(scope="module")
def python() -> Path:
    """The arm64 system's Python."""
    if "GRAPHOPT_ARM64" not in os.environ:
        pytest.skip("no arm64 system; `make test-arm64` makes one")
    return Path(os.environ["GRAPHOPT_ARM64"]) / "python"


def real_inputs(data: Path, name: str) -> Feeds:
    """One call of a shared model."""
    if name.startswith("resnet"):
        with np.load(data / "cifar10" / "train2048.npz") as stored:
            return {"input": stored["images"][:1].astype(np.float32) / 255}
    if name == "minilm_l6":
        with np.load(data / "sts" / "calib1024.npz") as stored:
            length = int(stored["mask"][0].sum())
            ids, mask = (stored[key][:1, :length].astype(np.int64) for key in ("ids", "mask"))
        return {"input_ids": ids, "attention_mask": mask}
    with np.load(data / "inputs" / f"{name}.npz") as stored:
        return {key.partition("|")[2]: stored[key] for key in stored.files if key.startswith("0|")}


def on_arm64(python: Path, bundle: Path, feeds: Feeds, work: Path) -> Feeds:
    """What the bundle's runner writes there."""
    np.savez(work / "x.npz", **feeds)  # type: ignore[arg-type]
    done = subprocess.run(
        [python, bundle / "run.py", work / "x.npz", work / "y.npz"], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    with np.load(work / "y.npz") as found:
        return dict(found)


def largest_difference(wanted: Feeds, found: Feeds) -> float:
    """Of all outputs, relative to the largest number of each."""
    assert wanted.keys() == found.keys()
    for name, want in wanted.items():
        assert (want.shape, want.dtype) == (found[name].shape, found[name].dtype), name
    scales = {name: max(1e-6, float(np.abs(want).max())) for name, want in wanted.items()}
    return max(float(np.abs(found[n].astype(np.float64) - want).max()) / scales[n] for n, want in wanted.items())


def test_the_system_is_arm64(python: Path) -> None:
    say = "import platform; print(platform.machine())"
    assert subprocess.run([python, "-c", say], capture_output=True, text=True, check=True).stdout == "aarch64\n"


@pytest.mark.data
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("target", TARGETS)
def test_float_models(target: str, name: str, python: Path, data_dir: Path, tmp_path: Path) -> None:
    feeds = real_inputs(data_dir, name)
    shapes = {key: array.shape for key, array in feeds.items()}
    source = data_dir / "models" / f"{name}.onnx"
    jobs.lower(source, target, tmp_path / "bundle", input_shape=shapes)
    with Session(source) as here:
        assert largest_difference(here.run(feeds), on_arm64(python, tmp_path / "bundle", feeds, tmp_path)) < 1e-4


@pytest.mark.data
@pytest.mark.parametrize("name", ("resnet20_cifar10", "minilm_l6"))
def test_the_cpp_runner_of_tvm_bundles(name: str, python: Path, data_dir: Path, tmp_path: Path) -> None:
    compiler = "aarch64-linux-gnu-g++"
    for tool in ("cmake", compiler):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool}")
    feeds = real_inputs(data_dir, name)
    source = data_dir / "models" / f"{name}.onnx"
    bundle = tmp_path / "bundle"
    jobs.lower(source, "tvm-arm64", bundle, input_shape={key: array.shape for key, array in feeds.items()})
    system = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={compiler}"]
    for command in (
        ["cmake", "-S", bundle, "-B", bundle / "build", f"-DTVM_ROOT={python.parent / 'packages'}", *system],
        ["cmake", "--build", bundle / "build"],
    ):
        built = subprocess.run(command, capture_output=True, text=True, check=False)
        assert built.returncode == 0, built.stdout + built.stderr
    np.savez(tmp_path / "x.npz", **feeds)  # type: ignore[arg-type]
    ran = subprocess.run(
        [python.parent / "run", "build/runner", tmp_path / "x.npz", tmp_path / "y.npz"],
        cwd=bundle, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    with np.load(tmp_path / "y.npz") as found, Session(source) as here:
        assert largest_difference(here.run(feeds), dict(found)) < 1e-4


@pytest.mark.data
@pytest.mark.parametrize("target", ("cpu-arm64", "android"))
def test_int8_models(target: str, python: Path, data_dir: Path, tmp_path: Path) -> None:
    with np.load(data_dir / "cifar10" / "train2048.npz") as stored:
        images = stored["images"][:64].astype(np.float32) / 255
    small = graphopt.optimize(
        data_dir / "models" / "resnet20_cifar10.onnx", "fold,quantize", target=target,
        calib=lambda: ({"input": image[None]} for image in images),
    )  # fmt: skip
    feeds = {"input": images[:1]}
    jobs.lower(small.model, target, tmp_path / "bundle", input_shape={"input": (1, 3, 32, 32)})
    with Session(small.model) as here:
        assert largest_difference(here.run(feeds), on_arm64(python, tmp_path / "bundle", feeds, tmp_path)) < 0.02
