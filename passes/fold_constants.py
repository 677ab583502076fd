"""fold-constants: what depends on constants only is computed now.

Constant nodes become initializers (by reference: no weight is read), shapes that are known become constants through
their Gather, Slice and arithmetic, symbolic dimensions stay symbolic, an If whose condition is constant becomes the
branch taken, and constant cones are computed where that does not inflate the file
(`graphopt.rewriting.constant_cones`).

The evaluation, shape propagation and the inlining of If are onnxscript's `optimizer.fold_constants` (onnx's reference
implementation of the operators, in numpy). Its own limits (8192 elements in, 262144 out) are not used: which node may
be folded is decided here.
"""

from __future__ import annotations

import ast
import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.base import Context, Effect, Pass, PassResult, Skip, option
from graphopt.files.shape_inference import infer_shapes
from graphopt.rewriting.constant_cones import NEVER, Plan, tell
from graphopt.rewriting.constants import allow_private_initializers, array, constant_node_tensor
from graphopt.rewriting.dead_code import remove_dead
from graphopt.rewriting.edit import cannot_replace, new_initializer, remove_node, replace_value
from graphopt.rewriting.names import Names
from graphopt.rewriting.nodes import is_onnx, label, mark_origin
from graphopt.rewriting.scopes import graphs, scopes
from graphopt.rewriting.weight_pass import begun

_TINY = 16
"""Elements: a result this small takes less room than the node that makes it."""
_MAX_SWEEPS = 20
_ONNXSCRIPT_ORIGIN = "pkg.onnxscript.optimizer.folded_from"
_MAX_ORIGINS = 16


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Compute what depends on constants only, and make initializers of Constant nodes.

    Does not fire: where the result takes more room than what it replaces (`max_growth`; Expand, Tile, ConstantOfShape,
    Range and tables stay computed), on tensors above `max_bytes`, on QuantizeLinear and DequantizeLinear, on random
    operators, on nodes that make a graph output. In model-local functions, where nothing is known of the shapes that a
    caller brings, what depends on constants alone is computed and stays a Constant node. Preserves: graph inputs except
    the overridable initializers, graph outputs, symbolic dimensions, names.
    Source: onnxscript's constant folding; the limits and the choice of nodes are ours.
    """

    name: ClassVar[str] = "fold-constants"
    effect: ClassVar[Effect] = Effect.EXACT
    max_growth: int = option(0, "bytes by which folding one constant subgraph may grow the file", low=0)
    max_bytes: int = option(1 << 24, "bytes of the largest tensor that is read or made", low=0)
    keep_overridable: bool = option(False, "leave initializers alone that are also graph inputs")
    static: bool = option(False, "compute every constant subgraph up to max_bytes, whatever the file grows")

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Fold until nothing more becomes constant."""
        result = begun(model, keep_overridable=self.keep_overridable)
        lifted = _lift_constants(model)
        folded = 0
        failures: list[str] = []
        growth = sys.maxsize if self.static else self.max_growth
        plan = Plan(model, max_growth=growth, max_bytes=self.max_bytes)
        infer = not _shapes_known(model)
        for sweep in range(_MAX_SWEEPS):
            ctx.progress.step("fold-constants", sweep)
            before = _count(model)
            known = _fold_known_dimensions(model)
            modified = _onnxscript_sweep(model, plan, failures, infer=infer)
            # Half of a sweep is inference of shapes; after one with it another is needed once something has changed.
            infer = not infer
            # Shape nodes that onnxscript resolved come out as Constant nodes.
            again = _lift_constants(model)
            dead = remove_dead(model)
            result.changed = result.changed or bool(known or modified or again or any(dead))
            folded += max(0, before - _count(model))
            if not (known or modified or again or (sweep == 0 and plan.unsized)):
                break
            if self.static:
                # It knows more than the inference of single nodes: what is told by readers, in bodies, by arithmetic.
                infer_shapes(model)
            plan = Plan(model, max_growth=growth, max_bytes=self.max_bytes)
        else:
            result.notes.append(
                f"warning: constant folding still found work after {_MAX_SWEEPS} sweeps and was stopped"
            )
        _translate_origins(model)
        if lifted:
            result.notes.append(f"{lifted} Constant nodes became initializers")
        if folded:
            result.notes.append(f"{folded} nodes computed ahead or no longer needed")
        result.notes.extend(dict.fromkeys(failures))
        result.changed = result.changed or bool(lifted)
        if result.changed and (note := allow_private_initializers(model)):
            result.notes.append(note)
        result.skipped.extend(Skip(name, reason) for name, reason in tell(plan.refused))
        return result


def _count(model: ir.Model) -> int:
    return sum(not is_onnx(node, "Constant") for graph, _ in scopes(model) for node in graph)


def _shapes_known(model: ir.Model) -> bool:
    """Whether every dimension of every result in the main graph and its bodies has a number or a name already."""
    nodes = (node for graph in graphs(model) for node in graph if not is_onnx(node, "Constant"))
    return all(_shape_known(value) for node in nodes for value in node.outputs)


def _shape_known(value: ir.Value) -> bool:
    if value.shape is None or value.type is None:
        return False
    return all(isinstance(d, int) or d.value is not None for d in value.shape)


def _lift_constants(model: ir.Model) -> int:
    """Turn Constant nodes into initializers of the same graph, with the same name and the same tensor object."""
    count = 0
    for graph in graphs(model):
        for node in tuple(graph):
            if not is_onnx(node, "Constant"):
                continue
            tensor = constant_node_tensor(node)
            old = node.outputs[0]
            # An output that is an initializer would be legal, but several runtimes refuse it in a body.
            if tensor is None or old.is_graph_output() or not old.name or old.name in graph.initializers:
                continue
            name = old.name
            old.name = None
            tensor.name = name
            value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=_shape(tensor), const_value=tensor)
            graph.register_initializer(value)
            old.replace_all_uses_with(value)
            graph.remove(node, safe=True)
            count += 1
    return count


