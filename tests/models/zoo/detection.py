"""Detectors: split and joined branches, pyramids, heads for boxes and classes."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from zoo.architecture import Architecture, image
from zoo.blocks import conv_bn_act


def unit(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return conv_bn_act(inputs, outputs, kernel, stride, groups, nn.SiLU)


class Inner(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = unit(width, width, 3), unit(width, width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv2(self.conv1(x))


class C2f(nn.Module):
    """YOLOv8: a convolution's output is split; one half runs through blocks, each of whose outputs is joined."""

    def __init__(self, inputs: int, outputs: int, hidden: int, blocks: int) -> None:
        super().__init__()
        self.enter, self.leave = unit(inputs, 2 * hidden), unit((2 + blocks) * hidden, outputs)
        self.blocks = nn.ModuleList(Inner(hidden) for _ in range(blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = list(self.enter(x).chunk(2, 1))
        parts.extend(block(parts[-1]) for block in self.blocks)
        return self.leave(torch.cat(parts, 1))


class Csp(nn.Module):
    """YOLOv5's C3: two convolutions beside each other, blocks after one of them, joined."""

    def __init__(self, inputs: int, outputs: int, hidden: int) -> None:
        super().__init__()
        self.left, self.right, self.leave = unit(inputs, hidden), unit(inputs, hidden), unit(2 * hidden, outputs)
        self.blocks = nn.Sequential(Inner(hidden), Inner(hidden))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.leave(torch.cat([self.blocks(self.left(x)), self.right(x)], 1))


class SpatialPyramid(nn.Module):
    """YOLO's SPPF: maxima over growing windows, joined."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.enter, self.leave = unit(inputs, hidden), unit(4 * hidden, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        first = F.max_pool2d(x, 5, 1, 2)
        second = F.max_pool2d(first, 5, 1, 2)
        return self.leave(torch.cat([x, first, second, F.max_pool2d(second, 5, 1, 2)], 1))


class YoloHead(nn.Module):
    """Boxes as expectations over bins, decoded on a grid of anchors, as in YOLOv8."""

    def __init__(self, widths: list[int], classes: int = 5, bins: int = 4) -> None:
        super().__init__()
        self.bins, self.classes = bins, classes
        self.boxes = nn.ModuleList(nn.Sequential(unit(w, 14, 3), nn.Conv2d(14, 4 * bins, 1)) for w in widths)
        self.scores = nn.ModuleList(nn.Sequential(unit(w, 15, 3), nn.Conv2d(15, classes, 1)) for w in widths)
        self.register_buffer("range", torch.arange(bins, dtype=torch.float32).view(1, 1, bins, 1))

    def forward(self, maps: list[torch.Tensor]) -> torch.Tensor:
        joined = [
            torch.cat([box(x), score(x)], 1).flatten(2)
            for x, box, score in zip(maps, self.boxes, self.scores, strict=True)
        ]
        distances, scores = torch.cat(joined, 2).split((4 * self.bins, self.classes), 1)
        batch, _, anchors = distances.shape
        distances = (distances.view(batch, 4, self.bins, anchors).softmax(2) * self.range).sum(2)
        near, far = distances.chunk(2, 1)
        grid = self.grid(maps)
        low, high = grid - near, grid + far
        return torch.cat([(low + high) / 2, high - low, scores.sigmoid()], 1)

    def grid(self, maps: list[torch.Tensor]) -> torch.Tensor:
        points = []
        for x in maps:
            rows, columns = torch.arange(x.shape[2]) + 0.5, torch.arange(x.shape[3]) + 0.5
            y, x = torch.meshgrid(rows, columns, indexing="ij")
            points.append(torch.stack([x, y]).flatten(1))
        return torch.cat(points, 1).unsqueeze(0)


class Yolo(nn.Module):
    def __init__(self, block: str) -> None:
        super().__init__()
        self.stem, self.down = unit(3, 10, 3, 2), unit(20, 24, 3, 2)
        self.low = C2f(10, 20, 8, 2) if block == "c2f" else Csp(10, 20, 8)
        self.deep = nn.Sequential(C2f(24, 28, 9, 1) if block == "c2f" else Csp(24, 28, 9), SpatialPyramid(28, 11, 26))
        self.mix = C2f(46, 18, 8, 1) if block == "c2f" else Csp(46, 18, 8)
        self.head = YoloHead([18, 26])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = self.low(self.stem(x))
        deep = self.deep(self.down(low))
        mixed = self.mix(torch.cat([F.interpolate(deep, scale_factor=2.0, mode="nearest"), low], 1))
        return self.head([mixed, deep])


class SsdFpn(nn.Module):
    """A pyramid with sums from above, and one head whose weights serve every level; outputs are joined."""

    def __init__(self) -> None:
        super().__init__()
        self.c2, self.c3, self.c4 = unit(3, 10, 3, 2), unit(10, 14, 3, 2), unit(14, 22, 3, 2)
        self.lateral = nn.ModuleList(nn.Conv2d(width, 16, 1) for width in (10, 14, 22))
        self.smooth = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(3))
        self.tower = nn.Sequential(nn.Conv2d(16, 18, 3, padding=1), nn.GroupNorm(6, 18), nn.ReLU())
        self.classes, self.boxes = nn.Conv2d(18, 3 * 5, 3, padding=1), nn.Conv2d(18, 3 * 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        c2 = self.c2(x)
        c3 = self.c3(c2)
        c4 = self.c4(c3)
        levels = [lateral(c) for lateral, c in zip(self.lateral, (c2, c3, c4), strict=True)]
        for index in (1, 0):
            levels[index] = levels[index] + F.interpolate(levels[index + 1], size=levels[index].shape[-2:])
        towers = [self.tower(smooth(level)) for smooth, level in zip(self.smooth, levels, strict=True)]
        classes = [self.classes(t).permute(0, 2, 3, 1).reshape(t.shape[0], -1, 5) for t in towers]
        boxes = [self.boxes(t).permute(0, 2, 3, 1).reshape(t.shape[0], -1, 4) for t in towers]
        return torch.cat(classes, 1).softmax(-1), torch.cat(boxes, 1)


class Detr(nn.Module):
    """A convolutional map and learned queries meet in cross attention."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(unit(3, 12, 3, 2), unit(12, 18, 3, 2))
        self.project, self.positions = nn.Conv2d(18, 24, 1), nn.Parameter(torch.zeros(16, 24))
        self.queries = nn.Parameter(torch.zeros(6, 24))
        self.transformer = nn.Transformer(24, 4, 1, 1, 40, batch_first=True)
        self.classes, self.boxes = nn.Linear(24, 5), nn.Sequential(nn.Linear(24, 26), nn.ReLU(), nn.Linear(26, 4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        memory = self.project(self.backbone(x)).flatten(2).permute(0, 2, 1) + self.positions
        y = self.transformer(memory, self.queries.unsqueeze(0).repeat(x.shape[0], 1, 1))
        return self.classes(y), self.boxes(y).sigmoid()


IMAGE = image("image", "batch", 3, 16, 16)
BATCH = {"batch": 2}
YOLO = {"stem": 10, "deep": 28, "pyramid": 11, "box tower": 14, "score tower": 15}

ARCHITECTURES = [
    Architecture("yolo_c2f", lambda: Yolo("c2f"), (IMAGE,), BATCH, axes={**YOLO, "split": 18}),
    Architecture("yolo_csp", lambda: Yolo("csp"), (IMAGE,), BATCH, axes={**YOLO, "half": 9}),
    Architecture("ssd_fpn", SsdFpn, (IMAGE,), BATCH, axes={"stem": 10, "pyramid": 16, "tower": 18}),
    Architecture(
        "detr", Detr, (IMAGE,), BATCH, axes={"backbone": 18, "ffn hidden": 40, "box hidden": 26, "residual stream": 24}
    ),
]
