"""Live modules are cut as their graphs are, stay trainable, and stay as they were where they cannot follow."""

from __future__ import annotations

import copy

import numpy as np
import pytest

import graphopt
from graphopt.errors import ModelError, UsageError
from graphopt.executor import Session

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402


class Block(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.conv1 = nn.Conv2d(width, inner, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x):
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block1, self.block2, self.head = Block(8, 16), Block(8, 12), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.block2(self.block1(torch.relu(self.stem(x)))).mean((2, 3)))


class Mobile(nn.Module):
    """Pointwise, depthwise, pointwise; then a flattened image."""

    def __init__(self):
        super().__init__()
        self.up, self.deep = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.down, self.act = nn.Conv2d(12, 6, 1), nn.PReLU(12)
        self.head = nn.Linear(6 * 64, 5)

    def forward(self, x):
        return self.head(torch.relu(self.down(self.act(self.deep(self.up(x))))).flatten(1))


class Groups(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16), nn.Conv2d(16, 5, 3)

    def forward(self, x):
        return self.b(torch.relu(self.norm(self.a(x))))


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.rnn = nn.Linear(6, 8), nn.LSTM(8, 12, batch_first=True)
        self.mid, self.head = nn.Linear(12, 10), nn.Linear(10, 4)

    def forward(self, x):
        return self.head(torch.tanh(self.mid(self.rnn(self.embed(x))[0])))


class Attention(nn.Module):
    """Four heads of size four: the numbers alone do not tell which of them changed."""

    def __init__(self, dim=16, heads=4):
        super().__init__()
        self.num_heads, self.head_dim = heads, dim // heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        a = torch.softmax(q @ k.transpose(-1, -2) * 0.5, -1)
        return self.out((a @ v).transpose(1, 2).reshape(b, t, self.num_heads * self.head_dim))


class Transformer(nn.Module):
    def __init__(self, attention=Attention):
        super().__init__()
        self.attention, self.norm1, self.norm2 = attention(), nn.LayerNorm(16), nn.LayerNorm(16)
        self.up, self.down, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 5)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        x = x + self.down(functional.gelu(self.up(self.norm2(x))))
        return self.head(x)


IMAGE, SEQUENCE = (3, 8, 8), (7, 16)


def randomised(module):
    torch.manual_seed(0)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.running_mean, std=0.3)
            nn.init.uniform_(part.running_var, 0.5, 2)
        if hasattr(part, "reset_parameters"):
            bias = getattr(part, "bias", None)
            if isinstance(bias, nn.Parameter):
                nn.init.normal_(bias, std=0.3)
    return module


def run(module, x):
    with torch.no_grad():
        return copy.deepcopy(module).eval()(x)


@pytest.mark.parametrize(
    ("make", "shape", "options"),
    [
        (Residual, IMAGE, {"macs": 0.5, "reconstruct": "ls"}),
        (Residual, IMAGE, {"macs": 0.5, "reconstruct": "none", "score": "l2"}),
        (Mobile, IMAGE, {"params": 0.6}),
        (Groups, IMAGE, {"macs": 0.6}),
        (Tagger, (7, 6), {"params": 0.6}),
        (Transformer, SEQUENCE, {"params": 0.8}),
    ],
    ids=["residual", "residual_l2", "depthwise", "groups", "lstm", "transformer"],
)
def test_the_module_becomes_what_the_graph_became(make, shape, options):
    module = randomised(make())
    x = torch.randn(32, *shape)
    before = sum(p.numel() for p in module.parameters())
    found = graphopt.prune_module(module, x[:2], calib=x, target=TARGET, **options)
    assert found.module is module
    assert sum(p.numel() for p in module.parameters()) < 0.95 * before
    name = found.model.graph.inputs[0].name
    expected = next(iter(Session(found.model).run({name: x.numpy()}).values()))
    np.testing.assert_allclose(run(module, x), expected, rtol=1e-3, atol=1e-4)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    module.train()(x).square().mean().backward()
    optimizer.step()
    # what it says of itself is right: a fresh layer of those sizes has parameters of the same shapes
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            assert tuple(part.weight.shape)[:2] == (part.out_channels, part.in_channels // part.groups)
        if isinstance(part, nn.Linear):
            assert tuple(part.weight.shape) == (part.out_features, part.in_features)
    # and it can be exported anew
    graphopt.from_torch(module.eval(), x[:2], dynamic_shapes="batch")


TARGET = graphopt.Target("test", "ort", channel_multiple=1)


def test_without_options_only_what_is_dead_goes():
    module = randomised(Residual())
    with torch.no_grad():
        for part in (module.block1.bn1.weight, module.block1.bn1.bias):
            part[3:9] = 0
    x = torch.randn(16, *IMAGE)
    before = run(module, x)
    found = graphopt.prune_module(module, x[:2])
    assert module.block1.conv1.out_channels == module.block1.conv2.in_channels == 10
    np.testing.assert_array_equal(found.kept["block1.conv1.weight"][0], [0, 1, 2, *range(9, 16)])
    torch.testing.assert_close(run(module, x), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam], ids=["sgd", "adam"])
