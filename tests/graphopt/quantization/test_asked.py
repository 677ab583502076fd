"""What quantize was asked and comes to nothing is told, and nothing is told where it counts."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
from text_graph import graph

import graphopt
from graphopt.passes.quantize import Quantize
from graphopt.quantization.asked import HALF, SERVES, unmatched, without_effect


def small():
    return graph(
        "(float[N,16] x) => (float[N,4] y)", "h = MatMul(x, w)  r = Relu(h)  y = MatMul(r, v)", w=(16, 8), v=(8, 4)
    )


def warnings(options: str) -> list[str]:
    calib = {"x": np.random.default_rng(0).standard_normal((32, 16)).astype(np.float32)}
    done = graphopt.optimize(small(), f"quantize{{{options}}}", calib=calib, bench=False, verify_each="structure")
    return list(done.report.warnings)


def test_globs_that_fit_no_node() -> None:
    assert unmatched(small(), ("MatMul*", "Relu(r)")) == []
    [told] = unmatched(small(), ("*", "Rely(r)"))
    assert "'Rely(r)' fits the name of no node" in told and "did you mean 'Relu(r)'" in told


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("exclude=(nosuch*,)", "exclude: 'nosuch*' fits the name of no node"),
        ("block=32,symmetric=true", "block, symmetric: no effect with scheme=int8"),
        ("scheme=fp16,ranges=mse,rounding=gptq", "ranges, rounding: no effect with scheme=fp16"),
        ("scheme=int8-weights,ranges=mse,rounding=gptq", "ranges: no effect with scheme=int8-weights"),
    ],
)
def test_the_pass_warns(options: str, told: str) -> None:
    assert any(warning.startswith(told) for warning in warnings(options))


def test_what_counts_is_not_warned_of() -> None:
    told = warnings("exclude=('MatMul*(h)',),ranges=mse,rounding=gptq,correct_bias=true")
    assert not any("no effect" in warning or "fits" in warning for warning in told)
    assert without_effect("fp16", ["samples", "exclude"]) == []
    assert without_effect("auto", [name for name, schemes in SERVES.items() if schemes != HALF]) == []


def test_the_table_names_options_and_schemes_that_there_are() -> None:
    options = {field.name: field for field in fields(Quantize)}
    assert SERVES.keys() <= options.keys()
    schemes = {"auto", "int8", "int8-dynamic", "int8-weights", "int4-weights", "fp16", "bf16"}
    assert {scheme for found in SERVES.values() for scheme in found} <= schemes
