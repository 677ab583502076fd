"""An ONNX model as a compiled TVM executable: import, the order of the compilation passes, code generation.

The order is that of Relax's default pipeline for processors, with one step more: after operators were fused into
kernels, kernels get schedules. Best first: those of a tuning database, then our own rules (`tvm_schedules`), and what
none of them knows stays the loop nest that the importer wrote.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import os
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.errors import MissingBackendError, ModelError
from graphopt.extras import how_to_install

if TYPE_CHECKING:
    import onnx_ir as ir
    from tvm import IRModule
    from tvm.relax import VMExecutable

    from graphopt.target import Target

LOG_LINE = re.compile(rb"\[\d\d:\d\d:\d\d\] \S+:\d+: (Warning|Info): ")
"""How TVM's log begins a line."""


CHECK = re.compile(r"^(\w+Error: )?Check failed: \(.*?\) is false:?\s*")
"""The condition in C++ that an error of TVM quotes before it says what is wrong."""


def why_unavailable() -> str | None:
    """Why TVM cannot compile here; None where it can."""
    found = importlib.util.find_spec("tvm")
    if found is None:
        return f"TVM is not installed ({how_to_install('tvm')})"
    # Not find_spec("tvm.relax"), which imports tvm: that takes seconds, and `graphopt targets` asks for every target.
    if not any((Path(folder) / "relax").is_dir() for folder in found.submodule_search_locations or ()):
        return f"the package 'tvm' that is installed is not Apache TVM ({how_to_install('tvm')})"
    return None


def require_tvm(target: Target) -> None:
    """Check that TVM is there before work starts.

    Raises:
        MissingBackendError: it is not.
    """
    reason = why_unavailable()
    if reason is not None:
        raise MissingBackendError(reason, where=f"target {target.name!r}", hint=how_to_install("tvm"))


def imported(model: ir.Model) -> IRModule:
    """The model in Relax, weights as constants.

    Raises:
        ModelError: the importer fails at a node, which it names.
    """
    import onnx_ir as ir
    from tvm.relax.frontend.onnx.onnx_frontend import ONNXGraphImporter, onnx_input

    from graphopt.backends.tvm_operators import CONVERTERS, qualify

    class NamingImporter(ONNXGraphImporter):  # type: ignore[misc]
        """TVM's importer with more operators; its errors do not name the node."""

        def _check_for_unsupported_ops(self, graph: Any) -> None:
            """`tvm_check` has looked, and knows of ours."""

        def _convert_operator(self, op_name: str, inputs: Any, attrs: dict[str, Any], opset: int) -> Any:
            converter = CONVERTERS.get(op_name)

            def own(name: str, given: Any, attributes: Any) -> Any:
                return super(NamingImporter, self)._convert_operator(name, onnx_input(given), attributes, opset)

            try:
                if converter is None:
                    return own(op_name, inputs, attrs)
                return self.bb.normalize(converter(self.bb, list(inputs), attrs, own))
            except Exception as error:
                raise ModelError(
                    f"TVM's importer does not take this {op_name}: {_first_line(error)}",
                    where=f"node {attrs['tvm_custom']['name']!r}", hint="lower it to a target of ONNX Runtime (cpu)",
                ) from error  # fmt: skip

    proto = ir.to_proto(model)
    qualify(proto.graph)
    importer = NamingImporter(None, None, keep_params_in_input=False, sanitize=True)
    with quiet():
        try:
            return importer.from_onnx(proto.graph, model.opset_imports.get("", 1))
        except ModelError as error:
            _forget(error)
            raise
        except Exception as error:
            _forget(error)
            raise ModelError(
                f"TVM's importer does not take the model: {_first_line(error)}",
                hint="lower it to a target of ONNX Runtime (cpu)",
            ) from error
        finally:
            del importer


def compiled(model: ir.Model, target: Target, database: Path | None = None) -> VMExecutable:
    """Compile a model for a target.

    Args:
        model: prepared for the importer (the pipeline `target.prepare`); not changed.
        target: of this backend.
        database: folder of a tuning database, whose kernels are taken where it has them.

    Raises:
        MissingBackendError: TVM is not installed.
        ModelError: TVM does not take the model.
    """
    require_tvm(target)
    from graphopt.backends.tvm_target import device_target

    return built(relaxed(model, target), device_target(target), database)


def relaxed(model: ir.Model, target: Target) -> IRModule:
    """The model in Relax, once it is known that all of it can be compiled.

    Args:
        model: prepared for the importer.
        target: whose `prepare` is tried with other sizes where open ones are in the way.

    Raises:
        ModelError: names the node, or the dimensions to fix.
    """
    from graphopt.backends.tvm_check import check
    from graphopt.backends.tvm_sizes import followed

    check(model)
    return followed(model, target)


