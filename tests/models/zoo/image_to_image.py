"""Networks whose output is an image: segmentation, super-resolution, reconstruction."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from zoo.architecture import Architecture, image


def double(inputs: int, outputs: int, groups: int) -> nn.Sequential:
    """Two convolutions, each with a batch normalisation, or a group normalisation where there are groups."""
    layers: list[nn.Module] = []
    for width in (inputs, outputs):
        norm = nn.GroupNorm(groups, outputs) if groups else nn.BatchNorm2d(outputs)
        layers += [nn.Conv2d(width, outputs, 3, padding=1, bias=not groups), norm, nn.SiLU() if groups else nn.ReLU()]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Batch normalisation and transposed convolutions, or group normalisation and upsampling."""

    def __init__(self, groups: int = 0) -> None:
        super().__init__()
        self.enter, self.low = double(3, 12, groups), double(12, 20, groups)
        self.middle = double(20, 28, groups)
        self.up1 = self.upwards(28, 20, groups)
        self.mix1 = double(40, 20, groups)
        self.up2 = self.upwards(20, 12, groups)
        self.mix2, self.head = double(24, 12, groups), nn.Conv2d(12, 2, 1)

    def upwards(self, inputs: int, outputs: int, groups: int) -> nn.Module:
        if groups:
            return nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(inputs, outputs, 3, padding=1))
        return nn.ConvTranspose2d(inputs, outputs, 2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        high = self.enter(x)
        low = self.low(F.max_pool2d(high, 2))
        y = self.middle(F.max_pool2d(low, 2))
        y = self.mix1(torch.cat([low, self.up1(y)], 1))
        return self.head(self.mix2(torch.cat([high, self.up2(y)], 1)))


class ResidualBlock(nn.Module):
    """EDSR's block: no normalisation, a constant scale on the branch."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(width, hidden, 3, padding=1), nn.Conv2d(hidden, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0.2 * self.conv2(F.relu(self.conv1(x)))


class SuperResolution(nn.Module):
    """Channels become pixels, twice; a bilinear copy of the input is added."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 16, 3, padding=1)
        self.body = nn.Sequential(ResidualBlock(16, 22), ResidualBlock(16, 22), nn.Conv2d(16, 16, 3, padding=1))
        self.tail = nn.Sequential(
            nn.Conv2d(16, 40, 3, padding=1),
            nn.PixelShuffle(2),
            nn.PReLU(10),
            nn.Conv2d(10, 12, 3, padding=1),
            nn.PixelShuffle(2),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.head(x)
        return self.tail(y + self.body(y)) + F.interpolate(x, scale_factor=4, mode="bilinear", align_corners=False)


def autoencoder() -> nn.Module:
    """Down to a vector through a flattening, and back up."""
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, 2, 1),
        nn.LeakyReLU(0.1),
        nn.Conv2d(12, 20, 3, 2, 1),
        nn.BatchNorm2d(20),
        nn.ELU(),
        nn.Flatten(),
        nn.Linear(20 * 16, 14),
        nn.Tanh(),
        nn.Linear(14, 18 * 16),
        nn.ReLU(),
        nn.Unflatten(1, (18, 4, 4)),
        nn.ConvTranspose2d(18, 10, 4, 2, 1),
        nn.BatchNorm2d(10),
        nn.ReLU(),
        nn.ConvTranspose2d(10, 3, 4, 2, 1),
        nn.Sigmoid(),
    )


