"""Diffusion and networks of several modalities."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from zoo.architecture import Architecture, image, tokens
from zoo.attention import FusedAttention, SeparateAttention
from zoo.blocks import FeedForward


class TimeEmbedding(nn.Module):
    """Sinusoids of a step, then two linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("rates", torch.exp(-torch.arange(5) / 4 * 5.0))
        self.first, self.second = nn.Linear(10, width), nn.Linear(width, width)

    def forward(self, step: torch.Tensor) -> torch.Tensor:
        angles = step[:, None].float() * self.rates[None]
        return self.second(F.silu(self.first(torch.cat([angles.cos(), angles.sin()], -1))))


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class DitBlock(nn.Module):
    """Adaptive layer norm: shift, scale and gate of each branch come from the condition."""

    def __init__(self, width: int, hidden: int, condition: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False, eps=1e-6) for _ in range(2))
        self.attention, self.ffn = FusedAttention(width, 4, 5), FeedForward(width, hidden)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(condition, 6 * width))

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, 1)
        x = x + gate1.unsqueeze(1) * self.attention(modulate(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.ffn(modulate(self.norm2(x), shift2, scale2))


class Dit(nn.Module):
    """Patches in, patches out, conditioned on a step and a class."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.positions = nn.Conv2d(3, 24, 4, 4), nn.Parameter(torch.zeros(1, 16, 24))
        self.time, self.class_embedding = TimeEmbedding(22), nn.Embedding(11, 22)
        self.blocks = nn.ModuleList(DitBlock(24, 40, 22) for _ in range(2))
        self.norm = nn.LayerNorm(24, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(22, 48))
        self.head = nn.Linear(24, 4 * 4 * 3)

    def forward(self, x: torch.Tensor, step: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        condition = self.time(step) + self.class_embedding(label)
        for block in self.blocks:
            x = block(x, condition)
        shift, scale = self.modulation(condition).chunk(2, 1)
        x = self.head(modulate(self.norm(x), shift, scale)).reshape(-1, 4, 4, 4, 4, 3)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(-1, 3, 16, 16)


class TimedResidual(nn.Module):
    """Group norm, activation, convolution, twice; the step shifts the channels between."""

    def __init__(self, inputs: int, outputs: int, condition: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(4, outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.time = nn.Linear(condition, outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        y = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(condition))[:, :, None, None]
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class CrossAttendedImage(nn.Module):
    """Stable Diffusion's spatial transformer: pixels attend to words."""

    def __init__(self, width: int, words: int) -> None:
        super().__init__()
        self.norm0, self.enter = nn.GroupNorm(4, width, eps=1e-6), nn.Conv2d(width, 18, 1)
        self.norm1, self.norm2 = nn.LayerNorm(18), nn.LayerNorm(18)
        self.attention, self.leave = SeparateAttention(18, 4, 5, source=words), nn.Conv2d(18, width, 1)
        self.up, self.down = nn.Linear(18, 2 * 26), nn.Linear(26, 18)

    def forward(self, x: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        batch, _, height, width = x.shape
        y = self.enter(self.norm0(x)).permute(0, 2, 3, 1).reshape(batch, height * width, 18)
        y = y + self.attention(self.norm1(y), words)
        kept, gate = self.up(self.norm2(y)).chunk(2, -1)
        y = y + self.down(kept * F.gelu(gate))
        return x + self.leave(y.reshape(batch, height, width, 18).permute(0, 3, 1, 2).contiguous())


class DiffusionUNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.time, self.words = TimeEmbedding(22), nn.Embedding(31, 14)
        self.enter = nn.Conv2d(3, 12, 3, padding=1)
        self.high, self.shrink = TimedResidual(12, 12, 22), nn.Conv2d(12, 12, 3, 2, 1)
        self.low, self.cross = TimedResidual(12, 20, 22), CrossAttendedImage(20, 14)
        self.grow, self.mix = nn.Conv2d(20, 20, 3, padding=1), TimedResidual(32, 12, 22)
        self.norm, self.head = nn.GroupNorm(4, 12), nn.Conv2d(12, 3, 3, padding=1)

    def forward(self, x: torch.Tensor, step: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        condition, words = self.time(step), self.words(prompt)
        high = self.high(self.enter(x), condition)
        low = self.cross(self.low(self.shrink(high), condition), words)
        y = self.grow(F.interpolate(low, scale_factor=2.0, mode="nearest"))
        y = self.mix(torch.cat([y, high], 1), condition)
        return self.head(F.silu(self.norm(y)))


class TextLayer(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.ffn = SeparateAttention(width, 4, 5, causal=True), FeedForward(width, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class Clip(nn.Module):
    """An image and texts meet as unit vectors; a text's vector is that of its largest token."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 14, 3, 2, 1), nn.Conv2d(14, 20, 3, 2, 1)
        self.image_norm, self.image_projection = nn.LayerNorm(20), nn.Parameter(torch.zeros(20, 18))
        self.embedding, self.positions = nn.Embedding(31, 24), nn.Parameter(torch.zeros(7, 24))
        self.layer, self.text_norm = TextLayer(24, 40), nn.LayerNorm(24)
        self.text_projection, self.scale = nn.Parameter(torch.zeros(24, 18)), nn.Parameter(torch.ones(()))

    def forward(self, picture: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        seen = F.relu(self.conv2(F.relu(self.conv1(picture)))).mean((2, 3))
        seen = F.normalize(self.image_norm(seen) @ self.image_projection, dim=-1)
        x = self.text_norm(self.layer(self.embedding(ids) + self.positions))
        said = x[torch.arange(x.shape[0]), ids.argmax(-1)] @ self.text_projection
        return self.scale.exp() * seen @ F.normalize(said, dim=-1).t()


class Perceiver(nn.Module):
    """A few learned vectors read a long input by cross attention, then think about it."""

    def __init__(self) -> None:
        super().__init__()
        self.latents, self.enter = nn.Parameter(torch.zeros(1, 6, 24)), nn.Linear(3, 18)
        self.norm_input, self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(n) for n in (18, 24, 24, 24))
        self.cross, self.own = SeparateAttention(24, 4, 5, source=18), SeparateAttention(24, 4, 7)
        self.ffn, self.head = FeedForward(24, 40), nn.Linear(24, 9)

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        source = self.norm_input(F.gelu(self.enter(points)))
        x = self.latents.expand(points.shape[0], -1, -1)
        x = x + self.cross(self.norm1(x), source)
        x = x + self.own(self.norm2(x))
        return self.head((x + self.ffn(self.norm3(x))).mean(1))


IMAGE = image("image", "batch", 3, 16, 16)
STEP = tokens("step", 1000, "batch")
BATCH = {"batch": 2}

ARCHITECTURES = [
    Architecture(
        "dit",
        Dit,
        (IMAGE, STEP, tokens("label", 11, "batch")),
        BATCH,
        axes={"ffn hidden": 40, "heads": 20, "condition": 22, "modulation": 144, "residual stream": 24},
    ),
    Architecture(
        "diffusion_unet",
        DiffusionUNet,
        (IMAGE, STEP, tokens("prompt", 31, "batch", 5)),
        BATCH,
        axes={"condition": 22, "words": 14, "high": 12, "ffn hidden": 26, "token stream": 18},
    ),
    Architecture(
        "clip",
        Clip,
        (IMAGE, tokens("ids", 31, "texts", 7)),
        {"batch": 2, "texts": 3},
        axes={"map": 14, "ffn hidden": 40, "residual stream": 24},
        note="the length of the joint vectors is a sum over the axis",
    ),
    Architecture(
        "perceiver",
        Perceiver,
        (image("points", "batch", "count", 3),),
        {"batch": 2, "count": 11},
        ("batch", "count"),
        axes={"input": 18, "ffn hidden": 40, "cross heads": 20, "own heads": 28, "residual stream": 24},
    ),
]
