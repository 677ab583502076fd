"""The command line: exit codes, what goes to which stream, and that nothing is written where something went wrong."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from graphopt import registry
from graphopt.cli import cli
from graphopt.jobs import describe_target
from graphopt.registry import targets
from graphopt.report.data import Report
from graphopt.target import Target

DIGITS = Path(__file__).resolve().parent.parent / "examples" / "digits"
MODEL, CALIB, EVAL = (str(DIGITS / name) for name in ("digits.onnx", "calib.npz", "eval.npz"))
GRAPHOPT = str(Path(sys.executable).with_name("graphopt"))


def call(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr, result.exception)
    return result


def last_line(result: Result) -> str:
    return result.stderr.rstrip().splitlines()[-1]


def test_help_needs_no_heavy_import() -> None:
    heavy = ("numpy", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "scipy", "networkx", "rich", "jinja2")
    program = f"import sys, graphopt.cli; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_names_commands_and_exit_codes() -> None:
    shown = call("--help").stdout
    for word in ("optimize", "inspect", "compare", "bench", "lower", "run", "passes", "targets", "130 interrupted"):
        assert word in shown


@pytest.mark.parametrize("command", ["optimize", "inspect", "compare", "bench", "lower", "run", "passes", "targets"])
def test_each_command_has_help(command: str) -> None:
    shown = call(command, "--help").stdout
    assert "--json" in shown and "--debug" in shown


def test_optimize_writes_a_folder(tmp_path: Path) -> None:
    out, recipe, page = tmp_path / "out", tmp_path / "recipe.toml", tmp_path / "page.html"
    done = call("optimize", MODEL, "--passes", "fold", "-o", out, "--save-recipe", recipe, "--report", page)
    assert "BatchNormalization" in done.stdout and "wrote" in done.stdout
    written = {file.name for file in out.iterdir()}
    assert {"model.onnx", "report.json", "report.html", "manifest.json", "run.py"} <= written
    report = Report.from_json((out / "report.json").read_text(encoding="utf-8"))
    assert report.output.ops.get("BatchNormalization", 0) == 0
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert "fold" in recipe.read_text(encoding="utf-8")
    call("compare", MODEL, out / "model.onnx")

    outputs = tmp_path / "y.npz"
    images = np.load(EVAL)["images"][:1]
    np.savez(tmp_path / "x.npz", images=images)
    call("run", out, "--input", tmp_path / "x.npz", "-o", outputs)
    with np.load(outputs) as arrays:
        assert arrays["logits"].shape == (1, 10)

    # The same folder may be written again; the recipe gives the same model.
    before = (out / "model.onnx").read_bytes()
    call("optimize", MODEL, "--recipe", recipe, "-o", out)
    assert (out / "model.onnx").read_bytes() == before


def test_optimize_compresses_what_is_sparse(tmp_path: Path) -> None:
    sparse = ("optimize", MODEL, "--passes", "sparsify{method=magnitude}", "--verify-each", "structure")
    full, small, archive = (tmp_path / name for name in ("full.onnx", "small.onnx", "small.safetensors"))
    call(*sparse, "-o", full)
    shown = call(*sparse, "-o", small, "--compress").stdout
    assert "2:4 along axis 1" in shown and "stored weights" in shown
    call(*sparse, "-o", archive, "--compress")
    assert max(small.stat().st_size, archive.stat().st_size) < 0.65 * full.stat().st_size
    call("compare", full, small, "--tolerance", 0)
    call("compare", small, archive, "--tolerance", 0)
    assert "2:4 along axis 1" in call("inspect", small).stdout
    found = json.loads(call("inspect", archive, "--json").stdout)["storage"]
    assert found["after"] < 0.65 * found["before"]
    assert json.loads(call("inspect", full, "--json").stdout)["storage"] is None
    call("optimize", small, "-O", "0", "-o", tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == full.read_bytes()

    out = tmp_path / "out"
    call(*sparse, "-o", out, "--compress")
    report = Report.from_json((out / "report.json").read_text(encoding="utf-8"))
    assert report.storage is not None
    assert next(t.share for t in report.storage.tensors if t.form == "2:4 along axis 1") == 0.5 + 1 / 32
    assert (out / "model.onnx").read_bytes() == small.read_bytes()
    np.savez(tmp_path / "x.npz", images=np.load(EVAL)["images"][:1])
    call("run", out, "--input", tmp_path / "x.npz", "-o", tmp_path / "y.npz")
    call("lower", full, "--target", "cpu", "-o", tmp_path / "bundle", "--compress")
    assert (tmp_path / "bundle" / "model.onnx").stat().st_size < 0.65 * full.stat().st_size


def test_where_there_is_nothing_to_compress_it_says_so(tmp_path: Path) -> None:
    done = call("optimize", MODEL, "--passes", "fold", "-o", tmp_path / "m.onnx", "--compress")
    assert "no weight is compressed" in done.stdout and "no weight is compressed" in last_line(done)
    assert "names" not in done.stderr
    refused = call("optimize", MODEL, "--passes", "fold", "--compress", code=2)
    assert "-o" in last_line(refused)


def test_json_alone_is_on_stdout() -> None:
    done = call("optimize", MODEL, "--passes", "fold", "--json")
    report = Report.from_json(done.stdout)
    assert [record.status for record in report.passes] == ["applied"]
    assert "pass fold" in done.stderr, "progress goes to stderr"


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["inspect", "nowhere.onnx"], 3, "nowhere.onnx"),
        (["inspect", MODEL, "--nonsense"], 2, "--nonsense"),
        (["optimize", MODEL, "--passes", "fld"], 2, "unknown pass"),
    ],
)
def test_an_error_is_json_too(arguments: list[str], code: int, says: str) -> None:
    done = call(*arguments, "--json", code=code)
    found = json.loads(done.stdout)["error"]
    assert found["exit_code"] == code
    assert says in f"{found['where']}: {found['what']}"
    assert says in last_line(done)


def test_the_report_of_refused_results_is_the_one_json_document() -> None:
    done = call("optimize", MODEL, "--passes", "fold", "--max-latency", "0.001", "--json", code=5)
    assert Report.from_json(done.stdout).passes[0].name == "fold"


@pytest.mark.parametrize("out", ["nowhere/x.onnx", "/proc/x.onnx", "/proc/x"])
def test_a_destination_that_takes_no_files_is_seen_before_the_work(tmp_path: Path, out: str) -> None:
    if out.startswith("/proc") and not Path("/proc/self").exists():
        pytest.skip("this system has no /proc, the folder that takes no files of anybody")
    done = call("optimize", "no_model_is_read.onnx", "--passes", "fold", "-o", tmp_path / out, code=2)
    assert out in last_line(done)
    assert list(tmp_path.iterdir()) == []


def test_wrong_labels_are_seen_before_the_work(tmp_path: Path) -> None:
    with np.load(EVAL) as data:
        np.savez(tmp_path / "eval.npz", **{**data, "labels": data["labels"] + 50})
    done = call("optimize", MODEL, "--passes", "fold", "--eval", tmp_path / "eval.npz", code=3)
    assert last_line(done).startswith(f"error: {tmp_path / 'eval.npz'}: label 59 for 10 classes")
    assert "pass fold" not in done.stderr


def test_the_preset_without_passes_copies(tmp_path: Path) -> None:
    done = call("optimize", MODEL, "-O0", "-o", tmp_path / "copy.onnx")
    assert "-O0 runs no pass" in done.stderr and "--passes ''" not in done.stderr
    call("compare", MODEL, tmp_path / "copy.onnx")


def test_a_preset_is_spelled_out_once() -> None:
    done = call("optimize", MODEL, "-O1", "--max-drop", "inf")
    assert (done.stdout + done.stderr).count("-O1 is --passes") == 1


def test_layers_that_differ_are_told(tmp_path: Path) -> None:
    small = tmp_path / "small.onnx"
    call("optimize", MODEL, "--passes", "fold", "-o", tmp_path / "folded.onnx")
    shown = call("compare", MODEL, tmp_path / "folded.onnx", "--layers").stdout
    assert "no layer stands out" in shown and "folded:" in shown
    call("optimize", MODEL, "--passes", "sparsify{method=magnitude}", "--verify-each", "structure", "-o", small)
    found = json.loads(call("compare", MODEL, small, "--layers", "--calib", CALIB, "--json", code=4).stdout)
    assert not found["equal"] and found["layers"]["schema"] == 1
    errors = [float(layer["added"]["sqnr_db"]) for layer in found["layers"]["layers"]]
    assert errors == sorted(errors) and errors[0] < 30
    assert "layers" not in json.loads(call("compare", MODEL, MODEL, "--json").stdout)
    assert "random numbers" in call("compare", MODEL, MODEL, "--layers").stderr


def test_models_with_other_inputs_are_not_compared(tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    inputs = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 7])
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["logits"])],
        "g",
        [inputs],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 7])],
    )
    other = tmp_path / "other.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), other)
    for command in ("compare", "bench"):
        says = last_line(call(command, MODEL, other, code=3))
        assert "the inputs differ" in says and f"{other} takes x float32 [N,7]" in says and "images" in says


def test_without_a_destination_it_says_that_nothing_was_written() -> None:
    done = call("optimize", MODEL, "--passes", "fold")
    assert "nothing was written: -o OUT writes the model" in done.stdout
    assert "pass fold" not in done.stdout


def test_dry_run_writes_no_model(tmp_path: Path) -> None:
    done = call("optimize", MODEL, "--passes", "fold,shrink", "--dry-run", "-o", tmp_path / "out")
    assert "planned" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_presets_print_what_they_expand_to() -> None:
    done = call("optimize", MODEL, "-O1", "--dry-run")
    assert "-O1 is --passes '" in done.stderr
    assert "--max-drop 0.01 --max-latency 1" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["optimize", MODEL, "--passes", "fld"], "did you mean 'fold'"),
        (["optimize", MODEL, "--passes", "fold{x=1}"], "no option"),
        (["optimize", MODEL, "--passes", "fold", "-O2"], "given together"),
        (["optimize", MODEL, "--passes", " "], "-O0 copies"),
        (["optimize", MODEL, "--max-latency", "0"], "max-latency"),
        (["lower", MODEL, "--target", "nope", "-o", "no-such-folder"], "cpu-arm64"),
        (["optimize", MODEL, "-O7"], "'7' is not one of"),
        (["optimize", MODEL, "--pases", "fold"], "--passes"),
        (["optimize", MODEL, "--target", "cpuu"], "did you mean 'cpu'"),
        (["optimize", MODEL, "--passes", "quantize"], "--calib"),
        (["optimize", MODEL, "--passes", "fold", "--max-drop", "lots"], "max-drop"),
        (["optimize", MODEL, "--dim", "batch"], "NAME=SIZE"),
        (["optimize", MODEL, "--dim", "batch=0"], "NAME=SIZE"),
        (["optimize", MODEL, "--input-shape", "x"], "NAME:SIZE,SIZE"),
        (["optimize", MODEL, "--input-shape", "x:1,0"], "NAME:SIZE,SIZE"),
        (["inspect", MODEL, "--input-shape", "nope:1,2"], "no input of this name"),
        (["optimize", MODEL, "--recipe", "nowhere.toml"], "nowhere.toml"),
        (["optimize"], "MODEL"),
        (["optimise", MODEL], "optimize"),
        (["passes", "quantise"], "did you mean 'quantize'"),
        (["targets", "cpuu"], "did you mean 'cpu'"),
    ],
)
def test_usage_errors_exit_2_and_tell_what_to_try(arguments: list[str], says: str) -> None:
    done = call(*arguments, code=2)
    assert says in done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert last_line(done).lower().startswith("error: ")


def _hostile(kind: str) -> bytes:
    whole = Path(MODEL).read_bytes()
    return {"empty": b"", "text": b"not a model\n" * 50, "truncated": whole[: len(whole) // 2]}[kind]


@pytest.mark.parametrize("kind", ["empty", "text", "truncated"])
@pytest.mark.parametrize("command", ["optimize", "inspect", "lower"])
def test_hostile_files_exit_3_and_leave_nothing(tmp_path: Path, kind: str, command: str) -> None:
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(_hostile(kind))
    options = {
        "optimize": ["--passes", "fold", "-o", tmp_path / "out.onnx"],
        "inspect": [],
        "lower": ["--target", "cpu", "-o", tmp_path / "out"],
    }[command]
    done = call(command, bad, *options, code=3)
    assert done.stdout == ""
    assert str(bad) in last_line(done)
    assert [file.name for file in tmp_path.iterdir()] == ["bad.onnx"]


def test_missing_model_exits_3() -> None:
    assert "nowhere.onnx" in last_line(call("inspect", "nowhere.onnx", code=3))


def test_wrong_data_exits_3(tmp_path: Path) -> None:
    np.savez(tmp_path / "calib.npz", pictures=np.zeros((4, 1, 8, 8), np.float32))
    done = call("optimize", MODEL, "--passes", "fold", "--calib", tmp_path / "calib.npz", code=3)
    assert "images" in last_line(done)


def test_a_gate_that_refuses_exits_5_and_writes_nothing(tmp_path: Path) -> None:
    done = call(
        "optimize", MODEL, "--passes", "fold", "--max-latency", "0.001", "-o", tmp_path / "out.onnx",
        "--report", tmp_path / "report.html", code=5,
    )  # fmt: skip
    assert "max-latency" in last_line(done)
    assert "fold" in done.stdout, "the report tells what was tried"
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_different_models_exit_4(tmp_path: Path) -> None:
    call("optimize", MODEL, "--passes", "quantize", "--calib", CALIB, "-o", tmp_path / "int8.onnx")
    done = call("compare", MODEL, tmp_path / "int8.onnx", "--calib", EVAL, code=4)
    assert "DIFFERENT" in done.stdout
    call("compare", MODEL, tmp_path / "int8.onnx", "--calib", CALIB, "--tolerance", "0.9")
    found = json.loads(call("compare", MODEL, MODEL, "--json").stdout)
    assert found["equal"] is True and found["worst_relative"] == 0


def test_a_target_that_cannot_run_here_exits_6() -> None:
    elsewhere = [name for name in targets() if not describe_target(name)["runs here"]]
    done = call("bench", MODEL, "--target", elsewhere[0], code=6)
    assert elsewhere[0] in last_line(done)


@pytest.mark.parametrize("command", ["optimize", "lower", "bench"])
def test_a_target_whose_backend_is_missing_exits_6_before_any_work(
    tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    board = Target("board", "runtime-of-nobody")
    monkeypatch.setattr(registry, "_target_tables", lambda: {"board": board})
    out = {"bench": (), "lower": ("-o", tmp_path / "out"), "optimize": ("--passes", "fold", "-o", tmp_path / "out")}
    done = call(command, MODEL, "--target", "board", *out[command], code=6)
    assert all(word in last_line(done) for word in ("board", "runtime-of-nobody", "-o MODEL.onnx"))
    assert done.stdout == "" and not (tmp_path / "out").exists()


def test_models_for_a_target_without_a_backend(tmp_path: Path) -> None:
    model = tmp_path / "sparse.onnx"
    sparse = ("--passes", "sparsify{method=magnitude,smallest=8}", "--target", "jetson-orin")
    done = call("optimize", MODEL, *sparse, "-o", model, "--report", tmp_path / "page.html")
    assert "linear layers are 2:4" in done.stdout and "fewer than 256" in done.stdout
    assert "Kernels that skip zeros" in (tmp_path / "page.html").read_text(encoding="utf-8")
    shown = call("inspect", model, "--target", "jetson-orin").stdout
    assert "unlikely" in shown and "--sparsity=enable" in shown
    assert "source of size: NVIDIA/TensorRT issues 3849" in shown
    found = json.loads(call("inspect", model, "--target", "jetson-orin", "--json").stdout)["sparsity"]
    assert found["schema"] == 1 and found["counts"]["unlikely"] > 0
    assert json.loads(call("inspect", model, "--json").stdout)["sparsity"] is None
    assert "no kernels that skip zeros" in call("inspect", model, "--target", "cpu").stdout
    table = json.loads(call("targets", "jetson-orin", "--json").stdout)
    assert table["sparse.inputs"] == 256 and "4054" in table["sparse.sources.grouped"] and not table["runs here"]


def test_internal_errors_exit_1_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any, **options: Any) -> None:
        raise ZeroDivisionError("of all things")

    monkeypatch.setattr("graphopt.inspection.inspect", broken)
    done = call("inspect", MODEL, code=1)
    assert "Traceback" not in done.stderr
    assert last_line(done) == (
        "error: internal error: ZeroDivisionError: of all things; run it again with --debug and report the traceback"
    )
    assert "Traceback" in call("inspect", MODEL, "--debug", code=1).stderr


def test_names_in_errors_cannot_act_on_a_terminal(tmp_path: Path) -> None:
    done = call("inspect", tmp_path / "\x1b[31mred.onnx", code=3)
    assert "\x1b" not in done.stderr and "\\x1b[31m" in done.stderr


def test_the_input_is_never_overwritten(tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    model.write_bytes(Path(MODEL).read_bytes())
    before = model.read_bytes()
    for out in (model, tmp_path):
        done = call("optimize", model, "--passes", "fold", "-o", out, "--force", code=2)
        assert "overwrite the input" in last_line(done)
    assert model.read_bytes() == before


def test_a_folder_with_other_things_needs_force(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    assert "--force" in last_line(call("optimize", MODEL, "--passes", "fold", "-o", tmp_path, code=2))
    assert "--force" in last_line(call("lower", MODEL, "--target", "cpu", "-o", tmp_path, code=2))
    call("lower", MODEL, "--target", "cpu", "-o", tmp_path, "--force")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_inspect_tells_what_the_delegates_of_a_target_take() -> None:
    found = json.loads(call("inspect", MODEL, "--target", "android-nnapi", "--json").stdout)["delegates"]
    assert [(r["delegate"], r["taken"] < r["nodes"]) for r in found] == [("nnapi", True)]
    shown = call("inspect", MODEL, "--target", "android-nnapi").stdout
    assert "NNAPI: " in shown and "what would help" in shown and "--dim" in shown
    assert json.loads(call("inspect", MODEL, "--json").stdout)["delegates"] == []


def test_inspect() -> None:
    found = json.loads(call("inspect", MODEL, "--units", "--json").stdout)
    assert found["schema"] == 1
    assert found["prunable"]["units"] == len(found["units"]) == sum(g["units"] for g in found["groups"]) > 0
    assert {unit["mode"] for unit in found["units"]} == {"channel"}
    assert all(unit["saves"]["parameters"] > 0 for unit in found["units"])
    assert found["prunable"]["exact_macs"] <= found["prunable"]["prunable_macs"] <= found["prunable"]["macs"]
    members = [(m["parameter"], m["axis"]) for unit in found["units"] for m in unit["members"]]
    assert ("head.weight", 1) in members and ("head.weight", 0) not in members
    assert any("output 'logits'" in row["reason"] for row in found["prunable"]["frozen"])
    shown = call("inspect", MODEL, "--units").stdout
    assert "head.weight axis 0" in shown and "removable units" in shown


def test_bench_prints_ratios() -> None:
    found = json.loads(call("bench", MODEL, MODEL, "--seconds", "0.2", "--json").stdout)
    assert found["models"][0]["ratio"] == 1
    assert 0.2 < found["models"][1]["ratio"] < 5
    assert "ratio" in call("bench", MODEL, "--seconds", "0.2", "--calib", CALIB).stdout


def test_lists_as_json() -> None:
    assert {row["pass"] for row in json.loads(call("passes", "--json").stdout)} >= {"fold", "shrink", "quantize"}
    assert json.loads(call("passes", "fold", "--json").stdout)["title"] == "fold"
    assert "cpu" in [row["name"] for row in json.loads(call("targets", "--json").stdout)]
    assert json.loads(call("targets", "cpu", "--json").stdout)["backend"] == "ort"


def test_interrupt_exits_130_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import pathlib, time\ndef feeds():\n    pathlib.Path('started').touch()\n    time.sleep(120)\n    yield {}\n"
    )
    command = [GRAPHOPT, "optimize", MODEL, "--passes", "fold", "--calib", "slow:feeds", "-o", "out.onnx"]
    # A process group of its own: the signal must not reach the test run.
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr and "interrupted" in stderr.splitlines()[-1]
    assert stdout == ""
    assert not (tmp_path / "out.onnx").exists()


def test_a_reader_that_goes_away_is_no_error() -> None:
    process = subprocess.Popen(
        [GRAPHOPT, "inspect", MODEL, "--units", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(timeout=60) == 141
    assert errors == b""


def test_frames_and_colour_on_a_terminal_only() -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"}
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen([GRAPHOPT, "targets"], stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    try:
        while block := os.read(ours, 4096):
            shown += block
    except OSError:  # Linux reports the end of a terminal so
        assert process.wait(timeout=60) == 0
    os.close(ours)
    assert "─".encode() in shown and b"\x1b[1m" in shown
    plain = subprocess.run([GRAPHOPT, "targets"], capture_output=True, env=environment, check=True).stdout
    assert b"\x1b" not in plain and "─".encode() not in plain
