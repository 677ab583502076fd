"""README.md and bench.sh, rendered from a manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from graphopt.lowering.readme import render, write_bench

MANIFEST: dict[str, Any] = {
    "target": {"name": "box", "description": "a box"},
    "source": None,
    "run": ["python3", "run.py"],
    "bench": ["python3", "bench.py"],
    "about": {"model.onnx": "the model"},
    "needs": [],
    "guide": "",
    "inputs": [{"name": "a|b", "dtype": "float32", "shape": [None, 3, "seq"]}],
    "outputs": [{"name": "y", "dtype": "int64", "shape": None}],
    "measured": None,
    "verified": None,
    "pipeline": {"optimize": None, "prepare": []},
    "calibration": None,
    "versions": {"graphopt": "1"},
    "report": {},
    "limits": [],
    "warnings": [],
}


def test_nothing_measured_is_said_and_empty_sections_are_left_out(tmp_path: Path) -> None:
    text = render(tmp_path, MANIFEST)
    assert text.startswith("# A model for box\n\na box\n\n## Run")
    assert "not measured here" in text
    assert "not compared" in text
    assert r"| input | `a\|b` | float32 | [?, 3, seq] |" in text
    assert "| output | `y` | int64 | any |" in text
    for absent in ("Limits", "needs", "Optimised with", "None", "\n\n\n"):
        assert absent not in text


def test_figures_are_sentences() -> None:
    verified = {
        "relative": 1e-6, "cosine": 1.0, "feeds": 1, "inputs": "random", "ran": "the bundle", "reference": "a runtime",
    }  # fmt: skip
    measured = {"latency_ms": 2.0, "inputs": "random", "ratio_to_onnxruntime": 0.5, "onnxruntime_ms": 4.0}
    text = render(Path(), MANIFEST | {"verified": verified, "measured": measured})
    assert "Run on 1 random input: the bundle. Compared with the model by a runtime." in text
    assert "ONNX Runtime takes 4 ms for the model as it was given: this bundle takes 0.5 times as long." in text
    assert "ratio_to" not in text and "onnxruntime_ms" not in text


def test_measured_figures_are_told_with_their_origin(tmp_path: Path) -> None:
    report = {
        "model": "net.onnx",
        "accuracy": {"metric": "top1", "before": 0.91, "after": 0.9},
        "fidelity": {"cosine": 0.99912345, "data": "calibration"},
        "latency": {"ratio": 0.5, "low": 0.4, "high": 0.6, "rounds": 7},
    }
    measured = {"latency_ms": 2.5, "inputs": "real", "threads": 2, "processor": "a chip", "ratio_to_ort": 1.25}
    step = {"pass": "fold", "status": "applied", "relative": 1e-7, "notes": []}
    text = render(
        tmp_path,
        MANIFEST | {"report": report, "measured": measured, "pipeline": {"optimize": "prune", "prepare": [step]}},
    )
    for told in (
        "# `net.onnx` for box", "Accuracy (top1): 0.9, before the optimisation 0.91.", "0.999123 (calibration inputs)",
        "0.5 (quartiles 0.4 to 0.6, 7 pairs)", "2.5 ms a run (real inputs, 2 threads, a chip)", "ratio_to_ort: 1.25",
        "`fold`: applied, relative difference 1e-07", "Optimised with `prune`",
    ):  # fmt: skip
        assert told in text, told


def test_what_could_not_be_measured_is_no_figure(tmp_path: Path) -> None:
    latency = {"ratio": None, "reason": "cannot run here"}
    assert "Latency" not in render(tmp_path, MANIFEST | {"report": {"latency": latency, "accuracy": None}})


def test_a_bench_script_of_the_backend_stays(tmp_path: Path) -> None:
    (tmp_path / "bench.sh").write_text("mine")
    assert "    sh bench.sh\n" in render(tmp_path, MANIFEST)
    write_bench(tmp_path, MANIFEST)
    assert (tmp_path / "bench.sh").read_text() == "mine"
    (tmp_path / "bench.sh").write_text('echo "usage: bench.sh in.npz"')
    assert "    sh bench.sh in.npz\n" in render(tmp_path, MANIFEST)
