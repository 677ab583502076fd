"""What the zoo knows of an architecture, and how a network and its inputs are drawn from it."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

Array = npt.NDArray[Any]
Draw = Callable[[np.random.Generator, tuple[int, ...]], Array]


@dataclass(frozen=True)
class Input:
    """An input of a network.

    Attributes:
        name: its name in the exported graph.
        shape: sizes; a string names a dimension, whose size stands in `Architecture.sizes`.
        draw: random values of a given shape.
    """

    name: str
    shape: tuple[int | str, ...]
    draw: Draw


@dataclass(frozen=True, eq=False)
class Architecture:
    """A network of the zoo.

    Attributes:
        name: key of the registry.
        build: makes the module; its weights are drawn anew afterwards.
        inputs: in the order of `forward`.
        sizes: named dimensions of the inputs, as the network is exported.
        dynamic: those of them that stay symbolic in the exported graph.
        axes: what has to be prunable, by the length that this axis (and no frozen one) has in the parameters.
        cannot_export: exporter -> its reason for not exporting this network.
        note: what makes it hard.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: tuple[Input, ...]
    sizes: Mapping[str, int] = field(default_factory=dict)
    dynamic: tuple[str, ...] = ()
    axes: Mapping[str, int] = field(default_factory=dict)
    cannot_export: Mapping[str, str] = field(default_factory=dict)
    note: str = ""

    def module(self) -> nn.Module:
        """The network in evaluation mode with seeded random weights and statistics."""
        torch.manual_seed(zlib.crc32(self.name.encode()))
        module = self.build().eval()
        randomise(module)
        return module

    def feeds(self, seed: int, *, other_sizes: bool = False) -> dict[str, Array]:
        """Random inputs.

        Args:
            seed: of the values.
            other_sizes: whether dynamic dimensions get sizes other than those of the export.
        """
        random = np.random.default_rng(seed)
        sizes = {name: size + 1 if other_sizes and name in self.dynamic else size for name, size in self.sizes.items()}
        shapes = (tuple(sizes[d] if isinstance(d, str) else d for d in entry.shape) for entry in self.inputs)
        return {entry.name: entry.draw(random, shape) for entry, shape in zip(self.inputs, shapes, strict=True)}

    def example(self) -> tuple[torch.Tensor, ...]:
        """Inputs for the exporters."""
        return tuple(torch.from_numpy(array) for array in self.feeds(0).values())


def image(name: str, *shape: int | str) -> Input:
    """A float input with standard normal values."""
    return Input(name, shape, lambda random, size: random.standard_normal(size).astype(np.float32))


def tokens(name: str, vocabulary: int, *shape: int | str) -> Input:
    """An int64 input of indices below `vocabulary`."""
    return Input(name, shape, lambda random, size: random.integers(0, vocabulary, size))


def padding_mask(name: str, *shape: int | str) -> Input:
    """A float input of ones and zeros, with a one in the first place of each row."""

    def draw(random: np.random.Generator, size: tuple[int, ...]) -> Array:
        mask = random.integers(0, 2, size).astype(np.float32)
        mask[..., 0] = 1
        return mask

    return Input(name, shape, draw)


@torch.no_grad()
def randomise(module: nn.Module) -> None:
    """Draw all parameters and statistics so that none is trivial: a bias of zero or a gain of one hides errors."""
    for name, parameter in module.named_parameters():
        if parameter.ndim >= 2:
            fan_in = parameter.shape[1:].numel() if not name.endswith(("table", "embedding.weight")) else 1
            parameter.normal_(0, 1.2 / fan_in**0.5)
        elif name.endswith("bias"):
            parameter.normal_(0, 0.3)
        else:
            parameter.uniform_(0.5, 1.5)
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.3)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2.0)
