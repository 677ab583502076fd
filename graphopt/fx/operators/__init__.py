"""The operators of `graphopt.to_torch`: a table from ONNX operator to torch function, one family a file.

A function takes the operator's inputs as positional arguments (None for one that is left out) and its attributes as
keyword arguments, under the names the standard gives them and with its defaults. An attribute that the function does
not take is refused for that node. Sizes that arrive as tensors are read when the module runs, so nothing is baked in.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

_FAMILIES = (
    "elementwise",
    "activations",
    "linear",
    "normalization",
    "pooling",
    "reduction",
    "layout",
    "indexing",
    "resizing",
    "recurrent",
    "quantized",
    "attention",
)

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Operator:
    """One row of the table.

    Attributes:
        function: computes the outputs: a tensor, or a tuple of tensors where the node has several.
        since, until: opset versions it stands for, both included.
        fixed: inputs that are statistics, sizes or scales: stored ones are buffers and not trained.
        outputs: how many outputs it computes at most; with more than one it returns a tuple. None: any number, which
            the function is told as `outputs`.
        ignored: attributes that do not change what is computed.
    """

    function: Callable[..., Any]
    since: int
    until: int
    fixed: frozenset[int]
    outputs: int | None
    ignored: frozenset[str]

    @cached_property
    def attributes(self) -> set[str]:
        """Names the function takes."""
        return set(inspect.signature(self.function).parameters)

    def refusal(self, attributes: Collection[str], outputs: int) -> str | None:
        """Why a node with these attributes and so many outputs is not covered; None where it is."""
        if self.outputs is not None and outputs > self.outputs:
            return f"output {self.outputs} and later"
        unknown = [name for name in attributes if name not in self.attributes and name not in self.ignored]
        return f"attribute {', '.join(unknown)}" if unknown else None


_TABLE: dict[tuple[str, str], list[Operator]] = {}


def operator(
    *names: str,
    domain: str = "",
    since: int = 1,
    until: int = 1000,
    fixed: Collection[int] = (),
    outputs: int | None = 1,
    ignored: Collection[str] = (),
) -> Callable[[Function], Function]:
    """Decorator: this function computes these operators; see `Operator`."""

    def register(function: Function) -> Function:
        for name in names:
            add(name, function, domain, since, until, fixed, outputs, ignored)
        return function

    return register


def add(
    name: str,
    function: Callable[..., Any],
    domain: str = "",
    since: int = 1,
    until: int = 1000,
    fixed: Collection[int] = (),
    outputs: int | None = 1,
    ignored: Collection[str] = (),
) -> None:
    """As `operator`, for functions that need no wrapping.

    Raises:
        ValueError: two functions for one operator and version.
    """
    rows = _TABLE.setdefault((domain, name), [])
    if any(row.since <= until and since <= row.until for row in rows):
        raise ValueError(f"two functions for {domain or 'ai.onnx'}::{name} {since}..{until}")
    rows.append(Operator(function, since, until, frozenset(fixed), outputs, frozenset(ignored)))


def find(domain: str, name: str, version: int) -> Operator | None:
    """The row of an operator at an opset version; None where there is none."""
    for row in table().get(("" if domain == "ai.onnx" else domain, name), ()):
        if row.since <= version <= row.until:
            return row
    return None


def table() -> dict[tuple[str, str], list[Operator]]:
    """All rows, by (domain, operator)."""
    for family in _FAMILIES:
        importlib.import_module(f"graphopt.fx.operators.{family}")
    return _TABLE
