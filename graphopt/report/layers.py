"""The table of `graphopt compare --layers`: errors layer by layer, worst first, and what to leave in float."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from graphopt.base import Skip
from graphopt.report import summary, text
from graphopt.report.tables import heading, print_mappings

if TYPE_CHECKING:
    from graphopt.diagnosis.layers import LayerError, LayerErrors

MOST_LAYERS = 24
"""Layers that the terminal shows; JSON has all of them."""


def print_layers(out: Console, found: LayerErrors) -> None:
    """The layers that add an error, each once, the tensors without a counterpart by reason, and the advice."""
    from graphopt.diagnosis.layers import worst_of_each

    shown = [layer for layer in worst_of_each(found.layers) if layer.added.sqnr_db < math.inf]
    every, missing = len(found.layers), len(found.unmatched)
    heading(out, f"{every} tensors matched, {missing} not, over {found.samples} samples; worst layers first")
    if shown:
        print_mappings(out, [_row(layer) for layer in shown[:MOST_LAYERS]])
    else:
        out.print(Text("no layer adds an error"))
    if len(shown) > MOST_LAYERS:
        out.print(Text(f"and {len(shown) - MOST_LAYERS} layers that add less (--json has every tensor)"))
    for group in summary.group_skips(Skip(tensor.tensor, tensor.reason) for tensor in found.unmatched)[:MOST_LAYERS]:
        out.print(Text(f"not matched: {text.names(group.nodes, 2)}: {text.clean(group.reason, 300)}"))
    if found.amplifier is not None:
        out.print(Text(_amplifies(found.amplifier)))
    if found.suggestion is not None:
        heading(out, f"to leave in float what stands out: {text.clean(found.suggestion, 4000)}")
    else:
        out.print(Text("no layer stands out: there is nothing whose exclusion alone would pay"))


def _amplifies(layer: LayerError) -> str:
    return (
        f"{text.clean(layer.node, 80)} ({layer.op}) amplifies the error, from {layer.inherited_db:.1f} to "
        f"{layer.total.sqnr_db:.1f} dB: what it reads needs more precision than the rest"
    )


def _row(layer: LayerError) -> dict[str, Any]:
    return {
        "layer": text.clean(layer.node, 80),
        "operator": layer.op,
        "shape": "x".join(map(str, layer.shape)),
        "added SQNR dB": f"{layer.added.sqnr_db:.1f}",
        "cosine": f"{layer.added.cosine:.6f}",
        "largest": f"{layer.added.max_abs:.3g}",
        "inherited": f"{layer.inherited_db:.1f}",
        "total SQNR dB": f"{layer.total.sqnr_db:.1f}",
        "total cosine": f"{layer.total.cosine:.6f}",
        "to exclude": text.clean(layer.exclude, 80),
    }