def built(
    mod: IRModule, device: Any, database: Path | None = None, *, plain: dict[str, str] | None = None
) -> VMExecutable:
    """Compile a Relax module for a `tvm.target.Target`, kernels of the database first.

    Args:
        mod: what `relaxed` gives.
        device: what code is made for.
        database: folder of a tuning database.
        plain: gets the kernels that no schedule was found for, and why.

    Raises:
        ModelError: TVM cannot compile it.
    """
    import tvm

    with quiet():
        try:
            mod = scheduled(fused(mod, device, plain), device, database, plain)
            return tvm.compile(mod, target=device, relax_pipeline=_lowering(device))
        except RuntimeError as error:  # tvm.error.InternalError and whatever a check in C++ raised
            raise ModelError(
                f"TVM cannot compile the model: {_first_line(error)}",
                hint="fix open sizes of the inputs with --dim name=N, or lower it to a target of ONNX Runtime (cpu)",
            ) from error


def fused(mod: IRModule, device: Any, plain: dict[str, str] | None = None) -> IRModule:
    """The module as calls of kernels (TIR functions), operators fused into them; nothing is scheduled.

    Tuning extracts its tasks from here, so that what it learns fits what `built` compiles.

    Args:
        mod: what `relaxed` gives.
        device: what code is made for.
        plain: gets the operators that could not be brought into the form of our kernels, and why.
    """
    import tvm
    from tvm import relax

    from graphopt.backends import tvm_schedules

    before = [
        relax.transform.DecomposeOpsForInference(),
        relax.transform.CanonicalizeBindings(),
        relax.transform.FoldConstant(),
        *relax.pipeline.library_dispatch_passes(device),
    ]
    after = [
        relax.transform.LegalizeOps(),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FoldConstant(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
        relax.transform.DeadCodeElimination(),
    ]
    with device:
        mod = tvm.transform.Sequential(before)(mod)
        if device.kind.name == "llvm":
            failures: list[tvm_schedules.Unscheduled] = []
            mod = tvm_schedules.legalize(mod, device, failures=failures)
            if plain is not None:
                plain |= {failure.function: f"{failure.rule}: {failure.reason}" for failure in failures}
        return tvm.transform.Sequential(after)(mod)


def scheduled(
    mod: IRModule, device: Any, database: Path | None = None, plain: dict[str, str] | None = None
) -> IRModule:
    """Kernels of a fused module with their schedules: the database's, then our rules.

    Args:
        mod: what `fused` gives.
        device: what code is made for.
        database: folder of a tuning database.
        plain: gets the kernels that stay the loops of the importer (right, but slow), and why.
    """
    from tvm import relax

    from graphopt.backends import tvm_schedules

    with device:
        if database is not None:
            mod = relax.transform.MetaScheduleApplyDatabase(str(database))(mod)
        if device.kind.name == "cuda":
            return _gpu_schedules(mod)
        failures: list[tvm_schedules.Unscheduled] = []
        mod = tvm_schedules.schedule(mod, device, failures=failures)
        if plain is not None:
            reasons = {failure.function: f"{failure.rule}: {failure.reason}" for failure in failures}
            plain |= {name: reasons.get(name, "no rule takes it") for name in tvm_schedules.unscheduled(mod)}
        return mod


def _gpu_schedules(mod: IRModule) -> IRModule:
    from tvm.s_tir import dlight

    rules = (
        dlight.gpu.Matmul(),
        dlight.gpu.GEMV(),
        dlight.gpu.Reduction(),
        dlight.gpu.GeneralReduction(),
        dlight.gpu.Fallback(),
    )
    return dlight.ApplyDefaultSchedule(*rules)(mod)


def _lowering(device: Any) -> Any:
    """What is left of the default pipeline once kernels are scheduled."""
    import tvm

    kind = "cuda" if device.kind.name == "cuda" else "cpu_generic"
    default = importlib.import_module(f"tvm.relax.backend.{kind}.pipeline")
    passes = [*default.dataflow_lower_passes(device), *default.finalize_passes(device)]

    def run(mod: IRModule, _: Any) -> IRModule:
        with device:
            return tvm.transform.Sequential(passes)(mod)

    return tvm.transform.module_pass(run, opt_level=0)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what TVM prints on the way: its errors are raised as ours."""
    with contextlib.redirect_stdout(io.StringIO()), _without_log(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _without_log() -> Iterator[None]:
    """Without the lines of TVM's C++ log on the error stream, which has no switch; other lines come at the end.

    After an error none do: whoever catches it tells what happened.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as caught:
        os.dup2(caught.fileno(), 2)
        failed = True
        try:
            yield
            failed = False
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            caught.seek(0)
            for line in caught.read().splitlines(keepends=True):
                if not failed and not LOG_LINE.match(line):
                    os.write(2, line)


def _forget(error: BaseException | None) -> None:
    """Drop what the frames of an error hold: a half-filled builder of TVM complains on stderr when it goes."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (CHECK.sub("", lines[-1]) or "a check within it failed") if lines else type(error).__name__
