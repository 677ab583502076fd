"""Networks for phones: depthwise convolutions, squeeze-excite, channel shuffles, cheap copies."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from zoo.architecture import Architecture, image
from zoo.blocks import Classifier, SqueezeExcite, conv_bn, conv_bn_act


class InvertedResidual(nn.Module):
    """Expand, depthwise, optional squeeze-excite, project; linear at the end."""

    def __init__(
        self,
        inputs: int,
        hidden: int,
        outputs: int,
        stride: int,
        activation: type[nn.Module],
        squeeze: SqueezeExcite | None = None,
    ) -> None:
        super().__init__()
        self.expand = conv_bn_act(inputs, hidden, 1, activation=activation)
        self.depthwise = conv_bn_act(hidden, hidden, 3, stride, hidden, activation)
        self.squeeze = squeeze or nn.Identity()
        self.project = conv_bn(hidden, outputs, 1)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.project(self.squeeze(self.depthwise(self.expand(x))))
        return x + y if self.residual else y


def mobilenet_v2() -> nn.Module:
    return nn.Sequential(
        conv_bn_act(3, 8, stride=2, activation=nn.ReLU6),
        InvertedResidual(8, 20, 12, 1, nn.ReLU6),
        InvertedResidual(12, 30, 12, 1, nn.ReLU6),
        InvertedResidual(12, 30, 18, 2, nn.ReLU6),
        conv_bn_act(18, 40, 1, activation=nn.ReLU6),
        Classifier(40),
    )


def mobilenet_v3() -> nn.Module:
    return nn.Sequential(
        conv_bn_act(3, 8, stride=2, activation=nn.Hardswish),
        InvertedResidual(8, 20, 12, 1, nn.ReLU, SqueezeExcite(20, 6, nn.Hardsigmoid)),
        InvertedResidual(12, 30, 12, 1, nn.Hardswish, SqueezeExcite(30, 7, nn.Hardsigmoid)),
        conv_bn_act(12, 40, 1, activation=nn.Hardswish),
        nn.AdaptiveAvgPool2d(1),
        nn.Conv2d(40, 44, 1),
        nn.Hardswish(),
        nn.Flatten(),
        nn.Linear(44, 10),
    )


def efficientnet() -> nn.Module:
    return nn.Sequential(
        conv_bn_act(3, 8, stride=2, activation=nn.SiLU),
        InvertedResidual(8, 20, 12, 1, nn.SiLU, SqueezeExcite(20, 5)),
        InvertedResidual(12, 30, 12, 1, nn.SiLU, SqueezeExcite(30, 7)),
        InvertedResidual(12, 30, 18, 2, nn.SiLU, SqueezeExcite(30, 7)),
        conv_bn_act(18, 40, 1, activation=nn.SiLU),
        Classifier(40),
    )


def shuffle(x: torch.Tensor, groups: int) -> torch.Tensor:
    """Channels of all groups in turn."""
    batch, channels, height, width = x.shape
    return x.view(batch, groups, channels // groups, height, width).transpose(1, 2).reshape(batch, -1, height, width)


class ShuffleV1(nn.Module):
    def __init__(self, width: int, inner: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.compress = conv_bn_act(width, inner, 1, groups=groups)
        self.depthwise, self.expand = conv_bn(inner, inner, 3, groups=inner), conv_bn(inner, width, 1, groups=groups)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x + self.expand(self.depthwise(shuffle(self.compress(x), self.groups))))


def shufflenet_v1() -> nn.Module:
    return nn.Sequential(conv_bn_act(3, 24, stride=2), ShuffleV1(24, 18, 3), ShuffleV1(24, 18, 3), Classifier(24))


class ShuffleV2(nn.Module):
    """Half of the channels pass; the halves are shuffled together."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.branch = nn.Sequential(
            conv_bn_act(half, half, 1), conv_bn(half, half, 3, groups=half), conv_bn_act(half, half, 1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept, worked = x.chunk(2, 1)
        return shuffle(torch.cat([kept, self.branch(worked)], 1), 2)


class ShuffleV2Down(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = outputs // 2
        self.left = nn.Sequential(conv_bn(inputs, inputs, 3, 2, inputs), conv_bn_act(inputs, half, 1))
        self.right = nn.Sequential(
            conv_bn_act(inputs, half, 1), conv_bn(half, half, 3, 2, half), conv_bn_act(half, half, 1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return shuffle(torch.cat([self.left(x), self.right(x)], 1), 2)


def shufflenet_v2() -> nn.Module:
    return nn.Sequential(
        conv_bn_act(3, 12), ShuffleV2Down(12, 24), ShuffleV2(24), ShuffleV2(24), conv_bn_act(24, 40, 1), Classifier(40)
    )


class GhostModule(nn.Module):
    """Half of the channels are made by a depthwise convolution of the other half."""

    def __init__(self, inputs: int, outputs: int, activation: type[nn.Module]) -> None:
        super().__init__()
        half = outputs // 2
        self.primary = conv_bn_act(inputs, half, 1, activation=activation)
        self.cheap = conv_bn_act(half, half, 3, groups=half, activation=activation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.primary(x)
        return torch.cat([first, self.cheap(first)], 1)


class GhostBottleneck(nn.Module):
    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.expand, self.project = GhostModule(inputs, hidden, nn.ReLU), GhostModule(hidden, outputs, nn.Identity)
        self.squeeze = SqueezeExcite(hidden, 6, nn.Hardsigmoid)
        self.shortcut = (
            nn.Identity()
            if inputs == outputs
            else nn.Sequential(conv_bn(inputs, inputs, 3, groups=inputs), conv_bn(inputs, outputs, 1))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.project(self.squeeze(self.expand(x))) + self.shortcut(x)


def ghostnet() -> nn.Module:
    return nn.Sequential(
        conv_bn_act(3, 10, stride=2), GhostBottleneck(10, 28, 16), GhostBottleneck(16, 28, 16), Classifier(16)
    )


IMAGE = image("image", "batch", 3, 16, 16)
BATCH = {"batch": 2}

ARCHITECTURES = [
    Architecture("mobilenet_v2", mobilenet_v2, (IMAGE,), BATCH, ("batch",), axes={"expanded": 30, "stream": 12}),
    Architecture("mobilenet_v3", mobilenet_v3, (IMAGE,), BATCH, axes={"expanded": 30, "squeeze": 7, "stream": 12}),
    Architecture("efficientnet", efficientnet, (IMAGE,), BATCH, axes={"expanded": 30, "squeeze": 7, "stream": 12}),
    Architecture("shufflenet_v1", shufflenet_v1, (IMAGE,), BATCH, axes={"inner": 18, "stream": 24}),
    Architecture("shufflenet_v2", shufflenet_v2, (IMAGE,), BATCH, ("batch",), axes={"half": 12, "last": 40}),
    Architecture("ghostnet", ghostnet, (IMAGE,), BATCH, axes={"ghost": 14, "squeeze": 6, "stream": 16}),
]
