"""`graphopt.from_torch`: a torch module becomes an ONNX model whose weights have the module's names.

Through `torch.export` and torch's own ONNX exporter. The exporter's optimiser is left off, because it renames and folds
weights; instead constants are folded around the parameters, and parameters that are merely transposed or rearranged
before they are used are stored as they are used (`graphopt.fx.layout`). The result is run beside the module.
"""

from __future__ import annotations

import ast
import contextlib
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from graphopt.analysis import shapes
from graphopt.errors import ModelError, UsageError, VerificationError
from graphopt.fx.extra import require_torch
from graphopt.fx.layout import Moved, store_moved

if TYPE_CHECKING:
    import torch

_SCOPES = "pkg.torch.onnx.name_scopes"
"""Metadata of the exporter on a node: the paths of the modules around it and its own. All else is dropped: it holds
source code and paths of the machine, which no file may carry."""

MODULE = "graphopt.module"
"""Key in the `metadata_props` of a node: the path of the module that it comes from."""

SOURCE = "graphopt.source"
"""Key of a node's `meta`, which is never written: the file, the line and the code that it comes from."""


@dataclass(frozen=True)
class Exported:
    """A model, and how its stored tensors follow from the parameters of the module.

    Attributes:
        model: the model.
        moved: by initializer, where it is not simply the parameter of that name.
        feeds: the example inputs, by the model's input names.
        expected: what the module computes on them, one array an output.
    """

    model: ir.Model
    moved: dict[str, Moved]
    feeds: dict[str, np.ndarray[Any, Any]]
    expected: list[np.ndarray[Any, Any]]


def from_torch(
    module: torch.nn.Module | torch.export.ExportedProgram,
    example_inputs: Any = None,
    *,
    dynamic_shapes: Any = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    opset: int | None = None,
) -> ir.Model:
    """Make an ONNX model of a torch module, in evaluation mode.

    Initializers have the names of the module's `state_dict` (a tied parameter one of its names). A parameter that is
    only used transposed or rearranged, as the weight of a linear layer, is stored in the order in which it is used;
    several that are only used joined (the two biases of an LSTM) are stored joined, under the name of the joint.

    Args:
        module: any module that `torch.export` takes, or what it gives. Its mode and weights stay as they are.
        example_inputs: a tensor, a tuple of positional arguments or a mapping of keyword arguments; for an
            ExportedProgram by default its own.
        dynamic_shapes: as `torch.export.export` takes it, or "batch": axis 0 of every input is symbolic, "batch".
        input_names, output_names: names of the model's inputs and outputs; default: the exporter's.
        opset: version of the operator set; default: the exporter's.

    Raises:
        MissingBackendError: torch is not installed.
        ModelError: the module cannot be exported.
        VerificationError: the model does not compute what the module does on the example inputs.
    """
    return export(module, example_inputs, dynamic_shapes, input_names, output_names, opset).model


