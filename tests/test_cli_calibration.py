"""Calibration data that no engineer meant to give: the command line refuses it in one line, or works and warns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from graphopt.cli import cli

DIGITS = Path(__file__).resolve().parent.parent / "examples" / "digits"
MODEL, CALIB = DIGITS / "digits.onnx", DIGITS / "calib.npz"
Images = np.ndarray


def call(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr, result.exception)
    return result


def last_line(result: Result) -> str:
    return result.stderr.rstrip().splitlines()[-1]


def images() -> Images:
    with np.load(CALIB) as stored:
        return np.array(stored["images"][:32])


def spoilt(value: float) -> Images:
    x = images()
    x[7, 0, 3, 3] = value
    return x


def savez(path: Path, **arrays: Images) -> Path:
    np.savez(path / "calib.npz", **arrays)
    return path / "calib.npz"


def written(path: Path, content: bytes) -> Path:
    (path / "calib.npz").write_bytes(content)
    return path / "calib.npz"


def folder(path: Path, **arrays: Images) -> Path:
    for name, array in arrays.items():
        np.savez(path / f"{name}.npz", images=array)
    return path


REFUSED: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "nan": (lambda p: savez(p, images=spoilt(np.nan)), ("'images'", "NaN", "sample 7", "remove")),
    "inf": (lambda p: savez(p, images=spoilt(np.inf)), ("'images'", "infinite", "sample 7", "remove")),
    "too large": (
        lambda p: savez(p, images=spoilt(0).astype(np.float64) * 1e300),
        ("'images'", "infinite", "float64", "scale it"),
    ),
    "nan in a file of a folder": (
        lambda p: folder(p, a=images(), b=spoilt(np.nan)), ("'images'", "NaN", "sample 39"),
    ),
    "no such input": (lambda p: savez(p, pictures=images()), ("'images'", "'pictures'", "rename")),
    "one input too many": (lambda p: savez(p, images=images(), mask=images()), ("'mask'", "no input")),
    "empty file": (lambda p: written(p, b""), ("calib.npz", "numpy.savez")),
    "no arrays": (lambda p: savez(p), ("no arrays", "one array per input")),
    "no samples": (lambda p: savez(p, images=images()[:0]), ("no samples", "at least one")),
    "raw bytes": (lambda p: savez(p, images=images().astype(np.uint8)), ("uint8", "preprocess")),
    "integers": (lambda p: savez(p, images=images().astype(np.int64)), ("int64", "preprocess")),
    "other size": (lambda p: savez(p, images=images()[:, :, 1:]), ("[32,1,7,8]", "expected shape")),
    "no channel axis": (lambda p: savez(p, images=images()[:, 0]), ("[32,8,8]", "expects")),
    "folder without files": (lambda p: folder(p), ("no .npy or .npz", "numpy.save")),
    "pickled": (lambda p: savez(p, images=np.array([{"x": 1}], object)), ("Python objects", "numpy.savez")),
    "no such file": (lambda p: p / "nowhere.npz", ("no such file", "give a .npz")),
    "text": (lambda p: written(p, b"1,2,3\n"), ("cannot be read", "numpy.savez")),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_data_that_cannot_be_meant_is_refused(case: str, tmp_path: Path) -> None:
    make, words = REFUSED[case]
    given, out = tmp_path / "given", tmp_path / "out.onnx"
    given.mkdir()
    done = call("optimize", MODEL, "--passes", "quantize", "--calib", make(given), "-o", out, code=3)
    for word in words:
        assert word in last_line(done)
    assert "Traceback" not in done.stderr
    assert not done.stdout
    assert sorted(file.name for file in tmp_path.iterdir()) == ["given"]


def test_nan_that_a_function_yields_late_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "late.py").write_text(
        "import numpy as np\n"
        "def feeds():\n"
        "    for i in range(40):\n"
        "        x = np.full((1, 1, 8, 8), i / 40, np.float32)\n"
        "        x[0, 0, 0, 0] = np.nan if i == 33 else 0\n"
        "        yield {'images': x}\n"
    )
    monkeypatch.chdir(tmp_path)
    done = call("optimize", MODEL, "--passes", "quantize", "--calib", "late:feeds", "-o", "out.onnx", code=3)
    assert "late:feeds" in last_line(done) and "sample 33" in last_line(done)
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize(
    ("samples", "told"),
    [
        (lambda: images()[:1], ["ranges come from one sample"]),
        (
            lambda: np.zeros((9, 1, 8, 8), np.float32),
            ["all 9 calibration samples are the same", "is 0 everywhere on the calibration data"],
        ),
    ],
    ids=["one sample", "black images"],
)
def test_too_little_data_works_and_warns(samples: Callable[[], Images], told: list[str], tmp_path: Path) -> None:
    """A layer whose input never varies stays in float, and is named: no range follows from one number."""
    calib, out = savez(tmp_path, images=samples()), tmp_path / "out.onnx"
    done = call("optimize", MODEL, "--passes", "quantize", "--calib", calib, "-o", out)
    assert any(line.startswith("warning: ") and told[0] in line for line in done.stderr.splitlines())
    assert all(words in done.stdout + done.stderr for words in told)
    assert out.exists()


def test_random_numbers_are_warned_of(tmp_path: Path) -> None:
    done = call("optimize", MODEL, "--passes", "fold", "--calib", "random", "-o", tmp_path / "out.onnx")
    assert "warning: calibrated on random numbers: the result says nothing about real inputs" in done.stderr


def test_what_is_ignored_or_converted_is_told(tmp_path: Path) -> None:
    calib = savez(tmp_path, images=images().astype(np.float64), labels=np.zeros(32, np.int64))
    told = call("optimize", MODEL, "--passes", "fold", "--calib", calib, "-o", tmp_path / "out.onnx").stderr
    assert f"{calib}: key 'labels' is no input and is ignored" in told
    assert "float64" in told and "warning" not in told
