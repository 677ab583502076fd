"""The npz reader and writer of the C++ runners, compiled here, against numpy."""

from __future__ import annotations

import shutil
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest

HEADER = Path(__file__).resolve().parents[2] / "backends" / "cpp"
PROGRAM = """
#include <iostream>
#include "npz.h"
int main(int, char** argv) {
  try {
    npz::write(argv[2], npz::read(argv[1]));
  } catch (const npz::Error& error) {
    std::cerr << error.what() << std::endl;
    return 1;
  }
}
"""
RNG = np.random.default_rng(0)


def build(folder: Path, *flags: str) -> Path:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler (apt install g++)")
    (folder / "copy.cc").write_text(PROGRAM)
    command = [
        compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{HEADER}", "-o", str(folder / "copy"),
        str(folder / "copy.cc"), *flags,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "copy"


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("npz"), "-fsanitize=address,undefined")


def run(program: Path, source: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [program, source, source.with_suffix(".out.npz")], capture_output=True, text=True, check=False, timeout=60
    )


def test_every_type_and_shape_comes_back(copy: Path, tmp_path: Path) -> None:
    arrays = {
        f"a/{kind}:{len(shape)}": (RNG.normal(size=shape) * 50).astype(kind)
        for kind in ("f2", "f4", "f8", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "?")
        for shape in ((), (3,), (2, 0, 4), (2, 3, 4))
    }
    arrays["columns"] = np.asfortranarray(RNG.normal(size=(3, 4, 5)))
    np.savez(tmp_path / "in.npz", **arrays)
    assert np.load(tmp_path / "in.npz")["columns"].flags.f_contiguous
    done = run(copy, tmp_path / "in.npz")
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "in.out.npz", allow_pickle=False) as got:
        assert set(got.files) == set(arrays)
        for name, array in arrays.items():
            assert got[name].dtype == array.dtype
            np.testing.assert_array_equal(got[name], array)


def test_archives_of_64_bits_are_read(copy: Path, tmp_path: Path) -> None:
    array = RNG.normal(size=(5, 7)).astype(np.float32)
    with zipfile.ZipFile(tmp_path / "in.npz", "w") as archive, archive.open("x.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array(member, array)
    assert run(copy, tmp_path / "in.npz").returncode == 0
    np.testing.assert_array_equal(np.load(tmp_path / "in.out.npz")["x"], array)


def test_compressed_members_need_zlib(copy: Path, tmp_path: Path) -> None:
    array = np.zeros((100, 100), np.float32)
    np.savez_compressed(tmp_path / "in.npz", x=array)
    done = run(copy, tmp_path / "in.npz")
    assert done.returncode == 1
    assert "'x.npy' is compressed: write it with numpy.savez" in done.stderr
    if not Path("/usr/include/zlib.h").is_file():
        pytest.skip("zlib's header is not installed (apt install zlib1g-dev)")
    done = run(build(tmp_path, "-DNPZ_ZLIB", "-lz"), tmp_path / "in.npz")
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(np.load(tmp_path / "in.out.npz")["x"], array)


@pytest.mark.parametrize(
    ("array", "expected"),
    [(np.array(["a", "b"]), "has type"), (np.zeros(3, ">f4"), "byte order"), (np.zeros(3, "c8"), "which is not read")],
)
def test_what_is_not_understood_is_refused(copy: Path, tmp_path: Path, array: object, expected: str) -> None:
    np.savez(tmp_path / "in.npz", x=array)
    done = run(copy, tmp_path / "in.npz")
    assert (done.returncode, expected in done.stderr) == (1, True), done.stderr


def test_damaged_files_are_refused_and_never_read_beyond_their_end(copy: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "good.npz", x=RNG.normal(size=(4, 4)), y=np.arange(3))
    good = (tmp_path / "good.npz").read_bytes()
    path = tmp_path / "bad.npz"
    for cut in (0, 10, 21, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:cut])
        done = run(copy, path)
        assert (done.returncode, "Sanitizer" in done.stderr) == (1, False), done.stderr
    for place in range(0, len(good), 7):
        changed = bytearray(good)
        changed[place] ^= 0xFF
        path.write_bytes(changed)
        done = run(copy, path)
        assert done.returncode in (0, 1), done.stderr
        assert "Sanitizer" not in done.stderr, (place, done.stderr)
