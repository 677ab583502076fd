"""Sound, video and other signals: dilated and strided convolutions along time, volumes."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from zoo.architecture import Architecture, image
from zoo.attention import SeparateAttention
from zoo.blocks import FeedForward


class WaveNet(nn.Module):
    """Causal dilated convolutions with gates; what each layer skips is summed."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv1d(1, 14, 1)
        self.dilated = nn.ModuleList(nn.Conv1d(14, 2 * 20, 2, dilation=2**i) for i in range(3))
        self.skips = nn.ModuleList(nn.Conv1d(20, 18, 1) for _ in range(3))
        self.residuals = nn.ModuleList(nn.Conv1d(20, 14, 1) for _ in range(3))
        self.leave = nn.Sequential(nn.ReLU(), nn.Conv1d(18, 26, 1), nn.ReLU(), nn.Conv1d(26, 9, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, total = self.enter(x), 0
        for index, (dilated, skip, residual) in enumerate(zip(self.dilated, self.skips, self.residuals, strict=True)):
            filtered, gate = dilated(F.pad(x, (2**index, 0))).chunk(2, 1)
            y = torch.tanh(filtered) * torch.sigmoid(gate)
            total = total + skip(y)
            x = x + residual(y)
        return self.leave(total)


def video() -> nn.Module:
    """Convolutions over time and space, factored in the second block."""
    return nn.Sequential(
        nn.Conv3d(3, 10, 3, (1, 2, 2), 1, bias=False),
        nn.BatchNorm3d(10),
        nn.ReLU(),
        nn.Conv3d(10, 16, (1, 3, 3), padding=(0, 1, 1)),
        nn.Conv3d(16, 14, (3, 1, 1), padding=(1, 0, 0)),
        nn.BatchNorm3d(14),
        nn.ReLU(),
        nn.MaxPool3d(2),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(14, 9),
    )


class EncoderLayer(nn.Module):
    def __init__(self, width: int, hidden: int, heads: int, head_size: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.ffn = SeparateAttention(width, heads, head_size), FeedForward(width, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class Whisper(nn.Module):
    """Two convolutions over a spectrogram, fixed sinusoids, transformer layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(10, 24, 3, padding=1), nn.Conv1d(24, 24, 3, 2, 1)
        angles = torch.arange(8)[:, None] * torch.exp(-torch.arange(12) / 11 * 9.2)[None]
        self.register_buffer("positions", torch.cat([angles.sin(), angles.cos()], 1))
        self.layers, self.norm = nn.Sequential(*(EncoderLayer(24, 40, 4, 5) for _ in range(2))), nn.LayerNorm(24)
        self.head = nn.Linear(24, 9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.gelu(self.conv2(F.gelu(self.conv1(x)))).permute(0, 2, 1)
        return self.head(self.norm(self.layers(x + self.positions)))


class ConformerConvolution(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm, self.enter = nn.LayerNorm(width), nn.Conv1d(width, 2 * inner, 1)
        self.depthwise, self.batch_norm = nn.Conv1d(inner, inner, 5, padding=2, groups=inner), nn.BatchNorm1d(inner)
        self.leave = nn.Conv1d(inner, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.glu(self.enter(self.norm(x).transpose(1, 2)), 1)
        return self.leave(F.silu(self.batch_norm(self.depthwise(y)))).transpose(1, 2)


class Conformer(nn.Module):
    """Half a feed-forward, attention, a gated convolution, half a feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(10, 24)
        self.first, self.second = FeedForward(24, 40, nn.SiLU), FeedForward(24, 40, nn.SiLU)
        self.norms = nn.ModuleList(nn.LayerNorm(24) for _ in range(4))
        self.attention, self.convolution = SeparateAttention(24, 4, 5), ConformerConvolution(24, 28)
        self.head = nn.Linear(24, 9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        x = x + 0.5 * self.first(self.norms[0](x))
        x = x + self.attention(self.norms[1](x))
        x = x + self.convolution(x)
        x = x + 0.5 * self.second(self.norms[2](x))
        return self.head(self.norms[3](x)).log_softmax(-1)


class TasNet(nn.Module):
    """Sound separation: learned filters, masks from dilated depthwise blocks, learned synthesis."""

    def __init__(self) -> None:
        super().__init__()
        self.analysis, self.bottleneck = nn.Conv1d(1, 22, 8, 4, bias=False), nn.Conv1d(22, 14, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv1d(14, 26, 1),
                nn.PReLU(),
                nn.GroupNorm(1, 26),
                nn.Conv1d(26, 26, 3, padding=2**i, dilation=2**i, groups=26),
                nn.PReLU(),
                nn.GroupNorm(1, 26),
                nn.Conv1d(26, 14, 1),
            )
            for i in range(2)
        )
        self.masks, self.synthesis = nn.Conv1d(14, 2 * 22, 1), nn.ConvTranspose1d(22, 1, 8, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = self.analysis(x)
        y = self.bottleneck(features)
        for block in self.blocks:
            y = y + block(y)
        masks = torch.sigmoid(self.masks(y)).view(y.shape[0], 2, 22, -1)
        masked = (masks * features.unsqueeze(1)).view(y.shape[0] * 2, 22, -1)
        return self.synthesis(masked).view(y.shape[0], 2, -1)


SPECTRUM = image("spectrum", "batch", 10, 16)

ARCHITECTURES = [
    Architecture(
        "wavenet",
        WaveNet,
        (image("wave", "batch", 1, "time"),),
        {"batch": 2, "time": 16},
        ("batch", "time"),
        axes={"residual": 14, "gates": 40, "gated": 20, "skip": 18, "hidden": 26},
    ),
    Architecture(
        "video_3d",
        video,
        (image("clip", "batch", 3, 4, 8, 8),),
        {"batch": 2},
        axes={"first": 10, "space": 16, "time": 14},
    ),
    Architecture(
        "whisper",
        Whisper,
        (SPECTRUM,),
        {"batch": 2},
        axes={"ffn hidden": 40, "heads": 20, "residual stream": 24},
        note="the positions are fixed",
    ),
    Architecture(
        "conformer",
        Conformer,
        (image("frames", "batch", "time", 10),),
        {"batch": 2, "time": 12},
        ("batch", "time"),
        axes={"ffn hidden": 40, "heads": 20, "gated": 56, "convolved": 28, "residual stream": 24},
    ),
    Architecture(
        "tasnet",
        TasNet,
        (image("wave", "batch", 1, 40),),
        {"batch": 2},
        axes={"filters": 22, "bottleneck": 14, "inner": 26},
        note="one gain and shift a channel, all channels normalised together",
    ),
]
