"""ONNX to torch and back: names, gradients, free sizes, refusals, weights that return."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from text_graph import graph

import graphopt
from graphopt.calibration import load as calibration
from graphopt.errors import MissingBackendError, ModelError
from graphopt.executor import Session
from graphopt.fx.names import onnx_name, torch_names

torch = pytest.importorskip("torch")

SMALL = [
    "dtln_1",
    "gtcrn",
    "magika_v3_3",
    "minilm_l6",
    "ppocr_cls",
    "resnet20_cifar10",
    "stories260k",
    "stories260k_kv",
    "ultraface_rfb320",
    "yunet_n_dynamic",
]


def mlp(hidden=5):
    """Two layers; the text format knows no dots in names."""
    model = graph(
        "(float[n, 4] x) => (float[n, 3] y)",
        "h = Gemm (x, a_weight, a_bias)  r = Relu (h)  m = Mul (r, scale)  y = MatMul (m, b_weight)",
        **{"a_weight": (4, hidden), "a_bias": (hidden,), "b_weight": (hidden, 3), "scale": np.array(0.5, np.float32)},
    )
    for value in list(model.graph.initializers.values()):
        value.name = value.name.replace("_", ".")
    return model


def test_names_and_kinds():
    module = graphopt.to_torch(mlp())
    assert {n for n, _ in module.named_parameters()} == {"a.weight", "a.bias", "b.weight"}
    assert {n for n, _ in module.named_buffers()} == {"scale"}
    assert module.meta["inputs"] == ["x"]


def test_trained_weights_return_to_the_same_graph():
    model = mlp()
    module = graphopt.to_torch(model)
    x = torch.randn(16, 4)
    goal = torch.randn(16, 3)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (module(x) - goal).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    nodes = [(n.op_type, n.name, n.outputs[0].name) for n in model.graph]
    names = list(model.graph.initializers)
    assert graphopt.update_weights(model, module) == 3
    assert [(n.op_type, n.name, n.outputs[0].name) for n in model.graph] == nodes
    assert list(model.graph.initializers) == names
    np.testing.assert_allclose(
        Session(model).run({"x": x.numpy()})["y"], module(x).detach().numpy(), rtol=1e-5, atol=1e-6
    )
    assert graphopt.update_weights(model, module) == 0


def test_weights_of_another_model_are_refused():
    module = graphopt.to_torch(mlp())
    other = graph("(float[n, 4] x) => (float[n, 3] y)", "y = MatMul (x, w)", w=(4, 3))
    with pytest.raises(ModelError, match="no such tensor"):
        graphopt.update_weights(other, module)
    with pytest.raises(ModelError, match=r"a.weight: its shape is \[4, 6\]"):
        graphopt.update_weights(mlp(6), module)


def test_all_refused_nodes_are_listed():
    model = graph(
        "(float[n, 4] x) => (float[n, 4] y)",
        "a = com.example.Odd (x)  b = Relu (a)  y = Multinomial (b)",
        imports='"com.example" : 1',
    )
    with pytest.raises(ModelError) as caught:
        graphopt.to_torch(model)
    assert "2 of 3 nodes" in str(caught.value)
    assert "com.example::Odd" in str(caught.value)
    assert "Multinomial" in str(caught.value)


def test_sizes_stay_free():
    model = graph(
        "(float[n, t, 6] x) => (float[n, t, 2, 3] y)",
        "s = Shape (x)  f = Slice (s, zero, two)  to = Concat <axis = 0> (f, tail)  y = Reshape (x, to)",
        zero=np.array([0]),
        two=np.array([2]),
        tail=np.array([2, 3]),
    )
    module = graphopt.to_torch(model)
    for shape in ((2, 3, 6), (5, 1, 6)):
        assert module(torch.randn(shape)).shape == (*shape[:2], 2, 3)


def test_statistics_scales_and_infinities_are_not_trained():
    model = graph(
        "(float[n, 4, 3] x) => (float[n, 4, 3] y)",
        "b = BatchNormalization (x, gamma, beta, mean, var)  a = Add (b, mask)  q = QuantizeLinear (a, s)  "
        "y = DequantizeLinear (q, s)",
        gamma=(4,), beta=(4,), mean=(4,), var=np.ones(4, np.float32), s=np.array(0.1, np.float32),
        mask=np.array([0, -np.inf, 0], np.float32),
    )  # fmt: skip
    assert {n for n, _ in graphopt.to_torch(model).named_parameters()} == {"gamma", "beta"}


def test_several_outputs_and_absent_inputs():
    model = graph(
        "(float[n, 3, 4] x) => (float[n, 3, m] low, float[n, 3, k] high)",
        "c = Clip (x, , one)  low, high = Split <axis = 2> (c, parts)",
        one=np.array(1, np.float32),
        parts=np.array([1, 3]),
    )
    low, high = graphopt.to_torch(model)(torch.full((2, 3, 4), 5.0))
    assert low.shape == (2, 3, 1)
    assert high.shape == (2, 3, 3)
    assert float(high.detach().max()) == 1.0


@pytest.mark.parametrize(
    "names",
    [
        ["a", "a.b", "a.b.c"],
        ["a..b", ".x", "x."],
        ["type", "weight", "layer.forward", "training.x"],
        ["onnx::Conv_12", "/model/conv/Constant_output_0", "100%", "%2E", "ä"],
    ],
)
def test_names_can_be_turned_back(names):
    module = torch.nn.Module()
    found = torch_names(names, dir(module))
    assert [onnx_name(found[n]) for n in names] == names
    for target in found.values():
        *folders, leaf = target.split(".")
        place = module
        for folder in folders:
            if folder not in place._modules:
                place.add_module(folder, torch.nn.Module())
            place = place.get_submodule(folder)
        place.register_buffer(leaf, torch.zeros(1))
    assert sorted(onnx_name(n) for n in module.state_dict()) == sorted(names)


def test_plain_names_stay():
    assert torch_names(["layer.0.weight", "/odd/name"], ()) == {
        "layer.0.weight": "layer.0.weight",
        "/odd/name": "/odd/name",
    }


def test_without_torch_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    for call in (lambda: graphopt.to_torch(mlp()), lambda: graphopt.from_torch(None, None)):
        with pytest.raises(MissingBackendError, match=r"pip install 'torch.*extra 'torch'") as caught:
            call()
        assert caught.value.exit_code == 6


@pytest.mark.data
@pytest.mark.parametrize("name", SMALL)
def test_shared_models_equal_onnx_runtime(data_dir, name):
    model = graphopt.load(data_dir / "models" / f"{name}.onnx")
    data = data_dir / "inputs" / f"{name}.npz"
    feeds = next(calibration(str(data) if data.is_file() else "random", model).batches(batch_size=2, limit=2))
    expected = Session(model).run(feeds)
    module = graphopt.to_torch(model)
    with torch.no_grad():
        found = module(*(torch.from_numpy(np.array(feeds[n])) for n in module.meta["inputs"]))
    for (key, wanted), got in zip(expected.items(), found if isinstance(found, tuple) else (found,), strict=True):
        assert np.linalg.norm(got.numpy() - wanted) <= 1e-4 * max(np.linalg.norm(wanted), 1e-6), key


@pytest.mark.data
def test_bodies_of_control_flow_are_refused_by_name(data_dir):
    model = graphopt.load(data_dir / "models" / "silero_vad_v5_if.onnx")
    with pytest.raises(ModelError, match=r"If_0 \(If\)"):
        graphopt.to_torch(model)
