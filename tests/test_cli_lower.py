"""The commands about bundles: lower, run, and optimize into a folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner, Result

from graphopt import registry
from graphopt.backends.ort import OrtBackend
from graphopt.cli import cli
from graphopt.executor import Session

DIGITS = Path(__file__).resolve().parent.parent / "examples" / "digits"
MODEL, CALIB = str(DIGITS / "digits.onnx"), str(DIGITS / "calib.npz")


@pytest.fixture(autouse=True)
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt.backends.ort.LOWER_SECONDS", 0.02)
    monkeypatch.setattr(OrtBackend, "unavailable", lambda self, target: "not here" if target.device == "gpu" else None)


def call(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr, result.exception)
    return result


def last_line(result: Result) -> str:
    return result.stderr.rstrip().splitlines()[-1]


def test_a_bundle_is_verified_described_and_run(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    done = call("lower", MODEL, "--target", "cpu", "-o", folder, "--verify", "--calib", CALIB, "--json")
    said = json.loads(done.stdout)
    assert {Path(f).name for f in said["files"]} == {p.name for p in folder.iterdir()}
    assert said["verified"]["relative"] < 1e-4
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["source"]["name"] == "digits.onnx"
    assert len(manifest["source"]["sha256"]) == len(manifest["calibration"]["sha256"]) == 64
    with np.load(CALIB) as data:
        feeds = {name: data[name][:3] for name in data.files}
    np.savez(tmp_path / "x.npz", **feeds)
    call("run", folder, "--input", tmp_path / "x.npz", "-o", tmp_path / "y.npz")
    with np.load(tmp_path / "y.npz") as found:
        np.testing.assert_allclose(found["logits"], Session(Path(MODEL)).run(feeds)["logits"], atol=1e-4)
    plain = call("lower", MODEL, "--target", "cpu", "-o", tmp_path / "other", "--verify").stdout
    assert "differs from MODEL by" in plain and "README.md" in plain


def test_a_folder_of_optimize_holds_the_bundle_and_what_it_was_made_of(tmp_path: Path) -> None:
    out = tmp_path / "out"
    call("optimize", MODEL, "--passes", "fold", "--target", "gpu", "-o", out)
    assert {"optimized.onnx", "model.onnx", "manifest.json", "README.md", "report.json"} <= {
        p.name for p in out.iterdir()
    }
    assert (out / "model.onnx").stat().st_size < 0.7 * (out / "optimized.onnx").stat().st_size
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["pipeline"]["optimize"] == "fold"
    assert manifest["pipeline"]["prepare"][0]["pass"] == "quantize{scheme=fp16}"
    assert set(manifest["files"]) < {p.name for p in out.iterdir()}
    call("optimize", MODEL, "--passes", "fold", "--target", "cpu", "-o", out)  # the same folder, for another target
    assert json.loads((out / "manifest.json").read_text())["target"]["name"] == "cpu"


def test_what_a_bundle_warns_of_is_in_the_report(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = call("optimize", MODEL, "--passes", "fold", "--target", "jetson-orin", "-o", out)
    warnings = json.loads((out / "manifest.json").read_text())["warnings"]
    assert any("nobody gave a range" in warning for warning in warnings)
    assert set(warnings) <= set(json.loads((out / "report.json").read_text())["warnings"])
    assert "nobody gave a range" in (out / "report.html").read_text()
    assert "nobody gave a range" in " ".join(done.stderr.split())


def test_open_sizes_are_refused_before_the_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt.manager.PassManager.run", None)
    done = call("optimize", MODEL, "--passes", "fold", "--target", "ios", "-o", tmp_path / "out", code=3)
    assert "takes fixed sizes only" in last_line(done) and "--dim" in last_line(done)
    assert not (tmp_path / "out").exists()


def test_a_file_of_several_calls_is_no_input_of_a_run(tmp_path: Path) -> None:
    call("lower", MODEL, "--target", "cpu", "-o", tmp_path / "bundle")
    with np.load(CALIB) as data:
        np.savez(tmp_path / "x.npz", **{f"0|{name}": data[name][:1] for name in data.files})
        names = sorted(data.files)
    done = call("run", tmp_path / "bundle", "--input", tmp_path / "x.npz", "-o", tmp_path / "y.npz", code=3)
    assert f"'0|{names[0]}', and a bundle runs one call" in last_line(done)
    assert not (tmp_path / "y.npz").exists()


def test_a_type_that_onnx_runtime_does_not_compute_is_lowered_but_not_compared(tmp_path: Path) -> None:
    text = """<ir_version: 9, opset_import: ["" : 17]> net (bfloat16[2,4] x) => (bfloat16[2,4] y)
    <bfloat16[4,4] w = {1,0,0,0,0,1,0,0,0,0,1,0,0,0,0,1}> { y = MatMul(x, w) }"""
    ir.save(ir.from_onnx_text(text), tmp_path / "net.onnx")
    out = tmp_path / "bundle"
    done = call("lower", tmp_path / "net.onnx", "--target", "torch-cpu", "-o", out, "--verify", code=6)
    assert "nothing to compare the bundle with" in last_line(done) and "leave --verify out" in last_line(done)
    assert not out.exists()
    call("lower", tmp_path / "net.onnx", "--target", "torch-cpu", "-o", out)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--set", "sizes"), "'sizes' is not NAME=VALUE"),
        (("--set", "size=1"), "no such option; leave it out (its options: compress, ort, sizes)"),
        (("--set", "ort=perhaps"), "'perhaps' is no bool"),
        (("--set", "ort=yes", "--set", "ort=no"), "given twice"),
        (("--tune", "60"), "tune: backend 'ort' has no such option"),
        (("--set", "target=cpu"), "target: is no option of a backend"),
        (("--set", "compress=yes", "--compress"), "given twice"),
        (("--tolerance", "nan", "--verify"), "tolerance"),
        (("--tolerance", "1e-3"), "--verify"),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(tmp_path: Path, arguments: tuple[str, ...], told: str) -> None:
    done = call("lower", MODEL, "--target", "cpu", "-o", tmp_path / "b", *arguments, code=2)
    assert told in last_line(done)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_bundle_exits_4_and_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(Session):
        def run(self, feeds):  # type: ignore[no-untyped-def]
            return {name: array * 1.5 for name, array in super().run(feeds).items()}

    monkeypatch.setattr(OrtBackend, "open", lambda self, bundle, threads=1: Wrong(bundle.model))
    done = call("lower", MODEL, "--target", "cpu", "-o", tmp_path / "b", "--verify", code=4)
    assert "differs by 0.5" in last_line(done) and "nothing was written" in last_line(done)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_tool_exits_6_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OrtBackend, "missing", lambda self, target: "there is no linker (apt install g++)")
    for command in (("lower", MODEL, "--target", "cpu"), ("optimize", MODEL, "--passes", "fold", "--target", "cpu")):
        done = call(*command, "-o", tmp_path / "b", code=6)
        assert "apt install g++" in last_line(done)
    assert list(tmp_path.iterdir()) == []
    table = json.loads(call("targets", "cpu", "--json").stdout)
    assert (table["lowers here"], table["why not lowered"]) == (False, "there is no linker (apt install g++)")
    assert "lowers here" in call("targets").stdout


def test_every_target_says_what_it_lacks_here() -> None:
    for name in registry.targets():
        table = json.loads(call("targets", name, "--json").stdout)
        assert table["lowers here"] or table["why not lowered"]
        assert table["runs here"] or table["why not"]


def test_run_takes_labels_beside_inputs_and_helps_with_what_does_not_fit(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "bundle"
    call("lower", MODEL, "--target", "cpu", "-o", folder)
    with np.load(CALIB) as data:
        feeds = {name: data[name][:1] for name in data.files}

    def run(path: str, code: int, **arrays: np.ndarray) -> Result:
        if arrays:
            np.savez(tmp_path / path, **arrays)
        return call("run", folder, "--input", tmp_path / path, "-o", tmp_path / "y.npz", code=code)

    run("labelled.npz", 0, **feeds, labels=np.zeros(1, np.int64))
    wide = run("wide.npz", 3, **{name: array.astype(np.float64) for name, array in feeds.items()})
    assert "store it as .astype('float32') gives it" in last_line(wide)
    assert "leave it out" in last_line(run("more.npz", 3, **feeds, other=np.zeros(1)))
    assert "there is no such file" in last_line(run("absent.npz", 3))


def test_the_table_of_a_target_is_folded_and_whole() -> None:
    told = call("targets", "jetson-orin").stdout
    assert max(map(len, told.splitlines())) <= 120
    limit = registry.target("jetson-orin").limits[0]
    assert limit in " ".join(told.split())
