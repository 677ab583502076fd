"""The contract between passes, the manager and the user: Pass, PassResult, Context.

A pass is a frozen dataclass whose fields are its options; parser, help, recipe and documentation are generated from the
fields (`graphopt.spec`). `Pass.run` changes the model it is given in place and leaves it valid, or raises: the manager
hands it a private clone (weights are shared by reference, so a clone costs O(nodes)) and throws the clone away when a
check or a gate refuses it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar

from graphopt.errors import UsageError

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphopt.calibration import Calibration
    from graphopt.evaluation import Evaluation
    from graphopt.progress import Progress
    from graphopt.target import Target


class Effect(Enum):
    """What a pass does to the function that the model computes."""

    EXACT = "exact"
    """Equal up to rounding; verified numerically at the dtype's tolerance."""
    LOSSY = "lossy"
    """An approximation; measured, reported and guarded by the gates."""


def option(default: Any, help: str, *, low: float | None = None, high: float | None = None) -> Any:
    """Declare an option of a pass: `macs: float = option(0.5, "fraction of the MACs to keep", low=0, high=1)`.

    Args:
        default: what the option is when the user says nothing; immutable.
        help: one line for `graphopt passes NAME` and the documentation.
        low, high: closed range of a number (or of each number of a tuple), checked when the pass is made; None: open.
    """
    return field(default=default, metadata={"help": help, "low": low, "high": high})


@dataclass(frozen=True)
class Skip:
    """A place where a pass could have fired and did not."""

    node: str
    reason: str


@dataclass
class PassResult:
    """What a pass did. Counts before and after are measured by the manager, not claimed by the pass.

    Attributes:
        changed: False promises that the model is untouched.
        skipped: node by node, what did not fire and why.
        notes: sentences for the report (what fired, how often, warnings the user must see start with "warning: ").
        details: JSON-serialisable tables for the report, by title; each a list of flat row mappings.
    """

    changed: bool
    skipped: list[Skip] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    details: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


def _registered(name: str) -> type[Pass]:
    """The pass class of a name, by the registry."""
    from graphopt.registry import pass_class

    return pass_class(name)


@dataclass(frozen=True)
class Context:
    """Everything a pass may know besides the model.

    Attributes:
        target: the device the model is made for.
        calibration: unlabelled feeds; None where the user gave no data.
        evaluation: the user's accuracy function; None without `--eval`.
        seed: the only source of randomness: use `numpy.random.default_rng(ctx.seed)`.
        jobs: threads a pass may use.
        progress: where to report steps of long work.
        resolve: looks a pass class up by name; how a composite pass reaches its members without importing them.
        max_drop: the gate on accuracy that the run is under, for passes that choose how far to go; None: no gate.
        max_latency: the gate on the latency ratio; None: no gate.
        drop: how much worse a model is than the input model of the run, as the gate on accuracy measures it; None where
            it cannot be measured. The field itself is None outside of a run.
    """

    target: Target
    calibration: Calibration | None
    evaluation: Evaluation | None
    seed: int
    jobs: int
    progress: Progress
    resolve: Callable[[str], type[Pass]] = _registered
    max_drop: float | None = None
    max_latency: float | None = None
    drop: Callable[[ir.Model], float | None] | None = None


@dataclass(frozen=True)
class Pass(ABC):
    """One rewrite of a model. Subclasses are frozen dataclasses; see the module docstring and docs/extending.md."""

    name: ClassVar[str]
    effect: ClassVar[Effect]
    needs_calibration: ClassVar[bool] = False
    """True: the manager refuses to start the pipeline without calibration data (exit code 2), before any work."""

    def __post_init__(self) -> None:
        """Check the ranges that `option` declares; a pass with more to check calls `super().__post_init__()` first.

        Raises:
            UsageError: a number outside its range.
        """
        for f in fields(self):
            low, high = f.metadata.get("low"), f.metadata.get("high")
            value = getattr(self, f.name)
            for number in value if isinstance(value, tuple) else (value,):
                if not isinstance(number, (int, float)) or isinstance(number, bool):
                    continue
                # Written so that NaN, for which every comparison is false, is refused too.
                if (low is not None and not number >= low) or (high is not None and not number <= high):
                    span = f"{'(-inf' if low is None else f'[{low}'}, {'inf)' if high is None else f'{high}]'}"
                    raise UsageError(
                        f"{number} is outside {span}",
                        where=f"{self.name}.{f.name}",
                        hint=f"give a value within the range ({f.metadata['help']})",
                    )

    @abstractmethod
    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Rewrite `model` in place.

        Raises:
            GraphoptError: the rewrite cannot be done; names the node, the cause and the next step.
        """

    def if_slower(self) -> str:
        """What to do where the model turns out slower for it: a clause that ends a warning; "" for nothing."""
        return ""

    def option_values(self) -> Mapping[str, Any]:
        """The options of this instance by field name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}
