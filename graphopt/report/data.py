"""The report: everything a run found out, as plain dataclasses that become JSON and come back.

One rule holds for readers: a field that could not be measured is None and the reason stands beside it. Times, memory
and latency live here and nowhere else, so that the model itself is the same bytes on every run.
"""

from __future__ import annotations

import json
import math
import types
import typing
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, Literal

from graphopt.base import Skip
from graphopt.errors import UsageError
from graphopt.files.stored import Storage
from graphopt.sparsity.verdicts import Eligibility

SCHEMA = 2
"""Version of the JSON form; raised when a field changes its meaning or goes away."""

Status = Literal["applied", "unchanged", "undone", "not run", "planned"]


@dataclass
class Stats:
    """Counts of a model, as `graphopt.analysis.cost.model_stats` finds them.

    Attributes:
        nodes, parameters, bytes: operators, initializer elements, and bytes of all initializers.
        macs: multiply-accumulates of one forward pass; None where shapes do not decide them.
        ops: how often each operator occurs.
        opset, ir_version: what a runtime must understand.
        macs_unknown: why `macs` is None, and what to try.
    """

    nodes: int
    parameters: int
    bytes: int
    macs: int | None
    ops: dict[str, int]
    opset: dict[str, int] = field(default_factory=dict)
    ir_version: int = 0
    macs_unknown: str | None = None


@dataclass
class OutputRecord:
    """How far one output of the model is from the same output of another."""

    name: str
    max_abs: float
    rel_l2: float
    cosine: float
    sqnr_db: float
    top1_agreement: float | None


@dataclass
class Verification:
    """What a comparison with the model before the pass showed.

    Attributes:
        data: "random" or "calibration": what the two models were run on.
        tolerance: the relative L2 error allowed; None for a lossy pass, whose errors are only measured.
        passed: False never reaches a report of an exact pass: it is an error.
        reason: why there are no numbers, where there are none.
    """

    data: str
    tolerance: float | None
    passed: bool
    outputs: list[OutputRecord] = field(default_factory=list)
    reason: str | None = None


@dataclass
class GateRecord:
    """One gate after one pass.

    Attributes:
        gate: "max-drop" or "max-latency".
        limit, value: the bound, and what was measured; `value` is None where it could not be.
        passed: None where it could not be measured.
        detail: one sentence for the user.
    """

    gate: str
    limit: float
    value: float | None
    passed: bool | None
    detail: str


@dataclass
class PassRecord:
    """What one pass of the pipeline did.

    Attributes:
        status: "applied"; "unchanged" (nothing to do); "undone" (a gate refused it); "not run" (bisect limit, data it
            needs is missing); "planned" (dry run).
        reason: why it was undone or not run.
        peak_memory: peak resident memory of the process during the pass and its checks, bytes (sampled).
    """

    name: str
    spec: str
    effect: str
    status: Status
    reason: str | None = None
    before: Stats | None = None
    after: Stats | None = None
    seconds: float = 0.0
    peak_memory: int = 0
    verification: Verification | None = None
    gates: list[GateRecord] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    details: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    @property
    def changed(self) -> bool:
        """True when this pass is part of the final model."""
        return self.status == "applied"


@dataclass
class Latency:
    """Time of the final model over time of the input model, paired and interleaved on the target.

    Attributes:
        ratio: median of the paired ratios; below 1 is faster. None where it was not measured.
        low, high: quartiles of the paired ratios.
        input_ms, output_ms: median time of one run, milliseconds.
        rounds: number of pairs.
        reason: why there is no ratio.
    """

    ratio: float | None
    low: float | None = None
    high: float | None = None
    input_ms: float | None = None
    output_ms: float | None = None
    rounds: int | None = None
    batch: int | None = None
    threads: int | None = None
    reason: str | None = None

    @property
    def certain_low(self) -> float | None:
        """Lower end of the 95 % interval of the median ratio (median - 1.57 IQR / sqrt(n), McGill et al. 1978)."""
        if self.ratio is None or self.low is None or self.high is None or not self.rounds:
            return self.ratio
        return self.ratio - 1.57 * (self.high - self.low) / math.sqrt(self.rounds)


