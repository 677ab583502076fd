"""What the analysis calls EXACT is exact: zeroed and pruned models agree, models pruned elsewhere do not."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_graphs import random_graph
from random_norm_graphs import norm_graph

from graphopt import model as models
from graphopt.analysis.certificate import certify, choose
from graphopt.analysis.units import analyse


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.integers(0, 2**31))
def test_random_graphs_hold_their_certificates(seed: int) -> None:
    model = random_graph(seed)
    coupling = analyse(model)
    dead = choose(coupling, 0.5, seed)
    if dead:
        assert certify(model, coupling, dead, seed=seed).holds


@pytest.mark.parametrize("seed", range(30))
def test_graphs_full_of_norms_hold_their_certificates(seed: int) -> None:
    model = norm_graph(seed)
    coupling = analyse(model)
    dead = choose(coupling, 0.5, seed)
    if dead:
        assert certify(model, coupling, dead, seed=seed).holds


def test_certificates_have_power() -> None:
    """Zeroing matters and pruning other units is noticed, in nearly all random graphs."""
    told, asked = 0, 0
    for seed in range(40):
        model = random_graph(seed)
        coupling = analyse(model)
        dead = choose(coupling, 0.5, seed)
        if not dead:
            continue
        certificate = certify(model, coupling, dead, seed=seed)
        if certificate.control is not None:
            asked += 1
            told += certificate.control > 1e-3 and certificate.effect > 1e-3
    assert asked >= 30
    assert told >= 0.9 * asked


def _samples(data_dir: Path, name: str) -> list[dict] | None:
    spec = importlib.util.spec_from_file_location("evaluate", data_dir / "evaluate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    path = data_dir / "inputs" / f"{name}.npz"
    return list(module.samples(path))[:2] if path.is_file() else None


@pytest.mark.parametrize(
    ("name", "units"),
    [
        ("resnet20_cifar10", 400),  # 3 x (16 + 32 + 64) inner channels and the stream of 64 through option-A shortcuts
        ("resnet56_cifar10", 1072),
        ("ultraface_rfb320", 1000),
        ("yunet_n_dynamic", 500),
        ("ppocr_cls", 500),
        ("dnsmos_sig_bak_ovr", 500),
        ("basic_pitch", 50),
        ("minilm_l6", 9000),
        ("stories260k", 500),
        ("silero_vad_v5_if", 700),
    ],
)
def test_real_models_hold_their_certificates(data_dir: Path, name: str, units: int) -> None:
    model = models.load(data_dir / "models" / f"{name}.onnx")
    coupling = analyse(model)
    assert len(coupling.units) >= units
    certificate = certify(model, coupling, choose(coupling, 0.5, 1), _samples(data_dir, name))
    assert certificate.holds
    assert certificate.control is not None
    assert certificate.control > 100 * certificate.difference


@pytest.mark.parametrize("name", ["dtln_1", "gtcrn", "magika_v3_3", "stories260k_kv"])
def test_what_cannot_be_followed_is_frozen_with_a_reason(data_dir: Path, name: str) -> None:
    coupling = analyse(models.load(data_dir / "models" / f"{name}.onnx"))
    assert all(frozen.reason for frozen in coupling.frozen)
    assert all(unit.exact or unit.reason for unit in coupling.units)
