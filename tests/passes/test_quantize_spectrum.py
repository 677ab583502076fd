"""quantize on a network that computes a spectrum by convolutions, which integers ruin: found without being told."""

from __future__ import annotations

import numpy as np
import pytest

from graphopt import calibration, model
from graphopt.base import Context
from graphopt.executor import Session
from graphopt.passes.quantize import Quantize
from graphopt.progress import Silent
from graphopt.quantization.static.rules import RULES, Kind
from graphopt.registry import target

NAME = "dnsmos_sig_bak_ovr"


def _decibel(wanted: np.ndarray, found: np.ndarray) -> float:
    return float(10 * np.log10(np.sum(wanted.astype(float) ** 2) / np.sum((found.astype(float) - wanted) ** 2)))


@pytest.mark.data
def test_speech_quality_network_keeps_its_spectrum_in_float(data_dir):
    before = model.load(data_dir / "models" / f"{NAME}.onnx")
    after = before.clone()
    with np.load(data_dir / "inputs" / f"{NAME}.npz") as stored:
        audio = np.concatenate([stored[key] for key in stored.files])
    context = Context(target("cpu"), calibration.load({"input_1": audio}, before), None, 0, 1, Silent())
    result = Quantize().run(after, context)
    in_float = {skip.node for skip in result.skipped}
    assert {"stft-real", "stft-imag"} <= in_float
    products = [r for r in result.details["quantised layers"] if RULES[r["op"]].kind is Kind.COMPUTE]
    assert sum(r["type"] == "int8" for r in products if r["op"] == "Conv") >= 7  # what takes the time is in integers
    with np.load(data_dir / "inputs" / "audio_16k.npz") as stored:
        speech = stored["mix"].astype(np.float32) / 32768
    unseen = speech[None, : audio.shape[1]]
    a, b = Session(before, optimize=True), Session(after, optimize=True)
    assert _decibel(*(next(iter(s.run({"input_1": audio}).values())) for s in (a, b))) >= 50
    assert _decibel(*(next(iter(s.run({"input_1": unseen}).values())) for s in (a, b))) >= 30