def test_the_optimiser_follows(make):
    module = randomised(Residual())
    x = torch.randn(32, *IMAGE)
    settings = {"momentum": 0.9} if make is torch.optim.SGD else {}
    optimizer = make(module.parameters(), lr=1e-3, **settings)
    module(x).square().mean().backward()
    optimizer.step()
    key = "momentum_buffer" if make is torch.optim.SGD else "exp_avg"
    old = optimizer.state[module.block1.conv1.weight][key].clone()
    found = graphopt.prune_module(module, x[:2], calib=x, optimizer=optimizer, target=TARGET, macs=0.5)
    weight = module.block1.conv1.weight
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in module.parameters()}
    torch.testing.assert_close(optimizer.state[weight][key], old[np.ix_(*found.kept["block1.conv1.weight"])])
    optimizer.zero_grad()
    module(x).square().mean().backward()
    optimizer.step()


def test_tied_parameters_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 12), nn.Linear(12, 12, bias=False), nn.Linear(12, 12, bias=False)
            self.c.weight, self.head = self.b.weight, nn.Linear(12, 3)

        def forward(self, x):
            return self.head(torch.relu(self.c(torch.relu(self.b(torch.relu(self.a(x)))))))

    torch.manual_seed(0)
    module = Tied()
    x = torch.randn(64, 6)
    graphopt.prune_module(module, x[:2], calib=x, target=TARGET, params=0.6, reconstruct="none")
    assert module.c.weight is module.b.weight
    assert module.b.in_features == module.c.out_features < 12


def test_a_size_in_the_code_is_refused_and_nothing_is_changed():
    class Fixed(Attention):
        def forward(self, x):
            b, t, _ = x.shape
            q, k, v = self.qkv(x).view(b, t, 3, 4, 4).permute(2, 0, 3, 1, 4)
            a = torch.softmax(q @ k.transpose(-1, -2) * 0.5, -1)
            return self.out((a @ v).transpose(1, 2).reshape(b, t, 16))

    module = randomised(Transformer(Fixed)).train()
    state = {n: t.clone() for n, t in module.state_dict().items()}
    x = torch.randn(64, *SEQUENCE)
    with pytest.raises(
        ModelError, match=r"Fixed\.forward \(test_prune_module\.py, line \d+: q, k, v = .*exclude=\('attention\.\*',\)"
    ):
        graphopt.prune_module(
            module, x[:2], calib=x, target=TARGET, params=0.9, exclude=("up*",), reconstruct="none", score="l2"
        )
    assert module.training
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=0)
    assert module.attention.qkv.out_features == 48