def _shape(tensor: ir.TensorProtocol) -> ir.Shape:
    return ir.Shape([int(d) for d in tensor.shape.numpy()])


def _fold_known_dimensions(model: ir.Model) -> int:
    """Gather and Slice of a Shape whose dimensions asked for are known, while others are symbolic."""
    names: Names | None = None
    count = 0
    for graph in graphs(model):
        for node in tuple(graph):
            dims = _selected_dimensions(node)
            if dims is None or node.outputs[0].is_graph_output():
                continue
            names = names or Names(model)
            value = new_initializer(graph, names.fresh(f"{node.outputs[0].name}_known"), dims, ir.DataType.INT64)
            mark_origin(value, [label(node)])
            if cannot_replace(node.outputs[0], value) is None:
                replace_value(node.outputs[0], value)
                remove_node(node)
                count += 1
    return count


def _selected_dimensions(node: ir.Node) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]] | None:
    """What a Gather or Slice takes out of a Shape, where these dimensions are numbers."""
    if not is_onnx(node, "Gather", "Slice") or node.inputs[0] is None:
        return None
    shape_node = node.inputs[0].producer()
    if shape_node is None or not is_onnx(shape_node, "Shape") or shape_node.inputs[0] is None:
        return None
    shape = shape_node.inputs[0].shape
    if shape is None:
        return None
    dims = list(shape)[shape_node.attributes.get_int("start", 0) : shape_node.attributes.get_int("end", None)]
    # -1 marks an unknown dimension: no true one is negative.
    numbers = np.array([d if isinstance(d, int) else -1 for d in dims], dtype=np.int64)
    if is_onnx(node, "Gather"):
        index = array(node.inputs[1])
        if index is None or node.attributes.get_int("axis", 0) != 0:
            return None
        if index.size == 0 or index.min() < -len(numbers) or index.max() >= len(numbers):
            return None
        chosen = numbers[index]
    else:
        bounds = [array(v) for v in node.inputs[1:]]
        if len(bounds) < 2 or any(b is None or b.size != 1 for b in bounds):
            return None
        start, end, *rest = (int(b.reshape(-1)[0]) for b in bounds if b is not None)
        if rest and rest[0] not in (0, -1):
            return None
        step = rest[1] if len(rest) > 1 else 1
        if step <= 0:
            return None
        chosen = numbers[start:end:step]
    return None if (chosen < 0).any() else np.asarray(chosen, dtype=np.int64)


def _onnxscript_sweep(model: ir.Model, plan: Plan, failures: list[str], *, infer: bool) -> bool:
    from onnxscript.optimizer import fold_constants

    asked: list[str] = []

    def should_fold(node: ir.Node) -> bool:
        asked.append(label(node))
        if is_onnx(node, *NEVER) or len(node.outputs) != 1 or node.outputs[0].is_graph_output():
            return False
        if node in plan.fold:
            return True
        if node in plan.refused and node not in plan.unsized:
            return False
        # It became constant in this sweep; the next plan decides unless the result is tiny.
        shape = node.outputs[0].shape
        known = shape is not None and all(isinstance(d, int) for d in shape)
        return known and shape is not None and int(np.prod(shape.numpy())) <= _TINY

    with _listening(asked, failures), _declared_shapes_hidden(model):
        result = fold_constants(
            model, onnx_shape_inference=infer, input_size_limit=0, output_size_limit=2**62, should_fold=should_fold
        )
    return bool(result.modified)


@contextlib.contextmanager
def _declared_shapes_hidden(model: ir.Model) -> Iterator[None]:
    """Hide the shapes that graphs declare for their outputs, which onnxscript would take for facts.

    It propagates them backwards through Identity, and a stale static dimension (runtimes only warn about those) would
    become a constant of the model.
    """
    declared = [(graph, [v.shape for v in graph.outputs]) for graph in graphs(model)]
    for graph, _ in declared:
        for value in graph.outputs:
            if value.producer() is not None:
                value.shape = None
    try:
        yield
    finally:
        for graph, shapes in declared:
            # An output may be another value now, under the same name; a body that was inlined has none any more.
            for value, shape in zip(graph.outputs, shapes, strict=False):
                value.shape = shape


@contextlib.contextmanager
def _listening(asked: list[str], failures: list[str]) -> Iterator[None]:
    """Collect what onnxscript logs about operators it could not evaluate, with the node's name, instead of printing."""

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "Evaluation failed" in record.msg:
                failures.append(f"{asked[-1] if asked else 'a node'} stays: {record.getMessage()}")

    logger = logging.getLogger("onnxscript.optimizer._constant_folding")
    handler, propagate = Collect(logging.WARNING), logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


def _translate_origins(model: ir.Model) -> None:
    """Keep the provenance that onnxscript noted, under our key and bounded; only an initializer's reaches the file."""
    for graph in graphs(model):
        for node in graph:
            for value in node.outputs:
                value.metadata_props.pop(_ONNXSCRIPT_ORIGIN, None)
        for value in graph.initializers.values():
            noted = value.metadata_props.pop(_ONNXSCRIPT_ORIGIN, None)
            if noted is not None:
                origins = sorted(ast.literal_eval(noted))
                more = [f"({len(origins) - _MAX_ORIGINS} more)"] if len(origins) > _MAX_ORIGINS else []
                mark_origin(value, [*origins[:_MAX_ORIGINS], *more])
