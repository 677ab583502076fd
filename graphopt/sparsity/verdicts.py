"""What a target can do with the zeros of a model, layer by layer: plain data, as `eligibility` beside it finds it."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

SCHEMA = 1
"""Version of `Eligibility.to_dict`: raised whenever a key changes its meaning or goes."""

Verdict = Literal["may", "unlikely", "not"]


@dataclass
class LayerVerdict:
    """One linear node.

    Attributes:
        layer: how messages name the node.
        op: its operator.
        verdict: see the module.
        rule: name of the rule that decided; "" for layers that may be picked.
        reason: one sentence.
        source: where the target's rule was read; "" where it has none.
        weight: name of the stored tensor; "" where there is none.
        sparse: its weight is 2:4 along the input channels.
        role: "core", "in", "out" for parts of a factorised layer, else "".
        type: of its operands on the target.
        inputs, outputs: channels of one group; None where the weight is not known.
        groups: of a convolution.
        parameters: elements of the weight.
    """

    layer: str
    op: str
    verdict: Verdict
    rule: str = ""
    reason: str = ""
    source: str = ""
    weight: str = ""
    sparse: bool = False
    role: str = ""
    type: str = ""
    inputs: int | None = None
    outputs: int | None = None
    groups: int = 1
    parameters: int = 0


@dataclass
class Eligibility:
    """The linear nodes of a model, in graph order, and what a target can do with their zeros.

    Attributes:
        target: its name.
        kernels: False where it has no kernels that skip zeros.
        note: what else must hold.
        linear, parameters: number of linear nodes of the model but wrappers, and elements of their weights.
        layers: one verdict each.
    """

    target: str
    kernels: bool
    note: str = ""
    linear: int = 0
    parameters: int = 0
    layers: list[LayerVerdict] = field(default_factory=list)

    def sparse(self) -> Eligibility:
        """The same with the layers alone whose weights are 2:4."""
        return replace(self, layers=[row for row in self.layers if row.sparse])

    def counts(self) -> dict[str, int]:
        """How many layers have each verdict."""
        found = Counter(row.verdict for row in self.layers)
        return {verdict: found[verdict] for verdict in ("may", "unlikely", "not")}

    def summary(self) -> str:
        """One line."""
        if not self.kernels:
            return f"target {self.target} has no kernels that skip zeros"
        sparse = self.sparse()
        if not sparse.layers:
            return f"none of the {self.linear} linear layers is 2:4 along its input channels (sparsify, armor)"
        counts, may = sparse.counts(), sum(row.parameters for row in sparse.layers if row.verdict == "may")
        share = may / self.parameters if self.parameters else 0.0
        return (
            f"{len(sparse.layers)} of {self.linear} linear layers are 2:4: on {self.target} "
            f"{counts['may']} may run sparsely ({share:.0%} of the weights), "
            f"{counts['unlikely']} are legal and unlikely to gain, {counts['not']} stay dense"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"schema": SCHEMA, "summary": self.summary(), "counts": self.counts(), **asdict(self)}