def export(
    module: torch.nn.Module | torch.export.ExportedProgram,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    opset: int | None = None,
) -> Exported:
    """As `from_torch`, with the relation between stored tensors and parameters; see `Exported`."""
    require_torch("from_torch")
    import torch

    program = isinstance(module, torch.export.ExportedProgram)
    if example_inputs is None:
        if not program or module.example_inputs is None:
            raise UsageError("there are no example inputs", where="from_torch", hint="give example_inputs")
        args, kwargs = module.example_inputs
    else:
        args, kwargs = arguments(example_inputs)
    if dynamic_shapes == "batch":
        args, kwargs = _at_least_two(args), _at_least_two(kwargs)
        dynamic_shapes = _batch_axes(args, kwargs)
    with contextlib.nullcontext() if program else evaluation_mode(module):
        made = _export(module, args, kwargs, dynamic_shapes, input_names, output_names, opset)
        callee = module.module() if program else module
        with torch.no_grad():
            outputs = callee(*args, **kwargs)
    model = made.model
    moved = _clean(model, set(module.state_dict if program else module.state_dict()))
    tensors = [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    names = [value.name or "" for value in model.graph.inputs]
    if len(tensors) != len(names):
        raise ModelError(
            f"the module takes {len(tensors)} tensors and the exported model {len(names)} ({', '.join(names)})",
            where="from_torch",
            hint="leave out arguments that the module does not use",
        )
    feeds = {name: as_array(tensor) for name, tensor in zip(names, tensors, strict=True)}
    expected = [as_array(leaf) for leaf in leaves(outputs) if isinstance(leaf, torch.Tensor)]
    _verify(model, feeds, expected)
    return Exported(model, moved, feeds, expected)


def arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a call from what users give as example inputs."""
    import torch

    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return tuple(example_inputs), {}


def leaves(tree: Any) -> list[Any]:
    """The leaves of nested tuples, lists and mappings, in torch's order."""
    from torch.utils import _pytree

    return list(_pytree.tree_leaves(tree))


def as_array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """A tensor as a numpy array on the CPU."""
    import torch

    found = tensor.detach().cpu()
    if found.dtype == torch.bfloat16:
        import ml_dtypes

        return np.asarray(found.view(torch.int16).numpy()).view(ml_dtypes.bfloat16)
    return np.asarray(found.numpy())


def as_tensor(array: np.ndarray[Any, Any]) -> torch.Tensor:
    """A numpy array as a tensor on the CPU, of the same memory."""
    import ml_dtypes
    import torch

    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


@contextlib.contextmanager
def evaluation_mode(module: torch.nn.Module) -> Iterator[None]:
    """The module in evaluation mode; afterwards every part of it is in the mode it was in."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def _at_least_two(tree: Any) -> Any:
    """torch.export takes a size of 1 for a constant, so single samples are doubled."""
    import torch
    from torch.utils import _pytree

    def double(leaf: Any) -> Any:
        single = isinstance(leaf, torch.Tensor) and leaf.ndim and leaf.shape[0] == 1
        return torch.cat([leaf, leaf]) if single else leaf

    return _pytree.tree_map(double, tree)


def _batch_axes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    import torch
    from torch.utils import _pytree

    batch = torch.export.Dim("batch")

    def axes(leaf: Any) -> Any:
        return {0: batch} if isinstance(leaf, torch.Tensor) and leaf.ndim else None

    found = _pytree.tree_map(axes, (args, kwargs))
    return tuple(found[0]) if not kwargs else dict(found[1])


def _export(
    module: Any, args: Any, kwargs: Any, dynamic_shapes: Any, inputs: Any, outputs: Any, opset: int | None
) -> Any:
    import torch

    quiet = logging.getLogger("torch.onnx")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.onnx.export(
                module,
                args,
                kwargs=kwargs or None,
                dynamo=True,
                optimize=False,
                verbose=False,
                dynamic_shapes=dynamic_shapes,
                input_names=inputs,
                output_names=outputs,
                opset_version=opset,
            )
    except Exception as error:
        # The exporter wraps what torch.export says in pages of advice; the innermost first line is the cause.
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        line = next((text for text in str(cause).splitlines() if text.strip()), type(cause).__name__)
        raise ModelError(
            f"torch cannot export the module ({type(cause).__name__}: {line.strip()[:300]})",
            where=type(module).__name__,
            hint="see torch.export.export(module, args, dynamic_shapes=...), which says more",
        ) from error
    finally:
        quiet.setLevel(level)


def _clean(model: ir.Model, names: set[str]) -> dict[str, Moved]:
    """Fold constants around the parameters, store moved parameters, in place."""
    from graphopt import model as models

    graph = model.graph
    for node in model.graph.all_nodes():
        scopes, source = ast.literal_eval(node.metadata_props.get(_SCOPES, "()")), _source(node)
        if source:
            node.meta[SOURCE] = source
        node.metadata_props.clear()
        if len(scopes) > 1:
            node.metadata_props[MODULE] = str(scopes[-2])
    for value in [
        *graph.inputs,
        *graph.initializers.values(),
        *(v for n in model.graph.all_nodes() for v in n.outputs),
    ]:
        value.metadata_props.clear()
    model.metadata_props.clear()
    graph.metadata_props.clear()
    # As inputs, parameters are nothing that could be folded.
    held = {}
    for name in [n for n in graph.initializers if n in names]:
        value = graph.initializers.pop(name)
        held[value], value.const_value = value.const_value, None
        graph.inputs.append(value)
    models.infer_shapes(model)
    _fold(model)
    _drop_zero_biases(graph)
    for value, tensor in held.items():
        graph.inputs.remove(value)
        value.const_value = tensor
        if value.uses() or value.is_graph_output():
            graph.register_initializer(value)
    for name in [n for n, value in graph.initializers.items() if not value.uses() and not value.is_graph_output()]:
        del graph.initializers[name]
    models.infer_shapes(model)
    moved = store_moved(model)
    models.infer_shapes(model)
    models.check(model)
    return moved


def _source(node: ir.Node) -> str:
    """The innermost line outside of torch of the exporter's stack trace, "" where there is none."""
    lines = node.metadata_props.get("pkg.torch.onnx.stack_trace", "").splitlines()
    for place, code in reversed(list(zip(lines[::2], lines[1::2], strict=False))):
        found = re.fullmatch(r'\s*File "(.*)", line (\d+), in .*', place)
        if found is not None and "/torch/" not in found[1].replace("\\", "/"):
            return f"{PurePath(found[1]).name}, line {found[2]}: {code.strip()}"
    return ""


def _drop_zero_biases(graph: ir.Graph) -> None:
    """The exporter gives convolutions without a bias one of zeros, which is no parameter of the module."""
    for node in graph:
        if node.op_type in {"Conv", "ConvTranspose"} and len(node.inputs) > 2:
            bias = shapes.constant(node.inputs[2])
            if bias is not None and not bias.any():
                node.resize_inputs(2)


def _fold(model: ir.Model) -> None:
    from graphopt import registry
    from graphopt.base import Context
    from graphopt.model import infer_shapes
    from graphopt.progress import Silent

    context = Context(registry.target("cpu"), None, None, 0, 1, Silent())
    for _ in range(2):
        for name in ("fold-constants", "remove-identities", "dedupe-initializers", "remove-dead-code"):
            registry.pass_class(name)().run(model, context)
            infer_shapes(model)


def _verify(model: ir.Model, feeds: Mapping[str, Any], expected: Sequence[Any]) -> None:
    from graphopt.executor import Session
    from graphopt.verify import tolerance

    with Session(model) as session:
        found = session.run(feeds)
    for (name, array), wanted in zip(found.items(), expected, strict=True):
        if array.shape != wanted.shape:
            raise VerificationError(
                f"its shape is {list(array.shape)}, the module's output has {list(wanted.shape)}",
                where=f"output {name}",
                hint="report it, with the module",
            )
        gap = np.linalg.norm(np.subtract(array, wanted, dtype=np.float64))
        size = np.linalg.norm(wanted.astype(np.float64))
        if not gap <= tolerance(array.dtype) * max(float(size), 1e-6):
            raise VerificationError(
                f"differs from the module's by {gap:.3g} of {size:.3g} on the example inputs",
                where=f"output {name}",
                hint="export with torch.export first and compare, or leave out what depends on random numbers",
            )