@dataclass
class Fidelity:
    """Mean cosine similarity per sample of the final and the input model's outputs, of the worst output."""

    cosine: float | None
    data: str
    outputs: list[OutputRecord] = field(default_factory=list)
    reason: str | None = None


@dataclass
class Accuracy:
    """The user's own measure, before and after."""

    metric: str
    higher_is_better: bool
    before: float
    after: float

    @property
    def drop(self) -> float:
        """How much worse the final model is, in the metric's unit; negative where it is better."""
        return self.before - self.after if self.higher_is_better else self.after - self.before


@dataclass
class Units:
    """What could be removed from the input model, and for what cannot: why.

    Attributes:
        units: number of minimal removable pieces.
        exact: of these, the ones whose removal, once zero, is exact.
        parameters, macs: what the model has; macs is None where the work is not known.
        prunable_parameters, prunable_macs: what belongs to at least one removable piece.
        exact_parameters, exact_macs: what belongs to at least one that is exact.
        frozen: rows of {"where", "reason", "units"}.
    """

    units: int = 0
    exact: int = 0
    parameters: int = 0
    prunable_parameters: int = 0
    exact_parameters: int = 0
    macs: int | None = None
    prunable_macs: int | None = None
    exact_macs: int | None = None
    frozen: list[dict[str, Any]] = field(default_factory=list)
    reason: str | None = None


@dataclass
class Report:
    """The whole run. `to_json` and `from_json` are inverse."""

    model: str
    target: str
    pipeline: str
    seed: int
    input: Stats
    output: Stats
    passes: list[PassRecord] = field(default_factory=list)
    latency: Latency | None = None
    fidelity: Fidelity | None = None
    accuracy: Accuracy | None = None
    units: Units | None = None
    storage: Storage | None = None
    sparsity: Eligibility | None = None
    gates: dict[str, float | None] = field(default_factory=dict)
    preset: str | None = None
    calibration: str | None = None
    evaluation: str | None = None
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    command: str | None = None
    seconds: float = 0.0
    dry_run: bool = False
    schema: int = SCHEMA

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists, numbers and strings; infinities and NaN become strings that `from_dict` reads."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain

    def to_json(self, indent: int | None = 2) -> str:
        """Strict JSON (no NaN or Infinity literals), keys in the order of the fields."""
        return plain_json(asdict(self), indent)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        """Inverse of `to_dict`.

        Raises:
            UsageError: made by another version of the schema.
        """
        if data.get("schema") != SCHEMA:
            raise UsageError(
                f"report of schema {data.get('schema')!r}, this graphopt reads schema {SCHEMA}",
                hint="read it with the version of graphopt that wrote it (see its 'versions')",
            )
        report: Report = _build(cls, data)
        return report

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Inverse of `to_json`.

        Raises:
            UsageError: not JSON, or another schema.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise UsageError(f"not a report: {error}", hint="give the report.json that graphopt wrote") from error
        return cls.from_dict(data)


def plain_json(data: Any, indent: int | None = 2) -> str:
    """Strict JSON of dicts, lists, numbers and strings; infinities and NaN become strings."""
    return json.dumps(_plain(data), indent=indent, ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, (bool, str, int)) or value is None:
        return value
    if isinstance(value, float):
        # JSON has no infinities; a perfect match has an infinite signal-to-noise ratio.
        return float(value) if abs(value) < float("inf") else str(float(value))
    if hasattr(value, "item"):
        return _plain(value.item())
    return str(value)


def _build(kind: Any, value: Any) -> Any:
    """Make a value of the annotated type `kind` from plain JSON data."""
    if value is None:
        return None
    origin = typing.get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        return _build(next(a for a in typing.get_args(kind) if a is not type(None)), value)
    if origin is list:
        return [_build(typing.get_args(kind)[0], v) for v in value]
    if origin is dict:
        return {k: _build(typing.get_args(kind)[1], v) for k, v in value.items()}
    if is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return kind(**{f.name: _build(hints[f.name], value[f.name]) for f in fields(kind) if f.name in value})  # type: ignore[operator]
    return float(value) if kind is float else value
