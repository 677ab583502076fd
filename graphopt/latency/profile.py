"""Times of the operators inside a model, as ONNX Runtime's profiler sees them while the model runs as a whole.

The runtime fuses operators and names what it makes after nodes or tensors of the graph it was given. So a copy is
profiled whose nodes and tensors carry their position as name, which is found again in whatever name comes back. What
the runtime put in itself (conversions of the layout) has no such name, and is told apart.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from graphopt.executor import Session
from graphopt.pipeline.clone import private_clone

RUNS = (3, 9)
"""Fewest and most runs whose median counts, after one more."""

SECONDS = 1.0
"""Time for them."""

POSITION = re.compile(r"at(\d+)@")


@dataclass(frozen=True)
class Profile:
    """Seconds in one run: medians over runs, of kernels only.

    Attributes:
        nodes: by name of the first output of a node of the main graph; what the runtime fused counts for one of them,
            and nodes that vanished are left out.
        elsewhere: kernels that stand for no node of the main graph: layout conversions, bodies.
    """

    nodes: Mapping[str, float]
    elsewhere: float

    @property
    def total(self) -> float:
        """All kernels."""
        return sum(self.nodes.values()) + self.elsewhere


def profile(model: ir.Model, feeds: Mapping[str, NDArray[Any]], *, threads: int = 1) -> Profile:
    """Run a model on the CPU with the runtime's optimisations, and time its kernels.

    Args:
        model: is not changed.
        feeds: one call.
        threads: of one operator.

    Raises:
        ModelError: the runtime refuses the model.
    """
    copy = private_clone(model)
    keys: list[str] = []
    for position, node in enumerate(copy.graph):
        keys.append(next((v.name for v in node.outputs if v.name), ""))
        node.name = f"at{position}@"
        for index, value in enumerate(node.outputs):
            if value.name:
                value.name = f"at{position}@{index}"
    with (
        tempfile.TemporaryDirectory(prefix="graphopt-") as folder,
        Session(copy, optimize=True, threads=threads, profile=Path(folder) / "times") as session,
    ):
        begin = time.perf_counter()
        session.run(feeds)
        runs = min(max(RUNS[0], round(SECONDS / (time.perf_counter() - begin))), RUNS[1])
        for _ in range(runs):
            session.run(feeds)
        events = json.loads(Path(session.session.end_profiling()).read_text(encoding="utf-8"))
    times: dict[str, list[float]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            times.setdefault(event["name"], []).append(event["dur"] * 1e-6)
    nodes: dict[str, float] = {}
    elsewhere = 0.0
    for name, durations in times.items():
        calls = max(1, len(durations) // (1 + runs))
        seconds = float(np.median(durations[calls:])) * calls
        found = POSITION.search(name)
        if found is None:
            elsewhere += seconds
        else:
            key = keys[int(found.group(1))]
            nodes[key] = nodes.get(key, 0.0) + seconds
    return Profile(nodes, elsewhere)
