"""Branches: what is found, what is left of a sum, when nothing may go."""

import numpy as np
import onnx_ir as ir
import pytest
from residual_nets import residual_blocks
from text_graph import graph

from graphopt.executor import Session
from graphopt.model import check, infer_shapes
from graphopt.pruning.branches import Erased, erase, find_branches
from graphopt.rewriting.constants import constant

X = np.random.default_rng(3).normal(size=(4, 3, 8, 8)).astype(np.float32)


def outputs(model, *names, x=X):
    return Session(model, outputs=list(names) or None).run({"x": x})


def erased(model, branch, mean):
    copy = model.clone()
    found = erase(copy, branch, np.asarray(mean, dtype=np.float64))
    infer_shapes(copy)
    check(copy)
    return copy, found


def test_every_block_of_a_residual_network_is_a_branch():
    branches = find_branches(residual_blocks([1, 1, 1]))
    assert [(b.total, b.output, b.axis, set(b.nodes)) for b in branches] == [
        (f"e{i}", f"d{i}", 1, {f"b{i}", f"r{i}", f"d{i}"}) for i in range(3)
    ]


def test_a_branch_of_zeros_goes_without_a_trace():
    model = residual_blocks([1, 0, 1])
    model.graph.initializers["c1"].const_value = ir.tensor(np.zeros(8, np.float32), name="c1")
    small, found = erased(model, find_branches(model)[1], np.zeros(8))
    assert found == Erased("d0", "d0", "e0", "e1", True)
    assert len([n for n in small.graph if n.op_type == "Add"]) == 2
    assert len([n for n in small.graph if n.op_type == "Relu"]) == 5
    assert not {"v1", "u1", "c1"} & set(small.graph.initializers)
    want, have = outputs(model), outputs(small)
    assert np.allclose(want["y"], have["y"], rtol=1e-5, atol=1e-6)
    # what is left has the names of what it stands for
    assert np.allclose(outputs(model, "s2")["s2"], outputs(small, "s2")["s2"], atol=1e-5)


def test_without_activations_the_mean_goes_into_the_bias_exactly():
    model = residual_blocks([1, 0, 1], relu=False)
    mean = constant(model.graph.initializers["c1"]).numpy()
    branch = find_branches(model)[1]
    small, found = erased(model, branch, mean)
    assert found == Erased("d0", "d0", "s1", "s2", False)
    assert np.allclose(outputs(model)["y"], outputs(small)["y"], rtol=1e-5, atol=1e-5)
    assert len([n for n in small.graph if n.op_type == "Add"]) == 2
    # the negative control: another constant is another function
    other, _ = erased(model, branch, mean + 1)
    assert not np.allclose(outputs(model)["y"], outputs(other)["y"], rtol=1e-2)


def test_neighbours_leave_one_writer_for_the_last_sum():
    model = residual_blocks([1, 0, 0])
    small, first = erased(model, find_branches(model)[1], np.zeros(8))
    small, second = erased(small, find_branches(small)[1], np.zeros(8))
    assert (first.key, second.writer, second.total) == ("d0", "d0", "e2")
    assert [b.total for b in find_branches(small)] == ["e2"]  # block 0 now ends in the name of the last sum


def test_the_stem_writes_where_the_first_block_goes():
    model = residual_blocks([0.5, 1])
    _, found = erased(model, find_branches(model)[0], np.zeros(8))
    assert found == Erased("a", "e0", "a", "e0", True)  # its own output has the name of the sum


def test_a_stream_that_something_else_reads_keeps_its_sum():
    model = graph(
        "(float[n, 3, 8, 8] x) => (float[n, 8, 8, 8] y, float[n, 8, 8, 8] z)",
        "a = Conv <pads = [1, 1, 1, 1]> (x, w)  d = Conv <pads = [1, 1, 1, 1]> (a, v, c)  y = Add (d, a)  z = Tanh (a)",
        w=(8, 3, 3, 3), v=np.zeros((8, 8, 3, 3), np.float32), c=(8,),
    )  # fmt: skip
    (branch,) = find_branches(model)
    small, found = erased(model, branch, constant(model.graph.initializers["c"]).numpy())
    assert found == Erased(total="y")
    want, have = outputs(model), outputs(small)
    assert all(np.allclose(want[k], have[k], atol=1e-6) for k in want)
    assert sum(n.op_type == "Conv" for n in small.graph) == 1


def test_a_sum_that_is_an_output_keeps_its_name():
    model = graph(
        "(float[n, 3, 8, 8] x) => (float[n, 8, 8, 8] y)",
        "a = Conv <pads = [1, 1, 1, 1]> (x, w)  d = Conv <pads = [1, 1, 1, 1]> (a, v, c)  y = Add (a, d)",
        w=(8, 3, 3, 3), v=np.zeros((8, 8, 3, 3), np.float32), c=(8,),
    )  # fmt: skip
    small, found = erased(model, find_branches(model)[0], constant(model.graph.initializers["c"]).numpy())
    assert [v.name for v in small.graph.outputs] == ["y"]
    assert found.key == "y"
    assert np.allclose(outputs(model)["y"], outputs(small)["y"], atol=1e-6)


@pytest.mark.parametrize(
    ("inputs", "body", "why"),
    [
        ("x, float[1, 4] z", "p = MatMul (x, w)  q = MatMul (z, v)  y = Add (p, q)", "each side has its own input"),
        ("x", "p = MatMul (x, w)  q = Tanh (x)  y = Mul (p, q)", "no sum"),
        ("x", "p = Tanh (x)  q = Sigmoid (x)  y = Add (p, q)", "no layer in it"),
        ("x", "p = MatMul (x, w)  q = ReduceMean <axes = [1]> (x)  y = Add (p, q)", "the rest is smaller than the sum"),
    ],
)  # fmt: skip
def test_what_is_no_branch(inputs, body, why):
    weights = {name: (4, 4) for name in ("w", "v") if name in body}
    model = graph(f"(float[1, 4] {inputs}) => (float[1, 4] y)", body, **weights)
    assert not find_branches(model), why


def test_of_two_shortcuts_either_may_go_but_not_both():
    model = graph(
        "(float[n, 3, 8, 8] x) => (float[n, 8, 8, 8] y)",
        "a = Conv (x, w)  p = Conv (a, v)  q = Conv (a, u, c)  y = Add (p, q)",
        w=(8, 3, 1, 1), v=(8, 8, 1, 1), u=(8, 8, 1, 1), c=(8,),
    )  # fmt: skip
    assert [(b.operand, set(b.nodes)) for b in find_branches(model)] == [(0, {"p"}), (1, {"q"})]
    small, found = erased(model, find_branches(model)[0], np.zeros(8))
    assert found.writer == "q"
    assert not find_branches(small)
