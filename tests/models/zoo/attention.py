"""Attention as it is written in practice: fused, separate, torch's own, grouped queries with rotary positions."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class FusedAttention(nn.Module):
    """One projection for queries, keys and values, reshaped to (3, batch, heads, tokens, head size), as in timm."""

    def __init__(self, width: int, heads: int, head_size: int) -> None:
        super().__init__()
        self.heads, self.head_size = heads, head_size
        self.qkv = nn.Linear(width, 3 * heads * head_size)
        self.out = nn.Linear(heads * head_size, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.heads, self.head_size).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        scores = (q * self.head_size**-0.5) @ k.transpose(-2, -1)
        y = scores.softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(batch, length, self.heads * self.head_size))


class SeparateAttention(nn.Module):
    """Three projections and `scaled_dot_product_attention`; keys and values may come from another sequence."""

    def __init__(self, width: int, heads: int, head_size: int, causal: bool = False, source: int | None = None) -> None:
        super().__init__()
        self.heads, self.head_size, self.causal = heads, head_size, causal
        inner = heads * head_size
        self.query, self.out = nn.Linear(width, inner), nn.Linear(inner, width)
        self.key, self.value = nn.Linear(source or width, inner), nn.Linear(source or width, inner)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(x.shape[0], -1, self.heads, self.head_size).transpose(1, 2)

    def forward(self, x: torch.Tensor, source: torch.Tensor | None = None) -> torch.Tensor:
        source = x if source is None else source
        q, k, v = self.split(self.query(x)), self.split(self.key(source)), self.split(self.value(source))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).flatten(2))


class TorchAttention(nn.Module):
    """`nn.MultiheadAttention`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding: the halves of a head are the coordinates of its planes."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class GroupedQueryAttention(nn.Module):
    """Several query heads share one head of keys and values, which is copied; positions are rotations."""

    def __init__(self, width: int, heads: int, groups: int, head_size: int, longest: int = 64) -> None:
        super().__init__()
        self.heads, self.groups, self.head_size = heads, groups, head_size
        self.q_proj = nn.Linear(width, heads * head_size, bias=False)
        self.k_proj = nn.Linear(width, groups * head_size, bias=False)
        self.v_proj = nn.Linear(width, groups * head_size, bias=False)
        self.o_proj = nn.Linear(heads * head_size, width, bias=False)
        rates = 1.0 / 10000 ** (torch.arange(0, head_size, 2) / head_size)
        angles = torch.outer(torch.arange(longest), rates).repeat(1, 2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        q = self.q_proj(x).view(batch, length, self.heads, self.head_size).transpose(1, 2)
        k = self.k_proj(x).view(batch, length, self.groups, self.head_size).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, self.groups, self.head_size).transpose(1, 2)
        cos, sin = self.cos[:length], self.sin[:length]
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = self.copies(k), self.copies(v)
        scores = q @ k.transpose(2, 3) / self.head_size**0.5
        future = torch.full((length, length), -1e9).triu(1)
        y = F.softmax(scores + future, dim=-1) @ v
        return self.o_proj(y.transpose(1, 2).reshape(batch, length, -1))

    def copies(self, x: torch.Tensor) -> torch.Tensor:
        """Every head of keys or values once for each query head of its group."""
        batch, groups, length, size = x.shape
        repeats = self.heads // groups
        return x[:, :, None].expand(batch, groups, repeats, length, size).reshape(batch, self.heads, length, size)
