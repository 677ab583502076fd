"""Units in bodies of If, Loop and Scan, counted by hand; and random graphs of which a part moved into a body."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from random_graphs import random_graph
from text_graph import graph
from wrapped_graphs import KINDS, wrapped_graph

from graphopt.analysis.certificate import certify, choose, zero_units
from graphopt.analysis.cost import model_stats
from graphopt.analysis.remove import remove_units
from graphopt.analysis.units import Coupling, analyse
from graphopt.base import Context
from graphopt.model import infer_shapes, load, save
from graphopt.passes.shrink import Shrink
from graphopt.progress import Silent
from graphopt.target import Target
from graphopt.verify import compare, random_feeds

MLP = "(float[n,3] x, bool c) => (float[n,2] y)"
CELL = "a = MatMul(s, wi)  b = MatMul(h, wh)  d = Add(a, b)  e = Add(d, bi)  h1 = Tanh(e)  out = Identity(h1)"
SCAN = f"last, r = Scan <num_scan_inputs = 1, body = b (float[n,6] h, float[n,4] s) => (float[n,6] h1, float[n,6] out) {{ {CELL} }}> (h0, p)"  # noqa: E501
LOOP = f"last, r = Loop <body = b (int64 i, bool on, float[n,6] h) => (bool on1, float[n,6] h1, float[n,6] out) {{ s = Gather(p, i)  {CELL}  on1 = Identity(on) }}> (trips, , h0)"  # noqa: E501
RNN = "(float[5,n,3] x, float[n,1] one) => (float[5,n,2] y)"
WEIGHTS: dict[str, Any] = {"wp": (3, 4), "z": (1, 6), "wi": (4, 6), "wh": (6, 6), "bi": (6,), "wo": (6, 2)}


def rnn(repeat: str, **more: Any) -> ir.Model:
    """Projection -> recurrent cell over five steps -> classifier on every step."""
    body = f"p = MatMul(x, wp)  h0 = MatMul(one, z)  {repeat}  y = MatMul(r, wo)"
    return graph(RNN, body, **{**WEIGHTS, **more})


def proved(model: ir.Model, share: float = 0.5) -> Coupling:
    """The analysis of a model, whose certificate holds and can tell."""
    coupling = analyse(model)
    certificate = certify(model, coupling, choose(coupling, share, 1))
    assert certificate.holds
    assert certificate.control is not None and certificate.control > 1e-3
    return coupling


def parts(coupling: Coupling) -> list[list[tuple[str, int, tuple[int, ...]]]]:
    """Units by what they consist of."""
    return sorted(sorted((m.parameter, m.axis, m.indices) for m in unit.members) for unit in coupling.units)


def test_branches_share_the_units_of_what_they_capture_and_give() -> None:
    model = graph(
        MLP,
        """h = MatMul(x, w1)
           k = If (c) <then_branch = t () => (float[n,4] u) { u = Relu(h) },\
                       else_branch = e () => (float[n,4] v) { v0 = MatMul(x, w3)  v = Neg(v0) }>
           y = MatMul(k, w2)""",
        w1=(3, 4),
        w2=(4, 2),
        w3=(3, 4),
    )
    coupling = proved(model)
    assert {(m.parameter, m.axis) for m in coupling.units[0].members} == {("w1", 1), ("w2", 0), ("w3", 1)}
    assert len(coupling.units) == 4
    assert all(unit.exact for unit in coupling.units)


def test_branches_that_leave_different_constants_are_not_exact() -> None:
    model = graph(
        MLP,
        """h = MatMul(x, w1)
           k = If (c) <then_branch = t () => (float[n,4] u) { u = Relu(h) },\
                       else_branch = e () => (float[n,4] v) { v = Sigmoid(h) }>
           y = MatMul(k, w2)""",
        w1=(3, 4),
        w2=(4, 2),
    )
    coupling = analyse(model)
    assert len(coupling.units) == 4
    assert not any(unit.exact for unit in coupling.units)


def test_constants_fold_inside_a_body() -> None:
    """Sigmoid(0) = 1/2 goes into a bias that the branch did not have; the other branch reads the unit, too."""
    model = graph(
        MLP,
        """h = MatMul(x, w1)  s = Sigmoid(h)
           y = If (c) <then_branch = t () => (float[n,2] u) { u = MatMul(s, w2) },\
                       else_branch = e () => (float[n,2] v) { v0 = Neg(s)  v = Gemm(v0, w3) }>""",
        w1=(3, 4),
        w2=(4, 2),
        w3=(4, 2),
    )
    coupling = proved(model)
    pruned = model.clone()
    report = remove_units(pruned, coupling, {1})
    assert len(report.folded) == 2
    assert not report.assumed_zero


def test_a_branch_of_another_shape_freezes_with_the_reason() -> None:
    model = graph(
        "(float[n,3] x, bool c) => (float[m,2] y)",
        """h = MatMul(x, w1)
           k = If (c) <then_branch = t () => (float[n,4] u) { u = Relu(h) },\
                       else_branch = e () => (float[m,4] v) { v = Reshape(h, shape) }>
           y = MatMul(k, w2)""",
        w1=(3, 4),
        w2=(4, 2),
        shape=np.array([-1, 1, 4]),
    )
    coupling = analyse(model)
    assert not coupling.units
    assert any("shape is not always the same" in f.reason for f in coupling.frozen if f.tensor == "w1")


@pytest.mark.parametrize("where", ["initializers", "constants"])
def test_weights_in_bodies_belong_to_units(where: str) -> None:
    """Each branch has a first layer of its own inside; they are cut together, and where they stand."""
    model = graph(
        MLP,
        """k = If (c) <then_branch = t () => (float[n,4] u) { u0 = MatMul(x, w1)  u = Relu(u0) },\
                       else_branch = e () => (float[n,4] v) { v0 = MatMul(x, w3)  v = Relu(v0) }>
           y = MatMul(k, w2)""",
        w1=(3, 4),
        w2=(4, 2),
        w3=(3, 4),
    )
    choice = next(node for node in model.graph if node.op_type == "If")
    for attribute, name in (("then_branch", "w1"), ("else_branch", "w3")):
        body, value = choice.attributes[attribute].as_graph(), model.graph.initializers.pop(name)
        if where == "initializers":
            body.register_initializer(value)
        else:
            node = ir.node("Constant", [], attributes={"value": value.const_value}, name=f"{name}_node")
            body.insert_before(body[0], node)
            value.replace_all_uses_with(node.outputs[0])
            node.outputs[0].name = name
    infer_shapes(model)
    coupling = proved(model)
    assert {(m.parameter, m.axis) for m in coupling.units[0].members} == {("w1", 1), ("w2", 0), ("w3", 1)}
    pruned = model.clone()
    remove_units(pruned, coupling, {1})
    bodies = {a: next(n for n in pruned.graph if n.op_type == "If").attributes[a].as_graph() for a in choice.attributes}
    for body in bodies.values():
        weight = next(n for n in body if n.op_type == "MatMul").inputs[1]
        assert weight is not None and weight.graph is body
        assert weight.shape == ir.Shape([3, 3])


@pytest.mark.parametrize("repeat", [SCAN, LOOP], ids=["Scan", "Loop"])
def test_a_carried_state_is_one_axis(repeat: str) -> None:
    """Six hidden positions across initial state, recurrent weight, bias and readers; four projected features."""
    coupling = proved(rnn(repeat, trips=np.array(5)))
    assert len(coupling.units) == 4 + 6
    assert all(unit.exact for unit in coupling.units)
    hidden = next(unit for unit in coupling.units if any(m.parameter == "wh" for m in unit.members))
    assert {(m.parameter, m.axis) for m in hidden.members} == {
        *(("z", 1), ("wi", 1), ("wh", 0), ("wh", 1), ("bi", 0), ("wo", 0))
    }


def test_work_in_a_body_counts_as_often_as_it_runs() -> None:
    for repeat in (SCAN, LOOP):
        terms = {t.node: t for t in analyse(rnn(repeat, trips=np.array(5))).terms}
        assert terms["a"].coefficient == 5
        assert len(terms["b"].axes) == 2
    unknown = graph(
        "(float[5,n,3] x, float[n,1] one, int64 trips) => (float[k,n,2] y)",
        f"p = MatMul(x, wp)  h0 = MatMul(one, z)  {LOOP}  y = MatMul(r, wo)",
        **WEIGHTS,
    )
    assert {t.node: t for t in analyse(unknown).terms}["a"].coefficient == 1
    # per sample: 5 x 3 x 4 projected, 5 x (4 x 6 + 6 x 6) in the cell, 5 x 6 x 2 classified; and 1 x 6 for the state
    assert model_stats(rnn(SCAN)).macs == 60 + 300 + 60 + 6
    assert "depends on the data" in (model_stats(unknown).macs_unknown or "")


def test_a_state_without_declared_shape_is_shown_to_keep_it() -> None:
    model = rnn(LOOP, trips=np.array(5))
    next(n for n in model.graph if n.op_type == "Loop").attributes["body"].as_graph().inputs[2].shape = None
    infer_shapes(model)
    assert len(proved(model).units) == 10


GROWING = """last = Loop <body = b (int64 i, bool on, float[k,6] h) => (bool on1, float[m,6] h1)
    { h1 = Concat<axis=0>(h, more)  on1 = Identity(on) }> (trips, , h0)"""


def test_a_state_that_grows_keeps_the_axes_that_do_not() -> None:
    """Rows are added in every run, which is no reason to keep all columns."""
    model = graph(
        "(float[1,3] x) => (float[k,2] y)",
        f"h0 = MatMul(x, w)  more = MatMul(x, v)  {GROWING}  y = MatMul(last, wo)",
        w=(3, 6),
        v=(3, 6),
        wo=(6, 2),
        trips=np.array(3),
    )
    next(n for n in model.graph if n.op_type == "Loop").attributes["body"].as_graph().inputs[2].shape = None
    infer_shapes(model)
    assert len(proved(model).units) == 6


def test_a_state_whose_shape_turns_is_frozen_with_the_reason() -> None:
    model = graph(
        "(float[n,3] x) => (float[n,2] y)",
        """h0 = MatMul(x, w)  z = ReduceSum<keepdims=0>(h0, rows)
           last = Loop <body = b (int64 i, bool on, float[k] h) => (bool on1, float[m] h1)
                        { h1 = Concat<axis=0>(h, z)  on1 = Identity(on) }> (trips, , z)
           t = ReduceSum<keepdims=1>(last)  u = Mul(h0, t)  y = MatMul(u, wo)""",
        w=(3, 6),
        wo=(6, 2),
        rows=np.array([0]),
        trips=np.array(3),
    )
    coupling = analyse(model)
    assert not coupling.units
    assert any("changes its size" in f.reason for f in coupling.frozen if f.tensor == "w")


@pytest.mark.parametrize(("after", "exact"), [("h1 = Relu(h)", 4), ("h1 = Exp(h)", 0), ("h1 = Add(h, ones)", 0)])
def test_a_state_is_zero_as_long_as_every_run_leaves_it_so(after: str, exact: int) -> None:
    model = graph(
        "(float[n,3] x) => (float[n,2] y)",
        f"""h0 = MatMul(x, w)
            last = Loop <body = b (int64 i, bool on, float[n,4] h) => (bool on1, float[n,4] h1)
                         {{ {after}  on1 = Identity(on) }}> (trips, , h0)
            y = MatMul(last, wo)""",
        w=(3, 4),
        wo=(4, 2),
        ones=np.float32(1),
        trips=np.array(2),
    )
    coupling = analyse(model)
    assert len(coupling.units) == 4
    assert sum(unit.exact for unit in coupling.units) == exact


def test_states_that_depend_on_each_other_are_followed_to_the_end() -> None:
    """The first state starts at zero and takes over the second one in the second run, which Exp has made 1 by then."""
    model = graph(
        "(float[n,3] x) => (float[n,2] y)",
        """a0 = MatMul(x, w)  b0 = MatMul(x, v)  c0 = MatMul(x, u)
           a, b, c = Loop <body = b (int64 i, bool on, float[n,4] p, float[n,4] q, float[n,4] r)
                                   => (bool on1, float[n,4] p1, float[n,4] q1, float[n,4] r1)
              { p1 = Relu(q)  q1 = Relu(r)  r1 = Exp(r)  on1 = Identity(on) }> (trips, , a0, b0, c0)
           y = MatMul(a, wo)""",
        w=(3, 4),
        v=(3, 4),
        u=(3, 4),
        wo=(4, 2),
        trips=np.array(3),
    )
    coupling = analyse(model)
    assert len(coupling.units) == 4
    assert not any(unit.exact for unit in coupling.units)


def test_an_if_in_a_loop() -> None:
    body = CELL.replace(
        "h1 = Tanh(e)",
        """c = Less(i, two)
           h1 = If (c) <then_branch = t () => (float[n,6] u) { u = Tanh(e) },\
                        else_branch = e () => (float[n,6] v) { v0 = MatMul(h, wv)  v = Tanh(v0) }>""",
    )
    coupling = proved(rnn(LOOP.replace(CELL, body), trips=np.array(5), two=np.array(2), wv=(6, 6)))
    assert len(coupling.units) == 10
    assert any(m.parameter == "wv" for unit in coupling.units for m in unit.members)


def test_bodies_that_use_one_name_for_different_values_are_not_entered() -> None:
    model = graph(
        MLP,
        """h = MatMul(x, w1)
           k = If (c) <then_branch = t () => (float[n,4] u) { u = Relu(h) },\
                       else_branch = e () => (float[n,4] u) { u = Neg(h) }>
           y = MatMul(k, w2)""",
        w1=(3, 4),
        w2=(4, 2),
    )
    coupling = analyse(model)
    assert not coupling.units
    assert any("names of its bodies" in f.reason for f in coupling.frozen if f.tensor == "w1")


def test_shrink_works_in_bodies_and_the_file_can_be_loaded(tmp_path: Any) -> None:
    model = rnn(SCAN)
    coupling = analyse(model)
    zero_units(model, coupling, {2, 5, 7})
    dense = model.clone()
    result = Shrink().run(model, Context(Target("cpu", "ort"), None, None, 0, 1, Silent()))
    assert result.changed
    save(model, tmp_path / "m.onnx")
    again = load(tmp_path / "m.onnx")
    assert compare(dense, again, random_feeds(dense, 1)).worst_relative < 1e-5
    assert len(analyse(again).units) == 10 - 3


@pytest.mark.parametrize("kind", KINDS)
def test_units_do_not_depend_on_the_graph_they_stand_in(kind: str) -> None:
    """Random graphs, a stretch of which moved into a body: the same units, and certificates hold."""
    seen = 0
    for seed in range(16):
        model = wrapped_graph(seed, kind)
        if model is None:
            continue
        seen += 1
        coupling = analyse(model)
        if kind != "state":
            plain = analyse(random_graph(seed))
            assert parts(coupling) == parts(plain) or _follows_sizes(plain, coupling)
        dead = choose(coupling, 0.5, seed)
        assert not dead or certify(model, coupling, dead, seed=seed).holds
    assert seen >= 6


def _follows_sizes(plain: Coupling, wrapped: Coupling) -> bool:
    """Sizes that the graph itself computes are not followed by value in a body: less is known there, never more."""
    computed = any(node.op_type == "Shape" for node in plain.model.graph)
    return computed and len(wrapped.units) < len(plain.units)
