"""Convolutional networks with attention over channels or space, and other hybrids of the two."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from zoo.architecture import Architecture, image
from zoo.attention import FusedAttention
from zoo.blocks import Classifier, FeedForward, conv_bn, conv_bn_act


class RepVgg(nn.Module):
    """Three parallel branches, one of them only a normalisation, as RepVGG is trained."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.large, self.small = conv_bn(inputs, outputs, 3, stride), conv_bn(inputs, outputs, 1, stride)
        self.identity = nn.BatchNorm2d(inputs) if inputs == outputs and stride == 1 else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.large(x) + self.small(x)
        return F.relu(y if self.identity is None else y + self.identity(x))


def rep_vgg() -> nn.Module:
    return nn.Sequential(RepVgg(3, 12, 2), RepVgg(12, 12), RepVgg(12, 20, 2), RepVgg(20, 20), Classifier(20))


class Cbam(nn.Module):
    """Gates over channels from means and maxima of the pixels, then over pixels from those of the channels."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)
        self.spatial = nn.Conv2d(2, 1, 5, padding=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))) + self.up(
            F.relu(self.down(x.amax((2, 3), keepdim=True)))
        )
        x = x * gate.sigmoid()
        pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * self.spatial(pooled).sigmoid()


def cbam_network() -> nn.Module:
    return nn.Sequential(
        conv_bn_act(3, 12, stride=2), conv_bn_act(12, 18), Cbam(18, 7), conv_bn_act(18, 14), Classifier(14)
    )


class Inception(nn.Module):
    """Four branches side by side, joined."""

    def __init__(self, inputs: int, widths: tuple[int, int, int, int, int, int]) -> None:
        super().__init__()
        one, reduce3, three, reduce5, five, pooled = widths
        self.one, self.pooled = conv_bn_act(inputs, one, 1), conv_bn_act(inputs, pooled, 1)
        self.three = nn.Sequential(conv_bn_act(inputs, reduce3, 1), conv_bn_act(reduce3, three, 3))
        self.five = nn.Sequential(conv_bn_act(inputs, reduce5, 1), conv_bn_act(reduce5, five, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pooled(F.max_pool2d(x, 3, 1, 1))], 1)


def inception() -> nn.Module:
    return nn.Sequential(
        conv_bn_act(3, 12, stride=2),
        Inception(12, (6, 8, 11, 5, 7, 9)),
        Inception(33, (6, 8, 11, 5, 7, 9)),
        Classifier(33),
    )


class SpatialReduction(nn.Module):
    """SegFormer: keys and values of a coarser image; a depthwise convolution within the feed-forward."""

    def __init__(self, width: int, hidden: int, heads: int, head_size: int, side: int) -> None:
        super().__init__()
        self.side, self.heads, self.head_size = side, heads, head_size
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.kv = nn.Linear(width, heads * head_size), nn.Linear(width, 2 * heads * head_size)
        self.reduce, self.out = nn.Conv2d(width, width, 2, 2), nn.Linear(heads * head_size, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)

    def picture(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2).reshape(x.shape[0], -1, self.side, self.side)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        y = self.norm1(x)
        q = self.query(y).reshape(batch, length, self.heads, self.head_size).permute(0, 2, 1, 3)
        coarse = self.norm3(self.reduce(self.picture(y)).flatten(2).transpose(1, 2))
        k, v = self.kv(coarse).reshape(batch, -1, 2, self.heads, self.head_size).permute(2, 0, 3, 1, 4)
        attended = ((q * self.head_size**-0.5) @ k.transpose(2, 3)).softmax(-1) @ v
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, -1))
        hidden = self.depthwise(self.picture(self.up(self.norm2(x)))).flatten(2).transpose(1, 2)
        return x + self.down(F.gelu(hidden))


class SegFormer(nn.Module):
    """Overlapping patches; all stages are brought to one width and size, joined and mixed."""

    def __init__(self) -> None:
        super().__init__()
        self.patches1, self.norm1 = nn.Conv2d(3, 14, 3, 2, 1), nn.LayerNorm(14)
        self.block1 = SpatialReduction(14, 30, 3, 5, 8)
        self.patches2, self.norm2 = nn.Conv2d(14, 22, 3, 2, 1), nn.LayerNorm(22)
        self.block2 = SpatialReduction(22, 44, 4, 7, 4)
        self.linear1, self.linear2 = nn.Linear(14, 18), nn.Linear(22, 18)
        self.mix, self.head = conv_bn_act(36, 16, 1), nn.Conv2d(16, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        high = self.block1(self.norm1(self.patches1(x).flatten(2).transpose(1, 2)))
        picture = high.transpose(1, 2).reshape(-1, 14, 8, 8)
        low = self.block2(self.norm2(self.patches2(picture).flatten(2).transpose(1, 2)))
        maps = [
            self.linear1(high).transpose(1, 2).reshape(-1, 18, 8, 8),
            F.interpolate(self.linear2(low).transpose(1, 2).reshape(-1, 18, 4, 4), scale_factor=2.0, mode="bilinear"),
        ]
        return self.head(self.mix(torch.cat(maps, 1)))


class MobileVitBlock(nn.Module):
    """Pixels at the same place of all patches attend to each other; the result is joined with the input."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.local, self.enter = conv_bn_act(channels, channels), nn.Conv2d(channels, width, 1, bias=False)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.ffn = FusedAttention(width, 4, 5), FeedForward(width, 40, nn.SiLU)
        self.leave, self.fuse = conv_bn_act(width, channels, 1), conv_bn_act(2 * channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.enter(self.local(x))
        batch, width, height, breadth = y.shape
        y = y.reshape(batch * width * (height // 2), 2, breadth // 2, 2).transpose(1, 2)
        y = y.reshape(batch, width, height * breadth // 4, 4).transpose(1, 3).reshape(batch * 4, -1, width)
        y = y + self.attention(self.norm1(y))
        y = self.norm3(y + self.ffn(self.norm2(y)))
        y = y.reshape(batch, 4, height * breadth // 4, width).transpose(1, 3)
        y = y.reshape(batch * width * (height // 2), breadth // 2, 2, 2).transpose(1, 2)
        return self.fuse(torch.cat([x, self.leave(y.reshape(batch, width, height, breadth))], 1))


def mobile_vit() -> nn.Module:
    return nn.Sequential(conv_bn_act(3, 14, stride=2), MobileVitBlock(14, 24), conv_bn_act(14, 18, 1), Classifier(18))


class NafBlock(nn.Module):
    """NAFNet: halves multiplied instead of activations, a norm over channels written out, a gate without activation."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gain1, self.shift1 = nn.Parameter(torch.ones(1, width, 1, 1)), nn.Parameter(torch.zeros(1, width, 1, 1))
        self.expand, self.depthwise = (
            nn.Conv2d(width, 2 * inner, 1),
            nn.Conv2d(2 * inner, 2 * inner, 3, 1, 1, 1, 2 * inner),
        )
        self.gate, self.project = nn.Conv2d(inner, inner, 1), nn.Conv2d(inner, width, 1)
        self.beta = nn.Parameter(torch.zeros(1, width, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        y = (x - mean) / (variance + 1e-6).sqrt() * self.gain1 + self.shift1
        first, second = self.depthwise(self.expand(y)).chunk(2, 1)
        y = first * second
        y = y * self.gate(y.mean((2, 3), keepdim=True))
        return x + self.project(y) * self.beta


def naf_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 14, 3, padding=1), NafBlock(14, 20), NafBlock(14, 20), nn.Conv2d(14, 12, 1), nn.PixelShuffle(2)
    )


class TransposedAttention(nn.Module):
    """Restormer: channels attend to channels; queries and keys are unit vectors over the pixels."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.GroupNorm(1, width)
        self.qkv, self.out = nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)
        self.depthwise = nn.Conv2d(3 * width, 3 * width, 3, padding=1, groups=3 * width)
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, width, height, breadth = x.shape
        q, k, v = (
            part.reshape(batch, self.heads, width // self.heads, height * breadth)
            for part in self.depthwise(self.qkv(self.norm(x))).chunk(3, 1)
        )
        weights = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(2, 3) * self.temperature).softmax(-1)
        return x + self.out((weights @ v).reshape(batch, width, height, breadth))


def restormer() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), TransposedAttention(16, 4), nn.Conv2d(16, 3, 3, padding=1))


IMAGE = image("image", "batch", 3, 16, 16)
BATCH = {"batch": 2}

ARCHITECTURES = [
    Architecture("rep_vgg", rep_vgg, (IMAGE,), BATCH, ("batch",), axes={"first": 12, "second": 20}),
    Architecture("cbam", cbam_network, (IMAGE,), BATCH, axes={"stem": 12, "squeeze": 7, "last": 14}),
    Architecture("inception", inception, (IMAGE,), BATCH, axes={"joined": 33, "one": 6, "three": 11, "pooled": 9}),
    Architecture(
        "segformer",
        SegFormer,
        (IMAGE,),
        BATCH,
        axes={"ffn hidden": 30, "kv": 56, "first stream": 14, "second stream": 22, "mix": 16},
    ),
    Architecture(
        "mobile_vit", mobile_vit, (IMAGE,), BATCH, axes={"ffn hidden": 40, "heads": 20, "image stream": 14, "last": 18}
    ),
    Architecture("naf_net", naf_net, (IMAGE,), BATCH, axes={"gated": 20, "both halves": 40, "stream": 14}),
    Architecture(
        "restormer", restormer, (IMAGE,), BATCH, axes={"stream": 16}, note="a channel that attends is a token: it stays"
    ),
]
