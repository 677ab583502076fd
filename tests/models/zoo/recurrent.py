"""Recurrent networks."""

from __future__ import annotations

import torch
from torch import nn

from zoo.architecture import Architecture, image, tokens


class Tagger(nn.Module):
    """A label for each token of a sequence."""

    def __init__(self, recurrent: nn.Module, outputs: int) -> None:
        super().__init__()
        self.embedding, self.recurrent = nn.Embedding(31, 14), recurrent
        self.hidden, self.head = nn.Linear(outputs, 26), nn.Linear(26, 9)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        states, _ = self.recurrent(self.embedding(ids))
        return self.head(torch.relu(self.hidden(states)))


def lstm_tagger() -> nn.Module:
    return Tagger(nn.LSTM(14, 20, num_layers=2, batch_first=True), 20)


def gru_tagger() -> nn.Module:
    return Tagger(nn.GRU(14, 20, batch_first=True), 20)


def bidirectional_lstm() -> nn.Module:
    return Tagger(nn.LSTM(14, 20, num_layers=2, batch_first=True, bidirectional=True), 40)


class Seq2Seq(nn.Module):
    """The decoder starts from the encoder's last state and attends to all of its states (Luong)."""

    def __init__(self) -> None:
        super().__init__()
        self.source_embedding, self.target_embedding = nn.Embedding(31, 14), nn.Embedding(31, 16)
        self.encoder, self.decoder = nn.LSTM(14, 20, batch_first=True), nn.LSTM(16, 20, batch_first=True)
        self.score = nn.Linear(20, 20, bias=False)
        self.mix, self.head = nn.Linear(40, 26), nn.Linear(26, 9)

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        memory, state = self.encoder(self.source_embedding(source))
        states, _ = self.decoder(self.target_embedding(target), state)
        weights = torch.bmm(self.score(states), memory.transpose(1, 2)).softmax(-1)
        context = torch.bmm(weights, memory)
        return self.head(torch.tanh(self.mix(torch.cat([states, context], -1))))


class ConvRecurrent(nn.Module):
    """Text recognition: an image's columns are the steps of a bidirectional GRU (CRNN)."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 12, 3, 2, 1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 18, 3, (2, 1), 1), nn.ReLU()
        )
        self.recurrent, self.head = nn.GRU(18 * 2, 20, batch_first=True, bidirectional=True), nn.Linear(40, 9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.features(x).permute(0, 3, 1, 2).flatten(2)
        return self.head(self.recurrent(x)[0])


class Streaming(nn.Module):
    """Its state is an input and an output, so that a stream can be cut into pieces."""

    def __init__(self) -> None:
        super().__init__()
        self.front, self.recurrent = nn.Conv1d(6, 16, 3, padding=1), nn.LSTM(16, 20)
        self.head = nn.Linear(20, 1)

    def forward(
        self, x: torch.Tensor, h: torch.Tensor, c: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = torch.relu(self.front(x)).permute(2, 0, 1)
        y, (h, c) = self.recurrent(x, (h, c))
        return torch.sigmoid(self.head(y[-1])), h, c


SIZES = {"batch": 2, "sequence": 5}
IDS = tokens("ids", 31, "batch", "sequence")

ARCHITECTURES = [
    Architecture("lstm_tagger", lstm_tagger, (IDS,), SIZES, axes={"embedding": 14, "hidden": 26, "state": 20}),
    Architecture("gru_tagger", gru_tagger, (IDS,), SIZES, axes={"embedding": 14, "hidden": 26, "state": 20}),
    Architecture(
        "bidirectional_lstm", bidirectional_lstm, (IDS,), SIZES, axes={"embedding": 14, "hidden": 26, "state": 20}
    ),
    Architecture(
        "seq2seq",
        Seq2Seq,
        (IDS, tokens("target", 31, "batch", "length")),
        {**SIZES, "length": 4},
        axes={"embedding": 14, "mix": 26, "state": 20},
    ),
    Architecture(
        "crnn", ConvRecurrent, (image("image", "batch", 1, 8, 12),), {"batch": 2}, axes={"channels": 12, "state": 20}
    ),
    Architecture(
        "streaming_lstm",
        Streaming,
        (image("x", "batch", 6, 5), image("h", 1, "batch", 20), image("c", 1, "batch", 20)),
        {"batch": 2},
        axes={"channels": 16},
        note="the state belongs to the caller, so it stays",
    ),
]
