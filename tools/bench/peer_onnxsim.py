"""Networks through onnxsim.pruning: PYTHON tools/bench/peer_onnxsim.py FOLDER NETWORK ...

Run by coverage.py with the interpreter of an environment that holds onnxsim. FOLDER holds NETWORK.onnx, in which more
than half of every layer's width is zero, and NETWORK.npz with inputs. The tool removes what has least norm, so an exact
tool takes only zeros at half the width, and the outputs stay. Prints a line of JSON a network: the share of the
parameters that left and the largest relative change of an output, or the error.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import onnxsim
from onnxsim import pruning


def run(model: onnx.ModelProto, feeds: dict[str, Any]) -> list[Any]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    return ort.InferenceSession(model.SerializeToString(), options).run(None, feeds)


def parameters(model: onnx.ModelProto) -> int:
    return sum(int(np.prod(tensor.dims)) for tensor in model.graph.initializer if tensor.data_type == 1)


def prune(path: Path) -> dict[str, Any]:
    feeds = dict(np.load(path.with_suffix(".npz")))
    model, _ = onnxsim.simplify(onnx.load(path), perform_optimization=True)
    small = pruning.apply_attention_head_pruning(pruning.apply_structured_pruning(model, sparsity=0.5), sparsity=0.5)
    worst = 0.0
    for expected, found in zip(run(model, feeds), run(small, feeds), strict=True):
        if expected.shape != found.shape:
            raise ValueError(f"an output changes its shape from {expected.shape} to {found.shape}")
        gap = np.linalg.norm((expected - found).ravel().astype(np.float64))
        worst = max(worst, float(gap / max(np.linalg.norm(expected.ravel().astype(np.float64)), 1e-30)))
    return {"removed": 1 - parameters(small) / parameters(model), "difference": worst}


def main(folder: Path, names: list[str]) -> None:
    for name in names:
        try:
            found = prune(folder / f"{name}.onnx")
        except Exception as error:  # a tool that fails on a network is a finding, not an end
            found = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps({"network": name, **found}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
