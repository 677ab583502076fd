"""The tables of delegates: TOML files in `tables/`, one a delegate, with its sources and the date they were read."""

from __future__ import annotations

import importlib.resources
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, Literal

from graphopt.errors import UsageError


@dataclass(frozen=True)
class Rule:
    """Operators that a delegate takes, and on which conditions; a node is taken if one rule of its operator holds.

    Operands are called as in the ONNX standard ("X", "W", "starts", outputs too) or, where an operator is not in it, by
    their position among the inputs ("0").

    Attributes:
        ops: operator types; "com.microsoft:QLinearAdd" for one of another domain.
        quantised: the rule is for the operator together with the Q and DQ around it; types are then those of the
            integers.
        since, until: versions of the operator (not of the model's operator set).
        types: element types by operand; the first input of every other has the delegate's.
        ranks: numbers of dimensions by operand.
        constant: operands that must be constant, where there are any.
        absent: operands that must be left out.
        attributes: values by attribute; one that a node leaves out has the standard's default.
        known: axes of an operand whose sizes must be known, for a delegate that takes free ones otherwise.
        scales: "tensor": one scale a tensor; "channel": weights may have one a channel. Of quantised rules.
        checks: further conditions, by their name in `graphopt.delegates.checks`.
        note: what the table cannot tell, for the reader.
    """

    ops: tuple[str, ...]
    quantised: bool = False
    since: int = 1
    until: int | None = None
    types: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    ranks: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    constant: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    attributes: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    known: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    scales: Literal["tensor", "channel"] = "tensor"
    checks: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Delegate:
    """What an accelerator takes.

    Attributes:
        name: what the table's file is called.
        title: how reports call it.
        date: when the sources were read.
        sources: where the rules stand.
        provider: execution provider of ONNX Runtime; "" where it is none.
        static_shapes: a node is refused where a size of an input is not known.
        ranks: numbers of dimensions of inputs, the least and the most.
        largest: the most entries along an axis of an input.
        types: element types of first inputs where a rule tells none.
        bodies: whether it looks into the bodies of If, Loop and Scan.
        shapes: whether it computes sizes itself (Shape, and what is made of it).
        partitions: "regions": connected nodes become one graph of the delegate; "nodes": each is a kernel of its own;
            "runs": nodes that follow each other in the order of execution become one graph.
        fused: operators that become part of the kernel of the one before them, and what that can be.
        worthless: operators that are not taken alone: what they would cost is the transfer.
        stops: operators from which on it takes nothing, in the order of execution.
        int8: a target whose scheme `quantize` writes it for; "" where it takes no integers.
        instead: what to write in place of an operator that it lacks.
        rules: see `Rule`.
        note: for the reader of a report.
    """

    name: str
    title: str
    date: str
    sources: tuple[str, ...]
    provider: str = ""
    static_shapes: bool = False
    ranks: tuple[int, int] = (0, 99)
    largest: int | None = None
    types: tuple[str, ...] = ("float32",)
    bodies: bool = False
    shapes: bool = False
    partitions: Literal["regions", "nodes", "runs"] = "regions"
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    worthless: tuple[str, ...] = ()
    stops: tuple[str, ...] = ()
    int8: str = ""
    instead: Mapping[str, str] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()
    note: str = ""

    def rules_for(self, op: str, *, quantised: bool = False) -> tuple[Rule, ...]:
        """Rules of an operator ("Conv", "com.microsoft:QLinearAdd"), alone or with the Q and DQ around it."""
        return tuple(rule for rule in self.rules if op in rule.ops and rule.quantised == quantised)


_FOLDER = "tables"


def delegates() -> tuple[str, ...]:
    """Names of all delegates that there is a table for, sorted."""
    folder = importlib.resources.files("graphopt.delegates").joinpath(_FOLDER)
    return tuple(sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml")))


@cache
def delegate(name: str) -> Delegate:
    """The delegate called `name`.

    Raises:
        UsageError: there is none, or its table is wrong.
    """
    if name not in delegates():
        raise UsageError(f"unknown delegate {name!r}", hint=f"the delegates are {', '.join(delegates())}")
    text = importlib.resources.files("graphopt.delegates").joinpath(_FOLDER, f"{name}.toml").read_text("utf-8")
    return parse_delegate(name, tomllib.loads(text), f"{name}.toml")


def parse_delegate(name: str, table: Mapping[str, Any], source: str) -> Delegate:
    """Make a delegate from its table; rules stand in `[[rules]]`.

    Raises:
        UsageError: a key is unknown or missing, or a check that nothing implements; names the rule.
    """
    import graphopt.delegates.tensorrt_checks  # noqa: F401 (adds its checks)
    from graphopt.delegates.checks import CHECKS

    values = dict(table)
    rules = []
    for number, given in enumerate(values.pop("rules", ()), 1):
        where = f"{source}, rule {number} ({', '.join(given.get('ops', ('no operator',)))})"
        rules.append(_made(Rule, given, where))
        unknown = [check for check in rules[-1].checks if check not in CHECKS]
        if unknown:
            raise UsageError(f"unknown check {unknown[0]!r}", where=where, hint=f"there are {', '.join(CHECKS)}")
    made: Delegate = _made(Delegate, {"name": name, **values, "rules": rules}, source)
    return made


def _made(kind: type[Any], given: Mapping[str, Any], where: str) -> Any:
    known = {entry.name for entry in fields(kind)}
    unknown = sorted(set(given) - known)
    if unknown:
        raise UsageError(f"unknown key {unknown[0]!r}", where=where, hint=f"known keys are {', '.join(sorted(known))}")
    try:
        return kind(**{key: _frozen(value) for key, value in given.items()})
    except TypeError as error:
        raise UsageError(str(error).partition(") ")[2] or str(error), where=where, hint="complete the table") from error


def _frozen(value: Any) -> Any:
    """TOML arrays as tuples, in tables too."""
    if isinstance(value, list):
        return tuple(_frozen(entry) for entry in value)
    return {key: _frozen(entry) for key, entry in value.items()} if isinstance(value, Mapping) else value
