"""Golden tests of passes: a model as ONNX text, one pass, and the text of what must come out.

Graphs are compared by structure, from the outputs backwards: operators, attributes, order of inputs, values of
constants (to the dtype's rounding) and names of the interface; names of what is between may differ. The model is also
run before and after by ONNX Runtime, unoptimised, on seeded random inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime as ort

from graphopt.base import Context, Pass, PassResult
from graphopt.model import infer_shapes
from graphopt.progress import Silent
from graphopt.registry import pass_class, target
from graphopt.rewriting.constants import constant
from graphopt.rewriting.nodes import is_onnx
from graphopt.rewriting.scopes import graphs

Feeds = Mapping[str, npt.NDArray[Any]]

HEADER = '<ir_version: 8, opset_import: ["" : 17]>\n'


def context(seed: int = 0) -> Context:
    return Context(target("cpu"), None, None, seed=seed, jobs=1, progress=Silent(), resolve=pass_class)


def parse(text: str) -> ir.Model:
    """A model from ONNX text; `HEADER` is put in front where there is none."""
    model = ir.from_onnx_text(text if text.lstrip().startswith("<") else HEADER + text)
    infer_shapes(model)
    return model


def run(model: ir.Model, feeds: Feeds) -> list[npt.NDArray[Any]]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(feeds))


def random_feeds(model: ir.Model, seed: int = 0) -> dict[str, npt.NDArray[Any]]:
    """Normal numbers for the inputs; symbolic dimensions are 2, bools and integers 0 or 1."""
    generator = np.random.default_rng(seed)
    feeds = {}
    for value in model.graph.inputs:
        if value.is_initializer():
            continue
        shape = [d if isinstance(d, int) else 2 for d in value.shape or ()]
        assert value.dtype is not None
        dtype = value.dtype.numpy()
        normal = generator.standard_normal(shape)
        feeds[str(value.name)] = np.asarray(normal if dtype.kind == "f" else np.asarray(normal) > 0).astype(dtype)
    return feeds


def assert_close(got: Sequence[npt.NDArray[Any]], wanted: Sequence[npt.NDArray[Any]], tolerance: float = 1e-5) -> None:
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        if a.dtype.kind == "f":
            scale = float(np.nanmax(np.abs(b), initial=1e-6)) if np.isfinite(b).any() else 1.0
            np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(scale, 1e-6))
        else:
            np.testing.assert_array_equal(a, b)


def expect(
    before: str, after: str | None, what: Pass, *, feeds: Feeds | None = None, runnable: bool = True
) -> PassResult:
    """Run `what` on `before` and compare with `after`; None: nothing may change.

    Returns:
        What the pass said, so that reasons can be asserted.
    """
    model, wanted = parse(before), parse(after if after is not None else before)
    feeds = random_feeds(model) if feeds is None else feeds
    reference = run(model, feeds) if runnable else []
    result = what.run(model, context())
    assert_same(model, wanted)
    assert result.changed == (after is not None)
    if runnable:
        assert_close(run(model, feeds), reference)
    return result


def reasons(result: PassResult) -> str:
    return "\n".join(f"{skip.node}: {skip.reason}" for skip in result.skipped)


def assert_same(got: ir.Model, wanted: ir.Model) -> None:
    """Structural equality of two models."""
    assert [v.name for v in got.graph.inputs] == [v.name for v in wanted.graph.inputs]
    assert [v.name for v in got.graph.outputs] == [v.name for v in wanted.graph.outputs]
    counts = [sorted(n.op_type for g in graphs(m) for n in g if not is_onnx(n, "Constant")) for m in (got, wanted)]
    assert counts[0] == counts[1], f"operators {counts[0]}, wanted {counts[1]}"
    _Comparison().graphs(got.graph, wanted.graph)


class _Comparison:
    def __init__(self) -> None:
        self._matched: dict[ir.Value, ir.Value] = {}

    def graphs(self, got: ir.Graph, wanted: ir.Graph) -> None:
        assert len(got.inputs) == len(wanted.inputs)
        self._matched.update(zip(got.inputs, wanted.inputs, strict=True))
        assert len(got.outputs) == len(wanted.outputs)
        for a, b in zip(got.outputs, wanted.outputs, strict=True):
            self._values(a, b, str(b.name))

    def _values(self, got: ir.Value | None, wanted: ir.Value | None, path: str) -> None:
        if got is None or wanted is None:
            assert got is wanted, path
            return
        if got in self._matched:
            assert self._matched[got] is wanted or constant(wanted) is not None, f"{path}: another value is read"
            return
        self._matched[got] = wanted
        tensor, other = constant(got), constant(wanted)
        if tensor is not None or other is not None:
            assert tensor is not None, f"{path}: computed, wanted constant"
            assert other is not None, f"{path}: constant, wanted computed"
            assert tensor.dtype == other.dtype, path
            a, b = np.asarray(tensor.numpy()), np.asarray(other.numpy())
            assert a.shape == b.shape, f"{path}: shape {a.shape}, wanted {b.shape}"
            if a.dtype.kind in "fV":
                np.testing.assert_allclose(a.astype(np.float64), b.astype(np.float64), rtol=2e-5, atol=1e-6)
            else:
                np.testing.assert_array_equal(a, b, err_msg=path)
            return
        left, right = got.producer(), wanted.producer()
        assert left is not None, f"{path}: {got.name} is a graph input"
        assert right is not None, f"{path}: wanted the graph input {wanted.name}"
        assert left.op_type == right.op_type, f"{path}: {left.op_type}, wanted {right.op_type}"
        assert got.index() == wanted.index(), path
        assert left.attributes.keys() == right.attributes.keys(), f"{path}: {left.attributes} {right.attributes}"
        for name, attribute in left.attributes.items():
            there = right.attributes[name]
            if attribute.type == ir.AttributeType.GRAPH:
                self.graphs(attribute.as_graph(), there.as_graph())
            elif attribute.type == ir.AttributeType.TENSOR:
                np.testing.assert_array_equal(attribute.as_tensor().numpy(), there.as_tensor().numpy())
            else:
                assert attribute.value == there.value, f"{path}: {name}={attribute.value}, wanted {there.value}"
        assert len(left.inputs) == len(right.inputs), f"{path}: number of inputs of {left.op_type}"
        for index, (a_in, b_in) in enumerate(zip(left.inputs, right.inputs, strict=True)):
            self._values(a_in, b_in, f"{path}/{left.op_type}[{index}]")
