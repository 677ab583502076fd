"""torch to ONNX: names stay, weights are stored as they are used, outputs agree, what cannot be is said."""

from __future__ import annotations

import numpy as np
import pytest

import graphopt
from graphopt import model as models
from graphopt.errors import ModelError, UsageError
from graphopt.executor import Session
from graphopt.fx.from_torch import export

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48, bias=False), nn.Linear(16, 16)

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, t, 3, 4, 4).permute(2, 0, 3, 1, 4)
        a = torch.softmax(q @ k.transpose(-1, -2) / 2, -1)
        return x + self.out((a @ v).transpose(1, 2).reshape(b, t, c))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block, self.head = nn.Embedding(20, 16), Attention(), nn.Linear(16, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.block(self.embed(ids)))


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.norm, self.rnn, self.head = nn.GroupNorm(2, 8), nn.LSTM(8, 6, batch_first=True), nn.Linear(8, 4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        y = self.drop(self.norm(torch.relu(self.bn(self.conv(x)))))
        z, _ = self.rnn(y.flatten(2).transpose(1, 2))
        return self.head(y.mean((2, 3))), z


def floats(model):
    return {
        n for n, v in model.graph.initializers.items() if v.const_value.dtype.is_floating_point() and v.shape.rank()
    }


def test_names_are_those_of_the_state_dict_and_ties_are_stored_once():
    torch.manual_seed(0)
    module = Tied().train()
    ids = torch.randint(0, 20, (2, 8))
    model = graphopt.from_torch(module, ids, dynamic_shapes=({0: "batch", 1: "time"},))
    models.check(model)
    weights = {n for n in floats(model) if "weight" in n or "bias" in n}
    state = dict(module.state_dict())
    assert weights == set(state) - {"embed.weight"}
    # a weight that is only used transposed is stored so; the tied one, used both ways, is not
    assert model.graph.initializers["block.qkv.weight"].shape.numpy() == (16, 48)
    assert model.graph.initializers["head.weight"].shape.numpy() == (20, 16)
    assert module.training
    longer = torch.randint(0, 20, (3, 5))
    found = Session(model).run({model.graph.inputs[0].name: longer.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(next(iter(found.values())), module.eval()(longer), rtol=1e-4, atol=1e-5)


def test_batch_stays_free_also_for_a_single_sample():
    torch.manual_seed(0)
    module = Mixed()
    exported = export(module, torch.randn(1, 3, 8, 8), "batch")
    model = exported.model
    assert floats(model) >= {n for n, p in module.named_parameters() if not n.startswith("rnn.bias")}
    x = torch.randn(5, 3, 8, 8)
    found = list(Session(model).run({model.graph.inputs[0].name: x.numpy()}).values())
    with torch.no_grad():
        for got, wanted in zip(found, module.eval()(x), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
    conv = next(n for n in model.graph if n.op_type == "Conv")
    assert len(conv.inputs) == 2  # no bias of zeros beside the module's own parameters
    # gates change places; the remembered moves lead back to the parameter
    state = {n: p.numpy() for n, p in module.state_dict().items()}
    for name, moved in exported.moved.items():
        np.testing.assert_array_equal(moved.evaluate(state), model.graph.initializers[name].const_value.numpy())
    assert "rnn.weight_ih_l0" in exported.moved


def test_exported_programs_keyword_arguments_and_names():
    class Two(nn.Module):
        def forward(self, a, b):
            return {"sum": a + b, "product": a * b}

    a, b = torch.randn(2, 3), torch.randn(2, 3)
    model = graphopt.from_torch(Two(), {"b": b, "a": a}, input_names=["p", "q"], output_names=["s", "m"])
    assert [v.name for v in model.graph.outputs] == ["s", "m"]
    program = torch.export.export(nn.Linear(3, 2).eval(), (a,))
    model = graphopt.from_torch(program)
    assert set(model.graph.initializers) >= {"weight", "bias"}


def test_it_goes_straight_into_optimize():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    model = graphopt.from_torch(net, torch.randn(2, 3, 8, 8), dynamic_shapes="batch")
    result = graphopt.optimize(model, "fold", bench=False)
    assert "BatchNormalization" not in {n.op_type for n in result.model.graph}


def test_nothing_of_the_machine_is_left_in_the_model():
    model = graphopt.from_torch(nn.Linear(3, 2), torch.randn(2, 3))
    text = str([n.metadata_props for n in model.graph]) + str(model.metadata_props)
    assert "File" not in text
    assert ".py" not in text


def test_what_cannot_be_exported_says_why():
    class Odd(nn.Module):
        def forward(self, x):
            return x.numpy().tolist()[0]

    with pytest.raises(ModelError, match="torch cannot export the module"):
        graphopt.from_torch(Odd(), torch.randn(2, 3))
    with pytest.raises(UsageError, match="no example inputs"):
        graphopt.from_torch(nn.Linear(3, 2))


def test_round_trip_through_torch():
    torch.manual_seed(0)
    module = Mixed().eval()
    x = torch.randn(2, 3, 8, 8)
    back = graphopt.to_torch(graphopt.from_torch(module, x))
    assert {"conv.weight", "bn.weight", "norm.bias", "head.weight"} <= {n for n, _ in back.named_parameters()}
    with torch.no_grad():
        for got, wanted in zip(back(x), module(x), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
