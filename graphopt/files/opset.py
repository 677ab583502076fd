"""Raise the opset of a model through onnx's version converter, without copying its weights."""

from __future__ import annotations

import onnx_ir as ir

from graphopt.errors import ModelError
from graphopt.files.shape_inference import infer_shapes
from graphopt.pipeline.clone import private_clone

SMALL = 1024
"""Initialisers up to this many bytes go through the converter by value: its adapters read axes, shapes and scales."""


def opset_of(model: ir.Model) -> int:
    """The version of the default operator set that the model imports; 1 where it says nothing."""
    imports = model.graph.opset_imports
    return int(imports.get("", imports.get("ai.onnx", 1)))


def raise_opset(model: ir.Model, version: int, why: str) -> str | None:
    """Convert the model, in place, to at least this version of the default operator set.

    Names of nodes, values and parameters stay; the IR version rises where the new opset asks for it.

    Args:
        model: the model.
        version: the lowest opset that will do.
        why: what needs it, for the report.

    Returns:
        A sentence for the report; None where the opset is high enough already.

    Raises:
        ModelError: the converter cannot do it.
    """
    from onnx import helper, version_converter

    old = opset_of(model)
    if old >= version:
        return None
    hint = f"export the model again with opset {version} or later"
    if model.functions:
        raise ModelError(
            f"{why} needs opset {version}; it has {old}, and models with local functions cannot be converted", hint=hint
        )
    light = private_clone(model)
    inputs = [v.name for v in light.graph.inputs]
    weights = {}
    for name, value in list(light.graph.initializers.items()):
        tensor = value.const_value
        if tensor is not None and tensor.nbytes > SMALL:
            weights[name] = tensor
            value.type, value.shape = ir.TensorType(tensor.dtype), ir.Shape(tuple(int(d) for d in tensor.numpy().shape))
            del light.graph.initializers[name]
            if name not in inputs:
                light.graph.inputs.append(value)
            value.const_value = None
    try:
        converted = ir.from_proto(version_converter.convert_version(ir.to_proto(light), version))
    except Exception as error:
        # The converter raises RuntimeError, ConvertError or whatever an adapter throws.
        reason = " ".join(str(error).split())[:300]
        what = f"{why} needs opset {version}, and converting from {old} failed ({reason})"
        raise ModelError(what, hint=hint) from error
    by_output = {node.outputs[0].name: node for node in model.graph if node.outputs}
    for value in list(converted.graph.inputs):
        if value.name in weights:
            value.const_value = weights[value.name]
            converted.graph.register_initializer(value)
            if value.name not in inputs:
                converted.graph.inputs.remove(value)
    taken = {node.name for node in converted.graph}
    for node in converted.graph:
        before = by_output.get(node.outputs[0].name) if node.outputs else None
        if before is not None:
            if not node.name and before.name not in taken:
                node.name = before.name
            node.metadata_props.update(before.metadata_props)
    model.graph = converted.graph
    least = helper.find_min_ir_version_for([helper.make_opsetid("", version)])
    model.ir_version = max(model.ir_version or 0, least)
    infer_shapes(model)
    return f"opset {old} -> {version}: {why} needs it"
