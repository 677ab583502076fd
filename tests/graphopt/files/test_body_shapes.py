"""Shapes of what enters and leaves bodies, where onnx's inference alone leaves them open."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from text_graph import graph

from graphopt.model import infer_shapes


def dims(value: ir.Value) -> list[int | str | None] | None:
    return None if value.shape is None else [d if isinstance(d, int) else d.value for d in value.shape]


def loop(body: str, state: str = "float[n,4]", **parameters: object) -> tuple[ir.Value, ir.Value]:
    """The state inside and behind a Loop whose body declares nothing about it."""
    model = graph(
        f"(float[n,4] x, {state} s) => (float[a,b] y)",
        f"""y = Loop <body = b (int64 i, bool on, {state} h) => (bool on1, {state} h1)
                  {{ {body}  on1 = Identity(on) }}> (trips, , s)""",
        trips=np.array(3),
        **parameters,
    )
    node = next(n for n in model.graph if n.op_type == "Loop")
    inside = node.attributes["body"].as_graph().inputs[2]
    inside.shape = None
    node.outputs[0].shape = None
    infer_shapes(model)
    return inside, node.outputs[0]


def test_a_state_that_keeps_its_shape_has_it() -> None:
    inside, behind = loop("h0 = Relu(h)  h1 = Add(h0, x)")
    assert dims(inside) == dims(behind) == ["n", 4]


def test_a_state_that_grows_keeps_the_other_axes() -> None:
    inside, behind = loop("h1 = Concat<axis=0>(h, x)")
    assert dims(inside) == dims(behind) == [None, 4]


def test_a_state_that_turns_has_only_a_rank() -> None:
    inside, _ = loop("h1 = Transpose<perm=[1, 0]>(h)")
    assert dims(inside) == [None, None]


def test_a_state_that_turns_a_square_keeps_it() -> None:
    inside, _ = loop("h1 = Transpose<perm=[1, 0]>(h)", state="float[4,4]")
    assert dims(inside) == [4, 4]


def test_a_state_whose_rank_changes_has_no_shape() -> None:
    inside, _ = loop("h1 = Unsqueeze(h, front)", front=np.array([0]))
    assert inside.shape is None


def test_a_state_that_only_depends_on_another_one_follows_it() -> None:
    """The first state takes over the second in every run, and that one grows."""
    model = graph(
        "(float[1,4] x) => (float[a,b] y)",
        """y, z = Loop <body = b (int64 n, bool on, float[k,4] p, float[m,4] q)\
                          => (bool on1, float[i,4] p1, float[j,4] q1)\
                  { p1 = Identity(q)  q1 = Concat<axis=0>(q, x)  on1 = Identity(on) }> (trips, , x, x)""",
        trips=np.array(3),
    )
    node = next(n for n in model.graph if n.op_type == "Loop")
    for value in node.attributes["body"].as_graph().inputs[2:]:
        value.shape = None
    infer_shapes(model)
    assert [dims(v) for v in node.attributes["body"].as_graph().inputs[2:]] == [[None, 4], [None, 4]]


@pytest.mark.parametrize(("axis", "expected"), [(0, ["n", 4]), (1, [5, 4]), (-1, [5, "n"])])
def test_a_scan_takes_slices(axis: int, expected: list[int | str]) -> None:
    model = graph(
        "(float[5,n,4] x) => (float[a,b,c] y)",
        f"y = Scan <num_scan_inputs = 1, scan_input_axes = [{axis}], body = b (float[p,q] s) => (float[p,q] r) {{ r = Relu(s) }}> (x)",  # noqa: E501
    )
    body = next(n for n in model.graph if n.op_type == "Scan").attributes["body"].as_graph()
    assert dims(body.inputs[0]) == expected
    assert dims(body[0].outputs[0]) == expected


def test_constants_around_a_body_are_known_inside_and_stay_where_they_are() -> None:
    model = graph(
        "(float[6,4] x, bool c) => (float[a,b] y)",
        """y = If (c) <then_branch = t () => (float[p,q] u) { u = Reshape(x, shape) },\
                       else_branch = e () => (float[p,q] v) { v = Slice(x, zero, three, zero) }>""",
        shape=np.array([3, -1]),
        zero=np.array([0]),
        three=np.array([3]),
    )
    branches = [a.as_graph() for a in next(n for n in model.graph if n.op_type == "If").attributes.values()]
    assert sorted(map(str, (dims(body[0].outputs[0]) for body in branches))) == ["[3, 4]", "[3, 8]"]
    assert not any(body.initializers for body in branches)
    assert set(model.graph.initializers) == {"shape", "zero", "three"}
