"""A network of Llama's shape, for measurements: RMS norms, rotary positions, grouped queries, a gated MLP."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """Sizes; by default those of Llama 3.2 1B."""

    vocabulary: int = 128256
    width: int = 2048
    layers: int = 16
    heads: int = 32
    groups: int = 8
    hidden: int = 8192
    theta: float = 500000.0


class Norm(nn.Module):
    """x / rms(x) times a gain."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5) * self.weight


class Attention(nn.Module):
    """Causal, rotary, several queries a key."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.size, self.repeats = shape.width // shape.heads, shape.heads // shape.groups
        self.theta = shape.theta
        self.q_proj = nn.Linear(shape.width, shape.width, bias=False)
        self.k_proj = nn.Linear(shape.width, shape.groups * self.size, bias=False)
        self.v_proj = nn.Linear(shape.width, shape.groups * self.size, bias=False)
        self.o_proj = nn.Linear(shape.width, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, time = x.shape[:2]
        q, k, v = (p(x).reshape(batch, time, -1, self.size) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self._turned(q).transpose(1, 2), self._turned(k).transpose(1, 2)
        k = k.repeat_interleave(self.repeats, 1)
        v = v.transpose(1, 2).repeat_interleave(self.repeats, 1)
        scores = q @ k.transpose(2, 3) / self.size**0.5
        places = torch.arange(time, device=x.device)
        scores = scores.masked_fill(places > places.unsqueeze(1), -1e4)
        return self.o_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, time, -1))

    def _turned(self, x: Tensor) -> Tensor:
        half = self.size // 2
        rates = self.theta ** (-torch.arange(half, device=x.device) / half)
        angles = torch.arange(x.shape[1], device=x.device).unsqueeze(1) * rates
        cos, sin = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)
        first, second = x[..., :half], x[..., half:]
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


class Layer(nn.Module):
    """Attention and a gated MLP, each behind a norm and beside the stream."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_norm, self.post_norm = Norm(shape.width), Norm(shape.width)
        self.attention = Attention(shape)
        self.gate_proj = nn.Linear(shape.width, shape.hidden, bias=False)
        self.up_proj = nn.Linear(shape.width, shape.hidden, bias=False)
        self.down_proj = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.input_norm(x))
        h = self.post_norm(x)
        return x + self.down_proj(nn.functional.silu(self.gate_proj(h)) * self.up_proj(h))


class Llama(nn.Module):
    """Token numbers (batch, time) to the logits of the last one."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = Norm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x[:, -1]))
