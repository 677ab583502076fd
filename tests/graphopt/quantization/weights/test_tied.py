"""Look-ups read the integers of a product that has the same table."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from text_graph import graph

from graphopt.executor import Session
from graphopt.quantization.weights.tied import Stored, share
from graphopt.rewriting.edit import new_initializer
from graphopt.rewriting.names import Names

RNG = np.random.default_rng(0)
INTEGERS = RNG.integers(-127, 128, (20, 6)).astype(np.int8)
SCALE = RNG.uniform(0.01, 0.1, 20).astype(np.float32)
TABLE = INTEGERS * SCALE[:, None]


def _shared(model, rows, scale=SCALE):
    names, graph_ = Names(model), model.graph
    stored = INTEGERS if rows == 0 else INTEGERS.T
    integers = new_initializer(graph_, names.fresh("integers"), stored, ir.DataType.INT8)
    scales = new_initializer(graph_, names.fresh("scales"), scale, ir.DataType.FLOAT)
    return share(model, [Stored(graph_.initializers["table"], integers, scales, rows)])


@pytest.mark.parametrize(("rows", "indices"), [(0, ""), (0, "3"), (0, "2, 3"), (1, "3"), (1, "2, 3")])
def test_rows_are_those_of_the_table(rows, indices):
    model = graph(f"(int64[{indices}] i) => (float y)", "y = Gather (table, i)", table=TABLE)
    assert _shared(model, rows) == ["table"]
    assert "table" not in model.graph.initializers
    i = RNG.integers(-20, 20, tuple(int(d) for d in indices.split(",") if d))
    np.testing.assert_array_equal(Session(model).run({"i": i})["y"], TABLE[i])


@pytest.mark.parametrize(
    "body",
    ["y = Gather <axis = 1> (table, i)", "a = Gather (table, i)  b = ReduceSum <keepdims = 0> (table)  y = Add (a, b)"],
)
def test_whoever_else_reads_the_floats_keeps_them(body):
    model = graph("(int64[3] i) => (float y)", body, table=TABLE)
    assert _shared(model, 0) == [] and "table" in model.graph.initializers


def test_one_scale_for_all_is_no_scale_a_row():
    model = graph("(int64[3] i) => (float y)", "y = Gather (table, i)", table=TABLE)
    assert _shared(model, 0, SCALE[:1].reshape(())) == []
