"""Train the network of examples/digits and export it as ONNX with its calibration and evaluation arrays.

Needs `pip install torch scikit-learn onnx`; graphopt itself needs neither of the first two. Takes about two
minutes on one CPU core:

    python tools/train_digits.py --out examples/digits

The images are split once: 1257 to train on (256 of them, without their labels, become the calibration data) and 540
that training never sees, the evaluation data. Nothing is selected on the evaluation data: the last epoch is exported.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

EPOCHS = 40
CALIBRATION_IMAGES = 256


class Block(nn.Module):
    """Two 3x3 convolutions around a shortcut, which is a 1x1 convolution where the width changes."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class DigitsNet(nn.Module):
    """8x8 grey images [N, 1, 8, 8] in 0..1 -> logits [N, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 48, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(48)
        self.stage1 = nn.Sequential(Block(48, 48), Block(48, 48))
        self.stage2 = nn.Sequential(Block(48, 96), Block(96, 96))
        self.head = nn.Linear(96, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn(self.stem(images)))
        x = self.stage2(self.stage1(x))
        return self.head(x.mean((2, 3)))


def shifted(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each image moved by -1..1 pixels along both axes: the only augmentation."""
    padded = nn.functional.pad(images, (1, 1, 1, 1))
    moves = torch.randint(0, 3, (len(images), 2), generator=generator).tolist()
    return torch.stack([image[:, y : y + 8, x : x + 8] for image, (y, x) in zip(padded, moves, strict=True)])


def train(images: np.ndarray, labels: np.ndarray, seed: int) -> DigitsNet:
    """SGD with a cosine schedule."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(seed)
    net = DigitsNet()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    for epoch in range(EPOCHS):
        net.train()
        total = 0.0
        for batch in torch.randperm(len(x), generator=generator).split(64):
            loss = nn.functional.cross_entropy(net(shifted(x[batch], generator)), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
        schedule.step()
        print(f"epoch {epoch + 1:2d}/{EPOCHS}  training loss {total / len(x):.4f}")
    return net.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("examples/digits"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    digits = load_digits()
    images = (digits.images / 16).astype(np.float32)[:, None]
    labels = digits.target.astype(np.int64)
    x_train, x_eval, y_train, y_eval = train_test_split(
        images, labels, test_size=540, random_state=arguments.seed, stratify=labels
    )
    net = train(x_train, y_train, arguments.seed)
    with torch.no_grad():
        hits = int((net(torch.from_numpy(x_eval)).argmax(1).numpy() == y_eval).sum())
    print(f"top-1 on {len(x_eval)} held-out images: {hits / len(x_eval):.2%}")

    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.onnx.export(
        net,
        (torch.from_numpy(x_eval[:2]),),
        arguments.out / "digits.onnx",
        input_names=["images"],
        output_names=["logits"],
        dynamic_axes={"images": {0: "batch"}, "logits": {0: "batch"}},
        opset_version=17,
        dynamo=False,  # this exporter and PRESERVE leave BatchNormalization a node of its own, as in models in the wild
        training=torch.onnx.TrainingMode.PRESERVE,
        do_constant_folding=False,
    )
    np.savez_compressed(arguments.out / "calib.npz", images=x_train[:CALIBRATION_IMAGES])
    np.savez_compressed(arguments.out / "eval.npz", images=x_eval, labels=y_eval)


if __name__ == "__main__":
    main()
