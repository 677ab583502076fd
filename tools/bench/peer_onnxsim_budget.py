"""A model through onnxsim.pruning down to a number of parameters; transformers.py runs it in a venv that has onnxsim.

    PYTHON peer_onnxsim_budget.py MODEL CALIBRATION.npz PARAMETERS l2|wanda OUT

One sparsity for hidden units and for heads alike is bisected. Keys of the calibration are '<call>|<input>'.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import onnx
import onnxsim
from onnxsim import pruning

STEPS = 7


def parameters(model: onnx.ModelProto) -> int:
    return sum(int(np.prod(tensor.dims)) for tensor in model.graph.initializer if tensor.data_type == 1)


def pruned(model: onnx.ModelProto, method: str, calls: list[dict[str, Any]], sparsity: float) -> onnx.ModelProto:
    if method == "l2":
        small = pruning.apply_structured_pruning(model, sparsity=sparsity)
        return pruning.apply_attention_head_pruning(small, sparsity=sparsity)
    small = pruning.apply_structured_wanda_pruning(model, calibration_data=calls, sparsity=sparsity)
    return pruning.apply_attention_head_wanda_pruning(small, calibration_data=calls, sparsity=sparsity)


def main(source: str, calibration: str, wanted: int, method: str, target: str) -> None:
    calls: dict[str, dict[str, Any]] = {}
    with np.load(calibration) as arrays:
        for key in arrays.files:
            call, _, name = key.partition("|")
            calls.setdefault(call, {})[name] = arrays[key]
    model, _ = onnxsim.simplify(onnx.load(source), perform_optimization=True)
    low, high = 0.0, 0.95
    best = None
    for _ in range(STEPS):
        middle = (low + high) / 2
        small = pruned(model, method, list(calls.values()), middle)
        if parameters(small) <= wanted:
            best, high = small, middle
        else:
            low = middle
    if best is None:
        sys.exit(f"onnxsim reaches no {wanted} parameters: {parameters(small)} are left at a sparsity of {middle:.2f}")
    onnx.save(best, target)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4], sys.argv[5])
