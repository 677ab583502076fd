"""A report with something in every field, and names as a hostile model would have them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from graphopt.base import Skip
from graphopt.files.stored import Storage, StoredTensor
from graphopt.report.data import (
    Accuracy,
    Fidelity,
    GateRecord,
    Latency,
    OutputRecord,
    PassRecord,
    Report,
    Stats,
    Units,
    Verification,
)

HOSTILE = "<script>alert('x')</script><img src=x onerror=alert(1)>\x1b[31m\u202e&\"[red]"


def stored(name: str) -> StoredTensor:
    """A compressed weight."""
    return StoredTensor(name, "float32", [64, 32], "2:4 along axis 1", 8192, 4352, 0.53125, 1.0625)


@pytest.fixture
def report() -> Report:
    before = Stats(35, 382_042, 1_528_168, 23_914_560, {"Conv": 10, "BatchNormalization": 10, HOSTILE: 1}, {"": 17}, 8)
    folded = replace(before, nodes=24, bytes=1_521_000, ops={"Conv": 10})
    pruned = replace(folded, parameters=150_000, bytes=600_000, macs=9_100_000)
    quantized = replace(pruned, nodes=86, bytes=160_300, ops={"Conv": 10, "QuantizeLinear": 28})
    near = OutputRecord(HOSTILE, 1e-5, 3e-7, 1.0, 130.0, 1.0)
    far = OutputRecord("logits", 0.5, 0.03, 0.9987, 31.2, None)
    fold = PassRecord(
        "fold",
        "fold",
        "exact",
        "applied",
        before=before,
        after=folded,
        seconds=0.4,
        peak_memory=12_000_000,
        verification=Verification("random", 1e-4, True, [near]),
        skipped=[Skip(HOSTILE, f"the weight is shared {HOSTILE}"), Skip("b", "not constant")],
        notes=[HOSTILE],
    )
    prune = PassRecord(
        "prune",
        "prune{macs=0.4}",
        "lossy",
        "applied",
        before=folded,
        after=pruned,
        seconds=3.0,
        verification=Verification("calibration", None, True, [far]),
        gates=[GateRecord("max-drop", 0.01, 0.004, True, HOSTILE)],
        skipped=[Skip(f"node{i}", "channel axis frozen") for i in range(80)],
        notes=["warning: few samples"],
        details={HOSTILE: [{"layer": HOSTILE, "kept": 24, HOSTILE: None}, {"layer": "fc", "kept": 3}]},
    )
    quantize = PassRecord(
        "quantize", "quantize", "lossy", "undone", reason=HOSTILE, before=pruned, after=quantized, seconds=2.0
    )
    return Report(
        model=f"{HOSTILE}.onnx",
        target="cpu",
        pipeline="fold,prune{macs=0.4},quantize",
        seed=0,
        input=before,
        output=pruned,
        passes=[fold, prune, quantize],
        latency=Latency(0.413, 0.40, 0.425, 0.411, 0.170, 1, 1),
        fidelity=Fidelity(0.9987, "calibration", [far, near]),
        accuracy=Accuracy("top1", True, 0.9926, 0.9907),
        units=Units(
            512,
            500,
            382_042,
            301_000,
            300_000,
            frozen=[{"where": HOSTILE, "reason": "operator has no rule", "units": 48}],
        ),
        storage=Storage(
            258_000,
            139_960,
            [stored(f"layer{number}") for number in range(30)] + [stored(HOSTILE)],
            {f"too dense {HOSTILE}": 2},
            [f"IR version {HOSTILE}"],
        ),
        gates={"max_drop": 0.01, "max_latency": None},
        calibration="calib.npz",
        evaluation=HOSTILE,
        notes=[HOSTILE],
        warnings=[f"slower than the input {HOSTILE}"],
        versions={"graphopt": "0.1.0"},
        command=f"graphopt optimize '{HOSTILE}'",
        seconds=7.7,
    )
