"""Open sizes: which of them TVM carries through a model, and which must be fixed.

The importer follows a symbolic size through shapes that are computed from it as long as it sees how; behind a Range, a
NonZero or arithmetic on shapes that it does not read, a tensor has a size of its own that nothing relates to the
inputs, and Relax cannot compile what joins the two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from graphopt.errors import GraphoptError, ModelError

if TYPE_CHECKING:
    import onnx_ir as ir
    from tvm import IRModule

    from graphopt.target import Target

TRIED = (64, 8)
"""Sizes to try: images survive the strides of most networks at 64, and 8 positions are in every table."""

ELSEWHERE = "lower it to a target of ONNX Runtime, such as cpu"


def followed(model: ir.Model, target: Target) -> IRModule:
    """The model in Relax, if all sizes in it follow from those of its inputs.

    Args:
        model: prepared for the importer.
        target: whose `prepare` is tried with dimensions fixed, to find out which ones are in the way.

    Raises:
        ModelError: names the dimensions of the inputs that must be fixed, or the node that the importer does not take.
    """
    from graphopt.backends.tvm_build import imported

    try:
        mod = imported(model)
    except ModelError as error:
        culprits = _culprits(model, target)
        if not culprits:
            raise
        raise _open(culprits, f"{error.where}: {error.what}") from error
    lost = lost_sizes(mod)
    if not lost:
        return mod
    culprits = _culprits(model, target)
    if culprits:
        raise _open(culprits, f"it loses track of the size of {lost[0]}")
    raise ModelError(
        f"a size inside of the model depends on the values of its inputs ({lost[0]}), and TVM compiles none such",
        hint=ELSEWHERE,
    )


def _open(culprits: list[str], reason: str) -> ModelError:
    words = " ".join(f"--dim {name}=N" for name in culprits)
    return ModelError(
        f"TVM cannot compile the model while this is open ({reason})",
        where=f"dimension{'s' if len(culprits) > 1 else ''} {', '.join(map(repr, culprits))} of the inputs",
        hint=f"fix it: {words}",
    )


def _culprits(model: ir.Model, target: Target) -> list[str]:
    """Open dimensions that TVM does not carry even alone; all where only some of them together are too many."""
    named = open_dimensions(model)
    if not named or not _carried(model, target, named):
        return []
    return [name for name in named if not _carried(model, target, [n for n in named if n != name])] or named


def lost_sizes(mod: IRModule) -> list[str]:
    """Tensors of a module whose sizes are no function of the sizes of its inputs."""
    main = mod["main"]
    known = {variable.name for parameter in main.params for variable in _variables(parameter.ty)}
    found = []
    for block in main.body.blocks:
        for binding in block.bindings:
            for tensor in _tensors(binding.var.ty):
                if tensor.shape is None or not {v.name for v in _variables(tensor)} <= known:
                    found.append(f"{binding.var.name}: {tensor}")
    return found


def _variables(kind: object) -> list[Any]:
    """Symbolic sizes of a type."""
    from tvm import tirx

    sizes = [size for tensor in _tensors(kind) if tensor.shape is not None for size in tensor.shape]
    return [variable for size in sizes for variable in tirx.analysis.undefined_vars(size)]


def _tensors(kind: object) -> list[Any]:
    from tvm import relax

    if isinstance(kind, relax.TupleType):
        return [tensor for field in kind.fields for tensor in _tensors(field)]
    return [kind] if isinstance(kind, relax.TensorType) else []


def open_dimensions(model: ir.Model) -> list[str]:
    """Names of the open dimensions of the inputs, each once."""
    sizes = [size for value in model.graph.inputs for size in value.shape or ()]
    return list(dict.fromkeys(size.value for size in sizes if not isinstance(size, int) and size.value))


def _carried(model: ir.Model, target: Target, fixed: list[str]) -> bool:
    """Whether no size is lost once these dimensions are fixed."""
    return any(_carried_at(size, model, target, fixed) for size in TRIED)


def _carried_at(size: int, model: ir.Model, target: Target, fixed: list[str]) -> bool:
    from graphopt.backends.tvm_build import imported
    from graphopt.base import Context
    from graphopt.files.input_sizes import fix_sizes
    from graphopt.manager import PassManager
    from graphopt.pipeline.clone import private_clone
    from graphopt.progress import Silent
    from graphopt.spec import parse

    copy = private_clone(model)
    context = Context(target, None, None, seed=0, jobs=1, progress=Silent())
    try:
        fix_sizes(copy, dict.fromkeys(fixed, size), {})
        ready = PassManager(parse(target.prepare), []).run(copy, context) if target.prepare else copy
        return not lost_sizes(imported(ready))
    except GraphoptError:
        return False
