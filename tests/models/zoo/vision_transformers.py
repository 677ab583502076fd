"""Transformers on images: patches, class tokens, windows."""

from __future__ import annotations

import torch
from torch import nn

from zoo.architecture import Architecture, image
from zoo.attention import FusedAttention, SeparateAttention, TorchAttention
from zoo.blocks import FeedForward


class PreNormBlock(nn.Module):
    def __init__(self, width: int, hidden: int, attention: nn.Module, activation: type[nn.Module] = nn.GELU) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.ffn = attention, FeedForward(width, hidden, activation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class VisionTransformer(nn.Module):
    """Class tokens before the patches, learned positions; DeiT has a second token and a second head."""

    def __init__(self, width: int, blocks: list[PreNormBlock], tokens: int = 1, size: int = 16, patch: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.tokens = nn.Parameter(torch.zeros(1, tokens, width))
        self.positions = nn.Parameter(torch.zeros(1, tokens + (size // patch) ** 2, width))
        self.blocks, self.norm = nn.Sequential(*blocks), nn.LayerNorm(width)
        self.heads = nn.ModuleList(nn.Linear(width, 10) for _ in range(tokens))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.tokens.expand(x.shape[0], -1, -1), x], 1) + self.positions
        x = self.norm(self.blocks(x))
        outputs = [head(x[:, index]) for index, head in enumerate(self.heads)]
        return torch.stack(outputs).mean(0)


def vit(attention: str) -> nn.Module:
    make = {
        "fused": lambda: FusedAttention(24, 4, 5),
        "separate": lambda: SeparateAttention(24, 4, 5),
        "mha": lambda: TorchAttention(24, 4),
    }
    return VisionTransformer(24, [PreNormBlock(24, 40, make[attention]()) for _ in range(2)])


def deit() -> nn.Module:
    return VisionTransformer(24, [PreNormBlock(24, 40, FusedAttention(24, 4, 5)) for _ in range(2)], tokens=2)


class WindowAttention(nn.Module):
    """Attention within windows, with a bias for each relative position and a mask where shifted windows wrap."""

    def __init__(self, width: int, heads: int, head_size: int, window: int, mask: torch.Tensor | None) -> None:
        super().__init__()
        self.heads, self.head_size, self.window = heads, head_size, window
        self.qkv, self.out = nn.Linear(width, 3 * heads * head_size), nn.Linear(heads * head_size, width)
        self.bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        place = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        relative = place[:, :, None] - place[:, None] + window - 1
        self.register_buffer("index", relative[0] * (2 * window - 1) + relative[1])
        self.register_buffer("mask", mask)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        windows, length, _ = x.shape
        qkv = self.qkv(x).reshape(windows, length, 3, self.heads, self.head_size).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        scores = (q * self.head_size**-0.5) @ k.transpose(-2, -1)
        bias = self.bias_table[self.index.view(-1)].view(length, length, -1).permute(2, 0, 1).contiguous()
        scores = scores + bias.unsqueeze(0)
        if self.mask is not None:
            count = self.mask.shape[0]
            scores = scores.view(windows // count, count, self.heads, length, length) + self.mask[None, :, None]
            scores = scores.view(-1, self.heads, length, length)
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(windows, length, self.heads * self.head_size)
        return self.out(y)


def windows_of(x: torch.Tensor, window: int) -> torch.Tensor:
    batch, height, width, channels = x.shape
    x = x.view(batch, height // window, window, width // window, window, channels)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, window * window, channels)


def image_of(windows: torch.Tensor, window: int, height: int, width: int) -> torch.Tensor:
    batch = windows.shape[0] // ((height // window) * (width // window))
    x = windows.view(batch, height // window, width // window, window, window, -1)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(batch, height, width, -1)


class SwinBlock(nn.Module):
    def __init__(self, width: int, hidden: int, heads: int, head_size: int, side: int, window: int, shift: int) -> None:
        super().__init__()
        self.side, self.window, self.shift = side, window, shift
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = WindowAttention(width, heads, head_size, window, self.mask() if shift else None)
        self.ffn = FeedForward(width, hidden)

    def mask(self) -> torch.Tensor:
        """-100 between pixels that are neighbours only because the image was rolled."""
        region = torch.zeros(1, self.side, self.side, 1)
        bounds = (slice(0, -self.window), slice(-self.window, -self.shift), slice(-self.shift, None))
        for number, (rows, columns) in enumerate((r, c) for r in bounds for c in bounds):
            region[:, rows, columns] = number
        flat = windows_of(region, self.window).squeeze(-1)
        return (flat[:, None] != flat[:, :, None]).float() * -100.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, channels = x.shape
        y = self.norm1(x).view(batch, self.side, self.side, channels)
        if self.shift:
            y = torch.roll(y, (-self.shift, -self.shift), (1, 2))
        y = image_of(self.attention(windows_of(y, self.window)), self.window, self.side, self.side)
        if self.shift:
            y = torch.roll(y, (self.shift, self.shift), (1, 2))
        x = x + y.view(batch, length, channels)
        return x + self.ffn(self.norm2(x))


class PatchMerging(nn.Module):
    """Four neighbours are joined along the channels, normalised together and halved."""

    def __init__(self, width: int, outputs: int, side: int) -> None:
        super().__init__()
        self.side, self.norm = side, nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, outputs, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, _, channels = x.shape
        x = x.view(batch, self.side, self.side, channels)
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        return self.reduction(self.norm(x.view(batch, -1, 4 * channels)))


class Swin(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm0 = nn.Conv2d(3, 18, 2, 2), nn.LayerNorm(18)
        self.blocks = nn.Sequential(
            SwinBlock(18, 40, 3, 5, 8, 4, 0),
            SwinBlock(18, 40, 3, 5, 8, 4, 2),
            PatchMerging(18, 26, 8),
            SwinBlock(26, 52, 4, 7, 4, 4, 0),
        )
        self.norm, self.head = nn.LayerNorm(26), nn.Linear(26, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm0(self.patches(x).flatten(2).transpose(1, 2))
        return self.head(self.norm(self.blocks(x)).mean(1))


class MetaPool(nn.Module):
    """EfficientFormer's token mixer without weights: the mean of the neighbourhood less the pixel itself."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
        self.scale1 = nn.Parameter(torch.ones(width, 1, 1))
        self.scale2 = nn.Parameter(torch.ones(width, 1, 1))
        self.mlp = nn.Sequential(
            nn.Conv2d(width, hidden, 1), nn.BatchNorm2d(hidden), nn.GELU(), nn.Conv2d(hidden, width, 1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.scale1 * (self.pool(x) - x)
        return x + self.scale2 * self.mlp(x)


class EfficientFormer(nn.Module):
    """Pooling blocks on the image, then attention on its pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 14, 3, 2, 1), nn.BatchNorm2d(14), nn.ReLU())
        self.pooling = nn.Sequential(MetaPool(14, 34), nn.Conv2d(14, 22, 3, 2, 1), nn.BatchNorm2d(22), MetaPool(22, 44))
        self.attention = PreNormBlock(22, 44, FusedAttention(22, 4, 5))
        self.norm, self.head = nn.LayerNorm(22), nn.Linear(22, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pooling(self.stem(x)).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.attention(x)).mean(1))


IMAGE = image("image", "batch", 3, 16, 16)
BATCH = {"batch": 2}

ARCHITECTURES = [
    Architecture(
        "vit_fused",
        lambda: vit("fused"),
        (IMAGE,),
        BATCH,
        ("batch",),
        axes={"ffn hidden": 40, "qkv": 60, "heads": 20, "residual stream": 24},
    ),
    Architecture(
        "vit_separate",
        lambda: vit("separate"),
        (IMAGE,),
        BATCH,
        axes={"ffn hidden": 40, "heads": 20, "residual stream": 24},
    ),
    Architecture(
        "vit_mha",
        lambda: vit("mha"),
        (IMAGE,),
        BATCH,
        axes={"ffn hidden": 40, "qkv": 72, "heads and residual stream": 24},
    ),
    Architecture("deit", deit, (IMAGE,), BATCH, axes={"ffn hidden": 40, "qkv": 60, "heads": 20, "residual stream": 24}),
    Architecture(
        "swin",
        Swin,
        (IMAGE,),
        BATCH,
        axes={
            "ffn hidden": 40,
            "qkv": 45,
            "heads": 15,
            "first residual stream": 18,
            "merged": 72,
            "second residual stream": 26,
        },
        note="windows, rolls, relative positions, patch merging",
    ),
    Architecture(
        "efficientformer",
        EfficientFormer,
        (IMAGE,),
        BATCH,
        axes={"mlp hidden": 34, "image stream": 14, "qkv": 60, "token stream": 22},
    ),
]
