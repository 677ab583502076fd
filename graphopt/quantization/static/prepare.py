"""Exact rewrites that give an operator the form for which runtimes have an integer kernel."""

from __future__ import annotations

import onnx_ir as ir

from graphopt.analysis.centred import square_of, uncast
from graphopt.files.opset import raise_opset
from graphopt.files.shape_inference import infer_shapes
from graphopt.rewriting.constants import array
from graphopt.rewriting.edit import bypass
from graphopt.rewriting.names import Names
from graphopt.rewriting.nodes import is_onnx, label

MIN_OPSET = 13
"""QuantizeLinear and DequantizeLinear take one scale per channel from here on."""


def to_integer_form(model: ir.Model) -> list[str]:
    """What static int8 asks of a model before it is planned, in place: the opset, shapes, operators with kernels.

    Returns:
        sentences for the report.
    """
    raised = raise_opset(model, MIN_OPSET, "int8 with one scale per channel")
    notes = [raised] if raised else []
    infer_shapes(model)
    pools = spatial_means_to_pools(model)
    if pools:
        notes.append(f"{len(pools)} ReduceMean over space written as GlobalAveragePool, an integer kernel")
    return notes


def spatial_means_to_pools(model: ir.Model) -> list[str]:
    """ReduceMean over all spatial axes becomes GlobalAveragePool, and a Flatten where the axes are not kept.

        mean over axes 2.. of (N, C, d1, d2, ...)  =  GlobalAveragePool, of shape (N, C, 1, 1, ...)

    Does not fire where the rank is unknown or other axes are reduced, and on the mean of a written-out normalisation,
    which runtimes fuse by its form: the last axis of a sequence would pass for a spatial one.

    Returns:
        The labels of the nodes replaced.
    """
    graph, names, done = model.graph, Names(model), []
    for node in list(graph):
        if not is_onnx(node, "ReduceMean") or not _is_spatial(node) or _normalises(node):
            continue
        source, output = node.inputs[0], node.outputs[0]
        title = label(node)
        flat = not node.attributes.get_int("keepdims", 1)
        pool = ir.node("GlobalAveragePool", [source], name=names.fresh(f"{title}_pool" if flat else f"{title}_mean"))
        pool.outputs[0].name = names.fresh(f"{output.name}_pool")
        pool.outputs[0].type = output.type
        graph.insert_before(node, pool)
        new = pool.outputs[0]
        if flat:
            flatten = ir.node("Flatten", [new], {"axis": 1}, name=names.fresh(f"{title}_flatten"))
            flatten.outputs[0].name = names.fresh(f"{output.name}_flat")
            flatten.outputs[0].type = output.type
            graph.insert_before(node, flatten)
            new = flatten.outputs[0]
        new.shape = output.shape
        if bypass(node, new, origin_of=new.producer()) is None:
            done.append(title)
    return done


def _normalises(mean: ir.Node) -> bool:
    """Whether a mean is one of squares, or is subtracted from the tensor it was taken of."""
    source = uncast(mean.inputs[0])
    subtracted = (use.node for use in mean.outputs[0].uses() if is_onnx(use.node, "Sub") and use.idx == 1)
    return square_of(source) is not None or any(uncast(node.inputs[0]) is source for node in subtracted)


def _is_spatial(node: ir.Node) -> bool:
    source = node.inputs[0]
    shape = source.shape if source is not None else None
    if shape is None or len(shape) < 3 or source is None or source.dtype not in (ir.DataType.FLOAT, None):
        return False
    given = array(node.inputs[1]) if len(node.inputs) > 1 else node.attributes.get_ints("axes", None)
    if given is None:
        return False
    rank = len(shape)
    return sorted(int(a) % rank for a in given) == list(range(2, rank))
