"""Help of a pass, generated from its class: docstring, fields, types, defaults, ranges. One source, three forms."""

from __future__ import annotations

import inspect
import types
import typing
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal

from graphopt.base import Pass
from graphopt.pipeline.options import Mismatch, default_of, option_types, type_name, write_value


@dataclass(frozen=True)
class OptionHelp:
    """One option: `default` is written as in a pipeline, None where the option must be given."""

    name: str
    type: str
    default: str | None
    help: str
    low: float | None
    high: float | None


@dataclass(frozen=True)
class PassHelp:
    """What there is to know about a pass.

    Attributes:
        summary: first line of the docstring.
        text: the whole docstring: what, algebra, when it does not fire, what it preserves, source.
    """

    name: str
    effect: str
    needs_calibration: bool
    summary: str
    text: str
    options: tuple[OptionHelp, ...]


def describe(kind: type[Pass]) -> PassHelp:
    """Everything the help says about a pass.

    Raises:
        UsageError: an option is of a type that has no written form.
    """
    written = kind.__doc__ or ""
    # A dataclass without a docstring is given its signature as one, which says nothing.
    text = "" if written.startswith(f"{kind.__name__}(") else inspect.cleandoc(written)
    return PassHelp(
        name=kind.name,
        effect=kind.effect.value,
        needs_calibration=kind.needs_calibration,
        summary=text.partition("\n\n")[0].replace("\n", " "),
        text=text,
        options=tuple(_option(kind, name, annotation) for name, annotation in option_types(kind).items()),
    )


def help_text(kind: type[Pass]) -> str:
    """The help of a pass as plain lines."""
    found = describe(kind)
    needs = ", needs calibration data" if found.needs_calibration else ""
    lines = [f"{found.name} ({found.effect}{needs})", "", found.text, ""]
    if not found.options:
        return "\n".join([*lines, "No options.", ""])
    lines.append("Options:")
    for option in found.options:
        default = "must be given" if option.default is None else f"default {option.default}"
        lines.append(f"  {option.name} = {option.type}; {default}{_range(option)}")
        if option.help:
            lines.append(f"      {option.help}")
    return "\n".join([*lines, ""])


def json_schema(kind: type[Pass]) -> dict[str, Any]:
    """JSON Schema of the table of a pass in a recipe, for editors that check TOML."""
    properties: dict[str, Any] = {"name": {"const": kind.name}}
    required = ["name"]
    for option in describe(kind).options:
        annotation = option_types(kind)[option.name]
        schema = _schema(annotation)
        schema["description"] = option.help
        if option.low is not None and "type" in schema:
            schema["minimum"] = option.low
        if option.high is not None and "type" in schema:
            schema["maximum"] = option.high
        properties[option.name] = schema
        if option.default is None:
            required.append(option.name)
    return {
        "title": kind.name,
        "description": describe(kind).summary,
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def _option(kind: type[Pass], name: str, annotation: Any) -> OptionHelp:
    found = next(f for f in fields(kind) if f.name == name)
    default = default_of(kind, name)
    try:
        text = None if default is MISSING else write_value(default, annotation)
    except Mismatch:
        text = repr(default)
    meta = found.metadata
    return OptionHelp(name, type_name(annotation), text, meta.get("help", ""), meta.get("low"), meta.get("high"))


def _range(option: OptionHelp) -> str:
    if option.low is not None and option.high is not None:
        return f"; {option.low} to {option.high}"
    if option.low is not None:
        return f"; at least {option.low}"
    return f"; at most {option.high}" if option.high is not None else ""


def _schema(annotation: Any) -> dict[str, Any]:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (types.UnionType, typing.Union):
        return {"anyOf": [_schema(a) for a in arguments]}
    if origin is tuple:
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return {"type": "array", "items": _schema(arguments[0])}
        return {"type": "array", "prefixItems": [_schema(a) for a in arguments], "items": False}
    if annotation is type(None):
        # TOML has no null: graphopt.pipeline.recipe writes { spec = "none" }.
        return {"type": "object", "properties": {"spec": {"const": "none"}}, "required": ["spec"]}
    return {"type": {int: "integer", float: "number", bool: "boolean", str: "string"}[annotation]}
