"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def fresh_generator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module's RNG starts anew in every test: what a test draws must not depend on which tests ran before it."""
    if hasattr(request.module, "RNG"):
        monkeypatch.setattr(request.module, "RNG", np.random.default_rng(0))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of shared real models and data; the test is skipped where it is absent."""
    path = Path(os.environ.get("GRAPHOPT_DATA", REPOSITORY.parent / "shared" / "data")).resolve()
    if not (path / "MANIFEST.json").is_file():
        pytest.skip(f"shared models and data not found at {path}; set GRAPHOPT_DATA")
    return path