def test_a_size_in_the_code_of_the_module_itself_names_its_line_and_layers():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc, self.head = nn.Conv2d(3, 8, 3), nn.Linear(288, 12), nn.Linear(12, 4)

        def forward(self, x):
            h = torch.relu(self.conv(x)).view(-1, 288)
            return self.head(torch.relu(self.fc(h)))

    torch.manual_seed(0)
    module, x = Flat(), torch.randn(32, 3, 8, 8)
    options = {"calib": x, "target": TARGET, "params": 0.6, "score": "l2", "reconstruct": "none"}
    with pytest.raises(
        ModelError, match=r"h = torch\.relu\(self\.conv\(x\)\)\.view\(-1, 288\).*exclude=\('conv\.\*',\)"
    ):
        graphopt.prune_module(module, x[:2], **options)
    graphopt.prune_module(module, x[:2], exclude=("conv.*",), **options)
    assert module.fc.out_features < 12
    assert module.conv.out_channels == 8


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
def test_normalised_weights_follow_or_are_named(norm):
    def network(*normalised):
        torch.manual_seed(0)
        layers = [nn.Conv1d(4, 16, 3), nn.ReLU(), nn.Conv1d(16, 16, 3), nn.ReLU(), nn.Conv1d(16, 4, 3)]
        return nn.Sequential(*(norm(part) if place in normalised else part for place, part in enumerate(layers)))

    x = torch.randn(32, 4, 12)
    module = network(2)
    graphopt.prune_module(module, x[:2], calib=x, target=TARGET, params=0.8)
    assert module[4].in_channels == module[2].out_channels < 16
    assert module[2].weight.shape[1] == module[2].in_channels == module[0].out_channels
    with pytest.raises(UsageError, match=r"weights of '0', '2', '4' are computed.*remove_"):
        graphopt.prune_module(network(0, 2, 4), x[:2], calib=x, target=TARGET, params=0.6)


def test_channel_shuffles_stay_as_they_are_written():
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right, self.out = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(16, 4, 1)

        def forward(self, x):
            h = torch.cat([torch.relu(self.left(x)), torch.relu(self.right(x))], 1)
            b, c, height, width = h.shape
            return self.out(h.view(b, 2, c // 2, height, width).transpose(1, 2).reshape(b, -1, height, width))

    torch.manual_seed(0)
    module, x = Halves(), torch.randn(32, 3, 6, 6)
    with torch.no_grad():
        module.left.weight[4:] = module.left.weight[:4]  # as Gathers, only these would go
        module.left.bias[4:] = module.left.bias[:4]
    graphopt.prune_module(module, x[:2], calib=x, target=TARGET, params=0.8)
    assert module.left.out_channels == module.right.out_channels < 8


def test_whole_heads_where_their_size_is_fixed():
    module, x = randomised(Transformer(Attention)), torch.randn(64, *SEQUENCE)
    graphopt.prune_module(module, x[:2], calib=x, target=TARGET, params=0.85, fixed=("head_dim",), exclude=("up*",))
    assert module.attention.head_dim == 4
    assert module.attention.num_heads < 4
    assert module.attention.qkv.out_features == 12 * module.attention.num_heads


def test_what_the_error_says_to_exclude_helps():
    class Separate(nn.Module):
        """q and k may lose other places of a head than v, and one number is the size of all three."""

        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))
            self.out, self.size = nn.Linear(16, 16), 4

        def forward(self, x):
            b, t, _ = x.shape
            q, k, v = (p(x).view(b, t, 4, self.size).transpose(1, 2) for p in (self.q, self.k, self.v))
            return self.out((torch.softmax(q @ k.transpose(-1, -2), -1) @ v).transpose(1, 2).reshape(b, t, -1))

    module = randomised(Transformer(Separate))
    x = torch.randn(32, *SEQUENCE)
    options = {"calib": x, "target": TARGET, "params": 0.9, "score": "l2", "reconstruct": "none"}
    with pytest.raises(ModelError, match=r"exclude=\('attention\.\*',\)"):
        graphopt.prune_module(module, x[:2], exclude=("up*",), **options)
    graphopt.prune_module(module, x[:2], exclude=("attention.*",), **options)
    assert module.up.out_features < 32


def test_a_layer_that_has_one_size_for_all_its_parts_is_named():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.LSTM(4, 12, num_layers=2, batch_first=True), nn.Linear(12, 3)

        def forward(self, x):
            return self.head(self.inner(x)[0])

    torch.manual_seed(0)
    module = Deep()
    x = torch.randn(16, 5, 4)
    with pytest.raises(ModelError, match=r"layers or directions of 'inner' .*exclude=\('inner\.\*',\)"):
        graphopt.prune_module(
            module, x[:2], calib=x, target=TARGET, params=0.6, score="random", reconstruct="none", seed=1
        )
    assert module.inner.hidden_size == 12


def test_wrong_options_are_those_of_the_pass():
    with pytest.raises(UsageError, match="two budgets"):
        graphopt.prune_module(nn.Linear(3, 2), torch.randn(2, 3), macs=0.5, params=0.5)
