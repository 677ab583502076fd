"""shrink finds every dead unit and changes nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_graphs import random_graph
from text_graph import graph

from graphopt import model as models
from graphopt.analysis.certificate import choose, zero_units
from graphopt.analysis.units import analyse
from graphopt.base import Context
from graphopt.passes.shrink import Shrink
from graphopt.progress import Silent
from graphopt.target import Target
from graphopt.verify import compare, random_feeds

CONTEXT = Context(Target("cpu", "ort"), None, None, 0, 1, Silent())


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.integers(0, 2**31))
def test_planted_units_are_removed_and_the_function_stays(seed: int) -> None:
    model = random_graph(seed)
    coupling = analyse(model)
    read = {int(u) for s in coupling.sinks for v in coupling.axis_units(s.value, s.axis) for u in v}
    dead = choose(coupling, 0.4, seed) & read  # the graph may end in a branch that nothing reads
    zero_units(model, coupling, dead)
    shrunk = model.clone()
    result = Shrink().run(shrunk, CONTEXT)
    assert not result.changed or compare(model, shrunk, random_feeds(model, seed)).worst_relative < 1e-4
    assert not dead or int(result.notes[0].split()[1]) >= len(dead)


@pytest.mark.parametrize("name", ["resnet56_cifar10", "ppocr_cls", "minilm_l6"])
def test_planted_units_of_real_models(data_dir: Path, name: str) -> None:
    model = models.load(data_dir / "models" / f"{name}.onnx")
    coupling = analyse(model)
    dead = choose(coupling, 0.3, 1)
    zero_units(model, coupling, dead)
    shrunk = model.clone()
    result = Shrink().run(shrunk, CONTEXT)
    assert f"removed {len(dead)} of" in result.notes[0]
    assert compare(model, shrunk, random_feeds(model, 0)).worst_relative <= 1e-5


def test_a_constant_channel_goes_and_its_constant_stays() -> None:
    """A zero filter with a bias: relu(bias) is folded into the next bias, twice over."""
    model = graph(
        "(float[n,3,8,8] x) => (float[n,2,8,8] y)",
        "a = Conv(x, w1, b1)  r = Relu(a)  b = Conv(r, w2)  s = Relu(b)  y = Conv(s, w3, b3)",
        w1=(4, 3, 1, 1),
        b1=(4,),
        w2=(3, 4, 1, 1),
        w3=(2, 3, 1, 1),
        b3=(2,),
    )
    w1 = model.graph.initializers["w1"].const_value.numpy().copy()
    w1[2] = 0
    w2 = model.graph.initializers["w2"].const_value.numpy().copy()
    w2[1, [0, 1, 3]] = 0  # channel 1 of the second convolution reads the constant alone: constant, too
    from graphopt.analysis.shapes import set_constant

    set_constant(model.graph.initializers["w1"], w1)
    set_constant(model.graph.initializers["w2"], w2)
    shrunk = model.clone()
    result = Shrink().run(shrunk, CONTEXT)
    assert result.changed
    sizes = {v.name: tuple(v.const_value.shape) for v in shrunk.graph.initializers.values()}
    assert (sizes["w1"], sizes["w2"], sizes["w3"]) == ((3, 3, 1, 1), (2, 3, 1, 1), (2, 2, 1, 1))
    assert compare(model, shrunk, random_feeds(model, 0)).worst_relative < 1e-6


def test_a_constant_next_to_padding_stays_and_says_why() -> None:
    model = graph(
        "(float[n,3,8,8] x) => (float[n,2,8,8] y)",
        "a = Conv(x, w1, b1)  y = Conv<pads=[1,1,1,1]>(a, w2)",
        w1=np.concatenate([np.ones((2, 3, 1, 1)), np.zeros((1, 3, 1, 1))]).astype(np.float32),
        b1=np.ones(3, np.float32),
        w2=(2, 3, 3, 3),
    )
    result = Shrink().run(model, CONTEXT)
    assert not result.changed
    assert any("padding" in skip.reason for skip in result.skipped)


def test_the_last_position_of_an_axis_stays() -> None:
    model = graph(
        "(float[n,3,8,8] x) => (float[n,2,8,8] y)",
        "a = Conv(x, w1)  y = Conv(a, w2, b2)",
        w1=np.zeros((4, 3, 1, 1), np.float32),
        w2=(2, 4, 1, 1),
        b2=(2,),
    )
    result = Shrink().run(model, CONTEXT)
    assert tuple(model.graph.initializers["w1"].const_value.shape) == (1, 3, 1, 1)
    assert any("last position" in skip.reason for skip in result.skipped)


def test_a_model_without_dead_units_is_untouched() -> None:
    model = random_graph(3)
    assert not Shrink().run(model, CONTEXT).changed
