"""Budgets of the pass quantize: kept when the model is measured, refused where no formats keep them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from quantization_traps import outlier_channel_cnn, plain_attention, plain_cnn, samples

from graphopt import calibration, model, registry
from graphopt.base import Context, PassResult
from graphopt.errors import MissingBackendError, UsageError
from graphopt.executor import Session
from graphopt.model import weight_bytes
from graphopt.passes.quantize import Quantize
from graphopt.progress import Silent

COLUMNS = {"layer", "op", "type", "bits", "output SQNR dB, alone", "noise recovered in float", "time us", "bytes"}


def _run(before: ir.Model, target: str = "cpu", **options: Any) -> tuple[ir.Model, PassResult]:
    after = before.clone()
    data = calibration.load(samples(before, 32, 1), before)
    result = Quantize(**options).run(after, Context(registry.target(target), data, None, 0, 1, Silent()))
    model.check(after)
    return after, result


def _fidelity(before: ir.Model, after: ir.Model) -> float:
    """Mean cosine by sample of the worst output, on the calibration data."""
    feeds = samples(before, 32, 1)
    wanted, found = Session(before).run(feeds), Session(after, optimize=True).run(feeds)
    worst = 1.0
    for name, want in wanted.items():
        a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (want, found[name]))
        cosines = np.sum(a * b, axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        worst = min(worst, float(cosines.mean()))
    return worst


@pytest.mark.parametrize("build", [plain_cnn, plain_attention])
@pytest.mark.parametrize("size", [0.35, 0.6])
def test_size_is_kept_by_the_bytes_of_the_model(build, size):
    before = build(0)
    after, result = _run(before, scheme="auto", size=size)
    assert weight_bytes(after) <= size * weight_bytes(before)
    rows = result.details["quantised layers"]
    assert {"float"} < {row["type"] for row in rows} or size < 0.5
    assert all(set(row) >= COLUMNS for row in rows)
    assert all(row["bytes"] < row["bytes in float"] for row in rows if row["type"] != "float" and row["bytes in float"])


def test_more_room_is_less_noise():
    before = plain_attention(0)
    tight, wide = (_run(before, scheme="auto", size=size)[0] for size in (0.3, 0.7))
    assert _fidelity(before, wide) >= _fidelity(before, tight)


@pytest.mark.parametrize("drop", [1e-5, 1e-3])
def test_drop_is_kept_by_the_fidelity_of_the_model(drop):
    before = outlier_channel_cnn(0)
    after, result = _run(before, drop=drop, prepare="none")
    assert 1 - _fidelity(before, after) <= drop
    assert any("a drop of" in note for note in result.notes)


def test_a_layer_that_a_drop_does_not_allow_stays_in_float():
    """int8 throughout costs some 1e-2 here."""
    before = outlier_channel_cnn(0)
    _, loose = _run(before, drop=1.0, prepare="none")
    _, strict = _run(before, drop=1e-5, prepare="none")
    floats = [sum(row["type"] == "float" for row in r.details["quantised layers"]) for r in (loose, strict)]
    assert floats[0] < floats[1]


def test_one_scheme_allows_that_format_and_float_only():
    _, result = _run(plain_attention(0), scheme="int8-weights", size=0.6)
    assert {row["type"] for row in result.details["quantised layers"]} == {"float", "int8-weights"}


def test_times_are_measured_inside_the_model():
    _, result = _run(plain_cnn(0), latency=1.5)
    times = [row["time us in float"] for row in result.details["quantised layers"]]
    assert all(time is not None and time > 0 for time in times)
    assert any("of the time" in note for note in result.notes)


def test_budgets_that_nothing_keeps_are_refused_with_what_is_possible():
    with pytest.raises(UsageError, match=r"size could be 0\.\d+"):
        _run(plain_cnn(0), size=0.01)


def test_a_latency_that_cannot_be_measured_here_is_refused():
    with pytest.raises(MissingBackendError, match="jetson-orin"):
        _run(plain_cnn(0), "jetson-orin", latency=0.5)


def test_sizes_need_no_clock():
    before = plain_cnn(0)
    after, result = _run(before, "jetson-orin", size=0.6)
    assert weight_bytes(after) <= 0.6 * weight_bytes(before)
    assert all(row["time us"] is None for row in result.details["quantised layers"])


def test_floats_of_16_bits_take_no_budget():
    with pytest.raises(UsageError, match="budgets"):
        Quantize(scheme="fp16", size=0.5)
