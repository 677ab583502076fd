"""Static int8 with the layers in float that disturb the outputs most: measured, ranked, chosen, measured again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from graphopt.progress import Progress
from graphopt.quantization.prepared import Prepared
from graphopt.quantization.search.sensitivity import decibel, measure, recovered
from graphopt.quantization.search.tradeoff import kept_in_float
from graphopt.quantization.static.plan import Plan, Unit, name_of
from graphopt.quantization.static.report import multiply_accumulates
from graphopt.quantization.static.rules import Kind

ELEMENT = 16.0
"""Multiply-accumulates in the time that one element of a tensor is read or written and converted."""

FAIR_DB, POOR_DB = 35.0, 20.0
"""Below the first the report names the loudest layers, below the second (1 % noise power) it warns."""

NAMED = 3
"""Layers that a note names."""

LOUDEST = 12
"""Layers whose noise is also measured the other way round: what it recovers to leave only them in float."""


@dataclass
class Sensitivity:
    """What was measured, and which layers stay in float for it.

    Attributes:
        alone: noise-to-signal power at the outputs by key, with only that unit quantised.
        recovered: by how much the noise of the whole falls with that unit in float; of the loudest only.
        everything: noise with all of them quantised.
        chosen: noise without those in `reasons`.
        reasons: by key, why a unit stays in float.
    """

    alone: dict[str, float] = field(default_factory=dict)
    recovered: dict[str, float] = field(default_factory=dict)
    everything: float = 0.0
    chosen: float = 0.0
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def loudest(self) -> list[str]:
        """Keys of what is quantised in the end, the largest noise first."""
        return sorted((k for k in self.alone if k not in self.reasons), key=lambda k: -self.alone[k])

    def told(self, labels: Mapping[str, str], *, samples: int) -> list[str]:
        """Sentences for the report; where the noise is large, with the names of the layers that make most of it.

        Args:
            labels: names of layers by key.
            samples: of the calibration data that were measured on.
        """
        text = (
            f"signal to noise of the worst output on {samples} calibration samples: "
            f"all in integers: {decibel(self.everything):.1f} dB"
        )
        if self.reasons:
            text += f"; without the {len(self.reasons)} that cost more than they save: {decibel(self.chosen):.1f} dB"
        notes = [text]
        reached = decibel(self.chosen)
        if reached < FAIR_DB and self.loudest:
            worst = ", ".join(f"{labels[k]} ({decibel(self.alone[k]):.1f} dB alone)" for k in self.loudest[:NAMED])
            warns = "warning: " if reached < POOR_DB else ""
            notes.append(
                f"{warns}quantisation leaves {reached:.1f} dB of signal to noise at the outputs, spread over "
                f"{len(self.loudest)} layers; most comes from {worst}: exclude them, or give drop=, for more"
            )
        return notes


def sensitivity(
    prepared: Prepared, planned: Plan, in_float: Mapping[str, str], outputs: Sequence[str], progress: Progress
) -> Sensitivity:
    """Measure every unit of a plan, and choose what stays in float (`graphopt.quantization.search.tradeoff`).

    Args:
        prepared: what variants are written with; it has calibration data.
        planned: the plan.
        in_float: units that stay in float anyway.
        outputs: units whose output is quantised though no integer kernel reads it.
        progress: told of every measurement.
    """
    reference = prepared.reference
    keys = [key for key, unit in planned.units.items() if unit.rule.kind is not Kind.MOVE]

    def without(left_out: Sequence[str]) -> float:
        return reference.noise(prepared.variant(prepared.planned({*in_float, *left_out}, outputs)))

    found = Sensitivity(everything=reference.noise(prepared.variant(planned)))
    found.alone = measure(reference, keys, lambda part: prepared.variant(planned.only(part)), progress)
    work = work_of(prepared)
    kept = kept_in_float(
        found.alone, {key: work[key] for key in keys}, found.everything, without, borders=borders_of(prepared, planned)
    )
    found.chosen = without(kept) if kept else found.everything
    found.reasons = {key: _reason(found.alone[key]) for key in kept}
    found.recovered = recovered(
        reference, sorted(keys, key=lambda key: -found.alone[key])[:LOUDEST], found.everything,
        lambda part: prepared.variant(prepared.planned({*in_float, *part}, outputs)), progress,
    )  # fmt: skip
    return found


def _reason(noise: float) -> str:
    return (
        f"alone it leaves {decibel(noise):.1f} dB of signal to noise at the outputs; in float by measurement "
        "(sensitive=none quantises it)"
    )


def borders_of(prepared: Prepared, planned: Plan) -> Callable[[Sequence[str]], float]:
    """Work of the conversions that units in float need, as a function of their keys.

    What is converted are the tensors that a unit in float and one in integers both read or write.
    """
    nodes = {name_of(node.outputs[0]): node for node in prepared.model.graph if node.outputs}
    touching: dict[str, set[str]] = {}
    for key, unit in planned.units.items():
        if unit.rule.kind is Kind.MOVE:
            continue
        names = [name_of(nodes[key].inputs[index]) for index in unit.data]
        names += unit.carriers if unit.quantise_output else ()
        for name in names:
            touching.setdefault(planned.roots.get(name, name), set()).add(key)
    sizes = {name: prepared.histograms[name].total for name in touching if name in prepared.histograms}

    def work(keys: Sequence[str]) -> float:
        left_out = set(keys)
        return ELEMENT * sum(n for name, n in sizes.items() if left_out & touching[name] and touching[name] - left_out)

    return work


def work_of(prepared: Prepared) -> dict[str, float]:
    """Work of every unit on the calibration data: multiply-accumulates, and tensors read and written."""
    possible = prepared.everything
    products = multiply_accumulates(prepared.model, possible, prepared.histograms)
    nodes = {name_of(node.outputs[0]): node for node in prepared.model.graph if node.outputs}

    def elements(key: str, unit: Unit) -> float:
        tensors = [name_of(nodes[key].inputs[index]) for index in unit.data]
        tensors += unit.carriers if unit.quantise_output else ()
        return sum(prepared.histograms[possible.roots[name]].total for name in tensors)

    return {key: products[key] + ELEMENT * elements(key, unit) for key, unit in possible.units.items()}
