"""Units of small graphs, counted by hand."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from text_graph import graph

from graphopt.analysis.certificate import certify, spare_axes
from graphopt.analysis.cost import model_stats
from graphopt.analysis.remove import remove_units
from graphopt.analysis.units import Coupling, analyse
from graphopt.errors import GraphoptError
from graphopt.model import infer_shapes
from graphopt.verify import compare, random_feeds


def units_of(coupling: Coupling, parameter: str, axis: int) -> list[int]:
    axes = coupling.parameter_axes(parameter)
    return axes[axis][0].tolist() if axis in axes else []


def test_two_convolutions_share_their_inner_channels() -> None:
    model = graph(
        "(float[n,3,8,8] x) => (float[n,2,8,8] y)",
        "h = Conv<pads=[1,1,1,1]>(x, w1, b1)  r = Relu(h)  y = Conv<pads=[1,1,1,1]>(r, w2)",
        w1=(5, 3, 3, 3),
        b1=(5,),
        w2=(2, 5, 3, 3),
    )
    coupling = analyse(model)
    assert len(coupling.units) == 5
    assert units_of(coupling, "w1", 0) == units_of(coupling, "b1", 0) == units_of(coupling, "w2", 1) == [1, 2, 3, 4, 5]
    assert {(f.tensor, f.axis) for f in coupling.frozen} == {("w1", 1), ("w2", 0)}
    assert all(unit.exact for unit in coupling.units)
    roles = {member.parameter: member.role for member in coupling.units[0].members}
    assert roles == {"w1": "producer", "b1": "producer", "w2": "consumer"}


def test_a_constant_that_reaches_padding_is_only_approximate() -> None:
    model = graph(
        "(float[n,3,8,8] x) => (float[n,2,8,8] y)",
        "h = Conv(x, w1)  s = Sigmoid(h)  y = Conv<pads=[1,1,1,1]>(s, w2)",
        w1=(4, 3, 1, 1),
        w2=(2, 4, 3, 3),
    )
    coupling = analyse(model)
    assert [unit.exact for unit in coupling.units] == [False] * 4
    assert "padding" in coupling.units[0].reason


def test_zero_times_infinity_is_not_zero() -> None:
    """Demodulation without an epsilon: where the weights are zero, so is the norm that divides by."""
    model = graph(
        "(float[n,3] x, float[n,1] s) => (float[n,2] y)",
        "h = MatMul(x, w1)  q = Mul(s, w1norm)  r = Sqrt(q)  i = Reciprocal(r)  z = Mul(h, i)  y = MatMul(z, w2)",
        w1=(3, 4),
        w1norm=np.arange(1.0, 5.0, dtype=np.float32),
        w2=(4, 2),
    )
    assert [unit.exact for unit in analyse(model).units] == [False] * 4


def test_a_constant_folds_into_the_bias_without_padding() -> None:
    model = graph(
        "(float[n,3,8,8] x) => (float[n,2,6,6] y)",
        "h = Conv(x, w1)  s = Sigmoid(h)  y = Conv(s, w2)",
        w1=(4, 3, 1, 1),
        w2=(2, 4, 3, 3),
    )
    coupling = analyse(model)
    assert all(unit.exact for unit in coupling.units)
    pruned = model.clone()
    report = remove_units(pruned, coupling, {1, 3})
    assert report.folded and not report.assumed_zero
    # By hand: sigmoid(0) = 1/2 from channels 0 and 2.
    w2 = model.graph.initializers["w2"].const_value.numpy()
    node = next(n for n in pruned.graph if n.outputs[0].name == "y")
    np.testing.assert_allclose(node.inputs[2].const_value.numpy(), 0.5 * w2[:, [0, 2]].sum(axis=(1, 2, 3)), rtol=1e-6)


def test_option_a_shortcut_is_followed_through_slice_and_pad() -> None:
    model = graph(
        "(float[n,3,8,8] x) => (float[n,2] y)",
        """a = Conv<pads=[1,1,1,1]>(x, w1)  s = Slice(a, i0, imax, axes, steps)  p = Pad(s, pads)
           b = Conv<pads=[1,1,1,1], strides=[2,2]>(a, w2)  c = Add(p, b)  m = GlobalAveragePool(c)  f = Flatten(m)
           y = Gemm<transB=1>(f, w3)""",
        w1=(4, 3, 3, 3),
        w2=(8, 4, 3, 3),
        w3=(2, 8),
        i0=np.array([0, 0]),
        imax=np.array([2**62, 2**62]),
        axes=np.array([2, 3]),
        steps=np.array([2, 2]),
        pads=np.array([0, 2, 0, 0, 0, 2, 0, 0]),
    )
    coupling = analyse(model)
    assert len(coupling.units) == 8
    assert units_of(coupling, "w1", 0) == units_of(coupling, "w2", 0)[2:6]
    pruned = model.clone()
    first, padded = units_of(coupling, "w1", 0)[1], units_of(coupling, "w2", 0)[0]
    remove_units(pruned, coupling, {first, padded})
    pads = next(n for n in pruned.graph if n.op_type == "Pad").inputs[1].const_value.numpy()
    assert pads.tolist() == [0, 1, 0, 0, 0, 2, 0, 0]
    assert model.graph.initializers["pads"].const_value.numpy().tolist() == [0, 2, 0, 0, 0, 2, 0, 0]


@pytest.mark.parametrize(
    ("group", "channels", "expected"),
    [(2, 8, 2 + 4), (4, 8, 4 + 2), (8, 8, 8)],
    ids=["2 groups of 4", "4 groups of 2", "depthwise"],
)
def test_groups_of_a_convolution_and_positions_in_them_are_units(group: int, channels: int, expected: int) -> None:
    model = graph(
        "(float[n,3,8,8] x) => (float[n,2,8,8] y)",
        f"h = Conv(x, w1)  g = Conv<group={group}, pads=[1,1,1,1]>(h, w2)  y = Conv(g, w3)",
        w1=(channels, 3, 1, 1),
        w2=(channels, channels // group, 3, 3),
        w3=(2, channels, 1, 1),
    )
    coupling = analyse(model)
    inputs = {int(unit) for vector in coupling.parameter_axes("w1")[0] for unit in vector}
    assert 0 not in inputs
    assert len(inputs) == expected
    for unit in inputs:
        pruned = model.clone()
        remove_units(pruned, coupling, {unit})
        compare(pruned, pruned, random_feeds(pruned, 0))  # it runs
    assert certify(model, coupling, spare_axes(coupling, set(list(inputs)[::2]))).holds


def test_a_vector_shared_by_two_layers_does_not_tie_them() -> None:
    model = graph(
        "(float[n,3,4,4] x) => (float[n,2,4,4] y)",
        "a = Conv(x, w1, b)  c = Conv(x, w2, b)  d = Conv(a, w3)  e = Conv(c, w4)  y = Add(d, e)",
        w1=(4, 3, 1, 1),
        w2=(4, 3, 1, 1),
        b=(4,),
        w3=(2, 4, 1, 1),
        w4=(2, 4, 1, 1),
    )
    coupling = analyse(model)
    assert len(coupling.units) == 8
    pruned = model.clone()
    remove_units(pruned, coupling, {units_of(coupling, "w1", 0)[0]})
    shapes = {v.name: tuple(v.const_value.shape) for v in pruned.graph.initializers.values()}
    assert shapes["b"] == (4,)
    assert (3,) in shapes.values()


def test_a_shared_matrix_ties_its_uses() -> None:
    model = graph(
        "(float[n,4] x) => (float[n,4] y)",
        "a = MatMul(x, w0)  b = MatMul(a, w)  c = Relu(b)  d = MatMul(c, w)  y = MatMul(d, w1)",
        w0=(4, 6),
        w=(6, 6),
        w1=(6, 4),
    )
    coupling = analyse(model)
    assert len(coupling.units) == 6


def test_unknown_operators_freeze_with_their_name() -> None:
    model = graph(
        "(float[n,3,8,8] x) => (float[n,2,8,8] y)",
        "h = Conv(x, w1)  k = my.domain.Mystery(h)  y = Conv(h, w2)",
        w1=(4, 3, 1, 1),
        w2=(2, 4, 1, 1),
        imports='"my.domain" : 1',
    )
    coupling = analyse(model)
    assert not coupling.units
    assert any("my.domain.Mystery" in f.reason for f in coupling.frozen if (f.tensor, f.axis) == ("w1", 0))


def test_a_mask_without_a_shape_that_nobody_reads_freezes_nothing() -> None:
    model = graph(
        "(float[n,3] x) => (float[n,2] y)",
        "h = MatMul(x, w1)  d, mask = Dropout <ratio = 0.5> (h)  y = MatMul(d, w2)",
        opset=9,
        w1=(3, 4),
        w2=(4, 2),
    )
    mask = model.graph.node(1).outputs[1]
    assert mask.shape is None, "shape inference gives it now: the case is gone"
    coupling = analyse(model)
    assert len(coupling.units) == 4
    assert certify(model, coupling, {1, 3}).holds
    model.graph.outputs.append(mask)
    assert not analyse(model).units


def test_a_body_of_an_unknown_operator_freezes_what_it_captures() -> None:
    model = graph(
        "(float[n,3] x, bool c) => (float[n,2] y)",
        """h = MatMul(x, w1)
           k = my.domain.Maybe (c) <body = t () => (float[n,4] u) { u = Relu(h) }>
           y = MatMul(h, w2)""",
        w1=(3, 4),
        w2=(4, 2),
        imports='"my.domain" : 1',
    )
    coupling = analyse(model)
    assert not coupling.units
    assert any("my.domain.Maybe" in f.reason for f in coupling.frozen if f.tensor == "w1")


def test_a_slice_that_is_no_longer_even_becomes_a_gather() -> None:
    model = graph(
        "(float[n,3,4,4] x) => (float[n,2,4,4] y)",
        "h = Conv(x, w1)  s = Slice(h, a, b, c, d)  y = Conv(s, w2)",
        w1=(9, 3, 1, 1),
        w2=(2, 5, 1, 1),
        a=np.array([0]),
        b=np.array([9]),
        c=np.array([1]),
        d=np.array([2]),
    )
    coupling = analyse(model)
    pruned = model.clone()
    ids = units_of(coupling, "w1", 0)
    remove_units(pruned, coupling, {ids[1], ids[4]} - {0})
    assert [n.op_type for n in pruned.graph] == ["Conv", "Gather", "Slice", "Conv"]


def test_emptying_an_axis_is_refused() -> None:
    model = graph(
        "(float[n,3,4,4] x) => (float[n,2,4,4] y)", "h = Conv(x, w1)  y = Conv(h, w2)", w1=(2, 3, 1, 1), w2=(2, 2, 1, 1)
    )
    with pytest.raises(GraphoptError, match="leave nothing"):
        remove_units(model, analyse(model), {1, 2})


def test_macs_of_a_convolution_and_its_terms() -> None:
    model = graph(
        "(float[n,3,8,8] x) => (float[n,2,8,8] y)",
        "h = Conv<pads=[1,1,1,1]>(x, w1)  y = Conv(h, w2)",
        w1=(5, 3, 3, 3),
        w2=(2, 5, 1, 1),
    )
    stats = model_stats(model)
    assert stats.macs == 64 * (5 * 3 * 9 + 2 * 5)
    assert stats.parameters == 5 * 3 * 9 + 10
    terms = {t.node: t for t in analyse(model).terms}
    assert terms["h"].coefficient == 64 * 9 * 3
    assert [a.tolist() for a in terms["h"].axes] == [[[1, 2, 3, 4, 5]]]


def test_analysis_is_deterministic_and_changes_nothing() -> None:
    from random_graphs import random_graph

    model = random_graph(7)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    one, two = analyse(model), analyse(random_graph(7))
    assert one.units == two.units
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def _gpt(layers: int, width: int, heads: int) -> ir.Model:
    """A graph whose matrices cannot be read."""
    path = Path(__file__).resolve().parents[3] / "tools" / "bench" / "analysis.py"
    spec = importlib.util.spec_from_file_location("bench_analysis", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model: ir.Model = module.gpt(layers, width, heads, vocabulary=11, positions=7)
    infer_shapes(model)
    return model


def test_weights_are_not_read() -> None:
    coupling = analyse(_gpt(2, 48, 3))
    found = Counter(unit.mode for unit in coupling.units)
    assert found["head"] == 2 * 3
    assert found["head_dim"] == 2 * (16 + 16)  # of queries and keys, of values
    assert found["channel"] >= 2 * 4 * 48
