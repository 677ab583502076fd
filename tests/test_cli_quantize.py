"""Exit codes and last words of the command line where quantisation is asked for by mistake."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from graphopt.cli import cli

DIGITS = Path(__file__).resolve().parent.parent / "examples" / "digits"
MODEL, CALIB = DIGITS / "digits.onnx", DIGITS / "calib.npz"


def call(passes: str, *arguments: object, model: Path = MODEL, code: int = 0) -> Result:
    result = CliRunner().invoke(cli, ["optimize", str(model), "--passes", passes, *(str(a) for a in arguments)])
    assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr, result.exception)
    return result


@pytest.mark.parametrize(
    ("passes", "arguments", "says"),
    [
        ("quantize{scheme=int5}", ("--calib", CALIB), "int5 is not auto | int8"),
        ("quantize{schema=int8}", ("--calib", CALIB), "did you mean 'scheme'?"),
        ("quantise", ("--calib", CALIB), "did you mean 'quantize'"),
        ("quantize{size=1.5}", ("--calib", CALIB), "1.5 is outside [0, 1]"),
        ("quantize{scheme=fp16,size=0.3}", (), "budgets choose between float and integers"),
        ("quantize{scheme=auto,data=none}", (), "only int8 without a budget does without data"),
        ("quantize{data=none,input_range=(2,-2)}", (), "not a range"),
        ("quantize{scheme=auto,assignment=(op:Conv=int8,)}", ("--calib", CALIB), "quote a value that holds"),
        ("quantize", ("--target", "ios", "--calib", CALIB), "pass 'quantize': target ios does not execute int8"),
        ("quantize{scheme=bf16}", (), "target cpu does not execute bfloat16"),
        ("quantize{scheme=auto}", (), "--calib"),
        ("quantize{size=0.01,sensitive=none,prepare=none}", ("--calib", CALIB), "alone, size could be 0.2"),
    ],
)
def test_wrong_requests_end_with_2_and_the_way_out(passes: str, arguments: tuple[object, ...], says: str) -> None:
    last = call(passes, *arguments, code=2).stderr.rstrip().splitlines()[-1]
    assert last.startswith("error: ") and says in last, last
    assert "quantize: quantize:" not in last


def test_a_quantised_model_is_left_as_it_is_and_told(tmp_path: Path) -> None:
    small = tmp_path / "small.onnx"
    call("quantize{scheme=int8-weights,rounding=nearest}", "-o", small)
    done = call("quantize", "--calib", CALIB, model=small)
    assert "nothing to do, the model is unchanged" in done.stdout


def test_a_glob_that_fits_no_node_is_warned_of(tmp_path: Path) -> None:
    done = call("quantize{scheme=int8-weights,rounding=nearest,exclude=(headd.*,)}", "-o", tmp_path / "small.onnx")
    assert "warning: exclude: 'headd.*' fits the name of no node" in done.stderr
