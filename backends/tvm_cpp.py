"""The C++ runner of bundles for processors: for devices without Python."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graphopt.backends.texts import text

if TYPE_CHECKING:
    from graphopt.target import Target

FILES = {"main.cc": "cpp/tvm_main.cc", "CMakeLists.txt": "cpp/tvm_CMakeLists.txt", "npz.h": "cpp/npz.h"}
"""Files that are the same in every bundle, and where their text is."""

ABOUT = {
    "main.cc": "runs the model in C++, where there is no Python",
    "CMakeLists.txt": "builds main.cc; how is told in it",
    "npz.h": "reads and writes .npz files for main.cc",
    "settings.h": "inputs and outputs of the model for main.cc",
}

PYTHON = "3.11"
SYSTEM = "manylinux_2_28"
"""Which wheels pip takes for another machine: a version that apache-tvm-ffi is built for, and the least system."""

SETTINGS = """\
#include <cstdint>
#include <string>
#include <vector>

struct Value {{
  std::string name, type;      // NumPy's letter and bytes
  std::vector<int64_t> shape;  // -1: any size
}};

const std::string MODEL = {model};
const int THREADS = {threads};
const std::vector<Value> INPUTS = {{{inputs}}};
const std::vector<std::string> OUTPUTS = {{{outputs}}};
"""


def write_runner(folder: Path, model: str, described: Mapping[str, Any], threads: int) -> None:
    """Write main.cc and what it is built with.

    Args:
        folder: gets the files.
        model: name of the shared object.
        described: inputs and outputs as in the manifest (`graphopt.bundle.describe_model`).
        threads: that it uses where nobody says otherwise.
    """
    for name, source in FILES.items():
        (folder / name).write_text(text(source), encoding="utf-8")
    settings = SETTINGS.format(
        model=literal(model),
        threads=threads,
        inputs=_rows(map(_value, described["inputs"])),
        outputs=_rows(literal(value["name"]) for value in described["outputs"]),
    )
    (folder / "settings.h").write_text(settings, encoding="utf-8")


def guide(versions: Mapping[str, str], target: Target) -> str:
    """How the runner is built for a target, in Markdown; `versions` of the packages that hold headers and libraries."""
    options = cmake = ""
    if "linker" in target.options:
        options = f"--only-binary :all: --python-version {PYTHON} \\\n      --platform {SYSTEM}_{target.arch} "
        cmake = (
            f"-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR={target.arch} \\\n"
            f"      -DCMAKE_CXX_COMPILER={target.options['linker']} "
        )
    packages = " ".join(f"{package}=={version}" for package, version in versions.items())
    told = text("tvm_cpp.txt").strip()
    return told.replace("{options}", options).replace("{packages}", packages).replace("{cmake}", cmake)


def literal(name: str) -> str:
    """A C++ string literal, whatever is in the name: bytes that are no plain letters stand in octal."""
    plain = (chr(b) if 32 <= b < 127 and b not in b'"\\?' else f"\\{b:03o}" for b in name.encode())
    return f'"{"".join(plain)}"'


def _value(value: Mapping[str, Any]) -> str:
    dtype = np.dtype(value["dtype"])
    sizes = ", ".join(str(size if isinstance(size, int) else -1) for size in value["shape"])
    return f'{{{literal(value["name"])}, "{dtype.kind}{dtype.itemsize}", {{{sizes}}}}}'


def _rows(items: Iterable[str]) -> str:
    return "".join(f"\n    {item}," for item in items) + "\n"
