"""Tensors streamed from a moving cut equal those of the whole model."""

import numpy as np
import onnx_ir as ir
import pytest
from text_graph import graph

from graphopt.calibration import load
from graphopt.data.activations import activations
from graphopt.errors import ModelError
from graphopt.pruning.walk import Walk


def net():
    return graph(
        "(float[n, 4] x, int64[n] k) => (float[n, 4] y)",
        """
        a = MatMul (x, w1)
        b = Relu (a)
        i = Cast <to = 1> (k)
        axes = Constant <value_ints = [1]> ()
        j = Unsqueeze (i, axes)
        c = Mul (b, j)
        d = MatMul (c, w2)
        y = Add (d, b)
        """,
        w1=(4, 4),
        w2=(4, 4),
    )


def data(model, samples=70):
    rng = np.random.default_rng(1)
    return load({"x": rng.normal(size=(samples, 4)).astype(np.float32), "k": np.arange(samples)}, model)


def node_of(model, name):
    return next(n for n in model.graph if n.outputs[0].name == name)


def whole(model, calibration, name):
    return np.concatenate([b[name] for b in activations(model, [name], calibration)])


@pytest.mark.parametrize("memory", [1 << 20, 10])
def test_the_same_tensors_wherever_the_cut_is(memory):
    model = net()
    calibration = data(model)
    walk = Walk(model, calibration, memory=memory)
    for step, names in (("a", ["a"]), ("b", ["b", "a"]), ("c", ["c", "d"]), ("d", ["d", "y"])):
        batches = list(walk.stream(names))
        for name in names:
            found = np.concatenate([b[name] for b in batches])
            np.testing.assert_allclose(found, whole(model, calibration, name), rtol=1e-6)
        assert walk.advance(node_of(model, step)) is (memory > 100)


def test_weights_ahead_of_the_cut_may_change():
    model = net()
    calibration = data(model)
    walk = Walk(model, calibration)
    walk.advance(node_of(model, "c"))
    model.graph.initializers["w2"].const_value = ir.tensor(np.eye(4, dtype=np.float32), name="w2")
    found = np.concatenate([b["y"] for b in walk.stream(["y"])])
    np.testing.assert_allclose(found, whole(model, calibration, "y"), rtol=1e-6)


def test_limit_and_batches():
    model = net()
    assert [len(b["a"]) for b in Walk(model, data(model), limit=40).stream(["a"])] == [32, 8]


def test_what_is_behind_and_what_does_not_exist():
    model = net()
    walk = Walk(model, data(model))
    assert walk.advance(node_of(model, "c"))
    assert not walk.advance(node_of(model, "b"))
    with pytest.raises(ModelError, match="behind"):
        list(walk.stream(["a"]))
    with pytest.raises(ModelError, match="no such tensor"):
        list(walk.stream(["nothing"]))
