"""unroll-recurrent: the steps compute what the operator computes."""

import itertools

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from graphopt import registry
from graphopt.base import Context
from graphopt.executor import Session
from graphopt.passes.unroll_recurrent import UnrollRecurrent
from graphopt.progress import Silent

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
STEPS, BATCH, INPUTS, HIDDEN = 5, 3, 4, 2


def recurrent(kind, *, steps=STEPS, batch=BATCH, direction="forward", bias=True, states=True, peepholes=False,
              lengths=None, outputs=None, **attributes):  # fmt: skip
    """A model of one node whose inputs are x and the states."""
    rng = np.random.default_rng(0)
    directions = 2 if direction == "bidirectional" else 1
    rows = GATES[kind] * HIDDEN
    made = {"W": (directions, rows, INPUTS), "R": (directions, rows, HIDDEN)}
    if bias:
        made["B"] = (directions, 2 * rows)
    if peepholes:
        made["P"] = (directions, 3 * HIDDEN)
    weights = [numpy_helper.from_array(rng.normal(size=s).astype(np.float32), n) for n, s in made.items()]
    if lengths is not None:
        weights.append(numpy_helper.from_array(np.array(lengths, np.int32), "lengths"))
    by_batch = attributes.get("layout", 0)
    state = [batch, directions, HIDDEN] if by_batch else [directions, batch, HIDDEN]
    x = [batch, steps, INPUTS] if by_batch else [steps, batch, INPUTS]
    inputs = [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, x)]
    names = ["x", "W", "R", "B" if bias else "", "lengths" if lengths is not None else ""]
    if states:
        given = ["h", "c"] if kind == "LSTM" else ["h"]
        inputs += [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, state) for n in given]
        names += given
    if peepholes:
        names += [""] * (7 - len(names)) + ["P"]
    given_out = outputs or (["y", "yh", "yc"] if kind == "LSTM" else ["y", "yh"])
    node = helper.make_node(kind, names, given_out, "rnn", hidden_size=HIDDEN, direction=direction, **attributes)
    infos = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in given_out if n]
    graph = helper.make_graph([node], "g", inputs, infos, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


def unrolled(model, **options):
    copy = model.clone()
    result = UnrollRecurrent(**options).run(copy, Context(registry.target("cpu"), None, None, 0, 1, Silent()))
    return copy, result


def feeds(model, batch=BATCH):
    rng = np.random.default_rng(1)
    return {
        v.name: rng.normal(size=[d if isinstance(d, int) else batch for d in v.shape]).astype(np.float32)
        for v in model.graph.inputs
    }


def same(model, copy, given):
    a, b = Session(model, optimize=False).run(given), Session(copy, optimize=False).run(given)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "direction", "bias", "states"),
    list(itertools.product(GATES, ("forward", "reverse", "bidirectional"), (True, False), (True, False))),
)
def test_steps_compute_what_the_operator_computes(kind, direction, bias, states):
    model = recurrent(kind, direction=direction, bias=bias, states=states)
    copy, result = unrolled(model)
    assert result.changed and not {n.op_type for n in copy.graph} & GATES.keys()
    same(model, copy, feeds(model))


@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
def test_the_reset_gate_of_a_gru_may_act_on_the_product(direction):
    model = recurrent("GRU", direction=direction, linear_before_reset=1)
    copy, _ = unrolled(model)
    same(model, copy, feeds(model))


def test_a_gru_without_state_keeps_the_bias_that_the_reset_gate_multiplies():
    model = recurrent("GRU", states=False, linear_before_reset=1, steps=1)
    copy, _ = unrolled(model)
    same(model, copy, feeds(model))


def test_peepholes_and_other_activations():
    model = recurrent("LSTM", peepholes=True, activations=["Sigmoid", "Relu", "Tanh"])
    copy, result = unrolled(model)
    assert result.changed
    same(model, copy, feeds(model))


def test_only_the_last_state_is_read():
    model = recurrent("LSTM", outputs=["", "yh"])
    copy, _ = unrolled(model)
    assert not any(n.op_type == "Unsqueeze" and n.outputs[0].name == "y" for n in copy.graph)
    same(model, copy, feeds(model))


def test_an_open_batch_stays_open():
    model = recurrent("GRU", batch="N")
    copy, _ = unrolled(model)
    for batch in (1, 4):
        same(model, copy, feeds(model, batch))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"steps": "T"}, "--dim"),
        ({"clip": 1.0}, "clip"),
        ({"lengths": [5, 4, 3]}, "lengths"),
        ({"activations": ["HardSigmoid", "Tanh"]}, "parameters"),
    ],
)
def test_what_is_not_written_out_is_told(options, reason):
    model = recurrent("GRU", **options)
    copy, result = unrolled(model)
    assert not result.changed and [n.op_type for n in copy.graph] == ["GRU"]
    (skip,) = result.skipped
    assert skip.node == "rnn" and reason in skip.reason


def test_long_sequences_stay_and_full_lengths_do_not_matter():
    model = recurrent("RNN", lengths=[STEPS] * BATCH)
    assert "max_steps is 4" in unrolled(model, max_steps=4)[1].skipped[0].reason
    copy, result = unrolled(model)
    assert result.changed
    same(model, copy, feeds(model))
