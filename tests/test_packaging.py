"""The wheel holds everything, and works where only its declared core dependencies are installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # From a copy: setuptools would take what older builds left in build/ into the wheel.
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("graphopt", "passes", "backends"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(out), str(source)]
    constraints = {**os.environ, "PIP_CONSTRAINT": str(ROOT / "tools" / "constraints.txt")}
    subprocess.run(command, check=True, env=constraints, timeout=300)
    (made,) = out.glob("*.whl")
    return made


def test_the_wheel_holds_every_source_and_data_file(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    homes = {"graphopt": "graphopt", "passes": "graphopt/passes", "backends": "graphopt/backends"}
    expected = {
        f"{home}/{file.relative_to(ROOT / folder).as_posix()}"
        for folder, home in homes.items()
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert expected <= held, sorted(expected - held)
    assert {"graphopt/py.typed", "graphopt/backends/targets.toml", "graphopt/report/report.html.j2"} <= held
    assert not [name for name in held if name.startswith(("tests/", "tools/", "examples/", "passes/", "backends/"))]


def test_every_entry_point_leads_somewhere(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    for group in PROJECT["project"]["entry-points"].values():
        for value in group.values():
            module, _, attribute = value.partition(":")
            path = module.replace(".", "/")
            if attribute.endswith(".toml"):
                assert f"{path}/{attribute}" in held, value
            else:
                assert f"{path}.py" in held or f"{path}/__init__.py" in held, value


def test_the_wheel_works_alone(wheel: Path, tmp_path: Path) -> None:
    """In an empty environment with the core dependencies only: no torch, no test tools, not this repository."""
    home = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True, timeout=120)
    python, graphopt = home / "bin" / "python", home / "bin" / "graphopt"
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-compile", "-c"]
    subprocess.run([*install, str(ROOT / "tools" / "constraints.txt"), str(wheel)], check=True, timeout=600)
    listed = subprocess.run(
        [str(python), "-m", "pip", "list", "--format=json"], check=True, capture_output=True, text=True
    )
    installed = {row["name"].lower() for row in json.loads(listed.stdout)}
    assert {"torch", "apache-tvm", "pytest", "mypy"}.isdisjoint(installed)

    digits = ROOT / "examples" / "digits"
    done = subprocess.run(
        [
            str(graphopt), "optimize", str(digits / "digits.onnx"), "--passes", "fold,prune{macs=0.6},quantize",
            "--calib", str(digits / "calib.npz"), "--eval", str(digits / "eval.npz"), "--json", "-o", "out",
        ],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [record["status"] for record in report["passes"]] == ["applied"] * 3
    assert report["output"]["bytes"] < 0.4 * report["input"]["bytes"]
    assert report["output"]["macs"] < 0.7 * report["input"]["macs"]
    assert report["accuracy"]["before"] > 0.98
    assert report["accuracy"]["before"] - report["accuracy"]["after"] < 0.03
    assert (tmp_path / "out" / "report.html").is_file()


def test_passes_are_found_from_the_root_of_a_checkout() -> None:
    """Where `python` finds ./graphopt first, which holds neither passes nor backends."""
    program = "from graphopt import registry, passes; print(registry.targets()['cpu'].backend)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "ort", done.stderr
