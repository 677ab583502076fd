"""Tiny passes and a small network for the tests of the manager, the gates and the API."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.base import Context, Effect, Pass, PassResult, Skip, option
from graphopt.errors import DataError

TEXT = """
<ir_version: 10, opset_import: ["" : 20]>
small (float[N, 4] x) => (float[N, 3] y)
<float[4, 3] w = {0.5, 1.25, 0.25, 2, 0.75, 1, 0.375, 1.5, 0.625, 1.75, 0.125, 0.875}, float[3] b = {0.1, 0.2, 0.3}>
{
    same = Identity (x)
    product = MatMul (same, w)
    sum = Add (product, b)
    y = Relu (sum)
}
"""


def small_model() -> ir.Model:
    """x -> Identity -> MatMul -> Add -> Relu -> y, four features to three."""
    from graphopt.model import infer_shapes

    model = ir.from_onnx_text(TEXT)
    infer_shapes(model)
    return model


def feeds(samples: int = 16) -> dict[str, np.ndarray[Any, Any]]:
    """Calibration arrays for the small model, positive so that every ReLU is open."""
    return {"x": (np.random.default_rng(1).random((samples, 4)) + 0.5).astype(np.float32)}


def scale(model: ir.Model, name: str, factor: Any) -> None:
    value = model.graph.initializers[name]
    assert value.const_value is not None
    array = value.const_value.numpy() * np.asarray(factor, np.float32)
    value.const_value = ir.Tensor(array.astype(np.float32), name=name)


class _Base(Pass):
    effect: ClassVar[Effect] = Effect.EXACT


@dataclass(frozen=True)
class DropIdentity(_Base):
    """Remove Identity nodes: a correct exact pass."""

    name: ClassVar[str] = "drop-identity"

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        found = [node for node in model.graph if node.op_type == "Identity"]
        for node in found:
            source = node.inputs[0]
            assert source is not None
            node.outputs[0].replace_all_uses_with(source)
            model.graph.remove(node, safe=True)
        return PassResult(changed=bool(found), skipped=[Skip("sum", "is no Identity")], notes=[f"{len(found)} removed"])


@dataclass(frozen=True)
class Wrong(_Base):
    """Claims to be exact and changes what is computed."""

    name: ClassVar[str] = "wrong"

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        scale(model, "w", 1.01)
        return PassResult(changed=True)


@dataclass(frozen=True)
class Dangling(_Base):
    """Leaves a graph in which a value has no producer."""

    name: ClassVar[str] = "dangling"

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        node = next(n for n in model.graph if n.op_type == "MatMul")
        node.replace_input_with(0, ir.Value(name="nowhere", type=ir.TensorType(ir.DataType.FLOAT)))
        return PassResult(changed=True)


@dataclass(frozen=True)
class Raises(_Base):
    """Fails: with a plain exception, or with an error meant for users."""

    name: ClassVar[str] = "raises"
    for_users: bool = option(False, "raise DataError")

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        if self.for_users:
            raise DataError("the data is wrong", where="input x", hint="mend it")
        raise ZeroDivisionError("by zero")


@dataclass(frozen=True)
class Liar(_Base):
    """Changes the model and says it did not."""

    name: ClassVar[str] = "liar"

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        scale(model, "w", 2.0)
        model.graph.name = "changed"
        for value in model.graph.initializers.values():
            value.dtype = ir.DataType.DOUBLE
        return PassResult(changed=False)


@dataclass(frozen=True)
class Noise(Pass):
    """Disturb the weights by up to `level` relative, by the seed of the context: a lossy pass."""

    name: ClassVar[str] = "noise"
    effect: ClassVar[Effect] = Effect.LOSSY
    level: float = option(0.5, "relative size", low=0)

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        rng = np.random.default_rng(ctx.seed)
        scale(model, "w", 1 + self.level * rng.uniform(-1, 1, (4, 3)))
        return PassResult(changed=True)


@dataclass(frozen=True)
class Grow(Pass):
    """Add an unused kilobyte of weights: a lossy pass that makes the model larger."""

    name: ClassVar[str] = "grow"
    effect: ClassVar[Effect] = Effect.LOSSY

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        array = np.zeros(256, np.float32)
        model.graph.register_initializer(ir.Value(name="waste", const_value=ir.Tensor(array, name="waste")))
        return PassResult(changed=True)


@dataclass(frozen=True)
class Blank(Pass):
    """Turn all weights into NaN: a lossy pass that destroys the model."""

    name: ClassVar[str] = "blank"
    effect: ClassVar[Effect] = Effect.LOSSY

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        scale(model, "w", np.nan)
        return PassResult(changed=True)


@dataclass(frozen=True)
class NewOpset(_Base):
    """Raise the opset by one."""

    name: ClassVar[str] = "new-opset"

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        model.opset_imports[""] = model.opset_imports[""] + 1
        model.ir_version = model.ir_version + 1
        return PassResult(changed=True)


@dataclass(frozen=True)
class Hungry(Pass):
    """Needs calibration data, and counts how much it got."""

    name: ClassVar[str] = "hungry"
    effect: ClassVar[Effect] = Effect.LOSSY
    needs_calibration: ClassVar[bool] = True

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        assert ctx.calibration is not None
        return PassResult(changed=False, notes=[f"{ctx.calibration.samples} samples"])
