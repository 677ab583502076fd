"""Write LSTM as ONNX Runtime's DynamicQuantizeLSTM: int8 weights, inputs and states quantised as they arrive.

    gates_t = (x_t^ @ W^) s_x s_W + (h_t-1^ @ R^) s_h s_R + b       the rest of the cell in float

Its weights are those of LSTM with the last two axes exchanged, one scale per direction and gate or per direction; bias,
lengths, initial states, peepholes and attributes stay as they are. There is no such operator for GRU and RNN.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.quantization.dynamic.products import take_over
from graphopt.quantization.rounding.interface import Rounding, WeightGrid
from graphopt.rewriting.constants import array, constant
from graphopt.rewriting.edit import new_initializer
from graphopt.rewriting.names import Names

DOMAIN = "com.microsoft"

_ATTRIBUTES = (
    "activation_alpha", "activation_beta", "activations", "clip", "direction", "hidden_size", "input_forget"
)  # fmt: skip
"""What the two operators have in common; `layout` is not among them."""


def recurrent_reason(node: ir.Node) -> str | None:
    """Why an LSTM cannot be written as DynamicQuantizeLSTM; None where it can."""
    if len(node.inputs) < 3 or any(v is None for v in node.inputs[:3]):
        return "an input is missing"
    if node.attributes.get_int("layout", 0):
        return "its batch comes first (layout=1), which ONNX Runtime's LSTM kernels do not take"
    for value, what in zip(node.inputs[1:3], ("weight", "recurrence weight"), strict=True):
        tensor = constant(value)
        if tensor is None:
            return f"its {what} is computed: fold first"
        if tensor.dtype != ir.DataType.FLOAT:
            return f"its {what} is {tensor.dtype.name.lower()}, not float32"
        if len(tensor.shape) != 3 or 0 in tensor.shape.numpy():
            return f"its {what} has shape {tuple(tensor.shape.numpy())}, not directions x 4 hidden x inputs"
        if not np.isfinite(np.asarray(array(value))).all():
            return f"its {what} holds inf or nan"
    return None


@dataclass
class RecurrentWriter:
    """Rewrites LSTM nodes of one model; a weight that several of them read is quantised once.

    A rounding is asked for the weights of a node under its key followed by `.W` and `.R`.

    Args:
        model: changed in place.
        rounding: what decides how weights are rounded.
        per_channel: one scale per direction and gate; else one per direction.
    """

    model: ir.Model
    rounding: Rounding
    per_channel: bool = True

    def __post_init__(self) -> None:
        self._names = Names(self.model)
        self._weights: dict[ir.Value, tuple[ir.Value, ir.Value, ir.Value]] = {}

    def write(self, node: ir.Node) -> None:
        """Replace an LSTM that `recurrent_reason` has nothing against."""
        x, weight, recurrence, *rest = node.inputs
        assert weight is not None and recurrence is not None
        w, w_scale, w_zero = self._weight(node, weight, "W")
        r, r_scale, r_zero = self._weight(node, recurrence, "R")
        rest = [*rest, *[None] * (5 - len(rest))]
        attributes = [a for name, a in node.attributes.items() if name in _ATTRIBUTES]
        if "hidden_size" not in node.attributes:
            attributes.append(ir.AttrInt64("hidden_size", int(r.shape[1])))  # type: ignore[index, arg-type]
        outputs = [
            ir.Value(name=self._names.fresh(f"{v.name}_quantized") if v.name else "", type=v.type, shape=v.shape)
            for v in node.outputs
        ]
        quantised = ir.Node(
            DOMAIN, "DynamicQuantizeLSTM", [x, w, r, *rest, w_scale, w_zero, r_scale, r_zero], attributes,
            outputs=outputs, name=node.name, metadata_props=dict(node.metadata_props),
        )  # fmt: skip
        assert node.graph is not None
        node.graph.insert_before(node, quantised)
        take_over(node, outputs)
        self.model.graph.opset_imports.setdefault(DOMAIN, 1)

    def _weight(self, node: ir.Node, weight: ir.Value, what: str) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Integers (directions, inputs, 4 hidden), scales and zero points, in the main graph."""
        if weight not in self._weights:
            data = np.asarray(array(weight), np.float64)
            key = next(v.name for v in node.outputs if v.name)
            rounded = self.rounding(f"{key}.{what}", data, WeightGrid(per_channel=self.per_channel))
            integers = rounded.integers.swapaxes(1, 2).astype(np.int8)
            directions = data.shape[0]
            scale = rounded.scale[:, :, 0] if self.per_channel else np.repeat(rounded.scale.reshape(1), directions)
            graph, stem = self.model.graph, str(weight.name)
            self._weights[weight] = (
                new_initializer(graph, self._names.fresh(f"{stem}_quantized"), integers, ir.DataType.INT8),
                new_initializer(graph, self._names.fresh(f"{stem}_scale"), scale, ir.DataType.FLOAT),
                new_initializer(
                    graph, self._names.fresh(f"{stem}_zero_point"), np.zeros(scale.shape, np.int8), ir.DataType.INT8
                ),
            )
        return self._weights[weight]
