"""Does a bundle compute what the model computes? Both run on the same inputs, the model without optimisations.

The bundle is held against the model as the backend got it: there it must agree up to rounding, which depends on the
roughest numbers on the way. Where the target's own passes round (float32 to float16), it is also held against the model
that was given, and must stay as faithful to it as presets ask of a lossy pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graphopt.errors import MissingBackendError, VerificationError

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphopt.backend import Backend, RunnableSession
    from graphopt.bundle import Bundle
    from graphopt.data.feeds import Array
    from graphopt.target import Target
    from graphopt.verify import Comparison, OutputError

EXACT = 1e-4
"""Up to this tolerance whole numbers must be equal; where models round more inside, a choice may tip over."""


QUANTISED = 0.1
"""A value that tips over to the next step of 8 bits moves others behind it: two ways to compute one quantised model
differ by as much as quantisation itself costs, which is 20 dB at the least in a model that is of use."""


@dataclass(frozen=True)
class Allowed:
    """How far an output of a bundle may be from the model's.

    Attributes:
        relative: L2 norm of the difference over that of the output; of whole numbers, the share that differs.
        absolute: largest difference that counts as rounding in any case: runtimes compute functions whose values go to
            1 (tanh, sigmoid) to a few units in the last place of 1, and where they are tiny, relative differences say
            nothing.
    """

    relative: float
    absolute: float = 0.0

    def admits(self, error: OutputError, whole: bool) -> bool:
        """Whether a difference is small enough; `whole`: of whole numbers or strings."""
        if whole:
            return error.rel_l2 <= (self.relative if self.relative > EXACT else 0.0)
        return error.rel_l2 <= self.relative or error.max_abs <= self.absolute


def allowed_difference(model: ir.Model, target: Target) -> Allowed:
    """What counts as rounding for a model on a target: by the roughest numbers of both."""
    from graphopt import verify
    from graphopt.pipeline.verify_each import QUANTISED_TOLERANCE, rounding

    inside = rounding(model)
    if inside == QUANTISED_TOLERANCE:
        return Allowed(QUANTISED, 1 / 127)
    # four units in the last place of 1
    absolute = {"float32": 5e-7, "float16": 4e-3, "bfloat16": 3e-2}
    own = 0.0 if target.dtype == "model" else verify.tolerance_of(target.dtype)
    relative = max(own, inside, verify.tolerance_of("float32"))
    return Allowed(relative, {verify.tolerance_of(name): unit for name, unit in absolute.items()}[relative])


def verify_bundle(
    backend: Backend,
    bundle: Bundle,
    model: ir.Model,
    ready: ir.Model,
    feeds: Sequence[Mapping[str, Array]],
    *,
    inputs: str,
    rounded: bool,
    tolerance: float | None = None,
) -> dict[str, Any]:
    """Run a bundle beside the model it was made of.

    Args:
        backend: of the bundle's target.
        bundle: complete but for its README and this figure.
        model: as it was given; run by ONNX Runtime on the CPU with its optimisations off, like `ready`.
        ready: as the backend got it.
        feeds: what all run on.
        inputs: what these are: "calibration" or "random".
        rounded: the target's own passes changed more than the order of sums between `model` and `ready`.
        tolerance: relative difference that is allowed; None: what counts as rounding, and fidelity where `rounded`.

    Returns:
        what the manifest says under `verified`; `relative` is the difference to `model`.

    Raises:
        MissingBackendError: nothing here can run the bundle, nor stand in for it; or ONNX Runtime lacks an operator of
            the model.
        VerificationError: an output differs by more, or the bundle fails where the model runs.
    """
    import onnxruntime as ort

    from graphopt import verify
    from graphopt.pipeline.presets import MAX_DROP

    session, ran = _opened(backend, bundle)
    candidate = _Named(session, [v["name"] for v in bundle.manifest["outputs"]])
    allowed = allowed_difference(ready, bundle.target) if tolerance is None else Allowed(tolerance)
    about = f"{len(feeds)} {inputs} inputs, {ran}"
    try:
        first = verify.compare(ready, candidate, feeds)
        found = verify.compare(model, candidate, feeds) if rounded else first
    except MissingBackendError as error:
        raise MissingBackendError(
            f"there is nothing to compare the bundle with: {error.what}",
            where=error.where,
            hint="leave --verify out, and compare the outputs on the device",
        ) from error
    _demand(first, allowed, bundle.target, f"the model{' as prepared' if rounded else ''} ({about})")
    if rounded and tolerance is not None:
        _demand(found, allowed, bundle.target, f"the model ({about})")
    elif rounded and found.cosine < 1 - MAX_DROP:
        raise VerificationError(
            f"what prepares the model for it costs too much: the outputs of the bundle have a cosine similarity of "
            f"{found.cosine:.4f} to the model's (least {1 - MAX_DROP:g}, {about})",
            where=f"target {bundle.target.name!r}",
            hint="nothing was written; give real inputs with --calib, or another target; --tolerance X allows more",
        )
    return {
        "reference": f"ONNX Runtime {ort.__version__} on the CPU, optimisations off",
        "ran": ran,
        "inputs": inputs,
        "feeds": found.feeds,
        "relative": found.worst_relative,
        "cosine": found.cosine,
        "to_prepared": first.worst_relative,
        "tolerance": allowed.relative,
        "outputs": [_row(error) for error in found.outputs],
        "notes": list(found.notes),
    }


def _demand(found: Comparison, allowed: Allowed, target: Target, beside: str) -> None:
    from graphopt import verify

    for error in found.outputs:
        if not allowed.admits(error, whole=verify.tolerance(error.dtype) == 0.0):
            raise VerificationError(
                f"output {error.name!r} of the bundle differs by {error.rel_l2:.3g} relative from that of {beside}; "
                f"up to {allowed.relative:.0e} counts as rounding",
                where=f"target {target.name!r}",
                hint="nothing was written; --tolerance X allows more, and without --verify it is written unchecked",
            )


def _opened(backend: Backend, bundle: Bundle) -> tuple[RunnableSession, str]:
    reason = backend.unavailable(bundle.target)
    if reason is None:
        return backend.open(bundle), f"the bundle, by backend {backend.name!r} on this machine"
    found = backend.stand_in(bundle)
    if found is None:
        raise MissingBackendError(
            f"the bundle cannot be verified here: {reason}",
            where=f"target {bundle.target.name!r}",
            hint="leave --verify out, and run it on such a device",
        )
    return found


class _Named:
    """A session as `graphopt.verify.compare` wants its candidate."""

    def __init__(self, session: RunnableSession, output_names: list[str]) -> None:
        self._session = session
        self.output_names = output_names

    def run_all(self, feeds: Sequence[Mapping[str, Array]]) -> list[dict[str, Array]]:
        """The outputs of every feed, by name."""
        return [self._session.run(feed) for feed in feeds]


def _row(error: OutputError) -> dict[str, Any]:
    return {
        "name": error.name,
        "relative": error.rel_l2,
        "max_abs": error.max_abs,
        "cosine": error.cosine,
        "top1_agreement": error.top1_agreement,
    }
