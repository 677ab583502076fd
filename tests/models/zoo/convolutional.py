"""Image classifiers made of convolutions."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from zoo.architecture import Architecture, image
from zoo.blocks import Classifier, SqueezeExcite, conv_bn, conv_bn_act


class PadShortcut(nn.Module):
    """Option A: every second pixel, new channels are zeros on both sides."""

    def __init__(self, more: int) -> None:
        super().__init__()
        self.more = more

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.more // 2, self.more - self.more // 2))


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: nn.Module) -> None:
        super().__init__()
        self.first, self.second = conv_bn_act(inputs, outputs, stride=stride), conv_bn(outputs, outputs)
        self.shortcut = shortcut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.second(self.first(x)) + self.shortcut(x))


def resnet(option: str) -> nn.Module:
    def change(inputs: int, outputs: int) -> nn.Module:
        return PadShortcut(outputs - inputs) if option == "A" else conv_bn(inputs, outputs, 1, 2)

    return nn.Sequential(
        conv_bn_act(3, 12),
        BasicBlock(12, 12, 1, nn.Identity()),
        BasicBlock(12, 20, 2, change(12, 20)),
        BasicBlock(20, 20, 1, nn.Identity()),
        Classifier(20),
    )


class WideBlock(nn.Module):
    """Pre-activation: normalisation and activation come before the convolutions, and of the shortcut too."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.norm1(x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        return shortcut + self.conv2(F.relu(self.norm2(self.conv1(y))))


def wide_resnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1, bias=False),
        WideBlock(8, 24, 1),
        WideBlock(24, 24, 1),
        WideBlock(24, 32, 2),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        Classifier(32),
    )


class Bottleneck(nn.Module):
    """ResNeXt and RegNet: 1x1, grouped 3x3, 1x1, with squeeze-excite in RegNet-Y."""

    def __init__(self, inputs: int, inner: int, outputs: int, stride: int, groups: int, squeeze: int = 0) -> None:
        super().__init__()
        self.reduce = conv_bn_act(inputs, inner, 1)
        self.grouped = conv_bn_act(inner, inner, 3, stride, groups)
        self.squeeze = SqueezeExcite(inner, squeeze) if squeeze else nn.Identity()
        self.expand = conv_bn(inner, outputs, 1)
        self.shortcut = nn.Identity() if inputs == outputs and stride == 1 else conv_bn(inputs, outputs, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.expand(self.squeeze(self.grouped(self.reduce(x)))) + self.shortcut(x))


def resnext() -> nn.Module:
    return nn.Sequential(
        conv_bn_act(3, 12),
        Bottleneck(12, 16, 24, 2, groups=4),
        Bottleneck(24, 16, 24, 1, groups=4),
        Classifier(24),
    )


def regnet() -> nn.Module:
    return nn.Sequential(
        conv_bn_act(3, 12, stride=2),
        Bottleneck(12, 16, 16, 2, groups=2, squeeze=6),
        Bottleneck(16, 24, 24, 2, groups=3, squeeze=7),
        Bottleneck(24, 24, 24, 1, groups=3, squeeze=7),
        Classifier(24),
    )


class DenseLayer(nn.Module):
    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 3 * growth, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(3 * growth), nn.Conv2d(3 * growth, growth, 3, 1, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        new = self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))
        return torch.cat([x, new], 1)


def densenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, 1, 1, bias=False),
        DenseLayer(12, 6),
        DenseLayer(18, 6),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.Conv2d(24, 14, 1, bias=False),
        nn.AvgPool2d(2),
        DenseLayer(14, 6),
        DenseLayer(20, 6),
        nn.BatchNorm2d(26),
        nn.ReLU(),
        Classifier(26),
    )


def vgg() -> nn.Module:
    """The flattened map goes into the first linear layer: 16 of its columns belong to each channel."""
    return nn.Sequential(
        *conv_bn_act(3, 12),
        nn.MaxPool2d(2),
        *conv_bn_act(12, 18),
        nn.MaxPool2d(2),
        *conv_bn_act(18, 22),
        nn.Flatten(),
        nn.Linear(22 * 16, 40),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(40, 10),
    )


class LayerNorm2d(nn.Module):
    """Layer normalisation over the channels of an image, as ConvNeXt's stem and downsampling have it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.layer_scale = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.layer_scale * self.down(F.gelu(self.up(y)))
        return x + y.permute(0, 3, 1, 2)


def convnext() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 14, 4, 4),
        LayerNorm2d(14),
        ConvNeXtBlock(14, 40),
        LayerNorm2d(14),
        nn.Conv2d(14, 22, 2, 2),
        ConvNeXtBlock(22, 44),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.LayerNorm(22),
        nn.Linear(22, 10),
    )


class GatedConvolution(nn.Module):
    def __init__(self, width: int, gated: int) -> None:
        super().__init__()
        self.conv, self.project = nn.Conv2d(width, 2 * gated, 3, padding=1), nn.Conv2d(gated, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.project(F.glu(self.conv(x), 1))


def glu_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, 2, 1), GatedConvolution(12, 20), GatedConvolution(12, 20), nn.ReLU(), Classifier(12)
    )


IMAGE, LARGE = image("image", "batch", 3, 16, 16), image("image", "batch", 3, 32, 32)
BATCH = {"batch": 2}

ARCHITECTURES = [
    Architecture("resnet_a", lambda: resnet("A"), (IMAGE,), BATCH, axes={"inner": 12, "stream": 20}),
    Architecture("resnet_b", lambda: resnet("B"), (IMAGE,), BATCH, ("batch",), axes={"inner": 12, "stream": 20}),
    Architecture("wide_resnet", wide_resnet, (IMAGE,), BATCH, axes={"stem": 8, "inner": 24, "stream": 32}),
    Architecture("resnext", resnext, (IMAGE,), BATCH, axes={"stem": 12, "groups": 16, "stream": 24}),
    Architecture("regnet", regnet, (IMAGE,), BATCH, axes={"stem": 12, "squeeze": 7, "stream": 24}),
    Architecture("densenet", densenet, (IMAGE,), BATCH, axes={"growth": 6, "bottleneck": 18, "transition": 14}),
    Architecture("vgg_flatten", vgg, (IMAGE,), BATCH, ("batch",), axes={"last map": 22, "hidden": 40}),
    Architecture(
        "convnext",
        convnext,
        (image("image", "batch", 3, 32, 32),),
        BATCH,
        axes={"ffn hidden": 40, "stream": 14, "second stream": 22},
    ),
    Architecture("glu_conv", glu_network, (IMAGE,), BATCH, axes={"gated": 40, "stream": 12}),
]
