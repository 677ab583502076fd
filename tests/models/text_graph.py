"""Small models from ONNX text."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.model import infer_shapes


def graph(
    signature: str, body: str, *, opset: int = 17, imports: str = "", seed: int = 0, **parameters: Any
) -> ir.Model:
    """A model from its signature, its nodes and its parameters (arrays, or shapes filled with random values).

    Shapes are inferred; node lines are separated by newlines or two spaces.
    """
    random = np.random.default_rng(seed)
    domains = f'"" : {opset}' + (f", {imports}" if imports else "")
    lines = "\n".join(part.strip() for line in body.splitlines() for part in line.split("  ") if part.strip())
    # The text format cannot leave an initializer without values: parameters are declared as inputs first.
    declared = "".join(f", {_type(value)} {name}" for name, value in parameters.items())
    signature = signature.replace(")", f"{declared})", 1)
    model = ir.from_onnx_text(f"<ir_version: 8, opset_import: [{domains}]>\nagraph {signature}\n{{\n{lines}\n}}")
    for name, value in parameters.items():
        array = random.normal(size=value).astype(np.float32) if isinstance(value, tuple) else value
        parameter = next(v for v in model.graph.inputs if v.name == name)
        model.graph.inputs.remove(parameter)
        parameter.const_value = ir.Tensor(array, name=name)
        parameter.shape = ir.Shape(array.shape)
        parameter.dtype = ir.DataType.from_numpy(array.dtype)
        model.graph.register_initializer(parameter)
    infer_shapes(model)
    return model


def _type(value: Any) -> str:
    if isinstance(value, tuple):
        return f"float[{','.join(map(str, value))}]"
    array = np.asarray(value)
    kind = {
        "int64": "int64",
        "float32": "float",
        "float64": "double",
        "float16": "float16",
        "bfloat16": "bfloat16",
        "bool": "bool",
        "int32": "int32",
        "int16": "int16",
        "int8": "int8",
        "uint8": "uint8",
    }[array.dtype.name]
    return f"{kind}[{','.join(map(str, array.shape))}]" if array.ndim else kind
