"""What a model costs, and why that is not always known."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from graphopt.analysis.cost import model_stats

HEAD = '<ir_version: 8, opset_import: ["" : 17]>\n'


def from_text(text: str) -> ir.Model:
    from graphopt.model import infer_shapes

    model = ir.from_onnx_text(HEAD + text)
    infer_shapes(model)
    return model


def test_a_named_dimension_counts_as_one() -> None:
    stats = model_stats(from_text("g (float[N, 4] x, float[4, 6] w) => (float[N, 6] y) { y = MatMul(x, w) }"))
    assert (stats.macs, stats.macs_unknown) == (24, None)


@pytest.mark.parametrize(("rows", "names"), [("N, H", ("N", "H")), ("N, 2", ("N",))])
def test_an_unknown_size_is_named_with_what_to_try(rows: str, names: tuple[str, ...]) -> None:
    text = f"""g (float[{rows}, 4] x, int64[1] n, float[4, 6] w) => (float[a, b] y) {{
        whole = Shape(x)
        last = Constant<value_ints = [4]>()
        shape = Concat<axis = 0>(n, last)
        flat = Reshape(x, shape)
        y = MatMul(flat, w)
    }}"""
    model = from_text(text)
    for value in (v for node in model.graph for v in node.outputs):
        if value.name == "flat":
            value.shape = ir.Shape([None, 4])
    stats = model_stats(model)
    assert stats.macs is None and stats.macs_unknown is not None
    assert "the size of dimension 0 of tensor flat at MatMul" in stats.macs_unknown
    assert stats.macs_unknown.endswith(f"dimensions: {' '.join(f'--dim {name}=SIZE' for name in names)}")


def test_work_in_a_body_is_not_counted_as_none() -> None:
    text = """g (bool c, float[2, 4] x, float[4, 6] w) => (float[2, 6] y) {
        y = If (c) <
            then_branch = then () => (float[2, 6] t) { t = MatMul(x, w) },
            else_branch = other () => (float[2, 6] e) { p = MatMul(x, w) e = Neg(p) }
        >
    }"""
    stats = model_stats(from_text(text))
    assert stats.macs is None
    assert "stands in the body of an If, Loop or Scan" in (stats.macs_unknown or "")


@pytest.mark.parametrize("scheme", ["int8-weights", "int4-weights"])
@pytest.mark.parametrize("sizes", [(512, 384), (64, 48)])  # a kernel for blocks, and arithmetic
def test_weights_of_four_bits_are_as_many_as_they_were(scheme: str, sizes: tuple[int, int]) -> None:
    """Two in a byte: fewer bytes, not fewer parameters."""
    import numpy as np

    import graphopt

    rows, columns = sizes
    model = from_text(
        f"g (float[N, {rows}] x, float[{rows}, {columns}] w) => (float[N, {columns}] y) {{ y = MatMul(x, w) }}"
    )
    weight = next(value for value in model.graph.inputs if value.name == "w")
    model.graph.inputs.remove(weight)
    weight.const_value = ir.tensor(np.random.default_rng(0).standard_normal(sizes).astype(np.float32), name="w")
    model.graph.register_initializer(weight)
    before = model_stats(model)
    after = model_stats(graphopt.optimize(model, f"quantize{{scheme={scheme}}}", bench=False).model)
    assert before.parameters == rows * columns <= after.parameters < 1.1 * before.parameters
    assert after.bytes < before.bytes * (0.3 if scheme == "int8-weights" else 0.2)


@pytest.mark.parametrize(("operator", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_recurrent_nodes_whose_weights_are_computed_are_counted(operator: str, gates: int) -> None:
    stats = model_stats(
        from_text(f"""g (float[7, 2, 5] x, float[1, {gates * 3}, 5] w, float[1, {gates * 3}, 3] r) =>
        (float[7, 1, 2, 3] y) {{
        wide = Relu(w)
        y, last = {operator}<hidden_size = 3>(x, wide, r)
    }}""")
    )
    assert stats.macs == 7 * 2 * gates * 3 * (5 + 3)
