"""Networks that mix positions without attention: perceptrons over tokens, gates, sets, graphs, tables."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from zoo.architecture import Architecture, image, tokens
from zoo.blocks import FeedForward, conv_bn


class MixerBlock(nn.Module):
    """One perceptron along the tokens, one along the channels."""

    def __init__(self, length: int, width: int, token_hidden: int, channel_hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens, self.channels = FeedForward(length, token_hidden), FeedForward(width, channel_hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class PatchNetwork(nn.Module):
    """Patches of an image through blocks, then their mean."""

    def __init__(self, width: int, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.patches, self.blocks = nn.Conv2d(3, width, 4, 4), nn.Sequential(*blocks)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(x)).mean(1))


def mlp_mixer() -> nn.Module:
    return PatchNetwork(24, [MixerBlock(16, 24, 30, 40) for _ in range(2)])


class SpatialGate(nn.Module):
    """gMLP: half of the channels, mixed along the tokens, gates the other half."""

    def __init__(self, length: int, width: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(hidden)
        self.enter, self.leave = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)
        self.mix = nn.Conv1d(length, length, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept, gate = F.gelu(self.enter(self.norm1(x))).chunk(2, -1)
        return x + self.leave(kept * self.mix(self.norm2(gate)))


def gmlp() -> nn.Module:
    return PatchNetwork(24, [SpatialGate(16, 24, 20) for _ in range(2)])


def conv_mixer() -> nn.Module:
    """Depthwise convolutions in residual branches, normalisation after activations."""

    class Residual(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.inner(x)

    def block() -> nn.Sequential:
        spatial = nn.Sequential(nn.Conv2d(14, 14, 5, padding=2, groups=14), nn.GELU(), nn.BatchNorm2d(14))
        return nn.Sequential(Residual(spatial), nn.Conv2d(14, 14, 1), nn.GELU(), nn.BatchNorm2d(14))

    stem = (nn.Conv2d(3, 14, 4, 4), nn.GELU(), nn.BatchNorm2d(14))
    return nn.Sequential(*stem, block(), block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(14, 10))


class PointNet(nn.Module):
    """One network for every point, a learned rotation of the points and of their features, a maximum over points."""

    def __init__(self) -> None:
        super().__init__()
        self.align_conv, self.align_norm = nn.Conv1d(3, 14, 1), nn.BatchNorm1d(14)
        self.align1, self.align2 = nn.Linear(14, 18), nn.Linear(18, 9)
        self.conv1, self.norm1 = nn.Conv1d(3, 22, 1), nn.BatchNorm1d(22)
        self.conv2, self.norm2 = nn.Conv1d(22, 34, 1), nn.BatchNorm1d(34)
        self.hidden, self.norm3, self.head = nn.Linear(34, 26), nn.BatchNorm1d(26), nn.Linear(26, 8)

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        rotation = F.relu(self.align_norm(self.align_conv(points))).amax(2)
        rotation = self.align2(F.relu(self.align1(rotation))).view(-1, 3, 3) + torch.eye(3)
        x = torch.bmm(points.transpose(1, 2), rotation).transpose(1, 2)
        x = F.relu(self.norm1(self.conv1(x)))
        x = torch.max(self.norm2(self.conv2(x)), 2)[0]
        return self.head(F.relu(self.norm3(self.hidden(x)))).log_softmax(-1)


class GraphConvolution(nn.Module):
    """Messages along edges, summed at their ends, with the degree's inverse as weight."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.message, self.own = nn.Linear(inputs, outputs, bias=False), nn.Linear(inputs, outputs)

    def forward(self, x: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        messages = self.message(x)[source]
        total = torch.zeros(x.shape[0], messages.shape[1]).scatter_add(0, target[:, None].expand_as(messages), messages)
        degree = torch.zeros(x.shape[0]).scatter_add(0, target, torch.ones(target.shape[0]))
        return self.own(x) + total / (degree + 1)[:, None]


class GraphNetwork(nn.Module):
    """Node classification."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = GraphConvolution(7, 20), GraphConvolution(20, 14), nn.Linear(14, 4)

    def forward(self, x: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.first(x, source, target))
        return self.head(F.relu(self.second(x, source, target)))


class GraphIsomorphism(nn.Module):
    """Sums of neighbours by `index_add`, a perceptron after each, a sum over all nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(7, 18)
        self.updates = nn.ModuleList(
            nn.Sequential(nn.Linear(18, 30), nn.BatchNorm1d(30), nn.ReLU(), nn.Linear(30, 18)) for _ in range(2)
        )
        self.eps, self.head = nn.Parameter(torch.zeros(2)), nn.Linear(18, 4)

    def forward(self, x: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        for index, update in enumerate(self.updates):
            received = torch.zeros_like(x).index_add(0, target, x.index_select(0, source))
            x = torch.relu(update((1 + self.eps[index]) * x + received))
        return self.head(x.sum(0, keepdim=True))


class GraphAttention(nn.Module):
    """Attention over the edges of a graph: exponentials summed at the target, several heads."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.project = nn.Linear(7, 18), nn.Linear(18, 4 * 6, bias=False)
        self.score_source, self.score_target = nn.Parameter(torch.zeros(1, 4, 6)), nn.Parameter(torch.zeros(1, 4, 6))
        self.head = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        h = self.project(F.elu(self.enter(x))).view(-1, 4, 6)
        scores = (h * self.score_source).sum(-1)[source] + (h * self.score_target).sum(-1)[target]
        weights = F.leaky_relu(scores, 0.2).clamp(-10, 10).exp()
        total = torch.zeros(x.shape[0], 4).index_add(0, target, weights)
        messages = h[source] * (weights / (total[target] + 1e-9)).unsqueeze(-1)
        return self.head(F.elu(torch.zeros_like(h).index_add(0, target, messages).flatten(1)))


class Recommender(nn.Module):
    """DLRM: embeddings of categories and a perceptron of numbers, products of all pairs, a perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(11, 12) for _ in range(3))
        self.bottom = nn.Sequential(nn.Linear(5, 22), nn.ReLU(), nn.Linear(22, 12), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(12 + 6, 26), nn.ReLU(), nn.Linear(26, 1))
        self.register_buffer("rows", torch.tensor([1, 2, 2, 3, 3, 3]))
        self.register_buffer("columns", torch.tensor([0, 0, 1, 0, 1, 2]))

    def forward(self, numbers: torch.Tensor, categories: torch.Tensor) -> torch.Tensor:
        dense = self.bottom(numbers)
        features = torch.stack([dense, *(table(categories[:, i]) for i, table in enumerate(self.tables))], 1)
        products = torch.bmm(features, features.transpose(1, 2))[:, self.rows, self.columns]
        return torch.sigmoid(self.top(torch.cat([dense, products], 1)))


class RadianceField(nn.Module):
    """NeRF: sines of coordinates, the input joined again half-way, two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", 2.0 ** torch.arange(3))
        self.first, self.second = nn.Linear(18, 26), nn.Linear(26, 26)
        self.third, self.density, self.feature = nn.Linear(44, 22), nn.Linear(22, 1), nn.Linear(22, 20)
        self.direction, self.colour = nn.Linear(23, 14), nn.Linear(14, 3)

    def forward(self, points: torch.Tensor, views: torch.Tensor) -> torch.Tensor:
        angles = (points[..., None] * self.frequencies).flatten(-2)
        encoded = torch.cat([angles.sin(), angles.cos()], -1)
        x = F.relu(self.second(F.relu(self.first(encoded))))
        x = F.relu(self.third(torch.cat([encoded, x], -1)))
        y = F.relu(self.direction(torch.cat([self.feature(x), views], -1)))
        return torch.cat([torch.sigmoid(self.colour(y)), F.softplus(self.density(x))], -1)


class HyperNetwork(nn.Module):
    """One network writes the weights of a layer of another."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(conv_bn(3, 12, 3, 2), nn.ReLU())
        self.describe = nn.Sequential(nn.Linear(5, 22), nn.ReLU())
        self.weights, self.biases = nn.Linear(22, 14 * 12), nn.Linear(22, 14)
        self.head = nn.Linear(14, 6)

    def forward(self, x: torch.Tensor, task: torch.Tensor) -> torch.Tensor:
        x, code = self.features(x).mean((2, 3)), self.describe(task)
        weights = self.weights(code).view(-1, 14, 12)
        return self.head(F.relu(torch.bmm(weights, x.unsqueeze(2)).squeeze(2) + self.biases(code)))


IMAGE = image("image", "batch", 3, 16, 16)
BATCH = {"batch": 2}
GRAPH = (
    image("x", "nodes", 7),
    tokens("source", 9, "edges"),
    tokens("target", 9, "edges"),
)
GRAPH_SIZES = {"nodes": 9, "edges": 17}
NO_INDEX_ADD = {"torchscript": r"does not support exporting 'index_add_\(\)' function with duplicated values"}

ARCHITECTURES = [
    Architecture(
        "mlp_mixer",
        mlp_mixer,
        (IMAGE,),
        BATCH,
        axes={"token hidden": 30, "channel hidden": 40, "residual stream": 24},
    ),
    Architecture("gmlp", gmlp, (IMAGE,), BATCH, axes={"gate and gated": 40, "gated": 20, "residual stream": 24}),
    Architecture("conv_mixer", conv_mixer, (IMAGE,), BATCH, axes={"stream": 14}),
    Architecture(
        "pointnet",
        PointNet,
        (image("points", "batch", 3, "count"),),
        {"batch": 2, "count": 13},
        ("batch", "count"),
        axes={"alignment": 14, "points": 22, "pooled": 34, "hidden": 26},
    ),
    Architecture(
        "graph_convolution", GraphNetwork, GRAPH, GRAPH_SIZES, ("nodes", "edges"), axes={"first": 20, "second": 14}
    ),
    Architecture(
        "graph_isomorphism",
        GraphIsomorphism,
        GRAPH,
        GRAPH_SIZES,
        axes={"stream": 18, "hidden": 30},
        cannot_export=NO_INDEX_ADD,
    ),
    Architecture(
        "graph_attention",
        GraphAttention,
        GRAPH,
        GRAPH_SIZES,
        axes={"features": 18, "heads": 24},
        cannot_export=NO_INDEX_ADD,
    ),
    Architecture(
        "recommender",
        Recommender,
        (image("numbers", "batch", 5), tokens("categories", 11, "batch", 3)),
        BATCH,
        ("batch",),
        axes={"bottom": 22, "embedding": 12, "top": 26},
    ),
    Architecture(
        "radiance_field",
        RadianceField,
        (image("points", "batch", 3), image("views", "batch", 3)),
        BATCH,
        ("batch",),
        axes={"first": 26, "joined": 22, "feature": 20, "direction": 14},
    ),
    Architecture(
        "hypernetwork",
        HyperNetwork,
        (IMAGE, image("task", "batch", 5)),
        BATCH,
        axes={"features": 12, "code": 22, "written": 168},
    ),
]
