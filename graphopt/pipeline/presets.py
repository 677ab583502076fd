"""The presets -O0 to -O3: pipelines for those who do not want to choose, always with both gates on.

-O0  nothing
-O1  exact clean-up; needs no data
-O2  and quantisation: the formats that are fastest here, by measurement; int8 for targets that cannot run here
-O3  and structured pruning before it
"""

from __future__ import annotations

from dataclasses import dataclass

from graphopt.base import Effect, Pass
from graphopt.errors import UsageError
from graphopt.registry import unavailable
from graphopt.spec import Resolve, parse, to_spec
from graphopt.target import Target

PIPELINES = {
    "O0": "",
    "O1": "fold,shrink",
    "O2": "fold,shrink,quantize{scheme=auto}",
    "O3": "fold,shrink,prune{macs=0.8},quantize{scheme=auto}",
}

MEASURED, UNMEASURED = "quantize{scheme=auto}", "quantize"
"""What quantises where the target runs here, and where nothing can be timed."""

MAX_DROP = 0.01
MAX_LATENCY = 1.0


@dataclass(frozen=True)
class Expansion:
    """What a preset became.

    Attributes:
        name: "O2".
        passes: the pipeline.
        left_out: sentences: which pass is not in it, and why.
    """

    name: str
    passes: tuple[Pass, ...]
    left_out: tuple[str, ...]

    def lines(self, max_drop: float = MAX_DROP, max_latency: float = MAX_LATENCY) -> tuple[str, ...]:
        """What to tell the user: the same in words that can be typed, and what was left out."""
        if not self.passes:
            return (f"-{self.name} runs no pass", *self.left_out)
        spec = to_spec(self.passes)
        gates = f"--max-drop {max_drop:g} --max-latency {max_latency:g}"
        return (f"-{self.name} is --passes '{spec}' {gates}", *self.left_out)


def expand(preset: str | int, target: Target, has_data: bool, resolve: Resolve | None = None) -> Expansion:
    """The pipeline of a preset for a target; members that cannot work without what is missing are left out.

    Args:
        preset: "O2", "-O2", "2" or 2.
        target: what the model is made for.
        has_data: whether calibration data was given.
        resolve: finds pass classes by name; None: the registry.

    Raises:
        UsageError: there is no such preset.
    """
    name = f"O{str(preset).strip().lstrip('-').upper().removeprefix('O')}"
    if name not in PIPELINES:
        raise UsageError(f"there is no preset {preset!r}", hint=f"choose one of {', '.join(PIPELINES)}")
    text = PIPELINES[name] if unavailable(target) is None else PIPELINES[name].replace(MEASURED, UNMEASURED)
    passes = parse(text) if resolve is None else parse(text, resolve)
    kept: list[Pass] = []
    left_out: list[str] = []
    for p in passes:
        if not has_data and (p.needs_calibration or p.effect is Effect.LOSSY):
            # Without data a lossy pass works blindly, and the gate on accuracy has nothing to decide by.
            left_out.append(f"{p.name} is left out: it needs calibration data (--calib DATA)")
        elif p.name == "quantize" and target.quant is None:
            left_out.append(f"{p.name} is left out: target {target.name!r} does not run int8")
        else:
            kept.append(p)
    return Expansion(name, tuple(kept), tuple(left_out))
