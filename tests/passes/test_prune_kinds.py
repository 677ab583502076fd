"""prune{fixed=...}: kinds of units that stay, as positions within heads where a kernel has one size of head."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
from attention_graphs import DIM, HEADS, fused, separate
from text_graph import graph

from graphopt.analysis.cost import model_stats
from graphopt.analysis.members import Mode
from graphopt.analysis.units import analyse
from graphopt.base import Context
from graphopt.calibration import load
from graphopt.errors import UsageError
from graphopt.model import infer_shapes
from graphopt.passes.prune import Kind, Prune
from graphopt.pipeline.clone import private_clone
from graphopt.progress import Silent
from graphopt.spec import parse, to_spec
from graphopt.target import Target


def pruned(model, **options):
    copy = private_clone(model)
    feeds = {"x": np.random.default_rng(0).normal(size=(32, 5, 12)).astype(np.float32)}
    target = Target("test", "ort", channel_multiple=1)
    result = Prune(**options).run(copy, Context(target, load(feeds, copy), None, 0, 1, Silent()))
    return copy, result


@pytest.mark.parametrize("make", [separate, fused])
def test_whole_heads_go_where_places_in_heads_are_fixed(make):
    model = make()
    assert {"head", "head_dim"} <= {unit.mode for unit in analyse(model).units}
    small, result = pruned(model, params=0.6, fixed=("head_dim",))
    assert model_stats(small).parameters <= 0.6 * model_stats(model).parameters
    assert splits(small) == {(HEADS - 1, DIM)} != splits(model)
    assert any("units stay, because fixed=head_dim" in note for note in result.notes)


def splits(model):
    """Heads and their size, of every Reshape that splits an axis."""
    infer_shapes(model)
    split = (n for n in model.graph if n.op_type == "Reshape" and len(n.outputs[0].shape) > len(n.inputs[0].shape))
    return {tuple(n.outputs[0].shape)[-2:] for n in split}


def test_without_heads_places_go():
    model = separate()
    small, _ = pruned(model, params=0.8, fixed=("head",))
    assert [u.mode for u in analyse(small).units].count("head") == HEADS
    assert model_stats(small).parameters <= 0.8 * model_stats(model).parameters


def test_attention_in_one_operator_is_pruned():
    """Its weights are operands along which units lie only head by head: no activation's power is theirs."""
    model = graph(
        "(float[n,s,16] x) => (float[n,s,8] y)",
        """h = MatMul(x, w)  r = Relu(h)
        a = com.microsoft.Attention<num_heads=2>(r, wa, ba)  y = MatMul(a, v)""",
        imports='"com.microsoft" : 1', w=(16, 16), wa=(16, 48), ba=(48,), v=(16, 8),
    )  # fmt: skip
    before = model_stats(model).parameters
    x = np.random.default_rng(0).normal(size=(16, 5, 16)).astype(np.float32)
    target = Target("cpu", "ort")
    assert Prune(params=0.7).run(model, Context(target, load({"x": x}, model), None, 0, 1, Silent())).changed
    assert model_stats(model).parameters <= 0.7 * before


def test_kinds_are_those_of_the_analysis_and_can_be_written():
    assert get_args(Kind) == get_args(Mode)
    (wanted,) = parse("prune{macs=0.5,fixed=(head_dim,group)}")
    assert wanted.fixed == ("head_dim", "group")
    assert parse(to_spec([wanted])) == (wanted,)


@pytest.mark.parametrize("fixed", [("heads",), "head_dim"])
def test_an_unknown_kind_is_refused(fixed):
    with pytest.raises(UsageError, match="no kind of unit"):
        Prune(macs=0.5, fixed=fixed)
