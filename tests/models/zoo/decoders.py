"""Decoders that differ from Llama: caches as inputs, one head of keys and values, linear attention."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from zoo.architecture import Architecture, image, tokens
from zoo.attention import rotate
from zoo.blocks import FeedForward, RMSNorm


class CachedDecoder(nn.Module):
    """One layer that reads keys and values of earlier tokens and hands all of them back, as servers run it."""

    def __init__(self, heads: int = 4, head_size: int = 6) -> None:
        super().__init__()
        self.heads, self.head_size = heads, head_size
        inner = heads * head_size
        self.embedding, self.norm1, self.norm2 = nn.Embedding(31, 20), RMSNorm(20), RMSNorm(20)
        self.q_proj, self.k_proj = nn.Linear(20, inner, bias=False), nn.Linear(20, inner, bias=False)
        self.v_proj, self.o_proj = nn.Linear(20, inner, bias=False), nn.Linear(inner, 20, bias=False)
        self.ffn, self.head = FeedForward(20, 40, nn.SiLU, bias=False), nn.Linear(20, 31, bias=False)
        angles = torch.outer(torch.arange(64), 1.0 / 100 ** (torch.arange(3) / 3)).repeat(1, 2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def split(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(x.shape[0], x.shape[1], self.heads, self.head_size).transpose(1, 2)

    def forward(
        self, ids: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = self.embedding(ids)
        past, length = keys.shape[2], ids.shape[1]
        y = self.norm1(x)
        cos, sin = self.cos[past : past + length], self.sin[past : past + length]
        q, k = rotate(self.split(self.q_proj(y)), cos, sin), rotate(self.split(self.k_proj(y)), cos, sin)
        keys, values = torch.cat([keys, k], 2), torch.cat([values, self.split(self.v_proj(y))], 2)
        weights = (q @ keys.transpose(2, 3) / self.head_size**0.5).softmax(-1)
        x = x + self.o_proj((weights @ values).transpose(1, 2).reshape(x.shape[0], length, -1))
        return self.head(x + self.ffn(self.norm2(x))), keys, values


class FalconBlock(nn.Module):
    """Attention and feed-forward side by side; all queries share one head of keys and values, in one projection."""

    def __init__(self, width: int, hidden: int, heads: int, head_size: int) -> None:
        super().__init__()
        self.heads, self.head_size, self.norm = heads, head_size, nn.LayerNorm(width)
        self.qkv = nn.Linear(width, (heads + 2) * head_size, bias=False)
        self.out, self.ffn = nn.Linear(heads * head_size, width, bias=False), FeedForward(width, hidden, bias=False)
        slopes = 2.0 ** -torch.arange(1, heads + 1)
        distance = torch.arange(7)[None, :] - torch.arange(7)[:, None]
        self.register_buffer("bias", slopes[:, None, None] * distance + torch.full((7, 7), -1e9).triu(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        y = self.norm(x)
        qkv = self.qkv(y).view(batch, length, self.heads + 2, self.head_size)
        q, k, v = qkv[..., :-2, :].transpose(1, 2), qkv[..., -2, :].unsqueeze(1), qkv[..., -1, :].unsqueeze(1)
        weights = (q @ k.transpose(2, 3) * self.head_size**-0.5 + self.bias).softmax(-1)
        attended = self.out((weights @ v).transpose(1, 2).reshape(batch, length, -1))
        return x + attended + self.ffn(y)


def falcon() -> nn.Module:
    return nn.Sequential(
        nn.Embedding(31, 24), *(FalconBlock(24, 40, 4, 5) for _ in range(2)), nn.LayerNorm(24), nn.Linear(24, 31)
    )


class LinearAttention(nn.Module):
    """Positive features of queries and keys; their products with values are summed before the queries meet them."""

    def __init__(self, width: int, hidden: int, heads: int, head_size: int) -> None:
        super().__init__()
        self.heads, self.head_size, self.norm1, self.norm2 = heads, head_size, nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, heads * head_size) for _ in range(3))
        self.out, self.ffn = nn.Linear(heads * head_size, width), FeedForward(width, hidden)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.heads, self.head_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        q, k, v = self.split(self.query(y)), self.split(self.key(y)), self.split(self.value(y))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        memory = torch.einsum("bthd,bthe->bhde", k, v)
        scale = 1 / (torch.einsum("bthd,bhd->bth", q, k.sum(1)) + 1e-6)
        x = x + self.out(torch.einsum("bthd,bhde,bth->bthe", q, memory, scale).flatten(2))
        return x + self.ffn(self.norm2(x))


def linear_attention() -> nn.Module:
    return nn.Sequential(nn.Embedding(31, 24), LinearAttention(24, 40, 4, 5), nn.LayerNorm(24), nn.Linear(24, 31))


SIZES = {"batch": 2, "sequence": 7}
IDS = tokens("ids", 31, "batch", "sequence")
TRANSFORMER = {"ffn hidden": 40, "residual stream": 24}

ARCHITECTURES = [
    Architecture(
        "cached_decoder",
        CachedDecoder,
        (
            tokens("ids", 31, "batch", "sequence"),
            image("keys", "batch", 4, "past", 6),
            image("values", "batch", 4, "past", 6),
        ),
        {"batch": 2, "sequence": 3, "past": 5},
        ("batch", "sequence", "past"),
        axes={"ffn hidden": 40, "residual stream": 20},
        note="keys and values belong to the caller, so heads stay",
    ),
    Architecture("falcon", falcon, (IDS,), SIZES, ("batch",), axes={**TRANSFORMER, "heads": 20, "qkv": 30}),
    Architecture("linear_attention", linear_attention, (IDS,), SIZES, axes={**TRANSFORMER, "heads": 20}),
]
