"""Does a bundle compute what the model computes? Both run on the same inputs, the model without optimisations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from graphopt.errors import MissingBackendError, VerificationError

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphopt.backend import Backend, RunnableSession
    from graphopt.bundle import Bundle
    from graphopt.data.feeds import Array
    from graphopt.target import Target
    from graphopt.verify import OutputError

EXACT = 1e-4
"""Up to this tolerance whole numbers must be equal; where models round more inside, a choice may tip over."""


def verify_bundle(
    backend: Backend,
    bundle: Bundle,
    model: ir.Model,
    feeds: Iterable[Mapping[str, Array]],
    *,
    inputs: str,
    allowed: float,
) -> dict[str, Any]:
    """Run a bundle beside the model it was made of.

    Args:
        backend: of the bundle's target.
        bundle: complete but for its README and this figure.
        model: the reference, run by ONNX Runtime on the CPU with its optimisations off.
        feeds: what both run on.
        inputs: what these are: "calibration" or "random".
        allowed: relative L2 difference up to which outputs are equal.

    Returns:
        what the manifest says under `verified`.

    Raises:
        MissingBackendError: nothing here can run the bundle, nor stand in for it.
        VerificationError: an output differs by more, or the bundle fails where the model runs.
    """
    import onnxruntime as ort

    from graphopt import verify

    session, ran = _opened(backend, bundle)
    found = verify.compare(model, _Named(session, [v["name"] for v in bundle.manifest["outputs"]]), feeds)
    for error in found.outputs:
        limit = allowed if verify.tolerance(error.dtype) or allowed > EXACT else 0.0
        if not error.rel_l2 <= limit:
            raise VerificationError(
                f"output {error.name!r} of the bundle differs by {error.rel_l2:.3g} relative from the model "
                f"(tolerance {limit:.0e}, {found.feeds} {inputs} inputs, {ran})",
                where=f"target {bundle.target.name!r}",
                hint="nothing was written; --tolerance X allows more, and without --verify it is written unchecked",
            )
    return {
        "reference": f"ONNX Runtime {ort.__version__} on the CPU, optimisations off",
        "ran": ran,
        "inputs": inputs,
        "feeds": found.feeds,
        "tolerance": allowed,
        "relative": found.worst_relative,
        "outputs": [_row(error) for error in found.outputs],
        "notes": list(found.notes),
    }


def allowed_difference(models: Sequence[ir.Model], target: Target) -> float:
    """How far outputs may differ where nobody says: by the roughest numbers of the models and the target."""
    from graphopt import verify
    from graphopt.pipeline.verify_each import rounding

    own = 0.0 if target.dtype == "model" else verify.tolerance_of(target.dtype)
    return max(own, *(rounding(model) for model in models))


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