class Stylised(nn.Module):
    """Style transfer: reflected borders, instance normalisation, nearest upsampling."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(
            nn.ReflectionPad2d(2), nn.Conv2d(3, 12, 5), nn.InstanceNorm2d(12, affine=True), nn.ReLU()
        )
        self.residual = nn.Sequential(
            nn.ReflectionPad2d(1), nn.Conv2d(12, 18, 3), nn.InstanceNorm2d(18, affine=True), nn.ReLU(),
            nn.ReflectionPad2d(1), nn.Conv2d(18, 12, 3), nn.InstanceNorm2d(12, affine=True),
        )  # fmt: skip
        self.up = nn.Sequential(nn.Upsample(scale_factor=2), nn.ReflectionPad2d(1), nn.Conv2d(12, 3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.down(x)
        return self.up(y + self.residual(y))


class DeepLab(nn.Module):
    """Parallel dilated convolutions and the image's mean, joined; the output is enlarged to the input's size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 4, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.branches = nn.ModuleList(
            [nn.Conv2d(16, 10, 1), nn.Conv2d(16, 10, 3, padding=1), nn.Conv2d(16, 10, 3, padding=2, dilation=2)]
        )
        self.pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 11, 1), nn.ReLU())
        self.mix, self.head = nn.Conv2d(41, 14, 1), nn.Conv2d(14, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.stem(x)
        branches = [F.relu(branch(y)) for branch in self.branches]
        branches.append(F.interpolate(self.pooled(y), size=y.shape[-2:], mode="bilinear", align_corners=False))
        y = self.head(F.relu(self.mix(torch.cat(branches, 1))))
        return F.interpolate(y, size=x.shape[-2:], mode="bilinear", align_corners=False)


class ModulatedConvolution(nn.Module):
    """StyleGAN2: a style scales the input channels, a demodulation the output channels."""

    def __init__(self, inputs: int, outputs: int, style: int) -> None:
        super().__init__()
        self.style, self.weight = nn.Linear(style, inputs), nn.Parameter(torch.zeros(outputs, inputs, 3, 3))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: torch.Tensor, style: torch.Tensor) -> torch.Tensor:
        scale = self.style(style) + 1
        y = F.conv2d(x * scale[:, :, None, None], self.weight, padding=1)
        norm = (scale[:, None, :].pow(2) * self.weight.pow(2).sum((2, 3))[None]).sum(2)
        return F.leaky_relu(y * torch.rsqrt(norm + 1e-8)[:, :, None, None] + self.bias[None, :, None, None], 0.2)


class StyleGenerator(nn.Module):
    """A learned constant grows under modulated convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.mapping = nn.Sequential(nn.Linear(9, 26), nn.LeakyReLU(0.2), nn.Linear(26, 13), nn.LeakyReLU(0.2))
        self.constant = nn.Parameter(torch.zeros(1, 16, 4, 4))
        self.conv1, self.conv2 = ModulatedConvolution(16, 20, 13), ModulatedConvolution(20, 12, 13)
        self.to_image = nn.Conv2d(12, 3, 1)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        style = self.mapping(z)
        x = self.conv1(self.constant.expand(z.shape[0], -1, -1, -1), style)
        return self.to_image(self.conv2(F.interpolate(x, scale_factor=2, mode="bilinear"), style))


IMAGE = image("image", "batch", 3, 16, 16)
FREE = image("image", "batch", 3, "height", "width")
BATCH = {"batch": 2}

ARCHITECTURES = [
    Architecture("unet_batchnorm", UNet, (IMAGE,), BATCH, ("batch",), axes={"high": 12, "low": 20, "middle": 28}),
    Architecture("unet_groupnorm", lambda: UNet(4), (IMAGE,), BATCH, axes={"high": 12, "low": 20, "middle": 28}),
    Architecture(
        "super_resolution",
        SuperResolution,
        (FREE,),
        {"batch": 2, "height": 9, "width": 7},
        ("batch", "height", "width"),
        axes={"inner": 22, "stream": 16, "shuffled": 40},
    ),
    Architecture("autoencoder", autoencoder, (IMAGE,), BATCH, axes={"map": 20, "code": 14, "grown map": 18}),
    Architecture("style_transfer", Stylised, (IMAGE,), BATCH, axes={"stream": 12, "inner": 18}),
    Architecture("deeplab", DeepLab, (IMAGE,), BATCH, axes={"stem": 16, "branch": 10, "pooled": 11, "mix": 14}),
    Architecture(
        "style_generator",
        StyleGenerator,
        (image("z", "batch", 9),),
        BATCH,
        axes={"mapping": 26, "style": 13, "map": 20},
    ),
]
