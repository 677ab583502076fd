"""quantize on networks with one thing in each on which naive int8 breaks: accurate on unseen data, or refused by name.

What a layer needs it gets by itself: scales made alike beforehand, a range of its own, or float. The report names what
stays in float, and what is loud.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from quantization_traps import PLAIN, TRAPS, Trap, samples, sharp_softmax

from graphopt import calibration, model
from graphopt.base import Context, PassResult
from graphopt.executor import Session
from graphopt.passes.quantize import Quantize
from graphopt.progress import Silent
from graphopt.registry import pass_class
from graphopt.target import Target

ENOUGH_DB = 35.0


def _quantised(trap: Trap, seed: int = 0, **options: Any) -> tuple[ir.Model, PassResult, float]:
    """The quantised model, the result, and the signal-to-noise ratio of its worst output on unseen samples."""
    before = trap(seed)
    after = before.clone()
    data = calibration.load(samples(before, 48, seed + 1000), before)
    context = Context(Target("cpu", "ort"), data, None, 0, 1, Silent(), pass_class)
    result = Quantize(**options).run(after, context)
    model.check(after)
    unseen = samples(before, 48, seed + 2000)
    wanted, found = Session(before).run(unseen), Session(after, optimize=True).run(unseen)
    return after, result, min(_decibel(wanted[name], found[name]) for name in wanted)


def _decibel(wanted: np.ndarray, found: np.ndarray) -> float:
    noise = np.sum((found.astype(np.float64) - wanted) ** 2) / np.sum(wanted.astype(np.float64) ** 2)
    return float(-10 * np.log10(max(noise, 1e-30)))


def _named(result: PassResult) -> str:
    return " ".join([*result.notes, *(f"{skip.node}: {skip.reason}" for skip in result.skipped)])


@pytest.mark.parametrize("trap", [t for t in (*PLAIN, *TRAPS) if t is not sharp_softmax], ids=lambda t: t.__name__)
def test_accurate_on_unseen_data_or_refused_by_name(trap):
    _, result, reached = _quantised(trap)
    assert reached >= ENOUGH_DB, _named(result)
    in_float = [row["layer"] for row in result.details["quantised layers"] if row["type"] == "float32"]
    told = _named(result)
    # Operators between layers follow them into float without a word.
    assert all(name in told for name in in_float if name.startswith(("Conv", "Gemm", "MatMul")))


@pytest.mark.parametrize("trap", PLAIN, ids=lambda t: t.__name__)
def test_without_a_trap_the_work_is_done_on_integers(trap):
    quantised, _, _ = _quantised(trap)
    weights = [v for name, v in quantised.graph.initializers.items() if name.endswith("_quantized")]
    assert sum(v.const_value.dtype == ir.DataType.INT8 for v in weights) >= 2


def test_noise_that_a_network_amplifies_everywhere_is_told_with_its_loudest_layers():
    _, result, reached = _quantised(sharp_softmax)
    assert reached >= 25
    assert any("most comes from" in note or "cost more than they save" in note for note in result.notes)


def test_left_alone_the_traps_are_traps():
    """The control: without the measures that this is about, nearly all of the named ones fail."""
    names = {"outlier_channel_cnn", "outlier_weight_cnn", "residual_cnn", "concat_cnn", "giant_row_embedding"}
    for trap in TRAPS:
        if trap.__name__ in names:
            assert _quantised(trap, sensitive="none", prepare="none")[2] < ENOUGH_DB
