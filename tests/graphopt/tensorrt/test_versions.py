"""What came with which TensorRT."""

from __future__ import annotations

import pytest

from graphopt.delegates import delegate
from graphopt.errors import UsageError
from graphopt.tensorrt.versions import feature_since, newest_opset, operator_since, version_of


def test_versions_are_read() -> None:
    assert version_of("10.3") == version_of("10.3.0") == (10, 3) < version_of("10.13")
    for wrong in ("10", "", "ten.3", "10.x"):
        with pytest.raises(UsageError, match="no version of TensorRT"):
            version_of(wrong)


def test_operator_sets_rise_with_versions() -> None:
    known = [newest_opset(v) for v in ((8, 0), (8, 6), (9, 2), (10, 3), (10, 13), (10, 15), (11, 4))]
    assert known == sorted(known) and known[0] == 17 and newest_opset((10, 3)) == 21 and known[-1] == 25


def test_dated_operators_are_in_the_table_of_operators() -> None:
    table = delegate("tensorrt")
    assert operator_since("Conv") is None and operator_since("Attention") == "10.14"
    for op in ("Attention", "Gelu", "GroupNormalization", "RMSNormalization", "STFT", "TensorScatter", "DeformConv"):
        assert operator_since(op) is not None and table.rules_for(op), op
    assert feature_since("einsum") == (10, 12)
