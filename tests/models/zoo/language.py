"""Language models: encoders, decoders, encoder-decoders, mixtures of experts, state spaces."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from zoo.architecture import Architecture, padding_mask, tokens
from zoo.attention import GroupedQueryAttention
from zoo.blocks import FeedForward, RMSNorm


class BertLayer(nn.Module):
    """Normalisation after each sum; padding is masked by a large negative number."""

    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_size = heads, width // heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out, self.norm1 = nn.Linear(width, width), nn.LayerNorm(width)
        self.ffn, self.norm2 = FeedForward(width, hidden), nn.LayerNorm(width)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(*x.shape[:-1], self.heads, self.head_size).permute(0, 2, 1, 3)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        weights = (q @ k.transpose(-1, -2) / math.sqrt(self.head_size) + mask).softmax(-1)
        y = (weights @ v).permute(0, 2, 1, 3).contiguous()
        y = y.view(*y.shape[:-2], self.heads * self.head_size)
        x = self.norm1(self.out(y) + x)
        return self.norm2(self.ffn(x) + x)


class Bert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.word_embedding, self.position_embedding = nn.Embedding(31, 24), nn.Embedding(37, 24)
        self.type_embedding, self.norm = nn.Embedding(2, 24), nn.LayerNorm(24)
        self.layers = nn.ModuleList(BertLayer(24, 40, 4) for _ in range(2))
        self.pooler, self.classifier = nn.Linear(24, 28), nn.Linear(28, 3)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(ids.shape[1]).unsqueeze(0)
        x = self.word_embedding(ids) + self.type_embedding(types) + self.position_embedding(positions)
        x = self.norm(x)
        bias = (1.0 - mask[:, None, None, :]) * -10000.0
        for layer in self.layers:
            x = layer(x, bias)
        return self.classifier(torch.tanh(self.pooler(x[:, 0])))


class GptBlock(nn.Module):
    """One projection that is split in three, as GPT-2's `c_attn`."""

    def __init__(self, width: int, hidden: int, heads: int, longest: int) -> None:
        super().__init__()
        self.width, self.heads = width, heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.ffn = FeedForward(width, hidden, lambda: nn.GELU(approximate="tanh"))
        self.register_buffer("past", torch.tril(torch.ones(longest, longest, dtype=torch.bool))[None, None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for part in self.c_attn(self.norm1(x)).split(self.width, dim=2)
        )
        scores = q @ k.transpose(-2, -1) * (1.0 / math.sqrt(width // self.heads))
        scores = scores.masked_fill(~self.past[:, :, :length, :length], float("-inf"))
        y = (scores.softmax(-1) @ v).transpose(1, 2).contiguous().view(batch, length, width)
        x = x + self.c_proj(y)
        return x + self.ffn(self.norm2(x))


class Gpt(nn.Module):
    """The output matrix is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.word_embedding, self.position_embedding = nn.Embedding(31, 24), nn.Embedding(37, 24)
        self.blocks = nn.Sequential(*(GptBlock(24, 40, 4, 37) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, 31, bias=False)
        self.head.weight = self.word_embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.word_embedding(ids) + self.position_embedding(torch.arange(ids.shape[1]))
        return self.head(self.norm(self.blocks(x)))


class SwiGlu(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class LlamaBlock(nn.Module):
    def __init__(self, width: int, ffn: nn.Module, heads: int, groups: int, head_size: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.attention, self.ffn = GroupedQueryAttention(width, heads, groups, head_size), ffn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class Decoder(nn.Module):
    """Embedding, blocks, RMSNorm, output matrix."""

    def __init__(self, width: int, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.embedding, self.blocks = nn.Embedding(31, width), nn.Sequential(*blocks)
        self.norm, self.head = RMSNorm(width), nn.Linear(width, 31, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.blocks(self.embedding(ids))))


def llama() -> nn.Module:
    return Decoder(24, [LlamaBlock(24, SwiGlu(24, 40), 6, 2, 6) for _ in range(2)])


class MixtureOfExperts(nn.Module):
    """Two of four experts for each token; all are computed, and weights of zero drop the others (dense dispatch)."""

    def __init__(self, width: int, hidden: int, experts: int = 4, chosen: int = 2) -> None:
        super().__init__()
        self.chosen, self.router = chosen, nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(SwiGlu(width, hidden) for _ in range(experts))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        probabilities = self.router(x).softmax(-1)
        best, index = probabilities.topk(self.chosen, dim=-1)
        best = best / best.sum(-1, keepdim=True)
        gates = torch.zeros_like(probabilities).scatter(-1, index, best)
        return sum(gates[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts))


class BatchedExperts(nn.Module):
    """Experts held in three tensors and applied by batched products; softmax gates."""

    def __init__(self, width: int, hidden: int, experts: int = 3) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.gate = nn.Parameter(torch.zeros(experts, width, hidden))
        self.up = nn.Parameter(torch.zeros(experts, width, hidden))
        self.down = nn.Parameter(torch.zeros(experts, hidden, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gates = self.router(x).softmax(-1)
        hidden = F.silu(torch.einsum("btd,edh->beth", x, self.gate)) * torch.einsum("btd,edh->beth", x, self.up)
        outputs = torch.einsum("beth,ehd->betd", hidden, self.down)
        return torch.einsum("bte,betd->btd", gates, outputs)


def mixtral() -> nn.Module:
    return Decoder(24, [LlamaBlock(24, MixtureOfExperts(24, 40), 4, 2, 8)])


def batched_experts() -> nn.Module:
    return Decoder(24, [LlamaBlock(24, BatchedExperts(24, 40), 4, 2, 8)])


class T5Attention(nn.Module):
    """No scale, no bias; a learned bias for each distance between positions."""

    def __init__(self, width: int, heads: int, head_size: int, distances: int = 0) -> None:
        super().__init__()
        self.heads, self.head_size = heads, head_size
        inner = heads * head_size
        self.q, self.k, self.v = (nn.Linear(width, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, width, bias=False)
        self.distances = distances
        if distances:
            self.bias_table = nn.Parameter(torch.zeros(2 * distances + 1, heads))

    def split(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(x.shape[0], -1, self.heads, self.head_size).transpose(1, 2)

    def forward(self, x: torch.Tensor, source: torch.Tensor, causal: bool = False) -> torch.Tensor:
        q, k, v = self.split(self.q(x)), self.split(self.k(source)), self.split(self.v(source))
        scores = q @ k.transpose(3, 2)
        if self.distances:
            distance = torch.arange(source.shape[1])[None, :] - torch.arange(x.shape[1])[:, None]
            index = distance.clamp(-self.distances, self.distances) + self.distances
            scores = scores + F.embedding(index, self.bias_table).permute(2, 0, 1).unsqueeze(0)
        if causal:
            future = torch.ones(x.shape[1], source.shape[1]).triu(1)
            scores = scores + future * -1e9
        y = (scores.softmax(-1) @ v).transpose(1, 2).contiguous()
        return self.o(y.view(x.shape[0], -1, self.heads * self.head_size))


class T5Layer(nn.Module):
    def __init__(self, width: int, hidden: int, heads: int, head_size: int, decoder: bool) -> None:
        super().__init__()
        self.norm1, self.attention = RMSNorm(width), T5Attention(width, heads, head_size, distances=6)
        self.norm2 = RMSNorm(width) if decoder else None
        self.cross = T5Attention(width, heads, head_size) if decoder else None
        self.norm3, self.ffn = RMSNorm(width), FeedForward(width, hidden, nn.ReLU, bias=False)

    def forward(self, x: torch.Tensor, encoded: torch.Tensor | None = None) -> torch.Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, causal=encoded is not None)
        if encoded is not None:
            x = x + self.cross(self.norm2(x), encoded)
        return x + self.ffn(self.norm3(x))


class T5(nn.Module):
    """Encoder and decoder share their embedding, which is the output matrix too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(31, 24)
        self.encoder, self.decoder = T5Layer(24, 40, 4, 5, False), T5Layer(24, 44, 4, 5, True)
        self.norm1, self.norm2 = RMSNorm(24), RMSNorm(24)

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        encoded = self.norm1(self.encoder(self.embedding(source)))
        decoded = self.norm2(self.decoder(self.embedding(target), encoded))
        return F.linear(decoded * 24**-0.5, self.embedding.weight)


class SelectiveScan(nn.Module):
    """Mamba: a gated convolution and a linear recurrence whose coefficients depend on the input."""

    def __init__(self, width: int, inner: int, state: int, rank: int) -> None:
        super().__init__()
        self.state, self.rank = state, rank
        self.in_proj, self.out_proj = nn.Linear(width, 2 * inner, bias=False), nn.Linear(inner, width, bias=False)
        self.conv = nn.Conv1d(inner, inner, 4, padding=3, groups=inner)
        self.x_proj, self.dt_proj = nn.Linear(inner, rank + 2 * state, bias=False), nn.Linear(rank, inner)
        self.log_a = nn.Parameter(torch.zeros(inner, state))
        self.skip = nn.Parameter(torch.ones(inner))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        inner, gate = self.in_proj(x).chunk(2, -1)
        inner = F.silu(self.conv(inner.transpose(1, 2))[..., :length].transpose(1, 2))
        rank, b, c = self.x_proj(inner).split([self.rank, self.state, self.state], -1)
        dt = F.softplus(self.dt_proj(rank))
        decay = torch.exp(dt.unsqueeze(-1) * -torch.exp(self.log_a))
        drive = (dt * inner).unsqueeze(-1) * b.unsqueeze(2)
        hidden, outputs = torch.zeros_like(drive[:, 0]), []
        for step in range(length):
            hidden = decay[:, step] * hidden + drive[:, step]
            outputs.append((hidden * c[:, step].unsqueeze(1)).sum(-1))
        y = torch.stack(outputs, 1) + inner * self.skip
        return self.out_proj(y * F.silu(gate))


class MambaBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.mixer = RMSNorm(width), SelectiveScan(width, 36, 5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mixer(self.norm(x))


def mamba() -> nn.Module:
    return Decoder(24, [MambaBlock(24)])


SIZES = {"batch": 2, "sequence": 7}
IDS = tokens("ids", 31, "batch", "sequence")
TRANSFORMER = {"ffn hidden": 40, "residual stream": 24}

ARCHITECTURES = [
    Architecture(
        "bert",
        Bert,
        (IDS, padding_mask("mask", "batch", "sequence"), tokens("types", 2, "batch", "sequence")),
        SIZES,
        ("batch", "sequence"),
        axes={**TRANSFORMER, "pooler": 28},
        note="heads have the width of the stream",
    ),
    Architecture("gpt", Gpt, (IDS,), SIZES, ("batch", "sequence"), axes={**TRANSFORMER, "qkv": 72}),
    Architecture(
        "llama", llama, (IDS,), SIZES, ("batch", "sequence"), axes={**TRANSFORMER, "query heads": 36, "kv heads": 12}
    ),
    Architecture("mixtral", mixtral, (IDS,), SIZES, axes={**TRANSFORMER, "query heads": 32, "kv heads": 16}),
    Architecture("batched_experts", batched_experts, (IDS,), SIZES, axes={**TRANSFORMER, "kv heads": 16}),
    Architecture(
        "t5",
        T5,
        (tokens("source", 31, "batch", "sequence"), tokens("target", 31, "batch", "length")),
        {**SIZES, "length": 5},
        ("batch", "sequence", "length"),
        axes={**TRANSFORMER, "decoder's hidden": 44, "heads": 20},
    ),
    Architecture("mamba", mamba, (IDS,), {"batch": 2, "sequence": 5}, axes={"inner": 36, "residual stream": 24}),
]
