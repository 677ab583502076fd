from __future__ import annotations

import numpy as np
import pytest
from golden import HEADER, context, expect, parse, reasons, run
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.registry import pass_class

MERGE = pass_class("merge-reshapes")()
LISTS = "<int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[2] ab = {0, 1}, int64[1] minus = {-1}, "
LISTS += "int64[1] six = {6}, int64[1] twelve = {12}, int64[3] k = {-1, 2, 6}, int64 z = {0}> "

GOLDEN = [
    ("float[2,1,1,6] x", "A,B",
     "s = Squeeze(x, one) t = Squeeze(s, one) y = Relu(t)", "<int64[2] k = {2, 6}>", "t = Reshape(x, k) y = Relu(t)"),
    ("float[N,1,1,6] x", "A,B,C",
     "s = Squeeze(x, one) t = Flatten(s) u = Unsqueeze(t, two) y = Relu(u)",
     "<int64[3] k = {0, 6, 1}>", "t = Reshape(x, k) y = Relu(t)"),
    ("float[N,4,3] x", "A,B,C",
     "s = Unsqueeze(x, one) t = Transpose <perm: ints = [0,2,1,3]> (s) u = Squeeze(t, two) y = Relu(u)",
     "<int64 z = {0}>", "y = Relu(x)"),
    # keras2onnx and tf2onnx write convolutions over one axis like this.
    ("float[N,36,1,172] x", "A,B,C,D",
     "t = Transpose <perm: ints = [0,2,3,1]> (x) s = Squeeze(t, one) u = Unsqueeze(s, minus) y = Relu(u)",
     "<int64 z = {0}>", "u = Transpose <perm: ints = [0,3,1,2]> (x) y = Relu(u)"),
    ("float[N,4,1,3] x", "A,B,C,D",
     "s = Squeeze(x, two) u = Unsqueeze(s, one) t = Transpose <perm: ints = [0,3,2,1]> (u) y = Relu(t)",
     "<int64 z = {0}>", "t = Transpose <perm: ints = [0,3,1,2]> (x) y = Relu(t)"),
    ("float[N,3,4] x", "A,B",
     "h = Shape(x) b = Gather <axis: int = 0> (h, z) c = Unsqueeze(b, zero) g = Concat <axis: int = 0> (c, twelve) "
     "t = Reshape(x, g) y = Relu(t)", "<int64[2] k = {0, 12}>", "t = Reshape(x, k) y = Relu(t)"),
    # The batch stands elsewhere in the result: the rest is known.
    ("float[N,3,4] x", "A,B,C",
     "h = Shape(x) b = Gather <axis: int = 0> (h, zero) g = Concat <axis: int = 0> (six, b, two) "
     "t = Reshape(x, g) y = Relu(t)", "<int64[3] k = {6, -1, 2}>", "t = Reshape(x, k) y = Relu(t)"),
    ("float[N,M,8] x", "A,B,C,D",
     "h = Shape(x) b = Slice(h, zero, two) g = Concat <axis: int = 0> (b, two, minus) "
     "t = Reshape(x, g) y = Relu(t)", "<int64[4] k = {0, 0, 2, -1}>", "t = Reshape(x, k) y = Relu(t)"),
]  # fmt: skip


@pytest.mark.parametrize(("x", "rank", "before", "lists", "after"), GOLDEN)
def test_golden(x: str, rank: str, before: str, lists: str, after: str) -> None:
    head = f"g ({x}) => (float[{rank}] y) "
    expect(head + LISTS + "{" + before + "}", head + lists + "{" + after + "}", MERGE)


KEPT = [
    ("float[N,M,4] x", "h = Shape(x) b = Gather <axis: int = 0> (h, one) c = Gather <axis: int = 0> (h, zero) "
     "g = Concat <axis: int = 0> (b, c, minus) t = Reshape(x, g) y = Relu(t)", "are unknown"),
    ("float[N,4,3] x", "t = Transpose <perm: ints = [0,2,1]> (x) u = Reshape(t, k) y = Relu(u)", ""),
    ("float[N,M,1,1] x", "s = Squeeze(x, two) u = Unsqueeze(s, zero) v = Squeeze(u, minus) y = Relu(v)", "two unknown"),
    ("float[2,1,1,3] x", "s = Squeeze(x, one) t = Unsqueeze(s, zero) u = Squeeze(s, one) y = Add(t, u)", ""),
]  # fmt: skip


@pytest.mark.parametrize(("x", "before", "reason"), KEPT)
def test_kept(x: str, before: str, reason: str) -> None:
    result = expect(f"g ({x}) => (float[A,B,C] y) " + LISTS + "{" + before + "}", None, MERGE)
    assert reason in reasons(result)


