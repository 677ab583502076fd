"""Errors of a model B against the model A it was made of, layer by layer, and what to leave in float.

At each tensor t that both have, over all elements of all samples, in float64:

    total error    b - a         a and b: t in A and in B. What has accumulated up to here.
    added error    f(x_a) - a    f: the part of B that computes t; x_a: the matched tensors it reads, with A's values.
                                 What this layer alone contributes, quantisation of its inputs and weights included.
    inherited      the total error of the worst tensor that B reads for t. Where the total SQNR is far below it and the
                   layer adds little, the function itself amplifies (a logarithm, a difference of close numbers).
    SQNR           10 log10(sum a^2 / sum error^2)  dB
    cosine         sum a y / sqrt(sum a^2 sum y^2),  y = b or f(x_a)

A tensor by which B means something else must not pass for a layer in error: see `graphopt.diagnosis.meaning`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import onnx_ir as ir

from graphopt.calibration import Calibration
from graphopt.diagnosis.integers import add_floats
from graphopt.diagnosis.matching import TRANSPARENT, Pair, Unmatched, match, unmatched
from graphopt.diagnosis.meaning import POOR_DB, later, undone
from graphopt.diagnosis.running import Size, probe, sources, stream
from graphopt.diagnosis.sums import Both, Error, measured
from graphopt.errors import DataError
from graphopt.pipeline.clone import private_clone
from graphopt.quantization.back.recognised import QUANTISED_OPS
from graphopt.quantization.static.rules import ABSORBED, RULES, Kind
from graphopt.rewriting.nodes import is_onnx, label
from graphopt.rewriting.scopes import bodies

SCHEMA = 1
"""Version of `LayerErrors.to_dict`: raised whenever a key changes its meaning or goes."""

TRIAL_SAMPLES = 8
"""Samples on which tensors with another meaning are found."""

OUTLIER_DB = 10.0
"""A layer this far below the median of the layers with an error stands out."""

AMPLIFIED_DB = 10.0
"""A layer behind which the error is this much larger than before it is told to amplify."""

SHARE = 0.25
"""At most this fraction of the layers with an error is suggested to stay in float: beyond, it is the scheme."""


@dataclass(frozen=True)
class LayerError:
    """The errors at one tensor.

    Attributes:
        tensor: its name in A.
        node, op: the node of A that computes it.
        shape: in A, of a call with one sample.
        other: the tensor of B that stands for it.
        matched: how it was found: provenance, name, node, place (`graphopt.diagnosis.matching`) or value (`meaning`).
        added: the error that this layer of B makes of A's inputs.
        total: the error in B, accumulated from the inputs on.
        inherited_db: SQNR in dB of the worst tensor that B computes it from; inf where that is exact, or inputs only.
        nonfinite: elements that are NaN or infinite in one model and different in the other.
        exclude: the node to leave in float, if this is the layer to blame.
    """

    tensor: str
    node: str
    op: str
    shape: tuple[int, ...]
    other: str
    matched: str
    added: Error
    total: Error
    inherited_db: float
    nonfinite: int
    exclude: str


@dataclass(frozen=True)
class LayerErrors:
    """What `compare_layers` found.

    Attributes:
        layers: one entry for each matched tensor, the one whose layer adds most error first.
        unmatched: floating-point tensors of A without a counterpart, and why.
        exclude: nodes that stand out and should stay in float, worst first.
        amplifier: the layer that makes most of an error it did not add: its function amplifies, and what it reads
            needs more precision than the rest; None where no layer does.
        suggestion: the pass with these nodes excluded, ready to paste; None where nothing stands out or B holds
            nothing quantised.
        samples: how many samples were compared.
        notes: what the user should know about the comparison itself.
    """

    layers: list[LayerError]
    unmatched: list[Unmatched]
    exclude: tuple[str, ...]
    suggestion: str | None
    amplifier: LayerError | None
    samples: int
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"schema": SCHEMA, **asdict(self)}


def layer_errors(a: ir.Model, b: ir.Model, calibration: Calibration, *, threads: int = 1) -> LayerErrors:
    """Match the tensors of two models with the same inputs and measure the error of every layer.

    Args:
        a: the reference; not changed.
        b: what was made of it; not changed.
        calibration: the data; passed over at least twice.
        threads: of ONNX Runtime.

    Raises:
        DataError: there is no data, or the models have no tensor in common.
        VerificationError: the second model fails where the first one runs.
        ModelError: the first model does not run on the data.
    """
    from graphopt.model import infer_shapes

    a, b = private_clone(a), private_clone(b)
    for model in (a, b):
        add_floats(model)
        infer_shapes(model)
    if next(iter(calibration.batches(1, 1)), None) is None:
        raise DataError("there are no samples to compare on", where=calibration.name, hint="give data with --calib")
    pairs, missing = match(a, b)
    sizes = probe(a, b, pairs, calibration, threads)
    for pair in [p for p in pairs if sizes[p][0].shape != sizes[p][1].shape]:
        here, there = (list(size.shape) for size in sizes[pair])
        missing.append(unmatched(pair.a, f"its shape is {here}, and {there} in B"))
        pairs.remove(pair)
    pairs, sums = _of_one_meaning(a, b, pairs, missing, sizes, calibration, threads)
    if calibration.samples is None or calibration.samples > TRIAL_SAMPLES:
        sums = measured(stream(a, b, pairs, sizes, calibration, limit=None, threads=threads))
    for pair in [pair for pair, both in sums.items() if both.uneven is not None]:
        here, there = (list(shape) for shape in sums.pop(pair).uneven or ())
        missing.append(unmatched(pair.a, f"its shape depends on the data: {here}, and {there} in B"))
    return _result(a, b, sums, sources(pairs), sizes, missing, calibration)


def _of_one_meaning(
    a: ir.Model,
    b: ir.Model,
    pairs: list[Pair],
    missing: list[Unmatched],
    sizes: dict[Pair, tuple[Size, Size]],
    calibration: Calibration,
    threads: int,
) -> tuple[list[Pair], dict[Pair, Both]]:
    """The pairs that mean the same in both models, in the order of A, and their sums over the trial samples.

    `missing` and `sizes` are brought up to date. It ends: in every round a tensor of B goes, or moves on in A.
    """
    order = {value: index for index, value in enumerate(v for node in a.graph for v in node.outputs)}
    while pairs:
        pairs.sort(key=lambda pair: order[pair.a])
        sums = measured(stream(a, b, pairs, sizes, calibration, limit=TRIAL_SAMPLES, threads=threads))
        moved = later(a, b, sums, calibration, threads)
        renamed = {} if moved else undone(sums, sources(pairs))
        if not moved and not renamed:
            return pairs, sums
        missing += [unmatched(p.a, f"{p.b.name} of B holds what {new.name} is") for p, new in moved.items()]
        missing += [unmatched(pair.a, reason) for pair, reason in renamed.items()]
        sizes |= {new: sizes[old] for old, new in moved.items()}
        kept = [pair for pair in pairs if pair not in moved and pair not in renamed]
        by_tensor = {pair.a: pair for pair in (*moved.values(), *kept)}  # a counterpart that is known already stays
        pairs = list(by_tensor.values())
        missing[:] = [tensor for tensor in missing if tensor.tensor not in {pair.name for pair in pairs}]
    raise DataError("the models have no tensor in common", hint="compare a model with what was made of it")


def _result(
    a: ir.Model,
    b: ir.Model,
    sums: Mapping[Pair, Both],
    read: Mapping[Pair, Sequence[Pair]],
    sizes: Mapping[Pair, tuple[Size, Size]],
    missing: list[Unmatched],
    calibration: Calibration,
) -> LayerErrors:
    totals = {pair: both.total.error() for pair, both in sums.items()}
    layers = []
    for pair, both in sums.items():
        node = pair.a.producer()
        assert node is not None
        inherited = min((totals[source].sqnr_db for source in read[pair] if source in totals), default=math.inf)
        layers.append(
            LayerError(
                pair.name, label(node), node.op_type, sizes[pair][0].shape, str(pair.b.name), pair.how,
                both.added.error(), totals[pair], inherited, both.total.nonfinite, _to_exclude(pair),
            )
        )  # fmt: skip
    layers.sort(key=lambda layer: (layer.added.sqnr_db, layer.total.sqnr_db))
    quantised = any(node.op_type in QUANTISED_OPS for node in b.graph)
    exclude = _outliers(layers) if quantised else ()
    order = {str(v.name): i for i, node in enumerate(a.graph) for v in node.outputs}
    missing.sort(key=lambda tensor: order[tensor.tensor])
    return LayerErrors(
        layers, missing, exclude, _suggestion(exclude), _amplifier(layers), calibration.samples or 0,
        _notes(a, calibration),
    )  # fmt: skip


def _to_exclude(pair: Pair) -> str:
    """The node to exclude for the error at a tensor: as A calls it, or as B does where that is nothing to quantise."""
    for value in (pair.a, pair.b):
        node = _worker(value)
        if node is not None and node.op_type in RULES:
            return label(node)
    own = pair.a.producer()
    assert own is not None
    return label(own)


def _worker(value: ir.Value) -> ir.Node | None:
    """The node whose quantisation shows at a tensor: before what goes into it, and what only moves its integers."""
    node = value.producer()
    moves = (op for op, rule in RULES.items() if rule.kind is Kind.MOVE)
    passed = ("BatchNormalization", *ABSORBED, *TRANSPARENT, *moves)
    while node is not None and is_onnx(node, *passed) and node.inputs[0] is not None:
        before = node.inputs[0].producer()
        if before is None:
            break
        node = before
    return node


def _outliers(layers: Sequence[LayerError]) -> tuple[str, ...]:
    """Nodes of the layers that are bad by themselves or far below the others, worst first, at most a share of all."""
    noisy = [layer for layer in worst_of_each(layers) if layer.added.sqnr_db < math.inf]
    if not noisy:
        return ()
    bar = max(POOR_DB, median(layer.added.sqnr_db for layer in noisy) - OUTLIER_DB)
    bad = [layer.exclude for layer in noisy if layer.added.sqnr_db < bar]
    return tuple(bad[: max(1, int(SHARE * len(noisy)))])


def worst_of_each(layers: Iterable[LayerError]) -> list[LayerError]:
    """Of layers sorted worst first, the first for each node to exclude: others move or pass on what it quantised."""
    found: dict[str, LayerError] = {}
    for layer in layers:
        found.setdefault(layer.exclude, layer)
    return list(found.values())


def _suggestion(exclude: tuple[str, ...]) -> str | None:
    from graphopt.registry import pass_class
    from graphopt.spec import make_pass, to_spec

    if not exclude:
        return None
    globs = tuple(_literal(name) for name in exclude)
    return to_spec([make_pass(pass_class("quantize"), {"exclude": globs})])


def _literal(name: str) -> str:
    """A glob that matches this name and no other."""
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)


def _amplifier(layers: Sequence[LayerError]) -> LayerError | None:
    found = [
        layer
        for layer in layers
        if layer.inherited_db < math.inf
        and -math.inf < layer.total.sqnr_db < min(layer.inherited_db, layer.added.sqnr_db) - AMPLIFIED_DB
    ]
    return max(found, key=lambda layer: layer.inherited_db - layer.total.sqnr_db, default=None)


def _notes(a: ir.Model, calibration: Calibration) -> list[str]:
    notes = [note.removeprefix("warning: ") for note in calibration.notes if note.startswith("warning: ")]
    inside = sum(1 for node in a.graph for _ in bodies(node))
    if inside:
        notes.append(f"tensors inside the {inside} bodies of If, Loop and Scan are not compared")
    return notes