def test_a_batch_of_any_size_passes() -> None:
    model = parse(
        "g (float[N,3,4] x) => (float[A,B,C] y) " + LISTS + "{ h = Shape(x) b = Gather <axis: int = 0> (h, zero) "
        "g = Concat <axis: int = 0> (b, six, minus) t = Reshape(x, g) y = Relu(t) }"
    )
    assert MERGE.run(model, context()).changed
    for batch in (1, 5):
        assert run(model, {"x": np.ones((batch, 3, 4), np.float32)})[0].shape == (batch, 6, 2)


def test_graph_output_keeps_its_name() -> None:
    expect(
        "g (float[2,1,1,6] x) => (float[2,6] y) " + LISTS + "{ s = Relu(x) t = Squeeze(s, one) y = Squeeze(t, one) }",
        None,  # what a file declares of an output proves nothing
        MERGE,
    )
    expect(
        "g (float[2,1,1,6] x) => (float[2,2,3] y) <int64[3] k = {2, 2, 3}, int64[1] one = {1}> "
        "{ s = Relu(x) t = Squeeze(s, one) y = Reshape(t, k) }",
        "g (float[2,1,1,6] x) => (float[2,2,3] y) <int64[3] k = {2, 2, 3}> { s = Relu(x) y = Reshape(s, k) }",
        MERGE,
    )


def test_attributes_of_old_opsets() -> None:
    old = HEADER.replace("17", "11")
    model = parse(
        old + "g (float[N,1,4,3] x) => (float[A,B,C,D] y) { t = Squeeze <axes: ints = [1]> (x) "
        "v = Unsqueeze <axes: ints = [2]> (t) w = Transpose <perm: ints = [0,3,2,1]> (v) y = Relu(w) }"
    )
    x = np.random.default_rng(0).random((2, 1, 4, 3)).astype(np.float32)
    before = run(model, {"x": x})[0]
    assert MERGE.run(model, context()).changed
    np.testing.assert_array_equal(run(model, {"x": x})[0], before)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_random_chains(seed: int) -> None:
    random = np.random.default_rng(seed)
    shape = [int(d) for d in random.choice([1, 1, 2, 3], size=int(random.integers(2, 5)))]
    declared = ["N", *shape[1:]] if random.random() < 0.5 else list(shape)
    x = random.standard_normal(shape).astype(np.float32)
    lines, name = [], "x"
    for k in range(int(random.integers(2, 7))):
        kind = random.choice(["transpose", "squeeze", "unsqueeze", "reshape", "relu"], p=[0.3, 0.25, 0.25, 0.15, 0.05])
        if kind == "transpose":
            perm = [int(p) for p in random.permutation(len(shape))]
            lines.append(f"v{k} = Transpose <perm: ints = {perm}> ({name})")
            shape = [shape[p] for p in perm]
        elif kind == "squeeze" and 1 in shape[1:] and len(shape) > 1:
            axis = int(random.choice([a for a, d in enumerate(shape) if d == 1 and a]))
            lines.append(f"a{k} = Constant <value_ints = [{axis}]> () v{k} = Squeeze({name}, a{k})")
            shape = [d for a, d in enumerate(shape) if a != axis]
        elif kind == "unsqueeze" and len(shape) < 6:
            axis = int(random.integers(0, len(shape) + 1))
            lines.append(f"a{k} = Constant <value_ints = [{axis}]> () v{k} = Unsqueeze({name}, a{k})")
            shape.insert(axis, 1)
        elif kind == "reshape":
            shape = [shape[0], int(np.prod(shape[1:]))]
            lines.append(f"a{k} = Constant <value_ints = [0, -1]> () v{k} = Reshape({name}, a{k})")
        else:
            lines.append(f"v{k} = Relu({name})")
        name = f"v{k}"
    rank = ",".join("ABCDEFGH"[: len(shape)])
    text = f"g (float[{','.join(map(str, declared))}] x) => (float[{rank}] y) {{ {' '.join(lines)} y = Neg({name}) }}"
    model = parse(text)
    before, count = run(model, {"x": x})[0], len(model.graph)
    MERGE.run(model, context())
    np.testing.assert_array_equal(run(model, {"x": x})[0], before)
    assert len(model.graph) <= count


def test_the_wrapper_of_a_sparse_core_keeps_its_form() -> None:
    """It is known by its Reshapes and Transposes: what `merge-factors` makes of another form would be wrong."""
    model = parse(
        """g (float[N,2,3] x) => (float[N,2,3] y) <int64[3] k = {-1, 2, 3}>
        { s = Flatten(x) t = Reshape(s, k) y = Relu(t) }"""
    )
    free = model.clone()
    for node in model.graph:
        if node.op_type == "Reshape":
            node.metadata_props["graphopt.sparsity.role"] = "in"
    assert not MERGE.run(model, context()).changed
    assert MERGE.run(free, context()).changed
